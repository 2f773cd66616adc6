"""Formats, exact answers, choices and numbers, against tables by hand and independent implementations."""

import math
import pickle
import random
import re
import string
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from trl.rewards import think_format_reward

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.reward_functions import (
    exact_match,
    multiple_choice,
    number,
    regex,
    repetition_penalty,
    think_format,
    verifiable,
)
from hf_rlhf_ext.reward_functions.verifiable import last_number


def score(function, text, **columns):
    """Score of one completion, which must be the same as text and as messages."""
    columns = {name: [value] for name, value in columns.items()}
    (of_text,) = function(prompts=["?"], completions=[text], completion_ids=[[1]], **columns)
    messages = [{"role": "assistant", "content": text}]
    assert function(prompts=[[{"role": "user", "content": "?"}]], completions=[messages], **columns) == [of_text]
    return of_text


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, options, text, expected",
    [
        (r"^Answer: \d+$", {}, "I think so.\nAnswer: 7\nBye.", 1),
        (r"^Answer: \d+$", {}, "Answer: seven", 0),
        (r"answer", {}, "Answer", 0),
        (r"answer", {"ignore_case": True}, "Answer", 1),
        (r"\d+", {"whole": True}, "  12\n", 1),
        (r"\d+", {"whole": True}, "12 apples", 0),
        (r"<a>.*</a>", {}, "<a>\n</a>", 1),
        (r"^Answer: \d+$", {}, "Answer: 7\r\nBye", 1),
    ],
)
def test_a_pattern_is_found_or_not(pattern, options, text, expected):
    assert score(regex(pattern, **options), text) == expected


def test_a_pattern_that_never_ends_scores_0_and_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(verifiable, "REGEX_SECONDS", 0.2)
    function = regex("(.*)x(.*)y(.*)[bz]")
    start = time.process_time()
    assert function(completions=["xy" * 2000, "xyb", "xy" * 2000]) == [0.0, 1.0, 0.0]
    # The limit is of CPU time: by the clock it is longer on a busy machine. Some 10**10 steps without it.
    assert 0.4 <= time.process_time() - start < 2
    assert len(caplog.records) == 1 and "0.2 CPU seconds" in caplog.text and "simplify the pattern" in caplog.text


@pytest.mark.parametrize("text", ["<think>a</think>b", "<think>a", "a", "b<think>a</think>", "<think>\na\n</think>\nb"])
def test_the_format_of_thoughts_is_that_of_trl(text):
    expected = think_format_reward([[{"role": "assistant", "content": text}]])
    assert [score(think_format(), text)] == expected


def test_the_repetition_penalty_is_that_of_trl():
    # Four of five 1-grams are the first again: 1 - 1/5, and a penalty of -2.
    assert repetition_penalty(1, -2.0)(completion_ids=[[5, 5, 5, 5, 5], [1, 2]]) == [pytest.approx(-1.6), 0.0]


# --- exact answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, text, answer, expected",
    [
        ({}, "  Paris \n", "Paris", 1),
        ({}, "paris", "Paris", 0),
        ({"ignore_case": True}, "paris", "Paris", 1),
        ({"ignore_case": True}, "STRASSE", "straße", 1),
        ({}, "Paris.", "Paris", 0),
        ({"ignore_punctuation": True}, "Paris.", "Paris", 1),
        ({"ignore_articles": True}, "The Eiffel Tower", "Eiffel Tower", 1),
        ({"ignore_articles": True}, "Theater", "ater", 0),
        ({}, "a  b\nc", "a b c", 1),
        ({}, "Lyon", ["Paris", "Lyon"], 1),
        ({}, "7", 7, 1),
        ({}, "caf\u0065\u0301", "caf\u00e9", 1),
        ({"after": "</think>"}, "Lyon? </think> Paris", "Paris", 1),
        ({"after": "</think>"}, "Paris", "Paris", 0),
        ({}, "Paris", None, None),
        ({}, "72", 72.0, 1),  # a column of integers with missing values is one of floats
        ({}, "0.0000001", 1e-7, 1),
        ({}, "72", float("nan"), None),
        ({}, "", [], None),
        ({}, "", [None], None),
        ({}, "Lyon", np.array(["Paris", "Lyon"]), 1),
        ({}, "0.1", np.float32(0.1), 1),
        ({}, "7", torch.tensor(7), 1),
    ],
)
def test_exact_matches(options, text, answer, expected):
    assert score(exact_match("answer", **options), text, answer=answer) == expected


