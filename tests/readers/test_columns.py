"""The account of columns: what each name and value looks like, what stops the load, and what repeats the rows read."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.data.schema import LoadReport, Unusable
from hf_rlhf_ext.readers.columns import MEANINGFUL, ColumnWatch, UnreadColumn, account, meaning_of, normal_name
from hf_rlhf_ext.readers.profile import profile_of


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


Q = "Name a blue thing."
PAIR = {"prompt": Q, "chosen": "The sky.", "rejected": "No idea."}
READ_PAIR = {"prompt": Q, "completions": ["The sky.", "No idea."], "pairs": [[0, 1]], "targets": [1.0]}
READ_CHAT = READ_PAIR | {"prompt": [user(Q)], "completions": [[assistant("The sky.")], [assistant("No idea.")]]}
READ = set(PAIR)


def account_of(row, result=READ_PAIR, read=READ, **options):
    rows = row if isinstance(row, list) else [row]
    pairs = [(one, result) for one in rows]
    return account(profile_of(rows), read, pairs, **options)


# --- names and values -------------------------------------------------------------------------------------------------

LOOKS_LIKE = {
    "prompt material": [
        ("system", "Be rude."), ("systemPrompt", "Be rude."), ("chat_history", [["a", "b"]]), ("context", "A text."),
        ("previous_steps", "1. x"), ("initial_reason_steps", "1. x"), ("trajectory", [user("x")]),
        ("messages", [user("x")]),
        ("notes", [user("x")]), ("notes", json.dumps([{"from": "human", "value": "x"}])), ("user", "What is it?"),
        ("source_document", "A long text."),
    ],
    "tools": [("tools", "[]x"), ("available_tools", [{"name": "f"}]), ("functions", '[{"name": "f"}]')],
    "the chosen answer": [("chosen", "The sky."), ("chosen", [assistant("Sky.")]), ("chosen", assistant("Sky."))],
    "template options": [("chat_template_kwargs", {"enable_thinking": False})],
    "media": [
        ("image", "1.jpg"), ("images", ["1.jpg"]), ("pic", {"bytes": b"x", "path": None}), ("video_path", "a.mp4"),
        ("image_id", 12), ("sound", {"array": [0.0], "sampling_rate": 16000}), ("x", [b"\x89PNG"]),
    ],
    "label": [("label", True), ("kto_tag", False), ("is_safe", 0), ("is_response_0_safe", True), ("feedback", "up")],
    "verdict": [
        ("winner", "model_a"), ("better_response_id", 1), ("winner_model_a", 1), ("overall_preference", -2),
        ("preferred_output", "A"), ("best_response", 2), ("chosen", 0), ("chosen", "response_b"),
    ],
    "status": [("status", "tie")],
    "turn": [("turn", 2), ("turnIndex", 1)],
    "tie": [("tie", False), ("is_tie", 1), ("both_bad", True)],
    "vote": [("votes", [1, 2]), ("upvotes_a", 5)],
    "rating": [
        ("chosen-rating", 4.0), ("rating_rejected", 1), ("score_a", 1), ("model_a_score", 1), ("score_response_1", 2),
        ("scores", [1, 2]), ("helpfulness", 3), ("mean_score", 0.5), ("judge_score", 7), ("rank", 1), ("stars", "4/5"),
    ],
    "metadata": [
        ("id", "x"), ("prompt_id", "x"), ("response_0_sha256", "ab"), ("chosen_model", "gpt"), ("createdAt", "2024"),
        ("language", "en"), ("prompt_source", "web"), ("prompt_tokens", 3), ("context_length", 9), ("num_turns", 2),
        ("num_votes", 2), ("judge_prompt", "You are a judge."), ("labelling_prompt", [user("x")]),
        ("reward_model", "x"),
        ("url", "https://x"), ("category", {"crime": True}), ("image_url_count", 1), ("timestamp", 1.5),
    ],
    "text": [
        ("rationale", "Because."), ("image_caption", "A dog."), ("preferred_output", "A long answer to it."),
        ("foo", "x"),
        ("label", "A whole sentence about it."), ("user", "u17"), ("api", "openai"),
    ],
    "numbers": [("foo", 3), ("steps", 10), ("turns", 2)],
    "yes or no": [("foo", True), ("parallel_tool_calls", True), ("custom_prompt", False)],
    "lists or records": [("foo", [1]), ("labels", {"name": ["spam"], "value": [0.1]})],
    "empty": [
        ("system", ""), ("images", []), ("images", [None]), ("label", None), ("history", "[]"), ("x", float("nan")),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "column, value, meaning",
    [(column, value, meaning) for meaning, cases in LOOKS_LIKE.items() for column, value in cases],
)
def test_a_column_looks_like_its_name_and_its_values(column, value, meaning):
    assert meaning_of(column, [value]) == meaning


@given(
    st.sampled_from(["system prompt", "better response id", "chosen score", "is safe", "chat history", "judged turn"])
)
@settings(deadline=None)
def test_a_name_means_the_same_in_every_spelling(words):
    first, *rest = words.split()
    spellings = ["_".join([first, *rest]), "-".join([first, *rest]), words, words.upper(), words.title()]
    spellings.append(first + "".join(map(str.title, rest)))
    assert {normal_name(spelling) for spelling in spellings} == {words.replace(" ", "_")}


def test_pictures_that_were_decoded_are_media():
    image = pytest.importorskip("PIL.Image")
    assert meaning_of("x", [image.new("RGB", (1, 1))]) == "media"


# --- what stops a load ------------------------------------------------------------------------------------------------

STOPPING = [
    (column, value)
    for meaning, cases in LOOKS_LIKE.items()
    if meaning in MEANINGFUL
    for column, value in cases
]  # fmt: skip


@pytest.mark.parametrize("column, value", STOPPING)
def test_a_column_that_matters_stops_the_load_in_one_line_with_two_ways_on(column, value):
    read = READ - {column}
    with pytest.raises(UnreadColumn) as caught:
        account_of(PAIR | {column: value}, None, read, source="rows.csv")
    line = str(caught.value)
    assert line.startswith("rows.csv: ") and "\n" not in line and len(line) < 300
    assert column in line and meaning_of(column, [value]) in line and f'ignore=["{column}"]' in line
    if meaning_of(column, [value]) != "media":
        assert "columns={" in line and "--columns" in line

    unread = account_of(PAIR | {column: value}, None, read, ignore=[column])
    assert unread == {column: f"{meaning_of(column, [value])}, ignored"}


@given(
    st.lists(st.sampled_from(STOPPING), unique_by=lambda case: case[0], min_size=1, max_size=6),
    st.integers(0, 5),
)
@settings(max_examples=30, deadline=None)
def test_every_column_that_matters_is_reported_wherever_its_first_value_is(columns, place):
    read = READ - {column for column, _ in columns}
    rows = [PAIR | {column: None for column, _ in columns} for _ in range(6)]
    for column, value in columns:
        rows[place][column] = value
    with pytest.raises(UnreadColumn) as caught:
        account_of(rows, None, read)
    stopping = [column for column in rows[0] if column not in read]
    for column in stopping[:4]:
        assert f" {column} (looks like " in str(caught.value)
    assert ("more" in str(caught.value)) == (len(stopping) > 4)
    assert len(account_of(rows, None, read, ignore=[column for column, _ in columns])) == len(columns)


def test_many_columns_are_still_one_line():
    with pytest.raises(UnreadColumn, match=r"and 26 more|26 more") as caught:
        account_of(PAIR | {f"score_{n}": n for n in range(30)})
    assert len(str(caught.value)) < 500


def test_a_column_that_is_known_or_read_does_not_stop():
    row = PAIR | {"deleted": False, "score": 4}
    assert account_of(row, read=READ | {"score"}, known={"deleted"}) == {"deleted": "metadata"}


def test_an_earlier_version_of_the_prompt_is_text_only_if_the_prompt_was_read():
    row = {"original_question": "What is 1 + 1?", "chosen": "a", "rejected": "b"}
    with pytest.raises(UnreadColumn, match="original_question"):
        account_of(row, read={"chosen", "rejected"})
    assert account_of(row | {"prompt": "q"}) == {"original_question": "text"}


# --- copies of what was read ------------------------------------------------------------------------------------------

TURNS = [{"from": "human", "value": Q}, {"from": "gpt", "value": "The sky."}]
COPIES = {
    "messages": [user(Q), assistant("The sky.")],
    "conversations": TURNS,
    "question": f" {Q}\n",
    "dialogue": json.dumps(TURNS),  # codespell:ignore
    "history": [Q],
    "rendered_prompt": f"\n\nHuman: {Q}\n\nAssistant:",
    "chat": f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\nThe sky.<|im_end|>",
    "llama_prompt": f"<s>[INST] {Q} [/INST] The sky.</s>",
    "text": "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    f"\n\n### Instruction:\n{Q}\n\n### Response:\nThe sky.",
}


@pytest.mark.parametrize("result", [READ_PAIR, READ_CHAT, [READ_CHAT]], ids=["text", "messages", "several"])
@pytest.mark.parametrize("column", COPIES)
def test_a_column_that_repeats_what_was_read_counts_as_read(column, result):
    assert account_of(PAIR | {column: COPIES[column]}, result) == {}


@pytest.mark.parametrize(
    "column, value",
    [
        ("messages", [user("Hello?"), assistant("Hi."), user(Q)]),
        ("messages", [{"role": "system", "content": "Be rude."}, user(Q)]),
        ("rendered_prompt", f"System: Be rude.\n\nHuman: {Q}\n\nAssistant:"),
        ("question", f"{Q} And a red one."),
        ("question", "Name a blue"),
        ("system", "sky"),
        ("context", "idea"),
    ],
)
def test_a_column_that_says_more_than_was_read_is_no_copy(column, value):
    with pytest.raises(UnreadColumn, match=column):
        account_of(PAIR | {column: value}, READ_CHAT)


@given(
    st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=30),
    st.sampled_from(["{}", "<|system|>{}", "### {}:"]),
)
@settings(max_examples=50, deadline=None)
def test_text_that_was_not_read_is_never_a_copy(word, template):
    text = template.format(f"zq{word}qz")
    with pytest.raises(UnreadColumn):
        account_of(PAIR | {"context": f"{text} {Q}"})


def test_a_copy_repeats_every_row():
    rows = [PAIR | {"question": Q}, PAIR | {"question": "Something else?"}]
    with pytest.raises(UnreadColumn, match="question"):
        account_of(rows)
    assert account_of([PAIR | {"question": Q}, PAIR | {"question": None}]) == {}


def test_a_passage_inside_the_prompt_was_read():
    passage = "The sky is blue because of scattering."
    result = READ_PAIR | {"prompt": f"Read this.\n{passage}\nWhy?"}
    assert account_of(PAIR | {"context": passage}, result) == {}
    with pytest.raises(UnreadColumn, match="context"):
        account_of(PAIR | {"context": passage[:-3]}, result)  # not at the border of a word


def test_a_number_of_turns_repeats_the_conversation_and_another_number_does_not():
    conversation = READ_CHAT | {"prompt": [user("Hi."), assistant("Hello."), user(Q)]}
    assert account_of(PAIR | {"turn": 2}, conversation) == {}
    with pytest.raises(UnreadColumn, match="turn"):
        account_of(PAIR | {"turn": 1}, conversation)


def test_a_verdict_is_no_copy_of_an_answer_that_happens_to_be_equal():
    row = {"prompt": "A or B?", "chosen": "A", "rejected": "B", "winner": "B"}
    result = READ_PAIR | {"prompt": "A or B?", "completions": ["A", "B"]}
    with pytest.raises(UnreadColumn, match="winner"):
        account_of(row, result)


def test_rows_that_could_not_be_read_show_no_copies():
    with pytest.raises(UnreadColumn, match="question"):
        account_of(PAIR | {"question": Q}, Unusable("completions are equal"))


def test_preferences_are_no_demonstrations_if_the_chosen_answer_was_not_read():
    row = {"conversations": [user("Hi."), assistant("Hello."), user(Q)], "chosen": "The sky.", "rejected": "No idea."}
    read = {"prompt": [user("Hi.")], "completion": [assistant("Hello.")]}
    with pytest.raises(UnreadColumn, match="chosen"):
        account_of(row, read, {"conversations"})
    # In ultrafeedback_binarized, `messages` are the prompt and the chosen answer.
    read = {"prompt": [user(Q)], "completion": [assistant("The sky.")]}
    assert account_of(row, read, {"conversations"}) == {"rejected": "text"}


# --- after the sample -------------------------------------------------------------------------------------------------


def watch_of(rows, ignore=()):
    profile = profile_of(rows)
    unread = account(profile, READ, [(rows[0], READ_PAIR)], ignore)
    return ColumnWatch(profile, READ, ignore, source="rows.jsonl", unread=unread), unread


@pytest.mark.parametrize("first", [{}, {"images": None}, {"images": []}])
def test_a_column_that_appears_late_stops_the_load_and_names_its_row(first):
    watch, _ = watch_of([PAIR | first])
    watch.check(PAIR | {"images": [None]}, 1, READ_PAIR)
    with pytest.raises(UnreadColumn, match=r"^rows.jsonl row 2: .*images.*ignore="):
        watch.check(PAIR | {"images": ["1.jpg"]}, 2, READ_PAIR)


def test_late_columns_that_do_not_matter_or_are_waived_are_reported():
    watch, unread = watch_of([PAIR | {"note": None}], ignore=["images"])
    watch.check(PAIR | {"note": "x", "id": 3, "images": ["1.jpg"], "question": Q, "late": None}, 1, READ_PAIR)
    assert unread == {"note": "text", "id": "metadata", "images": "media, ignored", "late": "empty"}


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_summary_lists_what_was_not_read_with_waived_columns_and_texts_first():
    unread = {"id": "metadata", "empty": "empty", "note": "text", "system": "prompt material, ignored"}
    unread |= {f"n{n}": "numbers" for n in range(7)}
    report = LoadReport("rows.csv", 1, 1, unread=unread)
    assert report.summary() == (
        "rows.csv: 1 of 1 rows kept; not read: system (prompt material, ignored), note (text), "
        "n0, n1, n2, n3, n4 and 2 more (numbers), id (metadata)"
    )
    assert report.waived == ["system"]


def test_the_summary_stays_one_line():
    report = LoadReport("x", 1, 1, unread={"a\nb": "text"})
    assert "\n" not in report.summary() and re.search(r"'a\\nb' \(text\)", report.summary())


@pytest.mark.parametrize("name", ["thinking", "reasoning", "reasoning_content", "cot", "thoughts"])
def test_thoughts_of_the_answer_are_not_lost(name):
    thought = "It must be something above us."
    demonstration = {"prompt": Q, "completion": "The sky."}
    with pytest.raises(UnreadColumn, match=f"{name} .looks like thinking.*reasoning_content"):
        account_of(demonstration | {name: thought}, demonstration, demonstration)
    assert account_of(demonstration | {name: "off"}, demonstration, demonstration) == {name: "text"}
    with_thought = demonstration | {"completion": f"<think>\n{thought}\n</think>\nThe sky."}
    assert account_of(with_thought | {name: thought}, with_thought, with_thought) == {}
    # Beside a comparison, they are those of the judge.
    assert account_of(PAIR | {name: thought}) == {name: "text"}
    with pytest.raises(UnreadColumn):
        account_of(PAIR | {f"chosen_{name}": thought})


@pytest.mark.parametrize("column, value", [("character", "A pirate."), ("guidelines", "Be kind."), ("toxic_a", True)])
def test_what_changes_the_answers_stops_the_load(column, value):
    with pytest.raises(UnreadColumn, match=column):
        account_of(PAIR | {column: value})
    assert account_of(PAIR | {"toxic": True}) == {"toxic": "metadata"}


def test_the_name_of_a_model_is_no_rating():
    assert account_of(PAIR | {"score_model": "judge-1"}) == {"score_model": "text"}
    with pytest.raises(UnreadColumn):
        account_of(PAIR | {"score_model": 0.5})
