"""Sources: folders, tables in memory, text and Excel files give the same rows as a file of the same content."""

import csv
import gzip
import json

import pandas
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.data.schema import PreferenceDataError
from hf_rlhf_ext.readers.formats import load_comparisons, load_demonstrations, load_rows
from hf_rlhf_ext.readers.sources import open_source

REPLIES = ["None", "NA", "null", "nan", "42", "1e5", "007", "True", "", 'well, "yes"\nno', " x "]
"""Replies that a csv reader may take for a missing value or a number."""
ROWS = [{"prompt": f"{n}?", "chosen": reply, "rejected": "something else"} for n, reply in enumerate(REPLIES)]


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_read(source, **options):
    dataset, report = load_comparisons(source, group=False, **options)
    assert report.rows_in == report.kept + sum(map(len, report.dropped.values()))
    return [{name: row[name] for name in ("prompt", "completions", "targets")} for row in dataset]


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write, name", [(write_csv, "train.csv"), (write_jsonl, "train.jsonl")])
@pytest.mark.parametrize("folder", [".", "data"])
def test_a_folder_of_files_gives_what_its_files_give(tmp_path, write, name, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    path = write(tmp_path / folder / name, ROWS)
    assert len(rows_read(path)) == len(ROWS)
    assert rows_read(tmp_path) == rows_read(path)
    assert rows_read(tmp_path, split="train[2:5]") == rows_read(path)[2:5]
    with_text = load_rows(tmp_path, "train")["chosen"]
    assert [text or "" for text in with_text] == load_rows(path)["chosen"]


@pytest.mark.parametrize("as_folder", [False, True])
def test_csv_rows_that_are_not_converted_keep_text_too(tmp_path, as_folder):
    path = write_csv(tmp_path / "train.csv", [row | {"score": 4} for row in ROWS])
    rows = load_rows(tmp_path, "train") if as_folder else load_rows(path)
    assert rows["chosen"] == REPLIES and rows["score"] == [4] * len(ROWS)


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=12), min_size=1, max_size=5)
)
@settings(max_examples=15, deadline=None)
def test_any_reply_survives_in_a_folder_of_csv(tmp_path_factory, replies):
    folder = tmp_path_factory.mktemp("folder")
    rows = [{"prompt": str(n), "chosen": reply} for n, reply in enumerate(replies)]
    write_csv(folder / "train.csv", rows)
    assert list(open_source(folder).rows) == rows


def test_splits_may_have_other_types_in_a_column(tmp_path):
    """A column of the held-out rows may be the first one with a value, or with a fraction."""
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": str(n), "answer": None, "n": n} for n in range(3)])
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": "a", "answer": "b", "n": 0.5}])
    assert load_rows(tmp_path, "train")["n"] == [0, 1, 2]
    assert load_rows(tmp_path, "test")[0] == {"prompt": "a", "answer": "b", "n": 0.5}


def test_several_files_and_splits_of_a_folder(tmp_path):
    for n in range(3):
        write_csv(tmp_path / f"train-0000{n}-of-00003.csv", [ROWS[n]])
    write_csv(tmp_path / "test.csv", ROWS[:1])
    assert rows_read(tmp_path, split="train") == rows_read(write_jsonl(tmp_path / "rows.json", ROWS[:3]))
    (tmp_path / "rows.json").unlink()
    assert len(rows_read(tmp_path, split="train[1:]+test")) == 3
    for split in (None, "dev"):
        with pytest.raises(PreferenceDataError, match="splits are .*train.*: pass one of them as split="):
            load_comparisons(tmp_path, split=split)


def test_an_unreadable_file_of_a_folder_is_named(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"prompt,chosen,rejected\n\xe9,a,b\n")
    with pytest.raises(PreferenceDataError, match="^train.csv: .*line 2 is not UTF-8"):
        load_comparisons(tmp_path)


# --- rows in memory ---------------------------------------------------------------------------------------------------


