"""Statistics of the admin page: those of other libraries on the exported votes, and outliers that were planted."""

import random
import subprocess
import sys
from pathlib import Path

import krippendorff
import numpy as np
import pytest
from statsmodels.stats.inter_rater import cohens_kappa

from hf_rlhf_ext import load_comparisons, quality_report
from hf_rlhf_ext.collect.export import import_judged, write_comparisons
from hf_rlhf_ext.collect.statistics import statistics
from hf_rlhf_ext.collect.tasks import Task
from tests.collect.conftest import make_tasks
from tests.collect.test_export import in_display_order, rich_store


def judge(store, person, answer_of, seconds=10.0, most=10_000):
    """Judges as one person. `answer_of(task, order)` gives the answer in display order."""
    for _ in range(most):
        shown = store.next_task(person)
        if shown is None:
            return
        key = f"key-{person}-{shown.task.id:06d}"
        store.judge(person, shown.task.id, key, answer_of(shown.task, shown.order), seconds)


def exported(store, tmp_path):
    write_comparisons(store, tmp_path / "rows.jsonl")
    return load_comparisons(tmp_path / "rows.jsonl")


def table_of(dataset):
    """Annotators x pairs of texts, with 0, 1 (tie) and 2, and NaN where there is no vote."""
    names = sorted({vote["annotator"] for row in dataset for vote in row["votes"]})
    columns = {}
    for number, row in enumerate(dataset):
        for vote in row["votes"]:
            column = columns.setdefault((number, *vote["pair"]), np.full(len(names), np.nan))
            column[names.index(vote["annotator"])] = vote["label"] * 2
    return np.array(list(columns.values())).T


def mean_kappa(table):
    """Cohen's kappa of statsmodels over pairs of annotators with five items in common, weighted by their number."""
    kappas, weights = [], []
    for i in range(len(table)):
        for j in range(i):
            both = ~np.isnan(table[i]) & ~np.isnan(table[j])
            if both.sum() >= 5:
                counts = np.zeros((3, 3))
                np.add.at(counts, (table[i, both].astype(int), table[j, both].astype(int)), 1)
                kappas.append(cohens_kappa(counts, return_results=False))
                weights.append(both.sum())
    return np.average(kappas, weights=weights)


@pytest.mark.parametrize("seed", [0, 1])
def test_agreement_is_that_of_the_export(make_store, tmp_path, seed):
    store = rich_store(make_store, seed=seed)  # has two tasks with one prompt, K-wise tasks and ties
    found = statistics(store)
    dataset, _ = exported(store, tmp_path)
    quality = quality_report(dataset).metrics
    assert found["alpha"] == pytest.approx(quality["krippendorff_alpha"], abs=1e-12)
    assert found["kappa"] == pytest.approx(quality["cohen_kappa"], abs=1e-12)
    assert found["agreement"] == pytest.approx(quality["agreement"], abs=1e-12)
    by_name = {person["name"]: person["agreement"] for person in found["per_annotator"]}
    assert by_name == pytest.approx(quality["annotators"])

    table = table_of(dataset)
    assert found["alpha"] == pytest.approx(krippendorff.alpha(table, level_of_measurement="nominal"), abs=1e-9)
    assert found["kappa"] == pytest.approx(mean_kappa(table), abs=1e-9)


def test_people_who_agree_well(make_store, tmp_path):
    store = make_store(80, ["ann", "bob", "cem"], wanted=3, gold_share=0)
    rng = random.Random(0)
    for person in (1, 2, 3):
        judge(store, person, lambda task, order: {"preference": 2 if (order[0] == 0) != (rng.random() < 0.1) else 6})
    found = statistics(store)
    dataset, report = exported(store, tmp_path)
    alpha = krippendorff.alpha(table_of(dataset), level_of_measurement="nominal")
    assert found["alpha"] == pytest.approx(alpha, abs=1e-9)
    assert found["agreement"] > 0.7 and all(person["outlier"] == [] for person in found["per_annotator"])
    assert found["counts"] == {"tasks": 80, "complete": 80, "judgments": 240, "wanted": 240} and report.kept == 80


