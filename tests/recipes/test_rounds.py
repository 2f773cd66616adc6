"""Rounds: which prompts are judged and held out, weights of judgments, win rates, and runs on a tiny model."""

import importlib
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, hf_hub_download

from hf_rlhf_ext.cli.locking import only_process
from hf_rlhf_ext.cli.options import ModelArguments
from hf_rlhf_ext.cli.parsing import parse_recipe
from hf_rlhf_ext.cli.program import command_line
from hf_rlhf_ext.cli.stages import StageRunner
from hf_rlhf_ext.collect.client import JudgeClient, ServerGone, work
from hf_rlhf_ext.collect.simulated import SimulatedPerson
from hf_rlhf_ext.collect.store import Store
from hf_rlhf_ext.collect.tasks import Task, read_tasks, write_rows
from hf_rlhf_ext.data.prompt_form import PromptForm
from hf_rlhf_ext.data.schema import validate_comparison
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.push import push_run
from hf_rlhf_ext.metrics.plots import plot_rounds
from tests.hub.conftest import hub  # noqa: F401

# Whole runs start servers, and their quotas are waited for.
pytestmark = pytest.mark.xdist_group("processes")

GOLD = """
def vowels(prompts, completions, **columns):
    return [sum(letter in "aeiou" for letter in completion) / 4 for completion in completions]
"""


def module(name: str):
    return importlib.import_module(f"hf_rlhf_ext.recipes.{name}")


@pytest.fixture(scope="module")
def rounds():
    return module("rounds")


@pytest.fixture(scope="module")
def data():
    return module("rounds_parts.data")


@pytest.fixture(scope="module")
def judging():
    return module("rounds_parts.judging")


@pytest.fixture(scope="module")
def evaluation():
    return module("rounds_parts.evaluation")


@pytest.fixture
def options():
    return module("rounds_parts.options").RoundsArguments


def row(prompt: str, targets: list[float], **columns) -> dict:
    """A comparison row of three completions, judged pair by pair."""
    pairs = [[0, 1], [0, 2], [1, 2]][: len(targets)]
    return {"prompt": prompt, "completions": ["a", "b", "c"], "pairs": pairs, "targets": targets} | columns


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_judgment_loses_weight_with_its_age(data):
    judged = row("p", [1.0, 0.0, 0.5])
    # Three pairs of one prompt have 1/3 each; two rounds later, at 0.5 a round: 1/3 * 0.5 * 0.5 = 1/12.
    assert data.weigh_by_round(judged, 2, 0.5)["weights"] == [pytest.approx(1 / 12)] * 3
    assert data.weigh_by_round(judged, 0, 0.5) == judged
    assert data.weigh_by_round(judged, 2, 1.0) == judged
    assert data.weigh_by_round(row("p", [1.0, 0.0], weights=[0.3, 0.1]), 1, 0.5)["weights"] == [0.15, 0.05]
    assert data.weigh_by_round(judged, 1, 0.0)["weights"] == [0, 0, 0]  # only the current round counts


def test_the_reward_model_reads_the_weights_of_the_rounds(data, tmp_path):
    from hf_rlhf_ext import load_comparisons

    judged = [[row("old", [1.0, 0.0, 0.5])], [row("new", [1.0])], [row("newest", [0.0, 1.0])]]
    train, heldout = data.judged_so_far(judged, round_weight=0.5, heldout_share=0, seed=0)
    write_rows(train, tmp_path / "train.jsonl")
    read, _ = load_comparisons(tmp_path / "train.jsonl")
    assert heldout == []
    weights = {row["prompt"]: sum(row["weights"]) for row in read}
    assert weights == {"old": pytest.approx(0.25), "new": pytest.approx(0.5), "newest": pytest.approx(1.0)}


def test_a_prompt_is_on_the_same_side_in_every_round(data):
    prompts = [f"prompt {k}" for k in range(400)]
    judged = [[row(prompt, [1.0]) for prompt in prompts[start : start + 200]] for start in (0, 100, 200)]
    sizes = []
    for number in (1, 2, 3):
        train, heldout = data.judged_so_far(judged[:number], round_weight=1, heldout_share=0.2, seed=3)
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
        assert len(train) + len(heldout) == 200 * number
        sizes.append(len(heldout))
    assert sizes == sorted(set(sizes))  # it grows by round
    share = sum(data.is_heldout(prompt, 0.2, 3) for prompt in prompts) / 400
    assert abs(share - 0.2) < 3 * math.sqrt(0.2 * 0.8 / 400)  # three standard deviations of a share of 400
    assert data.is_heldout("a  b", 0.2, 3) == data.is_heldout("a b", 0.2, 3)  # white space makes no other prompt
    sides = [data.is_heldout(prompt, 0.2, 4) for prompt in prompts]
    assert sides != [data.is_heldout(prompt, 0.2, 3) for prompt in prompts]


def test_every_round_judges_the_next_prompts(data):
    rows = list("abcde")
    assert [data.prompts_of_round(rows, number, 2) for number in (1, 2, 3)] == [["a", "b"], ["c", "d"], ["e", "a"]]
    assert data.prompts_of_round(rows, 2, 9) == rows  # fewer prompts than asked for: all of them, every time


