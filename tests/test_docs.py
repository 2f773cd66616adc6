"""The pages of docs/ name what exists, and their code works.

coming_from/trl.md: no option of TRL's last PPO is missing. coming_from/llama_factory.md and openrlhf.md: every option
of ours exists. trainers/ppo.md: the objects that the trainer is made of. results/: numbers in sentences are those of
the committed files (tests/docs/test_tables.py has the tables). troubleshooting.md: the messages exist.
"""

import ast
import dataclasses
import inspect
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainingArguments

import hf_rlhf_ext
from hf_rlhf_ext import PPOConfig, PPOTrainer
from hf_rlhf_ext.metrics.names import METRICS
from hf_rlhf_ext.readers.registry import COMPARISONS, DEMONSTRATIONS

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "coming_from" / "trl.md").read_text(encoding="utf-8")
PPO_PAGE = (DOCS / "trainers" / "ppo.md").read_text(encoding="utf-8")
PYTHON_BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)  # a title may follow the language
FIELDS = {field.name: field for field in dataclasses.fields(PPOConfig)}
ARGUMENTS = set(inspect.signature(PPOTrainer).parameters)

# Read off trl 1.12.0: experimental/ppo/ppo_config.py, and trainer/base_config.py, which it inherits from.
TRL_OPTIONS = {
    "learning_rate": 3e-6,
    "dataset_num_proc": None,
    "num_mini_batches": 1,
    "total_episodes": None,
    "local_rollout_forward_batch_size": 64,
    "num_sample_generations": 10,
    "response_length": 53,
    "stop_token": None,
    "stop_token_id": None,
    "temperature": 0.7,
    "missing_eos_penalty": None,
    "sft_model_path": "EleutherAI/pythia-160m",
    "world_size": None,
    "num_total_batches": None,
    "micro_batch_size": None,
    "local_batch_size": None,
    "batch_size": None,
    "local_mini_batch_size": None,
    "mini_batch_size": None,
    "push_to_hub": False,
    "reward_model_path": "EleutherAI/pythia-160m",
    "model_adapter_name": None,
    "ref_adapter_name": None,
    "num_ppo_epochs": 4,
    "whiten_rewards": False,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "cliprange": 0.2,
    "vf_coef": 0.1,
    "cliprange_value": 0.2,
    "gamma": 1.0,
    "lam": 0.95,
    "ds3_gather_for_generation": True,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "bf16": None,
    "lr_scheduler_kwargs": None,
    "use_liger_kernel": False,
    "torch_empty_cache_steps": None,
}
# The same release's PPOTrainer.__init__, and the keys of `metrics` in its train().
TRL_ARGUMENTS = {"args", "processing_class", "model", "ref_model", "reward_model", "train_dataset", "value_model"}
TRL_ARGUMENTS |= {"data_collator", "eval_dataset", "optimizers", "callbacks", "peft_config"}
TRL_METRICS = {f"objective/{name}" for name in ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores")}
TRL_METRICS |= {"policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg"}
TRL_METRICS |= {"loss/value_avg", "val/clipfrac_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens"}
TRL_METRICS |= {"lr", "episode", "eps"}


def section(title: str, page: str = PAGE) -> str:
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(text: str, columns: int) -> list[list[str]]:
    """Rows of the first table with so many columns, without its head."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in rows if len(row) == columns and not set(row[0]) <= set("-")][1:]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


OPTIONS = table(section("Options"), 5)
SCRIPT = PYTHON_BLOCK.findall(section("Their TL;DR example"))


def test_every_option_of_trl_is_in_the_table_with_its_default():
    found = {quoted(row[0])[0]: ast.literal_eval(quoted(row[1])[0]) for row in OPTIONS}
    assert found == TRL_OPTIONS and len(OPTIONS) == len(TRL_OPTIONS)


@pytest.mark.parametrize("row", OPTIONS, ids=lambda row: row[0])
def test_our_side_of_an_option_exists_with_its_default(row):
    names = quoted(row[2])
    assert len(names) == 1 or (row[2] == "none" and row[4])  # none, and why
    for name in names:
        assert name in FIELDS or name in ARGUMENTS
        if name in FIELDS:
            assert ast.literal_eval(quoted(row[3])[0]) == FIELDS[name].default


def test_what_the_options_say_beside_the_table_exists():
    properties = {name for name, value in vars(PPOConfig).items() if isinstance(value, property)}
    theirs, attributes = set(TRL_OPTIONS) | {"fp16"}, {"Trainer", "TrainingArguments", "GRPOTrainer", "PPOConfig"}
    known = FIELDS.keys() | ARGUMENTS | properties | theirs | attributes
    words = {word for row in OPTIONS for word in quoted(row[4])}
    words |= {word for row in table(section("Options"), 3) for word in quoted(row[0])}
    words |= set(quoted(section("Options").rsplit("\n\nNew here:", 1)[1]))
    words = {word for word in words if re.fullmatch(r"\w+", word)} - {"None", "generate_completions"}
    assert words - known == set()
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = set(quoted(section("Options").rsplit("\n\nNew here:", 1)[1])) - {"hf-rlhf ppo --help-all"}
    assert ours <= FIELDS.keys() - inherited - theirs


def test_every_argument_of_trl_is_in_the_table_and_ours_exist():
    rows = table(section("Arguments of the trainer"), 3)
    assert {quoted(row[0])[0] for row in rows} == TRL_ARGUMENTS
    for row in rows:
        assert row[1] == "none" or quoted(row[1])[0] in ARGUMENTS


def test_every_metric_of_trl_is_in_the_table_and_ours_exist():
    rows = table(section("Metrics"), 3)
    assert {quoted(row[0])[0] for row in rows} == TRL_METRICS
    for row in rows:
        assert row[1] == "none" or quoted(row[1])[0] in METRICS
        assert not any("/" in word and word not in METRICS for word in quoted(row[2]))


def test_the_script_uses_only_public_names_and_real_options():
    assert len(SCRIPT) == 1
    tree = ast.parse(SCRIPT[0])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "hf_rlhf_ext":
            assert {alias.name for alias in node.names} <= set(hf_rlhf_ext.__all__)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("PPOConfig", "PPOTrainer"):
            known = FIELDS.keys() if node.func.id == "PPOConfig" else ARGUMENTS
            assert not node.args and {keyword.arg for keyword in node.keywords} <= known
    config = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "PPOConfig")
    options = {keyword.arg: eval(ast.unparse(keyword.value), {}) for keyword in config.keywords}
    assert PPOConfig(**options | {"bf16": False, "use_cpu": True}).rollout_size == 64


def options_of_the_commands() -> set[str]:
    """Every option that `hf-rlhf sft`, `reward` and `ppo` take."""
    options = {"num_processes", "accelerate_config"}
    for recipe in ("sft", "reward", "ppo"):
        for arguments in import_module(f"recipes.{recipe}").ARGUMENTS:
            options |= {field.name for field in dataclasses.fields(arguments)}
    return options


@pytest.mark.parametrize("page", ["llama_factory", "openrlhf"])
def test_our_side_of_other_libraries_options_exists(page):
    text = (DOCS / "coming_from" / f"{page}.md").read_text(encoding="utf-8")
    known = options_of_the_commands()
    rows = [row for row in table(text, 3) if row[1].startswith("`") or row[1] == "none"]
    formats = {fmt.name for fmt in (*COMPARISONS, *DEMONSTRATIONS)}
    assert len(rows) > 40
    for row in rows:
        for name in quoted(row[1]):
            assert name in known | formats, name


def test_the_objects_of_the_ppo_page_are_where_it_says():
    rows = table(section("How PPOTrainer is built", PPO_PAGE), 3)
    assert len(rows) > 10
    for row in rows:
        words = quoted(row[0])
        files = [word for word in words if word.endswith(".py")] or ["ppo/callbacks.py"]
        homes = [import_module(f"hf_rlhf_ext.{file.removesuffix('.py').replace('/', '.')}") for file in files]
        classes = re.findall(r"`([A-Z]\w+)[`(]", " ".join(row))
        where = [*homes, *map(import_module, ("hf_rlhf_ext", "hf_rlhf_ext.ppo.rollout"))]
        for name in classes:
            assert any(hasattr(module, name) for module in where), name


def test_the_engine_and_the_callback_of_the_ppo_page_work(tiny_llama, chat_tokenizer, tmp_path, capsys):
    (code,) = PYTHON_BLOCK.findall(section("How PPOTrainer is built", PPO_PAGE))
    names: dict = {}
    exec(code, names)
    engine = names["CountingEngine"]()
    trainer = PPOTrainer(
        tiny_llama,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=PPOConfig(
            str(tmp_path),
            per_device_train_batch_size=2,
            num_ppo_epochs=1,
            max_steps=2,
            max_completion_length=4,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"prompt": ["one", "two", "three"]}),
        processing_class=chat_tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[names["PrintKL"]()],
        engine=engine,
    )
    trainer.train()
    assert engine.prompts == 4
    assert re.findall(r"^rollout (\d): -?\d+\.\d\d nats", capsys.readouterr().out, re.MULTILINE) == ["0", "1"]


def study(name: str) -> dict:
    return json.loads((DOCS / "study" / f"{name}.json").read_text(encoding="utf-8"))


def words_of(page: str) -> str:
    """The text of a page of results/ without line breaks."""
    return " ".join((DOCS / "results" / f"{page}.md").read_text(encoding="utf-8").split())


def tokens_per_pair(run: dict) -> float:
    return run["tokens_per_s"] / run["pairs_per_s"]


def test_numbers_in_the_text_of_the_benchmarks_are_the_committed_ones():
    text = words_of("benchmarks")
    measured = study("reward_benchmark")
    runs = {dtype: measured[dtype]["runs"] for dtype in ("bfloat16", "float32")}
    assert f"bf16 instructions ({sum(measured['bfloat16']['minutes'].values())} minutes" in text
    assert f"(fp32, {sum(measured['float32']['minutes'].values())} minutes)" in text

    difference = max(measured[dtype]["results"]["max_score_diff"] for dtype in runs)
    assert f"differ by at most {difference:.0e}".replace("e-0", "e-") in text
    assert f"does not fit into {runs['float32']['trl, micro-batch 16']['available_gb']:.0f} GB" in text
    assert runs["float32"]["trl, micro-batch 1"]["peak_gb"] < runs["float32"]["ours, 16 prompts"]["peak_gb"] / 2
    assert f"{runs['float32']['ours, K = 4']['prompt_tokens']} tokens per prompt, fp32" in text

    fewer = {}
    for dtype, of_dtype in runs.items():
        ratios = []
        for k in (4, 9):
            trl = tokens_per_pair(of_dtype[f"trl, K = {k} as pairs"])
            ours = tokens_per_pair(of_dtype[f"ours, K = {k}"])
            ratios.append(f"{trl / ours:.1f}")
        fewer[dtype] = " and ".join(ratios)
    assert f"{fewer['bfloat16']} times fewer tokens per pair with short prompts" in text
    assert f"{fewer['float32']} times fewer with conversations" in text
    fractions = [f"{measured[dtype]['results']['limit_fraction']:.0%}" for dtype in runs]
    assert "at {} in bf16 and {} in fp32".format(*fractions) in text


def test_numbers_in_the_text_of_the_studies_are_the_committed_ones():
    text = words_of("studies")
    reward = study("reward_model")
    summary = reward["summary"]
    difference, low, high = (f"{value:.3f}".replace("-", "−") for value in summary["ours_minus_trl"])
    assert f"ours minus TRL's is {difference} (95% interval {low} to {high})" in text
    assert f"the longer reply reaches {summary['longer_wins']:.3f}" in text
    whole = reward["runs"]["ours-all"]
    reached = "{:.3f} ({:.3f} to {:.3f})".format(*summary["ours-all"])
    assert f"all {whole['pairs']:,} other pairs reaches {reached}" in text
    mean = sum(summary[f"ours-{seed}"][0] for seed in range(3)) / 3
    assert f"{100 * (summary['ours-all'][0] - mean):.1f} points above the mean" in text
    minutes = {}
    for kind in ("ours", "trl"):
        of_kind = [reward["runs"][f"{kind}-{seed}"]["cpu_minutes"] for seed in range(3)]
        minutes[kind] = f"{min(of_kind):.1f} to {max(of_kind):.1f}"
    assert f"{minutes['ours']} CPU minutes with ours, and {minutes['trl']} with TRL's" in text
    assert f"took {whole['cpu_minutes']:.0f} CPU minutes" in text

    ppo = study("ppo")
    assert all(ppo["summary"][f"stories260K-{seed}"]["moving_mean_within_25"] == 1.0 for seed in range(3))
    minutes_of_seeds = [ppo["curves"][f"smollm2-{seed}"]["cpu_minutes"] for seed in range(3)]
    assert f"fp32, {min(minutes_of_seeds):.0f} to {max(minutes_of_seeds):.0f} CPU minutes" in text
    wrong = ppo["summary"]["wrong"]
    assert wrong["best_step"] is None and "KL is 132.9 nats" in wrong["stop_reason"] and "KL is 132.9 nats" in text
    warm_up = ppo["summary"]["wrong-warmup"]
    assert "KL is 40.2 nats" in warm_up["stop_reason"] and "(KL 40.2)" in text
    assert f"at KL {warm_up['kept']['kl']:.1f}" in text


def test_messages_of_the_troubleshooting_page_exist():
    root = DOCS.parent
    sources = [*(root / "hf_rlhf_ext").rglob("*.py"), *(root / "recipes").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    fragments = fragments_of_messages()
    assert len(fragments) > 150
    for fragment in fragments:
        assert fragment in code, fragment


def test_each_fragment_of_the_troubleshooting_page_leads_to_one_row():
    fragments = fragments_of_messages()
    for number, fragment in enumerate(fragments):
        for other in fragments[:number] + fragments[number + 1 :]:
            assert fragment not in other, f"{fragment!r} is a part of {other!r}: use words that tell them apart"


def fragments_of_messages() -> list[str]:
    """The fragments in the first column of the tables. A cell has one or more."""
    found = []
    for row in table((DOCS / "troubleshooting.md").read_text(encoding="utf-8"), 3):
        if row[0].startswith("`"):
            found += quoted(row[0])
    return found
