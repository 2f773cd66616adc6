"""The delimiter of a csv file is found in its header, in every way in which a file is read."""

import gzip

import pytest

from hf_rlhf_ext.readers.files import csv_layout
from hf_rlhf_ext.readers.formats import load_comparisons, load_rows
from hf_rlhf_ext.readers.sources import PreferenceDataError

ROWS = [
    ("question", "answer_a", "answer_b", "winner"),
    ("Is it warm, now?", "Yes; very.", "No | yes", "a"),
    ("Is it cold?", 'He said "no".', "Two\nlines.", "b"),
    ("Is it wet?", "Yes.", "No.", "tie"),
]


def cells(delimiter):
    """The rows as Excel writes them: every cell with a delimiter, a quote or a line break is quoted."""
    lines = []
    for row in ROWS:
        quoted = [
            f'"{cell.replace(chr(34), chr(34) * 2)}"' if set(cell) & set(f'{delimiter}"\n') else cell for cell in row
        ]
        lines.append(delimiter.join(quoted))
    return "\r\n".join(lines) + "\r\n"


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "BOM"])
@pytest.mark.parametrize(
    "name, delimiter",
    [
        ("a.csv", ","),
        ("a.csv", ";"),
        ("a.csv", "\t"),
        ("a.csv", "|"),
        ("a.tsv", "\t"),
        ("a.tsv", ";"),
        ("a.csv.gz", ";"),
    ],
)
def test_comparisons_and_rows_are_the_same_with_every_delimiter(tmp_path, name, delimiter, start):
    path = tmp_path / name
    content = (start + cells(delimiter)).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    comparisons, report = load_comparisons(path)
    assert report.kept == 3 and list(comparisons["targets"]) == [[1.0], [0.0], [0.5]]
    rows = load_rows(path)
    assert rows.column_names == list(ROWS[0])
    assert [tuple(row.values()) for row in rows] == ROWS[1:]


def test_the_line_with_which_excel_names_the_delimiter_is_no_row(tmp_path):
    (tmp_path / "a.csv").write_bytes(("sep=;\r\n" + cells(";")).encode())
    assert len(load_comparisons(tmp_path / "a.csv")[0]) == 3
    assert [tuple(row.values()) for row in load_rows(tmp_path / "a.csv")] == ROWS[1:]


def test_a_folder_with_semicolons(tmp_path):
    (tmp_path / "train.csv").write_text(cells(";"))
    assert load_rows(tmp_path).column_names == list(ROWS[0])
    assert len(load_comparisons(tmp_path)[0]) == 3


def test_a_list_of_texts_may_have_commas(tmp_path):
    """pandas takes the first cells for names of the rows, and shifts the others."""
    (tmp_path / "a.csv").write_text('prompt\nIs it warm, or cold, there?\n"Is it wet, or dry?"\nNo; never.\n')
    assert list(load_rows(tmp_path / "a.csv")["prompt"]) == [
        "Is it warm, or cold, there?",
        "Is it wet, or dry?",
        "No; never.",
    ]


def test_too_many_cells_are_refused_where_pandas_would_shift_them(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,topic\nIs it warm, or cold?,weather\n")
    with pytest.raises(PreferenceDataError, match=r"^a\.csv row 0: more cells than columns: put double quotes"):
        load_rows(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "header, names",
    [
        ('"question; in full",answer', ["question; in full", "answer"]),
        ('"a|b","c\td"', ["a|b", "c\td"]),
        ("question;the better, longer answer;winner", ["question", "the better, longer answer", "winner"]),
        ("question, answer, winner", ["question", " answer", " winner"]),
        ("What is it; really", ["What is it; really"]),
    ],
)
def test_a_delimiter_inside_of_a_name_is_no_delimiter(tmp_path, header, names):
    (tmp_path / "a.csv").write_text(f"{header}\n")
    assert csv_layout(tmp_path / "a.csv").names == names