def test_held_out_prompts_are_in_no_round(data, capsys):
    rows = [{"prompt": f"p{k}"} for k in range(10)]
    train, heldout = data.split_prompts(rows, None, 4, seed=0)
    assert len(train) == 6 and len(heldout) == 4
    assert sorted(row["prompt"] for row in train + heldout) == sorted(row["prompt"] for row in rows)
    assert data.split_prompts(rows, None, 4, seed=1) != (train, heldout)
    train, heldout = data.split_prompts(rows, [{"prompt": "p3"}, {"prompt": " p4"}], 2, seed=0)
    assert [row["prompt"] for row in heldout] == ["p3", " p4"] and len(train) == 8
    assert "2 of 10 prompts left out" in capsys.readouterr().out
    train, _ = data.split_prompts(rows, [{"prompt": chat("p3")}, {"prompt": chat("other")}], 2, seed=0)
    assert len(train) == 9 and {"prompt": "p3"} not in train  # text in one file, messages in the other
    with pytest.raises(UserError, match="eval_prompts=10"):
        data.split_prompts(rows, None, 10, seed=0)
    with pytest.raises(UserError, match="heldout_prompts: 1 prompts"):
        data.split_prompts(rows, [{"prompt": "p3"}], 2, seed=0)


def test_dpo_gets_every_decided_pair(data):
    pairs = data.decided_pairs([row("p", [1.0, 0.25, 0.5])])
    assert pairs == [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "c", "rejected": "a"},  # 0.25: c is better than a for three of four people
    ]


def test_prompts_are_read_or_refused_in_one_line(data, tmp_path, write_jsonl, capsys):
    rows = [{"prompt": "one"}, {"prompt": " one"}, {"prompt": chat("two"), "category": "chat"}]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    read = data.read_prompts(str(tmp_path / "prompts.jsonl"), "prompts")
    assert [(row["row"], row["category"]) for row in read] == [(0, None), (2, "chat")]
    assert "1 of 3 rows left out: they repeat a prompt" in capsys.readouterr().out

    write_jsonl(tmp_path / "other.jsonl", [{"question": "one"}])
    write_jsonl(tmp_path / "empty.jsonl", [{"prompt": "one"}, {"prompt": " "}])
    for file, message in (
        ("other.jsonl", "heldout_prompts: .*other.jsonl has no column prompt, but question"),
        ("empty.jsonl", "heldout_prompts: row 1 of .*empty.jsonl has no prompt"),
        ("missing.jsonl", "heldout_prompts: no file .*missing.jsonl"),
    ):
        with pytest.raises(UserError, match=message):
            data.read_prompts(str(tmp_path / file), "heldout_prompts")


def test_prompts_that_are_judged_again_are_announced(data):
    assert data.repeated_prompts(30, 3, 10) is None
    assert "from round 3 on" in data.repeated_prompts(29, 3, 10)
    assert "same 5 prompts: there are fewer than prompts_per_round=10" in data.repeated_prompts(5, 1, 10)


# --- judging ---------------------------------------------------------------------------------------------------------


def chat(text: str, role: str = "user") -> list[dict]:
    return [{"role": role, "content": text}]


def test_a_file_is_matched_to_the_tasks_by_its_words(judging, capsys):
    system = {"role": "system", "content": "Be kind."}
    completions = [chat(text, "assistant") for text in ("A", "B", "C")]
    tasks = [
        Task(prompt=[system, *chat("one")], completions=completions, category="chat"),
        Task(prompt=chat("two"), completions=completions[:2]),
        Task(prompt=chat("not judged"), completions=completions[:2]),
    ]
    votes = [{"annotator": "anna", "pair": [0, 1], "label": 1.0}]
    rows = [
        # Plain text without the system message, other order, one completion of no task.
        {"prompt": "one", "completions": ["C ", "A", "X"], "pairs": [[0, 1], [0, 2]], "targets": [0.0, 1.0]},
        {
            "prompt": chat(" two"),
            "completions": completions[1::-1],
            "pairs": [[0, 1]],
            "targets": [1.0],
            "votes": votes,
        },
    ]
    first, second = judging.match_to_tasks(rows, tasks, "judged.jsonl")
    assert first["prompt"] == tasks[0].prompt and first["completions"] == completions and first["category"] == "chat"
    assert (first["pairs"], first["targets"]) == ([[2, 0]], [0.0])
    assert (second["pairs"], second["targets"]) == ([[1, 0]], [1.0])
    assert second["votes"] == [{"annotator": "anna", "pair": [1, 0], "label": 1.0}]
    assert "2 of 3 tasks are judged; 1 other pairs left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of its 1 rows"):
        judging.match_to_tasks(rows[:1], tasks[1:], "judged.jsonl")


