"""Every recipe on a tiny model: what it leaves, that it loads, and that it can be resumed, refused and repeated."""

import getpass
import json
import math
import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_rlhf_ext import RewardScorer, load_policy
from hf_rlhf_ext.cli.progress import LOG_FILE, MAX_WIDTH, read_log

pytestmark = pytest.mark.xdist_group("recipes")

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
COMMON_WORDS = {"user", "model", "base", "root", "localhost", "runner"}  # names that ordinary text contains


@pytest.fixture(scope="module")
def runs(start):
    """The three stages as three processes: SFT and reward model at the same time, then PPO from both."""
    with ThreadPoolExecutor() as pool:
        sft = pool.submit(start, "sft", max_steps=2, eval_rows=2)
        reward = pool.submit(start, "reward", train_rows=8, eval_rows=4)
        done = {"sft": sft.result(), "reward": reward.result()}
    done["ppo"] = start(
        "ppo", model_name_or_path="runs/sft", reward_model="runs/reward", reward_funcs="my_rewards.length"
    )
    return done


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def outside_checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and not any("checkpoint-" in part for part in p.parts)]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_it_ends_well_and_captured_output_has_no_bar(runs, recipe):
    assert runs[recipe].code == 0, runs[recipe].err
    assert runs[recipe].err == ""
    assert "\r" not in runs[recipe].out
    assert any(line.startswith("Saved ") and f"in runs/{recipe}" in line for line in runs[recipe].out.splitlines()[-3:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, shown",
    [
        ("sft", [r"trained 2 steps in .* s", r"step 2/2  evaluation: loss .*  token accuracy .* s"]),
        (
            "reward",
            [
                r"step 1/1  loss .*  accuracy .* tokens/s",  # the last step is logged although logging_steps is 10
                r"trained 1 step in .* s",
                r"step 1/1  evaluation: loss .*  accuracy .* s",
            ],
        ),
        (
            "ppo",
            [
                r"step 4/4  reward .*  KL .* nats  loss .* s/step",
                r"step 4/4  evaluation: reward .*  KL .* nats  .* s",
                r"trained 4 steps in .* s",
            ],
        ),
    ],
)
def test_the_terminal_has_a_short_line_per_log_and_the_file_has_all_metrics(runs, workspace, recipe, shown):
    lines = [line for line in runs[recipe].out.splitlines() if line.startswith(("step ", "trained "))]
    assert len(lines) == len(shown) and all(len(line) <= MAX_WIDTH for line in lines)
    for line, pattern in zip(lines, shown, strict=True):
        assert re.match(pattern, line), line
    records = list(read_log(workspace / "runs" / recipe / LOG_FILE))
    assert len(records) == len(lines) and all(record["time"] for record in records)


@pytest.mark.slow
def test_sft_leaves_a_trained_adapter_that_loads(runs, workspace):
    folder = workspace / "runs" / "sft"
    model, tokenizer = load_policy(str(folder))
    lora_b = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert lora_b and all(p.abs().max() > 0 for p in lora_b)  # LoRA starts from B = 0
    assert tokenizer.chat_template
    measured = report(folder)
    assert math.isfinite(measured["sft"]["train_loss"]) and math.isfinite(measured["sft"]["eval_loss"])
    card = (folder / "README.md").read_text()
    assert f"| Loss, nats per token | {measured['sft']['eval_loss']:.3f} | 2 |" in card
    assert f"| Accuracy of the next token | {measured['sft']['eval_mean_token_accuracy']:.3f} | 2 |" in card


@pytest.mark.slow
def test_reward_leaves_report_card_and_scorer(runs, workspace):
    folder = workspace / "runs" / "reward"
    measured = report(folder)["reward_model"]
    assert (measured["pairs"], measured["heldout_pairs"]) == (8, 4)
    assert (measured["decided_pairs"], measured["prompts"]) == (4, 4)
    low, high = measured["accuracy_ci95"]
    assert 0 <= low <= measured["accuracy"] <= high <= 1 and 0 <= measured["longer_wins_baseline"] <= 1
    assert measured["nll"] == pytest.approx(math.log(2), abs=0.1)  # two steps from scores near zero
    normalization = json.loads((folder / "reward_normalization.json").read_text())
    assert normalization["std"] > 0 and normalization["base_model"] is None  # a local folder is nobody else's business
    assert "Pairwise accuracy" in (folder / "README.md").read_text()
    scores = RewardScorer.from_pretrained(folder)(["How was it?"] * 2, ["Sunny!", "A sad day."])
    assert all(map(math.isfinite, scores)) and scores[0] != scores[1]
    assert "--reward_model runs/reward" in runs["reward"].out


@pytest.mark.slow
def test_ppo_trains_on_the_sft_adapter_towards_both_rewards(runs, workspace):
    folder = workspace / "runs" / "ppo"
    measured = report(folder)["ppo"]
    assert (
        measured["updates"] == 1
        and measured["mean_length_before"] > 0
        and all(math.isfinite(measured[name]) for name in ("proxy_before", "proxy_after", "kl", "mean_length_after"))
    )
    card = (folder / "README.md").read_text()
    before, after, gain = (measured[f"proxy_{name}"] for name in ("before", "after", "gain"))
    assert f"| Proxy reward | {before:.3f} | {after:.3f} | {gain:+.3f} (" in card
    assert "β = " in card and "starting from the SFT policy" in card and "- SFT policy: local sft" in card
    interval = r"-?[\d.]+ \(-?[\d.]+ to -?[\d.]+\)"
    assert re.search(rf"^\| KL to the initial policy.* \| {interval} \| 2 \|$", card, re.MULTILINE)
    assert measured["rewards"] == ["reward", "length"] and "`1 × reward + 1 × length`" in card
    logged = {name for log in read_log(folder / LOG_FILE) for name in log}
    assert {"rewards/reward_model/mean", "rewards/length/mean"} <= logged
    assert "before PPO: reward " in runs["ppo"].out and "after PPO: reward " in runs["ppo"].out
    assert adapter_bytes(folder) != adapter_bytes(workspace / "runs" / "sft")
    model, _ = load_policy(str(folder))
    assert list(model.peft_config) == ["default"]  # the reference stays in the checkpoints
    assert (folder / "value_head.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_nothing_that_is_saved_is_a_pickle_or_names_the_machine(runs, workspace, recipes_path, recipe):
    folder = workspace / "runs" / recipe
    files = outside_checkpoints(folder)
    assert not [path for path in files if any(path.match(pattern) for pattern in PICKLES)]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config.pop("base_model_name_or_path") == str(workspace / "base")  # a local base can be found in no other way
    folders = [str(workspace), str(Path.home()), os.getcwd(), str(recipes_path)]
    names = {getpass.getuser(), socket.gethostname()} - COMMON_WORDS
    for path in files:
        content = json.dumps(config).encode() if path.name == "adapter_config.json" else path.read_bytes()
        assert not [name for name in folders if name.encode() in content], path
        if path.suffix not in (".safetensors", ".png"):  # their bytes spell short names by chance
            assert not [
                name for name in names if re.search(rf"\b{re.escape(name)}\b", content.decode(errors="replace"))
            ], path


@pytest.mark.slow
def test_a_finished_run_is_resumed_refused_or_overwritten(runs, call, workspace):
    changes = {"model_name_or_path": "runs/sft", "reward_model": "runs/reward", "reward_funcs": "my_rewards.length"}
    given = {"sft": {"max_steps": 2, "eval_rows": 2}, "reward": {"train_rows": 8, "eval_rows": 4}, "ppo": changes}
    for recipe, options in given.items():
        before = adapter_bytes(workspace / "runs" / recipe)
        refused = call(recipe, **options)
        assert refused.code == 2 and f"error: runs/{recipe} is not empty: pass --resume_from_checkpoint" in refused.err
        steps = [log["step"] for log in read_log(workspace / "runs" / recipe / LOG_FILE)]
        resumed = call(recipe, **options, resume_from_checkpoint="true")
        assert resumed.code == 0 and "nothing left to train" in resumed.out
        assert adapter_bytes(workspace / "runs" / recipe) == before, recipe
        assert [log["step"] for log in read_log(workspace / "runs" / recipe / LOG_FILE)] == steps  # none twice
    contradiction = call("sft", **given["sft"], resume_from_checkpoint="true", overwrite="true")
    assert contradiction.code == 2 and "contradict each other" in contradiction.err
    (workspace / "runs" / "reward" / "stale.txt").touch()
    assert call("reward", **given["reward"], overwrite="true").code == 0
    assert not (workspace / "runs" / "reward" / "stale.txt").exists()
    assert (workspace / "runs" / "reward" / "report.json").is_file()


@pytest.mark.slow
def test_the_next_round_names_the_last_and_second_opinions_are_reported(runs, call, workspace):
    options = {"reward_funcs": "my_rewards.length", "output_dir": "runs/ppo-2", "max_steps": 2}
    options |= {"logging_strategy": "no", "eval_strategy": "no"}  # a run without a log has no plot
    done = call("ppo", model_name_or_path="runs/ppo", eval_reward_funcs="my_rewards.vowels", **options)
    assert done.code == 0, done.err
    folder = workspace / "runs" / "ppo-2"
    measured, card = report(folder)["ppo"], (folder / "README.md").read_text()
    assert measured["start"] == "the PPO policy" and "- PPO policy: local ppo" in card
    assert measured["eval_rewards"] == ["vowels"] and measured["rewards"] == ["length"]
    assert measured["vowels_gain"] == pytest.approx(measured["vowels_after"] - measured["vowels_before"])
    low, high = measured["vowels_gain_ci95"]
    assert low <= measured["vowels_gain"] <= high
    assert f"{measured['vowels_after']:.3f} | {measured['vowels_gain']:+.3f} (" in card
    assert "Reward vowels, unseen by PPO" in card
    assert "before PPO: reward " in done.out and ", vowels " in done.out
    assert "No curves.png" in done.out and "--logging_strategy" in done.out
    assert not (folder / "curves.png").exists() and "![" not in card


@pytest.mark.slow
def test_ppo_without_a_critic_leaves_a_policy_alone(call, workspace, caplog):
    options = {"reward_funcs": "my_rewards.length", "output_dir": "runs/none", "save_steps": 2}
    refused = call("ppo", critic="none", **options)
    assert refused.code == 2 and "critic='none'" in refused.err and "set num_generations to 2 or more" in refused.err
    done = call("ppo", critic="none", num_generations=2, **options)
    assert done.code == 0, done.err
    # The config has an option of a critic.
    assert "not used with critic='none', which has no values: value_learning_rate." in caplog.text
    folder = workspace / "runs" / "none"
    assert not [path for path in folder.rglob("*") if "value" in path.name]
    assert report(folder)["ppo"]["critic"] == "none" and report(folder)["ppo"]["num_generations"] == 2
    card = (folder / "README.md").read_text()
    assert "as in RLOO" in card and "clipping and β" in card
    logged = {name for log in read_log(folder / LOG_FILE) for name in log}
    assert "frac_reward_zero_std" in logged and not {"val/explained_variance", "lr_value"} & logged
    model, _ = load_policy(str(folder))
    assert list(model.peft_config) == ["default"]
    options |= {"resume_from_checkpoint": "true", "num_generations": 2, "max_steps": 8}
    other = call("ppo", **options, critic="head")
    assert other.code == 2 and "critic='none', but critic is now 'head': set critic='none'" in other.err
    resumed = call("ppo", **options, critic="none")
    assert resumed.code == 0 and "step 8/8" in resumed.out
    config = workspace / "none.yaml"
    config.write_text("critic: none\nnum_generations: 2\nmax_steps: 4\nlogging_steps: 4\n")
    options = {"reward_funcs": "my_rewards.length", "output_dir": "runs/yaml"}
    assert call("ppo", config=config, **options).code == 0  # YAML's none is a text, not null
    assert report(workspace / "runs" / "yaml")["ppo"]["critic"] == "none"


@pytest.mark.slow
def test_a_run_that_a_guard_stopped_says_so(runs, call, workspace):
    options = {"reward_funcs": "my_rewards.length", "output_dir": "runs/stopped", "max_steps": 12}
    done = call("ppo", max_kl=1e-3, learning_rate=0.05, **options)
    assert done.code == 0, done.err
    why = report(workspace / "runs" / "stopped")["ppo"]["stop_reason"]
    assert "above max_kl = 0.001" in why and f"A guard stopped training early: {why}." in done.out
    card = (workspace / "runs" / "stopped" / "README.md").read_text()
    assert re.search(r"^- A guard .*: KL is", card, re.MULTILINE)


@pytest.mark.slow
def test_ppo_from_a_base_model_with_a_reward_function(call, workspace):
    done = call("ppo", reward_funcs="my_rewards.length", output_dir="runs/ppo-base")
    assert done.code == 0, done.err
    model, _ = load_policy(str(workspace / "runs" / "ppo-base"))
    assert "default" in model.peft_config
    assert report(workspace / "runs" / "ppo-base")["ppo"]["proxy_before"] > 0  # characters


@pytest.mark.slow
def test_sft_takes_the_other_columns_of_trl_too(call, workspace, write_jsonl, tmp_path):
    rows = [[{"role": "user", "content": f"Day {i}?"}, {"role": "assistant", "content": "Sunny!"}] for i in range(6)]
    for name, data in {"messages": rows, "text": [f"Day {i} was sunny." for i in range(6)]}.items():
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{name: row} for row in data])
        done = call("sft", dataset_name=path, eval_rows=2, max_steps=1, output_dir=tmp_path / name)
        assert done.code == 0, done.err
        assert math.isfinite(report(tmp_path / name)["sft"]["eval_loss"])


