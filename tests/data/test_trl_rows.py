"""TRL's rows and comparison rows are read as `load_comparisons` reads them; other columns are rejected."""

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from hf_rlhf_ext.data.schema import PreferenceDataError
from hf_rlhf_ext.data.trl_rows import read_comparisons
from hf_rlhf_ext.readers.formats import load_comparisons, to_comparisons


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


Q, A, B = [user("q")], [assistant("a")], [assistant("b")]
HISTORY = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: name?\n\nAssistant:"
OWN = {"prompt": "p", "completions": ["a", "b", ""], "pairs": [[0, 1], [2, 1]], "targets": [1.0, 0.5]}

READABLE = {
    "standard, labels and dirt": [
        {"prompt": "p ", "chosen": "yes", "rejected": "no", "margin": 1.5, "category": "qa", "source": "web"},
        {"prompt": "p", "chosen": "same", "rejected": "same", "margin": 0.0, "category": None, "source": None},
        {"prompt": "", "chosen": "x", "rejected": "", "margin": float("nan"), "category": "chat", "source": "web"},
        {"prompt": "p", "chosen": None, "rejected": "", "margin": None, "category": None, "source": "web"},
    ],
    "conversational": [
        {"prompt": Q, "chosen": A, "rejected": B},
        {"prompt": [{"role": "system", "content": "s"}, *Q], "chosen": A, "rejected": [assistant("")]},
    ],
    "conversational, implicit prompt": [
        {"chosen": [*Q, *A], "rejected": [*Q, *B]},
        {"chosen": [user("x"), *A], "rejected": [user("y"), *B]},
    ],
    "text, implicit prompt": [{"chosen": "the sky is blue", "rejected": "the sky is red"}],
    "transcripts": [
        {"chosen": HISTORY + " Ann\n\nAssistant: or Bob", "rejected": HISTORY + " Anna"},
        {"chosen": HISTORY + " Ann", "rejected": HISTORY.replace("name?", "who?") + " Bob"},
        {"chosen": "no transcript", "rejected": HISTORY},
    ],
    "transcripts beside a text prompt": [{"prompt": "title", "chosen": HISTORY + " a", "rejected": HISTORY + " b"}],
    "scores, as ultrafeedback_binarized": [
        {"prompt": "q", "messages": [*Q, *A], "score_chosen": c, "score_rejected": r}
        | {"chosen": [*Q, *A], "rejected": [*Q, *B]}
        for c, r in ((8.5, 6.0), (7.0, 7.0), (None, 7.0))
    ],
    "a question beside a prompt": [{"question": "title", "prompt": "p", "chosen": "a", "rejected": "b"}],
    "comparison rows": [
        OWN | {"votes": None, "category": "qa", "source": "web", "row": 8, "weights": [0.5, 0.5], "margins": None},
        OWN | {"votes": [{"annotator": "x", "pair": [0, 1], "label": 0.0}], "category": None, "source": None, "row": 9}
        | {"weights": None, "margins": [1.0, 0.0]},
    ],
    "comparison rows of messages": [OWN | {"prompt": Q, "completions": [A, B]} | {"pairs": [[1, 0]], "targets": [0.3]}],
}  # fmt: skip


@pytest.mark.parametrize("name", READABLE)
def test_rows_and_report_are_those_of_load_comparisons(name):
    dataset = Dataset.from_list(READABLE[name])
    rows, report = read_comparisons(dataset, source="mine")
    expected, expected_report = to_comparisons(dataset, source="mine")
    assert rows.to_list() == expected.to_list() and rows.features == expected.features
    assert rows.column_names == expected.column_names and report == expected_report
    unnamed, unnamed_report = load_comparisons(dataset, group=False)
    assert read_comparisons(dataset)[0].to_list() == unnamed.to_list()
    assert unnamed_report.dropped == report.dropped and report.rows_in == len(dataset)


@pytest.mark.parametrize("file", ["hh_helpful_train.jsonl", "hh_harmless_test.jsonl.gz"])
def test_real_transcripts_are_read_alike(shared_data, file):
    opened = gzip.open if file.endswith(".gz") else open
    with opened(shared_data / file, "rt", encoding="utf-8") as lines:
        dataset = Dataset.from_list([json.loads(line) for _, line in zip(range(600), lines, strict=False)])
    rows, report = read_comparisons(dataset, source=file)
    expected, expected_report = load_comparisons(shared_data / file, split="train[:600]", group=False)
    assert rows.to_list() == expected.to_list()
    assert (report.kept, report.dropped, report.flagged) == (
        expected_report.kept, expected_report.dropped, expected_report.flagged
    )  # fmt: skip


def test_the_rarer_kind_of_prompt_is_dropped_and_named():
    rows = [{"prompt": "p", "chosen": HISTORY + answer, "rejected": HISTORY} for answer in ("x", "y")]
    rows += [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    dataset, report = read_comparisons(Dataset.from_list(rows))
    assert len(dataset) == report.kept == 2 and [*report.dropped.values()] == [[2]]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"question": "q", "prompt": "", "chosen": "a", "rejected": "b"},  # the prompt is empty
        {"instruction": "q", "chosen": "a", "rejected": "b"},
        {"input": "q", "system": "s", "chosen": "a", "rejected": "b"},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": A[0], "rejected": B[0]},
        {"prompt": "p", "completion": "c", "label": True},
        {"instruction": "q", "output": ["a", "b"]},
        {"text": "a", "better": "b"},
        {f"column {k:03}": "x" for k in range(300)},
    ],
)
def test_other_columns_are_refused_in_one_line_that_names_load_comparisons(row):
    with pytest.raises(PreferenceDataError) as caught:
        read_comparisons(Dataset.from_list([row]), source="train")
    text = str(caught.value)
    assert text.startswith("train: ") and min(row) in text and "load_comparisons(...)" in text
    assert "\n" not in text and len(text) < 700


def test_what_load_comparisons_made_of_other_columns_is_read():
    rows = [{"question": "q", "system": "s", "chosen": "a", "rejected": "b"}]
    loaded, _ = load_comparisons(Dataset.from_list(rows))
    again, report = read_comparisons(loaded)
    assert again.to_list() == loaded.to_list() and report.kept == 1


@pytest.mark.parametrize(
    "dataset, remedy",
    [
        (Dataset.from_dict({"chosen": [], "rejected": []}), "check path, split and filters"),
        (DatasetDict(), "pick one split"),
        (Dataset.from_dict({"chosen": ["a"], "rejected": ["b"]}).to_iterable_dataset(), "without streaming"),
        (Dataset.from_dict({"prompt": ["p"], "chosen": ["a"], "rejected": ["a"]}), "check the source"),
        (Dataset.from_list([OWN | {"pairs": [[0, 9], [0, 1]]}]), "mine row 0: `pairs`"),
    ],
)
def test_unusable_data_sets_are_refused_in_one_line(dataset, remedy):
    with pytest.raises(PreferenceDataError) as caught:
        read_comparisons(dataset, source="mine")
    assert remedy in str(caught.value) and str(caught.value).startswith("mine") and "\n" not in str(caught.value)