def squad(text):
    """The normalization of SQuAD's own script, written anew."""
    text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(word for word in re.split(r"\s+", text) if word and word not in ("a", "an", "the"))


def test_all_three_options_are_the_normalization_of_squad():
    function = exact_match(ignore_case=True, ignore_punctuation=True, ignore_articles=True)
    words = ["The", "a", "An", "cat", "CAT", "theory", "-", "!", "sat", " ", "\n", "cat."]
    source = random.Random(0)
    results = set()
    for _ in range(300):
        left, right = (" ".join(source.choices(words, k=source.randint(0, 4))) for _ in range(2))
        expected = float(squad(left) == squad(right))
        assert score(function, left, answer=right) == expected, (left, right)
        results.add(expected)
    assert results == {0.0, 1.0}


# --- choices ---------------------------------------------------------------------------------------------------------

CHOICES = [
    ("B", "B"),
    ("(b)", "B"),
    ("B.", "B"),
    ("B) Paris", "B"),
    ("**B**", "B"),
    ("The answer is (C), not (B).", "C"),
    ("Answer: **D**", "D"),
    ("answer is A, no, the answer is B", "B"),
    ("Answer: A. So \\boxed{C}", "C"),
    ("\\boxed{\\text{c}}", "C"),
    ("A cat sat there.", None),
    ("The answer is a cat.", None),
    ("I think B", None),
    ("E", None),
    ("", None),
    ("**Answer:** B", "B"),
    ("The correct option is C.", "C"),
    ("The answer is option D", "D"),
    ('The answer is "B".', "B"),
    ("The answer is $B$", "B"),
    ("**Answer: `C`**", "C"),
    ("\\boxed{\\mathbf{D}}", "D"),
    ("<answer>B</answer>", "B"),
    ("B\r\n\r\nThe others are wrong.", "B"),
    ("The correct choice would be (a)", "A"),
    ("The answer is B-complex", None),
    ("The answer is a", None),
    ("Because", None),
]


@pytest.mark.parametrize("text, chosen", CHOICES)
def test_a_choice_is_read(text, chosen):
    for letter in "ABCD":
        assert score(multiple_choice(), text, answer=letter) == float(letter == chosen)


def test_answers_may_be_letters_or_indices():
    function = multiple_choice("label", choices="ABCDE")
    assert [score(function, "E", label=value) for value in ("E", "(e)", 4, "A", 0, None)] == [1, 1, 1, 0, 0, None]
    assert [score(function, "B", label=value) for value in (1.0, np.int64(1), float("nan"))] == [1, 1, None]
    # A value that is a choice is no index.
    assert [score(multiple_choice(choices="1234"), "1", answer=value) for value in (1, "1", 2, 1.0)] == [1, 1, 0, 1]
    with pytest.raises(UserError, match="multiple_choice: column 'label' has 'Paris'.*choices"):
        score(function, "A", label="Paris")
    with pytest.raises(UserError, match="choices='A'"):
        multiple_choice(choices="A")


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1,234.5", "1234.5"),
        ("12,345,678", "12345678"),
        ("5-3", "3"),
        ("5 - 3 = 2.", "2"),
        ("x=-3", "-3"),
        ("\N{MINUS SIGN}4", "-4"),
        ("+.5", "0.5"),
        ("2e3", "2000"),
        ("$72.", "72"),
        ("one #### 72", "72"),
        ("1, 2", "2"),
        ("none", None),
        ("", None),
        (r"\boxed{1{,}234}", "1234"),
        (r"12\,345\,678", "12345678"),
        ("1\u202f234,", "1234"),
        ("3\u00a0apples", "3"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("$3-$5", "5"),
    ],
)
def test_the_last_number_of_a_text(text, expected):
    found = last_number(text)
    assert (None if found is None else Fraction(found)) == (None if expected is None else Fraction(expected))