def test_lists_and_tables_in_memory_are_read_like_files(tmp_path):
    expected = rows_read(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    for source in (ROWS, pandas.DataFrame(ROWS), Dataset.from_list(ROWS)):
        assert rows_read(source) == expected
        assert rows_read(source, split="train[3:]") == expected[3:]
        assert load_rows(source)["chosen"] == REPLIES
    assert list(load_rows(ROWS, streaming=True))[0] == ROWS[0]


def test_cells_of_a_dataframe_are_plain_values(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    table = pandas.DataFrame({"messages": [turns, turns], "rating": [4, float("nan")], "topic": [pandas.NA, "x"]})
    table.to_parquet(tmp_path / "rows.parquet")
    for source in (table, pandas.read_parquet(tmp_path / "rows.parquet")):  # the second has arrays for lists
        dataset, report = load_demonstrations(source, category_column="topic")
        assert dataset["prompt"][:] == [turns[:1]] * 2 and report.kept == 2
        assert dataset["rating"][:] == [4.0, None] and dataset["category"][:] == [None, "x"]


def test_numbers_in_a_text_column_of_a_dataframe_are_text():
    table = pandas.DataFrame({"prompt": ["a", "b"], "chosen": [42, 43], "rejected": [1.5, 2.5]})
    assert rows_read(table)[0]["completions"] == ["42", "1.5"]


@pytest.mark.parametrize("source, message", [([], "no rows"), (5, "got int"), (pandas.DataFrame(), "no rows")])
def test_what_is_no_table_is_one_line(source, message):
    with pytest.raises(PreferenceDataError, match=message) as caught:
        load_comparisons(source)
    assert "\n" not in str(caught.value)


def test_an_entry_that_is_no_row_is_dropped():
    dataset, report = load_comparisons([*ROWS, "junk"], group=False)
    assert report.dropped == {"not a dict": [len(ROWS)]} and len(dataset) == len(ROWS)


# --- single files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["prompt,chosen,rejected", "prompt,chosen,rejected\n", "prompt,chosen,rejected\r\n\r\n"]
)
def test_a_csv_with_nothing_but_its_header_says_so(tmp_path, text):
    (tmp_path / "rows.csv").write_text(text)
    for source in (tmp_path / "rows.csv", tmp_path):
        with pytest.raises(PreferenceDataError, match=r"^rows.csv: .*header \(prompt, chosen, rejected\) and no rows"):
            load_comparisons(source)


@pytest.mark.parametrize(
    "value, n_rows",
    [
        ({"id": "1", "data": ["q", "a"]}, 1),  # UltraChat
        ({"data": ["q", "a"]}, 1),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, 1),
        ({"instruction": "q", "completions": [{"response": "a"}, {"response": "b"}]}, 1),
        ({"data": [{"instruction": "q", "output": "a"}, {"instruction": "r", "output": "b"}]}, 2),
        ({"version": "1.0", "data": [{"instruction": "q", "output": "a"}] * 3}, 3),
        ([{"instruction": "q", "output": "a"}] * 2, 2),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_is_a_row_unless_it_holds_rows(tmp_path, value, n_rows, indent):
    (tmp_path / "rows.json").write_text(json.dumps(value, indent=indent))
    rows = list(open_source(tmp_path / "rows.json").rows)
    assert len(rows) == n_rows and all(isinstance(row, dict) for row in rows)
    if n_rows == 1:
        assert rows == [value]


@pytest.mark.parametrize("packed", [False, True])
def test_a_text_file_has_one_prompt_per_line(tmp_path, packed):
    text = "\ufeffName a blue thing.\n\n  42  \r\nNone\n".encode()
    path = tmp_path / ("prompts.txt.gz" if packed else "prompts.txt")
    path.write_bytes(gzip.compress(text) if packed else text)
    assert load_rows(path).to_list() == [{"prompt": text} for text in ("Name a blue thing.", "42", "None")]
    assert load_rows(path, "train[:1]").num_rows == 1
    with pytest.raises(PreferenceDataError, match=r"has one prompt per line and no answers; .*\.jsonl"):
        load_comparisons(path)


def test_an_empty_text_file_is_one_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(PreferenceDataError, match="^prompts.txt: .*empty: write one prompt per line"):
        load_rows(tmp_path / "prompts.txt")


def test_an_excel_file_is_read_or_says_what_to_install(tmp_path):
    path = tmp_path / "rows.xlsx"
    try:
        import openpyxl  # noqa: F401
    except ImportError:
        path.write_bytes(b"")
        with pytest.raises(PreferenceDataError, match="^rows.xlsx: .*pip install openpyxl"):
            load_comparisons(path)
        return
    table = pandas.DataFrame([row | {"chosen": row["chosen"] or "-", "margin": 2} for row in ROWS], dtype=object)
    table.loc[0, "chosen"] = 42
    table.to_excel(path, index=False)
    assert [row["completions"][0] for row in rows_read(path)] == ["42", *table["chosen"][1:]]
    assert load_rows(path)["margin"] == [2] * len(ROWS)
    with pandas.ExcelWriter(path) as writer:
        table.to_excel(writer, sheet_name="one", index=False)
        table[:2].to_excel(writer, sheet_name="two", index=False)
    with pytest.raises(PreferenceDataError, match="sheets with rows are one, two: pass one of them as config="):
        load_comparisons(path)
    assert len(rows_read(path, config="two")) == 2
    path.write_bytes(b"junk")
    with pytest.raises(PreferenceDataError, match="^rows.xlsx: cannot be read as xlsx: "):
        load_comparisons(path)


def test_a_table_with_tabs_is_read(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("prompt\tchosen\trejected\nWhat?\ta, b\t42\n", encoding="utf-8")
    assert rows_read(path)[0]["completions"] == ["a, b", "42"]
    assert load_rows(path)[0] == {"prompt": "What?", "chosen": "a, b", "rejected": "42"}


def test_a_split_that_a_list_lacks_is_one_line():
    with pytest.raises(PreferenceDataError, match=r"^dataset: splits are train: pass one .*'test'"):
        load_comparisons(ROWS, split="test")
    with pytest.raises(PreferenceDataError, match=r"one of \['train'\]: write a slice"):
        load_comparisons(ROWS, split="test[:2]")


def test_columns_without_a_name_may_follow_a_table(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected,,\nWhat?,a,b,,\n", encoding="utf-8")
    assert rows_read(path)[0]["completions"] == ["a", "b"]
