"""Choice of prompts, with a real ensemble of two tiny reward models for the disagreement."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import LlamaForSequenceClassification

from hf_rlhf_ext.collect.sampling import PolicySpec, sample_tasks
from hf_rlhf_ext.collect.selection import choose_prompts, pair_disagreement, task_disagreement
from hf_rlhf_ext.collect.tasks import Task
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.reward.ensemble import RewardEnsemble

ANIMALS = "ant bee cat dog eel fox gnu hen ibis jay kiwi lion mole newt owl pig quail rat seal toad".split()
SHORT = {"max_new_tokens": 5, "dtype": "float32"}


def rows_about(animals: list[str], category: str | None = None) -> list[dict]:
    return [{"prompt": f"Why is the {name} happy?", "category": category} for name in animals]


def prompts_of(chosen) -> list[str]:
    return [row["prompt"] for row in chosen.rows]


@pytest.fixture
def policy(tiny_llama, chat_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    return PolicySpec("base", str(tmp_path / "base"))


@pytest.fixture
def ensemble(tiny_config, chat_tokenizer, tmp_path):
    """A folder with an ensemble of two random reward models."""
    tiny_config.num_labels = 1
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(tiny_config)
        torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(tmp_path / "rm" / f"member-{seed}")
        chat_tokenizer.save_pretrained(tmp_path / "rm" / f"member-{seed}")
    RewardEnsemble.save(tmp_path / "rm", ["member-1", "member-2"])
    return tmp_path / "rm"


def test_disagreement_of_pairs_worked_by_hand():
    # Differences of the three completions by member: 0-1: 1, 5 -> std 2; 0-2: 3, 3 -> 0; 1-2: 2, -2 -> 2.
    rewards = [[4.0, 3.0, 1.0], [7.0, 2.0, 4.0]]
    assert pair_disagreement(rewards) == pytest.approx(4 / 3, abs=1e-12)
    # A third member. 0-1: 1, 5, 0 -> mean 2, std sqrt((1 + 9 + 4) / 3).
    three = [[4.0, 3.0], [7.0, 2.0], [6.0, 6.0]]
    assert pair_disagreement(three) == pytest.approx(math.sqrt(14 / 3), abs=1e-12)


def test_a_shift_of_a_member_does_not_count():
    rewards = np.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    assert pair_disagreement(rewards) == 0.0
    assert pair_disagreement(rewards + [[0.0], [100.0]]) == pytest.approx(0.0, abs=1e-12)
    # The plain standard deviation of the rewards would be 50 here.
    assert pair_disagreement(rewards * [[1.0], [2.0]]) == pytest.approx(1.0, abs=1e-12)  # 0.5, 1.5 and 1.0


def test_tasks_of_different_sizes_keep_their_own_rewards(ensemble):
    tasks = [
        Task("Tell me", ["a sunny day", "the lazy dog"]),
        Task("garden?", ["happy", "sad", "words"]),
        *[Task(f"{number}?", ["fox", f"{number} dogs"]) for number in range(20)],  # more than one step of scoring
    ]
    loaded = RewardEnsemble.from_pretrained(ensemble, device="cpu")
    found = task_disagreement(tasks, loaded)
    assert len(found) == 22
    for task, value in zip(tasks, found, strict=True):
        differences = []
        for i in range(len(task.completions)):
            for j in range(i + 1, len(task.completions)):
                one, other = loaded.rewards([task.prompt] * 2, [task.completions[i], task.completions[j]])
                differences.append(abs((one[0] - one[1]) - (other[0] - other[1])) / 2)  # std of two numbers
        assert value == pytest.approx(np.mean(differences), abs=1e-5)


def test_uniform_choice_is_seeded_and_distinct():
    rows = rows_about(ANIMALS)
    first = choose_prompts(rows, 8, seed=1)
    assert prompts_of(choose_prompts(rows, 8, seed=1)) == prompts_of(first)
    assert prompts_of(choose_prompts(rows, 8, seed=2)) != prompts_of(first)
    assert len(set(prompts_of(first))) == 8
    assert first.notes == []
    assert first.tasks is None and first.disagreement is None


def test_more_seeds_choose_every_prompt():
    rows = rows_about(ANIMALS)
    counts = Counter(prompt for seed in range(200) for prompt in prompts_of(choose_prompts(rows, 5, seed=seed)))
    assert len(counts) == 20
    assert all(count == pytest.approx(50, abs=25) for count in counts.values())


def test_near_duplicates_and_judged_prompts_are_left_out_and_counted(caplog):
    long = (
        "Please write a short and friendly story about a small dog who finds a red ball in the park and plays all day"
    )
    rows = [
        {"prompt": long},
        {"prompt": long + " long"},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the FOX"}]},
        {"prompt": "The  fox"},
        {"prompt": "judged before"},
        {"prompt": " "},
        {"prompt": "new"},
    ]
    chosen = choose_prompts(rows, 7, exclude=["Judged before", [{"role": "user", "content": "other"}]])
    assert len(chosen.rows) == 3
    assert {"prompt": "new"} in chosen.rows
    assert chosen.left_out == {"near duplicate": 2, "judged before": 1, "empty prompt": 1}
    (note,) = chosen.notes
    assert note.startswith("only 3 of 7 prompts could be chosen")
    assert note in caplog.messages


def test_a_mix_has_the_shares_of_use_cases():
    rows = rows_about(ANIMALS[:10], "open_qa") + rows_about(ANIMALS[10:], "creative_writing")
    rows += [{"prompt": f"Say {name}", "category": "unknown"} for name in ANIMALS]
    chosen = choose_prompts(rows, 8, how="mix", shares={"open QA": 0.25, "generation": 0.75})
    assert Counter(row["category"] for row in chosen.rows) == {"open QA": 2, "generation": 6}
    assert chosen.notes == []
    again = choose_prompts(rows, 8, how="mix", shares={"open QA": 1, "generation": 3})
    assert again.rows == chosen.rows
    # Not sorted by use case.
    orders = set()
    for seed in range(5):
        mixed = choose_prompts(rows, 8, how="mix", shares={"open QA": 1, "generation": 3}, seed=seed)
        orders.add(tuple(row["category"] for row in mixed.rows))
    assert len(orders) > 1


def test_scarce_use_cases_are_named_in_one_line(caplog):
    rows = [row | {"kind": "chat"} for row in rows_about(ANIMALS[:10])] + [{"prompt": "Shorter!", "kind": "rewrite"}]
    shares = {"chat": 0.5, "rewrite": 0.3, "extract": 0.2}
    chosen = choose_prompts(rows, 10, how="mix", shares=shares, category_column="kind")
    assert Counter(row["category"] for row in chosen.rows) == {"chat": 5, "rewrite": 1}
    assert chosen.notes == ["mix: 6 of 10 prompts chosen, as there are too few of rewrite 1 of 3, extract 0 of 2"]
    assert chosen.notes == caplog.messages
    with pytest.raises(UserError, match="found None: name the column with category_column"):
        choose_prompts(rows_about(ANIMALS), 10, how="mix")


def test_prompts_with_the_largest_disagreement_come_with_their_samples(policy, ensemble):
    rows = rows_about(ANIMALS, "chat")
    arguments = {"how": "disagreement", "policies": [policy], "seed": 7, "pool": 12, "k": 3, **SHORT}
    chosen = choose_prompts(rows, 4, ensemble=ensemble, **arguments)
    assert len(chosen.rows) == len(chosen.tasks) == len(chosen.disagreement) == 4
    assert [task.prompt for task in chosen.tasks] == prompts_of(chosen)
    assert {len(task.completions) for task in chosen.tasks} == {3}
    assert all(task.made_by[0]["policy"] == "base" for task in chosen.tasks)

    # The same, step by step: 12 candidates, their samples, and the four with the largest disagreement.
    candidates = choose_prompts(rows, 12, seed=7).rows
    sampled = sample_tasks(candidates, [policy], seed=7, k=3, **SHORT)
    loaded = RewardEnsemble.from_pretrained(ensemble, device="cpu")
    values = task_disagreement(sampled.tasks, loaded)
    assert chosen.disagreement == pytest.approx(sorted(values, reverse=True)[:4], abs=1e-6)
    assert min(chosen.disagreement) > min(values)
    assert chosen.tasks[0] == sampled.tasks[int(np.argmax(values))]
    # An ensemble that is loaded already gives the same.
    assert choose_prompts(rows, 4, ensemble=loaded, **arguments).tasks == chosen.tasks


def test_a_single_reward_model_is_refused_before_anything_is_sampled(ensemble):
    missing = PolicySpec("base", "./missing")
    with pytest.raises(UserError, match="single reward model.*--members"):
        choose_prompts(
            rows_about(ANIMALS), 2, how="disagreement", ensemble=ensemble / "member-1", policies=[missing], **SHORT
        )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"how": "best"}, "uniform, mix, disagreement"),
        ({"n": 0}, "n=0"),
        ({"rows": []}, "none is left to choose from"),
        ({"rows": [{"prompt": None}]}, "prompts row 0"),
        ({"exclude": [row["prompt"] for row in rows_about(ANIMALS)]}, "20 judged before"),
        ({"how": "disagreement"}, "needs an ensemble"),
        ({"pool": 5}, "pool"),
        ({"max_new_tokens": 5}, "max_new_tokens: used with how='disagreement' only"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(change, words):
    arguments = {"rows": rows_about(ANIMALS), "n": 3} | change
    with pytest.raises(UserError) as refused:
        choose_prompts(**arguments)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_pool_smaller_than_the_choice_is_refused(policy, ensemble):
    with pytest.raises(UserError, match="pool=2"):
        choose_prompts(
            rows_about(ANIMALS), 3, how="disagreement", pool=2, ensemble=ensemble, policies=[policy], **SHORT
        )
