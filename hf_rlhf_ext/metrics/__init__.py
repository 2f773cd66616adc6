"""Names, units and plots of metrics; `evaluate.Metric` modules: each loads with `evaluate.load` too."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate

NAMES = ("longer_wins_gain", "pairwise_accuracy", "preference_calibration", "preference_groups", "preference_nll")
"""The metric modules."""


def load_metric(name: str) -> "evaluate.Metric":
    """The metric of that name, without asking the Hub.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in NAMES:
        raise ValueError(f"no metric {name!r}: there are {', '.join(NAMES)}.")
    import evaluate  # heavy: the names and units of metrics do not need it

    return evaluate.load(str(Path(__file__).parent / name))
