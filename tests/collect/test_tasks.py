"""Tasks and answers: what is refused, and that nothing changes on the way to a file or to another order and back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_rlhf_ext.collect.answers import BadAnswer, by_completion, by_position, checked_answer
from hf_rlhf_ext.collect.tasks import Task, read_tasks, write_tasks
from hf_rlhf_ext.errors import UserError


def ask(text):
    return [{"role": "user", "content": text}]


def reply(text):
    return [{"role": "assistant", "content": text}]


TASKS = [
    Task("Who?", ["I.", "You."]),
    Task("Line\u2028separator", ["a", "b", "c"], made_by=[{"policy": "sft", "seed": k} for k in range(3)], wanted=3),
    Task(ask("Hi"), [reply("Hello"), reply("Ho")], category="chat", source="mine", row=3, batch="round-1"),
    Task("Rate", ["only"]),
    Task("2 + 2?", ["4", "5"], gold={"best": [0]}),
]


def test_a_file_keeps_every_task(tmp_path):
    path = tmp_path / "new" / "tasks.jsonl"
    write_tasks(path, TASKS)
    assert read_tasks(path) == TASKS
    assert [task.kind for task in TASKS] == ["compare", "rank", "compare", "rate", "compare"]
    # Another writer may leave columns empty.
    path.write_text('{"prompt": "a", "completions": ["b", "c"], "gold": null, "made_by": null}\n\n', encoding="utf-8")
    assert read_tasks(path) == [Task("a", ["b", "c"])]


def test_half_characters_and_paths_that_cannot_be_written(tmp_path):
    write_tasks(tmp_path / "tasks.jsonl", [Task("half \ud83d", ["a", "b"])])
    assert read_tasks(tmp_path / "tasks.jsonl")[0].prompt == "half ?"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "tasks.jsonl", tmp_path / "folder"):
        with pytest.raises(UserError, match="cannot be written"):
            write_tasks(path, [Task("q", ["a", "b"])])
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "folder", "tasks.jsonl"]


def test_the_fingerprint_is_that_of_the_question():
    task = Task("Who?", ["I.", "You."], wanted=2, batch="a", category="b")
    assert task.fingerprint == Task("Who?", ["You.", "I."]).fingerprint
    others = [Task("Who?", ["I.", "Me."]), Task("Whom?", ["I.", "You."]), Task("Who?", ["I.", "You.", "We."])]
    assert len({task.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize(
    "row, words",
    [
        ({"completions": ["a", "b"]}, ["prompt", "missing"]),
        ({"prompt": "a"}, ["completions", "missing"]),
        ({"prompt": 3, "completions": ["a", "b"]}, ["prompt", "not text"]),
        ({"prompt": [], "completions": ["a", "b"]}, ["prompt", "not text"]),
        ({"prompt": "a", "completions": "ab"}, ["completions", "list"]),
        ({"prompt": "a", "completions": []}, ["completions", "at least two"]),
        ({"prompt": "a", "completions": ["b", reply("c")]}, ["completions", "entry 1", "string"]),
        ({"prompt": ask("a"), "completions": [reply("c"), "b"]}, ["completions", "entry 1", "messages"]),
        ({"prompt": "a", "completions": ["b", "c", " b\n"]}, ["entries 0 and 2 are equal"]),
        ({"prompt": "a", "completions": ["b", "c"], "made_by": [{}]}, ["made_by", "1 records for 2"]),
        ({"prompt": "a", "completions": ["b", "c"], "made_by": ["sft", "ppo"]}, ["made_by", "records"]),
        ({"prompt": "a", "completions": ["b", "c"], "gold": {"best": [2]}}, ["gold", "0 to 1"]),
        ({"prompt": "a", "completions": ["b", "c"], "gold": {}}, ["gold", "best"]),
        ({"prompt": "a", "completions": ["b"], "gold": {"best": [0]}}, ["gold", "two or more"]),
        ({"prompt": "a", "completions": ["b", "c"], "category": "\ud83d"}, ["category", "text"]),
        ({"prompt": "a", "completions": ["b", "c"], "row": 10**30}, ["row", "2^63"]),
        ({"prompt": "a", "completions": ["b", "c"], "wanted": 10**30}, ["wanted"]),
        ({"prompt": "a", "completions": ["b", "c"], "gold": {"best": [0, 1]}}, ["gold", "every completion"]),
        ({"prompt": "a", "completions": ["b", "c"], "wanted": 0}, ["wanted", "at least 1"]),
        ({"prompt": "a", "completions": ["b", "c"], "wanted": True}, ["wanted", "at least 1"]),
        ({"prompt": "a", "completions": ["b", "c"], "batch": 1}, ["batch", "text"]),
        ({"prompt": "a", "completions": ["b", "c"], "row": "1"}, ["row", "whole number"]),
        ({"prompt": "a", "completions": ["b", "c"], "chosen": "b"}, ["chosen", "unknown"]),
        ([1, 2], ["list", "object"]),
    ],
)
def test_a_wrong_row_is_named_in_one_line(tmp_path, row, words):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(TASKS[0].to_row()) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_tasks(path)
    message = str(caught.value)
    assert f"{path} row 1: " in message and "\n" not in message
    assert all(word in message for word in words), message


def test_files_that_are_no_tasks(tmp_path):
    path = tmp_path / "tasks.jsonl"
    for content, words in (("", "no tasks"), ("{not json", "row 0"), ("[" * 100_000, "row 0")):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=words):
            read_tasks(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_tasks(tmp_path / "missing.jsonl")
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="cannot be read"):
        read_tasks(path)


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, n_completions, word",
    [
        (None, 2, "object"),
        ({}, 2, "preference is missing"),
        ({}, 3, "ranks is missing"),
        ({}, 1, "ratings is missing"),
        ({"preference": 0}, 2, "from 1"),
        ({"preference": 8}, 2, "from 1"),
        ({"preference": True}, 2, "from 1"),
        ({"preference": 2.0}, 2, "from 1"),
        ({"preference": "2"}, 2, "from 1"),
        ({"preference": 2}, 3, "does not fit 3"),
        ({"preference": 2}, 1, "give ratings"),
        ({"ranks": [1, 2]}, 2, "does not fit 2"),
        ({"ranks": [1, 2]}, 3, "list of 3 ranks"),
        ({"ranks": [1, 2, 4]}, 3, "1 (best) to 3"),
        ({"preference": 2, "skip": True}, 2, "exclude each other"),
        ({"skip": "yes"}, 2, "give true"),
        ({"preference": 2, "winner": 1}, 2, "'winner' is unknown"),
        ({"preference": 2, "flags": [["rude"], []]}, 2, "harmful, nonsense, wrong_language"),
        ({"preference": 2, "flags": [["harmful"]]}, 2, "list of 2 lists"),
        ({"preference": 2, "flags": [[["harmful"]], []]}, 2, "harmful, nonsense"),
        ({"preference": 2, "ratings": [8, None]}, 2, "1 to 7"),
        ({"preference": 2, "ratings": [5]}, 2, "list of 2 ratings"),
        ({"preference": 2, "comment": "a" * 2001}, 2, "2,001 characters"),
        ({"preference": 2, "comment": 5}, 2, "give text"),
        ({"preference": 2, "category": "a" * 101}, 2, "101 characters"),
        ({"preference": 2, "edited": {"position": 2, "text": "a"}}, 2, "give 0 to 1"),
        ({"preference": 2, "edited": {"position": 0, "text": " "}}, 2, "no text"),
        ({"preference": 2, "edited": {"position": 0, "text": "a" * 20_001}}, 2, "20,001 characters"),
        ({"preference": 2, "edited": "better"}, 2, "position and text"),
    ],
)
def test_a_wrong_answer_is_refused_in_one_line(answer, n_completions, word):
    with pytest.raises(BadAnswer) as caught:
        checked_answer(answer, n_completions)
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_empty_entries_are_left_out():
    answer = {
        "preference": 2,
        "flags": [[], []],
        "ratings": [None, None],
        "comment": " ",
        "category": "",
        "edited": None,
    }
    assert checked_answer(answer | {"skip": False}, 2) == {"preference": 2}
    halves = {"preference": 2, "comment": "\ud83d", "edited": {"position": None, "text": "a\udc00"}}
    json.dumps(checked_answer(halves, 2), ensure_ascii=False).encode()  # can be written to a file


@st.composite
def answers_in_order(draw):
    n = draw(st.integers(1, 6))
    each = st.lists(st.sampled_from(["harmful", "nonsense", "wrong_language"]), unique=True)
    answer = {
        "flags": draw(st.lists(each, min_size=n, max_size=n)),
        "ratings": draw(st.lists(st.integers(1, 7), min_size=n, max_size=n)),
        "edited": {"position": draw(st.none() | st.integers(0, n - 1)), "text": "better"},
    }
    if n == 2:
        answer["preference"] = draw(st.integers(1, 7))
    if n > 2:
        answer["ranks"] = draw(st.lists(st.integers(1, n), min_size=n, max_size=n))
    return checked_answer(answer, n), draw(st.permutations(range(n)))


@given(answers_in_order())
def test_completion_order_and_back(case):
    answer, order = case
    stored = by_completion(answer, order)
    assert by_position(stored, order) == answer
    for position, completion in enumerate(order):
        for name in ("ranks", "ratings", "flags"):
            if name in answer:
                assert stored[name][completion] == answer[name][position]


def test_a_preference_is_about_the_completion_not_the_side():
    # Completion 1 is shown first, and the first is slightly better.
    assert by_completion({"preference": 3}, [1, 0]) == {"preference": 5}
    edited = {"preference": 4, "edited": {"position": 0, "text": "x"}}
    assert by_completion(edited, [1, 0]) == {"preference": 4, "edited": {"completion": 1, "text": "x"}}
