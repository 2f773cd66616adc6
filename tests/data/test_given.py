"""What trainers take as data: rows in memory of any kind become a dataset, other things are refused in one line."""

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict

from hf_rlhf_ext.data.given import as_dataset, as_datasets
from hf_rlhf_ext.errors import UserError

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": None}]
MADE = Dataset.from_list(ROWS)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return ROWS[index]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(ROWS)


def streamed():
    return Dataset.from_list(ROWS).to_iterable_dataset()


def test_a_dataset_and_nothing_stay_as_they_are():
    dataset = Dataset.from_list(ROWS)
    assert as_dataset(dataset, "x") is dataset and as_dataset(None, "x") is None and as_datasets(None, "x") is None
    assert as_datasets({"a": dataset}, "x") == {"a": dataset}


@pytest.mark.parametrize("given", [ROWS, tuple(ROWS), Rows(), pd.DataFrame(ROWS, dtype=object)])
def test_rows_in_memory_become_a_dataset(given):
    assert as_dataset(given, "x").to_list() == ROWS
    assert as_datasets(given, "x").to_list() == ROWS


def test_rows_may_lack_columns_and_hold_messages():
    messages = [{"role": "user", "content": "hello"}]
    dataset = as_dataset([{"prompt": messages}, {"prompt": messages, "topic": "sun"}], "x")
    assert dataset["topic"][:] == [None, "sun"] and dataset["prompt"][0] == messages


def test_the_sets_of_an_evaluation_may_be_of_any_kind():
    sets = as_datasets(DatasetDict(a=Dataset.from_list(ROWS)) | {"b": ROWS}, "eval_dataset")
    assert [sets[name].to_list() for name in ("a", "b")] == [ROWS, ROWS]


@pytest.mark.parametrize(
    "given, message",
    [
        (
            DatasetDict(test=Dataset.from_list(ROWS), train=Dataset.from_list(ROWS)),
            r"'test', 'train' .*=dataset\['train'\]",
        ),
        (DatasetDict(a=Dataset.from_list(ROWS)), r"has the splits 'a' .* as in train_dataset=dataset\['a'\]"),
        ({"a": Dataset.from_list(ROWS), "b": streamed()}, "has the splits 'a', 'b'"),
        (IterableDatasetDict(train=streamed()), "has the splits 'train'"),
        ({"prompt": ["a", "b"]}, "is a dict: .* Dataset.from_dict"),
        ({}, "without sets"),
        (streamed(), "is streamed: read .* Dataset.from_list"),
        (Stream(), "is streamed"),
        (["a", "b"], "row 0 is of type str"),
        ([ROWS[0], None], "row 1 is of type NoneType"),
        ([], "is empty"),
        ("data.jsonl", "is of type str: .* load_dataset"),
        (7, "is of type int"),
    ],
)
def test_other_things_are_one_line(given, message):
    with pytest.raises(UserError, match=f"^train_dataset .*{message}") as error:
        as_dataset(given, "train_dataset")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "^eval_dataset is a dict without sets"),
        ({"a": streamed()}, r"^eval_dataset\['a'\] is streamed"),
        ({"a": DatasetDict(x=Dataset.from_list(ROWS))}, r"^eval_dataset\['a'\] has the splits 'x'"),
    ],
)
def test_sets_of_an_evaluation_are_named(given, message):
    with pytest.raises(UserError, match=message):
        as_datasets(given, "eval_dataset")
