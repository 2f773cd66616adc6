"""Agreement, speed and accuracy of the people who judge, and reasons to look at somebody's judgments."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from ..quality import agreement
from .records import Judgment
from .store import Store
from .tasks import Task, Text
from .votes import by_task, comparison_row

LEAST_JUDGMENTS = 20
"""Nothing is said about a person with fewer judgments."""
LEAST_GOLD = 5
"""Gold questions that a person has answered before their accuracy is looked at."""
_ERROR_RATE = 0.01
"""Chance that a test calls any of the people an outlier although all of them judge alike."""
_EXPECTED_GOLD = 0.8
"""Share of gold questions that somebody who reads them answers, while little is known about the others."""
_BEST_GOLD = 0.95
"""Nobody is expected to answer a larger share, even if the others did."""
_FAST = 1 / 3
_ONE_SIDE = 0.8
_BELOW_REST = 0.1


@dataclass
class _Person:
    """What one person did. Lists hold one entry per live judgment that counts for them.

    Attributes:
        seconds: Time per judgment, in seconds, without imported judgments.
        right: Gold questions: whether the answer was right.
        first: Two completions with a winner: whether the one that was shown first won.
        longer: Two completions of different length with a winner: whether the longer one won.
        ties: Two or more completions: whether all were equal.
        agreed: Pairs on which the others have a majority: how many were judged as by the majority, and how many
            there are.
    """

    name: str
    judged: int = 0
    skipped: int = 0
    seconds: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    first: list[bool] = field(default_factory=list)
    longer: list[bool] = field(default_factory=list)
    ties: list[bool] = field(default_factory=list)
    agreed: tuple[int, int] = (0, 0)

    def as_record(self, outlier: list[str]) -> dict[str, Any]:
        n_agreed, n_shared = self.agreed
        return {
            "name": self.name,
            "judged": self.judged,
            "skipped": self.skipped,
            "median_seconds": median(self.seconds) if self.seconds else None,
            "agreement": n_agreed / n_shared if n_shared else None,
            "gold_accuracy": _share(self.right),
            "first_share": _share(self.first),
            "longer_share": _share(self.longer),
            "ties_share": _share(self.ties),
            "outlier": outlier,
        }


def statistics(store: Store, batch: str | None = None) -> dict[str, Any]:
    """Returns what the admin page shows about a store, or about one batch.

    Agreement is measured as `quality_report` does on the exported rows: on pairs that two or more people judged, as
    first, tie or second. Gold questions do not count there.

    Returns:
        `counts` (see `Store.counts`); `alpha` (Krippendorff), `kappa` (mean of Cohen's over pairs of people) and
            `agreement` (share of equal judgments); `gold_accuracy`; `median_seconds`; `per_annotator`, a list of
            records with `name`, `judged`, `skipped`, `median_seconds`, `agreement` (with the majority of the others),
            `gold_accuracy`, `first_share` and `longer_share` (how often the answer shown first, or the longer one, won;
            of two answers), `ties_share` and `outlier` (reasons in words); and `by_category`: category -> `tasks`,
            `judgments`, `agreement` and `ties_share`. What cannot be determined is None.
    """
    judgments = store.judgments(batch)
    tasks = {task.id: task for task in store.tasks(batch)}  # after the judgments: tasks are never removed
    rows = _exported_rows(tasks, judgments)
    votes, names = _votes_in(rows)

    people = {annotator.name: _Person(annotator.name) for annotator in store.annotators()}
    for judgment in judgments:
        _count(people[judgment.annotator], judgment, tasks[judgment.task_id])
    for number, (share, n_items) in agreement.agreement_with_rest(votes).items():
        people[names[number]].agreed = (round(share * n_items), n_items)
    seconds = [value for person in people.values() for value in person.seconds]
    right = [value for person in people.values() for value in person.right]
    return {
        "counts": store.counts(batch),
        **_agreement_of(votes),
        "gold_accuracy": _share(right),
        "median_seconds": median(seconds) if seconds else None,
        "per_annotator": _records(list(people.values())),
        "by_category": _by_category(rows),
    }


# --- agreement -------------------------------------------------------------------------------------------------------


def _exported_rows(tasks: dict[int, Task], judgments: Iterable[Judgment]) -> list[dict[str, Any]]:
    """Returns the comparison rows, as `export.comparisons` does."""
    judged = by_task(judgments)
    rows = []
    for task in tasks.values():
        row = None
        if task.gold is None and task.id in judged:
            row = comparison_row(task, judged[task.id])
        if row is not None:
            rows.append(row)
    return rows


def _votes_in(rows: Iterable[dict[str, Any]]) -> tuple[agreement.Votes, list[str]]:
    """Returns the votes on pairs that two people judged, and the names of the annotators by number.

    The readers merge rows with the same prompt and category, so a pair of texts is one item in all of these rows.
    """
    items: list[int] = []
    annotators: list[int] = []
    labels: list[float] = []
    item_of_pair: dict[tuple[str, ...], int] = {}
    numbers: dict[str, int] = {}
    rows = list(rows)
    questions = [(_key(row["prompt"]), str(row.get("category"))) for row in rows]
    n_rows_of = Counter(questions)
    for row, question in zip(rows, questions, strict=True):
        keys = [str(k) for k in range(len(row["completions"]))]
        if n_rows_of[question] > 1:
            keys = [_key(completion) for completion in row["completions"]]
        for vote in row["votes"]:
            i, j = vote["pair"]
            label = vote["label"]
            if keys[i] > keys[j]:
                i, j, label = j, i, 1 - label
            items.append(item_of_pair.setdefault((*question, keys[i], keys[j]), len(item_of_pair)))
            annotators.append(numbers.setdefault(vote["annotator"], len(numbers)))
            labels.append(label)
    names = list(numbers)  # in the order of their numbers
    return _shared(items, annotators, labels), names


def _shared(items: list[int], annotators: list[int], labels: list[float]) -> agreement.Votes:
    votes = agreement.votes_of(items, annotators, labels)
    return votes._replace(labels=agreement.three_way(votes.labels))


def _key(text: Text) -> str:
    """A text without differences in white space, as the readers compare texts."""
    if isinstance(text, str):
        return " ".join(text.split())
    return json.dumps(text, sort_keys=True)


def _agreement_of(votes: agreement.Votes) -> dict[str, float | None]:
    if not len(votes.labels):
        return {"alpha": None, "kappa": None, "agreement": None}
    return {
        "alpha": _number(agreement.krippendorff_alpha(votes)),
        "kappa": _number(agreement.mean_cohen_kappa(votes)),
        "agreement": _number(agreement.percent_agreement(votes)),
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _by_category(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row.get("category") or "", []).append(row)
    found = {}
    for category in sorted(groups):
        group = groups[category]
        votes, _ = _votes_in(group)
        labels = [vote["label"] for row in group for vote in row["votes"]]
        people = [{vote["annotator"] for vote in row["votes"]} for row in group]
        found[category] = {
            "tasks": len(group),
            "judgments": sum(map(len, people)),
            "agreement": _agreement_of(votes)["agreement"],
            "ties_share": _share([label == 0.5 for label in labels]),
        }
    return found


# --- what one person did ---------------------------------------------------------------------------------------------


def _count(person: _Person, judgment: Judgment, task: Task) -> None:
    if judgment.is_skip:
        person.skipped += 1
        return
    person.judged += 1
    if judgment.seconds > 0:
        person.seconds.append(judgment.seconds)
    best = _best(judgment)
    if best is None:  # a rating
        return
    n_completions = len(task.completions)
    person.ties.append(len(best) == n_completions)
    if task.gold is not None:
        person.right.append(best <= set(task.gold["best"]))
    if n_completions == 2 and len(best) == 1:
        _count_side(person, judgment, task, winner=min(best))


def _best(judgment: Judgment) -> set[int] | None:
    """Returns the completions that the person put first, or None if the answer does not say it."""
    answer = judgment.answer
    if "preference" in answer:
        if answer["preference"] == 4:
            return {0, 1}
        return {0} if answer["preference"] < 4 else {1}
    if "ranks" in answer:
        ranks = answer["ranks"]
        return {k for k, rank in enumerate(ranks) if rank == min(ranks)}
    return None


def _count_side(person: _Person, judgment: Judgment, task: Task, winner: int) -> None:
    if judgment.seconds > 0:  # of imported judgments, the order is not known
        person.first.append(judgment.order[0] == winner)
    lengths = [len(_plain(completion)) for completion in task.completions]
    if lengths[0] != lengths[1]:
        person.longer.append(lengths[winner] == max(lengths))


def _plain(text: Text) -> str:
    if isinstance(text, str):
        return text
    return "\n".join(str(message.get("content") or "") for message in text)


def _share(values: Sequence[bool]) -> float | None:
    return fmean(values) if values else None


# --- outliers --------------------------------------------------------------------------------------------------------


def _records(people: list[_Person]) -> list[dict[str, Any]]:
    records = []
    for person in people:
        others = [other for other in people if other is not person and other.judged >= LEAST_JUDGMENTS]
        reasons = []
        if person.judged >= LEAST_JUDGMENTS:
            # Each of the tests below may be wrong for each person.
            limit = _ERROR_RATE / (1 + len(others))
            reasons = [*_too_fast(person, others), *_below_rest(person, others, limit), *_one_side(person, limit)]
        if len(person.right) >= LEAST_GOLD:
            reasons += _gold_is_low(person, others, _ERROR_RATE / (1 + len(others)))
        records.append(person.as_record(reasons))
    return records


def _too_fast(person: _Person, others: list[_Person]) -> list[str]:
    medians = [median(other.seconds) for other in others if other.seconds]
    if not person.seconds or not medians:
        return []
    own, usual = median(person.seconds), median(medians)
    if own >= usual * _FAST:
        return []
    return [f"much faster than the others: {own:.1f} s per judgment, the others {usual:.1f} s"]


def _below_rest(person: _Person, others: list[_Person], limit: float) -> list[str]:
    n_agreed, n_shared = person.agreed
    of_others = sum(other.agreed[1] for other in others)
    if n_shared < LEAST_JUDGMENTS or not of_others:
        return []
    usual = sum(other.agreed[0] for other in others) / of_others
    share = n_agreed / n_shared
    if share > usual - _BELOW_REST or _chance(n_agreed, n_shared, usual, "less") > limit:
        return []
    return [f"agrees with the others less than they do: {share:.0%} of {n_shared} pairs, the others {usual:.0%}"]


def _one_side(person: _Person, limit: float) -> list[str]:
    reasons = []
    n_decided = len(person.first)
    if n_decided >= LEAST_JUDGMENTS:
        n_first = sum(person.first)
        share = max(n_first, n_decided - n_first) / n_decided
        side = "first" if n_first * 2 > n_decided else "second"
        if share >= _ONE_SIDE and _chance(n_first, n_decided, 0.5, "two-sided") <= limit:
            reasons.append(f"chooses nearly always the answer shown {side}: {share:.0%} of {n_decided}")
    ties = _share(person.ties)
    if ties is not None and len(person.ties) >= LEAST_JUDGMENTS and ties >= _ONE_SIDE:
        reasons.append(f"says nearly always that the answers are equal: {ties:.0%} of {len(person.ties)}")
    return reasons


def _gold_is_low(person: _Person, others: list[_Person], limit: float) -> list[str]:
    of_others = [value for other in others for value in other.right]
    expected = _EXPECTED_GOLD
    if len(of_others) >= LEAST_JUDGMENTS:
        expected = min(fmean(of_others), _BEST_GOLD)
    n_right, n_gold = sum(person.right), len(person.right)
    if _chance(n_right, n_gold, expected, "less") > limit:
        return []
    return [f"gold accuracy is low: {n_right} of {n_gold} right"]


def _chance(n_hits: int, n_all: int, share: float, alternative: str) -> float:
    """Returns the probability of a count so extreme if the true share is `share` (binomial test)."""
    from scipy.stats import binomtest  # takes most of a second to import

    return float(binomtest(n_hits, n_all, share, alternative=alternative).pvalue)