def test_a_file_keeps_what_it_says_beside_the_targets(judging):
    task = Task(prompt=chat("one"), completions=[chat(text, "assistant") for text in ("A", "B", "C")], category="chat")
    rows = [
        {
            "prompt": "one",
            "completions": ["X", "B", "A"],
            "pairs": [[0, 1], [2, 1]],
            "targets": [1.0, 1.0],
            "margins": [9.0, 2.0],
            "weights": [0.9, 0.2],
            "flags": ["harmful:1", "nonsense:0", "both_bad"],  # 0 is of no task
            "category": "brainstorming",
        },
        {"prompt": "one", "completions": ["C", "B"], "pairs": [[0, 1]], "targets": [0.5], "flags": ["both_bad"]},
    ]
    (judged,) = judging.match_to_tasks(rows, [task], "judged.jsonl")
    assert judged["pairs"] == [[0, 1], [2, 1]] and judged["targets"] == [1.0, 0.5]
    assert judged["margins"] == [2.0, 0.0]
    assert judged["weights"] == [0.2, 1.0]  # the second row has one pair, of weight 1
    assert judged["flags"] == ["harmful:1", "both_bad"] and judged["category"] == "brainstorming"
    validate_comparison(judged)
    (judged,) = judging.match_to_tasks(rows[1:], [task], "judged.jsonl")
    assert "margins" not in judged and "weights" not in judged and judged["category"] == "chat"


@pytest.mark.parametrize(
    "annotators, by", [(["simulated"], "simulated"), (["anna", "tom"], "page"), (["anna", "simulated"], "mixed")]
)
def test_who_judged_is_told_by_the_votes(judging, options, annotators, by):
    # The run was stopped and continued with another --judge.
    votes = [{"annotator": name, "pair": [0, 1], "label": 1.0} for name in annotators]
    for judge in ({"judge": "page", "people": ["anna"]}, {"judge": "simulated"}):
        assert judging.Judging(options(prompts="p", **judge), None).judged_by([row("p", [1.0], votes=votes)]) == by
    assert judging.Judging(options(prompts="p", judge="file"), None).judged_by([row("p", [1.0])]) == "file"


def test_two_judged_files_are_one_too_many(judging, tmp_path):
    assert judging.hand_judged_file(tmp_path, "") is None
    (tmp_path / "judged.csv").touch()
    assert judging.hand_judged_file(tmp_path, "") == tmp_path / "judged.csv"
    assert judging.hand_judged_file(tmp_path, "_evaluation") is None
    (tmp_path / "judged.jsonl").touch()
    with pytest.raises(UserError, match="leave one"):
        judging.hand_judged_file(tmp_path, "")


def test_outcomes_are_found_from_both_sides(judging):
    outcomes = judging.Outcomes([row("p", [1.0, 0.25])])
    a, b, c = ({"prompt": "p", "completion": text} for text in "abc")
    assert (outcomes.of(a, b), outcomes.of(b, a)) == (1.0, 0.0)
    assert (outcomes.of(a, c), outcomes.of(c, a)) == (0.25, 0.75)
    assert outcomes.of(b, c) is None
    # A file may have a row for each person: 1, 0 and 0.
    one_each = [row("p", [1.0]), row("p", [0.0]), row("p", [0.0])]
    assert judging.Outcomes(one_each).of(a, b) == pytest.approx(1 / 3)


def test_the_order_of_an_evaluation_task_tells_nothing(judging):
    firsts = []
    for k in range(64):
        new, old = {"prompt": f"p{k}", "completion": "new"}, {"prompt": f"p{k}", "completion": "old"}
        task = judging.evaluation_task(new, old, names=("round-1", "sft"), batch="evaluation-1", wanted=1, seed=0)
        assert {record["policy"]: text for record, text in zip(task.made_by, task.completions, strict=True)} == {
            "round-1": "new",
            "sft": "old",
        }
        firsts.append(task.completions[0])
    assert 16 < firsts.count("new") < 48  # 4 standard deviations of 64 fair draws


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_the_pairs_of_people_are_spread_over_the_earlier_policies(evaluation):
    spread = evaluation.pairs_by_policy(10, ["sft", "round-1", "round-2"], 8)
    assert {name: len(prompts) for name, prompts in spread.items()} == {"sft": 2, "round-1": 3, "round-2": 3}
    assert spread["sft"] == [0, 1]
    every = evaluation.pairs_by_policy(10, ["sft", "round-1"], 20)
    assert every == {"sft": list(range(10)), "round-1": list(range(10))}
    assert evaluation.pairs_by_policy(10, ["sft"], 0) == {"sft": []}


def test_a_win_rate_by_hand(evaluation):
    # 3 wins, 1 loss, 1 tie: (3 + 0.5) / 5.
    rate = evaluation.win_rate([1.0, 1.0, 1.0, 0.0, 0.5])
    assert rate["mean"] == 0.7 and rate["n"] == 5 and rate["ci95"][0] < 0.5
    assert not evaluation.is_better(rate)
    # 90 of 100: the normal interval is 0.9 ± 1.96 * sqrt(0.09 / 100) = 0.84 to 0.96.
    rate = evaluation.win_rate([1.0] * 90 + [0.0] * 10)
    assert rate["ci95"] == [pytest.approx(0.84, abs=0.03), pytest.approx(0.96, abs=0.03)]
    assert evaluation.is_better(rate)
    assert not evaluation.is_better(evaluation.win_rate([0.5] * 20))  # the same policy


