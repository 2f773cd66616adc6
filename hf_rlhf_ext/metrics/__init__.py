"""Names, units and plots of metrics, and metric modules for the library `evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate

NAMES = ("longer_wins_gain", "pairwise_accuracy", "preference_calibration", "preference_groups", "preference_nll")
"""Names of the metric modules."""


def load_metric(name: str) -> "evaluate.Metric":
    """Loads a metric for reward models, without network access.

    Its `compute` takes `predictions`, the reward differences r_i - r_j of the pairs, and `references`, the
    probabilities P(i over j) in [0, 1], where 0.5 is a tie. `inputs_description` lists further arguments.

    Args:
        name: `"pairwise_accuracy"`, `"preference_nll"`, `"preference_calibration"`, `"preference_groups"` or
            `"longer_wins_gain"`.

    Returns:
        An `evaluate.Metric`.

    Raises:
        ValueError: There is no metric with this name.
    """
    if name not in NAMES:
        raise ValueError(f"no metric {name!r}: choose one of {', '.join(NAMES)}.")
    import evaluate  # slow to import, and not needed for the names and units of metrics

    return evaluate.load(str(Path(__file__).parent / name))
