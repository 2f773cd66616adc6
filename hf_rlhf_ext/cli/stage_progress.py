"""One progress bar over all stages of a run, with the time left."""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence

from tqdm import tqdm

BAR = "{desc}: {percentage:3.0f}%|{bar:30}| {elapsed} elapsed, {postfix}"

SHORT = 0.1
"""A stage with a smaller weight takes no time that matters."""


class StageProgress:
    """How far a run of stages is, and how long the rest takes.

    The time of a stage that is still to come is that of the same stage in another part of the run (`seed-0/ppo` for
    `seed-1/ppo`), or follows from its weight and from the weights and times of the finished ones.

    Args:
        names: all stages in their order, as `part/stage`.
        weights: how long a stage takes, compared with others; by the name of a stage without its part. Default is 1.
        seconds: seconds of the stages that earlier calls finished. They are kept, and take no time now, unless
            `redo` or `begin` says otherwise.
        draws_bar: whether there is a bar on stderr. Default is only where it is a terminal.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        weights: Mapping[str, float] | None = None,
        seconds: Mapping[str, float] | None = None,
        draws_bar: bool | None = None,
    ):
        self.weights = dict(weights or {})
        self.seconds = dict(seconds or {})
        self.left = list(names)
        self.kept = set(self.seconds)
        self.total = len(self.left)
        self.draws_bar = sys.stderr.isatty() if draws_bar is None else draws_bar
        self._current: str | None = None
        self._began = 0.0
        self._fraction: float | None = None
        self._bar: tqdm | None = None

    # ---- Called by the runner of the stages ----

    def begin(self, name: str) -> None:
        """A stage begins."""
        self.kept.discard(name)
        self._current = name
        self._began = time.monotonic()
        self._fraction = None
        self._draw()

    def redo(self, names: Iterable[str]) -> None:
        """Stages are done again, although an earlier call finished them."""
        self.kept.difference_update(names)

    def end(self, name: str, seconds: float) -> None:
        """A stage has ended."""
        self.seconds[name] = seconds
        self.skip(name)

    def skip(self, name: str) -> None:
        """A stage takes no time, as an earlier call finished it or it failed."""
        if name in self.left:
            self.left.remove(name)
        self._current = None
        self._draw()

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    # ---- Called by the stages ----

    def advance(self, fraction: float) -> None:
        """Sets how much of the current stage is done, from 0 to 1."""
        self._fraction = min(max(fraction, 0.0), 1.0)
        self._draw()

    # ---- The time left ----

    def expected(self, name: str) -> float | None:
        """Seconds that a stage takes; None if nothing is known yet."""
        stage = name.rpartition("/")[2]
        same = [seconds for other, seconds in self.seconds.items() if other.rpartition("/")[2] == stage]
        if same:
            return sum(same) / len(same)
        if self._weight(name) < SHORT:
            return 0.0
        # The overhead of a short stage says nothing about how long the others take.
        measured = {other: seconds for other, seconds in self.seconds.items() if self._weight(other) >= SHORT}
        if not measured:
            return None
        weight = sum(self._weight(other) for other in measured)
        return sum(measured.values()) / weight * self._weight(name)

    def _weight(self, name: str) -> float:
        return self.weights.get(name.rpartition("/")[2], 1.0)

    def seconds_left(self) -> float | None:
        """Seconds until the last stage has ended; None if nothing is known yet."""
        left = 0.0
        for name in self.left:
            if name in self.kept:
                continue
            expected = self.expected(name)
            if name == self._current:
                spent = time.monotonic() - self._began
                if self._fraction:
                    expected = spent / self._fraction
                expected = None if expected is None else max(expected - spent, 0.0)
            if expected is None:
                return None
            left += expected
        return left

    def time_left(self, name: str) -> str:
        """The time left from the beginning of a stage on, for its line; empty if nothing is known yet."""
        seconds = self.seconds_left()
        return "" if seconds is None else f", about {tqdm.format_interval(seconds)} left"

    def _draw(self) -> None:
        if not self.draws_bar:
            return
        if self._bar is None:
            self._bar = tqdm(total=100.0, bar_format=BAR, dynamic_ncols=True, leave=False, disable=False)
        done = self.total - len(self.left)
        seconds = self.seconds_left()
        remaining = "?" if seconds is None else tqdm.format_interval(seconds)
        self._bar.set_description_str(f"stage {min(done + 1, self.total)} of {self.total}", refresh=False)
        self._bar.set_postfix_str(f"{remaining} left", refresh=False)
        self._bar.n = 100.0 * (done + (self._fraction or 0.0)) / max(self.total, 1)
        self._bar.refresh()