def test_written_numbers_are_read_back():
    source = random.Random(0)
    for _ in range(300):
        value = source.choice([source.randint(-(10**7), 10**7), round(source.uniform(-1e5, 1e5), 3)])
        for written in (f"{value}", f"{value:,}", f"it is {value:,}."):
            assert Fraction(last_number(written)) == Fraction(str(value)), written


@pytest.mark.parametrize(
    "options, text, answer, expected",
    [
        ({}, "It is 72.", "6 * 12 = 72 #### 72", 1),
        ({}, "0.1", 0.1, 1),
        ({}, "0.3", "0.30", 1),
        ({}, "71", 72, 0),
        ({"tolerance": 1}, "71", 72, 1),
        ({"tolerance": 0.5}, "71", 72, 0),
        ({"tolerance": 0.02, "relative": True}, "71", 72, 1),
        ({"tolerance": 0.01, "relative": True}, "71", 72, 0),
        ({}, "no number", 72, 0),
        ({}, "72", "no number", None),
        ({}, "72", None, None),
        ({"after": "####"}, "73 #### 72", 72, 1),
        ({}, "1e999999999999", 1, 0),
        ({}, "2", [1, 2], 1),
        ({}, "1", [1, 2], 1),
        ({}, "3", [1, 2], 0),
        ({}, "72", 72.0, 1),
        ({}, "72", float("nan"), None),
        ({}, "72", [], None),
        ({}, "10000000000000000000000", 1e22, 1),
    ],
)
def test_numbers(options, text, answer, expected):
    assert score(number(**options), text, answer=answer) == expected


def test_a_bound_is_part_of_a_tolerance_without_rounding():
    assert score(number(tolerance=0.1), "0.4", answer="0.3") == 1.0  # as floats, 0.4 - 0.3 > 0.1
    assert math.isclose(0.4 - 0.3, 0.1) and 0.4 - 0.3 > 0.1


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function", [regex("a"), exact_match(), multiple_choice(), number(), think_format()], ids=lambda one: one.__name__
)
def test_functions_can_be_pickled(function):
    """TRL's asynchronous trainer sends them to another process."""
    again = pickle.loads(pickle.dumps(function))
    assert again(completions=["a", "B", "7"], answer=["B", "B", "B"]) == function(
        completions=["a", "B", "7"], answer=["B", "B", "B"]
    )


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: regex("("), "regex: pattern"),
        (lambda: number(tolerance=-1), "tolerance=-1"),
        (lambda: exact_match("prompt"), "exact_match: a column 'prompt' .* rename"),
        (lambda: exact_match()(completions=["a"]), "needs the column 'answer'"),
        (lambda: exact_match()(completions=["a", "b"], answer="ab"), "column 'answer' is no list of 2 values"),
        (lambda: exact_match()(completions=["a", "b"], answer=["a"]), "column 'answer' is no list of 2 values"),
        (lambda: exact_match()(completions=["a"], answer=[{"text": ["a"]}]), "column 'answer' has {'text'.*a number"),
        (lambda: number()(completions=["a"], answer=[{"value": 1}]), "column 'answer' has {'value': 1}"),
        (lambda: exact_match(None), "column=None"),
        (lambda: exact_match("environments"), "'environments' .* rename"),
        (lambda: exact_match(after=""), "after is empty"),
        (lambda: regex(""), "pattern=''"),
        (lambda: regex(b"a"), "pattern=b'a'"),
        (lambda: multiple_choice(choices=["A", "B"]), "as one text"),
        (lambda: repetition_penalty(0), "ngram_size=0"),
        (lambda: repetition_penalty(2, 1.0), "max_penalty=1"),
    ],
)
def test_mistakes_are_one_line(make, words):
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
