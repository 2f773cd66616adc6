"""Using what is known about labels: annotators' reliability as soft targets, and filters that say what they took."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from ..metrics.agreement import three_way
from .duplicates import words_of
from .schema import Comparison, LoadReport, PreferenceDataError, as_dataset, has_own_weights, is_empty
from .text import plain_text

_WINNER = {1.0: "first", 0.0: "second", 0.5: "tie"}


def weigh_by_reliability(dataset: Dataset, *, iterations: int = 100) -> tuple[Dataset, dict[str, float]]:
    """Targets from votes by how reliable each annotator is (Dawid & Skene 1979, through crowd-kit).

    The model learns for every annotator how often each true answer is given as each answer, and for every pair the
    probabilities of its true answer: target = P(first) + P(tie) / 2. Pairs without votes keep their target.

    Returns:
        The comparisons with new `targets`, and each annotator's expected accuracy, the mean diagonal of the confusion
        matrix weighted by how often each answer is true.

    Raises:
        PreferenceDataError: no row has votes.
    """
    import pandas as pd
    from crowdkit.aggregation import DawidSkene

    votes = []
    for n, row in enumerate(dataset):
        for vote in row.get("votes") or ():
            i, j = vote["pair"]  # a vote that shows the pair the other way round is turned: one pair is one task
            label = vote["label"] if i < j else 1 - vote["label"]
            votes.append({"task": (n, min(i, j), max(i, j)), "worker": vote["annotator"] or "unnamed", "label": label})
    _need_votes(votes, "reliability")
    table = pd.DataFrame(votes)
    table["label"] = [_WINNER[label] for label in three_way(table["label"])]
    model = DawidSkene(n_iter=iterations)
    chances = model.fit_predict_proba(table).reindex(columns=list(_WINNER.values()), fill_value=0.0)
    first = (chances["first"] + chances["tie"] / 2).to_dict()

    def retarget(row: Comparison, n: int) -> Comparison:
        targets = []
        for (i, j), target in zip(row["pairs"], row["targets"], strict=True):
            chance = first.get((n, min(i, j), max(i, j)))
            targets.append(target if chance is None else float(chance if i < j else 1 - chance))
        return row | {"targets": targets}

    rows = [retarget(row, n) for n, row in enumerate(dataset)]
    return as_dataset(rows), _accuracies(model)


def _need_votes(found: Any, option: str) -> None:
    if not found:
        raise PreferenceDataError(
            f"comparisons: no row has `votes`: {option} needs the judgements of single people, leave it out."
        )


def _accuracies(model: Any) -> dict[str, float]:
    """Σ over true answers of P(answer) · P(annotator gives it)."""
    errors, priors = model.errors_, model.priors_
    return {
        str(worker): float(sum(priors[label] * matrix.loc[(worker, label)].get(label, 0.0) for label in priors.index))
        for worker, matrix in errors.groupby(level=0)
    }


def filter_comparisons(
    dataset: Dataset,
    *,
    drop_contradictions: bool = False,
    max_length_gap: int | None = None,
    min_agreement: float | None = None,
) -> tuple[Dataset, LoadReport]:
    """Takes judgements out, with their votes and the completions that nothing is left to compare with.

    A row without any left is dropped and reported by its `row`.

    Args:
        drop_contradictions: pairs of a prompt that were judged both ways.
        max_length_gap: pairs whose sides differ by more words than this.
        min_agreement: pairs of which fewer than this share of the votes (first, second or tie) agree with the majority;
            pairs without votes stay.

    Returns:
        The rows, and a report whose `flagged` counts rows that lost some of their judgements, by reason.

    Raises:
        PreferenceDataError: nothing is left, or `min_agreement` for rows of which none has votes.
    """
    checks: dict[str, Callable[[Comparison], set[int]]] = {}
    if drop_contradictions:
        checks["contradictory judgements"] = _contradicted
    if max_length_gap is not None:
        checks[f"sides differ by more than {max_length_gap} words"] = lambda row: _far_apart(row, max_length_gap)
    if min_agreement is not None:
        _need_votes("votes" in dataset.column_names and any(dataset["votes"]), "min_agreement")
        checks[f"agreement under {min_agreement:g}"] = lambda row: _disputed(row, min_agreement)
    report = LoadReport(source="filter", rows_in=len(dataset))
    rows = []
    for n, row in enumerate(dataset):
        number = n if row.get("row") is None else row["row"]
        out: set[int] = set()
        for reason, check in checks.items():
            found = check(row)
            if len(out | found) == len(row["pairs"]):
                report.drop(reason, number)
                break
            if found:
                report.flag(f"lost judgements: {reason}", number)
            out |= found
        else:
            rows.append(_without(row, out) if out else row)
    report.kept = len(rows)
    if not rows:
        raise PreferenceDataError(f"{report.summary()}: the filters leave nothing, loosen them.")
    return as_dataset(rows), report


def _without(row: Comparison, out: set[int]) -> Comparison:
    stay = [n for n in range(len(row["pairs"])) if n not in out]
    pairs = [row["pairs"][n] for n in stay]
    place = {k: n for n, k in enumerate(sorted({k for pair in pairs for k in pair}))}  # old number -> new number
    left = {name: [row[name][n] for n in stay] for name in ("targets", "margins", "weights") if row.get(name)}
    if not has_own_weights(row):
        left["weights"] = None  # a prompt's pairs share its weight anew
    judged = set(map(frozenset, pairs))
    votes = [vote for vote in row.get("votes") or () if frozenset(vote["pair"]) in judged]
    left["votes"] = [vote | {"pair": [place[k] for k in vote["pair"]]} for vote in votes] or None
    left["completions"] = [row["completions"][k] for k in place]
    if row.get("flags") and not any(map(is_empty, left["completions"])):
        left["flags"] = [flag for flag in row["flags"] if flag != "empty_completion"]
    return row | left | {"pairs": [[place[k] for k in pair] for pair in pairs]}


def _contradicted(row: Comparison) -> set[int]:
    winners: dict[frozenset[int], set[int]] = {}
    for (i, j), target in zip(row["pairs"], row["targets"], strict=True):
        if target != 0.5:
            winners.setdefault(frozenset((i, j)), set()).add(i if target > 0.5 else j)
    return {n for n, pair in enumerate(row["pairs"]) if len(winners.get(frozenset(pair), ())) > 1}


def _far_apart(row: Comparison, limit: int) -> set[int]:
    words = [len(words_of(plain_text(completion))) for completion in row["completions"]]
    return {n for n, (i, j) in enumerate(row["pairs"]) if abs(words[i] - words[j]) > limit}


def _disputed(row: Comparison, least: float) -> set[int]:
    cast: dict[frozenset[int], list[float]] = {}
    for vote in row.get("votes") or ():
        i, j = vote["pair"]
        cast.setdefault(frozenset((i, j)), []).append(vote["label"] if i < j else 1 - vote["label"])
    shares = {pair: max(Counter(three_way(labels).tolist()).values()) / len(labels) for pair, labels in cast.items()}
    return {n for n, pair in enumerate(row["pairs"]) if shares.get(frozenset(pair), 1.0) < least}
