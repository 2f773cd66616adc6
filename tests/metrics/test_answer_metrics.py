"""Metrics of generated answers: win rate, KL, distinct-n, repetition and refusals, against counts by hand."""

import gzip
import json
import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from hf_rlhf_ext import metrics
from hf_rlhf_ext.metrics.outcomes import count_outcomes, estimate_kl, wilson_interval
from hf_rlhf_ext.metrics.texts import distinct_n, is_refusal, refusal_rate, repetition, words_of


@pytest.mark.parametrize("name", metrics.SYSTEM_NAMES)
def test_each_loads_by_its_path_without_the_hub(name):
    found = evaluate.load(str(Path(metrics.__file__).parent / name))
    assert found.description and "predictions: " in found.inputs_description


def test_outcomes_are_counted_and_ties_count_half():
    outcomes = [1.0, 0.75, 0.5, 0.0, math.nan, 1.0]
    found = metrics.load_metric("win_rate").compute(predictions=outcomes)
    assert {name: found[name] for name in ("wins", "ties", "losses", "failed")} == {
        "wins": 3, "ties": 1, "losses": 1, "failed": 1,
    }  # fmt: skip
    assert found["win_rate"] == pytest.approx((1 + 0.75 + 0.5 + 0 + 1) / 5)
    assert found["win_rate_low"] < found["win_rate"] < found["win_rate_high"]
    # Wilson's interval of 3 of 4, by its formula with z = 1.96: (p + z²/2n ± z √(pq/n + z²/4n²)) / (1 + z²/n).
    assert found["decided_low"] == pytest.approx(0.3006, abs=1e-4)
    assert found["decided_high"] == pytest.approx(0.9544, abs=1e-4)
    assert count_outcomes([None, 1.0])["failed"] == 1
    with pytest.raises(ValueError, match="outcome 1 is 2"):
        count_outcomes([0.0, 2.0])


def test_no_outcomes_have_no_rate():
    found = count_outcomes([None])
    assert found["failed"] == 1 and math.isnan(found["win_rate"]) and math.isnan(found["decided_low"])
    assert wilson_interval(0, 10)[0] == 0.0


def test_kl_of_one_token_is_that_of_the_estimators():
    # One token of p = 0.5 and p_ref = 0.25: k1 = log 2, r = 0.5, k3 = 0.5 - 1 + log 2.
    found = metrics.load_metric("kl_to_reference").compute(
        predictions=[[math.log(0.5)], [math.log(0.5)] * 2], references=[[math.log(0.25)], [math.log(0.5)] * 2]
    )
    assert found["kl"] == pytest.approx(math.log(2) / 2)
    assert found["kl_k3"] == pytest.approx((math.log(2) - 0.5) / 2)
    assert found["kl_per_token"] == pytest.approx(math.log(2) / 3)


def test_both_estimates_of_kl_are_those_of_the_distributions():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 5, dtype=torch.float64).log_softmax(-1)
    tokens = torch.multinomial(policy.exp(), 40_000, replacement=True)
    exact = float((policy.exp() * (policy - reference)).sum())
    found = estimate_kl(policy[tokens].reshape(-1, 10).tolist(), reference[tokens].reshape(-1, 10).tolist())
    assert found["kl"] == pytest.approx(10 * exact, rel=0.03)
    assert found["kl_k3"] == pytest.approx(10 * exact, rel=0.03)


def test_log_probabilities_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match="completion 1 has 2 tokens"):
        estimate_kl([[-1.0], [-1.0, -1.0]], [[-1.0], [-1.0]])
    with pytest.raises(ValueError, match="1 completions"):
        estimate_kl([[-1.0]], [])
    assert math.isnan(estimate_kl([], [])["kl"])


def test_distinct_n_is_scaled_by_the_words_of_all_texts():
    # a b a b | a c: 3 distinct words and the bigrams ab, ba, ac, of 6 words.
    texts = ["A b a b", "a c"]
    assert distinct_n(texts, 1) == pytest.approx(3 / 6) and distinct_n(texts, 2) == pytest.approx(3 / 6)
    assert distinct_n(["a b", "b a"], 2) == pytest.approx(2 / 4)  # no bigram crosses two texts
    assert metrics.load_metric("distinct_n").compute(predictions=texts) == {"distinct_1": 0.5, "distinct_2": 0.5}
    assert metrics.load_metric("distinct_n").compute(predictions=texts, n=3) == {"distinct_3": pytest.approx(2 / 6)}
    assert distinct_n([], 2) == distinct_n(["", " "], 2) == 0.0
    assert words_of("It's 2 o’clock, yes!") == ["it's", "2", "o’clock", ",", "yes", "!"]


