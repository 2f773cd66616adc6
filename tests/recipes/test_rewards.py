"""Rewards of `hf-rlhf ppo`: their order and weights, what is said of them, and mistakes inside a function."""

import json

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

OWN = """
def length(completions):
    return (len(completion[-1]["content"]) for completion in completions)

def zero(completions, **columns):
    return [float("please" in completion[0]["content"]) for completion in completions]

def wrong(completions):
    return [float("a" in text.lower()) for text in completions]
"""


@pytest.fixture(scope="module")
def job(workspace):
    """A file of functions and a random reward model beside the workspace's files."""
    folder = workspace / "job"
    folder.mkdir(exist_ok=True)  # the tests of this module may not run in one block
    (folder / "own.py").write_text(OWN)
    tokenizer = AutoTokenizer.from_pretrained(workspace / "base")
    sizes = LlamaConfig.from_pretrained(workspace / "base").to_dict() | {"num_labels": 1, "num_hidden_layers": 1}
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**sizes)).save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    return folder


@pytest.mark.slow
def test_rewards_keep_their_order_and_are_said(call, job, tmp_path):
    config = {
        "max_steps": 4,
        "num_ppo_epochs": 1,
        "logging_steps": 1,
        "reward_funcs": ["job/own.py:length", "job/own.py:zero"],
        "reward_model": ["job/rm"],
        "reward_weights": [1.0, 0.5, 0.0],
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(config, sort_keys=False))
    done = call("ppo", config=mine, output_dir=tmp_path / "out")
    assert done.code == 0, done.err
    assert "reward = 0 × job/rm + 1 × length + 0.5 × zero" in done.out
    warning = "reward 'zero' gave every completion 0"
    assert done.out.count(f"warning: {warning}") == 1
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    first = next(row for row in log if "rewards/length/mean" in row)
    assert first["objective/scores"] == pytest.approx(first["rewards/length/mean"])
    measured = json.loads((tmp_path / "out" / "report.json").read_text())["ppo"]
    assert measured["reward_formula"] == "0 × rm + 1 × length + 0.5 × zero"
    assert [line.startswith(warning) for line in measured["reward_warnings"]] == [True]
    # The card's options give the same rewards again: models first, with the weights in that order.
    again = yaml.safe_load(json.loads((tmp_path / "out" / "report.json").read_text())["card"]["config"])
    assert again["reward_weights"] == [0.0, 1.0, 0.5]
    assert list(again).index("reward_model") < list(again).index("reward_funcs")


def refused(done) -> str:
    assert done.code == 2 and "Traceback" not in done.err, done.err
    return done.said[-1]


def test_a_wrong_number_of_weights_names_the_rewards_in_order(call, job, tmp_path):
    options = {"reward_funcs": "job/own.py:length", "reward_model": "job/rm", "reward_weights": 1}
    line = refused(call("ppo", **options, output_dir=tmp_path / "out"))
    assert "reward_weights has 1 entries for 2 rewards: give one each, in the order job/own.py:length, job/rm" in line


def test_a_mistake_inside_a_function_is_one_line(call, job, tmp_path):
    line = refused(call("ppo", reward_funcs="job/own.py:wrong", output_dir=tmp_path / "out"))
    assert "reward function 'wrong' failed: AttributeError" in line
    assert "own.py, line 9" in line and "completion[0]['content']" in line
