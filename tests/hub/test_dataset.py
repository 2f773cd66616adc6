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


RAW = [
    {"prompt": "Name a blue thing.", "chosen": "The sky.", "rejected": "No idea.", "note": "x", "id": 1},
    {"prompt": "Name a blue thing.", "chosen": "same", "rejected": "same", "note": "y", "id": 2},
    {"prompt": "Name a blue thing.", "chosen": None, "rejected": "No idea.", "note": "z", "id": 3},
]


def pushed_rows(hub, tmp_path, split="train", repo="alice/judged"):
    path = hf_hub_download(repo, f"data/{split}-00000-of-00001.parquet", repo_type="dataset")
    return load_dataset("parquet", data_files=path, split="train", cache_dir=tmp_path / split).to_list()


def test_the_card_says_what_was_dropped_and_not_read_of_rows_in_another_format(hub, tmp_path):
    splits = DatasetDict({"train": Dataset.from_list(RAW), "test": Dataset.from_list(RAW[:1])})
    push_comparisons(splits, "judged", licenses={"alice/pairs": "mit"})
    text = DatasetCard.load("alice/judged").text.replace("\\", "")
    assert "Of 3 rows of alice/pairs (split train), 1 were kept." in text
    assert "Of 1 rows of alice/pairs (split test), 1 were kept." in text
    assert text.count("- dropped: chosen ") == 2
    assert text.count("- columns that were not read: note (text), id (metadata)") == 2
    # The source is the licensed data set, not the split.
    for split in splits:
        assert {row["source"] for row in pushed_rows(hub, tmp_path, split)} == {"alice/pairs"}


def test_the_source_of_rows_from_several_sources_is_the_one_they_name(hub, tmp_path):
    rows = [RAW[0] | {"source": "them"}, RAW[0] | {"prompt": "q"}]
    push_comparisons(Dataset.from_list(rows), "judged", licenses={"us": "mit", "them": "mit"})
    assert [row["source"] for row in pushed_rows(hub, tmp_path)] == ["them", None]


def test_the_card_has_the_report_of_the_load_and_its_waived_columns(hub, tmp_path):
    rows = [row | {"system": f"Be {number}."} for number, row in enumerate(RAW)]
    comparisons, report = load_comparisons(rows, columns={"prompt": "prompt", "system": "system"})
    assert "system" not in report.unread
    comparisons, report = load_comparisons([row | {"images": ["1.jpg"]} for row in rows], ignore=["images"])
    report.source = "alice/pairs"
    push_comparisons(comparisons, "judged", licenses={"alice/pairs": "mit"}, report=report)
    text = DatasetCard.load("alice/judged").text.replace("\\", "")
    assert "Of 3 rows of alice/pairs, 1 were kept." in text
    assert "- columns that were not read: images (media, ignored), note (text), id (metadata)" in text


def test_a_column_that_matters_stops_the_push_unless_it_is_waived(hub):
    rows = Dataset.from_list([row | {"images": ["1.jpg"]} for row in RAW])
    with pytest.raises(UserError, match=r'alice/pairs: column images .*ignore=\["images"\]'):
        push_comparisons(rows, "judged", licenses={"alice/pairs": "mit"})
    assert hub.repos == {}
    push_comparisons(rows, "judged", licenses={"alice/pairs": "mit"}, ignore=["images"])
    assert "images (media, ignored)" in DatasetCard.load("alice/judged").text.replace("\\", "")


def test_roles_say_how_other_columns_are_read(hub, tmp_path):
    rows = Dataset.from_list([{"ask": "q?", "good": "a", "bad": "b"}])
    roles = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    push_comparisons(rows, "judged", licenses={"alice/pairs": "mit"}, columns=roles)
    assert len(pushed_rows(hub, tmp_path)) == 1
