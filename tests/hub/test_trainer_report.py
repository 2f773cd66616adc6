"""The report of a run from Python: metrics of the weights that are pushed, and everything that the trainer knows."""

import json
import math
import shutil
from types import SimpleNamespace

import datasets
import pytest
import yaml
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.integrations import CodeCarbonCallback
from trl import SFTConfig

from hf_rlhf_ext import (
    BradleyTerryConfig,
    BradleyTerryTrainer,
    PPOConfig,
    PPOTrainer,
    load_base_model,
    load_comparisons,
    load_policy,
)
from hf_rlhf_ext.hub.card import card_from_report
from hf_rlhf_ext.hub.merge import merge_run
from hf_rlhf_ext.hub.reports.evaluations import evaluated_weights, training_seconds
from hf_rlhf_ext.hub.reports.results import collect_results
from hf_rlhf_ext.hub.reports.trainer_report import trainer_card_options, trainer_report, write_trainer_report
from hf_rlhf_ext.hub.sft import PublishingSFTTrainer
from hf_rlhf_ext.reward.ensemble import RewardEnsemble

KINDS = ("sft", "reward_model", "policy")
SECTIONS = {"sft": "sft", "reward_model": "reward_model", "policy": "ppo"}
KEY = {"sft": "eval_loss", "reward_model": "nll", "policy": "proxy_after"}
LOGGED = {"sft": "eval_loss", "reward_model": "eval_nll", "policy": "eval_objective/scores"}
PAIRS = [{"prompt": f"Day {k}?", "chosen": "A happy day" + "!" * (k % 3), "rejected": "No."} for k in range(4)]
TEXTS = [{"text": f"Tell {k}: a sunny day in the garden"} for k in range(4)]
PROMPTS = [{"prompt": f"Tell {k}:"} for k in range(4)]
ROWS = {"sft": TEXTS, "reward_model": PAIRS, "policy": PROMPTS}


def short(completions, **columns):
    return [-float(len(text)) for text in completions]


def has_a(completions, **columns):
    return [float("a" in text) for text in completions]


@pytest.fixture
def base(tiny_llama, chat_tokenizer, tmp_path):
    for part in (tiny_llama, chat_tokenizer):
        part.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def make(base, chat_tokenizer, tmp_path):
    """Makes a trainer of a kind on a tiny Llama: make(kind, rows=None, eval_rows=None, given={}, **options)."""

    def made(kind, *, rows=None, eval_rows=None, given=None, lora=None, **options):
        usual = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 3, "disable_tqdm": True}
        usual |= {"per_device_train_batch_size": 2, "activation_checkpointing": False, "save_strategy": "no"}
        usual |= {"output_dir": str(tmp_path / kind), "learning_rate": 5e-3, "logging_steps": 1}
        if kind == "policy":
            usual |= {"max_completion_length": 4, "num_mini_batches": 1, "num_ppo_epochs": 1, "critic": "head"}
        task = "SEQ_CLS" if kind == "reward_model" else "CAUSAL_LM"
        peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task, **(lora or {}))
        given = {"processing_class": chat_tokenizer, "peft_config": peft_config, "eval_dataset": eval_rows} | (
            given or {}
        )
        given["train_dataset"] = Dataset.from_list(ROWS[kind]) if rows is None else rows
        model = given.pop("model", None) or load_base_model(
            base, task="reward" if kind == "reward_model" else "causal_lm", dtype="float32"
        )
        if kind == "sft":
            return PublishingSFTTrainer(model, args=SFTConfig(**usual | options), **given)
        if kind == "reward_model":
            return BradleyTerryTrainer(model, args=BradleyTerryConfig(**usual | options), **given)
        return PPOTrainer(model, given.pop("reward_funcs", [short, has_a]), args=PPOConfig(**usual | options), **given)

    return made


def section_of(trainer):
    return getattr(trainer_report(trainer), SECTIONS[trainer.card_kind])


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


BEST = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
BEST |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}


