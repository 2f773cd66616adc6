"""The sizes with which `auto_batch` begins: the largest that the plan of the run says fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..modeling.memory.plan import MemoryPlan
from ..modeling.memory.planner import PlanRequest, plan_of
from ..modeling.memory.setup import Setup
from .auto_batch import COMPLETIONS, TOKENS, Sizes

_MOST_PLANS = 5
"""Number of plans of a search. Each takes a few seconds on a busy machine."""

_ROUNDING = 0.01
"""In prompts, added before a size is rounded down, as the rounded reserve could cut off a size that just fits."""

_TRAINED = ("training step", "scoring", "policy update", "value update", "PPO-ptx", "evaluation")
_SAMPLED = ("rollout", "evaluation")
"""Phases of a plan whose passes `max_tokens_per_batch` bounds, and those that `generation_batch_size` bounds."""


@dataclass(frozen=True)
class _Passes:
    """What goes through the model at one time, in prompts with all their completions.

    Attributes:
        trained: prompts of a pass of training.
        sampled: prompts whose completions are sampled together; 0 in reward training.
    """

    trained: int
    sampled: int

    @classmethod
    def of(cls, setup: Setup) -> "_Passes":
        """The passes with these options."""
        rows = setup.rows(setup.train_batch)
        if setup.stage != "ppo":  # a row is a comparison with all its completions
            return cls(rows, 0)
        return cls(max(1, rows // setup.per_prompt), max(1, setup.generation_batch // setup.per_prompt))

    def tokens(self, setup: Setup) -> int:
        """Tokens of a pass of training, with texts of the longest length."""
        if setup.layout == "shared_prefix":
            return self.trained * (setup.prompt_tokens + setup.per_prompt * setup.completion_tokens)
        return self.trained * setup.per_prompt * setup.length

    def completions(self, setup: Setup) -> int:
        """Completions that are sampled together."""
        return self.sampled * setup.per_prompt


class _Need(NamedTuple):
    """What a phase needs with passes of one kind.

    Attributes:
        kind: `trained` or `sampled`, see `_Passes`.
        size: size of these passes.
        n_bytes: bytes of the phase.
    """

    kind: str
    size: int
    n_bytes: int


@dataclass(frozen=True)
class _Try:
    """A plan with passes of certain sizes."""

    passes: _Passes
    plan: MemoryPlan

    def needs(self) -> Iterator[_Need]:
        """What each phase needs, for each kind of pass in it. The order is the same in all plans of a run."""
        for phase in self.plan.phases:
            if phase.name in _TRAINED:
                yield _Need("trained", self.passes.trained, phase.n_bytes)
            if phase.name in _SAMPLED and self.passes.sampled:
                yield _Need("sampled", self.passes.sampled, phase.n_bytes)


def planned_sizes(request: PlanRequest, card_bytes: int, plan: MemoryPlan | None = None) -> Sizes:
    """The largest sizes that fit, for those that do not fit as they are.

    Bytes grow with the size of a pass in a straight line, but for a step that begins to add up gradients. So the search
    goes along lines between plans, for all sizes at the same time, and ends with the first plan that fits.

    Args:
        request: the run, with the lengths of its texts.
        card_bytes: memory of the card in bytes.
        plan: the plan of the run, if it is known already.

    Returns:
        By name in `SIZES`. Nothing for sizes of the options that fit. Passes of one prompt, the smallest there are,
        where not even these fit.
    """
    large = _Try(_Passes.of(request.setup), plan_of(request) if plan is None else plan)
    if large.plan.fits(card_bytes):
        return {}
    most = large.passes
    small = _try(request, _Passes(1, min(1, most.sampled)))
    for _ in range(_MOST_PLANS - 2):
        passes = _between(small, large, card_bytes)
        if passes == large.passes:  # no size bounds what does not fit
            small = large
        if passes == small.passes:
            break
        tried = _try(request, passes)
        if _fits(tried, small, card_bytes):
            small = tried
            break
        large = tried
    sizes: Sizes = {}
    if small.passes.trained < most.trained:
        sizes[TOKENS] = small.passes.tokens(request.setup)
    if small.passes.sampled < most.sampled:
        sizes[COMPLETIONS] = small.passes.completions(request.setup)
    return sizes


def _try(request: PlanRequest, passes: _Passes) -> _Try:
    setup = request.setup
    own = _Passes.of(setup)
    if passes.trained < own.trained:
        setup = replace(setup, max_tokens_per_batch=passes.tokens(setup))
    if passes.sampled < own.sampled:
        completions = passes.completions(setup)
        setup = replace(setup, generation_batch=completions, generation_limit=completions)
    return _Try(passes, plan_of(replace(request, setup=setup)))


def _between(small: _Try, large: _Try, card_bytes: int) -> _Passes:
    """The largest passes whose phases fit, if bytes lie on the lines between two plans."""
    room = _room(small.plan, large.plan, card_bytes)
    found = {"trained": large.passes.trained, "sampled": large.passes.sampled}
    for low, high in zip(small.needs(), large.needs(), strict=True):
        if high.n_bytes <= room or high.n_bytes <= low.n_bytes:  # it fits, or this kind of pass does not matter
            continue
        share = max(0.0, (room - low.n_bytes) / (high.n_bytes - low.n_bytes))
        size = low.size + int(share * (high.size - low.size) + _ROUNDING)
        size = max(low.size, min(size, high.size - 1))
        found[low.kind] = min(found[low.kind], size)
    return _Passes(**found)


def _room(small: MemoryPlan, large: MemoryPlan, card_bytes: int) -> float:
    """Bytes that a phase may need: what the reserve leaves, which grows with the peak."""
    growth = large.peak.n_bytes - small.peak.n_bytes
    share = (large.reserve - small.reserve) / growth if growth > 0 else 0.0
    return (card_bytes - small.reserve + share * small.peak.n_bytes) / (1 + share)


def _fits(tried: _Try, small: _Try, card_bytes: int) -> bool:
    """Whether all phases fit, but for those that no smaller pass makes fit."""
    room = card_bytes - tried.plan.reserve
    for need, smallest in zip(tried.needs(), small.needs(), strict=True):
        if need.n_bytes > room and need.size > smallest.size:
            return False
    return True
