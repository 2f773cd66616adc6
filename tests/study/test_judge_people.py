"""People who judge for a study: the real store and page, with simulated people in their place."""

import pytest

from hf_rlhf_ext.collect.simulated import SimulatedPerson
from hf_rlhf_ext.collect.store import Store
from hf_rlhf_ext.recipes.compare_parts.judging import judge_systems
from hf_rlhf_ext.study.judges import PeopleJudge, compare_all

pytestmark = pytest.mark.xdist_group("processes")

PROMPTS = [[{"role": "user", "content": f"question {number}"}] for number in range(6)]


def number_of(prompts, completions):
    return [float(completion) for completion in completions]


def make_judge(folder, *names, **options):
    people = [SimulatedPerson(name, gold=number_of, noise=0) for name in names or ("anna",)]
    return PeopleJudge(folder, (), simulated=people, show=lambda line: None, **options)


def stored(folder):
    with Store(folder / "judgments.sqlite") as store:
        return store.tasks(), store.judgments()


def test_people_judge_the_pairs_that_differ_once_and_keep_their_use_case(tmp_path):
    first = ["1", "2", "3", "4", "5", "6"]
    second = ["2", "2 ", "1", "9", "0", "6"]
    judge = make_judge(tmp_path)
    categories = ["chat", None, "chat", "brainstorming", None, None]
    expected = [0.0, 0.5, 1.0, 0.0, 1.0, 0.5]
    assert judge.compare(PROMPTS, first, second, categories) == expected
    coverage = judge.coverage
    assert (coverage.judged, coverage.same_text, coverage.asked) == (4, 2, 4)

    tasks, judgments = stored(tmp_path)
    assert {task.prompt[0]["content"]: task.category for task in tasks} == {
        "question 0": "chat", "question 2": "chat", "question 3": "brainstorming", "question 4": None,
    }  # fmt: skip
    assert len(judgments) == 4

    again = make_judge(tmp_path)  # also in the other direction, nothing is asked again
    assert again.compare(PROMPTS, second, first) == [1 - outcome for outcome in expected]
    assert len(stored(tmp_path)[1]) == 4


def test_the_sides_and_the_pairs_are_shuffled(tmp_path):
    prompts = [f"question {number}" for number in range(24)]
    answers = {"a": ["1"] * 24, "b": ["2"] * 24, "c": ["3"] * 24}
    judge = make_judge(tmp_path)
    found = compare_all(judge, prompts, answers, [("a", "b"), ("c", "b")])
    assert found == {("a", "b"): [0.0] * 24, ("c", "b"): [1.0] * 24}
    tasks, _ = stored(tmp_path)
    n_first = sum(task.made_by[0]["policy"] == "b" for task in tasks)
    assert 12 <= n_first <= 36  # of 48, in an order that tells nothing
    order = [task.prompt for task in tasks]
    assert order != sorted(order) and order[:24] != prompts
    of_a = [any(made["policy"] == "a" for made in task.made_by) for task in tasks]
    assert True in of_a[:12] and False in of_a[:12]  # systems are mixed


def test_a_number_of_judgments_is_spread_evenly_over_the_pairs(tmp_path):
    prompts = [f"question {number}" for number in range(6)]
    answers = {"a": ["1"] * 6, "b": ["2"] * 6, "c": ["3", "2", "3", "3", "3", "3"]}
    judge = make_judge(tmp_path, judgments=5)
    found = compare_all(judge, prompts, answers, [("a", "b"), ("b", "c")])
    assert found["a", "b"] == [0.0, 0.0, 0.0, None, None, None]
    assert found["b", "c"] == [0.0, 0.5, 0.0, None, None, None]  # the second pair has the same text
    assert judge.coverage.not_asked == 6 and judge.coverage.asked == 5


def test_two_systems_with_the_same_answers_are_judged_once(tmp_path):
    answers = {"a": ["1"], "copy of a": ["1"], "b": ["2"]}
    judge = make_judge(tmp_path)
    found = compare_all(judge, ["question"], answers, [("a", "b"), ("copy of a", "b"), ("b", "a")])
    assert list(found.values()) == [[0.0], [0.0], [1.0]]
    assert len(stored(tmp_path)[0]) == 1


def test_several_people_give_the_mean_of_their_judgments(tmp_path):
    anna = SimulatedPerson("anna", gold=number_of, noise=0)
    tom = SimulatedPerson("tom", gold=lambda prompts, completions: [-float(text) for text in completions], noise=0)
    judge = PeopleJudge(tmp_path, (), wanted=2, simulated=[anna, tom], show=lambda line: None)
    assert judge.compare(["question"], ["1"], ["2"]) == [0.5]
    assert len(stored(tmp_path)[1]) == 2


def test_pairs_beyond_the_budget_are_no_failures_in_a_comparison(tmp_path):
    prompts = [{"prompt": f"question {number}"} for number in range(4)]
    numbers = {"sft": "1234", "ppo": "2345", "dpo": "0123"}
    answers = {
        name: [prompt | {"completion": digit} for prompt, digit in zip(prompts, digits, strict=True)]
        for name, digits in numbers.items()
    }
    judge = make_judge(tmp_path, judgments=2)
    judged = judge_systems([judge], answers, {}, reference="sft", folder=tmp_path)
    counts = {"judged": 2, "failed": 0, "not_asked": 6, "unit": "pairs", "first_error": None}
    assert judged.coverage["people"] == counts


def test_people_with_fewer_judgments_than_systems_judge_ppo_first(tmp_path):
    kinds = {
        "sft": "sft", "sft_top_rated": "sft", "best_of_4": "best_of_n", "dpo": "dpo", "mine": "ppo",
    }  # fmt: skip
    prompts = [{"prompt": f"question {number}"} for number in range(3)]
    answers = {
        name: [row | {"completion": str(number)} for row in prompts] for number, name in enumerate(kinds)
    }  # all differ
    for judgments, asked in ((1, {"mine"}), (3, {"mine", "best_of_4", "dpo"}), (5, set(kinds) - {"sft"})):
        folder = tmp_path / str(judgments)
        judge = make_judge(folder, judgments=judgments)
        outcomes = judge_systems([judge], answers, {}, reference="sft", folder=folder, kinds=kinds).outcomes["people"]
        n_asked = {pair.split("|")[0]: 3 - values.count(None) for pair, values in outcomes.items()}
        assert {name for name, n in n_asked.items() if n} == asked
        assert n_asked["mine"] == max(n_asked.values()) and sum(n_asked.values()) == judgments
