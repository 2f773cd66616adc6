"""These functions as rewards and as judges of one study: what counts as the same, and as the same words."""

import pytest

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.reward_functions import exact_match, judge, number, regex
from hf_rlhf_ext.study.independence import TrainingReward, check_independence
from hf_rlhf_ext.study.judges import ScoreJudge
from hf_rlhf_ext.study.lexicons import find_lexicons, is_same_callable

URL = "http://127.0.0.1:9/v1"


def check(function, reward):
    return check_independence([ScoreJudge(function)], TrainingReward(functions=[reward]))


def test_two_functions_of_one_column_share_no_words():
    """The name of a column and the options of a request are settings, and no words of a text."""
    assert {statement.status for statement in check(exact_match("answer"), number("answer"))} <= {
        "independent",
        "unknown",
    }
    assert find_lexicons(exact_match("answer")).lexicons == []
    assert find_lexicons(judge("m", URL)).lexicons == []


def test_patterns_are_words():
    with pytest.raises(UserError, match="shares 1 of 2 words .thank"):
        check(regex("thank|please"), regex("thank you", ignore_case=True))
    assert check(regex("thank"), regex("please"))


@pytest.mark.parametrize(
    "first, second, is_same",
    [
        (exact_match("answer"), exact_match("answer"), True),
        (exact_match("answer"), exact_match("answer", ignore_case=True), False),
        (exact_match("answer"), number("answer"), False),
        (regex("a"), regex("a"), True),
        (regex("a"), regex("b"), False),
        (judge("m", URL), judge("m", URL, parallel=2), True),
        (judge("m", URL), judge("n", URL), False),
        (judge("m", URL), judge("m", URL, rubric="Short."), False),
    ],
)
def test_functions_with_equal_arguments_are_one(first, second, is_same):
    assert is_same_callable(first, second) == is_same


def test_a_function_of_training_is_no_judge():
    with pytest.raises(UserError, match="is a function of training reward, exact_match"):
        check(exact_match("answer"), exact_match("answer"))
