"""Comparison rows: validation, error messages, and the conversion of TRL's rows."""

import json
import re

import pytest
from datasets import Dataset, DatasetDict

from hf_rlhf_ext.data.schema import PreferenceDataError, renumbered, validate_comparison
from hf_rlhf_ext.readers.formats import load_comparisons, to_comparisons


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ROW = {"prompt": "p", "completions": ["a", "b", "c"], "pairs": [[0, 1], [2, 0]], "targets": [1.0, 0.5]}


def test_valid_rows_pass():
    validate_comparison(ROW)
    validate_comparison(ROW | {"weights": [0, 2.5], "margins": [-1.0, 0], "prompt": ""})
    judged = {"pairs": [[1, 0]], "targets": [0]}
    validate_comparison({"prompt": [user("p")], "completions": [[assistant("a")], [assistant("")]]} | judged)


@pytest.mark.parametrize(
    "change, column, remedy",
    [
        ({"targets": None}, "targets", "needs prompt, completions, pairs, targets"),
        ({"prompt": 3}, "prompt", "give a string or a list of messages"),
        ({"prompt": [{"role": "user"}]}, "prompt", "give a string or a list of messages"),
        ({"completions": ["a"]}, "completions", "at least two"),
        ({"completions": ["a", True]}, "completions", "entry 1 is a bool: give a string"),
        ({"completions": ["a", [assistant("b")]]}, "completions", "entry 1 is a list: give a string"),
        ({"prompt": [user("p")]}, "completions", "entry 0 is a str: give a list of messages"),
        ({"completions": ["a", "b", "a"]}, "completions", "0 and 2 are equal: merge them"),
        ({"pairs": []}, "pairs", "give at least one"),
        ({"pairs": "01"}, "pairs", "give a list"),
        ({"pairs": [[0, 1]]}, "targets", "2 entries for 1 pairs: give one per pair"),
        ({"pairs": [[0, 1], [0, 3]]}, "pairs", "[0, 3]: give two indices between 0 and 2"),
        ({"pairs": [[0, 1], [-1, 0]]}, "pairs", "[-1, 0]: give two indices"),
        ({"pairs": [[0, 1], [0, 1, 2]]}, "pairs", "[0, 1, 2]: give two indices"),
        ({"pairs": [[0, 1], [True, 0]]}, "pairs", "[True, 0]: give two indices"),
        ({"pairs": [[0, 1], [2, 2]]}, "pairs", "[2, 2]: a completion cannot be compared with itself"),
        ({"targets": [1.0, 1.5]}, "targets", "1.5: give a probability"),
        ({"targets": [1.0, float("nan")]}, "targets", "nan: give a probability"),
        ({"weights": [1.0, -1.0]}, "weights", "-1.0: give a finite number that is not negative"),
        ({"weights": [1.0, float("inf")]}, "weights", "inf: give a finite number"),
        ({"weights": [1.0]}, "weights", "1 entries for 2 pairs: give one per pair"),
        ({"margins": [0.0, "much"]}, "margins", "'much': give a finite number, i minus j"),
        ({"votes": [{"annotator": "x", "pair": [0, 1], "label": 2}]}, "votes", "label (0 to 1)"),
        ({"votes": [{"annotator": "x", "pair": [0, 1], "label": 1, "confidence": "?"}]}, "votes", "give annotator"),
        ({"category": 3}, "category", "leave it out"),
        ({"row": 0.5}, "row", "give an int, or leave it out"),
    ],
)
def test_refusals_name_source_row_column_and_remedy_in_one_line(change, column, remedy):
    with pytest.raises(PreferenceDataError) as caught:
        validate_comparison(ROW | change, source="mine.jsonl", index=7)
    text = str(caught.value)
    assert text.startswith(f"mine.jsonl row 7: `{column}` ") and remedy in text and "\n" not in text


@pytest.mark.parametrize("kept_pairs, targets", [(None, [1.0, 0.0, 0.5]), ([0, 2], [1.0, 0.5]), ([2], [0.5])])
def test_judgments_follow_completions_that_get_new_numbers(kept_pairs, targets):
    row = {"prompt": "p", "completions": list("abcd"), "pairs": [[0, 1], [3, 0], [1, 3]], "targets": [1.0, 0.0, 0.5]}
    row |= {"margins": [1.0, 2.0, 3.0], "weights": None, "flags": ["f"]}
    row["votes"] = [{"annotator": "x", "pair": pair, "label": 1.0} for pair in ([0, 1], [3, 1], [2, 3])]
    changed = renumbered(row, {0: 2, 1: 0, 3: 1}, kept_pairs)
    pairs = [[2, 0], [1, 2], [0, 1]]
    assert changed["pairs"] == [pairs[n] for n in kept_pairs or range(3)] and changed["targets"] == targets
    assert changed["margins"] == [row["margins"][n] for n in kept_pairs or range(3)] and changed["weights"] is None
    assert [vote["pair"] for vote in changed["votes"]] == [[2, 0], [1, 0]]  # completion 2 was removed
    assert renumbered(row | {"votes": row["votes"][2:]}, {0: 0, 1: 1, 3: 2})["votes"] is None
    assert row["pairs"][0] == [0, 1] and row["votes"][0]["pair"] == [0, 1]  # the original row is unchanged