def test_gains_are_paired_and_leave_out_what_has_no_score(evaluation):
    gain = evaluation.paired_gain([0.0, 1.0, math.nan, 2.0], [0.5, 1.5, 1.0, 2.5])
    assert gain["mean"] == 0.5 and gain["n"] == 3 and gain["ci95"] == [0.5, 0.5]


def test_log_probabilities_are_those_of_the_whole_softmax(evaluation, tiny_llama, chat_tokenizer):
    evaluator = evaluation.PolicyEvaluator(
        "sft", revision=None, base_options={}, temperature=0.7, max_new_tokens=4, max_tokens=16, seed=0
    )
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12]]
    completions = [[20, 21], [22, 23, 24], [25]]
    found = evaluator.logprobs(tiny_llama, chat_tokenizer, prompts, completions)
    for prompt, completion, value in zip(prompts, completions, found, strict=True):
        with torch.no_grad():
            logits = tiny_llama(torch.tensor([prompt + completion])).logits[0] / 0.7
        by_token = logits.log_softmax(-1)
        expected = sum(by_token[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion))
        assert value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda prompts, completions: None, "returned NoneType: it must return a list"),
        (lambda prompts, completions: [1.0], "returned 1 values for 2 completions"),
        (lambda prompts, completions: [1.0, "good"], "returned 'good' for a completion"),
        (lambda prompts, completions: [1.0, math.inf], "returned inf for a completion"),
        (lambda prompts, completions: [1.0, math.nan], "simulated annotators judge by it"),
        (lambda completions: [1.0], r"failed \(TypeError: [^,]*\): it takes prompts and completions"),
        (lambda prompts, completions: [1 / 0], r"failed \(ZeroDivisionError: .*, line \d+ of test_rounds.py\)"),
    ],
)
def test_a_gold_reward_that_is_wrong_is_refused_in_one_line(function, message):
    gold = module("rounds_parts.gold").CheckedGold(function, "mine.gold", needs_all=True)
    with pytest.raises(UserError, match=f"gold: mine.gold {message}|gold: mine.gold returned nan.*{message}") as caught:
        gold(["p", "p"], ["a", "b"])
    assert "\n" not in str(caught.value)


def test_a_gold_reward_may_leave_out_prompts_where_nobody_judges_by_it(evaluation, rounds):
    def only_short(prompts, completions):
        assert prompts == ["p", "p", [{"role": "system", "content": "s"}, *chat("p")]]
        return [torch.tensor(0.5), None, math.nan]

    gold = module("rounds_parts.gold").CheckedGold(only_short, "mine.gold", needs_all=False)
    rows = [{"prompt": "p"}, {"prompt": chat("p")}, {"prompt": [{"role": "system", "content": "s"}, *chat("p")]}]
    scores = evaluation.gold_scores(gold, [row | {"completion": chat("c", "assistant")} for row in rows])
    assert scores[0] == 0.5 and math.isnan(scores[1]) and math.isnan(scores[2])

    measured = rounds.compared("gold", {"sft": scores, "round-1": [1.0, 2.0, math.nan]})
    assert measured["gold"]["round-1"]["mean"] == 1.5 and measured["gold_gain"]["sft"]["mean"] == 0.5
    with pytest.raises(UserError, match="gold: no held-out completion of sft"):
        rounds.compared("gold", {"sft": [math.nan], "round-1": [1.0]})
    with pytest.raises(UserError, match="gold: on no held-out prompt"):
        rounds.compared("gold", {"sft": [math.nan, 1.0], "round-1": [1.0, math.nan]})