def test_what_one_person_did(make_store):
    gold = [Task(f"gold {k}", ["right", "no"], gold={"best": [0]}) for k in range(4)]
    ranks = [Task(f"rank {k}", ["a", "b", "c"], category="code") for k in range(2)]
    rate = [Task("rate", ["a"])]
    store = make_store([*gold, *ranks, *rate, *make_tasks(4, category="chat")], ["ann"], gold_share=0.4)
    seconds = iter(range(1, 100))

    def answer_of(task, order):
        if task.gold:
            preference = {1: 1, 2: 7, 3: 4, 4: 2}[task.id]  # right, wrong, tie, right
            return in_display_order({"preference": preference}, order)
        if task.prompt.startswith("rank"):
            return {"ranks": [1, 1, 1] if task.prompt.endswith("1") else [1, 2, 3]}
        if task.prompt == "rate":
            return {"ratings": [3]}
        if task.prompt == "Question 3?":
            return {"skip": True}
        return {"preference": 3}  # the first shown

    while shown := store.next_task(1):
        answer = answer_of(shown.task, shown.order)
        store.judge(1, shown.task.id, f"key-{shown.task.id:06d}", answer, float(next(seconds)))
    judged = store.judgments()
    n_gold = sum(store.tasks()[judgment.task_id - 1].gold is not None for judgment in judged)
    assert n_gold == 4
    found = statistics(store)
    (ann,) = found["per_annotator"]
    assert (ann["judged"], ann["skipped"], ann["gold_accuracy"]) == (10, 1, 0.5)
    assert found["gold_accuracy"] == 0.5 and ann["outlier"] == []
    times = [judgment.seconds for judgment in judged if not judgment.is_skip]
    assert ann["median_seconds"] == found["median_seconds"] == np.median(times)
    assert ann["ties_share"] == 2 / 9  # one of four gold questions, one of two rankings, of nine comparisons
    decided = [j for j in judged if j.answer.get("preference", 4) != 4]
    first = [j.order[0] == (0 if j.answer["preference"] < 4 else 1) for j in decided]
    assert len(first) == 6 and ann["first_share"] == np.mean(first)
    tasks = {task.id: task for task in store.tasks()}
    longer = []
    for j in decided:
        lengths = list(map(len, tasks[j.task_id].completions))
        winner = 0 if j.answer["preference"] < 4 else 1
        if lengths[0] != lengths[1]:
            longer.append(lengths[winner] > lengths[1 - winner])
    assert len(longer) == 3 and ann["longer_share"] == np.mean(longer)
    # Nobody else has judged, so nothing can be said about agreement.
    assert found["alpha"] is None and found["kappa"] is None and found["agreement"] is None
    assert ann["agreement"] is None
    assert found["by_category"] == {
        "chat": {"tasks": 3, "judgments": 3, "agreement": None, "ties_share": 0.0},
        "code": {"tasks": 2, "judgments": 2, "agreement": None, "ties_share": 0.5},
    }


def test_an_empty_store(make_store):
    found = statistics(make_store(2, ["ann"]))
    assert found["counts"]["tasks"] == 2 and found["alpha"] is None and found["by_category"] == {}
    assert found["median_seconds"] is None and found["gold_accuracy"] is None
    (ann,) = found["per_annotator"]
    assert ann == dict.fromkeys(ann, None) | {"name": "ann", "judged": 0, "skipped": 0, "outlier": []}


