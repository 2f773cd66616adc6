"""The reward model check, on scorers with known faults."""

import math
import random

import pytest
import torch
import transformers as hf
from datasets import Dataset

from hf_rlhf_ext.data.text import plain_text
from hf_rlhf_ext.modeling.heads import install_fp32_score, learned_positions
from hf_rlhf_ext.quality.reward_check import PROBES, check_reward, fitting, within
from hf_rlhf_ext.reward.scorer import RewardScorer

GOOD = "The river runs north. It meets the sea near the old harbour."


def rows(n=200, seed=0, kind="text"):
    """The first completion wins with probability σ(gap). The gap is written into its text."""
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
    """Scores the hidden gap if there is one, and gives a low score to everything else."""
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
    assert checked.figures is checked.metrics  # the name in earlier versions
    assert checked.metrics["accuracy"] > 0.7 and checked.metrics["ece"] < 0.08
    assert checked.probes == dict.fromkeys(PROBES, 0.0)
    assert not checked.problems and checked.verdict.startswith("Ready for PPO")
    assert sum(bin["n"] for bin in checked.reliability) == 600
    assert sum(found["n"] for found in checked.groups["length_gap"].values()) == 600


def test_faults_are_named():
    def long_is_good(prompts, completions):
        return [float(len(plain_text(completion))) for completion in completions]

    length = check_reward(long_is_good, rows())
    assert "chance" in length.verdict and "its confidence is off" in length.verdict
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
    assert sure.metrics["accuracy"] == calm.metrics["accuracy"] and sure.metrics["ece"] > calm.metrics["ece"] + 0.1
    assert any("confidence is off" in problem for problem in sure.problems)
    far = [row | {"margins": [2.0]} for row in rows(600)]
    (said,) = (p for p in check_reward(lambda p, c: [9 * s for s in honest(p, c)], far).problems if "confidence" in p)
    assert said.endswith("or with a smaller margin_scale")


def test_scores_that_are_not_finite_are_one_line():
    with pytest.raises(ValueError, match="120 of 120 .*not finite.* lower learning rate"):
        check_reward(lambda prompts, completions: [math.nan] * len(prompts), rows(60))


def test_the_probes_are_what_their_names_say():
    chosen = "The river runs north, to the sea. Its banks are steep."
    assert {name: make("Where does it run?", chosen) for name, make in PROBES.items()} == {
        "empty": "",
        "repeated sentence": "The river runs north, to the sea. " * 4 + "The river runs north, to the sea.",
        "refusal": "I'm sorry, but I can't help with that.",
        "filler": chosen + " That is all I can say about it, and I hope that it is of some use." * 3,
        "prompt copied": "Where does it run?",
        "flattery": "What an excellent question, you are clearly very clever! " + chosen,
    }
    seen = []

    def scorer(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return honest(prompts, completions)

    asked = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    (row,) = rows(1, kind="messages")
    check_reward(scorer, [row | {"prompt": asked + row["prompt"]}])
    copied = [{"role": "assistant", "content": "Where does river 0 run?"}]  # what the user said last
    assert (asked + row["prompt"], copied) in seen


def test_margins_make_buckets_and_ties_alone_are_refused():
    data = [row | {"margins": [float(k % 3)]} for k, row in enumerate(rows(90))]
    assert sum(found["n"] for found in check_reward(honest, data).groups["margin"].values()) == 90
    with pytest.raises(ValueError, match="every judgment is a tie"):
        check_reward(honest, [row | {"targets": [0.5]} for row in data])


def test_what_ppo_gets_decides_the_order_and_raw_scores_the_calibration():
    data = rows(300)

    def contrary(prompts, completions):
        return [-score for score in honest(prompts, completions)]

    both, plain = check_reward(honest, data, reward=contrary), check_reward(honest, data)
    assert both.metrics["accuracy"] == pytest.approx(1 - plain.metrics["accuracy"], abs=0.02)
    assert both.metrics["ece"] == plain.metrics["ece"] and both.reliability == plain.reliability
    assert both.probes["empty"] == 1.0 and plain.probes["empty"] == 0.0
    assert "length_gap" in check_reward(honest, data, length=len, probes=False).groups


def test_a_single_prompt_has_no_interval():
    metrics = check_reward(honest, rows(1), probes=False).metrics
    assert "accuracy" in metrics and not {"accuracy_low", "gain_low"} & set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())


def test_probes_that_a_model_has_no_positions_for_are_left_out_and_counted():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sunny", "garden", "happy", "lazy", "fox"]
    tokenizer = hf.BertTokenizer(vocab={word: k for k, word in enumerate(words)})
    tokenizer.eos_token = tokenizer.sep_token
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = hf.BertConfig(vocab_size=len(words), max_position_embeddings=24, num_labels=1, **sizes)
    scorer = RewardScorer(install_fp32_score(hf.BertForSequenceClassification(config)).eval(), tokenizer)
    limit = learned_positions(scorer.model)
    made = [
        {"prompt": "sunny " * (2 + k), "completions": ["happy fox", "lazy"], "pairs": [[0, 1]], "targets": [1.0]}
        for k in range(24)
    ]
    rows = fitting(Dataset.from_list(made), tokenizer, limit)
    assert len(rows) == 18  # 2 + k words, 2 of the answer, [CLS], 2 [SEP]
    with pytest.raises(ValueError, match="the reward model takes 24"):
        check_reward(scorer.raw, rows)
    checked = check_reward(scorer.raw, rows, fits=within(tokenizer, limit))
    assert checked.left_out["filler"] == 18 and "filler" not in checked.probes  # 51 words more
    assert checked.left_out["prompt copied"] == 9 and "prompt copied" in checked.probes
    assert "empty" not in checked.left_out
    short = [row for row in rows if len(row["prompt"].split()) <= 10]
    alone = check_reward(scorer.raw, short, fits=within(tokenizer, limit))
    assert alone.probes["prompt copied"] == checked.probes["prompt copied"]  # the share among those that fit


def test_a_gain_that_may_be_chance_and_one_that_is_only_brevity_do_not_pass():
    data = rows(300)
    lengths = [[len(plain_text(c).split()) for c in row["completions"]] for row in data]
    for row, (first, second) in zip(data, lengths, strict=True):  # the shorter one wins in four of five pairs
        row["targets"] = [float((first < second) == (random.Random(str(row)).random() < 0.8))]
    brief = check_reward(lambda p, c: [-float(len(plain_text(text).split())) for text in c], data, probes=False)
    assert brief.metrics["gain_low"] > 0.2  # compared to "longer wins", it looks good
    assert brief.metrics["length_baseline"] == 1 - brief.metrics["longer_wins_baseline"] > 0.6
    assert any("it may score length" in problem for problem in brief.problems)

    def unsure(prompts, completions):
        noise = [random.Random("0" + plain_text(completion)).gauss(0, 6) for completion in completions]
        return [score + error for score, error in zip(honest(prompts, completions), noise, strict=True)]

    few = check_reward(unsure, rows(60), probes=False)
    assert few.metrics["gain"] > 0 >= few.metrics["length_gain_low"]
    assert any("it may score length" in problem for problem in few.problems)
