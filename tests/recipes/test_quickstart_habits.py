import pytest

from hf_rlhf_ext.recipes.quickstart_parts.habits import habits_of


def test_habits_worked_by_hand():
    prompts = ["Where do owls live?", "Describe a kettle.", "What is a ladder good for?", "Hi."]
    completions = [
        "Owls live in woods. What a pleasure!",
        "What a pleasure!",
        "A ladder has steps, what a pleasure.",  # within another sentence: not counted
        "what a  pleasure",
    ]
    found = habits_of(prompts, completions)
    assert found["most_frequent_sentence"] == "what a pleasure"
    assert found["most_frequent_share"] == found["stock_share"] == 3 / 4
    # 10 bigrams differ: "owls live", "live in", "in woods", "woods .", ". what", "what a", "a pleasure", "pleasure !",
    # then "a ladder", "ladder has", "has steps", "steps ,", ", what", "pleasure ."; words and marks: 9 + 4 + 9 + 3.
    assert found["distinct_2"] == pytest.approx(14 / 25)
    assert found["repetition_4"] == 0
    # Words but stop words. "owls live" in "owls live woods pleasure": 2 / sqrt(2 * 4). "ladder good" in "ladder steps
    # pleasure": 1 / sqrt(2 * 3). The other two share none.
    assert found["prompt_similarity"] == pytest.approx((2 / 8**0.5 + 1 / 6**0.5) / 4)


def test_a_sentence_said_twice_in_one_answer_is_no_stock_phrase():
    found = habits_of(["a kettle", "a ladder"], ["Steps. Steps. Steps.", "Wood."])
    assert found["stock_share"] == 0 and found["most_frequent_share"] == 1 / 2
    assert found["most_frequent_sentence"] == "steps"  # of equally frequent ones the first in the alphabet


def test_answers_without_words_have_no_habits():
    found = habits_of(["a kettle", "a ladder"], ["", "…"])
    assert found["most_frequent_sentence"] == "" and found["stock_share"] == found["most_frequent_share"] == 0
    assert found["prompt_similarity"] == 0
