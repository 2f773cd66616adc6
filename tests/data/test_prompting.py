"""The prompt builder: no part is lost or moved. A prompt that answers repeat is taken off at the border of a word."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.data.prompting import (
    build_prompt,
    common_words,
    is_border,
    system_text,
    take_off_prompt,
    take_off_prompts,
    without_prompt,
)
from hf_rlhf_ext.data.schema import Unusable

FEW = settings(max_examples=60, deadline=None)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


# --- building --------------------------------------------------------------------------------------------------------

WORDS = st.text("abc é\n", min_size=1, max_size=6).filter(str.strip)
HISTORY = st.lists(st.tuples(WORDS, WORDS), max_size=2)


@FEW
@given(
    question=WORDS,
    system_words=st.none() | WORDS,
    history=HISTORY,
    context=st.none() | WORDS,
    as_messages=st.booleans(),
    written_as=st.sampled_from(["text", "messages", "turns", "json"]),
)
def test_every_part_is_in_its_place(question, system_words, history, context, as_messages, written_as):
    forms = {
        "text": question,
        "messages": [user(question)],
        "turns": [{"from": "Human", "value": question}],
        "json": json.dumps([user(question)]),
    }
    pairs = [list(pair) for pair in history]
    prompt = build_prompt(
        forms[written_as], system=system_words, history=pairs, context=context, as_messages=as_messages
    )
    asked = question if context is None else f"{question}\n\n{context}"
    expected = [system(system_words)] if system_words else []
    for earlier_question, earlier_answer in history:
        expected += [user(earlier_question), assistant(earlier_answer)]
    expected.append(user(asked))
    stays_text = written_as == "text" and not (as_messages or system_words or history)
    assert prompt == (asked if stays_text else expected)


@pytest.mark.parametrize(
    "history",
    [
        [["hi", "hello"]],
        [("hi", "hello")],
        [user("hi"), assistant("hello")],
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}],
        [{"human": "hi", "assistant": "hello"}],
        ["hi", "hello"],
        json.dumps([["hi", "hello"]]),
        json.dumps([user("hi"), assistant("hello")]),
    ],
)
def test_earlier_turns_are_read_in_every_form(history):
    expected = [user("hi"), assistant("hello"), user("q")]
    assert build_prompt("q", history=history, as_messages=False) == expected
    assert build_prompt([system("s"), user("q")], history=history, as_messages=True) == [system("s"), *expected]


def test_a_system_message_is_not_repeated_and_not_replaced():
    talk = [system("You are  brief."), user("q")]
    for same in ("You are  brief.", "You are brief.\n"):
        assert len(build_prompt(talk, system=same, as_messages=True)) == 2
    assert build_prompt([system(" "), user("q")], system="s", as_messages=True) == [system("s"), user("q")]
    with pytest.raises(Unusable, match="system differs"):
        build_prompt(talk, system="You are long.", as_messages=True)


@pytest.mark.parametrize("empty", [None, "", float("nan"), " \n"])
def test_empty_parts_change_nothing(empty):
    assert build_prompt("q", system=empty, context=empty, as_messages=False) == "q"


@pytest.mark.parametrize(
    "parts, reason",
    [
        ({"question": None}, "query is missing"),
        ({"question": float("nan")}, "query is missing"),
        ({"question": 5}, "query is not text"),
        ({"question": [user("q")], "history": 5}, "history is not a list"),
        ({"question": "q", "history": "before"}, "history is not a list"),
        ({"question": "q", "history": [["only one"]]}, "history is not a list"),
        ({"question": "q", "system": 5}, "system is not text"),
        ({"question": "q", "context": ["c"]}, "context is not text"),
        ({"question": [user("q"), assistant("a")], "context": "c"}, "context has no question"),
        ({"question": [{"role": "stage", "content": "q"}]}, "query has the unknown speaker 'stage'"),
        ({"question": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "system": "s"}, "system or history"),
    ],
)
def test_a_part_that_cannot_be_read_is_named(parts, reason):
    with pytest.raises(Unusable, match=reason):
        build_prompt(**parts, as_messages=True, column="query")


def test_a_transcript_becomes_messages_where_something_stands_before_it():
    text = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: q\n\nAssistant:"
    assert build_prompt(text, as_messages=False) == text
    turns = [user("hi"), assistant("hello"), user("q")]
    assert build_prompt(text, system="s", as_messages=False) == [system("s"), *turns]


def test_the_system_text_is_found_under_its_names():
    assert system_text({"system": "SYSTEM: s", "system_prompt": "s "}) == "s"
    assert system_text({"system": None}) is None
    with pytest.raises(Unusable, match="system_prompt differs"):
        system_text({"system": "s", "system_prompt": "t"})


# --- a prompt that the answers repeat --------------------------------------------------------------------------------

TURNS = st.lists(WORDS, min_size=1, max_size=3)


@FEW
@given(questions=TURNS, answer=WORDS, system_words=st.none() | WORDS, n_left_out=st.integers(0, 2))
def test_repeated_messages_are_taken_off(questions, answer, system_words, n_left_out):
    prompt = [system(system_words)] if system_words else []
    for question in questions:
        prompt += [user(question), assistant("x")]
    prompt = prompt[:-1]
    # The answer may repeat the conversation without its first messages.
    repeated = prompt[min(n_left_out, len(prompt) - 1) :]
    completion = [assistant(answer)]
    assert take_off_prompt(prompt, [*repeated, *completion]) == completion
    assert take_off_prompt(prompt, completion) == completion


@FEW
@given(prompt=WORDS, answers=st.lists(WORDS, min_size=2, max_size=2))
def test_repeated_text_is_taken_off_both_answers_or_none(prompt, answers):
    repeated = [f"{prompt} {answer}" for answer in answers]
    assert [rest.strip() for rest in take_off_prompts(prompt, repeated)] == [answer.strip() for answer in answers]
    mixed = [repeated[0], f"x{repeated[1]}"]
    assert take_off_prompts(prompt, mixed) == mixed


@pytest.mark.parametrize(
    "prompt, answer, rest",
    [
        ("Is it blue?", "Is it blue? Yes.", " Yes."),
        ("Is it blue?", "Is it blue?Yes.", "Yes."),
        ("Is it blue? ", "\nIs it blue?\nYes.", "\nYes."),
        ("Human: q\n\nAssistant:", "Human: q\n\nAssistant: a", " a"),
        ("4", "42", None), ("It is 3", "It is 3.5", None), ("don", "don't", None), ("cafe", "cafe\u0301", None),
        ("The", "Then", None), ("well", "well-known", None), ("", "a", None), ("q", "a", None), (" ", " a", None),
    ],
)  # fmt: skip
def test_text_is_taken_off_at_borders_only(prompt, answer, rest):
    assert without_prompt(prompt, answer) == rest
    assert take_off_prompt(prompt, answer) == (answer if rest is None else rest)


def test_a_text_prompt_is_taken_off_messages():
    assert take_off_prompt("q", [user("q"), assistant("a")]) == [assistant("a")]
    assert take_off_prompt("q", [user("other"), assistant("a")]) == [user("other"), assistant("a")]
    assert take_off_prompt([user("q")], [user("q")]) == [user("q")]  # nothing would be left
    assert take_off_prompt([user("q")], "q a") == "q a"


# --- borders ---------------------------------------------------------------------------------------------------------

TEXTS = st.text("ab1 .,'-\né\u0301漢🙂", max_size=12)


@settings(max_examples=300, deadline=None)
@given(prefix=TEXTS, left=TEXTS, right=TEXTS)
@example("The sk", "y", "y is blue")
@example("It costs 3", ".5", ".75")
@example("It costs 12 ", "000", "500")
def test_common_words_are_whole_and_nothing_is_lost(prefix, left, right):
    first, second = prefix + left, prefix + right
    cut = common_words(first, second)
    shared = first[:cut]
    assert second.startswith(shared)
    if shared:
        assert not shared[-1].isspace()
        for text in (first, second):
            assert text[cut].isspace()  # so that no word and no number is cut, and no rest is empty
            assert is_border(text, cut)
            in_number = shared[-1].isdigit() and text[cut + 1 : cut + 2].isdigit()
            assert not in_number
    # The next word differs, or one of the texts ends with it.
    if first != second and first.split(" ")[:2] == second.split(" ")[:2] and "1" not in first + second:
        words = first.split(" ")
        is_long = len(words) > 2 and len(second.split(" ")) > 2
        if is_long and words[0] and words[1]:
            assert cut >= len(words[0])


@pytest.mark.parametrize(
    "text, borders",
    [("ab cd", {2, 3}), ("3.5 m", {3, 4}), ("a. b", {1, 2, 3}), ("don't", set()), ("-5", set()), ("a-b c", {3, 4})],
)
def test_borders_of_words_and_numbers(text, borders):
    assert {cut for cut in range(1, len(text)) if is_border(text, cut)} == borders


@FEW
@given(question=WORDS, history=HISTORY, as_messages=st.booleans(), unanswered=st.booleans())
def test_a_history_that_ends_with_the_question_does_not_double_it(question, history, as_messages, unanswered):
    turns = [turn for asked, answered in history for turn in (user(asked), assistant(answered))]
    ends = [*turns, user(question), *([assistant("")] if unanswered else [])]
    prompt = build_prompt(question, history=ends, as_messages=as_messages, context="It is noon.")
    assert prompt in ([*turns, user(f"{question}\n\nIt is noon.")], f"{question}\n\nIt is noon.")


@pytest.mark.parametrize(
    "question, answers, rests",
    [
        ("Name it.", ["Name it.\nSky", "Name it. Sea"], ["Sky", "Sea"]),
        ("Name it.", ["Name it.\nSky", "Sea"], None),
        ("Hello", ["Hello there", "Hello you"], None),  # a greeting
        ("Name it", ["Name item", "Name it"], None),
        ("Name it.", ["Name it.", "Name it. Sea"], None),
    ],
)
def test_a_question_in_messages_is_taken_off_texts_that_all_repeat_it(question, answers, rests):
    assert take_off_prompts([system("Be."), user(question)], answers) == (rests or answers)


@pytest.mark.parametrize("history", ["\n\nHuman: hi\n\nAssistant: ho", "### Human: hi\n### Assistant: ho"])
def test_a_history_may_be_a_text_with_marked_turns(history):
    prompt = build_prompt("Name it.", history=history, as_messages=True)
    assert prompt == [user("hi"), assistant("ho"), user("Name it.")]
    with pytest.raises(Unusable, match="history"):
        build_prompt("Name it.", history="hi, ho", as_messages=True)
