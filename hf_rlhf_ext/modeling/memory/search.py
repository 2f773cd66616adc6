"""The largest batch or length whose plan fits, from few plans: memory between two of them is interpolated."""

import math
from collections.abc import Callable

from .plan import MemoryPlan
from .planner import reserve_bytes

_CLOSE = 0.01
"""The search ends where the largest value that fits is known to this share."""

_MANY_PLANS = 6
"""After so many plans, the interpolation is not trusted any more, and the range is halved."""


def largest_that_fits(
    plan_with: Callable[[int], MemoryPlan], card_bytes: int, *, start: int, most: int, degree: int
) -> int:
    """Searches the largest value with which a run fits.

    Between few values, each phase grows as a polynomial. It is continued from the plans that are known, and each value
    that it says is checked by a plan, as the largest batches and lengths are cut into parts, which need no more.

    Args:
        plan_with: the plan with a value.
        card_bytes: memory of the card in bytes.
        start: where the search starts.
        most: largest value.
        degree: degree of the polynomial in the value: 1 for a batch, 2 for a length.

    Returns:
        The value, 0 if not even 1 fits. A plan with it fits. One with a value that is 1 % larger (at least by 1) does
        not, unless the value is `most`.
    """
    plans: dict[int, MemoryPlan] = {}
    low, high = 0, most + 1  # `low` fits, `high` does not
    value = min(max(1, start), most)
    while high - low > max(1, _CLOSE * low):
        plans[value] = plan_with(value)
        if plans[value].fits(card_bytes):
            low = value
        else:
            high = value
        if len(plans) <= degree:
            value = _next_to_know(low, high, most)
        elif len(plans) < _MANY_PLANS:
            value = _next_to_check(plans, card_bytes, degree, low, high)
        else:
            value = (low + high) // 2
        value = min(max(value, low + 1), high - 1)
    return low


def _next_to_know(low: int, high: int, most: int) -> int:
    """A value that is far from those that are known, from which a polynomial may be continued."""
    if high > most:
        return 2 * low
    return high // 2 if low == 0 else round(math.sqrt(low * high))


def _next_to_check(plans: dict[int, MemoryPlan], card_bytes: int, degree: int, low: int, high: int) -> int:
    """The value that should be the largest one; the next larger one if that is known to fit."""
    nearest = sorted(plans, key=lambda value: abs(math.log(value / (low or high))))[: degree + 1]
    known = {value: plans[value] for value in nearest}
    largest, too_large = low, high
    while too_large - largest > 1:
        middle = (largest + too_large) // 2
        if _continued(known, middle) <= card_bytes:
            largest = middle
        else:
            too_large = middle
    return largest if largest > low else low + max(1, math.floor(_CLOSE * low))


def _continued(plans: dict[int, MemoryPlan], value: int) -> float:
    """Bytes of the plan with a value, on the polynomials through the phases of the plans that are known."""
    weights = _lagrange(list(plans), value)
    sizes: dict[str, float] = {}
    for weight, plan in zip(weights, plans.values(), strict=True):
        device = plan.device
        for phase in plan.phases:
            sizes[phase.name] = sizes.get(phase.name, 0.0) + weight * phase.n_bytes
    largest = max(sizes.values())
    return largest + reserve_bytes(device, largest)


def _lagrange(points: list[int], value: int) -> list[float]:
    """The weights with which the values of a polynomial at the points sum to its value at another one."""
    weights = []
    for point in points:
        others = [other for other in points if other != point]
        weights.append(math.prod((value - other) / (point - other) for other in others))
    return weights
