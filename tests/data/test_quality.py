"""The quality report: figures against other libraries and brute force, and a page that shows them."""

import json
import random
import re

import numpy as np
import pytest
from datasets import Dataset
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats import inter_rater

from hf_rlhf_ext.data.formats import load_comparisons, to_comparisons
from hf_rlhf_ext.data.quality import MEANINGS, quality_report
from hf_rlhf_ext.data.quality_page import write_quality_page


def report_of(rows, heldout=None):
    rows = [{"prompt": f"what is number {k} good for today", **row} for k, row in enumerate(rows)]
    return quality_report(to_comparisons(Dataset.from_list(rows))[0], heldout)


def pair(first="one", second="two two", target=1.0, **more):
    return {"completions": [first, second], "pairs": [[0, 1]], "targets": [target], **more}


def test_pandalm_agreement_is_that_of_other_libraries(shared_data):
    raw = json.loads((shared_data / "pandalm_testset.json").read_text())
    good = [row for row in raw if isinstance(row["response1"], str) and isinstance(row["response2"], str)]
    dataset, _ = load_comparisons(shared_data / "pandalm_testset.json", group=False)
    figures = quality_report(dataset).figures
    labels = np.array([[row[f"annotator{k}"] for k in (1, 2, 3)] for row in good])
    table, _ = inter_rater.aggregate_raters(labels)
    assert figures["fleiss_kappa"] == pytest.approx(inter_rater.fleiss_kappa(table), abs=1e-12)
    kappas = [cohen_kappa_score(labels[:, i], labels[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert figures["cohen_kappa"] == pytest.approx(np.mean(kappas), abs=1e-12)
    assert figures["agreement"] == pytest.approx(
        np.mean([labels[:, i] == labels[:, j] for i, j in ((0, 1), (0, 2), (1, 2))]), abs=1e-12
    )
    assert set(figures["annotators"]) == {"annotator1", "annotator2", "annotator3"}
    empty = sum((row["response1"] == "") + (row["response2"] == "") for row in good)
    assert figures["empty_completions"] == empty and 0 < figures["label_noise"] < 0.2


def test_hh_helpful_has_its_known_length_bias(shared_data):
    dataset, _ = load_comparisons(shared_data / "hh_helpful_train.jsonl", split="train[:600]")
    figures = quality_report(dataset).figures
    wins = []
    for row in dataset:
        for (i, j), target in zip(row["pairs"], row["targets"], strict=True):
            lengths = [len(row["completions"][k][0]["content"]) for k in (i, j)]
            if lengths[0] != lengths[1]:
                wins.append((lengths[0] > lengths[1]) == (target > 0.5))
    assert figures["longer_wins"]["share"] == pytest.approx(np.mean(wins))
    assert figures["first_wins"] is None and figures["label_noise"] is None  # chosen is always first, and judged once
    assert list(figures["languages"])[0] == "en"


def test_circles_contradictions_ties_and_positions_worked_by_hand():
    triple = {"completions": ["a", "b", "c"], "pairs": [[0, 1], [1, 2], [0, 2]]}
    rows = [
        triple | {"targets": [1.0, 1.0, 1.0]},
        triple | {"targets": [1.0, 1.0, 0.0]},  # a > b > c > a
        triple | {"targets": [0.0, 0.0, 1.0]},  # the other way round
        triple | {"targets": [1.0, 0.5, 0.0]},  # a tie: no full triple
        {"completions": ["x", "y"], "pairs": [[0, 1], [1, 0], [0, 1]], "targets": [1.0, 1.0, 0.5]},
        {"completions": ["x", "y"], "pairs": [[0, 1], [1, 0]], "targets": [1.0, 0.0]},
    ]
    figures = report_of(rows).figures
    assert figures["intransitive_triples"] == pytest.approx(2 / 3)
    assert figures["contradictions"] == pytest.approx(1 / 2)
    assert figures["ties"] == pytest.approx(2 / 17) and figures["pairs"] == 17
    first = [1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0]  # decided judgements in order
    assert figures["first_wins"]["share"] == pytest.approx(np.mean(first))
    assert figures["longer_wins"] is None  # all of one length


def test_coin_tosses_give_a_quarter_of_circles():
    rng = random.Random(0)
    rows = [
        {"completions": list("abcd"), "pairs": [[i, j] for i in range(4) for j in range(i)]}
        | {"targets": [float(rng.random() < 0.5) for _ in range(6)]}
        for _ in range(500)
    ]
    assert report_of(rows).figures["intransitive_triples"] == pytest.approx(0.25, abs=0.03)


def test_near_duplicates_and_leaks_are_found():
    texts = [f"Please explain to me in simple words how a {word} works and why" for word in "car boat train".split()]
    long = " ".join(f"word{k}" for k in range(60))
    prompts = [*texts, texts[0].upper(), long, long + " more", "hi", "ho"]
    rows = [pair() | {"prompt": prompt} for prompt in prompts]
    heldout = [pair() | {"prompt": prompt} for prompt in (long + " again", "something else entirely, and quite new")]
    figures = report_of(rows, to_comparisons(Dataset.from_list(heldout))[0]).figures
    assert figures["near_duplicate_prompts"] == pytest.approx(2 / 8) and figures["leaked_prompts"] == 0.5


def test_label_noise_is_recovered_from_votes_and_from_repeats():
    rng = random.Random(3)

    def noisy():
        return float(rng.random() > 0.2)

    voted = [pair(votes=[{"annotator": n, "pair": [0, 1], "label": noisy()} for n in "abc"]) for _ in range(1500)]
    assert report_of(voted).figures["label_noise"] == pytest.approx(0.2, abs=0.03)
    twice = [{"completions": ["a", "b"], "pairs": [[0, 1]] * 2, "targets": [noisy(), noisy()]} for _ in range(1500)]
    figures = report_of(twice).figures
    assert figures["label_noise"] == pytest.approx(0.2, abs=0.03)
    assert figures["accuracy_ceiling"] == 1 - figures["label_noise"]


def test_refusals_and_empty_completions_are_counted():
    rows = [pair("I'm sorry, but I can't help with that.", ""), pair("As an AI language model, I have no cat.", "Meow")]
    figures = report_of(rows).figures
    assert figures["refusals"] == 0.5 and figures["empty_completions"] == 1


def test_the_page_shows_every_figure_and_escapes_what_data_say(tmp_path):
    rows = [
        pair("<script>alert(1)</script>", "b", votes=[{"annotator": n, "pair": [0, 1], "label": 1.0}]) for n in "ab"
    ]
    rows[0]["votes"] = [{"annotator": f"<b>{n}</b>", "pair": [0, 1], "label": x} for n, x in (("u", 1.0), ("v", 0.0))]
    rows[1]["votes"] = [{"annotator": f"<b>{n}</b>", "pair": [0, 1], "label": 1.0} for n in "uv"]
    dataset, load_report = to_comparisons(
        Dataset.from_list([{"prompt": f"p{k}", **row} for k, row in enumerate(rows)]), source="<i>mine</i>.jsonl"
    )
    report = quality_report(dataset, source="<i>mine</i>.jsonl")
    page = write_quality_page(report, tmp_path / "report.html", load_report).read_text()
    assert "<b>" not in page and "<i>" not in page and "&lt;b&gt;u" in page and "&lt;i&gt;mine" in page
    for name in MEANINGS:
        assert f"<td>{name.replace('_', ' ')}</td>" in page
    assert len(re.findall(r'src="data:image/png;base64,iVBOR', page)) == 3
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)  # nothing is fetched from anywhere
    assert "2 rows in, 2 kept" in page and "Doubtful: 2 prompts are few" in page


def test_a_large_report_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    rows = [
        {"prompt": f"a prompt of number {k} and more {k * k}", "chosen": "a", "rejected": "b b"} for k in range(10_001)
    ]
    dataset = to_comparisons(Dataset.from_list(rows))[0]
    first = quality_report(dataset)
    monkeypatch.setattr("hf_rlhf_ext.data.quality._measure", None)
    assert quality_report(dataset) == first
