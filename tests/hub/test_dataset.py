"""Comparisons on the Hub: rows are unchanged, annotators are numbered, and leaks are rejected."""

import datetime
import json
import logging
import re
from pathlib import Path

import datasets
import pytest
import yaml
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import DatasetCard, hf_hub_download

from hf_rlhf_ext import load_comparisons, quality_report
from hf_rlhf_ext.data.schema import LoadReport
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub import dataset
from hf_rlhf_ext.hub.dataset import dataset_card, push_comparisons
from hf_rlhf_ext.hub.dataset_files import with_one_schema

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
    assert "Jane Doe" in DatasetCard.load("alice/judged").text
    assert b"Jane" in hub.files("alice/judged", "datasets")["data/train-00000-of-00001.parquet"]


def test_leaks_in_rows_and_missing_licenses_are_refused(hub, rows):
    secret = "hf_" + "Ab3Cd4Ef5Gh6Ij7K" * 2
    leaky = rows.add_column("category", [f"my token {secret}" if k == 4 else "see /mnt/disk" for k in range(12)])
    with pytest.raises(UserError, match=r"token:train:5 \("):
        push_comparisons(leaky, "judged", licenses=LICENSES)
    assert hub.repos == {}
    push_comparisons(leaky, "judged", licenses=LICENSES, allow=["token:train:5"])  # a path is only text
    with pytest.raises(UserError, match="licenses is empty"):
        push_comparisons(rows, "judged", licenses={})


LOAD = """
import sys
from datasets import load_dataset
for split in sys.argv[1:]:
    print(split, load_dataset("alice/judged", split=split).to_list())
"""


def test_the_card_s_snippet_and_every_split_load_elsewhere_without_a_guess(hub, rows, elsewhere, monkeypatch):
    monkeypatch.setenv("LOGNAME", "alice")  # the user has the same name as the owner, which is not a leak
    monkeypatch.setattr(dataset, "SHARD_BYTES", 700)
    names = ("train", "held_out", "test.a", "été", "2024")
    splits = DatasetDict({name: rows.select(range(2 * k, 2 * k + 2)) for k, name in enumerate(names)})
    splits["train"] = rows
    push_comparisons(splits, "judged", licenses={"alice/pairs": "mit"}, keep_annotators=True)
    # Owners write into cards, and that stays.
    card = DatasetCard.load("alice/judged")
    card.text += "\nAsk us for more.\n"
    card.push_to_hub("alice/judged")
    del splits["2024"]
    push_comparisons(splits, "judged", licenses={"alice/pairs": "mit"}, title="What people liked", keep_annotators=True)
    files = hub.files("alice/judged", "datasets")
    assert "data/2024-00000-of-00001.parquet" not in files
    assert len([name for name in files if re.fullmatch(r"data/train-0000\d-of-0000\d\.parquet", name)]) > 2
    card = DatasetCard.load("alice/judged")
    assert "# What people liked" in card.text and "Ask us for more." in card.text
    by_split = {split["name"]: split["num_examples"] for split in card.data.dataset_info["splits"]}
    assert by_split == {name: len(rows) for name, rows in splits.items()}
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    printed = elsewhere(LOAD + snippet + "print(comparisons[0]['completions'])", *splits).stdout.splitlines()
    assert printed == [*(f"{name} {rows.to_list()}" for name, rows in splits.items()), "['Yes 0.', 'No 0.']"]


@pytest.mark.parametrize(
    "name, near",
    [("held-out", "held_out"), ("held out", "held_out"), ("a/b", "a_b"), ("train\n", "train"), ("", "train")],
)
def test_a_split_that_cannot_be_loaded_is_refused_with_a_name_that_can(hub, rows, name, near):
    with pytest.raises(UserError, match=rf"split named .*: rename it, for example to {near}\.$"):
        push_comparisons(DatasetDict({name: rows}), "judged", licenses=LICENSES)
    assert hub.requests == []


def test_splits_that_load_dataset_reads_as_something_else_are_refused(hub, rows):
    with pytest.raises(UserError, match="'all' for all splits"):
        push_comparisons(DatasetDict({"all": rows, "test": rows}), "judged", licenses=LICENSES)
    with pytest.raises(UserError, match="has the column category"):
        other = rows.add_column("category", ["chat"] * 12)
        push_comparisons(DatasetDict({"train": rows, "test": other}), "judged", licenses=LICENSES)
    with pytest.raises(UserError, match="split test have other types than those of train"):
        typed = {"train": rows.add_column("note", ["a"] * 12), "test": rows.add_column("note", [{"a": 1}] * 12)}
        push_comparisons(DatasetDict(typed), "judged", licenses=LICENSES)
    assert hub.repos == {}


def test_a_column_without_values_in_one_split_has_the_type_of_the_other(rows):
    splits = {"train": rows.add_column("category", [None] * 12), "test": rows.add_column("category", ["chat"] * 12)}
    same = with_one_schema(splits)
    assert same["train"].features == same["test"].features == splits["test"].features
    assert same["train"].to_list() == splits["train"].to_list()


@pytest.mark.parametrize("licenses", ["mit", {"a/b": None}, {}])
def test_licenses_in_another_form_are_refused(hub, rows, licenses):
    with pytest.raises(UserError, match="licenses"):
        push_comparisons(rows, "alice/x", licenses=licenses)


