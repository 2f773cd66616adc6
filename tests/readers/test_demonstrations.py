"""Demonstrations by role: any pair of names is read, no part beside it is lost, and disliked answers are none."""

import json

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.data.prompting import CONTEXT_COLUMNS, SYSTEM_COLUMNS
from hf_rlhf_ext.data.schema import PreferenceDataError, Unusable
from hf_rlhf_ext.data.text import plain_text
from hf_rlhf_ext.readers.demonstrations import (
    COMPLETION_COLUMNS,
    DISLIKED_COLUMNS,
    LIKED_COLUMNS,
    MESSAGES_COLUMNS,
    PROMPT_COLUMNS,
    TOOLS_COLUMNS,
    guess_demonstration,
)
from hf_rlhf_ext.readers.formats import load_demonstrations
from hf_rlhf_ext.readers.profile import profile_of

FEW = settings(max_examples=80, deadline=None)


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **further):
    return {"role": "assistant", "content": text} | further


def turn(speaker, text):
    return {"from": speaker, "value": text}


Q, A = [user("q")], [assistant("a")]
TWO_TURNS = [*Q, *A, user("more"), assistant("b")]
TOOL = [{"name": "f", "parameters": {"zip": {"type": "str", "default": "02139"}}}]


def guessed(rows, **options):
    """What the reader that is guessed for the rows makes of them, and the reader."""
    reader = guess_demonstration(profile_of(rows))
    assert reader is not None
    return [one for row in rows for one in reader(row, **options)], reader


# --- any names -------------------------------------------------------------------------------------------------------

PARTS = st.fixed_dictionaries(
    {},
    optional={
        "system": st.sampled_from(SYSTEM_COLUMNS),
        "history": st.just("history"),
        "context": st.sampled_from(CONTEXT_COLUMNS),
        "tools": st.sampled_from(TOOLS_COLUMNS),
    },
)
VALUES = {"system": "s", "history": [["hi", "hello"]], "context": "data", "tools": json.dumps(TOOL)}


@FEW
@given(
    question=st.sampled_from(PROMPT_COLUMNS),
    answer=st.sampled_from(COMPLETION_COLUMNS),
    parts=PARTS,
    order=st.randoms(use_true_random=False),
)
def test_any_prompt_with_any_completion_and_any_further_parts(question, answer, parts, order):
    if parts.get("context") == question or (question == "input" and "context" in parts):
        del parts["context"]
    columns = [(question, "q"), (answer, "a"), ("id", 1)]
    columns += [(column, VALUES[part]) for part, column in parts.items()]
    order.shuffle(columns)
    (row,), reader = guessed([dict(columns)])

    expected = [system("s")] if "system" in parts else []
    if "history" in parts:
        expected += [user("hi"), assistant("hello")]
    expected.append(user("q\n\ndata" if "context" in parts else "q"))
    stays_text = (question, answer) == ("prompt", "completion") and not parts.keys() & {"system", "history"}
    if stays_text:
        assert (row["prompt"], row["completion"]) == (expected[0]["content"], "a")
    else:
        assert (row["prompt"], row["completion"]) == (expected, A)
    assert row.get("tools") == (VALUES["tools"] if "tools" in parts else None)
    assert reader.columns == {question, answer, *parts.values()}


CONVERSATIONS = {
    "messages": TWO_TURNS,
    "turns": [turn("User", "q"), turn("Assistant", "a"), turn("human", "more"), turn("gpt", "b")],
    "exchanges": [{"input": "q", "output": "a"}, {"input": "more", "output": "b"}],
    "texts": ["q", "a", "more", "b"],
    "JSON": json.dumps(TWO_TURNS),
    "a template": "USER: q\n\n\nASSISTANT: a <|endoftext|>\n\n\nUSER: more\n\n\nASSISTANT: b <|endoftext|>",
    "v1": [
        {"role": one["role"], "content": [{"type": "text", "value": one["content"]}], "loss_weight": 1.0}
        for one in TWO_TURNS
    ],
}