def test_the_plot_is_drawn_with_and_without_a_first_quality(tmp_path):
    value = {"mean": 0.6, "ci95": [0.4, 0.7]}
    points = [
        {"name": "SFT", "quality": None, "kl": {"mean": 0.0}},
        {"name": "round $1$", "quality": value, "kl": value},
        {"name": "one shot", "quality": value, "kl": value, "apart": True},
    ]
    path = plot_rounds(points, tmp_path / "new" / "rounds.png", quality="win rate against SFT")
    assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no points"):
        plot_rounds([], tmp_path / "rounds.png")


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "people: --judge page needs the names"),
        ({"judge": "simulated", "people": ["anna"]}, "people: --judge simulated has no people"),
        ({"judge": "mixed", "people": ["anna"], "simulated_people": []}, "simulated_people: --judge mixed"),
        ({"people": ["anna", "tom,anna"]}, "people: anna, tom, anna has a name twice"),
        ({"judge": "mixed", "people": ["simulated"]}, "people: simulated is in simulated_people too"),
        ({"people": ["anna"], "url": "judge.example.org"}, "url: .* must begin with https://"),
        ({"judge": "file", "temperature": 0.0}, "temperature must be above 0"),
        ({"judge": "file", "learning_rate": -1.0}, "learning_rate must be at least 0"),
        ({"people": ["anna"], "wanted": 2}, "wanted: 2 judgments per prompt from 1 people"),
        ({"judge": "file", "learner": "dpo", "round_weight": 0.5}, "round_weight: TRL's DPOTrainer has no weights"),
        ({"judge": "file", "reward_batch": 1, "round_weight": 0.5}, "round_weight: weights count within a batch"),
        ({"judge": "file", "stop_when_not_better": True, "eval_judgments": 0}, "stop_when_not_better"),
        ({"judge": "file", "heldout_share": 0.6}, "heldout_share must be at most 0.5"),
        ({"judge": "file", "rollout": 3}, "rollout must be an even number"),
        ({"judge": "file", "prompts": None}, "prompts is required"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(options, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        options(**{"prompts": "prompts.jsonl"} | changes)
    assert "\n" not in str(caught.value)


def test_who_is_asked_for_how_much(options):
    assert options(prompts="p", judge="simulated").pairs_to_judge(80, 3) == 240
    assert options(prompts="p", judge="file").pairs_to_judge(80, 3) == 60
    assert options(prompts="p", judge="file").pairs_to_judge(10, 1) == 10
    assert options(prompts="p", judge="simulated", eval_judgments=7).pairs_to_judge(80, 3) == 7


def test_the_command_line_gives_lists_of_people(rounds):
    for names in (["anna", "tom"], ["anna,tom"], ["anna,", "tom"]):  # as TRL, and as `collect serve`
        words = ["--prompts", "p.jsonl", "--lora_r", "4", "--people", *names]
        args, _, model_args = parse_recipe(rounds.ARGUMENTS, words)
        assert args.people == ["anna", "tom"] and args.judges() == ["anna", "tom"] and model_args.lora_r == 4


def test_help_prints(rounds, capsys):
    with pytest.raises(SystemExit) as stop:  # a stray % in a help text would be an error of its own
        parse_recipe(rounds.ARGUMENTS, ["--help"])
    assert stop.value.code == 0 and "--stop_when_not_better" in capsys.readouterr().out


def test_options_without_effect_are_named(options):
    assert options(prompts="p", judge="simulated").unused() == []
    lines = options(prompts="p", judge="file", wanted=2, learner="dpo", updates=8, rollout=16).unused()
    assert lines == ["not used with --judge file: wanted", "not used with --learner dpo: updates, rollout"]
    assert options(prompts="p", judge="simulated", port=80, dpo_epochs=2).unused() == [
        "not used with --judge simulated: port",
        "not used with --learner ppo: dpo_epochs",
    ]


# --- whole runs ------------------------------------------------------------------------------------------------------

SMALL = {
    "prompts_per_round": 6,
    "completions": 2,
    "heldout_share": 0.3,
    "eval_prompts": 5,
    "updates": 1,
    "rollout": 4,
    "max_completion_length": 8,
    "temperature": 1.0,
    "learning_rate": 1e-2,
    "noise": 0.01,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, save_base, chat_tokenizer_factory, write_jsonl):
    """A folder with a tiny model, prompts and a gold reward."""
    folder = tmp_path_factory.mktemp("rounds")
    save_base(folder / "base", chat_tokenizer_factory())
    write_jsonl(folder / "prompts.jsonl", [{"prompt": chat(f"Tell me about day {k}.")} for k in range(20)])
    (folder / "vowel_gold.py").write_text(GOLD)
    return folder


@pytest.fixture
def run(place, options, rounds, monkeypatch):
    """Runs rounds in the folder: run("name", rounds=2)."""
    monkeypatch.chdir(place)

    def start(name: str, *, kind=None, model="base", **changes):
        chosen = SMALL | {"judge": "simulated", "gold": "vowel_gold.vowels", "rounds": 1} | changes
        args = options(prompts="prompts.jsonl", output_dir=name, **chosen)
        model_args = ModelArguments(model_name_or_path=model, lora_r=2, dtype="float32")
        return rounds.run_rounds(args, model_args, kind=kind or rounds.Rounds)

    return start


def stopping(rounds):
    """Rounds that are interrupted once before each of their stages."""
    seen = set()

    class Stopping(rounds.Rounds):
        pass

    def interrupted(stage: str):
        def work(self, number: int):
            if (stage, number) not in seen:
                seen.add((stage, number))
                raise KeyboardInterrupt
            return getattr(rounds.Rounds, stage)(self, number)

        return work

    for stage in rounds.STAGES:
        setattr(Stopping, stage, interrupted(stage))
    return Stopping


@pytest.mark.slow
def test_rounds_go_on_after_each_stop_and_measure_the_same(run, rounds, place, hub):  # noqa: F811
    straight = run("straight", rounds=1)
    kind = stopping(rounds)
    stops = 0
    while True:
        try:
            report = run("stopped", rounds=1, kind=kind)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == 5
    first = report["rounds"][0]
    for key in ("gold", "kl", "length", "win_rate", "proxy", "labels", "reward_model"):
        assert first[key] == straight["rounds"][0][key], key
    assert first["kl"]["mean"] != 0 and math.isfinite(first["gold"]["mean"])

    # More rounds on the same folder: what is finished stays.
    kept = place / "stopped" / "data" / "completions" / "sft.jsonl"
    before = kept.stat().st_mtime_ns
    report = run("stopped", rounds=2)
    assert [entry["policy"] for entry in report["rounds"]] == ["round-1", "round-2"]
    assert report["rounds"][0] == first and kept.stat().st_mtime_ns == before
    assert len(run("stopped", rounds=1)["rounds"]) == 2  # a smaller number loses no results
    second = report["rounds"][1]
    assert second["start"] == "round-1" and set(second["win_rate"]) == {"sft", "round-1"}
    assert second["labels"] == first["labels"] + second["labels_of_round"]
    check_folder(place / "stopped")
    for part in ("policy", "reward_model"):
        check_push(place / "stopped" / "round-2" / part, place)

    # A run that stops where a policy is not better, and refuses other settings.
    report = run("stopped", rounds=3, stop_when_not_better=True)
    last = report["rounds"][-1]
    assert len(report["rounds"]) == 3 or last["win_rate"][last["start"]]["ci95"][0] <= 0.5
    with pytest.raises(UserError, match="holds a run with other settings .*updates: 1 then, 2 now"):
        run("stopped", rounds=2, updates=2)


def check_folder(folder):
    """The files of two finished rounds: data split by prompt, cards with the lineage, a plot and a table."""
    train = [json.loads(line) for line in (folder / "round-2/comparisons/train.jsonl").open()]
    heldout = [json.loads(line) for line in (folder / "round-2/comparisons/test.jsonl").open()]
    assert not {str(row["prompt"]) for row in train} & {str(row["prompt"]) for row in heldout}
    evaluated = {str(json.loads(line)["prompt"]) for line in (folder / "data/heldout.jsonl").open()}
    assert not evaluated & {str(row["prompt"]) for row in train + heldout}
    card = (folder / "round-2/policy/README.md").read_text()
    for part in (
        "first policy: local base",
        "policy of round 1",
        "reward model",
        "judgments of round 1",
        "judgments of round 2",
    ):
        assert part in card
    assert "labels by simulated" in card
    assert (folder / "round-2/policy/rounds.png").is_file() and (folder / "rounds.png").is_file()
    assert "| round 2 |" in (folder / "rounds.md").read_text()


def check_push(folder, place):
    """A model of a round goes through the scan to the stand-in for the Hub, without a word on this machine."""
    push_run(folder, f"alice/{folder.name}", base_model="alice/base")
    card = ModelCard.load(f"alice/{folder.name}")
    assert card.data.base_model == "alice/base" and "sha256" in card.text
    for name in ("README.md", "report.json", "training_config.yaml"):
        text = Path(hf_hub_download(f"alice/{folder.name}", name)).read_text()
        assert str(place) not in text and str(place.parent) not in text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gold": "vowel_gold.vowel"}, "gold: .*did you mean vowels"),
        ({"eval_prompts": 20}, "eval_prompts=20 are held out"),
        ({"model": "no/model"}, "model_name_or_path: no/model is no folder here"),
    ],
)
def test_a_mistake_leaves_nothing_behind(run, place, changes, message):
    with pytest.raises(UserError, match=message):
        run("mistaken", **changes)
    assert not (place / "mistaken").exists()


