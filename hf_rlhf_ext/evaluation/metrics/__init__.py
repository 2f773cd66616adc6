"""Figures of preference models as `evaluate.Metric` modules: each folder also loads with `evaluate.load(path)`."""

from pathlib import Path

import evaluate

NAMES = ("longer_wins_gain", "pairwise_accuracy", "preference_calibration", "preference_groups", "preference_nll")


def load_metric(name: str) -> evaluate.Metric:
    """The metric of that name, without asking the Hub.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in NAMES:
        raise ValueError(f"no metric {name!r}: there are {', '.join(NAMES)}.")
    return evaluate.load(str(Path(__file__).parent / name))
