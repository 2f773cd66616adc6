"""Verdicts: what the values of a column say about which answer is better."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.data.schema import PreferenceDataError, Unusable
from hf_rlhf_ext.readers.verdicts import BELOW_ZERO, decoder, guess_meaning, is_tie


def target(meaning, value):
    return decoder(meaning)(value, "label").target


@pytest.mark.parametrize(
    "meaning, first, second",
    [
        ("0 or 1", 0, 1),
        ("0 or 1", "0", "1.0"),
        ("0 or 1", False, True),
        ("1 or 0", 1, 0.0),
        ("1 or 0", "true", "False"),
        ("1 or 2", 1, 2),
        ("A or B", "A", "b"),
        ("A or B", "model_a", "model_b"),
        ("A or B", "[[A]]", "[[B]]"),
        ("A or B", "A>B", "B > A"),
        ("A or B", "A>>B", "A<<B"),
        ("A or B", "Response A is better", "Answer B wins"),
        ("A or B", "modelA", "assistant_b"),
        ("1 or 2", "response_1", "Output 2"),
        ("left or right", "Left", "right"),
        ("first or second", "the first answer", "second"),
        ("between 1 and 0", 0.9, 0.1),
        ("between 1 and 2", 1, 1.75),
        (BELOW_ZERO, -2, 3),
        ("above zero for the first", 1, "-1"),
        ({"x": "first", "y": "second"}, "x", "y"),
    ],
)
def test_both_directions_of_a_meaning(meaning, first, second):
    assert target(meaning, first) > 0.5 > target(meaning, second)


@pytest.mark.parametrize(
    "value",
    [
        "tie",
        "Tie",
        "TIE",
        "tie (bothbad)",
        "tie (inconsistent)",
        "both_bad",
        "Both good",
        "draw",
        "equal",
        "A=B",
        "A~B",
        "neither",
        "equally bad",
        "No difference",
    ],
)
def test_ties_of_all_spellings(value):
    judgment = decoder("A or B")(value, "winner")
    assert (judgment.best, judgment.target) == (None, 0.5)
    assert judgment.flags == (("both_bad",) if "bad" in value else ())


def test_a_tie_of_its_own_value():
    assert target("1 or 2, 0 is a tie", 0) == 0.5
    assert target("A or B, C is a tie", "C") == 0.5
    assert target("between 1 and 2, 0 is a tie", 0) == 0.5
    assert target({"x": "first", "y": "second", "z": "tie"}, "z") == 0.5


def test_a_strength_is_kept_with_its_sign():
    assert decoder(BELOW_ZERO)(-3, "label").strength == 3.0
    assert decoder(BELOW_ZERO)(2, "label").strength == -2.0
    assert decoder("above zero for the first")(2, "label").strength == 2.0


def test_an_index_among_several_answers():
    assert decoder("0 to 3")(2, "best").best == 2
    assert decoder("1 to 32")("32", "best").best == 31
    assert decoder("A or B or C")("C", "best").best == 2


@pytest.mark.parametrize(
    "meaning, value",
    [("0 or 1", 2), ("0 or 1", None), ("1 or 2", 0), ("A or B", "gpt-4"), ("between 1 and 0", 1.5), (BELOW_ZERO, "x")],
)
def test_any_other_value_costs_its_row_and_is_named(meaning, value):
    with pytest.raises(Unusable, match="label is"):
        decoder(meaning)(value, "label")


@pytest.mark.parametrize("meaning", ["", "0", "0 or 0", "better", "1 or 2, 0", {"a": "better"}, "between 1 and 1"])
def test_a_meaning_that_is_none_is_one_line(meaning):
    with pytest.raises(PreferenceDataError, match="verdict_is: .*write") as caught:
        decoder(meaning)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, values, suffixes, meaning",
    [
        ("winner", ["a", "b", "tie"], ["a", "b"], "A or B"),
        ("winner", ["model_a"], ["1", "2"], "A or B"),
        ("winner", ["model_1"], ["1", "2"], "1 or 2"),
        ("label", ["B>A", "A=B"], ["a", "b"], "A or B"),
        ("label", [1, 2], ["a", "b"], "1 or 2"),
        ("label", [1, 2, 0], ["1", "2"], "1 or 2, 0 is a tie"),
        ("label", [0, 1], ["0", "1"], "0 or 1"),
        ("better", ["first"], ["first", "second"], "first or second"),
        ("preference_strength", [-3, 1], ["1", "2"], BELOW_ZERO),
        ("signed_preference", [2, 0, -1], ["a", "b"], BELOW_ZERO),
        ("is_abetter", [True], ["a", "b"], "1 or 0"),
        # A word that names no answer costs its row, not the file.
        ("winner", ["A", "B", "skip"], ["a", "b"], "A or B"),
        ("winner", ["Response 1 is better", "can't say"], ["1", "2"], "1 or 2"),
        ("prob_a", [0.3], ["a", "b"], "between 1 and 0"),
        ("prob_b", [0.3], ["a", "b"], "between 0 and 1"),
        ("a_is_better", [True], ["a", "b"], "1 or 0"),
        ("winner_model_b", [1], ["a", "b"], "0 or 1"),
        # What stays unclear is not guessed.
        # A scale from 1 to 5 or from 0 to 6 has its middle elsewhere.
        ("preference_strength", [3, 1], ["1", "2"], None),
        ("overall_preference", [1, 2, 3, 4, 5], ["a", "b"], None),
        ("overall_preference", [0, 6, 3], ["a", "b"], None),
        ("label", [0, 1], ["a", "b"], None),
        ("label", [0, 1], ["1", "2"], None),
        ("label", [1, 2], ["0", "1"], None),
        ("label", [1], ["a", "b"], None),
        ("label", [True, False], ["a", "b"], None),
        ("label", [-1, 1], ["a", "b"], None),
        ("winner", ["gpt-4", "claude"], ["a", "b"], None),
        ("label", [None, "tie"], ["a", "b"], None),
    ],
)
def test_the_meaning_is_found_or_left_open(name, values, suffixes, meaning):
    assert guess_meaning(name, values, suffixes, 2) == meaning


def test_the_index_in_a_list_of_answers():
    assert guess_meaning("label", [0, 2], [], 3) == "0 or 1 or 2"
    assert guess_meaning("label", [1, 3], [], 3) == "1 or 2 or 3"
    assert guess_meaning("label", [1, 2], [], 3) is None


TOKENS = st.text("abcdefgh", min_size=1, max_size=4) | st.integers(0, 99).map(str)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(TOKENS, min_size=2, max_size=2, unique=True), prefix=st.sampled_from(["", "model_", "Response "]))
def test_any_two_names_are_told_apart(names, prefix):
    """Whatever two values mean first and second, reading one of them never gives the other."""
    meaning = {names[0]: "first", names[1]: "second"}
    if any(map(is_tie, names)):
        return
    try:
        read = decoder(f"{names[0]} or {names[1]}")
    except PreferenceDataError:  # two spellings of one number
        return
    assert [read(prefix + name, "label").target for name in names] == [1.0, 0.0]
    assert [decoder(meaning)(name, "label").target for name in names] == [1.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=6), kind=st.sampled_from(["ab", "12", "01"]))
def test_a_guess_reads_all_values_that_it_was_made_from(values, kind):
    meaning = guess_meaning("label", values, list(kind), 2)
    if meaning is not None:
        assert all(0 <= decoder(meaning)(value, "label").target <= 1 for value in values)
