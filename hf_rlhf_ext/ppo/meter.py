"""Means of metrics between two logs, over all processes."""

from collections import defaultdict

from torch import Tensor

from .ranks import Ranks


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

    def means(self) -> dict[str, float]:
        """Returns the mean of every metric and resets the sums. Every process must call it, as shares are gathered."""
        own = {name: float(total) for name, total in self._sums.items()}
        sums: dict[str, float] = {}
        for part in self._ranks.gather(own):
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + value
        # A reward function may log a metric on some processes only. If this process does not have it, its count is 1.
        means = {name: total / self._counts.get(name, 1.0) for name, total in sums.items()}
        self.reset()
        return means

    def reset(self) -> None:
        """Sets all sums to zero."""
        self._sums.clear()
        self._counts.clear()
