"""Improves comparisons: soft targets from the reliability of annotators, and filters that report removed judgments."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from ..data.schema import (
    Comparison,
    LoadReport,
    PreferenceDataError,
    as_dataset,
    has_own_weights,
    is_empty,
    renumbered,
)
from ..data.text import plain_text
from .agreement import lower_first, three_way
from .duplicates import words_of
from .packages import data_package

_WINNER = {1.0: "first", 0.0: "second", 0.5: "tie"}

Check = Callable[[Comparison], set[int]]
"""Maps a comparison row to the indices of the judgments to remove."""


def weigh_by_reliability(dataset: Dataset, *, iterations: int = 100) -> tuple[Dataset, dict[str, float]]:
    """Computes targets from votes, weighted by the reliability of each annotator (Dawid & Skene 1979, by crowd-kit).

    The model estimates a confusion matrix for each annotator and the probabilities of the true answer for each pair.
    The new target is P(first) + P(tie) / 2. Pairs without votes keep their target.

    Args:
        dataset: Comparison rows with `votes`.
        iterations: Number of iterations of the EM algorithm.

    Returns:
        The comparisons with new `targets`, and the expected accuracy of each annotator: the mean of the diagonal of
            the confusion matrix, weighted by the frequency of the true answers.

    Raises:
        PreferenceDataError: No row has votes.
    """
    import pandas as pd

    aggregation = data_package("crowdkit.aggregation")
    votes = _votes_as_tasks(dataset)
    _require_votes(votes, "reliability")
    table = pd.DataFrame(votes)
    table["label"] = [_WINNER[label] for label in three_way(table["label"])]
    model = aggregation.DawidSkene(n_iter=iterations)
    # An answer that no annotator gave has no column.
    probabilities = model.fit_predict_proba(table).reindex(columns=list(_WINNER.values()), fill_value=0.0)
    first_is_better = (probabilities["first"] + probabilities["tie"] / 2).to_dict()

    rows = []
    for number, row in enumerate(dataset):
        targets = []
        for (i, j), target in zip(row["pairs"], row["targets"], strict=True):
            # Tasks have the lower index first, in whichever order the row has the pair.
            probability = first_is_better.get((number, min(i, j), max(i, j)))
            if probability is None:
                targets.append(target)
                continue
            _, oriented = lower_first(i, j, probability)
            targets.append(float(oriented))
        rows.append(row | {"targets": targets})
    return as_dataset(rows), _expected_accuracies(model)


def _votes_as_tasks(dataset: Dataset) -> list[dict[str, Any]]:
    """Converts votes to the format of crowd-kit. A pair is one task, in whichever order it was shown."""
    votes = []
    for number, row in enumerate(dataset):
        for vote in row.get("votes") or ():
            pair, label = lower_first(*vote["pair"], vote["label"])
            votes.append({"task": (number, *pair), "worker": vote["annotator"] or "unnamed", "label": label})
    return votes


def _require_votes(has_votes: Any, option: str) -> None:
    if not has_votes:
        raise PreferenceDataError(
            f"comparisons: no row has `votes`: {option} needs the judgments of single annotators: leave it out."
        )


def _expected_accuracies(model: Any) -> dict[str, float]:
    """Returns, for each annotator, the sum over true answers of P(answer) · P(the annotator gives this answer)."""
    accuracies = {}
    for annotator, confusion in model.errors_.groupby(level=0):
        accuracy = 0.0
        for label, prior in model.priors_.items():
            given_if_true = confusion.loc[(annotator, label)].get(label, 0.0)
            accuracy += prior * given_if_true
        accuracies[str(annotator)] = float(accuracy)
    return accuracies


def filter_comparisons(
    dataset: Dataset,
    *,
    drop_contradictions: bool = False,
    max_length_gap: int | None = None,
    min_agreement: float | None = None,
) -> tuple[Dataset, LoadReport]:
    """Removes judgments, with their votes and with completions that are then in no pair.

    A row without judgments is dropped, and reported by its `row`.

    Args:
        dataset: Comparison rows.
        drop_contradictions: Whether to remove pairs that were judged both ways.
        max_length_gap: Remove pairs whose completions differ by more than this number of words.
        min_agreement: Remove pairs for which less than this share of the votes (first, second or tie) agrees with the
            majority. Pairs without votes are kept.

    Returns:
        The rows, and a report. Its `flagged` counts rows that lost some of their judgments, by reason.

    Raises:
        PreferenceDataError: No row is left, or `min_agreement` is set and no row has votes.
    """
    if min_agreement is not None:
        _require_votes("votes" in dataset.column_names and any(dataset["votes"]), "min_agreement")
    checks = _checks(drop_contradictions, max_length_gap, min_agreement)
    report = LoadReport(source="filter", rows_in=len(dataset))
    rows = []
    for number, row in enumerate(dataset):
        # Rows are reported by their number in the source, if it is known.
        if row.get("row") is not None:
            number = row["row"]
        kept_row = _checked(row, number, checks, report)
        if kept_row is not None:
            rows.append(kept_row)
    report.kept = len(rows)
    if not rows:
        raise PreferenceDataError(f"{report.summary()}: the filters leave nothing, loosen them.")
    return as_dataset(rows), report


def _checks(drop_contradictions: bool, max_length_gap: int | None, min_agreement: float | None) -> dict[str, Check]:
    """Returns the requested checks, by the reason that the report gives."""
    checks: dict[str, Check] = {}
    if drop_contradictions:
        checks["contradictory judgments"] = _contradicted
    if max_length_gap is not None:
        checks[f"sides differ by more than {max_length_gap} words"] = lambda row: _far_apart(row, max_length_gap)
    if min_agreement is not None:
        checks[f"agreement under {min_agreement:g}"] = lambda row: _disputed(row, min_agreement)
    return checks


def _checked(
    row: Comparison,
    number: int,
    checks: dict[str, Check],
    report: LoadReport,
) -> Comparison | None:
    """Removes the judgments that fail a check, and reports them. Returns None if no judgment is left."""
    removed: set[int] = set()
    for reason, check in checks.items():
        failing = check(row)
        if len(removed | failing) == len(row["pairs"]):
            report.drop(reason, number)
            return None
        if failing:
            report.flag(f"lost judgments: {reason}", number)
        # Counted per check: a judgment that fails two of them is flagged for both.
        removed |= failing
    if removed:
        return _without(row, removed)
    return row


def _without(row: Comparison, removed: set[int]) -> Comparison:
    """Removes judgments from a row, with their votes and with completions that are then in no pair."""
    kept_pairs = [number for number in range(len(row["pairs"])) if number not in removed]
    compared: set[int] = set()
    still_judged: set[frozenset[int]] = set()
    for number in kept_pairs:
        compared.update(row["pairs"][number])
        still_judged.add(frozenset(row["pairs"][number]))
    kept_completions = sorted(compared)
    new_number = {old: new for new, old in enumerate(kept_completions)}

    votes = [vote for vote in row.get("votes") or () if frozenset(vote["pair"]) in still_judged]
    filtered = renumbered(row | {"votes": votes}, new_number, kept_pairs)
    filtered["completions"] = [row["completions"][number] for number in kept_completions]
    if not has_own_weights(row):
        filtered["weights"] = None  # the remaining pairs share the weight of the prompt again
    # The empty completion may have been removed.
    if row.get("flags") and not any(map(is_empty, filtered["completions"])):
        filtered["flags"] = [flag for flag in filtered["flags"] if flag != "empty_completion"]
    return filtered


def _contradicted(row: Comparison) -> set[int]:
    """Finds judgments of pairs in which each side won at least once, including ties of such pairs."""
    winners: dict[frozenset[int], set[int]] = {}
    for (i, j), target in zip(row["pairs"], row["targets"], strict=True):
        if target > 0.5:
            winners.setdefault(frozenset((i, j)), set()).add(i)
        elif target < 0.5:
            winners.setdefault(frozenset((i, j)), set()).add(j)
    contradicted = set()
    for number, pair in enumerate(row["pairs"]):
        if len(winners.get(frozenset(pair), ())) > 1:
            contradicted.add(number)
    return contradicted


def _far_apart(row: Comparison, limit: int) -> set[int]:
    """Finds judgments whose completions differ by more than `limit` words."""
    n_words = [len(words_of(plain_text(completion))) for completion in row["completions"]]
    far_apart = set()
    for number, (i, j) in enumerate(row["pairs"]):
        if abs(n_words[i] - n_words[j]) > limit:
            far_apart.add(number)
    return far_apart


def _disputed(row: Comparison, least: float) -> set[int]:
    """Finds judgments of pairs in which the majority has less than the share `least` of the votes."""
    labels_of_pair: dict[tuple[int, int], list[float]] = {}
    for vote in row.get("votes") or ():
        pair, label = lower_first(*vote["pair"], vote["label"])
        labels_of_pair.setdefault(pair, []).append(label)
    disputed = set()
    for number, (i, j) in enumerate(row["pairs"]):
        labels = labels_of_pair.get((min(i, j), max(i, j)))
        if labels is None:
            continue
        # Graded votes agree if they have the same winner.
        majority = max(Counter(three_way(labels).tolist()).values())
        if majority / len(labels) < least:
            disputed.add(number)
    return disputed