def test_a_second_process_is_kept_out_of_the_folder(run, place):
    holds = (
        "import sys, time\n"
        "from hf_rlhf_ext.cli.locking import only_process\n"
        "with only_process(sys.argv[1]):\n"
        "    print('in', flush=True)\n"
        "    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", holds, place / "shared"], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"in\n"
        for overwrite in (False, True):
            with pytest.raises(UserError, match="output_dir: another process runs in shared: wait") as caught:
                run("shared", overwrite=overwrite)
            assert "\n" not in str(caught.value)
        assert list((place / "shared").iterdir()) == []
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with only_process(place / "shared"):  # a killed process keeps nobody out
        pass


def test_finished_rounds_are_counted_from_the_first(rounds, tmp_path):
    names = [rounds.stage_name(number, "evaluate") for number in (1, 2, 3)]
    stages = StageRunner(tmp_path, {}, names)
    assert rounds.finished_rounds(stages) == 0
    for number in (1, 3):
        stages.run(names[number - 1], "compare", dict)
    assert rounds.finished_rounds(stages) == 1


def test_names_of_people_are_not_in_the_command_of_a_card(rounds, monkeypatch):
    monkeypatch.setattr("hf_rlhf_ext.cli.program._hidden_options", ())
    words = ["--people", "anna", "tom", "--host=192.168.0.7", "--url", "https://judge.example.org", "--rounds", "2"]
    monkeypatch.setattr("sys.argv", ["rounds.py", *words])
    assert "anna" in command_line()
    monkeypatch.setattr(rounds, "parse_recipe", lambda *args, **options: pytest.fail("only its first line is tried"))
    with pytest.raises(pytest.fail.Exception):
        rounds.main()
    assert command_line() == "python rounds.py --people ... --host ... --url ... --rounds 2"


