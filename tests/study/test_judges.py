"""Judges that score, judges that compare, and their coverage."""

import math

import pytest
import torch
from transformers import LlamaForSequenceClassification

from hf_rlhf_ext.collect.simulated import GoldReward
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.study.judges import (
    PairwiseJudge,
    PeopleJudge,
    RewardModelJudge,
    ScoreJudge,
    compare_all,
    judge_from,
    outcomes_from_scores,
)

PROMPTS = ["a", "b", "c", "d"]


def by_length(prompts, completions):
    return [float(len(completion)) for completion in completions]


def says(text):
    return [{"role": "assistant", "content": text}]


def test_the_higher_score_wins_and_a_small_difference_is_a_tie():
    assert outcomes_from_scores([1, 2, 3, None, 1], [2, 2, 1, 1, None]) == [0.0, 0.5, 1.0, None, None]
    assert outcomes_from_scores([1.0, 1.0], [1.5, 1.6], tie=0.5) == [0.5, 0.0]
    judge = ScoreJudge(by_length, tie=1)
    assert judge.compare(PROMPTS, ["", "xx", "xxx", "x"], ["xx", "xx", "x", "xx"]) == [0.0, 0.5, 1.0, 0.5]


def test_equal_answers_to_equal_prompts_are_scored_once():
    asked = []

    def gold(prompts, completions):
        asked.extend(zip(prompts, completions, strict=True))
        return [1.0] * len(prompts)

    judge = ScoreJudge(gold)
    assert judge.score(["p", "p", "q"], ["x", " x", "x"]) == [1.0] * 3
    judge.score(["p"], ["x"])
    assert asked == [("p", "x"), ("q", "x")] and judge.coverage.judged == 2


def test_a_judge_reads_texts_and_conversations_of_several_messages():
    seen = []

    def gold(prompts, completions):
        seen.extend([prompts, completions])
        return [0.0] * len(prompts)

    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    ScoreJudge(gold).score([chat, chat[1:], "Hi"], [says("yes"), says("no"), "no"])
    assert seen == [[chat, "Hi", "Hi"], ["yes", "no", "no"]]


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts, completions: [len(p) + 10 * len(c) for p, c in zip(prompts, completions, strict=True)],
        lambda completions, prompts: [len(p) + 10 * len(c) for p, c in zip(prompts, completions, strict=True)],
        lambda completions, **columns: [len(p) + 10 * len(c) for p, c in zip(columns["prompts"], completions)],  # noqa: B905
        lambda one, other: [len(p) + 10 * len(c) for p, c in zip(one, other, strict=True)],
    ],
)
def test_a_reward_function_of_any_form_is_called_with_the_right_texts(function):
    assert ScoreJudge(function).score(["pp"], ["ccc"]) == [32.0]


def test_a_batch_that_fails_is_asked_row_by_row_and_the_rest_is_counted():
    calls = []

    def gold(prompts, completions):
        calls.append(len(completions))
        if "bad" in completions:
            raise RuntimeError("the server is gone")
        return [None if completion == "?" else 1.0 for completion in completions]

    judge = ScoreJudge(gold, "server", batch_size=3)
    texts = ["a", "bad", "?", "b", "c", "d", "bad"]
    assert judge.score([str(row) for row in range(7)], texts) == [1.0, None, None, 1.0, 1.0, 1.0, None]
    assert calls == [3, 1, 1, 1, 3, 1]
    found = judge.coverage.as_dict()
    assert {name: found[name] for name in ("unit", "asked", "judged", "no_answer", "failed")} == {
        "unit": "completions", "asked": 7, "judged": 4, "no_answer": 1, "failed": 2,
    }  # fmt: skip
    assert "the server is gone" in found["first_error"] and "test_judges.py" in found["first_error"]
    assert found["share"] == pytest.approx(4 / 7)


@pytest.mark.parametrize("wrong", [[1.0, 2.0, 3.0], ["good"], [math.inf], 5])
def test_an_answer_that_is_no_score_is_a_failure(wrong):
    judge = ScoreJudge(lambda prompts, completions: wrong)
    assert judge.score(["p"], ["c"]) == [None]
    assert judge.coverage.failed == 1 and "returned" in judge.coverage.first_error
    assert ScoreJudge(lambda prompts, completions: [math.nan]).score(["p"], ["c"]) == [None]


# --- judges that compare ----------------------------------------------------------------------------------------------


def test_a_pair_is_judged_in_both_orders():
    asked = []

    def longer(prompts, first, second):
        asked.append((list(first), list(second)))
        return [float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]

    judge = PairwiseJudge(longer)
    assert judge.score(["p"], ["x"]) is None
    assert judge.compare(["p", "q"], ["xx", "y"], ["x", "yyy"]) == [1.0, 0.0]
    assert asked == [(["xx", "y"], ["x", "yyy"]), (["x", "yyy"], ["xx", "y"])]
    assert judge.coverage.disagreed == 0 and judge.coverage.judged == 2


@pytest.mark.parametrize("always", ["first", "second", 0.9, 0.1])
def test_a_judge_that_looks_at_the_place_only_ties_everything(always):
    judge = PairwiseJudge(lambda prompts, first, second: [always] * len(prompts))
    assert judge.compare(PROMPTS, ["x"] * 4, ["y"] * 4) == [0.5] * 4
    assert judge.coverage.as_dict()["disagreement"] == 1.0


def test_probabilities_of_both_orders_are_averaged_where_they_agree():
    answers = {("x", "y"): 0.9, ("y", "x"): 0.3, ("x", "z"): 0.5, ("z", "x"): 0.2, ("u", "v"): "tie", ("v", "u"): "tie"}
    judge = PairwiseJudge(lambda prompts, first, second: [answers[pair] for pair in zip(first, second, strict=True)])
    # 0.9 and 1 - 0.3; a tie in one order and a win in the other is a disagreement; a tie in both is none.
    assert judge.compare(["p"] * 3, ["x", "x", "u"], ["y", "z", "v"]) == [pytest.approx(0.8), 0.5, 0.5]
    assert judge.coverage.disagreed == 1


