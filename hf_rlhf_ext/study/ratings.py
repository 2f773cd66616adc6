"""Bradley-Terry ratings of systems from pairwise judgments, with intervals over prompts and seeds."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import evalica
import numpy as np
from scipy import special
from scipy.sparse import csgraph

from ..errors import UserError
from .statistics import Interval, checked_outcomes, mean_interval, names_of_pair

ELO_PER_LOGIT = 400 / math.log(10)
"""Elo points per unit of log-odds: 400 points are odds of 10 to 1."""

_TOLERANCE = 1e-10
_MAX_ITERATIONS = 100_000


def bradley_terry(
    outcomes: Mapping[tuple[str, str] | str, Sequence[float | None]],
    groups: Sequence[Hashable] | None = None,
    prompts: Sequence[Hashable] | None = None,
    *,
    reference: str | None = None,
    n_resamples: int = 9999,
) -> dict[str, Interval]:
    """Bradley-Terry ratings in Elo points: P(a better than b) = 1 / (1 + 10^((rating_b - rating_a) / 400)).

    The fit is evalica's, with each pair as a win with the weight of its probability and a loss with the rest, so that a
    tie counts one half. Where the data leave a rating infinite (a system, or a set of systems, won or lost everything
    against the others), each compared pair of systems gets one tie more.

    The interval is that of `mean_interval` for the contributions of the rows (a prompt of a seed with all its pairs) to
    a rating (influence function of the fit). `evalica.bootstrap` resamples pairs instead, which takes the pairs of a
    prompt as independent.

    Args:
        outcomes: for each pair of systems, `("a", "b")` or `"a|b"`, the probabilities that `a` is better, (N,): one row
            per prompt and seed, the same rows for all pairs. 0.5 is a tie, None a failed judgment.
        groups: (N,) seed of each row.
        prompts: (N,) prompt of each row; see `mean_interval`.
        reference: system with a rating of 0. None: the mean of all ratings is 0.
        n_resamples: resamples of the bootstrap over prompts of one seed.

    Returns:
        The rating of each system, highest first. That of the reference is exactly 0. Ends are NaN for two systems of
        which one won everything.

    Raises:
        UserError: The pairs have different numbers of rows, an outcome is not between 0 and 1, `reference` is in no
            pair, or no chain of judged pairs connects all systems.
    """
    if not outcomes:
        return {}
    table = _Outcomes.of(outcomes)
    if reference is not None and reference not in table.names:
        raise UserError(f"reference: no pair contains {reference!r}. Systems: {', '.join(table.names)}.")

    logits, influences = table.fit()
    if reference is None:
        origin_number = None
        origin, origin_influences = logits.mean(), influences.mean(1, keepdims=True)
    else:
        origin_number = table.names.index(reference)
        origin, origin_influences = logits[origin_number], influences[:, [origin_number]]
    logits = logits - origin
    influences = influences - origin_influences

    ratings = {}
    for number in np.argsort(-logits, kind="stable"):
        rating = ELO_PER_LOGIT * logits[number]
        contributions = np.where(table.judged_rows, rating + ELO_PER_LOGIT * influences[:, number], math.nan)
        interval = mean_interval(contributions, groups, prompts, n_resamples=n_resamples)
        if number != origin_number and interval.low == interval.high and rating != 0:
            # One side won everything: the tie that was added keeps the rating finite, and says nothing of its error.
            interval = replace(interval, low=math.nan, high=math.nan)
        ratings[table.names[number]] = replace(interval, mean=float(rating))
    return ratings


@dataclass(frozen=True)
class _Outcomes:
    """Outcomes (N, M) of M pairs of systems, NaN where the judge failed; `sides` (M, 2) has the systems' numbers."""

    names: list[str]
    sides: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, outcomes: Mapping[tuple[str, str] | str, Sequence[float | None]]) -> "_Outcomes":
        pairs = [names_of_pair(pair) for pair in outcomes]
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        columns = [checked_outcomes(values) for values in outcomes.values()]
        lengths = {len(column) for column in columns}
        if len(lengths) > 1:
            raise UserError(
                f"Ratings need the same rows for all pairs, got {min(lengths)} to {max(lengths)} rows. Pass None "
                "where a pair was not judged."
            )
        sides = np.array([[names.index(first), names.index(second)] for first, second in pairs])
        return cls(names, sides, np.stack(columns, axis=1))

    @property
    def judged_rows(self) -> np.ndarray:
        """(N,) bool: rows with at least one judgment."""
        return ~np.isnan(self.values).all(1)

    def fit(self) -> tuple[np.ndarray, np.ndarray]:
        """Log strengths of the K systems, (K,), and the influence of each row on them, (N, K), with mean 0."""
        wins = np.nansum(self.values, axis=0)  # (M,)
        losses = np.nansum(1 - self.values, axis=0)
        self._check_connected(wins + losses)
        if not self._finite(wins, losses):
            extra_tie = (wins + losses > 0) / 2
            wins = wins + extra_tie
            losses = losses + extra_tie
        logits = self._strengths(wins, losses)

        predicted = special.expit(logits[self.sides[:, 0]] - logits[self.sides[:, 1]])  # (M,)
        signs = np.zeros((len(self.sides), len(self.names)))  # (M, K): 1 for the first system, -1 for the second
        rows = np.arange(len(self.sides))
        signs[rows, self.sides[:, 0]] = 1
        signs[rows, self.sides[:, 1]] = -1
        information = signs.T @ (signs * ((wins + losses) * predicted * (1 - predicted))[:, None])
        scores = np.nan_to_num(self.values - predicted) @ signs  # (N, K)
        # Strengths are defined up to a constant, so the information matrix has no inverse; the constant stays 0.
        influences = scores @ np.linalg.pinv(information) * self.judged_rows.sum()
        centered = influences - influences[self.judged_rows].mean(0)
        return logits, centered

    def _strengths(self, wins: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """Log strengths by evalica, (K,), with mean 0."""
        firsts = [self.names[number] for number in self.sides[:, 0]]
        seconds = [self.names[number] for number in self.sides[:, 1]]
        result = evalica.bradley_terry(
            [*firsts, *firsts],
            [*seconds, *seconds],
            [evalica.Winner.X] * len(firsts) + [evalica.Winner.Y] * len(firsts),
            weights=np.concatenate([wins, losses]),
            tolerance=_TOLERANCE,
            limit=_MAX_ITERATIONS,
        )
        logits = np.log(result.scores[self.names].to_numpy())
        return logits - logits.mean()

    def _check_connected(self, n_judged: np.ndarray) -> None:
        n_parts, part_of = csgraph.connected_components(self._graph(n_judged, n_judged), directed=False)
        if n_parts > 1:
            apart = ", ".join(name for name, part in zip(self.names, part_of, strict=True) if part != part_of[0])
            raise UserError(
                f"Ratings compare systems through chains of judged pairs, and none connects {self.names[0]} with "
                f"{apart}: judge a pair of both sides, or leave these systems out."
            )

    def _finite(self, wins: np.ndarray, losses: np.ndarray) -> bool:
        """Ford (1957): strengths are finite if no set of systems won everything against the others."""
        n_parts, _ = csgraph.connected_components(self._graph(wins, losses), directed=True, connection="strong")
        return n_parts == 1

    def _graph(self, wins: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """(K, K): how often each system won against each other one."""
        graph = np.zeros((len(self.names), len(self.names)))
        np.add.at(graph, (self.sides[:, 0], self.sides[:, 1]), wins)
        np.add.at(graph, (self.sides[:, 1], self.sides[:, 0]), losses)
        return graph
