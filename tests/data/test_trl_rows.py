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
    "a question that repeats the prompt": [{"question": "p", "prompt": "p", "chosen": "a", "rejected": "b"}],
    "speakers of other sets": [
        {
            "chosen": [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}],
            "rejected": [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "b"}],
        }
    ],
    "system and tools": [
        {"system": "s", "prompt": "q", "chosen": "a", "rejected": "b", "tools": '[{"name": "f"}]'},
        {"system": None, "prompt": "r", "chosen": "a", "rejected": "b", "tools": "[]"},
        {"system": "s", "prompt": "t", "chosen": "a", "rejected": "b", "tools": "["},
    ],
    "a prompt that is repeated": [
        {"prompt": "q?", "chosen": "q? a", "rejected": "q? b"},
        {"prompt": "4", "chosen": "42", "rejected": "43"},
        {"prompt": "q?", "chosen": "q? a", "rejected": "b"},
    ],
    "messages that are repeated": [
        {"prompt": [*Q, *A, *Q], "chosen": [*Q, *A, *Q, *A], "rejected": [*Q, *A, *Q, *B]},
        {"prompt": [{"role": "system", "content": "s"}, *Q], "chosen": [*Q, *A], "rejected": [*Q, *B]},
    ],
    "a prompt that is missing": [
        {"prompt": "p", "chosen": "the a", "rejected": "the b"},
        {"prompt": None, "chosen": "the a", "rejected": "the b"},
    ],
    "rendered texts": [
        {"chosen": f"<|prompter|>6*7?<|assistant|>{a}", "rejected": f"<|prompter|>6*7?<|assistant|>{b}"}
        for a, b in (("It is 42", "It is 43"), ("4", "42"))
    ],
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
        {"question": "title", "prompt": "p", "chosen": "a", "rejected": "b"},
        {"query": "q", "chosen": "The answer is 4.", "rejected": "The answer is 5."},
        {"messages": Q, "chosen": "The answer is 4.", "rejected": "The answer is 5."},
        {"prompt": "p", "context": "c", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "history": [["x", "y"]], "chosen": "a", "rejected": "b"},
        {"prompt": "p", "images": ["x.png"], "chosen": "a", "rejected": "b"},
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


# --- the prompt of both sides ----------------------------------------------------------------------------------------


S = {"role": "system", "content": "s"}
COMMON = ["prompt_from_common_words"]


@pytest.mark.parametrize(
    "row, prompt, completions, flags",
    [
        ({"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}, [S, *Q], [A, B], []),
        ({"system": " ", "prompt": "q", "chosen": "a", "rejected": "b"}, "q", ["a", "b"], []),
        ({"system_prompt": "s", "chosen": [*Q, *A], "rejected": [*Q, *B]}, [S, *Q], [A, B], []),
        ({"system": "s", "chosen": [S, *Q, *A], "rejected": [S, *Q, *B]}, [S, *Q], [A, B], []),
        ({"prompt": Q, "chosen": [S, *Q, *A], "rejected": [S, *Q, *B]}, [S, *Q], [A, B], []),
        ({"prompt": Q, "chosen": [*Q, *A], "rejected": [*Q, *B]}, Q, [A, B], []),
        ({"prompt": Q, "chosen": A[0], "rejected": B[0]}, Q, [A, B], []),
        ({"prompt": json.dumps(Q), "chosen": json.dumps(A), "rejected": json.dumps(B)}, Q, [A, B], []),
        ({"prompt": "q? ", "chosen": " q? a", "rejected": "q? b"}, "q? ", [" a", " b"], []),
        ({"prompt": "q?", "chosen": "q? a", "rejected": "b"}, "q?", ["q? a", "b"], []),
        ({"prompt": "4", "chosen": "42", "rejected": "43"}, "4", ["42", "43"], []),
        ({"prompt": "title", "chosen": [*Q, *A], "rejected": [*Q, *B]}, Q, [A, B], ["prompt_not_in_conversation"]),
        ({"prompt": "q", "chosen": [*Q, *A], "rejected": [*Q, *B]}, Q, [A, B], []),
        ({"prompt": None, "chosen": [*Q, *A], "rejected": [*Q, *B]}, Q, [A, B], []),
        ({"prompt": "Write one.", "chosen": "User: x\nAssistant: y", "rejected": "User: x\nAssistant: z"}, "Write one.",
         ["User: x\nAssistant: y", "User: x\nAssistant: z"], []),
        ({"chosen": "The sky", "rejected": "The sky is blue"}, "The", [" sky", " sky is blue"], COMMON),
        ({"chosen": "It is 3.5 m", "rejected": "It is 3.75 m"}, "It is", [" 3.5 m", " 3.75 m"], COMMON),
    ],
)  # fmt: skip
def test_the_prompt_and_the_answers_without_it(row, prompt, completions, flags):
    dataset, report = read_comparisons(Dataset.from_list([row]))
    assert (dataset[0]["prompt"], dataset[0]["completions"], dataset[0]["flags"]) == (prompt, completions, flags)
    assert report.kept == 1


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"system": "t", "chosen": [S, *Q, *A], "rejected": [S, *Q, *B]}, "system differs"),
        ({"system": "s", "prompt": "<|user|>q<|assistant|>", "chosen": "a", "rejected": "b"}, "system or"),
        ({"chosen": "unbelievable", "rejected": "unbearable"}, "the two sides share no prompt"),
        ({"chosen": "Yes", "rejected": "Yes, of course"}, "the two sides share no prompt"),
        ({"chosen": "<|user|>q<|assistant|>a", "rejected": "q a"}, "the two sides share no prompt"),
        ({"prompt": [user([{"type": "image"}])], "chosen": A, "rejected": B}, "prompt has a part that is not"),
    ],
)  # fmt: skip
def test_a_row_without_a_sure_prompt_is_dropped(row, reason):
    for load in (read_comparisons, load_comparisons):
        with pytest.raises(PreferenceDataError, match=f"1 dropped: {reason}"):
            load(Dataset.from_list([row]))


def test_texts_that_mostly_share_no_words_are_refused_as_a_whole():
    rows = [{"chosen": f"I think {k}", "rejected": f"You know {k}"} for k in range(3)]
    rows.append({"chosen": "I am here", "rejected": "I am there"})
    for load in (read_comparisons, load_comparisons):
        with pytest.raises(PreferenceDataError, match=r"no common prompt in 3 of the first 4 rows.*columns=\{'prompt'"):
            load(Dataset.from_list(rows))


def test_tools_and_template_options_are_kept():
    row = {
        "prompt": Q,
        "chosen": A,
        "rejected": B,
        "tools": '[{"name":  "f"}]',
        "chat_template_kwargs": {"think": False},
    }
    dataset, report = read_comparisons(Dataset.from_list([row, row | {"tools": "["}]))
    assert dataset["tools"] == ['[{"name":  "f"}]', None] and report.flagged == {"bad_tools": [1]}
    assert "think" in str(dataset[0]["chat_template_kwargs"])
