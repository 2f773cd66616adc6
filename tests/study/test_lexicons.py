"""Which words of a function are seen, and when two lists of words are related."""

import functools
import re

import pytest

from hf_rlhf_ext.collect.gold import CheckedGold
from hf_rlhf_ext.collect.simulated import GoldReward
from hf_rlhf_ext.study.lexicons import find_lexicons, is_same_callable, shared_words, words_of, words_of_pattern

NICE = {"sunny", "garden"}
WEIGHTS = {"merry": 1.0, "gloomy": -1.0}
PATTERN = re.compile(r"(?i)\b(?:lovely|charming)\b")
CHAT = {"role": "user", "content": "x"}


def helper(text):
    return sum(word in NICE for word in text.split())


def by_global(completions, **columns):
    return [sum(WEIGHTS.get(word, 0) for word in text.split()) for text in completions]


def by_helper(completions, **columns):
    return [helper(text) for text in completions]


def by_pattern(completions, **columns):
    return [len(PATTERN.findall(text)) for text in completions]


def by_default(completions, words=("calm", "quiet"), **columns):
    return [sum(word in words for word in text.split()) for text in completions]


def by_code(completions, **columns):
    return [text.count("brave") + ("bold" in text) + len(re.findall(r"\bproud\b", text)) for text in completions]


def by_list_in_code(completions, **columns):
    return [sum(word in ["gentle", "tender", "soft"] for word in text.split()) for text in completions]


def by_dict_in_code(completions, **columns):
    weights = {"grand": 1.0, "petty": 2.0}
    return [sum(weights.get(word, 0) for word in text.split()) for text in completions]


def without_words(completions, **columns):
    from os.path import basename, dirname  # noqa: F401

    rows = sorted(completions, key=len, reverse=True)
    record = {"name": rows, "length": len(rows), **CHAT}
    print(record, end="", sep=" ")
    return [float(len(text)) for text in completions]


class Judge:
    def __init__(self, words):
        self.words = words

    def __call__(self, completions, **columns):
        return [float(self.count(text)) for text in completions]

    def count(self, text):
        return sum(word in self.words for word in text.split())


def make(words):
    def judge(completions, **columns):
        return [float(sum(word in words for word in text.split())) for text in completions]

    return judge


def with_attribute(completions, **columns):
    return [0.0 for _ in completions]


with_attribute.lexicon = ["fancy"]


def seen(function):
    return set().union(*(lexicon.words for lexicon in find_lexicons(function).lexicons))


@pytest.mark.parametrize(
    "function, words",
    [
        (by_global, {"merry", "gloomy"}),
        (by_helper, {"sunny", "garden"}),
        (by_pattern, {"lovely", "charming"}),
        (by_default, {"calm", "quiet"}),
        (by_code, {"brave", "bold", "proud"}),
        (by_list_in_code, {"gentle", "tender", "soft"}),
        (by_dict_in_code, {"grand", "petty"}),
        (Judge({"keen"}), {"keen"}),
        (Judge({"keen"}).count, {"keen"}),
        (make(["dark", "light"]), {"dark", "light"}),
        (with_attribute, {"fancy"}),
        (functools.partial(by_default, words=["loud"]), {"calm", "quiet", "loud"}),
        (functools.lru_cache(by_helper), {"sunny", "garden"}),
        (CheckedGold(by_global, "gold", needs_all=False), {"merry", "gloomy"}),
        (lambda completions: [helper(text) for text in completions], {"sunny", "garden"}),
        (without_words, set()),
    ],
)
def test_the_words_that_a_function_looks_for_are_found(function, words):
    assert seen(function) == words


def test_the_lexicon_of_vader_is_found_in_its_analyzer():
    lexicons = {lexicon.place: lexicon.words for lexicon in find_lexicons(GoldReward()).lexicons}
    assert len(lexicons["gold._analyzer.lexicon"]) > 7000 and "happy" in lexicons["gold._analyzer.lexicon"]


def test_words_are_told_from_other_entries():
    assert words_of(["Good", "very good", "role", 3, ":-)"]) == {"good", "very good"}
    assert words_of(["x", "http://a.b", "good"]) == set()  # most are no words
    assert words_of_pattern(r"\b(?:good|Great)[a-z]+\s(?i)nice\b") == {"good", "great", "nice"}


def test_one_word_relates_short_lists_and_a_hundredth_relates_long_ones():
    first, second = (frozenset(f"{letter}{number}" for number in range(7000)) for letter in "ab")
    assert shared_words(frozenset({"good", "fine"}), frozenset({"good"})) == {"good"}
    assert not shared_words(first | {"good"}, second | {"good"})
    more = {f"c{number}" for number in range(70)}
    assert not shared_words(first | set(list(more)[:69]), second | set(list(more)[:69]))
    assert shared_words(first, second | set(list(first)[:71]))
    assert shared_words(first, frozenset({"a1", "z"})) == {"a1"}  # the smaller one counts


def test_the_same_function_is_recognized_behind_other_objects():
    judge = Judge({"keen"})
    assert is_same_callable(by_code, functools.partial(by_code, extra=1))
    assert is_same_callable(judge.count, judge.count) and not is_same_callable(judge.count, Judge({"keen"}).count)
    assert not is_same_callable(by_code, by_helper) and not is_same_callable(judge, by_code)
    assert is_same_callable(make(["a"]), make(["a"])) and not is_same_callable(make(["a"]), make(["b"]))
