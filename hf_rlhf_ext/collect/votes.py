"""From judgments to comparison rows: pairs, votes, targets, flags and category of one task."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from .answers import FLAGS
from .records import Judgment
from .tasks import Task

Vote = dict[str, Any]
Pair = tuple[int, int]


def votes_of(judgment: Judgment) -> list[Vote]:
    """Returns the votes of a judgment, one per pair of completions. A skip and a rating have none.

    `label` is P(the first of the pair is better): 1, 0.5 or 0. `confidence` is 1/3 for "slightly better", 2/3 for
    "better" and 1 for "much better"; ties and ranks have none.
    """
    answer = judgment.answer
    if "votes" in answer:  # imported
        return [{"annotator": judgment.annotator, **vote} for vote in answer["votes"]]
    if "preference" in answer:
        label, confidence = _of_preference(answer["preference"])
        return [{"annotator": judgment.annotator, "pair": [0, 1], "label": label, "confidence": confidence}]
    votes = []
    ranks = answer.get("ranks", [])
    for i, j in combinations(range(len(ranks)), 2):
        label = 0.5
        if ranks[i] != ranks[j]:
            label = float(ranks[i] < ranks[j])  # 1 is best
        votes.append({"annotator": judgment.annotator, "pair": [i, j], "label": label, "confidence": None})
    return votes


def _of_preference(preference: int) -> tuple[float, float | None]:
    """Returns label and confidence of the 7-point scale."""
    if preference == 4:
        return 0.5, None
    return float(preference < 4), abs(preference - 4) / 3


def preference_of(label: float, confidence: float | None) -> int | None:
    """Returns the point of the scale that a vote on completions 0 and 1 stands for, or None if it has none."""
    for preference in range(1, 8):
        of_label, of_confidence = _of_preference(preference)
        if label == of_label and confidence == of_confidence:
            return preference
    return None


def comparison_row(task: Task, judgments: Sequence[Judgment]) -> dict[str, Any] | None:
    """Returns the comparison row of a task with its live judgments, or None if none of them compares completions."""
    votes = [vote for judgment in judgments for vote in votes_of(judgment)]
    if not votes:
        return None
    labels: dict[Pair, list[float]] = {}
    for vote in votes:
        i, j = vote["pair"]
        label = vote["label"]
        if i > j:  # only in imported votes
            i, j, label = j, i, 1 - label
        labels.setdefault((i, j), []).append(label)
    pairs = sorted(labels)
    row: dict[str, Any] = {
        "prompt": task.prompt,
        "completions": task.completions,
        "pairs": [list(pair) for pair in pairs],
        "targets": [sum(labels[pair]) / len(labels[pair]) for pair in pairs],
        "votes": votes,
        "flags": flags_of(judgments),
    }
    more = {
        "category": category_of(task, judgments),
        "source": task.source,
        "row": task.row,
        "made_by": task.made_by or None,
    }
    row |= {name: value for name, value in more.items() if value is not None}
    return row


def flags_of(judgments: Iterable[Judgment]) -> list[str]:
    """Returns the flags that anybody gave, with the number of the completion: `harmful:1`."""
    found = set()
    for judgment in judgments:
        for k, names in enumerate(judgment.answer.get("flags", [])):
            found.update(f"{name}:{k}" for name in names)
    return sorted(found)


def flags_by_completion(flags: Iterable[str], n_completions: int) -> list[list[str]]:
    """The inverse of `flags_of`. Other flags are left out."""
    given = set(flags)
    return [[name for name in FLAGS if f"{name}:{k}" in given] for k in range(n_completions)]


def category_of(task: Task, judgments: Iterable[Judgment]) -> str | None:
    """Returns the category that most people gave. Who did not correct it agrees with that of the task."""
    named: Counter[str | None] = Counter()
    for judgment in judgments:
        correction = judgment.answer.get("category")
        if correction is not None or not judgment.is_skip:
            named[correction or task.category] += 1
    if not named:
        return task.category
    most = max(named.values())
    # Of several with the same number, the task's own, then the first one.
    if named[task.category] == most:
        return task.category
    return next(category for category, count in named.items() if count == most)


def by_task(judgments: Iterable[Judgment]) -> dict[int, list[Judgment]]:
    """Returns task id -> its judgments, in their order."""
    found: dict[int, list[Judgment]] = {}
    for judgment in judgments:
        found.setdefault(judgment.task_id, []).append(judgment)
    return found