@pytest.mark.parametrize("form", CONVERSATIONS)
@FEW
@given(column=st.sampled_from(MESSAGES_COLUMNS), system_column=st.none() | st.sampled_from(SYSTEM_COLUMNS))
def test_any_conversation_under_any_name(form, column, system_column):
    row = {"id": 1, column: CONVERSATIONS[form]}
    first = []
    if system_column is not None:
        row[system_column] = "s"
        first = [system("s")]
    rows, reader = guessed([row], every_turn=True)
    assert [(one["prompt"], one["completion"]) for one in rows] == [
        ([*first, *Q], A),
        ([*first, *TWO_TURNS[:3]], [assistant("b")]),
    ]
    assert guessed([row])[0] == rows[1:]
    assert reader.columns == {column, *([system_column] if system_column else [])}


@pytest.mark.parametrize(
    "row",
    [
        {"text": "q"},
        {"prompt": "q"},
        {"completion": "a"},
        {"messages": "q", "id": 1},
        {"messages": [user("q")]},
        {"prompt": "q", "response": 5},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {},
    ],
)
def test_other_columns_are_no_demonstrations(row):
    assert guess_demonstration(profile_of([row])) is None


# --- forms of published sets -----------------------------------------------------------------------------------------


def test_a_conversation_that_ends_with_the_user_is_the_prompt_of_the_completion():
    for column in ("messages", "conversation", "input", "prompt", "context"):
        (row,), _ = guessed([{column: [system("s"), *Q], "output": "a"}])
        assert (row["prompt"], row["completion"]) == ([system("s"), *Q], A)
    (row,), _ = guessed([{"system_prompt": "s", "input": Q, "output": "a"}])  # Llama-Nemotron
    assert row["prompt"] == [system("s"), *Q]


def test_a_whole_conversation_is_preferred_to_its_first_turn():
    row = {"prompt": "q", "response": "a", "messages": TWO_TURNS, "text": "USER: q ASSISTANT: a"}
    assert guessed([row])[0][0]["completion"] == [assistant("b")]
    row = {"instruction": "q", "input": "data", "output": "a", "text": "### Instruction:\nq\n\n### Response:\na"}
    assert guessed([row])[0][0]["prompt"] == [user("q\n\ndata")]


def test_numbered_turns_follow_the_first():
    def read(row, **options):
        return guessed([row], **options)[0]

    row = {"instruction": "q", "response": "a", "instruction_2": "more", "response_2": "b"}
    assert read(row)[0]["prompt"] == TWO_TURNS[:3] and read(row)[0]["completion"] == [assistant("b")]
    assert [one["completion"] for one in read(row, every_turn=True)] == [A, [assistant("b")]]
    assert read(row | {"instruction_2": None, "response_2": None})[0]["prompt"] == Q


def test_answers_that_are_calls_become_tool_calls():
    calls = [{"name": "f", "arguments": {"zip": "02139", "days": 3}}]
    rows = [{"query": "q", "answers": json.dumps(calls), "tools": json.dumps(TOOL)}]
    rows.append({"query": "q", "answers": "[]", "tools": json.dumps(TOOL)})
    (call, no_call), _ = guessed(rows)
    assert call["completion"] == [assistant("", tool_calls=[{"type": "function", "function": calls[0]}])]
    assert no_call["completion"] == [assistant("[]")] and call["tools"] == json.dumps(TOOL)
    (text,), _ = guessed([{"query": "q", "answers": json.dumps(calls)}])  # without tools it is only text
    assert text["completion"] == [assistant(json.dumps(calls))]


def test_glaive_keeps_its_system_text_and_what_functions_return():
    chat = (
        "USER: q\n\n\nASSISTANT: <functioncall> {} <|endoftext|>\n\n\n"
        'FUNCTION RESPONSE: {"x": 1}\n\n\nASSISTANT: a <|endoftext|>'
    )
    (row,), _ = guessed([{"system": "SYSTEM: Use f.", "chat": chat}])
    call = assistant("<functioncall> {}")
    assert row["prompt"] == [system("Use f."), *Q, call, {"role": "tool", "content": '{"x": 1}'}]
    assert row["completion"] == A


def test_a_prompt_in_the_completion_is_taken_off():
    (row,), _ = guessed([{"prompt": Q, "completion": [*Q, *A]}])
    assert (row["prompt"], row["completion"]) == (Q, A)