def test_rows_in_another_form_are_refused_and_dates_are_scanned(hub, rows):
    for other in (rows.to_list(), rows.to_iterable_dataset()):
        with pytest.raises(UserError, match="Dataset.from_list"):
            push_comparisons(other, "alice/x", licenses={"a/b": "mit"})
    dated = rows.add_column("day", [datetime.date(2026, 1, 1)] * len(rows))
    with pytest.raises(UserError, match="path:train:1 "):  # a source is written by a program
        push_comparisons(
            dated.add_column("source", ["/mnt/x/rows.jsonl"] * len(rows)),
            "alice/x",
            licenses={"a/b": "mit"},
        )


def test_a_split_without_rows_is_left_out_and_said(hub, rows, caplog):
    with caplog.at_level(logging.WARNING, "hf_rlhf_ext"):
        push_comparisons(DatasetDict({"train": rows, "test": rows.select([])}), "judged", licenses=LICENSES)
    assert any("split test has no rows" in record.message for record in caplog.records)
    assert not [name for name in hub.files("alice/judged", "datasets") if "test" in name]
    assert "| test |" not in DatasetCard.load("alice/judged").text
    with pytest.raises(UserError, match="no split has rows"):
        push_comparisons(rows.select([]), "judged", licenses=LICENSES)


class Rows:
    """As many rows as asked for."""

    column_names = ("prompt", "pairs")

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, column):
        return []


def header_and_body(**options):
    options = {"licenses": LICENSES, "repo_id": "alice/judged", **options}
    card = DatasetCard(dataset_card(options.pop("splits", {"train": Rows(9)}), **options))
    return card.data, card.text


@pytest.mark.parametrize(
    "n, size",
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1_000, "1K<n<10K"),
        (99_999, "10K<n<100K"),
        (10**6, "1M<n<10M"),
        (2 * 10**9, "1B<n<10B"),
    ]
    + [(10**12 - 1, "100B<n<1T"), (10**12, "n>1T")],
)
def test_sizes_are_the_hub_s_classes(n, size):
    known = json.loads((Path(datasets.__file__).parent / "utils/resources/size_categories.json").read_text())
    assert size in known
    assert header_and_body(splits={"train": Rows(n)})[0].size_categories == [size]


def test_what_the_user_wrote_is_no_markup():
    licenses = {"alice/pairs": "mine, see <b>terms</b>", "us\n## Us": "mit"}
    splits = {"__init__": Rows(1)}
    header, body = header_and_body(splits=splits, licenses=licenses, title="A\nB | <i>C</i>")
    assert body.strip().splitlines()[0] == "# A ⏎ B \\| &lt;i&gt;C&lt;/i&gt;"
    assert "<b>" not in body and "\n## Us" not in body and "| \\_\\_init\\_\\_ |" in body
    assert header.pretty_name == "A B | <i>C</i>" and header.source_datasets == ["alice/pairs"]


def test_the_header_has_the_licenses_that_the_hub_knows(hub, rows, caplog):
    def licenses(**stated):
        header, body = header_and_body(licenses=stated)
        assert all(license in body for license in stated.values())
        return header.license, header.to_dict().get("license_name")

    assert licenses(a="CC BY 4.0") == ("cc-by-4.0", None)
    assert licenses(a="mit", b="MIT License", c="Apache 2.0") == (["mit", "apache-2.0"], None)
    assert licenses(a="Our terms, 2024") == ("other", "our-terms-2024")
    assert licenses(a="mit", b="ours", c="theirs") == (["mit", "other"], "ours-theirs")
    with caplog.at_level(logging.WARNING, "hf_rlhf_ext"):
        push_comparisons(rows, "judged", licenses={"us": "apache-2.o"})
    (line,) = [record.message for record in caplog.records if "license" in record.message]
    assert "license of us" in line and "other" in line and "did you mean apache-2.0?" in line


@pytest.mark.parametrize(
    "sources, licenses, said",
    [
        (["them"], ["them"], None),
        (["them"], ["us"], "no row is from 'us': rows are from 'them'"),
        (["them"], ["them", "us"], "no row is from 'us': leave it out"),
        (["them", "others"], ["them"], "rows are from 'others', whose license is missing"),
        (["them", ""], ["us"], None),  # not known of all rows
        (["them", None], ["us", "them"], None),
        (["them"], ["judged.jsonl", "them"], None),  # as the report calls it
    ],
)
def test_licenses_and_rows_that_name_different_sources_are_said(hub, rows, caplog, sources, licenses, said):
    named = rows.add_column("source", [sources[k % len(sources)] for k in range(len(rows))])
    with caplog.at_level(logging.WARNING, "hf_rlhf_ext"):
        push_comparisons(
            named, "judged", licenses=dict.fromkeys(licenses, "mit"), report=LoadReport(source="judged.jsonl")
        )
    lines = [record.message for record in caplog.records if "licenses" in record.message]
    assert lines == [] if said is None else len(lines) == 1 and said in lines[0]


def test_a_plain_dict_of_splits_is_as_a_dataset_dict(hub, rows):
    push_comparisons({"train": rows, "more": rows}, "judged", licenses=LICENSES)
    assert {"data/train-00000-of-00001.parquet", "data/more-00000-of-00001.parquet"} <= set(
        hub.files("alice/judged", "datasets")
    )
    with pytest.raises(UserError, match="no split named 'train-a'"):
        push_comparisons({"train-a": rows}, "judged", licenses=LICENSES)
    with pytest.raises(UserError, match="Dataset.from_list"):
        push_comparisons({"train": rows.to_list()}, "judged", licenses=LICENSES)


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