class EvaluatedAtStep1(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = state.global_step == 1


# Metrics


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_metrics_are_those_of_the_best_checkpoint_that_was_loaded(kind, make, tmp_path):
    rows = Dataset.from_list(ROWS[kind])
    best = BEST | ({"metric_for_best_model": "objective/scores"} if kind == "policy" else {})
    trainer = make(kind, eval_rows=rows, max_steps=3, **best)
    trainer.train()
    section = section_of(trainer)
    step = trainer.state.best_global_step
    every = logged(trainer, LOGGED[kind])
    if kind != "policy":
        assert step == 1 and every[0] != pytest.approx(every[-1], rel=1e-4)  # or the test could not fail
    assert section.weights_step == step and section.total_steps == 3
    assert section.metrics[KEY[kind]] == every[step - 1]
    assert trainer.evaluate()[LOGGED[kind]] == pytest.approx(every[step - 1], rel=1e-5)
    again = section_of(trainer)
    assert again.metrics[KEY[kind]] == pytest.approx(section.metrics[KEY[kind]], rel=1e-5)
    if kind == "reward_model":
        assert section.groups and section.metrics["decided_pairs"] == 4
        report = write_trainer_report(trainer, tmp_path)
        assert report.card.plot == "evaluation.png" and (tmp_path / "evaluation.png").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_training_that_went_on_after_the_last_evaluation_has_no_metrics(kind, make):
    trainer = make(kind, eval_rows=Dataset.from_list(ROWS[kind]), max_steps=2)
    trainer.add_callback(EvaluatedAtStep1())
    trainer.train()
    assert logged(trainer, LOGGED[kind])
    section = section_of(trainer)
    assert KEY[kind] not in section.metrics and section.evaluation_sets is None
    assert (section.weights_step, section.total_steps) == (2, 2)
    if kind == "reward_model":
        assert section.groups is None and trainer.judged is not None


@pytest.mark.slow
def test_a_resumed_run_has_the_metrics_of_a_best_checkpoint_of_before(make):
    rows = Dataset.from_list(PAIRS)
    make("reward_model", eval_rows=rows, **BEST | {"max_steps": 2}).train()
    trainer = make("reward_model", eval_rows=rows, **BEST)
    trainer.train(resume_from_checkpoint=True)
    section = section_of(trainer)
    assert section.weights_step == 1 and section.total_steps == 3
    assert section.metrics["nll"] == logged(trainer, "eval_nll")[0]
    assert section.groups is None  # the pairs were judged in another process: only numbers are in the log
    assert trainer_report(trainer).seconds == {}  # the first part is not known
    trainer.evaluate()
    assert section_of(trainer).groups


def test_predictions_and_other_sets_are_not_taken_for_the_evaluation(make, tmp_path):
    trainer = make("reward_model", eval_rows=Dataset.from_list(PAIRS), eval_strategy="steps", eval_steps=3)
    trainer.train()
    (nll,) = logged(trainer, "eval_nll")
    trainer.predict(Dataset.from_list(PAIRS[:2]))
    assert section_of(trainer).metrics["nll"] == nll and section_of(trainer).groups is None
    assert write_trainer_report(trainer, tmp_path).card.plot is None
    trainer.evaluate(Dataset.from_list(PAIRS[:2]), metric_key_prefix="test")
    section = section_of(trainer)
    assert section.metrics["nll"] == nll and set(section.evaluation_sets) == {"test"}
    assert section.evaluation_sets["test"]["decided_pairs"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_several_evaluation_sets_have_their_own_numbers(kind, make):
    sets = {"easy": Dataset.from_list(ROWS[kind][:3]), "hard one": Dataset.from_list(ROWS[kind][1:])}
    trainer = make(kind, eval_rows=sets, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer.train()
    report = trainer_report(trainer)
    section = getattr(report, SECTIONS[kind])
    assert list(section.evaluation_sets) == ["easy", "hard one"] and KEY[kind] not in section.metrics
    for name, metrics in section.evaluation_sets.items():
        assert metrics[KEY[kind]] == logged(trainer, LOGGED[kind].replace("eval_", f"eval_{name}_"))[-1]
    counts = {"sft": "heldout_rows", "reward_model": "decided_pairs", "policy": "n"}
    assert section.evaluation_sets["easy"][counts[kind]] == 3
    assert {record.get("set") for record in report.card.data if record["role"] == "evaluation"} == set(sets)
    results = collect_results(kind, report)
    assert {result.dataset for result in results} == set(sets)
    assert len({(result.key, result.dataset) for result in results}) == len(results)


def test_a_count_is_only_stated_of_the_rows_that_were_evaluated(make):
    trainer = make("sft", eval_rows=Dataset.from_list(TEXTS), max_steps=1)
    trainer.train()
    trainer.evaluate()
    assert section_of(trainer).metrics["heldout_rows"] == 4
    (other,) = [log for log in trainer.state.log_history if "eval_runtime" in log]
    other |= {"eval_runtime": 100.0, "eval_samples_per_second": 7.0}  # of 700 rows
    assert "heldout_rows" not in section_of(trainer).metrics


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_of_other_rows_is_not_taken_for_one_of_the_evaluation_set(kind, make):
    rows = Dataset.from_list(ROWS[kind])
    trainer = make(kind, eval_rows=rows)
    trainer.evaluate()
    assert "evaluation" in {record["role"] for record in trainer_report(trainer).card.data}
    trainer.evaluate(rows.select(range(3)))
    report = trainer_report(trainer)
    assert "evaluation" not in {record["role"] for record in report.card.data}
    metrics = getattr(report, SECTIONS[kind]).metrics
    assert KEY[kind] in metrics and 4 not in (metrics.get("n"), metrics.get("heldout_rows"))


def state(logs, **more):
    usual = {"global_step": 4, "best_model_checkpoint": None}
    args = SimpleNamespace(load_best_model_at_end="best_model_checkpoint" in more)
    return SimpleNamespace(state=SimpleNamespace(log_history=logs, **usual | more), args=args)


END = {"train_runtime": 10.0, "train_loss": 1.0, "step": 4}


def evaluation(step, loss, prefix="eval"):
    return {f"{prefix}_loss": loss, f"{prefix}_runtime": 1.0, "step": step}


@pytest.mark.parametrize(
    ("logs", "best", "expected"),
    [
        ([evaluation(2, 2.0), evaluation(4, 4.0), END], None, 4.0),
        ([evaluation(2, 2.0), evaluation(4, 4.0), END], 2, 2.0),
        ([evaluation(2, 2.0), evaluation(4, 4.0), END, evaluation(4, 9.0)], 2, 9.0),  # after it was loaded
        ([evaluation(2, 2.0), END], None, None),
        ([evaluation(2, 2.0), evaluation(4, 4.0)], 2, 4.0),  # interrupted: nothing was loaded
        ([evaluation(4, 4.0), END, {"loss": 1.0, "step": 5}], None, 4.0),
        ([{"eval_loss": 4.0, "step": 4}], None, 4.0),  # a log without durations
        ([evaluation(4, 4.0), {"eval_bleu": 1.0, "step": 4}, END], None, 4.0),  # a metric that a callback adds
        ([], None, None),
    ],
)
def test_the_evaluation_of_the_weights_is_found_in_the_log(logs, best, expected, tmp_path):
    more = {}
    if best is not None:
        (tmp_path / f"checkpoint-{best}").mkdir()
        more = {"best_model_checkpoint": str(tmp_path / f"checkpoint-{best}")}
    found = evaluated_weights(state(logs, **more))
    assert found.sets.get("", {}).get("loss") == expected and found.total_steps == 4
    if best is not None and END in logs:
        (tmp_path / f"checkpoint-{best}").rmdir()  # so that it is not known whether it was loaded
        found = evaluated_weights(state(logs, **more))
        assert found.step is None and found.sets.get("", {}).get("loss") == (9.0 if expected == 9.0 else None)


def test_the_step_of_weights_that_a_guard_may_have_restored_is_not_stated():
    stopped = state([evaluation(2, 2.0), evaluation(4, 4.0), END])
    assert evaluated_weights(stopped).step == 4
    stopped.stop_reason = "KL above max_kl"
    found = evaluated_weights(stopped)
    assert found.step is None and found.sets[""]["loss"] == 4.0


def test_the_duration_is_that_of_the_whole_training():
    assert training_seconds(state([END])) == 10.0 and training_seconds(state([])) is None
    resumed = state([END])
    resumed._initial_global_step = 2
    assert training_seconds(resumed) is None
    resumed.state.log_history = [END, {"loss": 1.0}, END]
    assert training_seconds(resumed) == 20.0


# What the trainer knows


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_a_trainer_knows_is_stated_and_fits_into_json(kind, make, chat_tokenizer, base, tmp_path):
    data = tmp_path / "private" / f"{kind}.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    rows = Dataset.from_list(ROWS[kind])
    lora = {"use_rslora": True, "lora_dropout": 0.25}
    trainer = make(kind, rows=rows, eval_rows=rows, lora=lora, weight_decay=0.125)
    before = trainer_report(trainer)  # before training
    assert getattr(before, SECTIONS[kind]).weights_step is None and before.seconds == {}
    trainer.model.get_base_model().config.name_or_path = "alice/base"
    trainer.model.get_base_model().config._commit_hash = "c" * 40
    options = trainer_card_options(trainer)
    json.dumps(options)
    assert options["kind"] == kind and options["relation"] == "adapter" and options["base_dtype"] == "float32"
    assert options["base_model"] == "alice/base" and options["base_revision"] == "c" * 40
    assert options["prompt_form"] == "text" and "chat_template" not in options
    assert options["adapter"]["type"] == "LORA" and options["adapter"]["r"] == 2
    assert options["adapter"]["use_rslora"] and options["adapter"]["lora_dropout"] == 0.25
    assert "vocabulary" not in options["adapter"] and "init_lora_weights" not in options["adapter"]
    config = yaml.safe_load(options["config"])
    assert config["weight_decay"] == 0.125 and "output_dir" not in config and "adam_beta1" not in config
    roles = {"sft": "demonstrations", "reward_model": "comparisons", "policy": "prompts"}
    assert options["data"] == [{"role": roles[kind], "rows": 4}, {"role": "evaluation", "rows": 4}]
    assert "datasets" not in options and str(tmp_path) not in json.dumps(trainer_report(trainer).to_dict())


def test_a_base_that_is_not_on_the_hub_is_not_named(make, base):
    trainer = make("reward_model", given={"peft_config": None}, max_steps=1)
    options = trainer_card_options(trainer)
    assert options["base_model"] is None and options["relation"] == "finetune" and "base_revision" not in options
    assert "adapter" not in options


def test_the_precision_of_a_quantized_base_is_stated(make, chat_tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(chat_tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    config.pad_token_id = chat_tokenizer.pad_token_id
    folder = make("sft").args.output_dir
    LlamaForCausalLM(config).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    for kind in KINDS:
        task = "reward" if kind == "reward_model" else "causal_lm"
        options = trainer_card_options(
            make(kind, given={"model": load_base_model(folder, task=task, load_in_4bit=True)})
        )
        assert options["load_in_4bit"] and options["quantization"]["bnb_4bit_quant_type"] == "nf4", kind


def test_a_chat_template_of_one_s_own_is_told_from_that_of_the_base(make, hub, base, chat_tokenizer):
    from huggingface_hub import HfApi

    HfApi().create_repo("alice/base")
    HfApi().upload_folder(repo_id="alice/base", folder_path=base)
    chat = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS]
    model, tokenizer = load_policy("alice/base", dtype="float32")
    given = {"model": model, "processing_class": tokenizer}
    options = trainer_card_options(make("policy", rows=Dataset.from_list(chat), given=given))
    assert (options["prompt_form"], options["chat_template"]) == ("messages", "base")
    assert options["base_revision"] == HfApi().model_info("alice/base").sha
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|>\n")
    given = {"model": load_policy("alice/base", dtype="float32")[0], "processing_class": tokenizer}
    options = trainer_card_options(make("policy", rows=Dataset.from_list(chat), given=given))
    assert options["chat_template"] == "own"


def test_data_from_the_hub_have_id_and_commit_and_files_have_a_name_without_path(make, hub, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Dataset.from_list(PAIRS).push_to_hub("alice/pairs")
    Dataset.from_list(PAIRS[:2]).push_to_hub("alice/pairs", config_name="second", split="test")
    commit = HfApi().dataset_info("alice/pairs").sha
    train = load_dataset("alice/pairs", "default", split="train", cache_dir=str(tmp_path / "cache"))
    parts = train.map(lambda row: row | {"note": 1}).train_test_split(0.5, seed=0)
    second = load_dataset("alice/pairs", "second", split="test", cache_dir=str(tmp_path / "cache"))
    trainer = make("reward_model", rows=parts["train"], eval_rows={"own": parts["test"], "second": second})
    options = trainer_card_options(trainer)
    assert options["datasets"] == ["alice/pairs"] and options["dataset_revision"] == commit
    known = {"name": "alice/pairs", "revision": commit}
    assert options["data"] == [
        {"role": "comparisons", **known, "split": "train", "rows": 2},
        {"role": "evaluation", **known, "split": "train", "rows": 2, "set": "own"},
        {"role": "evaluation", **known, "config": "second", "split": "test", "rows": 2, "set": "second"},
    ]
    file = tmp_path / "judged.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    read, _ = load_comparisons(str(file))
    (record,) = trainer_card_options(make("reward_model", rows=read))["data"]
    assert record == {"role": "comparisons", "name": "judged.jsonl", "rows": 4}
    read, _ = load_comparisons("alice/pairs", split="train", config="default")
    (record,) = trainer_card_options(make("reward_model", rows=read))["data"]
    assert record == {"role": "comparisons", **known, "split": "train", "rows": 4}


def test_dropped_rows_are_said(make):
    rows = [*PAIRS, {"prompt": "Long", "chosen": "a happy day " * 60, "rejected": "No."}]
    options = trainer_card_options(
        make("reward_model", rows=Dataset.from_list(rows), max_length=64, overflow="drop", eval_rows=None)
    )
    assert options["data"][0]["rows"] == 4 and options["max_length"] == 64
    (line,) = options["rows_read"]
    assert "4 of 5 rows kept" in line


# PPO


def test_the_rewards_and_the_start_have_their_names(make, base, tmp_path):
    rows = Dataset.from_list(PROMPTS)
    given = {"eval_reward_funcs": [has_a], "reward_funcs": [short]}
    trainer = make("policy", eval_rows=rows, given=given, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer.policy.get_base_model().config.name_or_path = "alice/base"
    trainer.train()
    section = section_of(trainer)
    assert section.rewards == ["short"] and section.reward_formula is None and section.eval_rewards == ["has_a"]
    assert section.start == "the base model alice/base"
    assert section.metrics["has_a_after"] == logged(trainer, "eval_rewards/has_a/mean")[-1]
    assert section.metrics["n"] == 4 and "proxy_before" not in section.metrics
    weighted = make("policy", given={"reward_funcs": [short, has_a]}, reward_weights=[0.5, 2.0])
    assert section_of(weighted).reward_formula == "0.5 × short + 2 × has_a"
    assert section_of(weighted).start == "the model base"  # only the name of a local folder


@pytest.mark.parametrize("critic, per_prompt", [("none", 2), ("head", 2), ("head", 1)])
def test_the_card_says_what_the_baseline_was(make, tmp_path, critic, per_prompt):
    trainer = make("policy", critic=critic, num_generations=per_prompt, max_steps=1)
    trainer.train()
    trainer.save_model()
    recorded = json.loads((tmp_path / "policy" / "report.json").read_text())
    assert recorded["ppo"]["critic"] == critic
    assert recorded["ppo"].get("num_generations") == (None if per_prompt == 1 else per_prompt)
    card = card_from_report(recorded)
    is_none = critic == "none"
    assert ("ahmadian2024back" in card) == ("as in RLOO, with 2 completions" in card) == is_none
    assert ("There is no critic" in card) == ("\n- rloo\n" in card) == is_none and "schulman2017proximal" in card
    assert ("Each prompt of a rollout had 2 completions." in card) == (not is_none and per_prompt == 2)
    assert f"length, {'clipping' if is_none else 'critic'} and β over" in card
    names = {path.name for path in (tmp_path / "policy").iterdir()}
    assert ("value_head.safetensors" in names) == (not is_none) and "curves.png" in names
    merged = merge_run(tmp_path / "policy", tmp_path / "merged", dtype="float32")
    card = card_from_report(json.loads((merged / "report.json").read_text()))
    assert ("as in RLOO" in card) == is_none and "merged" in card


def test_a_reward_model_has_the_name_of_its_folder_or_repository(make, hub, tmp_path):
    from huggingface_hub import HfApi

    folder = tmp_path / "my judges" / "member 0"
    reward = make("reward_model", given={"peft_config": None}, output_dir=str(folder), max_steps=1)
    reward.save_model()
    shutil.copytree(folder, folder.parent / "second")
    RewardEnsemble.save(folder.parent, ["member 0", "second"])
    HfApi().create_repo("alice/judge")
    HfApi().upload_folder(repo_id="alice/judge", folder_path=folder)
    rewards = [str(folder), str(folder.parent), "alice/judge", short]
    section = section_of(make("policy", given={"reward_funcs": rewards}))
    assert section.rewards == ["member 0", "my judges", "alice/judge", "short"]
    assert str(tmp_path) not in str(section.to_dict())


def test_a_reward_of_evaluation_may_be_called_like_another_measure(make):
    def mean_length(completions, **columns):
        return [1000.0] * len(completions)

    def proxy(completions, **columns):
        return [-1000.0] * len(completions)

    given = {"reward_funcs": short, "eval_reward_funcs": [mean_length, proxy]}
    trainer = make("policy", eval_rows=Dataset.from_list(PROMPTS), given=given)
    trainer.evaluate()
    section = section_of(trainer)
    assert section.eval_rewards == ["mean_length_reward", "proxy_reward"]
    assert section.metrics["mean_length_after"] == 4 and section.metrics["mean_length_reward_after"] == 1000
    assert -100 < section.metrics["proxy_after"] < 0 and section.metrics["proxy_reward_after"] == -1000


def test_a_policy_that_was_trained_before_is_the_start(make, tmp_path):
    make("sft", output_dir=str(tmp_path / "first")).save_model()
    model, tokenizer = load_policy(tmp_path / "first", is_trainable=True)
    given = {"model": model, "processing_class": tokenizer, "peft_config": None}
    assert section_of(make("policy", given=given)).start == "the adapter first"
    given["model"], _ = load_policy(tmp_path / "first", is_trainable=True)
    assert trainer_card_options(make("sft", given=given))["lineage"] == {"start": "first"}
    assert "lineage" not in trainer_card_options(make("sft"))


def test_an_evaluation_before_the_first_step_is_the_before_of_the_card(make):
    rows = Dataset.from_list(PROMPTS)
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "max_steps": 2}
    trainer = make("policy", eval_rows=rows, given={"eval_reward_funcs": [has_a], "reward_funcs": short}, **options)
    trainer.train()
    metrics = section_of(trainer).metrics
    before, after = logged(trainer, "eval_objective/scores")
    assert (metrics["proxy_before"], metrics["proxy_after"]) == (before, after)
    assert metrics["proxy_gain"] == after - before
    assert {"has_a_before", "has_a_after", "has_a_gain", "mean_length_before", "mean_length_after"} <= set(metrics)
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in metrics.values())
    (note,) = trainer_report(trainer).card.notes
    assert "temperature" in note and "cut at 4 tokens" in note


# Energy


def test_energy_is_stated_where_codecarbon_measured_it(make):
    trainer = make("sft")
    assert "emissions" not in trainer_card_options(trainer)
    callback = CodeCarbonCallback.__new__(CodeCarbonCallback)  # without codecarbon, which is not installed
    callback.tracker = SimpleNamespace(start=lambda: None, stop=lambda: None)
    trainer.add_callback(callback)
    assert "emissions" not in trainer_card_options(trainer)  # not yet measured
    callback.tracker.final_emissions_data = SimpleNamespace(emissions=0.002, energy_consumed=0.5)
    assert trainer_card_options(trainer)["emissions"] == {
        "energy_kwh": 0.5,
        "emissions_g": 2.0,
        "source": "codecarbon",
    }
    trainer._initial_global_step = 2  # resumed: the energy of the first part is not known
    assert "emissions" not in trainer_card_options(trainer)


# Runs in parts, and rows of text


@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_duration_of_a_second_call_of_train_are_not_stated(kind, make):
    trainer = make(kind, eval_rows=Dataset.from_list(ROWS[kind]), max_steps=1, eval_on_start=True)
    trainer.train()
    first = trainer_report(trainer)
    assert section_of(trainer).total_steps == 1 and set(first.seconds) == {kind}
    assert evaluated_weights(trainer).start.keys() <= {""} and evaluated_weights(trainer).total_steps == 1
    trainer.train()
    section = section_of(trainer)
    assert section.total_steps is section.weights_step is None and trainer_report(trainer).seconds == {}
    assert evaluated_weights(trainer).start == {}  # those before are of the weights after the first call
    assert not any(name.endswith("_gain") for name in section.metrics)


def test_a_resumed_run_states_the_steps_of_both_calls(make):
    trainer = make("sft", max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.args.max_steps = 2
    trainer.train(resume_from_checkpoint=True)
    assert section_of(trainer).total_steps == 2


DEMONSTRATIONS = {
    "pairs": [{"prompt": f"Tell {k}:", "completion": " a sunny day"} for k in range(4)],
    "messages": [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}] * 4,
}


def test_rows_of_text_are_not_called_demonstrations(make, tmp_path):
    for name, options in (("packed", {"packing": True, "max_length": 16}), ("rows", {}), ("field", {})):
        rows = Dataset.from_list(TEXTS)
        if name == "field":
            rows, options = rows.rename_column("text", "story"), {"dataset_text_field": "story"}
        text = card_from_report(trainer_report(make("sft", rows=rows, **options)))
        assert "fine-tuned on text." in text and "**Training data:** texts (4 rows)" in text, name
        assert "demonstrations" not in text
    stream = make("sft", rows=Dataset.from_list(TEXTS).to_iterable_dataset())
    assert "fine-tuned on text." in card_from_report(trainer_report(stream))
    for name, rows in DEMONSTRATIONS.items():
        text = card_from_report(trainer_report(make("sft", rows=Dataset.from_list(rows))))
        assert "fine-tuned on demonstrations." in text and "**Training data:** demonstrations (4 rows)" in text, name


def test_a_card_lists_no_options_of_logging_saving_and_the_machine(make):
    given = {"run_name": "mine", "save_total_limit": 2, "dataloader_num_workers": 1, "logging_first_step": True}
    trainer = make("sft", hub_model_id="alice/mine", hub_strategy="end", weight_decay=0.125, **given)
    options = yaml.safe_load(trainer_card_options(trainer)["config"])
    assert options["weight_decay"] == 0.125 and options["max_steps"] == 3
    words = ("disable_tqdm", "report_to", "logging", "save", "run_name", "hub", "use_cpu", "num_workers", "output_dir")
    assert not [name for name in options if any(word in name for word in words)]
