"""Rows with the same prompt are merged into one: copies count once, and merged rows do not change again."""

import json
import random

import pytest
from datasets import Dataset, concatenate_datasets

from hf_rlhf_ext.data.schema import LoadReport, group_by_prompt
from hf_rlhf_ext.readers.formats import load_comparisons

REAL = ("hh_helpful_train.jsonl", "pandalm_testset.json", "formats/lf_oaast_rm_zh.json", "formats/lf_kto_en_demo.json")


def row(number, pairs=((0, 1),), targets=(1.0,), completions=("a", "b"), **more):
    pairs, completions = [list(pair) for pair in pairs], list(completions)
    return {"prompt": "p", "completions": completions, "pairs": pairs, "targets": list(targets), "row": number} | more


def said(annotator, label=1.0, **more):
    return {"votes": [{"annotator": annotator, "pair": [0, 1], "label": label} | more]}


@pytest.mark.parametrize(
    "second, copied",
    [
        (row(1), True),
        (row(1, completions=(" a", "b ")), True),  # equal except for white space
        (row(1, margins=[0.0], weights=[1.0], votes=None, flags=["x"]), True),  # as loaded from a saved dataset
        (row(1, weights=[1 + 1e-10]), True),  # rounded when the file was written
        (row(1, targets=[0.0]), False),  # a contradiction
        (row(1, targets=[0.9]), False),
        (row(1, completions=("b", "a"), targets=[0.0]), False),  # shown in the opposite order: a new judgment
        (row(1, completions=("a", "c")), False),
        (row(1, margins=[2.0]), False),
        (row(1, weights=[0.5]), False),
        (row(1, **said("u")), False),
    ],
)
def test_a_row_that_says_nothing_new_is_a_copy(second, copied):
    report = LoadReport()
    (merged,) = group_by_prompt([row(0), second, row(2, completions=("b", "d"))], report)
    assert len(merged["pairs"]) == 3 - copied
    assert ("duplicated_row" in merged["flags"]) == copied == (report.flagged == {"duplicated_row": [1]})
    assert set(second.get("flags") or ()) <= set(merged["flags"]) and merged["row"] == 0


@pytest.mark.parametrize(
    "second, copied",
    [(said("u"), True), (said("u", confidence=None), True), (said("v"), False), (said("u", 0.0), False)],
)
def test_votes_tell_a_copy_from_a_second_judge(second, copied):
    (merged,) = group_by_prompt([row(0, **said("u")), row(1, **second)])
    assert len(merged["pairs"]) == len(merged["votes"]) == 2 - copied


def test_default_weights_are_made_anew_and_given_ones_kept():
    rows = [row(0, weights=[1.0]), row(1, [(0, 1), (0, 2)], [1.0, 0.0], "acd", weights=[0.5, 0.5])]
    loaded, _ = load_comparisons(Dataset.from_list(rows))
    assert loaded["weights"][:] == [[1 / 3] * 3] and loaded["pairs"][0] == [[0, 1], [0, 2], [0, 3]]
    given, _ = load_comparisons(Dataset.from_list([rows[0] | {"weights": [3.0]}, rows[1]]))
    assert given["weights"][:] == [[3.0, 0.5, 0.5]]


@pytest.mark.parametrize("file", REAL)
def test_loading_what_was_loaded_changes_nothing(shared_data, tmp_path, file):
    once, _ = load_comparisons(shared_data / file, split="train[:800]")
    single, _ = load_comparisons(shared_data / file, split="train[:800]", group=False)
    doubled = concatenate_datasets([once, once])
    for k, source in enumerate((once, single, doubled)):
        (tmp_path / f"{k}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in source))
        for again in (load_comparisons(source)[0], load_comparisons(tmp_path / f"{k}.jsonl")[0]):
            assert len(again) == len(once)
            for one, other in zip(once, again, strict=True):
                flags = set(other.pop("flags")) - {"duplicated_row"}
                assert flags == set(one.pop("flags")) - {"duplicated_row"}
                assert without_nothing(other) == without_nothing(one)


def without_nothing(value):
    """Removes None values, since readers treat a missing cell and None alike."""
    if isinstance(value, dict):
        return {name: without_nothing(cell) for name, cell in value.items() if cell is not None and name != "source"}
    return [without_nothing(cell) for cell in value] if isinstance(value, list) else value


@pytest.mark.timeout(60)
def test_a_prompt_of_many_rows_is_merged_in_seconds_and_right():
    rng = random.Random(0)
    rows = [row(k, completions=rng.sample(range(30_000), 2)) for k in range(20_000)]
    rows = [one | {"completions": [f"answer {c}" for c in one["completions"]]} for one in rows]
    (merged,) = group_by_prompt(rows)
    pairs = [[merged["completions"][k] for k in pair] for pair in merged["pairs"]]
    assert pairs == [one["completions"] for one in rows] and len(set(merged["completions"])) > 20_000
