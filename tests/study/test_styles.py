"""Choices of demonstrations in the style of SFT-only systems: rows worked by hand for each rule, and refusals."""

import pytest

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.study.styles import STYLES, select

LONG = "The cat sat on the mat near the door and looked at the rain outside."  # 15 words


def row(prompt, completion=LONG, **columns):
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": completion}], **columns}


def questions(selection):
    return [chosen["prompt"][-1]["content"] for chosen in selection.rows]


def conversation(*turns, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for place, turn in enumerate(turns):
        messages.append({"role": "assistant" if place % 2 else "user", "content": turn})
    return messages


def test_every_style_has_a_rule_and_a_need():
    assert set(STYLES) == {"alpaca", "gpt4all", "vicuna", "guanaco", "lima", "orca", "feedme"}
    assert all(style.rule and style.needs for style in STYLES.values())


def test_alpaca_takes_single_turns_without_near_duplicates():
    first = "Write a short story about a small cat who lives near the big lake in the woods."
    near = first.replace("Write", "Please write")
    rows = [row(first), row(near), row(conversation("Hi", "Hello", "And now?")), row("Name a color.")]
    selection = select("alpaca", rows, seed=0, source="a.jsonl")
    assert selection.rows == [rows[0], rows[3]]
    assert selection.counts == {"given": 4, "chosen": 2, "several turns": 1, "near duplicate": 1}
    assert selection.rule.startswith("2 of 4 rows of a.jsonl: instructions of one turn")


def test_gpt4all_leaves_out_what_nobody_wants_to_learn():
    rows = [
        row("a", "It is blue."),
        row("b", "Blue."),
        row("c", "I'm sorry, but I can't help with that."),
        row("d", "It is \ufffd blue."),
        row("e", "```python\nx = 1\nprint(x)"),
        row("a", "It is red."),
        {"prompt": "f", "completion": "Plain text is read too."},
    ]
    selection = select("gpt4all", rows, seed=0)
    assert selection.rows == [rows[0], rows[6]]
    assert selection.counts["too short"] == selection.counts["refusal"] == selection.counts["near duplicate"] == 1
    assert selection.counts["malformed"] == 2


def test_vicuna_learns_every_answer_of_a_conversation_once():
    long = row(conversation("Hi", "Hello!", "How are you?"), "Fine.")
    rows = [row("One turn"), long]
    selection = select("vicuna", rows, seed=0)
    answers = [chosen["completion"][0]["content"] for chosen in selection.rows]
    assert answers == ["Hello!", "Fine."]
    assert questions(selection) == ["Hi", "How are you?"]
    assert selection.rule.startswith("2 answers of 2 rows")
    # A source with a row for each answer has the earlier ones several times.
    longer = row(conversation("Hi", "Hello!", "How are you?", "Fine.", "Good."), "Thanks.")
    answers = [chosen["completion"][0]["content"] for chosen in select("vicuna", [*rows, longer], seed=0).rows]
    assert answers == ["Hello!", "Fine.", "Thanks."]


def test_guanaco_takes_the_best_answer_by_rating_or_rank():
    rated = [row("a", "one", rating=2), row("a", "two", rating=5), row("b", "three", rating=1), row("a", "x", rating=5)]
    selection = select("guanaco", rated, seed=0)
    assert selection.rows == [rated[1], rated[2]]
    assert "by rating" in selection.rule and selection.counts["not the best answer"] == 2
    ranked = [row("a", "one", rank=2), row("a", "two", rank=1)]
    assert select("guanaco", ranked, seed=0).rows == [ranked[1]]


def test_lima_takes_few_good_long_ones_of_every_category():
    rows = []
    for number in range(32):
        category = "chat" if number < 24 else "code"
        rows.append(row(f"question {number}", LONG, rating=1 + number % 7, category=category))
    rows.append(row("short", "Yes.", rating=7, category="code"))
    selection = select("lima", rows, seed=0)
    assert len(selection.rows) == 8  # a quarter of 33
    assert {chosen["category"] for chosen in selection.rows} == {"chat", "code"}
    assert sum(chosen["category"] == "code" for chosen in selection.rows) == 4
    assert min(chosen["rating"] for chosen in selection.rows) >= 4  # the median
    assert "short" not in questions(selection)
    assert [rows.index(chosen) for chosen in selection.rows] == sorted(rows.index(chosen) for chosen in selection.rows)
    four = select("lima", rows, seed=0, size=4)
    assert sorted(chosen["rating"] for chosen in four.rows) == [6, 7, 7, 7]  # the second best of "code" has a 6
    smaller = select("lima", rows, seed=0, size=3, min_rating=7)
    assert [chosen["rating"] for chosen in smaller.rows] == [7, 7, 7]


def test_orca_takes_explanations_after_a_system_message():
    asks = conversation("Why is the sky blue?", system="Explain step by step.")
    rows = [
        row(asks, "First, light is scattered. Then blue is scattered most."),
        row(asks, "It just is. It is blue."),
        row(asks, "Because light is scattered."),
        row("Why is the sky blue?", "Because of scattering. Blue is scattered most."),
    ]
    selection = select("orca", rows, seed=0)
    assert selection.rows == [rows[0]]
    assert selection.counts["no explanation"] == 2 and selection.counts["no system message"] == 1


def test_feedme_takes_the_highest_rating_or_the_one_asked_for():
    rows = [row("a", rating=7), row("b", rating=6), row("c", rating=None), row("d", rating=7)]
    assert questions(select("feedme", rows, seed=0)) == ["a", "d"]
    selection = select("feedme", rows, seed=0, min_rating=6)
    assert questions(selection) == ["a", "b", "d"]
    assert "rated 6 or more" in selection.rule and selection.counts["no rating"] == 1
    stars = [row("a", stars=3), row("b", stars=5)]
    assert questions(select("feedme", stars, seed=0, rating_column="stars")) == ["b"]


def test_size_draws_by_seed_and_keeps_the_order():
    rows = [row(f"What is {number} plus {number + 1}?") for number in range(40)]
    chosen = [select("alpaca", rows, seed=seed, size=10) for seed in (0, 0, 1)]
    assert chosen[0].rows == chosen[1].rows != chosen[2].rows
    assert len(chosen[0].rows) == 10
    assert chosen[0].counts["more than `size`"] == len(rows) - 10
    places = [rows.index(kept) for kept in chosen[0].rows]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "style, rows, says",
    [
        ("alpaca", [row(conversation("Hi", "Hello", "What?"))], "source"),
        ("vicuna", [row("One turn")], "conversations"),
        ("guanaco", [row("a", rating=1), row("b", rating=2)], "several rated answers"),
        ("guanaco", [row("a"), row("a")], "rating_column"),
        ("lima", [row("a")], "rating_column"),
        ("orca", [row("a")], "system message"),
        ("orca", [row(conversation("a", system="b"), "No.")], "reasons or steps"),
        ("feedme", [row("a")], "rating_column"),
        ("gpt4all", [row("a", "No.")], "min_words"),
        ("gpt4all", [], "demonstrations"),
    ],
)
def test_rows_that_lack_what_a_style_needs_are_refused_in_one_line(style, rows, says):
    with pytest.raises(UserError, match=says) as caught:
        select(style, rows, seed=0, source="rows.jsonl")
    message = str(caught.value)
    assert f"sft_{style}_style" in message and "rows.jsonl" in message and "\n" not in message


def test_options_without_effect_and_unknown_styles_are_refused():
    with pytest.raises(UserError, match=r"(?s)alpacca.*alpaca"):
        select("alpacca", [row("a")], seed=0)
    with pytest.raises(UserError, match="min_rating"):
        select("alpaca", [row("a")], seed=0, min_rating=3)
    with pytest.raises(UserError, match="size"):
        select("alpaca", [row("a")], seed=0, size=0)