def test_repetition_is_the_share_of_repeated_ngrams_of_each_text():
    # "a a a a a": two 4-grams, one of them distinct. "a b c d e": none repeated. "a b": none there.
    texts = ["a a a a a", "a b c d e", "a b"]
    assert repetition(texts) == pytest.approx(0.5 / 3)
    assert repetition(["x y x y x y"], n=2) == pytest.approx(1 - 2 / 5)
    assert metrics.load_metric("repetition").compute(predictions=texts, n=1)["repetition"] == pytest.approx(0.8 / 3)
    assert repetition([]) == 0.0
    for wrong in (0, 2.0, True):
        with pytest.raises(ValueError, match="whole number"):
            repetition(texts, n=wrong)


REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, I’m not able to give out his address.",
    "I cannot provide instructions for that. It is illegal.",
    "As an AI language model, I am unable to do this.",
    "I'm not comfortable answering this question.",
    "Sorry, I won't tell you how to do that.",
    "I must respectfully decline.",
    "I don't want to help you with that.",
    "I'm really not comfortable with this topic.",
    "I can't in good conscience assist you with a burglary.",
    "I apologize, but I cannot continue.",
    "That's against my principles.",
    "It would not be ethical for me to answer.",
    "No. I refuse to say this.",
]
ANSWERS = [
    "I'm sorry to hear that you lost your job. Here is what I would do.",
    "I can't swim, but I like the sea.",
    "You can't help it, everybody makes mistakes.",
    "I’m sorry, I don’t know that word. Can you explain it?",
    "I'm sorry, I don't understand the question.",
    "I can't give you an exact number, but there are about 200.",
    "She said that she can't answer the phone.",
    "As an AI, I like to talk about science.",
    "Here is how. Mix flour and water. If you see lumps, I can't help you any more.",
    "If you refuse to pay, they will sue you.",
    "I wouldn't recommend it, as it is not safe.",
    "Sorry, I can't see the picture. Is it a cat?",
    "",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_recognized(text):
    assert is_refusal(text) and is_refusal(text.upper().replace("’", "'"))


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_no_refusal(text):
    assert not is_refusal(text)


def test_the_refusal_rate_is_their_share():
    found = metrics.load_metric("refusal_rate").compute(predictions=[*REFUSALS, *ANSWERS])
    assert found["refusal_rate"] == pytest.approx(len(REFUSALS) / (len(REFUSALS) + len(ANSWERS)))
    assert refusal_rate([]) == 0.0 and refusal_rate(np.array(["No."])) == 0.0


@pytest.mark.parametrize("texts", ["I can't help.", [[{"role": "assistant", "content": "I can't help."}]]])
@pytest.mark.parametrize("metric", [distinct_n, repetition, refusal_rate])
def test_one_text_and_messages_are_no_list_of_texts(metric, texts):
    with pytest.raises(ValueError, match="give a list of texts"):
        metric(texts)


# Rows of HH's harmless test set, read and labeled by hand: does the chosen answer refuse?
HH_REFUSES = (67, 234, 290, 316, 332, 334, 340, 346, 399, 402, 409, 456, 484, 491, 507)
HH_ANSWERS = (0, 1, 2, 3, 4, 9, 12, 13, 17, 22, 39, 63, 88, 147, 201, 227, 240, 275)


def test_refusals_of_people_who_wrote_to_a_model_are_recognized(shared_data):
    with gzip.open(shared_data / "hh_harmless_test.jsonl.gz", "rt") as lines:
        chosen = [json.loads(line)["chosen"].rpartition("\n\nAssistant:")[2].strip() for line in lines]
    assert [row for row in HH_REFUSES if not is_refusal(chosen[row])] == []
    assert [row for row in HH_ANSWERS if is_refusal(chosen[row])] == []
    with open(shared_data / "hh_helpful_train.jsonl", encoding="utf-8") as lines:
        helpful = [json.loads(line)["chosen"].rpartition("\n\nAssistant:")[2].strip() for line in lines]
    assert refusal_rate(chosen) > 5 * refusal_rate(helpful)
