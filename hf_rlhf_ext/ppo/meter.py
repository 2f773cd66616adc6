"""Means of metrics between two logs, over processes."""

from collections import defaultdict

from torch import Tensor

from .ranks import Ranks


class Meter:
    """Sums of metrics since the last log; `means` ends them.

    Two kinds of values come in. A *share* is this process's part of a number that all processes make together, such as
    the loss of a mini-batch: shares are summed. An *observation* is a number that every process has by itself, such as
    the KL of a gathered rollout: the mean over processes counts.
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._sums: dict[str, float | Tensor] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)

    def add(self, name: str, value: Tensor | float, count: float = 1.0) -> None:
        """Adds this process's share `value`; `count` is its weight in the mean, the same on every process."""
        if isinstance(value, Tensor):
            value = value.detach()  # stays on its device: reading it would wait for a GPU in every step
        self._sums[name] += value
        self._counts[name] += count

    def observe(self, name: str, value: Tensor | float) -> None:
        """Adds a number that every process has by itself."""
        self.add(name, value / self._ranks.count)

    def means(self) -> dict[str, float]:
        """The mean of every metric, and a new start. Every process must call it: shares are summed over them."""
        own = {name: float(total) for name, total in self._sums.items()}
        sums: dict[str, float] = {}
        for part in self._ranks.gather(own):
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + value
        # A reward function may log a metric on some processes only: then its count is unknown here, and it is 1.
        means = {name: total / self._counts.get(name, 1.0) for name, total in sums.items()}
        self.reset()
        return means

    def reset(self) -> None:
        """Forgets what was added."""
        self._sums.clear()
        self._counts.clear()
