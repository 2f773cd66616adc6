"""Means of metrics between two logs, over all processes."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from ..errors import UserError
from .ranks import Ranks

OWN_METRICS = frozenset(
    (
        *("loss", "grad_norm", "value_grad_norm", "learning_rate", "lr_value", "epoch", "step", "episode", "runtime"),
        *("objective/kl", "objective/kl_k3", "objective/kl_exact", "objective/kl_coef", "objective/entropy"),
        *("objective/scores", "objective/scores_std", "objective/rlhf_reward", "objective/non_score_reward"),
        *("policy/entropy_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/kl_loss"),
        *("policy/stopped_early", "loss/policy_avg", "loss/value_avg", "loss/ptx", "guards/skipped_steps"),
        *("val/ratio", "val/clipfrac_avg", "val/explained_variance", "val/num_eos_tokens"),
        *("completions/mean_length", "completions/stopped_frac", "completions/masked_frac"),
        *("objective/par", "objective/reference_scores", "objective/overlong_penalty"),
        *("sampling/logprob_mismatch", "rewards/clipped_frac", "frac_reward_zero_std"),
    )
)
"""Names of the metrics that the trainer logs, besides those of each reward function."""


def metric_logger(record: Callable[[str, Any], None], function_names: Iterable[str]) -> Callable[[str, Any], None]:
    """Makes the `log_metric(name, value)` that reward functions get.

    Args:
        record: called with the name and the value of each metric that is usable.
        function_names: names of the reward functions, which have metrics of their own.

    Returns:
        The function. It raises `UserError` for the name of a metric of the trainer, which would be mixed with it, and
        for a value that is not a number.
    """
    taken = set(OWN_METRICS)
    for function in function_names:
        taken |= {f"rewards/{function}/mean", f"rewards/{function}/std"}

    def log_metric(name: str, value: Any) -> None:
        if not isinstance(name, str):
            raise UserError(f"log_metric({name!r}): the name of a metric is text: give a string.")
        if name in taken:
            mine = name.replace("/", "_")
            raise UserError(
                f"log_metric({name!r}): the trainer logs a metric of this name: give yours another, such as my/{mine}."
            )
        if not _is_number(value):
            raise UserError(f"log_metric({name!r}): the value is a {type(value).__name__}: give one number.")
        record(name, value)

    return log_metric


def _is_number(value: Any) -> bool:
    """True for a number, and for a tensor or an array with one element."""
    if isinstance(value, Real):
        return True
    return hasattr(value, "ndim") and getattr(value, "nbytes", 0) == getattr(value, "itemsize", None)


class Meter:
    """Sums metrics from one log to the next.

    There are two kinds of values. A *share* is the part of this process in a number that all processes compute
    together, such as the loss of a mini-batch; shares are summed over processes. An *observation* is a number that
    every process has, such as the KL of a gathered rollout; it is averaged over processes.
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._sums: dict[str, float | Tensor] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)
        self._open: set[str] = set()

    def add(self, name: str, value: Tensor | float, count: float = 1.0) -> None:
        """Adds a share.

        Args:
            name: name of the metric.
            value: the share of this process.
            count: its weight in the mean over time, the same on every process.
        """
        if isinstance(value, Tensor):
            value = value.detach()  # stays on its device, as reading it would wait for the GPU in every step
        self._sums[name] += value
        self._counts[name] += count

    def observe(self, name: str, value: Tensor | float) -> None:
        """Adds an observation."""
        self.add(name, value / self._ranks.count)

    def leave_open(self, name: str) -> None:
        """Says that a metric is not defined this time: its mean is over the other times, or NaN if there is none."""
        self._open.add(name)

    def means(self) -> dict[str, float]:
        """Returns the mean of every metric and resets the sums. Every process must call it, as shares are gathered."""
        own = {name: float(total) for name, total in self._sums.items()}
        sums: dict[str, float] = {}
        for part in self._ranks.gather(own):
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + value
        # A reward function may log a metric on some processes only. If this process does not have it, its count is 1.
        means = {name: total / self._counts.get(name, 1.0) for name, total in sums.items()}
        for name in self._open:
            means.setdefault(name, math.nan)
        self.reset()
        return means

    def snapshot(self) -> Callable[[], None]:
        """Returns a function that makes the sums what they are now again, for a step that is repeated."""
        sums = _copied(self._sums)
        counts = dict(self._counts)
        left_open = set(self._open)

        def restore() -> None:
            self._sums = defaultdict(float, _copied(sums))
            self._counts = defaultdict(float, counts)
            self._open = set(left_open)

        return restore

    def reset(self) -> None:
        """Sets all sums to zero."""
        self._sums.clear()
        self._counts.clear()
        self._open.clear()


def _copied(sums: Mapping[str, float | Tensor]) -> dict[str, float | Tensor]:
    """The sums as values of their own, as tensors are added to in place."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in sums.items()}
