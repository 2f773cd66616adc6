"""What a run says about its rows and leaves of them, and which rows a check of its reward model takes."""

import json

import pytest
from datasets import Dataset

from hf_rlhf_ext.cli.options import DataArguments
from hf_rlhf_ext.cli.row_records import HELDOUT_FILE, TRAINED_FILE, RowRecord, trained_prompts, was_trained_on
from hf_rlhf_ext.cli.rows import describe_comparisons, describe_split, train_and_heldout
from hf_rlhf_ext.hub.run_files import run_files
from hf_rlhf_ext.readers.formats import load_comparisons, load_demonstrations
from hf_rlhf_ext.readers.prompts import load_prompts
from recipes.check_reward import without_trained


def pairs(numbers):
    """Rows that a user judged; each third one is a tie."""
    rows = []
    for k in numbers:
        rows.append({"question": f"Is {k} odd?", "answer_a": "Yes.", "answer_b": "No.", "winner": "ab="[k % 3]})
    return [row | {"winner": {"=": "tie"}.get(row["winner"], row["winner"])} for row in rows]


def read(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_comparisons(path)


def data_of(path, **options):
    return DataArguments(dataset_name=str(path), **options)


@pytest.fixture
def run(tmp_path):
    """A folder as training leaves it: 8 of 12 prompts are trained on, 4 held out."""
    rows, _ = read(pairs(range(12)), tmp_path / "pairs.jsonl")
    data = data_of(tmp_path / "pairs.jsonl", eval_rows=4)
    train, heldout = train_and_heldout(rows, data)
    (tmp_path / "rm").mkdir()
    report = RowRecord(data, train, heldout).write(tmp_path / "rm", with_digests=True)
    assert report["rows"] | {"source": ""} == {"source": "", "train": 8, "heldout": 4}
    assert "pairs.jsonl (sha256 " in report["rows"]["source"] and str(tmp_path) not in report["rows"]["source"]
    return tmp_path / "rm"


def test_one_line_on_what_was_read_and_one_on_the_split(tmp_path):
    rows, report = read([*pairs(range(12)), *pairs([3, 4, 5]), {"question": "What?"}], tmp_path / "pairs.jsonl")
    line = describe_comparisons(rows, report)
    assert "\n" not in line and "15 of 16 rows kept" in line and "1 dropped" in line
    assert "12 pairs of 12 prompts, 4 ties" in line and "3 rows merged" in line
    data = data_of("data/pairs.jsonl", train_rows=6, eval_rows=2)
    train, heldout = train_and_heldout(rows, data)
    said = describe_split(data, len(rows), train, heldout, unit="prompts")
    assert said == "pairs.jsonl: 6 prompts to train on, 2 held out (heldout.jsonl), 4 not used"
    all_of_them, none = train_and_heldout(rows, data_of("pairs.jsonl"))
    said = describe_split(data_of("pairs.jsonl"), len(rows), all_of_them, none, unit="prompts")
    assert "12 prompts to train on" in said and "none held out (--eval_rows)" in said


def test_held_out_rows_are_read_again_as_they_were(run):
    again, report = load_comparisons(run / HELDOUT_FILE)
    assert report.kept == 4 and [row["prompt"][-1]["content"] for row in again] == [
        f"Is {k} odd?" for k in range(8, 12)
    ]
    assert list(again["targets"]) == [[0.5], [1.0], [0.0], [0.5]]


def test_demonstrations_with_tools_and_prompts_are_read_again(tmp_path):
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    turns = [{"role": "user", "content": "Go"}, call]
    rows, _ = load_demonstrations([{"messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}]}] * 2)
    RowRecord(data_of("x"), rows.select([0]), rows.select([1])).write(tmp_path)
    again, _ = load_demonstrations(tmp_path / HELDOUT_FILE)
    for column in ("prompt", "completion", "tools"):
        assert again[0][column] == rows[1][column], column
    rows, _ = load_prompts(
        [{"prompt": turns[:1], "answer": 3, "note": None}, {"prompt": turns[:1], "answer": 4, "note": "b"}]
    )
    RowRecord(data_of("x"), rows.select([1]), rows.select([0])).write(tmp_path)
    again, _ = load_prompts(tmp_path / HELDOUT_FILE)
    assert again[0] == {"prompt": turns[:1], "answer": 3}


def test_nothing_held_out_leaves_no_file_and_no_row_is_pushed(run, tmp_path):
    (run / "adapter_model.safetensors").write_bytes(b"")
    assert {HELDOUT_FILE, TRAINED_FILE} <= {path.name for path in run.iterdir()}
    assert not {HELDOUT_FILE, TRAINED_FILE} & run_files(run).keys()
    rows, _ = read(pairs(range(3)), tmp_path / "few.jsonl")
    RowRecord(data_of("x"), rows, rows.select([])).write(run, with_digests=True)
    assert not (run / HELDOUT_FILE).exists()
    assert "odd" not in (run / TRAINED_FILE).read_text()


@pytest.mark.parametrize("change", ["same", "renamed", "other order", "as csv", "with new rows", "other spaces"])
def test_a_check_leaves_out_what_was_trained_on(run, tmp_path, capsys, change):
    rows = pairs(range(12))
    path = tmp_path / ("pairs.jsonl" if change == "same" else "moved.jsonl")
    if change == "other order":
        rows = rows[::-1]
    if change == "other spaces":
        rows = [row | {"question": f" {row['question']}\n"} for row in rows]
    if change == "with new rows":
        rows += pairs(range(20, 30))
    if change == "as csv":
        path = tmp_path / "pairs.csv"
        lines = [",".join(map(str, row.values())) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]))
        comparisons, _ = load_comparisons(path)
    else:
        comparisons, _ = read(rows, path)
    left = without_trained(comparisons, data_of(path), str(run))
    n_new = 14 if change == "with new rows" else 4
    assert len(left) == n_new
    asked = {row["prompt"][-1]["content"].strip() for row in left}
    assert asked.isdisjoint({f"Is {k} odd?" for k in range(8)})
    said = capsys.readouterr().out
    assert f"8 of {len(comparisons)} prompts left out" in said and "--include_trained true" in said
    # A checkpoint is a part of the same run.
    (run / "checkpoint-3").mkdir()
    assert trained_prompts(str(run / "checkpoint-3")) == trained_prompts(str(run))


def test_a_check_on_nothing_else_warns_and_on_held_out_rows_says_nothing(run, tmp_path, capsys):
    rows, _ = read(pairs(range(8)), tmp_path / "trained.jsonl")
    assert len(without_trained(rows, data_of("trained.jsonl"), str(run))) == 8
    said = capsys.readouterr().err
    assert "warning: " in said and "trained on all 8 prompts" in said and "--eval_rows" in said
    heldout, _ = load_comparisons(run / HELDOUT_FILE)
    assert len(without_trained(heldout, data_of(run / HELDOUT_FILE), str(run))) == 4
    assert capsys.readouterr() == ("", "")


def test_a_folder_without_digests_is_recognized_by_its_report(tmp_path, capsys):
    """As older folders and those of the Hub have none."""
    rows, _ = read(pairs(range(3)), tmp_path / "pairs.jsonl")
    (tmp_path / "rm").mkdir()
    record = RowRecord(data_of(tmp_path / "pairs.jsonl"), rows, rows.select([])).write(tmp_path / "rm")
    report = {"card": {"kind": "reward_model", "lineage": {"comparisons": record["rows"]["source"]}}}
    (tmp_path / "rm" / "report.json").write_text(json.dumps(report))
    (tmp_path / "pairs.jsonl").rename(tmp_path / "other.jsonl")
    assert len(without_trained(rows, data_of(tmp_path / "other.jsonl"), str(tmp_path / "rm"))) == 3
    assert "was trained on" in capsys.readouterr().err
    read(pairs(range(4)), tmp_path / "new.jsonl")
    assert not was_trained_on(str(tmp_path / "rm"), data_of(tmp_path / "new.jsonl"))
    assert not was_trained_on(str(tmp_path), data_of(tmp_path / "new.jsonl"))


def test_a_value_that_json_lacks_is_said(tmp_path, capsys):
    rows = Dataset.from_list([{"prompt": "Now?", "when": b"\xff"}] * 2)
    RowRecord(data_of("x"), rows.select([0]), rows.select([1])).write(tmp_path)
    assert "heldout.jsonl is not written" in capsys.readouterr().out
    assert not (tmp_path / HELDOUT_FILE).exists()


def test_a_held_out_prompt_is_not_trained_on_with_other_white_space():
    rows = Dataset.from_list([{"prompt": text} for text in ("a  b", "c", "d", " a b\n", "e")])
    train, heldout = train_and_heldout(rows, data_of("rows.jsonl", train_rows=3, eval_rows=1))
    assert train["prompt"][:] == ["a  b", "c", "d"] and heldout["prompt"][:] == ["e"]
