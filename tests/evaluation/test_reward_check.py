"""The check of a reward model, on scorers whose faults are known."""

import math
import random

import pytest

from hf_rlhf_ext.data.text import plain_text
from hf_rlhf_ext.evaluation.reward_check import PROBES, check_reward

GOOD = "The river runs north. It meets the sea near the old harbour."


def rows(n=200, seed=0, kind="text"):
    """The first completion wins with probability σ(hidden gap); its gap is written into the texts."""
    rng = random.Random(seed)
    made = []
    for k in range(n):
        gap = rng.gauss(0, 2)
        texts = [f"{GOOD} {gap:.3f}", f"{GOOD} 0.0" + " and" * rng.randrange(6)]
        prompt = f"Where does river {k} run?"
        if kind == "messages":
            prompt = [{"role": "user", "content": prompt}]
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        target = float(rng.random() < 1 / (1 + math.exp(-gap)))
        made.append({"prompt": prompt, "completions": texts, "pairs": [[0, 1]], "targets": [target]})
    return made


def honest(prompts, completions):
    """The hidden gap where there is one, and little for everything else."""
    found = []
    for completion in completions:
        words = plain_text(completion).split()
        numbers = [word for word in words if word.lstrip("-").replace(".", "", 1).isdigit()]
        probe = not plain_text(completion).startswith(GOOD) or len(words) > 25
        found.append(-9.0 if probe or not numbers else float(numbers[0]))
    return found


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_an_honest_scorer_passes(kind):
    checked = check_reward(honest, rows(600, kind=kind))
    assert checked.figures["accuracy"] > 0.7 and checked.figures["ece"] < 0.08
    assert checked.probes == dict.fromkeys(PROBES, 0.0)
    assert checked.verdict == "Nothing speaks against PPO."
    assert sum(bin["n"] for bin in checked.reliability) == 600
    assert sum(found["n"] for found in checked.groups["length_gap"].values()) == 600


def test_faults_are_named():
    def long_is_good(prompts, completions):
        return [float(len(plain_text(completion))) for completion in completions]

    length = check_reward(long_is_good, rows())
    assert "coin's" in length.verdict and "its confidence is off" in length.verdict
    assert {"filler", "flattery"} <= {name for name, share in length.probes.items() if share == 1.0}
    assert length.probes["empty"] == 0.0

    def fond_of_refusals(prompts, completions):
        return [
            99.0 if "can't help" in plain_text(c) else score
            for c, score in zip(completions, honest(0, completions), strict=True)
        ]

    assert check_reward(fond_of_refusals, rows()).problems == [
        "'refusal' beats the chosen answer in 100% of the prompts: PPO will find it"
    ]


def test_overconfidence_shows_in_calibration_not_in_accuracy():
    sure = check_reward(lambda p, c: [9 * score for score in honest(p, c)], rows(600))
    calm = check_reward(honest, rows(600))
    assert sure.figures["accuracy"] == calm.figures["accuracy"] and sure.figures["ece"] > calm.figures["ece"] + 0.1
    assert any("confidence is off" in problem for problem in sure.problems)


def test_margins_make_buckets_and_ties_alone_are_refused():
    data = [row | {"margins": [float(k % 3)]} for k, row in enumerate(rows(90))]
    assert sum(found["n"] for found in check_reward(honest, data).groups["margin"].values()) == 90
    with pytest.raises(ValueError, match="every judgement is a tie"):
        check_reward(honest, [row | {"targets": [0.5]} for row in data])


def test_what_ppo_gets_decides_the_order_and_raw_scores_the_calibration():
    data = rows(300)

    def contrary(prompts, completions):
        return [-score for score in honest(prompts, completions)]

    both, plain = check_reward(honest, data, reward=contrary), check_reward(honest, data)
    assert both.figures["accuracy"] == pytest.approx(1 - plain.figures["accuracy"], abs=0.02)
    assert both.figures["ece"] == plain.figures["ece"] and both.reliability == plain.reliability
    assert both.probes["empty"] == 1.0 and plain.probes["empty"] == 0.0
    assert "length_gap" in check_reward(honest, data, length=len, probes=False).groups


def test_a_single_prompt_has_no_interval():
    figures = check_reward(honest, rows(1), probes=False).figures
    assert "accuracy" in figures and not {"accuracy_low", "gain_low"} & set(figures)
    assert all(math.isfinite(value) for value in figures.values())