def test_without_held_out_rows_the_card_says_that_nothing_was_measured(call, tmp_path):
    done = call("reward", output_dir=tmp_path / "reward", max_steps=1)
    assert done.code == 0, done.err
    assert "accuracy" not in report(tmp_path / "reward")["reward_model"]
    card = (tmp_path / "reward" / "README.md").read_text()  # not PEFT's own form, which names the base's folder
    assert "Not measured: no comparisons were held out." in card and "## Results" not in card and "![" not in card


def test_all_weights_can_be_trained(call, tmp_path):
    done = call("sft", use_peft="false", max_steps=1, output_dir=tmp_path / "sft", save_strategy="no")
    assert done.code == 0, done.err
    assert (tmp_path / "sft" / "model.safetensors").is_file()
    assert str(tmp_path) not in (tmp_path / "sft" / "config.json").read_text()
    load_policy(str(tmp_path / "sft"))


@pytest.mark.slow
def test_your_own_file_of_comparisons(call, shared_data, tmp_path):
    """The documented example on real transcripts, with the tiny model: docs/ has the numbers of SmolLM2."""
    done = call(
        "reward",
        dataset_name=shared_data / "hh_helpful_train.jsonl",
        train_rows=40,
        eval_rows=20,
        max_length=4096,  # the tiny tokenizer needs a token for every two letters
        output_dir=tmp_path / "reward",
    )
    assert done.code == 0, done.err
    measured = report(tmp_path / "reward")["reward_model"]
    assert (measured["pairs"], measured["heldout_pairs"]) == (40, 20)
    assert 0 <= measured["accuracy"] <= 1 and 0.2 <= measured["longer_wins_baseline"] <= 0.8