def test_comparison_rows_get_default_weights_and_survive_arrow():
    rows = [ROW | {"votes": None}, ROW | {"prompt": "q", "pairs": [[1, 2]], "targets": [0.3], "margins": None}]
    rows[1]["votes"] = [{"annotator": "x", "pair": [1, 2], "label": 0}]
    dataset, report = to_comparisons(Dataset.from_list(rows), source="mine")
    assert dataset[0]["weights"] == [0.5, 0.5] and dataset[1]["weights"] == [1.0]
    assert dataset[0]["margins"] == [0.0, 0.0] and dataset[0]["flags"] == []
    assert dataset[1]["votes"][0]["annotator"] == "x" and list(dataset["row"]) == [0, 1]
    assert (report.rows_in, report.kept, report.dropped) == (2, 2, {})
    again, _ = to_comparisons(Dataset.from_list(dataset.map(lambda row: row).to_list()))
    assert again.to_list() == dataset.to_list() and again.features == dataset.features


def test_an_invalid_comparison_row_is_named():
    with pytest.raises(PreferenceDataError, match=r"^mine row 1: `pairs` holds \[0, 9\]"):
        to_comparisons(Dataset.from_list([ROW, ROW | {"pairs": [[0, 9], [0, 1]]}]), source="mine")


def test_trl_rows_with_prompt():
    rows = [
        {"prompt": "p ", "chosen": "yes", "rejected": "no", "margin": 1.5, "category": "qa"},
        {"prompt": "p", "chosen": "same", "rejected": "same", "margin": 0.0, "category": None},
        {"prompt": "p", "chosen": "x", "rejected": "", "margin": None, "category": "chat"},
        {"prompt": "p", "chosen": None, "rejected": "", "margin": None, "category": None},
    ]
    dataset, report = to_comparisons(Dataset.from_list(rows), source="f.jsonl")
    assert dataset[0] == {
        "prompt": "p ", "completions": ["yes", "no"], "pairs": [[0, 1]], "targets": [1.0], "weights": [1.0],
        "margins": [1.5], "flags": [], "category": "qa", "source": "f.jsonl", "row": 0,
    }  # fmt: skip
    assert dataset[1]["flags"] == ["empty_completion"] and list(dataset["row"]) == [0, 2]
    assert report.dropped == {"chosen and rejected are equal": [1], "chosen is missing": [3]}
    assert report.summary() == (
        "f.jsonl: 2 of 4 rows kept; 1 dropped: chosen and rejected are equal (row 1); "
        "1 dropped: chosen is missing (row 3); 1 flagged: empty_completion (row 2)"
    )


def test_trl_messages_with_and_without_prompt_give_the_same_rows():
    explicit = {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    implicit = {side: explicit["prompt"] + explicit[side] for side in ("chosen", "rejected")}
    # TRL ignores a text prompt next to whole conversations, and extracts the prompt from them.
    mixed = implicit | {"prompt": "hi"}
    results = [to_comparisons(Dataset.from_list([row]))[0].to_list() for row in (explicit, implicit, mixed)]
    assert results[0] == results[1] == results[2]
    assert results[0][0]["prompt"] == [user("hi")]
    assert results[0][0]["completions"] == [[assistant("yes")], [assistant("no")]]


def test_messages_that_share_nothing_are_dropped_and_counted():
    rows = [
        {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]},
        {"chosen": [user("a"), assistant("x")], "rejected": [user("a"), assistant("y")]},
    ]
    dataset, report = to_comparisons(Dataset.from_list(rows))
    assert report.dropped == {"the two sides share no prompt": [0]} and len(dataset) == 1


def test_transcripts_split_at_the_common_history():
    history = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: name?\n\nAssistant:"
    rows = [
        {"chosen": history + " Ann\n\nAssistant: or Bob", "rejected": history + " Anna"},
        {"chosen": history + " ", "rejected": history + " Ann"},
        {"chosen": history + " Ann", "rejected": history.replace("name?", "who?") + " Bob"},
    ]
    dataset, report = to_comparisons(Dataset.from_list(rows))
    assert dataset[0]["prompt"] == [user("hi"), assistant("hello"), user("name?")]
    assert dataset[0]["completions"] == [[assistant("Ann\n\nAssistant: or Bob")], [assistant("Anna")]]
    assert dataset[1]["completions"][0] == [assistant("")] and dataset[1]["flags"] == ["empty_completion"]
    assert dataset[2]["prompt"] == [user("hi")] and dataset[2]["flags"] == ["histories_differ"]
    assert report.flagged == {"empty_completion": [1], "histories_differ": [2]}


