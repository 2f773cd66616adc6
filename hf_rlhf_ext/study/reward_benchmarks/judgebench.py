"""JudgeBench (Tan et al. 2024, arXiv:2410.12784): pairs of answers of one model, of which one is right.

The aggregation follows github.com/ScalerLab/JudgeBench, commit 12a499c5c29f06940d259b49250fca627d2a0ee5,
`utils/metrics.py` (`compute_final_metrics` with both orders), and commit d8740a811eb8c64a37eb22a1f3c80ff194ec284d,
`run_judge.py`, for the four sources. Each pair is judged in both orders. A judge that names the right answer more often
than the wrong one is correct. A reward model scores each answer by itself, so both orders agree, except for equal
scores: upstream prefers the second answer then (`utils/judges.py`), once each, which is not correct.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .measures import Outcome, Term, measured
from .rows import BadRow, BenchmarkRow, ScoredRow, text_of

NAME = "judgebench"
TITLE = "JudgeBench"
HUB_ID = "ScalerLab/JudgeBench"
SPLITS = ("gpt", "claude")
SOURCE = "https://github.com/ScalerLab/JudgeBench/blob/12a499c5c29f06940d259b49250fca627d2a0ee5/utils/metrics.py"

CATEGORIES = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}
"""Beginning of the name of a source -> its category."""
FIRST_SPLIT = "gpt-4o"
"""Answers of this model (350 pairs) are those of the main results. Other models are reported separately."""


def matches(record: Mapping[str, Any]) -> bool:
    """Whether a record has the published shape."""
    return all(name in record for name in ("question", "response_A", "response_B", "label", "source"))


def read_row(record: Mapping[str, Any], number: int) -> BenchmarkRow:
    """Reads a row: `question`, `response_A`, `response_B`, `label` (`A>B` or `B>A`), `source`, `response_model`."""
    answers = [text_of(record, "response_A"), text_of(record, "response_B")]
    label = record.get("label")
    if label not in ("A>B", "B>A"):
        raise BadRow(f"`label` is {label!r}, neither 'A>B' nor 'B>A'")
    if label == "B>A":
        answers.reverse()
    source = text_of(record, "source")
    found = [category for start, category in CATEGORIES.items() if source.startswith(start)]
    if not found:
        raise BadRow(f"`source` {source!r} starts with none of {', '.join(CATEGORIES)}")
    model = str(record.get("response_model") or "")
    return BenchmarkRow(text_of(record, "question"), tuple(answers), 1, found[0], unit=str(number), split=model)


def correct_in_both_orders(right: float, wrong: float) -> bool:
    """Whether the right answer wins over both orders of a pair, given the scores of the two answers."""
    votes = 0
    for first, second, right_is_first in ((right, wrong, True), (wrong, right, False)):
        prefers_first = first > second
        votes += 1 if prefers_first == right_is_first else -1
    return votes > 0


def aggregate(scored: Sequence[ScoredRow], *, seed: int = 0) -> Outcome:
    """The share of correct pairs, over all sources and by category, for each model whose answers were judged."""
    models = sorted({entry.row.split for entry in scored}, key=lambda name: (not name.startswith(FIRST_SPLIT), name))
    parts: dict[str, np.ndarray] = {}
    formulas: dict[str, list[Term]] = {}
    for model in models:
        pairs = [entry for entry in scored if entry.row.split == model]
        # The score is that of the first model; the names of the others' measures say whose answers they are of.
        suffix = "" if model == models[0] else f", answers of {model}"
        _add(parts, formulas, f"score{suffix}", pairs)
        for category in CATEGORIES.values():
            _add(parts, formulas, f"{category}{suffix}", [pair for pair in pairs if pair.row.group == category])
    notes = []
    if len(models) > 1:
        notes.append(f"the score is over answers of {models[0]}, as published; other answers are reported separately")
    return Outcome(measures=measured(parts, formulas, seed=seed), notes=tuple(notes))


def _add(parts: dict[str, np.ndarray], formulas: dict[str, list[Term]], name: str, pairs: Sequence[ScoredRow]) -> None:
    """Adds the share of correct pairs under a name, if there are any."""
    if pairs:
        parts[name] = np.array([correct_in_both_orders(pair.correct[0], pair.wrong[0]) for pair in pairs], float)
        formulas[name] = [Term(name, 1.0)]
