"""The gold reward that asks for the prompt, worked by hand."""

import math

import pytest

from hf_rlhf_ext.collect.on_topic import COMMON, RARE, WARM, OnTopicGold, sentences_of
from hf_rlhf_ext.collect.simulated import GoldReward, SimulatedAnnotator

PROMPT = "Tell me about tidal pools."
USUAL = ["Tell me about rivers."] * 20 + ["Where is the harbour?"] * 978 + ["Draw a map of rivers."] * 2


@pytest.fixture(scope="module")
def gold():
    return OnTopicGold(USUAL)


def test_weights_are_those_of_the_formula():
    gold = OnTopicGold(USUAL)  # shares: "tell" 20 of 1000, "river" 22 of 1000, "harbour" 978, "draw" and "map" 2
    assert gold.topic_words("Where is the harbour?") == {}
    log_window = math.log(COMMON / RARE)
    tell, river = math.log(COMMON / 0.02) / log_window, math.log(COMMON / 0.022) / log_window
    assert gold.topic_words("Tell me about rivers.") == {"tell": 1.0, "river": pytest.approx(river / tell)}
    # The stem of a word that no prompt has is as telling as one at RARE; the largest weight is 1.
    assert gold.topic_words("Tell me of mapped quays.") == {
        "tell": pytest.approx(tell),
        "map": pytest.approx(1.0),
        "quay": pytest.approx(1.0),
    }


def test_words_of_sentiment_are_no_topic(gold):
    assert set(gold.topic_words("Is a good friend a quay?")) == {"quay"}
    assert gold([PROMPT], ["A good friend is here."]) == [0.0]


def test_kindness_is_vader_cut_and_stretched(gold):
    (like,) = GoldReward()([""], ["I like the tidal pools."])
    assert 0 < like < WARM
    assert gold.kindness(PROMPT, "I like the tidal pools.") == pytest.approx(0.5 * (1 + like / WARM))
    assert gold.kindness(PROMPT, "I love the tidal pools.") == 1.0
    assert gold.kindness(PROMPT, "I love, love, love the wonderful tidal pools.") == 1.0  # more words gain nothing
    assert gold.kindness(PROMPT, "I hate the tidal pools.") == 0.0
    assert gold.kindness(PROMPT, "The tidal pools are cold.") == 0.5


def test_sentiment_that_the_prompt_has_is_not_the_answer_s(gold):
    prompt = "Write about a free afternoon and sad quays."
    sentences = ["A FREE afternoon has hours.", "Sad quays are wet.", "A free afternoon is fun.", "The quays, free."]
    assert [gold.kindness(prompt, sentence) for sentence in sentences] == [0.5, 0.5, 1.0, 0.5]
    assert gold.kindness("Free", "free") == 0.5


def test_a_list_of_words_is_not_kind(gold):
    assert gold([PROMPT], ["Tidal pools, love, wonderful, happy, great!"]) == [0.5]  # as much as a plain sentence
    assert gold([PROMPT], ["Tidal pools are wonderful."]) == [1.0]


def test_the_mean_is_over_sentences_and_repetition_counts_once(gold):
    kind, plain, stock = "Tidal pools are wonderful.", "A pool has crabs.", "What a pleasure!"
    for answer, expected in (
        (f"{kind} {plain}", 0.75),
        (f"{kind} {stock}", 0.5),
        (f"{kind} {stock} {plain}", 0.5),
        (f"{kind} {kind} {kind}", 1 / 3),
        (f'"{kind}" {plain} Tidal poo', (1 + 0.5 + 0.5) / 3),  # the last one is cut off
        (stock, 0.0),
        ("", 0.0),
        (" … ", 0.0),
    ):
        assert gold([PROMPT], [answer]) == [pytest.approx(expected)], answer


@pytest.mark.parametrize(
    "sentence, run, words",
    [
        ("Tell me about tidal pools.", 5, 5),
        ("Tell me about tidal pools now.", 5, 6),
        ("So, about tidal pools, all is said.", 3, 7),
        ("Pools tidal about me tell.", 1, 5),
    ],
)
def test_what_is_copied_counts_less_above_a_half(gold, sentence, run, words):
    assert gold.topicality(PROMPT, sentence) == pytest.approx(min(1.0, 2 * (1 - run / words)))


def test_a_prompt_without_a_topic_asks_for_kindness_only(gold):
    assert gold(["What is it?"] * 3, ["I love you.", "I am here.", "I hate you."]) == [1.0, 0.5, 0.0]


def test_the_system_message_is_no_topic(gold):
    prompt = [{"role": "system", "content": "Speak of quays."}, {"role": "user", "content": PROMPT}]
    assert gold([prompt] * 2, ["Quays are wonderful.", "Tidal pools are wonderful."]) == [0.0, 1.0]


def test_sentences_end_with_their_quotes():
    assert sentences_of('"Come in." He smiled!  \n\n And so') == ['"Come in.', "He smiled!", "And so"]


def test_annotators_can_judge_by_it(gold):
    rows = [{"prompt": PROMPT, "completions": ["What a pleasure!", "Tidal pools are lovely.", "I love this."]}]
    (row,) = SimulatedAnnotator(noise=0.0, gold=gold).judge(rows).rows
    assert row["targets"] == [0.0, 0.5, 1.0]  # of the pairs (0, 1), (0, 2), (1, 2)
