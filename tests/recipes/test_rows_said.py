"""Each recipe says in two lines what became of the file, and leaves the held-out rows beside the report."""

import json
import re

import pytest

from hf_rlhf_ext.readers.formats import load_comparisons, load_demonstrations
from hf_rlhf_ext.readers.prompts import load_prompts


@pytest.fixture(scope="module")
def prompts(workspace):
    path = workspace / "few_prompts.txt"
    path.write_text("".join(f"Tell me about day {k}.\n\n" for k in range(8)))
    function = "def length(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    (workspace / "text_rewards.py").write_text(function)
    return path


def lines_about(done, name):
    """The lines that begin with the name of the file."""
    return [line for line in done.out.splitlines() if line.startswith(f"{name}: ")]


@pytest.mark.parametrize(
    "recipe, name, load, changes",
    [
        ("sft", "demonstrations.jsonl", load_demonstrations, {"eval_rows": 3}),
        ("reward", "pairs.jsonl", load_comparisons, {"eval_rows": 3}),
        pytest.param(
            "reward",
            "pairs.jsonl",
            load_comparisons,
            {"eval_rows": 3, "members": 2},
            id="ensemble",
            marks=pytest.mark.slow,
        ),
        ("ppo", "few_prompts.txt", load_prompts, {"eval_rows": 3, "max_completion_length": 2}),
    ],
)
def test_two_lines_and_the_held_out_rows(call, tmp_path, prompts, recipe, name, load, changes):
    options = {"max_steps": 1, "output_dir": tmp_path / "run", "dataset_name": name}
    if recipe == "ppo":
        options |= {"max_steps": 4, "reward_funcs": "text_rewards.length", "eval_strategy": "no"}
    done = call(recipe, **(options | changes))
    assert done.code == 0, done.err
    read, split = lines_about(done, name)
    assert "rows kept" in read
    assert re.search(r"\d+ (prompts|demonstrations) to train on, 3 held out \(heldout\.jsonl\)", split)
    rows, report = load(tmp_path / "run" / "heldout.jsonl")
    assert report.kept == 3
    written = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    assert written["heldout"] == 3 and f"local {name} (sha256 " in written["source"]
    if recipe == "ppo":
        assert "blank line" in read and list(rows["prompt"]) == [f"Tell me about day {k}." for k in (5, 6, 7)]