@pytest.mark.parametrize("tools", ["[]", [], "", None, "{}", "null"])
def test_an_empty_list_of_tools_is_no_tools(tools):
    for row in ({"messages": [*Q, *A], "tools": tools}, {"query": "q", "answers": "a", "functions": tools}):
        rows = [row, row | {next(iter(row.keys() - {"messages", "query", "answers"})): json.dumps(TOOL)}]
        without, with_tools = guessed(rows)[0]
        assert "tools" not in without and json.loads(with_tools["tools"]) == TOOL
        assert without["flags"] == []


def test_options_of_the_template_are_kept():
    row = {"messages": [*Q, *A], "chat_template_kwargs": {"enable_thinking": False}}
    assert "enable_thinking" in str(guessed([row])[0][0]["chat_template_kwargs"])


# --- labels ----------------------------------------------------------------------------------------------------------

LIKED = [True, 1, 1.0, "true", "True", "yes", "1"]
DISLIKED = [False, 0, -1, "false", "False", "no", "0"]


@FEW
@given(
    column=st.sampled_from((*LIKED_COLUMNS, *DISLIKED_COLUMNS)),
    good=st.sampled_from(LIKED),
    bad=st.sampled_from(DISLIKED),
    form=st.sampled_from([{"prompt": "q", "response": "a"}, {"messages": [*Q, *A]}, {"prompt": Q, "completion": A}]),
)
def test_disliked_answers_are_no_demonstrations_unless_asked(column, good, bad, form):
    if column in DISLIKED_COLUMNS:
        good, bad = bad, good
    rows = [form | {column: good}, form | {column: bad}]
    reader = guess_demonstration(profile_of(rows))
    assert column in reader.columns and len(reader(rows[0])) == 1
    with pytest.raises(Unusable, match=f"{column} is (true|false).*labels='all'"):
        reader(rows[1])
    assert len(reader(rows[1], labels="all")) == 1


def test_labels_are_respected_by_named_formats_and_counted():
    answers = [("a", True), ("BAD", False), ("c", None)]
    for form in (
        [{"prompt": Q, "completion": [assistant(text)], "label": label} for text, label in answers],
        [{"prompt": "q", "response": text, "is_safe": label} for text, label in answers],
        [{"messages": [*Q, assistant(text)], "kto_tag": label} for text, label in answers],
        [{"instruction": "q", "output": text, "label": label} for text, label in answers],
    ):
        dataset, report = load_demonstrations(Dataset.from_list(form))
        assert [row["completion"][0]["content"] for row in dataset] == ["a", "c"]
        assert (report.rows_in, report.kept, [*report.dropped.values()]) == (3, 2, [[1]])
        assert load_demonstrations(Dataset.from_list(form), labels="all")[1].kept == 3
    with pytest.raises(PreferenceDataError, match="labels='all'"):
        load_demonstrations(Dataset.from_list(form[1:2]))


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], ["positive", "negative"], [{"ability": ["x"]}], [0.3, 0.9]])
def test_labels_that_say_neither_yes_nor_no_are_not_read(labels):
    rows = [{"messages": [*Q, *A], "label": label} for label in labels]
    read, reader = guessed(rows)
    assert len(read) == len(rows) and "label" not in reader.columns


# --- broken rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "good, bad, reason",
    [
        ({"question": "q", "answer": "a"}, {"question": None}, "question is missing"),
        ({"question": "q", "answer": "a"}, {"answer": None}, "answer is missing"),
        ({"question": "q", "answer": "a"}, {"question": 5}, "question is not text"),
        ({"conversation": [*Q, *A]}, {"conversation": None}, "conversation is not a list of turns"),
        ({"conversation": [*Q, *A]}, {"conversation": Q}, "no answer after a prompt"),
        ({"conversation": [*Q, *A]}, {"conversation": [system("s"), *A]}, "no answer after a prompt"),
        ({"conversation": [*Q, *A], "system": "s"}, {"conversation": [system("t"), *Q, *A]}, "system differs"),
        ({"conversation": [*Q, *A]}, {"conversation": [turn("narrator", "q"), *A]}, "conversation has the unknown"),
        ({"conversation": [*Q, *A]}, {"conversation": [user([{"type": "image"}]), *A]}, "not text: image"),
        ({"query": "q", "response": "a", "history": [["x", "y"]]}, {"history": [["x"]]}, "history is not a list"),
    ],
)
def test_a_broken_row_says_why(good, bad, reason):
    reader = guess_demonstration(profile_of([good, good, good | bad]))
    assert len(reader(good)) == 1
    with pytest.raises(Unusable, match=reason):
        reader(good | bad)


