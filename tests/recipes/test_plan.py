"""`hf-rlhf plan`: what it reads, on which base it plans, and what it prints and writes."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from matplotlib.image import imread

from hf_rlhf_ext.cli.shipped import find_config
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.memory.plan import MemoryPlan, Part, Phase, Suggestion
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
