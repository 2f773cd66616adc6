"""Conversations in every published form become the same messages, also as JSON text in a cell."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.data.conversations import (
    conversation_in_text,
    parsed,
    read_conversation,
    text_or_messages,
    to_messages,
)
from hf_rlhf_ext.data.schema import Unusable

FEW = settings(max_examples=25, deadline=None)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **further):
    return {"role": "assistant", "content": text} | further


def v1(role, *parts):
    return {"role": role, "content": [{"type": kind, "value": value} for kind, value in parts], "loss_weight": 1.0}


TALK = [user("q"), assistant("a"), user("more"), assistant("b")]
FORMS = {
    "messages": lambda q, a: [user(q), assistant(a)],
    "with further fields": lambda q, a: [user(q) | {"toxic": False}, assistant(a) | {"tool_calls": [], "weight": 1}],
    "speakers of other sets": lambda q, a: [{"from": "Prompter", "value": q}, {"from": "GPT", "value": a}],
    "speaker and text": lambda q, a: [{"speaker": "Human", "text": q}, {"speaker": "Bot", "text": a}],
    "text parts": lambda q, a: [v1("user", ("text", q)), v1("assistant", ("text", a))],
    "parts with empty places for media": lambda q, a: [
        {"role": "user", "content": [{"type": "text", "text": q, "image": None}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": a}]},
    ],
    "input and output": lambda q, a: [{"input": q, "output": a}],
    "human and assistant": lambda q, a: [{"human": q, "assistant": a}],
    "Question and Answer": lambda q, a: [{"Question": q, "Answer": a}],
    "texts in turn": lambda q, a: [q, a],
    "pairs": lambda q, a: [[q, a]],
}
WORDS = st.text("ab \n\"'\\é{[", max_size=8)


@pytest.mark.parametrize("form", FORMS)
@FEW
@given(talk=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_every_form_gives_the_same_messages(form, talk):
    turns, expected = [], []
    for question, answer in talk:
        turns += FORMS[form](question, answer)
        expected += [user(question), assistant(answer)]
    assert to_messages(turns) == expected
    assert to_messages(json.dumps(turns)) == expected
    assert to_messages(f" {turns!r}\n") == expected  # as DataFrame.to_csv writes it
    assert to_messages({"messages": turns}) == expected


def test_a_record_of_lists_is_a_conversation():
    assert to_messages({"role": ["user", "assistant"], "content": ["q", "a"]}) == TALK[:2]
    assert to_messages({"from": ["human", "gpt"], "value": ["q", "a"]}) == TALK[:2]


def test_a_system_text_of_an_exchange_comes_first():
    turns = [{"system": "s", "human": "q", "assistant": "a"}, {"system": "s", "human": "more", "assistant": "b"}]
    assert to_messages(turns) == [{"role": "system", "content": "s"}, *TALK]


@pytest.mark.parametrize("value", [None, 5, "q", "", [], {}, [5], "[1, 2", "{}", [{"a": 1}], {"role": "user"}])
def test_anything_else_is_no_conversation(value):
    with pytest.raises(Unusable, match="chat"):
        to_messages(value, "chat")


@pytest.mark.parametrize(
    "turns, reason",
    [
        ([user("q"), "a"], "chat has a turn without a known speaker and text"),
        ([user("q"), {"role": "assistant", "content": None}], "chat has a turn without a known speaker and text"),
        ([user("q"), {"role": "stage", "content": "a"}], "chat has the unknown speaker 'stage'"),
        (["q", None], "chat is not a list of texts"),
        ([["q", "a"], ["q"]], r"chat is not a list of \[question, answer\]"),
        ([{"input": "q", "output": "a"}, {"input": "q"}], "chat has an exchange without"),
        ([user([{"type": "image", "image": "x.png"}])], "chat has a part that is not text: image"),
        ([user([{"type": "image_url", "image_url": {"url": "x"}}])], "chat has a part that is not text: image_url"),
        ([user([{"type": "text", "text": "q", "image": b"x"}])], "chat has a part that is not text: image"),
        ([user([{"type": "image", "text": None}])], "chat has a part that is not text: image"),
        ([user([{"type": "video", "value": "x.mp4"}])], "chat has a part that is not text: video"),
        ([user("q") | {"images": ["x.png"]}], "chat has a part that is not text: images"),
        ([user("q"), v1("assistant", ("tool_call", "no JSON"))], "chat has a tool call that is not JSON"),
        ([user("q"), assistant("", tool_calls="no JSON")], "chat has tool_calls that are not a list"),
    ],
)
def test_a_broken_turn_is_named(turns, reason):
    with pytest.raises(Unusable, match=reason):
        to_messages(turns, "chat")


def test_reasoning_and_tool_calls_of_parts_become_fields():
    call = {"name": "f", "arguments": {"zip": "02139"}}
    turns = [
        v1("assistant", ("reasoning", "Hm."), ("tool_call", json.dumps(call))),
        v1("tool", ("text", "sun")),
        v1("assistant", ("reasoning", "Ah."), ("text", "Sun."), ("text", " Yes.")),
    ]
    assert to_messages(turns) == [
        assistant("", reasoning_content="Hm.", tool_calls=[{"type": "function", "function": call}]),
        {"role": "tool", "content": "sun"},
        assistant("Sun. Yes.", reasoning_content="Ah."),
    ]


def test_tool_calls_of_all_spellings_survive():
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"zip": "02139"}'}}
    older = {"name": "f", "arguments": '{"zip": "02139"}'}
    for turn in (assistant(None, tool_calls=[call]), {"role": "assistant", "tool_calls": json.dumps([call])}):
        assert to_messages([turn]) == [assistant("", tool_calls=[call])]
    assert to_messages([assistant(None, function_call=older)]) == [
        assistant("", tool_calls=[{"type": "function", "function": older}])
    ]


# --- text that is JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "", "q", "[", "[1, 2] sorted", '["a", "b"]', '{"role": "user", "content": "q"}', '[{"name": "f"}]',
        '[{"role": "admin", "content": "a"}]', '[{"role": "user"}]', '[{"role": "user", "content": "q"}] is a list',
        "[{'a': 1}", "[{'a': f()}]", '[{"name": "f", "arguments": {}}]',
    ],
)  # fmt: skip
def test_an_answer_that_happens_to_be_json_stays_text(text):
    assert conversation_in_text(text, "prompt") is None
    assert text_or_messages(text, "prompt") == text


def test_a_conversation_as_text_is_read_and_a_broken_one_is_not_taken_for_a_question():
    assert text_or_messages(json.dumps(TALK), "prompt") == TALK == text_or_messages(repr(TALK), "prompt")
    for broken in (
        "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]",
        '[{"from": "human", ]',
    ):
        with pytest.raises(Unusable, match="prompt looks like a conversation, but is not JSON"):
            text_or_messages(broken, "prompt")


@FEW
@given(st.text("[]{}'\":, ab1\\\n(", max_size=30))
def test_no_text_is_run_or_raises(text):
    assert isinstance(parsed(text), list | dict | None)
    try:
        read_conversation(text, "chat")
        text_or_messages(text, "chat")
    except Unusable:
        pass


def test_a_side_may_be_one_message_and_its_missing_text_is_empty():
    assert text_or_messages({"from": "gpt", "value": "a"}, "chosen") == [assistant("a")]
    assert text_or_messages([assistant(None)], "chosen") == [assistant("")]
    for broken in ([{"role": "assistant"}], [{"content": "a"}], [assistant(5)], [], 5, None, ["a"], [[assistant("a")]]):
        with pytest.raises(Unusable, match="chosen is not text"):
            text_or_messages(broken, "chosen")


def test_the_fields_of_turns_may_have_capitals():
    turns = [{"Role": "User", "Content": "q"}, {"Role": "Assistant", "Content": "a"}]
    assert to_messages(turns) == text_or_messages(turns, "chosen") == [user("q"), assistant("a")]
