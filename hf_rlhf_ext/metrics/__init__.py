"""Names, units and plots of metrics, and metric modules for the library `evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate

PREFERENCE_NAMES = (
    "longer_wins_gain",
    "pairwise_accuracy",
    "preference_calibration",
    "preference_groups",
    "preference_nll",
)
"""Names of the metric modules for reward models."""
SYSTEM_NAMES = ("distinct_n", "kl_to_reference", "refusal_rate", "repetition", "win_rate")
"""Names of the metric modules for a system that answers."""
NAMES = PREFERENCE_NAMES + SYSTEM_NAMES
"""Names of all metric modules."""


def load_metric(name: str) -> "evaluate.Metric":
    """Loads a metric for reward models or for generated answers, without network access.

    `inputs_description` lists the arguments of its `compute`. For reward models, these are `predictions`, the reward
    differences r_i - r_j of the pairs, and `references`, the probabilities P(i over j) in [0, 1], where 0.5 is a tie.
    For `"win_rate"`, `predictions` are P(the answer of the system is better), one for each prompt; for
    `"kl_to_reference"`, log-probabilities of the tokens of each completion under the policy, with those under the
    reference as `references`; for the others, texts.

    Args:
        name: `"pairwise_accuracy"`, `"preference_nll"`, `"preference_calibration"`, `"preference_groups"` or
            `"longer_wins_gain"` of a reward model; `"win_rate"`, `"kl_to_reference"`, `"distinct_n"`, `"repetition"`
            or `"refusal_rate"` of a system that answers.

    Returns:
        An `evaluate.Metric`.

    Raises:
        ValueError: There is no metric with this name.
    """
    if name not in NAMES:
        raise ValueError(f"no metric {name!r}: choose one of {', '.join(NAMES)}.")
    import evaluate  # slow to import, and not needed for the names and units of metrics

    return evaluate.load(str(Path(__file__).parent / name))
