"""Comparisons on the Hub: rows are unchanged, annotators are numbered, and leaks are rejected."""

import logging
import re

import pytest
import yaml
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import DatasetCard, hf_hub_download

from hf_rlhf_ext import load_comparisons, quality_report
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.dataset import dataset_card, push_comparisons

LICENSES = {"Anthropic/hh-rlhf": "mit"}


def vote(annotator, label):
    return {"annotator": annotator, "pair": [0, 1], "label": label}


@pytest.fixture
def rows():
    made = [
        {
            "prompt": f"Question {k}?",
            "completions": [f"Yes {k}.", f"No {k}."],
            "pairs": [[0, 1]],
            "targets": [1.0 if k % 3 else 0.5],
            "weights": [1.0],
            "votes": [vote("Jane Doe" if k < 8 else "Ann", 1.0), vote("Bob", 0.0 if k % 3 else 1.0)],
        }
        for k in range(12)
    ]
    return Dataset.from_list(made)


def test_rows_and_card_arrive_in_one_private_commit(hub, rows, tmp_path):
    comparisons, report = load_comparisons(rows)
    quality = quality_report(comparisons)
    splits = DatasetDict({"train": comparisons.select(range(8)), "test": comparisons.select(range(8, 12))})
    push_comparisons(splits, "alice/judged", licenses=LICENSES, report=report, quality=quality)
    repo = hub.repo("alice/judged", "datasets")
    assert repo.private and len(repo.history()) == 2
    path = hf_hub_download("alice/judged", "data/test-00000-of-00001.parquet", repo_type="dataset")
    pulled = load_dataset("parquet", data_files=path, split="train", cache_dir=tmp_path).to_list()
    expected = splits["test"].to_list()
    assert [row | {"votes": None} for row in pulled] == [row | {"votes": None} for row in expected]
    # One numbering over all splits: Jane is 1 in train, Bob 2 in both, Ann 3 in test.
    assert {v["annotator"] for row in pulled for v in row["votes"]} == {"2", "3"}
    assert b"Jane" not in b"".join(hub.files("alice/judged", "datasets").values())
    card = DatasetCard.load("alice/judged")
    assert yaml.safe_load(card.data.to_yaml()) == card.data.to_dict() and card.data.license == "mit"
    for text in ("| train | 8 | 8 |", "| test | 4 | 4 |", "Anthropic/hh", "| `targets` | P(i is better)", "12 rows"):
        assert text in card.text.replace("\\", "")
    assert "| agreement |" in card.text and "| cohen kappa |" in card.text


def test_names_are_kept_on_demand(hub, rows):
    quality = quality_report(load_comparisons(rows)[0])
    licenses = {"us": "cc-by-4.0", "them": "mit"}
    push_comparisons(rows, "judged", licenses=licenses, keep_annotators=True, quality=quality)
    assert DatasetCard.load("alice/judged").data.license == "other"
    assert "Jane Doe" in DatasetCard.load("alice/judged").text
    assert b"Jane" in hub.files("alice/judged", "datasets")["data/train-00000-of-00001.parquet"]


def test_leaks_in_rows_and_missing_licenses_are_refused(hub, rows):
    leaky = rows.add_column("category", [f"from /mnt/disk/{k}" if k == 4 else "chat" for k in range(12)])
    with pytest.raises(UserError, match=r"path:train:5 \(/mnt/disk/4\)"):
        push_comparisons(leaky, "judged", licenses=LICENSES)
    assert hub.repos == {}
    push_comparisons(leaky, "judged", licenses=LICENSES, allow=["path:train:5"])
    with pytest.raises(UserError, match="licenses is empty"):
        push_comparisons(rows, "judged", licenses={})


def test_the_card_s_snippet_runs_elsewhere_and_a_name_of_one_s_own_is_enough(hub, rows, elsewhere, monkeypatch):
    monkeypatch.setenv("LOGNAME", "alice")  # the user has the same name as the owner, which is not a leak
    splits = DatasetDict({"train": rows.select(range(8)), "test": rows.select(range(8, 12))})
    push_comparisons(splits, "judged", licenses={"alice/pairs": "mit"}, title="What people liked")
    push_comparisons(rows.select(range(8)), "judged", licenses={"alice/pairs": "mit"}, title="What people liked")
    assert "data/test-00000-of-00001.parquet" not in hub.files("alice/judged", "datasets")
    text = DatasetCard.load("alice/judged").text
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    printed = elsewhere(snippet + "print(len(comparisons), comparisons[0]['completions'])").stdout
    assert printed.splitlines()[-1] == "8 ['Yes 0.', 'No 0.']" and "# What people liked" in text


def test_the_older_name_of_licenses_works_and_says_the_new_one(hub, rows, caplog):
    with caplog.at_level(logging.WARNING, "hf_rlhf_ext"):
        push_comparisons(rows, "judged", licences=LICENSES)
    (line,) = [record.message for record in caplog.records if "licences" in record.message]
    assert "licenses" in line and DatasetCard.load("alice/judged").data.license == "mit"
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_rlhf_ext"):
        older = dataset_card({"train": rows}, licences=LICENSES, repo_id="alice/judged")
    assert len(caplog.records) == 1 and older == dataset_card(
        {"train": rows}, licenses=LICENSES, repo_id="alice/judged"
    )
