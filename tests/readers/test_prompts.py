"""Prompts without answers: text files with one a line, tables, and what is said about them."""

import gzip

import pytest

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.readers.prompts import load_prompts

LINES = "\ufeffName a color.\r\n\r\n  Name a fish, please.\r\n \t \r\nName a tree.\r\n\r\n\r\n"


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.txt.gz"])
def test_one_prompt_a_line_and_blank_lines_are_said(tmp_path, name):
    content = LINES.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows, report = load_prompts(tmp_path / name)
    assert list(rows["prompt"]) == ["Name a color.", "Name a fish, please.", "Name a tree."]
    assert report.summary() == f"{name}: 3 of 5 rows kept; 2 dropped: blank line (row 1, 3)"


@pytest.mark.parametrize("column", ["question", "Question", "text", "anything"])
def test_the_only_column_is_named_in_the_remedy(tmp_path, column):
    (tmp_path / "q.csv").write_text(f"{column}\nName a color.\nName a fish.\n")
    with pytest.raises(UserError, match=rf'--columns "\{{prompt: {column}\}}"'):
        load_prompts(tmp_path / "q.csv")
    rows, report = load_prompts(tmp_path / "q.csv", columns={"prompt": column})
    assert [row["prompt"][-1]["content"] for row in rows] == ["Name a color.", "Name a fish."]
    assert report.kept == 2


def test_a_system_text_that_is_not_read_and_an_empty_prompt_are_said():
    rows = [{"prompt": "Name a color.", "system": "Be brief."}, {"prompt": " ", "system": "Be brief."}]
    _, report = load_prompts(rows)
    assert "empty_prompt (row 1)" in report.summary() and "not read: system (prompt material)" in report.summary()
    built, report = load_prompts(rows[:1], columns={"prompt": "prompt", "system": "system"})
    assert built[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert "not read" not in report.summary()