@pytest.mark.parametrize(
    "data, message",
    [
        (Dataset.from_dict({"chosen": [], "rejected": []}), "check path, split and filters"),
        (
            Dataset.from_dict({"text": ["a"], "better": ["b"]}),
            "better, text, no known comparisons: did you mean columns={",
        ),
        (Dataset.from_dict({"prompt": ["p"], "chosen": ["a"], "rejected": ["a"]}), "check the source"),
        (DatasetDict(), "DatasetDict: pick one split"),
        (
            Dataset.from_dict({"chosen": ["a"], "rejected": ["b"]}).to_iterable_dataset(),
            "pick one split, without streaming",
        ),
    ],
)
def test_unusable_data_sets_are_refused_in_one_line(data, message):
    with pytest.raises(PreferenceDataError) as caught:
        to_comparisons(data, source="mine")
    assert message in str(caught.value) and str(caught.value).startswith("mine: ") and "\n" not in str(caught.value)


def test_load_comparisons_from_files_folders_and_memory(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": str(k)} for k in range(4)]
    data = Dataset.from_list(rows)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))  # no final newline
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    data.to_parquet(tmp_path / "pairs.parquet")
    data.to_csv(tmp_path / "pairs.csv", index=False)
    data.to_json(tmp_path / "pairs.jsonl.gz", compression="gzip")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"test": data}).save_to_disk(tmp_path / "splits")
    expected = to_comparisons(data)[0].remove_columns("row").to_list()
    for name in ("pairs.jsonl", "pairs.json", "pairs.parquet", "pairs.jsonl.gz", "saved", "splits"):
        found, report = load_comparisons(tmp_path / name, group=False)
        assert found.remove_columns(["row", "source"]).to_list() == expected, name
        assert report.source == name and report.kept == 4
    assert load_comparisons(data, group=False)[0].remove_columns("row").to_list() == expected
    head, _ = load_comparisons(tmp_path / "pairs.csv", split="train[:2]", group=False)
    assert head.remove_columns(["row", "source"]).to_list() == expected[:2]  # numbers in text columns stay text


@pytest.mark.parametrize(
    "name, split, message",
    [
        ("missing.jsonl", None, "missing.jsonl: check the path"),
        ("notes.txt", None, "notes.txt: .* known are .json"),
        ("bad.jsonl", None, "bad.jsonl: .* json: "),
        ("pairs.jsonl", "test", r"pairs.jsonl: .*'test': leave it out"),
        ("splits", None, "splits: .* a, b: pass one of them as split="),
        ("splits", "c", r"splits: .* a, b: pass one of them as split= .*'c'"),
    ],
)
def test_load_comparisons_refusals(tmp_path, name, split, message):
    row = {"chosen": "a", "rejected": "b"}
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"chosen": "a", "rejected"')
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    both = Dataset.from_list([row])
    DatasetDict({"a": both, "b": both}).save_to_disk(tmp_path / "splits")
    with pytest.raises(PreferenceDataError) as caught:
        load_comparisons(tmp_path / name, split=split)
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)


def test_hh_helpful_is_read_with_its_dirt_counted(shared_data):
    dataset, report = load_comparisons(shared_data / "hh_helpful_train.jsonl")
    assert (report.rows_in, report.kept) == (4000, 3999)
    assert report.dropped == {"chosen and rejected are equal": [2672]}
    assert report.flagged == {"empty_completion": [1951, 2673]}
    assert all(len(row["prompt"]) == 1 and row["prompt"][0]["role"] == "user" for row in dataset)
    fake = [row["row"] for row in dataset if any("\n\nAssistant:" in c[0]["content"] for c in row["completions"])]
    assert fake == [
        203,
        228,
        424,
        1394,
        1429,
        1987,
        2214,
        2411,
        3877,
        3978,
    ]  # "Assistant:" is part of the reply, not of the prompt


def test_hh_harmless_keeps_every_row_and_flags_differing_histories(shared_data):
    _, report = load_comparisons(shared_data / "hh_harmless_test.jsonl.gz")
    assert (report.rows_in, report.kept, report.dropped) == (2312, 2312, {})
    assert report.flagged["empty_completion"] == [86, 516, 925, 1103]
    assert set(report.flagged.get("histories_differ", [])) <= {1254, 1688, 1950, 1952, 2036}