@pytest.mark.parametrize("n_rows, epochs, steps", [(6, 1, 0), (80, 1, 1), (80, 4, 4), (480, 1, 5), (4000, 2, 5)])
def test_few_judgments_are_not_spent_on_the_warm_up(options, n_rows, epochs, steps):
    learners = module("rounds_parts.learners").Learners(options(prompts="p", judge="file"), ModelArguments())
    assert learners._warmup_steps(n_rows, epochs) == steps  # batches of 8


def test_dpo_trains_adapters_only(options):
    learners = module("rounds_parts.learners").Learners(
        options(prompts="p", judge="file", learner="dpo"), ModelArguments(use_peft=False, dtype="float32")
    )
    with pytest.raises(UserError, match="use_peft: --learner dpo trains an adapter"):
        learners.check_model()


def test_a_folder_with_other_files_is_refused(run, place):
    (place / "used").mkdir(exist_ok=True)
    (place / "used" / "notes.txt").touch()
    with pytest.raises(UserError, match="output_dir: used is not empty and holds no run of rounds"):
        run("used")


def test_a_script_can_tell_waiting_from_finished(rounds, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words = "--prompts prompts.jsonl --model_name_or_path base --judge file --output_dir waiting --eval_prompts 5"
    monkeypatch.setattr("sys.argv", ["rounds", *words.split(), "--max_completion_length", "4"])
    with pytest.raises(SystemExit) as ended:
        rounds.main()
    assert ended.value.code == 3
    out = capsys.readouterr().out
    assert "waiting/round-1/judged.jsonl" in out.splitlines()[-1]
    assert "every round judges the same 15 prompts" in out


@pytest.mark.slow
def test_a_file_is_waited_for_and_dpo_learns_from_it(run, place, capsys, write_jsonl, hub):  # noqa: F811
    from hf_rlhf_ext import load_policy

    changes = {"judge": "file", "gold": None, "learner": "dpo", "eval_judgments": 4}
    assert run("by_hand", **changes) is None
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "to_judge.jsonl" in line]
    assert "by_hand/round-1/judged.jsonl" in line and "run the same command again" in line
    folder = place / "by_hand" / "round-1"
    assert run("by_hand", **changes) is None  # still waiting

    tasks = read_tasks(folder / "to_judge.jsonl")
    assert len(tasks) == 6 and not tasks[0].made_by  # nobody sees who wrote what
    pairs = [{"prompt": task.prompt, "chosen": task.completions[0], "rejected": task.completions[1]} for task in tasks]
    write_jsonl(folder / "judged.jsonl", pairs)
    report = run("by_hand", **changes)
    if report is None:  # some completions changed: the pairs to evaluate are waited for too
        tasks = read_tasks(folder / "to_judge_evaluation.jsonl")
        pairs = [
            {"prompt": task.prompt, "chosen": task.completions[0], "rejected": task.completions[1]} for task in tasks
        ]
        write_jsonl(folder / "judged_evaluation.jsonl", pairs)
        report = run("by_hand", **changes)
    entry = report["rounds"][0]
    assert entry["labels"] == 6 and entry["dpo"]["pairs"] == 6 and "reward_model" not in entry and "gold" not in entry
    assert entry["win_rate"]["sft"]["n"] == 4
    model, _ = load_policy(folder / "policy")
    assert list(model.peft_config) == ["default"]
    card = (folder / "policy" / "README.md").read_text()
    assert "by DPO" in card and "starting from the base model base" in card and "judgments of round 1" in card
    card_of_run = json.loads((folder / "policy" / "report.json").read_text())["card"]
    assert card_of_run["adapter"]["type"] == "LORA" and card_of_run["data"] == [{"role": "comparisons", "rows": 6}]
    form = "text" if isinstance(pairs[0]["prompt"], str) else "messages"
    assert PromptForm.load(folder / "policy").prompt_form == card_of_run["prompt_form"] == form
    assert "PPO" not in card and "learning_rate: 0.01" in card
    check_push(folder / "policy", place)
    assert "gold" not in (place / "by_hand" / "rounds.md").read_text()
    assert "reward model accuracy" not in (place / "by_hand" / "rounds.md").read_text()  # no empty columns


# --- people at the page ----------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """Standard output, in which another thread looks for links."""

    def link_of(self, name: str, timeout: float = 20.0) -> str:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            found = re.search(rf"^  {name}: (http\S+)$", self.getvalue(), re.MULTILINE)
            if found:
                return found[1]
            time.sleep(0.02)
        raise AssertionError(f"no link of {name} in: {self.getvalue()}")


def by_vowels(prompts, completions):
    return [sum(letter in "aeiou" for letter in completion) for completion in completions]


