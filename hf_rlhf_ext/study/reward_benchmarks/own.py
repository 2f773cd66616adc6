"""A reward model on comparisons of your own: accuracy with its interval, ties, and accuracy by category."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...quality.reward_check import judged_pairs
from ...reward.preference_metrics import JudgedPairs
from .measures import Measure, Outcome


def measure_comparisons(
    rows: Sequence[Mapping[str, Any]], scores: Sequence[Sequence[float]], *, calibrated: bool = True
) -> Outcome:
    """Measures of comparison rows, as `hf-rlhf check-reward` computes them.

    Args:
        rows: Comparison rows, as `load_comparisons` returns them.
        scores: Scores of the completions of each row.
        calibrated: Whether scores are log-odds. If not, as in an ensemble, nothing is said of likelihood and ties.

    Returns:
        The first measure is the accuracy over pairs that are no ties. If there are only ties, there is no accuracy.
    """
    judged = judged_pairs(list(rows), list(scores), _n_words)
    report = judged.report()
    decided = int(np.sum(judged.targets != 0.5))
    measures = {}
    if decided:
        measures["accuracy"] = _measure(report, "accuracy", decided)
        baseline = report["longer_wins_baseline"]
        measures["accuracy of preferring the longer"] = Measure(baseline, None, decided)
        measures["gain over it"] = _measure(report, "gain", decided)
    if calibrated:
        if "accuracy_ties" in report:
            measures["accuracy with ties"] = Measure(report["accuracy_ties"], None, len(judged.targets))
        measures["nats per pair"] = Measure(report["nll"], None, len(judged.targets))
    for name, group in judged.groups().get("category", {}).items():
        measures[f"category {name}"] = Measure(group["accuracy"], None, group["n"])
    return Outcome(measures=measures, details=_details(judged, decided), notes=_notes(decided))


def _n_words(text: str) -> int:
    return len(text.split())


def _measure(report: Mapping[str, float], name: str, n: int) -> Measure:
    interval = None
    if f"{name}_low" in report:  # a single prompt has none
        interval = (report[f"{name}_low"], report[f"{name}_high"])
    return Measure(report[name], interval, n)


def _details(judged: JudgedPairs, decided: int) -> dict[str, Any]:
    groups = judged.groups()
    groups.pop("category", None)
    n_pairs = len(judged.targets)
    return {"pairs": n_pairs, "ties": n_pairs - decided, "groups": groups}


def _notes(decided: int) -> tuple[str, ...]:
    return () if decided else ("every judgment is a tie: there is no accuracy",)
