"""Code shared by all readers: each source row is counted once, as kept or as dropped with a reason."""

import pytest
from datasets import Dataset, DatasetDict

from hf_rlhf_ext.data.conversion import (
    Reading,
    collect,
    convert,
    keep_one_kind,
    list_columns,
    read_each,
    readable_rows,
    require_rows,
    with_labels,
)
from hf_rlhf_ext.data.schema import LoadReport, PreferenceDataError, Unusable


def comparison(prompt="p", first="a", second="b", **more):
    return {"prompt": prompt, "completions": [first, second], "pairs": [[0, 1]], "targets": [1.0]} | more


def converted(readings, **options):
    report = LoadReport(source="mine")
    return list(convert(readings, report, **options)), report


def test_rows_are_numbered_and_those_that_could_not_be_read_are_dropped():
    report = LoadReport()
    rows = list(readable_rows([{"a": 1}, "not JSON", {"a": 2}, "not JSON"], report))
    assert rows == [(0, {"a": 1}), (2, {"a": 2})]
    assert report.rows_in == 4 and report.dropped == {"not JSON": [1, 3]}


def test_what_a_reader_cannot_read_becomes_a_reason():
    def read(row, index):
        if index == 0:
            raise Unusable("broken")
        if index == 1:
            raise RecursionError
        return {"prompt": row["question"]}

    readings = list(read_each([(0, {}), (1, {}), (2, {}), (3, {"question": "q"})], read))
    assert [reading.indices for reading in readings] == [[0], [1], [2], [3]]
    assert [str(reading.result) for reading in readings[:3]] == ["broken", "nested too deeply", "question is missing"]
    assert readings[3].result == {"prompt": "q"}


def test_a_bug_in_a_reader_is_not_taken_for_bad_data():
    def read(row, index):
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        list(read_each([(0, {})], read))


def test_labels_are_those_of_the_source_unless_the_reader_knows_better():
    row = {"category": "qa", "topic": 3, "source": "web"}
    assert with_labels({"prompt": "p"}, row) == {"category": "qa", "source": "web", "prompt": "p"}
    assert with_labels({"category": "own", "source": None}, row, "topic") == {"category": "own", "source": "web"}
    assert with_labels([{"prompt": "p"}, {"category": "own"}], row, "topic") == [
        {"category": "3", "source": "web", "prompt": "p"},
        {"category": "own", "source": "web"},
    ]
    assert with_labels({}, {"category": ["qa"], "source": True}) == {"category": None, "source": None}


def test_rows_are_settled_numbered_and_named_after_their_source():
    parts, report = converted([Reading([4], comparison(first="a", second=" ", category=None)), Reading([7, 5], [])])
    (part,) = parts
    assert part.indices == [4] and part.flags == ["empty_completion"] and part.is_text
    assert part.rows == [
        {"source": "mine", "row": 4, "prompt": "p", "completions": ["a", " "], "pairs": [[0, 1]], "targets": [1.0]}
        | {"flags": ["empty_completion"]}
    ]
    assert report.dropped == {"no usable part": [7, 5]}


def test_a_row_s_own_place_wins_and_several_source_rows_take_the_first_number():
    parts, _ = converted([Reading([9, 3], [comparison(), comparison(row=80, source="web")])])
    assert [(row["source"], row["row"]) for row in parts[0].rows] == [("mine", 3), ("web", 80)]


def test_one_bad_part_of_a_reading_is_left_out_and_named():
    parts, report = converted([Reading([0], [comparison("half \ud800"), comparison(), comparison(second="a ")])])
    assert len(parts[0].rows) == 1 and parts[0].flags == ["partly left out: completions are equal"]
    _, report = converted([Reading([2], [comparison(second="a"), comparison("half \ud800")])])
    assert [*report.dropped.values()] == [[2]] and "surrogate" in [*report.dropped][0]


def test_validated_rows_stay_as_they_are():
    own = comparison(first="a", second="a ")  # equal except for white space, but given as different completions
    parts, report = converted([Reading([0], own)], valid=True)
    assert parts[0].rows[0]["completions"] == ["a", "a "] and not report.dropped
    assert converted([Reading([0], own)])[1].dropped == {"completions are equal": [0]}


def test_demonstrations_have_nothing_to_settle():
    parts, _ = converted([Reading([0], {"prompt": "p", "completion": "c", "flags": ["f"]})])
    assert parts[0].rows == [{"source": "mine", "row": 0, "prompt": "p", "completion": "c", "flags": ["f"]}]


CHAT = [{"role": "user", "content": "q"}]
ANSWERS = [[{"role": "assistant", "content": text}] for text in "ab"]


@pytest.mark.parametrize("text, kept, dropped", [(None, [0], [1, 2]), (True, [0], [1, 2]), (False, [1, 2], [0])])
def test_prompts_of_one_kind_are_kept_and_counted(text, kept, dropped):
    chat = comparison(CHAT, *ANSWERS, flags=["seen"])
    parts, report = converted([Reading([0], comparison(flags=["seen"])), Reading([1, 2], chat)])
    rows = list(keep_one_kind(parts, report, text=text))
    assert len(rows) == 1 and isinstance(rows[0]["prompt"], str) == (kept == [0])
    assert report.kept == len(kept) and report.flagged == {"seen": kept}
    assert [*report.dropped.values()] == [dropped] and "but other prompts are" in [*report.dropped][0]


def test_the_more_frequent_kind_is_kept_and_messages_where_they_are_as_many():
    texts = [Reading([k], comparison(str(k))) for k in range(2)]
    chats = [Reading([2], comparison(CHAT, *ANSWERS)), Reading([3], comparison(CHAT, *ANSWERS))]
    for readings, wanted in ((texts + chats[:1], str), (texts[:1] + chats, list), (texts + chats, list)):
        parts, report = converted(readings)
        assert {type(row["prompt"]) for row in collect(parts, report)} == {wanted}


def test_nothing_left_is_refused_with_what_was_dropped():
    parts, report = converted([Reading([0], Unusable("broken"))])
    with pytest.raises(PreferenceDataError, match="mine: .*broken.*check the source"):
        collect(parts, report)


@pytest.mark.parametrize(
    "dataset, remedy", [(DatasetDict(), "pick one split"), (Dataset.from_dict({"a": []}), "split and filters")]
)
def test_no_data_set_and_no_rows_are_refused(dataset, remedy):
    with pytest.raises(PreferenceDataError, match=remedy):
        require_rows(dataset, "mine")


def test_columns_are_listed_in_order_and_shortened():
    assert list_columns([]) == "(none)" and list_columns(["b", "a", 3]) == "3, a, b"
    assert list_columns(f"c{k:02}" for k in range(14)).endswith("c11 and 2 more")
    assert list_columns(["x" * 99, "two\nlines"]) == r"'two\nlines', " + "x" * 39 + "…"