def test_a_pair_of_the_same_text_is_a_tie_that_nobody_is_asked_for():
    def never(prompts, first, second):
        raise AssertionError

    judge = PairwiseJudge(never)
    assert judge.compare(["p"], ["same  text"], [says("same text")[0]["content"]]) == [0.5]
    assert judge.coverage.same_text == 1 and judge.coverage.asked == 0 and judge.coverage.as_dict()["share"] is None


def test_a_pair_counts_as_failed_if_one_order_fails():
    def fails_on_swapped(prompts, first, second):
        if first[0].startswith("y"):
            raise ValueError("no")
        return [1.0 for _ in first]

    judge = PairwiseJudge(fails_on_swapped, batch_size=1)
    assert judge.compare(["p"], ["x"], ["y"]) == [None] and judge.coverage.failed == 1
    unsure = PairwiseJudge(lambda prompts, first, second: [None])
    assert unsure.compare(["p"], ["x"], ["y"]) == [None] and unsure.coverage.no_answer == 1
    wrong = PairwiseJudge(lambda prompts, first, second: [2])
    assert wrong.compare(["p"], ["x"], ["y"]) == [None] and "between 0 and 1" in wrong.coverage.first_error


def test_all_pairs_of_systems_are_compared():
    answers = {"sft": ["x", "xx"], "ppo": ["xx", "xx"], "dpo": ["", "x"]}
    found = compare_all(ScoreJudge(by_length), ["p", "q"], answers, [("ppo", "sft"), ("dpo", "ppo")])
    assert found == {("ppo", "sft"): [1.0, 0.5], ("dpo", "ppo"): [0.0, 0.0]}


# --- a reward model ---------------------------------------------------------------------------------------------------


def test_a_reward_model_judges_by_its_scores(tmp_path, tiny_config, chat_tokenizer):
    tiny_config.num_labels = 1
    torch.manual_seed(0)
    LlamaForSequenceClassification(tiny_config).save_pretrained(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)

    def load(folder):
        # In bf16, which is the default where the CPU has it, batches of other sizes round differently.
        return RewardScorer.from_pretrained(folder, dtype="float32")

    judge = RewardModelJudge(tmp_path, load=load)
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    first, second = [says("yes")] * 4, [says("no no")] * 4
    outcomes = judge.compare(prompts, first, second)
    scorer = load(tmp_path)
    scores = scorer(prompts * 2, first + second)
    assert judge.score(prompts, first) == pytest.approx(scores[:4], abs=1e-5)
    assert outcomes == [float(a > b) for a, b in zip(scores[:4], scores[4:], strict=True)]
    judge.release()
    assert judge.score(prompts[:1], [says("maybe")]) != [None]
    with pytest.raises(UserError, match="no folder"):
        RewardModelJudge(tmp_path / "missing").score(["p"], ["c"])


# --- YAML -------------------------------------------------------------------------------------------------------------


def load(name, option):
    if name != "mine.py:by_length":
        raise UserError(f"{option}: no {name}")
    return by_length


def test_judges_are_made_from_the_entries_of_a_file(tmp_path):
    vader = judge_from("vader")
    assert vader.name == "vader" and isinstance(vader.functions[0], GoldReward)
    gold = judge_from({"gold": "mine.py:by_length", "tie": 2, "name": "long"}, load=load)
    assert isinstance(gold, ScoreJudge) and gold.name == "long" and gold.tie == 2 and gold.functions == (by_length,)
    assert judge_from(by_length).name == "by_length"
    model = judge_from({"reward_model": "runs/hh", "trained_on": "hh.jsonl"})
    assert isinstance(model, RewardModelJudge) and (model.reward_model, model.trained_on) == ("runs/hh", "hh.jsonl")
    assert model.name == "reward model hh"
    pairwise = judge_from({"function": "runs/mine.py:by_length"}, load=lambda name, option: by_length)
    assert isinstance(pairwise, PairwiseJudge) and pairwise.name == "mine.py:by_length"  # without the folder
    people = judge_from({"people": ["anna", "tom"], "wanted": 2, "judgments": 9}, folder=tmp_path)
    assert isinstance(people, PeopleJudge) and people.names == ("anna", "tom") and people.judgments == 9


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"glod": "vader"}, "did you mean gold"),
        ({"gold": "vader", "function": "x.py:f"}, "exactly one of gold"),
        ({"name": "x"}, "says nothing of its kind"),
        ({"function": "x.py:f", "tie": 0.1}, "tie is not used by a judge of kind function"),
        ({"gold": "vader", "tie": -1}, "tie=-1"),
        ({"gold": "vader", "batch_size": 0}, "batch_size=0"),
        ({"gold": "missing.py:f"}, "judges: gold: no missing.py:f"),
        ({"gold": 3}, "is no function"),
        ({"people": []}, "give a list of names"),
        ({"people": ["anna"], "wanted": 2}, "name more"),
        ({"people": ["anna"], "judgments": 0}, "judgments=0"),
        (7, "is no judge"),
    ],
)
def test_a_wrong_entry_is_refused_in_one_line(spec, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        judge_from(spec, load=load, folder=tmp_path)
    assert "\n" not in str(caught.value)


def test_what_an_entry_needs_from_the_caller_is_named():
    with pytest.raises(UserError, match="`load`"):
        judge_from({"gold": "mine.py:by_length"})
    with pytest.raises(UserError, match="`folder`"):
        judge_from({"people": ["anna"]})