def planted(make_store, odd_answer, odd_seconds=10.0, most=10_000, seed=0):
    """Three careful people, who err in a tenth, and one odd one. Returns their reasons by name."""
    gold = [Task(f"gold {k}", ["right", "wrong"], gold={"best": [0]}) for k in range(20)]
    store = make_store([*gold, *make_tasks(120)], ["ann", "bob", "cem", "odd"], wanted=4, gold_share=0.1)
    rng = random.Random(seed)

    def careful(task, order):
        winner = 0 if task.id % 2 or task.gold else 1
        prefers_first = (order[0] == winner) != (rng.random() < 0.1 and not task.gold)
        return {"preference": 2 if prefers_first else 6}

    judge(store, 4, lambda task, order: odd_answer(task, order, rng) or careful(task, order), odd_seconds, most)
    for person in (1, 2, 3):
        judge(store, person, careful)
    reasons = {person["name"]: person["outlier"] for person in statistics(store)["per_annotator"]}
    assert not any(reasons[name] for name in ("ann", "bob", "cem")), reasons
    return reasons["odd"]


@pytest.mark.parametrize(
    "answer_of, seconds, words",
    [
        (lambda task, order, rng: {"preference": 1}, 10.0, ["shown first", "less than they do", "gold accuracy"]),
        (lambda task, order, rng: {"preference": 7}, 10.0, ["shown second", "less than they do", "gold accuracy"]),
        (lambda task, order, rng: {"preference": rng.choice([2, 6])}, 10.0, ["less than they do", "gold accuracy"]),
        (lambda task, order, rng: {"preference": 4}, 10.0, ["less than they do", "are equal", "gold accuracy"]),
        (lambda task, order, rng: None, 2.0, ["much faster"]),
        (lambda task, order, rng: None, 5.0, []),  # careful, and not that much faster
    ],
)
def test_reasons_in_words(make_store, answer_of, seconds, words):
    reasons = planted(make_store, answer_of, seconds)
    assert len(reasons) == len(words), reasons
    for word in words:
        assert sum(word in reason for reason in reasons) == 1, reasons
    assert not any("\n" in reason for reason in reasons)


def test_nothing_is_said_about_a_few_judgments(make_store):
    assert planted(make_store, lambda task, order, rng: {"preference": 1}, 0.5, most=19) == []


def test_careful_people_are_hardly_ever_called_outliers(make_store):
    """20 stores, each with four people who err in a fifth of their judgments."""
    n_wrong = 0
    for seed in range(20):
        store = make_store(40, [f"p{k}" for k in range(4)], name=f"{seed}.sqlite", wanted=4, gold_share=0)
        rng = random.Random(seed)

        def careful(task, order, rng=rng):
            return {"preference": 2 if (order[0] == 0) != (rng.random() < 0.2) else 6}

        for person in (1, 2, 3, 4):
            judge(store, person, careful, seconds=rng.uniform(5, 10))
        n_wrong += sum(bool(person["outlier"]) for person in statistics(store)["per_annotator"])
    assert n_wrong <= 1


def test_imported_judgments_have_no_speed_and_no_side(make_store):
    store = make_store(0, [])
    rows = []
    for k in range(30):
        vote = {"annotator": "ann", "pair": [0, 1], "label": 1.0, "confidence": 1.0}
        rows.append(
            {"prompt": f"q{k}", "completions": ["a", "bb"], "pairs": [[0, 1]], "targets": [1.0], "votes": [vote]}
        )
    import_judged(store, rows)
    (ann,) = statistics(store)["per_annotator"]
    assert ann["judged"] == 30 and ann["median_seconds"] is None and ann["first_share"] is None
    assert ann["longer_share"] == 0 and ann["outlier"] == []


def test_statistics_of_one_batch(make_store):
    store = make_store([*make_tasks(3, batch="one"), Task("other", ["a", "b"], batch="two")], ["ann"], gold_share=0)
    judge(store, 1, lambda task, order: {"preference": 1})
    assert statistics(store, "two")["per_annotator"][0]["judged"] == 1
    assert statistics(store)["per_annotator"][0]["judged"] == 4


def test_the_store_and_its_statistics_load_nothing_heavy():
    code = (
        "import sys, hf_rlhf_ext.collect.store, hf_rlhf_ext.collect.statistics\n"
        "heavy = ['torch', 'trl', 'transformers', 'datasets', 'scipy', 'pandas', 'starlette']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