@pytest.mark.parametrize(
    "row, flags",
    [
        ({"query": "", "response": "a"}, ["empty_prompt"]),
        ({"query": "q", "response": " "}, ["empty_completion"]),
        ({"query": "q", "response": "a", "rating": 7}, []),
        ({"query": "q", "response": "a", "tools": "["}, ["bad_tools"]),
    ],
)
def test_what_is_odd_is_flagged(row, flags):
    good = {"query": "q", "response": "a", "rating": 7}
    reader = guess_demonstration(profile_of([good, good, row]))
    assert reader(row)[0]["flags"] == flags


# --- spellings, and questions that answers repeat ---------------------------------------------------------------------


def spelled(name, how):
    words = name.split("_")
    return {
        "title": " ".join(word.title() for word in words),
        "upper": name.upper(),
        "camel": words[0] + "".join(word.title() for word in words[1:]),
    }[how]


@FEW
@given(
    how=st.sampled_from(["title", "upper", "camel"]),
    prompt=st.sampled_from(PROMPT_COLUMNS),
    completion=st.sampled_from(COMPLETION_COLUMNS),
    liked=st.sampled_from(LIKED_COLUMNS),
    system_column=st.sampled_from(SYSTEM_COLUMNS),
)
def test_names_are_read_in_any_spelling(how, prompt, completion, liked, system_column):
    row = {prompt: "What is it?", completion: "A thing.", system_column: "Be brief.", liked: True}
    expected = [dict(one) for one in load_demonstrations([row])[0]]
    rows = [{spelled(name, how): value for name, value in row.items()}]
    assert [dict(one) for one in load_demonstrations(rows)[0]] == expected
    rows[0][spelled(liked, how)] = False
    with pytest.raises(PreferenceDataError, match="is no demonstration"):
        load_demonstrations(rows)


def test_the_nearest_reading_goes_by_names():
    squad = {"title": "T", "context": "c d", "question": "q?", "answers": {"text": ["a"], "answer_start": [1]}}
    with pytest.raises(PreferenceDataError, match='did you mean columns={"prompt": "question", "completion": "…"}'):
        load_demonstrations([squad])


@pytest.mark.parametrize("names", [("instruction", "output"), ("prompt", "completion"), ("Question", "Answer")])
def test_a_question_that_all_answers_repeat_is_taken_off(names):
    rows = [{names[0]: f"Name {n} things.", names[1]: f"Name {n} things. Here they are."} for n in range(3)]

    def answers():
        return [plain_text(one).strip() for one in load_demonstrations(rows)[0]["completion"]]

    assert answers() == ["Here they are."] * 3
    rows[1][names[1]] = "Here."
    assert answers() == [row[names[1]] for row in rows]  # the others may only quote it


LABELS_IN_WORDS = [
    ("good", "bad"), ("accept", "reject"), ("accepted", "rejected"), ("Like", "Dislike"), ("up", "down"),
    ("thumbs_up", "thumbs_down"), ("👍", "👎"), ("safe", "unsafe"), ("correct", "wrong"), ("desirable", "undesirable"),
    ("yes", "no"), (1, 0), (True, False),
]  # fmt: skip


@pytest.mark.parametrize("good, bad", LABELS_IN_WORDS)
@pytest.mark.parametrize("column", ["label", "is_correct", "isSafe", "thumbs", "accepted"])
def test_a_label_is_read_in_any_words(column, good, bad):
    rows = [{"prompt": "q", "completion": f"answer {n}", column: label} for n, label in enumerate((good, bad))]
    dataset, report = load_demonstrations(rows)
    assert dataset["completion"] == ["answer 0"] and sum(map(len, report.dropped.values())) == 1
    assert len(load_demonstrations(rows, labels="all")[0]) == 2
