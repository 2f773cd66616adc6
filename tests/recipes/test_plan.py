"""`hf-rlhf plan`: what it reads, on which base it plans, and what it prints and writes."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from matplotlib.image import imread
from transformers import AutoConfig

from hf_rlhf_ext.cli.shipped import find_config
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling import locations
from hf_rlhf_ext.modeling.memory.plan import MemoryPlan, Part, Phase, Suggestion
from hf_rlhf_ext.modeling.memory.sources import find_source
from hf_rlhf_ext.recipes import plan as command
from hf_rlhf_ext.recipes.plan_parts.models import MadeFrom, made_from
from hf_rlhf_ext.recipes.plan_parts.options import parse
from hf_rlhf_ext.recipes.plan_parts.plot import _nearest_cards, plot_plan
from hf_rlhf_ext.recipes.plan_parts.report import as_dict, write_json

GB = 10**9
WEIGHTS = Part("base weights", 5 * GB)
PHASES = (Phase("rollout", (WEIGHTS, Part("KV cache", GB))), Phase("policy update", (WEIGHTS, Part("logits", 2 * GB))))
PLAN = MemoryPlan("a $model$", "ppo", "cuda", {"train_batch": 4}, PHASES, reserve=GB // 2, notes=("a note",))


# What is read


def test_the_stage_goes_by_its_option_or_by_the_name_of_the_config():
    args, planned = parse(["--config", "llama-3.2-3b/ppo.yaml", "--card", "12GB"])
    assert (planned.stage, args.card, planned.args.max_completion_length) == ("ppo", "12GB", 256)
    assert planned.reward_models == ("runs/llama-3.2-3b/reward",) and planned.model_args.load_in_4bit
    assert {"config", "card", "kl_target", "reward_model"} <= planned.given and "bf16" not in planned.given
    _, planned = parse(["--stage", "sft", "--stage", "ppo"])
    assert planned.stage == "ppo"  # the last one, as for all options
    _, planned = parse(["--stage=reward", "--max_length", "300", "--members", "2"])
    assert (planned.stage, planned.args.max_length, planned.reward_models) == ("reward", 300, ())


def test_neither_data_nor_a_reward_is_needed():
    for stage in ("sft", "reward", "ppo"):
        _, planned = parse(["--stage", stage, "--model_name_or_path", "a/b"])
        assert planned.model_args.model_name_or_path == "a/b" and planned.reward_models == ()


@pytest.mark.parametrize(
    "words, line",
    [
        (["--model_name_or_path", "a/b"], "stage is required: --stage sft, reward or ppo"),
        (["--stage", "dpo"], "stage: 'dpo' is not planned: choose one of sft, reward, ppo"),
        (["--stage", "sft", "--card", "big"], "card: 'big' is no size"),
        (["--stage", "sft", "--prompt_tokens", "0"], "prompt_tokens must be at least 1"),
        (["--stage", "sft", "--kl_coef", "1"], "unknown option `--kl_coef`"),
        (["--stage", "ppo", "--critic", "none"], "num_generations"),
        (["--config", "nope/ppo.yaml"], "no file nope/ppo.yaml"),
        (["--config", "./nope.yaml"], "nope.yaml"),
    ],
)
def test_mistakes_are_one_line(words, line):
    with pytest.raises(UserError) as error:
        parse(words)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_the_help_of_a_stage_has_its_options(capsys):
    for words, own in ((["--help"], False), (["--stage", "ppo", "--help"], True)):
        with pytest.raises(SystemExit) as stop:
            parse(words)
        text = capsys.readouterr().out
        assert stop.value.code == 0 and "--card" in text and ("--max_completion_length" in text) is own


# On which base


@pytest.fixture
def configs(tmp_path):
    """A folder with configs of three stages, of which the later ones name the folders of the earlier ones."""
    base = {"model_name_or_path": "a/base", "lora_r": 8, "lora_target_modules": ["q_proj"]}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(base | {"output_dir": "runs/x/sft"}))
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump({"model_name_or_path": "b/base", "output_dir": "runs/x/rm"}))
    (tmp_path / "full.yaml").write_text(
        yaml.safe_dump({"model_name_or_path": "c/base", "output_dir": "runs/x/full", "use_peft": False})
    )
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    ppo = {"model_name_or_path": "runs/x/sft", "output_dir": "runs/x/ppo"}
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(ppo))
    return tmp_path / "ppo.yaml"


def test_a_folder_that_an_earlier_stage_will_make_stands_for_its_base(configs):
    lora = {"lora_r": 8, "lora_target_modules": ["q_proj"]}
    assert made_from("runs/x/sft", configs) == MadeFrom("a/base", lora)
    assert made_from("./runs/x/sft/", configs) == MadeFrom("a/base", lora)
    assert made_from("runs/x/ppo", configs) == MadeFrom("a/base", lora)  # two stages back
    assert made_from("runs/x/rm", configs) == MadeFrom("b/base", {})
    assert made_from("runs/x/full", configs) == MadeFrom("c/base", None)
    for name in ("a/base", "runs/other"):
        assert made_from(name, configs) == MadeFrom(name) == made_from(name, None)


def test_a_folder_that_exists_is_taken_as_it_is(configs, monkeypatch):
    monkeypatch.chdir(configs.parent)
    Path("runs/x/sft").mkdir(parents=True)
    assert made_from("runs/x/sft", configs) == MadeFrom("runs/x/sft")


def test_the_shipped_configs_lead_to_models_on_the_hub():
    for name in ("qwen2.5-7b", "llama-3.2-3b"):
        config = find_config(f"{name}/ppo.yaml")
        given = yaml.safe_load(config.read_text())
        bases = {made_from(model, config).base for model in (given["model_name_or_path"], *given["reward_model"])}
        assert len(bases) == 1 and "runs" not in bases.pop()


# What is written


def test_the_json_has_the_plan_and_what_follows_from_it(tmp_path, capsys):
    changes = [Suggestion("--load_in_4bit true", 3 * GB, "speed")]
    content = as_dict(PLAN, n_bytes=8 * GB, largest={"per_device_train_batch_size": 5}, changes=changes)
    write_json(content, str(tmp_path / "new" / "plan.json"))
    write_json(content, "-")
    read = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert read == json.loads(capsys.readouterr().out)
    assert (read["bytes"], read["peak"]) == (75 * GB // 10, "policy update")
    assert (read["device_bytes"], read["fits"]) == (8 * GB, True)
    assert read["fits_cards"] == {"6 GB": False, "8 GB": True, "12 GB": True, "16 GB": True, "24 GB": True}
    assert read["suggestions"] == [{"option": "--load_in_4bit true", "saves": 3 * GB, "costs": "speed"}]
    assert read["largest"] == {"per_device_train_batch_size": 5} and read["notes"] == ["a note"]
    assert as_dict(PLAN, n_bytes=None, largest={}, changes=[])["fits"] is None


def test_the_plot_is_an_image_and_marks_the_cards_around_the_peak(tmp_path):
    assert _nearest_cards(PLAN) == {"6 GB card": 6.0, "8 GB card": 8.0}
    large = MemoryPlan("m", "sft", "cuda", {}, (Phase("training step", (Part("logits", 90 * GB),)),))
    assert _nearest_cards(large) == {"24 GB card": 24.0}
    for plan, n_bytes in ((PLAN, None), (PLAN, 25 * GB), (large, None)):
        image = imread(plot_plan(plan, tmp_path / "new" / "plan.png", n_bytes=n_bytes))
        assert image.shape[0] > 400 and image.shape[1] > 600 and image.std() > 0.01


# The whole command


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, words)])
        code = 0
        try:
            command.main()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().out

    return call


def test_a_config_is_planned_on_the_base_of_its_stages(run, workspace, tmp_path):
    """The SFT adapter and the reward adapter do not exist; the reward adapter shares the base, so it is small."""
    base = {"model_name_or_path": str(workspace / "base")}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(base | {"output_dir": "runs/plan/sft"}))
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(base | {"output_dir": "runs/plan/reward"}))
    ppo = {"model_name_or_path": "runs/plan/sft", "reward_model": ["runs/plan/reward"]}
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(ppo))
    file, plot = tmp_path / "plan.json", tmp_path / "plan.png"
    code, out = run(
        "--config", tmp_path / "ppo.yaml", "--card", "24GB", "--prompt_tokens", 16, "--max_completion_length", 16,
        "--json", file, "--plot", plot, "--advice", "false",
    )  # fmt: skip
    plan = json.loads(file.read_text())
    assert code == 0 and plan["fits"] and plan["device_bytes"] == 24 * GB and plot.is_file()
    assert plan["options"]["starts_from_adapter"] and plan["options"]["reward"] == "shared"
    assert (plan["options"]["prompt_tokens"], plan["options"]["completion_tokens"]) == (16, 16)
    assert "▲ peak" in out and "Card of 24GB: fits" in out and "6 GB yes" in out


def test_a_card_that_is_too_small_is_exit_status_1(run, workspace):
    words = ["--stage", "sft", "--model_name_or_path", workspace / "base", "--max_length", 64]
    code, out = run(*words, "--card", "100MB", "--advice", "false")
    assert code == 1 and "Card of 100MB: does not fit" in out and "Fits up to" not in out


def test_on_a_cpu_the_memory_is_that_of_the_machine(run, workspace):
    words = ["--stage", "reward", "--model_name_or_path", workspace / "base", "--card", "cpu"]
    code, out = run(*words, "--advice", "false")
    assert code == 0 and "This machine: fits" in out and "on a CPU" in out and "Fits a card" not in out


@pytest.mark.slow  # many plans
def test_advice_is_what_else_fits_and_what_to_change(run, workspace, tmp_path):
    words = ["--stage", "sft", "--model_name_or_path", workspace / "base", "--activation_checkpointing", "false"]
    code, out = run(*words, "--card", "2GB", "--json", tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["largest"]["per_device_train_batch_size"] > 8 and content["largest"]["length"] > 0
    (first, *_) = content["suggestions"]
    assert f"  {first['option']} " in out and first["saves"] > 0
    assert f"Fits up to --per_device_train_batch_size {content['largest']['per_device_train_batch_size']}" in out


def test_a_model_that_is_not_there_is_one_line(run, workspace):
    with pytest.raises(UserError, match="nothing-here"):
        run("--stage", "sft", "--model_name_or_path", "./nothing-here")


def test_off_says_nothing(call):
    done = call("sft", check_memory="refuse", max_steps=1, output_dir="runs/said")
    assert done.code == 0 and done.out.startswith("Memory: about ")
    done = call("sft", check_memory="off", max_steps=1, output_dir="runs/silent")
    assert done.code == 0 and "Memory:" not in done.out


@pytest.mark.parametrize("recipe, changes", [("reward", {}), ("ppo", {"reward_funcs": "my_rewards.py:length"})])
def test_every_recipe_of_training_says_it_first(call, recipe, changes):
    done = call(recipe, check_memory="warn", max_steps=1, output_dir=f"runs/said-{recipe}", **changes)
    assert done.code == 0, done.err
    assert done.out.startswith("Memory: about ")


# Mistakes, which are one line before anything is planned


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A working folder with models that have only a config, and with folders that hold no model."""
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 512}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}

    def config(name: str, kind: str, architecture: str, **options) -> None:
        content = AutoConfig.for_model(kind, architectures=[architecture], **options)
        content.save_pretrained(tmp_path / name)

    def adapter(name: str, base: str, task: str) -> None:
        (tmp_path / name).mkdir()
        content = {"peft_type": "LORA", "task_type": task, "r": 8, "target_modules": ["q_proj"]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(content | {"base_model_name_or_path": base}))

    config("llama", "llama", "LlamaForCausalLM", **sizes)
    config("classifier", "llama", "LlamaForSequenceClassification", **sizes)
    config("llava", "llava", "LlavaForConditionalGeneration")
    config("bert", "bert", "BertForMaskedLM")
    config("t5", "t5", "T5ForConditionalGeneration")
    config("mamba", "mamba", "MambaForCausalLM", hidden_size=32, num_hidden_layers=5, vocab_size=512)
    adapter("lost", "./not/there", "CAUSAL_LM")
    adapter("lost-reward", "./not/there", "SEQ_CLS")
    adapter("reward", str(tmp_path / "llama"), "SEQ_CLS")
    adapter("policy", str(tmp_path / "llama"), "CAUSAL_LM")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter_config.json").write_text("{oops")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"x")
    (tmp_path / "file.gguf").write_bytes(b"GGUFxxxx")
    (tmp_path / "file").write_text("x")
    return tmp_path


SFT = ("--stage", "sft", "--advice", "false", "--max_length", "32", "--card", "8GB")
PPO = ("--stage", "ppo", "--advice", "false", "--prompt_tokens", "8", "--max_completion_length", "8")
REWARD = ("--stage", "reward", "--advice", "false", "--max_length", "32")


@pytest.mark.parametrize(
    "words, parts",
    [
        ((*SFT, "--model_name_or_path", "weights"), ["model_name_or_path: weights holds no model", "config.json"]),
        ((*REWARD, "--model_name_or_path", "weights"), ["model_name_or_path: weights holds no model"]),
        ((*SFT, "--model_name_or_path", "file"), ["file is a file", "give the folder"]),
        ((*SFT, "--model_name_or_path", "file.gguf"), ["file.gguf cannot be read as GGUF", "download it again"]),
        ((*SFT, "--model_name_or_path", "none.gguf"), ["no GGUF file at none.gguf", "check the path"]),
        ((*SFT, "--model_name_or_path", "lost"), ["lost is an adapter whose base ./not/there", "adapter_config.json"]),
        ((*SFT, "--model_name_or_path", "damaged"), ["damaged/adapter_config.json", "copy the model again"]),
        ((*SFT, "--model_name_or_path", "reward"), ["reward adapter", "not a policy"]),
        ((*PPO, "--model_name_or_path", "classifier"), ["classifier", "not a policy"]),
        ((*SFT, "--model_name_or_path", "llava"), ["LlavaConfig", "give a causal language model"]),
        ((*REWARD, "--model_name_or_path", "bert"), ["bert is an encoder, which is not planned"]),
        ((*REWARD, "--model_name_or_path", "mamba"), ["MambaConfig", "train the reward model from another base"]),
        ((*REWARD, "--model_name_or_path", "t5"), ["encoder-decoder"]),
        ((*SFT, "--model_name_or_path", "my/model"), ["my/model", "as a Hub id", "check the connection"]),
        (
            (*PPO, "--model_name_or_path", "llama", "--reward_model", "lost-reward"),
            ["reward_model: lost-reward", "base"],
        ),
        ((*PPO, "--model_name_or_path", "llama", "--reward_model", "policy"), ["reward model: policy", "score head"]),
        (
            (*SFT, "--model_name_or_path", "llama", "--json", "weights"),
            ["json: 'weights' is no file", "--json plan.json"],
        ),
        ((*SFT, "--model_name_or_path", "llama", "--json", ""), ["json: '' is no file", "--json plan.json"]),
        ((*SFT, "--model_name_or_path", "llama", "--card", "8000"), ["card: '8000' has no unit", "--card 8000MB"]),
        ((*SFT, "--model_name_or_path", "llama", "--json", "file/a.json"), ["json: file/a.json", "is a file"]),
        ((*SFT, "--model_name_or_path", "llama", "--plot", "weights"), ["plot: 'weights' is no file"]),
        ((*SFT, "--model_name_or_path", "llama", "--plot", "plan.jpg"), ["plot: plan.jpg does not end in .png"]),
        ((*SFT, "--model_name_or_path", "llama", "--plot", "/proc/x/a.png"), ["plot: /proc/x/a.png cannot be written"]),
    ],
)
def test_a_mistake_of_the_whole_command_is_one_line(run, folders, words, parts):
    with pytest.raises(UserError) as error:
        run(*words)
    line = str(error.value)
    assert "\n" not in line and all(part in line for part in parts), line


def test_models_whose_layers_have_no_list_of_types_are_planned(run, folders):
    """Mamba says the types of its layers by a property, which follows their number."""
    code, out = run(*SFT, "--model_name_or_path", "mamba", "--lora_target_modules", "in_proj", "x_proj")
    assert code == 0 and "mamba, sft on a GPU" in out


def test_more_tokens_than_the_model_has_positions_are_a_note(run, folders):
    words = ["--model_name_or_path", "llama", "--max_length", 3000, "--per_device_train_batch_size", 1]
    _, out = run(*SFT, *words)
    assert "Note: sequences of 3000 tokens are longer than the model's 2048 positions" in out
    _, out = run(*SFT, "--model_name_or_path", "llama")
    assert "positions" not in out


def test_json_on_stdout_is_all_that_is_printed(run, folders):
    code, out = run(*SFT, "--model_name_or_path", "llama", "--json", "-")
    assert code == 0 and json.loads(out)["fits"]


def test_a_gguf_file_is_planned_without_unpacking_it(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(locations, "unpacked_gguf", None)  # a call would fail
        file = find_source(str(locations._embedded_gguf()), stage="sft").config
    unpacked = find_source(locations.EMBEDDED_MODEL, stage="sft").config
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert getattr(file, name) == getattr(unpacked, name)
    assert file.tie_word_embeddings is unpacked.tie_word_embeddings is True
