"""RewardBench 2 (Malik et al. 2025, arXiv:2506.01937): best of four completions in five subsets, and the subset Ties.

The aggregation follows github.com/allenai/reward-bench, commit a0096928eb1d54edd3f6361374708cc68e738b79,
`rewardbench/utils.py`: `reroll_and_score_dataset` (best of four) and `process_single_model` (Ties). The score is the
unweighted mean of the six subsets, as in section 4 of the paper.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .measures import Outcome, Term, measured, score_of_all
from .rows import BadRow, BenchmarkRow, ScoredRow, text_of, texts_of

NAME = "reward-bench-2"
TITLE = "RewardBench 2"
HUB_ID = "allenai/reward-bench-2"
SPLITS = ("test",)
SOURCE = "https://github.com/allenai/reward-bench/blob/a0096928eb1d54edd3f6361374708cc68e738b79/rewardbench/utils.py"

SUBSETS = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
TIES = "Ties"
TIES_WEIGHTS = (0.30, 0.30, 0.20, 0.20, 0.01)
"""Weights of the columns of Ties: accuracy on tied prompts, accuracy on reference prompts, margin preferred, margin
preferred by the harder of both prompts, and the margin score that breaks ties."""


def matches(record: Mapping[str, Any]) -> bool:
    """Whether a record has the published shape."""
    return "num_correct" in record and isinstance(record.get("rejected"), Sequence) and "subset" in record


def read_row(record: Mapping[str, Any], number: int) -> BenchmarkRow:
    """Reads a row: `prompt`, the lists `chosen` and `rejected`, `num_correct`, `subset`, `id`.

    The `id` of a row of Ties is `ref:N` or `tied:N`. The two rows with the same N belong together.
    """
    chosen = texts_of(record, "chosen")
    rejected = texts_of(record, "rejected")
    names = {name.lower(): name for name in SUBSETS}
    subset = text_of(record, "subset")
    if subset.lower() not in names:
        raise BadRow(f"`subset` {subset!r} is no subset of {TITLE}")
    subset = names[subset.lower()]
    n_correct = record.get("num_correct")
    if n_correct != len(chosen):
        raise BadRow(f"`num_correct` is {n_correct}, and `chosen` has {len(chosen)} texts")
    unit, kind = str(number), ""
    if subset == TIES:
        kind, colon, prompt_id = str(record.get("id")).partition(":")
        if kind not in ("ref", "tied") or not colon:
            raise BadRow("the `id` of a row of Ties is neither `ref:N` nor `tied:N`")
        if kind == "tied" and n_correct < 2:
            raise BadRow("a tied row has a single right completion")
        unit = f"ties {prompt_id}"
    return BenchmarkRow(text_of(record, "prompt"), chosen + rejected, len(chosen), subset, unit=unit, split=kind)


def aggregate(scored: Sequence[ScoredRow], *, seed: int = 0) -> Outcome:
    """The score is the mean of the subsets that have rows.

    In all but Ties, a row counts 1 if the right completion has the highest score alone, 1/m if it shares it with m - 1
    others, else 0. With several right completions the first one counts, as upstream. Ties is `ties_table`.
    """
    parts: dict[str, np.ndarray] = {}
    for subset in SUBSETS:
        rows = [entry for entry in scored if entry.row.group == subset]
        if rows:
            parts[subset] = ties_table(rows) if subset == TIES else np.array([best_of(entry) for entry in rows])
    score, notes = score_of_all([subset for subset in SUBSETS if subset not in parts], "subset")

    sections: dict[str, list[Term]] = {}
    for subset in parts:
        columns = TIES_WEIGHTS if subset == TIES else (1.0,)
        sections[subset] = [Term(subset, 1.0, columns)]
    total = [term._replace(weight=1 / len(parts)) for terms in sections.values() for term in terms]
    measures = measured(parts, {score: total, **sections}, seed=seed)
    return Outcome(measures=measures, notes=notes)


def best_of(entry: ScoredRow) -> float:
    """1 if the first completion, a right one, has the highest score; 1/m if m completions share it; else 0."""
    highest = max(entry.scores)
    if entry.scores[0] < highest:
        return 0.0
    return 1 / entry.scores.count(highest)


class _Margins(NamedTuple):
    """Margins of one row of Ties.

    Attributes:
        spread: Best minus worst right completion.
        gap: Worst right minus best wrong completion. The row is accurate if it is positive.
    """

    spread: float
    gap: float


def _margins(rows: Sequence[ScoredRow], split: str) -> dict[str, _Margins]:
    """The margins of the tied or the reference row of each prompt. Rows with the same `id` are one row, as upstream."""
    scores: dict[str, tuple[list[float], list[float]]] = {}
    for entry in rows:
        if entry.row.split == split:
            correct, wrong = scores.setdefault(entry.row.unit, ([], []))
            correct += entry.correct
            wrong += entry.wrong
    return {
        unit: _Margins(max(correct) - min(correct), min(correct) - max(wrong))
        for unit, (correct, wrong) in scores.items()
    }


def ties_table(rows: Sequence[ScoredRow]) -> np.ndarray:
    """Five numbers of each prompt of Ties, in the order of `TIES_WEIGHTS`: (prompts, 5) float64.

    A prompt has a tied row, with several right completions, and a reference row, with one. NaN stands for a number that
    needs a row which is not there. The margin score is tanh(min(gap of both rows) / spread - 1). With a spread of 0 it
    is 1 or -1, and 0 where the gap is 0 as well.
    """
    tied, reference = _margins(rows, "tied"), _margins(rows, "ref")
    table = []
    for unit in sorted(tied.keys() | reference.keys()):
        numbers = [math.nan] * 5
        if unit in tied:
            numbers[0] = float(tied[unit].gap > 0)
        if unit in reference:
            numbers[1] = float(reference[unit].gap > 0)
        if unit in tied and unit in reference:
            spread = tied[unit].spread
            smaller_gap = min(tied[unit].gap, reference[unit].gap)
            numbers[2] = float(tied[unit].gap > spread)
            numbers[3] = float(smaller_gap > spread)
            numbers[4] = _margin_score(smaller_gap, spread)
        table.append(numbers)
    return np.array(table, float)


def _margin_score(gap: float, spread: float) -> float:
    if spread == 0:  # all right completions have the same score
        return float(np.sign(gap))
    return math.tanh(gap / spread - 1)