class AtThePage:
    """A person in another thread, who works at the page whenever it is served, until the block ends.

    Args:
        name: of the person, whose link is read from the terminal.
        terminal: standard output of the run.
        link: of an earlier run, which is valid further on.
        stop_after: number of judgments after which the person presses Ctrl-C in the terminal of the run.
        think_seconds: time that the person takes for each judgment.
    """

    def __init__(self, name, terminal, *, link=None, stop_after=None, think_seconds=0.0):
        self.person = SimulatedPerson(name=name, gold=by_vowels, noise=0.0)
        self.terminal = terminal
        self.link = link
        self.stop_after = stop_after
        self.think_seconds = think_seconds
        self.keys = []
        self.error = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._is_over.set()
        self._thread.join(timeout=20)
        assert not self._thread.is_alive() and self.error is None, self.error

    def _run(self):
        try:
            self.link = self.link or self.terminal.link_of(self.person.name)
            with JudgeClient(self.link, patience=0.2) as client:
                while not self._is_over.is_set():
                    self._work(client)
                    time.sleep(0.02)
        except BaseException as error:
            self.error = error
            press_ctrl_c()  # nobody else would end the run

    def _work(self, client):
        try:
            work(
                client,
                self.person,
                may_go_on=self._may_go_on,
                think_seconds=self.think_seconds,
                on_saved=self._saved,
            )
        except ServerGone:
            pass  # nothing is waited for now

    def _may_go_on(self):
        return not (self._is_over.is_set() or self.stop_after == len(self.keys))

    def _saved(self, task, answer, reply):
        self.keys.append(reply.key)
        if len(self.keys) == self.stop_after:
            press_ctrl_c()


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def judgments_in(folder):
    with Store(folder / "judgments.sqlite") as store:
        judgments = store.judgments(live_only=False)
    pairs = Counter((judgment.annotator, judgment.task_id) for judgment in judgments)
    assert set(pairs.values()) == {1}, "judged twice"
    return judgments


@pytest.mark.slow
def test_two_people_judge_at_the_page_and_a_stopped_run_goes_on(run, place, ctrl_c):
    terminal = Terminal()
    changes = {"judge": "page", "people": ["anna,tom"], "gold": None, "learner": "dpo", "wanted": 2}
    changes |= {"eval_judgments": 4, "port": free_port(), "dpo_epochs": 4}
    anna = AtThePage("anna", terminal, stop_after=2)
    with redirect_stdout(terminal), anna, pytest.raises(KeyboardInterrupt):
        run("page", **changes)
    assert "stopped: 0 of 6 tasks are judged, with 2 judgments" in terminal.getvalue()
    tom_link = terminal.link_of("tom")

    # The links of before are still right, and are not shown again.
    again = AtThePage("anna", terminal, link=anna.link)
    tom = AtThePage("tom", terminal, link=tom_link)
    with redirect_stdout(terminal), again, tom:
        report = run("page", **changes)
    assert terminal.getvalue().count("/join/") == 3  # anna, tom and the admin
    entry = report["rounds"][0]
    assert entry["labels"] == 6 and entry["judged_by"] == "page" and set(entry["win_rate"]) == {"sft"}

    judgments = judgments_in(place / "page")
    assert {judgment.key for judgment in judgments} == {*anna.keys, *again.keys, *tom.keys}
    of_people = Counter(judgment.annotator for judgment in judgments)
    n_evaluated = sum(1 for _ in (place / "page/round-1/comparisons_evaluation.jsonl").open())
    assert n_evaluated > 0 and of_people == {"anna": 6 + n_evaluated, "tom": 6 + n_evaluated}
    for line in (place / "page/round-1/comparisons.jsonl").open():
        row = json.loads(line)
        assert {vote["annotator"] for vote in row["votes"]} == {"anna", "tom"}
        assert row["targets"] == [by_vowels_target(row["completions"])]


def by_vowels_target(completions):
    first, second = by_vowels(None, [message["content"] for (message,) in completions])
    return 0.5 if first == second else float(first > second)


@pytest.mark.slow
def test_people_and_simulated_annotators_share_the_work(run, place, ctrl_c):
    terminal = Terminal()
    changes = {"judge": "mixed", "people": ["anna"], "learner": "dpo", "eval_judgments": 4, "port": free_port()}
    anna = AtThePage("anna", terminal, stop_after=1)
    with redirect_stdout(terminal), anna, pytest.raises(KeyboardInterrupt):
        run("mixed", **changes)
    # On a slow machine, anna could otherwise be done before the simulated annotators begin.
    again = AtThePage("anna", terminal, link=anna.link, think_seconds=1.0)
    with redirect_stdout(terminal), again:
        report = run("mixed", **changes)
    judgments = judgments_in(place / "mixed")
    by = Counter(judgment.annotator for judgment in judgments if judgment.task_id <= 6)
    assert by.total() == 6 and 1 <= by["simulated"] <= 3  # at most half of what the batch wants, if anna is fast
    keys = {judgment.key for judgment in judgments if judgment.annotator == "anna"}
    assert keys == {*anna.keys, *again.keys} and len(anna.keys) == 1
    assert report["rounds"][0]["judged_by"] == "mixed" and report["rounds"][0]["labels"] == 6
