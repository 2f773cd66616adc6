"""Says once that a reward does not differ between completions, so that nothing can be learned from it."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers.trainer_callback import ExportableState

from .callbacks import PPOCallback

logger = logging.getLogger(__name__)

ENOUGH = 32
"""Number of completions after which equal rewards are no chance; rewards that are mostly 0 may be equal in fewer."""
ENOUGH_AT_END = 4
"""The same at the end of a run, where a line costs nothing, for a reward that has never differed."""
TIMES_ENOUGH_OF_TWO_VALUES = 4
"""Factor on `ENOUGH` for a reward such as right or wrong: completions of a prompt often have the same one."""
ENOUGH_ROLLOUTS = 5
"""Number of rollouts in which a reward that has differed must be constant."""
TOLERANCE = 1e-6
"""Standard deviation, as a fraction of the mean or of 1, that rounding may leave of equal rewards."""
EVALUATION = "eval/"
"""Begins the names of problems of rewards that only evaluation asks."""
THE_SUM = ""
"""Key of the weighted sum of the rewards, beside the names of the functions."""


@dataclass
class Spread:
    """What is known of one reward so far.

    Attributes:
        asked: number of completions.
        scored: number of completions in rollouts in which it scored any.
        value: the reward of all completions of the last rollout, if it was one.
        has_differed: whether any two completions got different rewards.
        flat: number of completions, and `flat_rollouts` of rollouts, since it last differed.
        of_prompts: number of completions that share a prompt with a different one in their rollout.
        values_of_prompts: up to three different rewards of such completions.
        differs_in_prompts: whether completions of one prompt got different rewards.
    """

    asked: int = 0
    scored: int = 0
    value: float | None = None
    has_differed: bool = False
    flat: int = 0
    flat_rollouts: int = 0
    of_prompts: int = 0
    values_of_prompts: list[float] | None = None
    differs_in_prompts: bool = False

    def add(self, mean: float | None, std: float | None, n: int) -> None:
        """Adds a rollout of `n` completions with its mean and deviation; `None` if no completion was scored."""
        self.asked += n
        if mean is None or not math.isfinite(mean):
            return
        self.scored += n
        is_flat = n > 0 and std is not None and std <= TOLERANCE * max(1.0, abs(mean))
        is_same = self.value is None or math.isclose(self.value, mean, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        if not is_flat or not is_same:
            self.has_differed = True
            self.flat = 0
            self.flat_rollouts = 0
        if is_flat:
            self.flat += n
            self.flat_rollouts += 1
        self.value = mean if is_flat else None

    def add_prompts(self, prompts: Sequence[Any], completions: Sequence[str], scores: Sequence[float]) -> None:
        """Adds the completions of a rollout, to compare those of one prompt."""
        groups: dict[str, list[tuple[str, float]]] = defaultdict(list)
        for prompt, completion, score in zip(prompts, completions, scores, strict=True):
            if math.isfinite(score):
                groups[str(prompt)].append((completion, score))
        for group in groups.values():
            if len({completion for completion, _ in group}) < 2:
                continue
            low = min(score for _, score in group)
            high = max(score for _, score in group)
            if high - low > TOLERANCE * max(1.0, abs(high)):
                self.differs_in_prompts = True
            self.of_prompts += len(group)
            self.values_of_prompts = sorted({*(self.values_of_prompts or []), round(low, 6)})[:3]


def problems(spreads: Mapping[str, Spread], *, enough: int = ENOUGH) -> dict[str, str]:
    """The rewards that do not differ: one line each with a probable cause, by the name of the problem.

    Args:
        spreads: what is known of each reward function by its name, and of their sum under `THE_SUM`.
        enough: number of completions below which nothing is said of a reward that has never differed.
    """
    found = {}
    functions = {name: spread for name, spread in spreads.items() if name != THE_SUM}
    is_alone = len(functions) == 1
    for name, spread in functions.items():
        effect = "the policy learns nothing" if is_alone else "it adds a constant, which teaches nothing"
        found |= _never_differed(name, spread, effect, enough)
        if not is_alone:
            found |= _differs_no_more(name, spread)
        found |= _reads_the_prompt(name, spread)
    total = spreads.get(THE_SUM)
    differ = functions and all(spread.has_differed for spread in functions.values())
    if total is not None and differ and not total.has_differed and total.scored >= enough:
        found["sum"] = (
            f"the weighted sum of the rewards is {total.value:.3g} for every completion, all {total.scored} so far, "
            "though each of them differs: the policy learns nothing. Check reward_weights"
        )
    return found


def _never_differed(name: str, spread: Spread, effect: str, enough: int) -> dict[str, str]:
    """A reward that scored nothing, or gave every completion the same; `effect` says what follows from the latter."""
    if spread.has_differed or spread.asked < enough:
        return {}
    if spread.scored == 0:
        line = (
            f"reward {name!r} returned None for all {spread.asked} completions so far, so it counts for nothing. "
            "Check that it reads the right key, and that the column that it reads has values"
        )
        return {f"none/{name}": line}
    if spread.scored < enough:
        return {}
    line = (
        f"reward {name!r} gave every completion {spread.value:.3g}, all {spread.scored} so far: {effect}. Check that "
        "it reads the right key or column, and that the prompts are neither too hard nor too easy; log_completions "
        "shows completions with rewards"
    )
    return {f"constant/{name}": line}


def _differs_no_more(name: str, spread: Spread) -> dict[str, str]:
    """One of several rewards that differed before and is constant now."""
    is_long = spread.flat >= ENOUGH and spread.flat_rollouts >= ENOUGH_ROLLOUTS
    if not spread.has_differed or not is_long:
        return {}
    line = (
        f"reward {name!r} gave every completion {spread.value:.3g} in the last {spread.flat_rollouts} rollouts, and "
        "differed before: it teaches nothing any more. Make it harder, or raise the weight of the others"
    )
    return {f"flat/{name}": line}


def _reads_the_prompt(name: str, spread: Spread) -> dict[str, str]:
    """A reward that differs between prompts, and never between the completions of a prompt."""
    n_values = len(spread.values_of_prompts or ())
    if spread.differs_in_prompts or n_values < 2:
        return {}
    enough = ENOUGH if n_values > 2 else TIMES_ENOUGH_OF_TWO_VALUES * ENOUGH
    if spread.of_prompts < enough:
        return {}
    line = (
        f"reward {name!r} gave all completions of a prompt the same, and differs between prompts only (over "
        f"{spread.of_prompts} completions of prompts that came up several times in a rollout). Check that it reads the "
        "completion, and not the prompt or a column alone"
    )
    return {f"prompts/{name}": line}


class RewardSpread(PPOCallback, ExportableState):
    """Logs a warning once when a reward turns out not to differ between completions.

    Attributes:
        spreads: what is known of each reward, by its name.
        lines: the warnings that were logged, by the name of the problem.
    """

    def __init__(self):
        self.spreads: dict[str, dict[str, Any]] = {}
        self.lines: dict[str, str] = {}

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint stores and Transformers restores."""
        return {"args": {}, "attributes": {"spreads": self.spreads, "lines": self.lines}}

    def on_rollout(self, args, state, control, *, metrics, rollout_index, completions, **kwargs):
        if completions is None:
            return
        known = self._known()
        n = args.rollout_size * args.world_size
        for name, scores in completions.rewards.items():
            spread = known.setdefault(name, Spread())
            spread.add(metrics.get(f"rewards/{name}/mean"), metrics.get(f"rewards/{name}/std"), n)
            spread.add_prompts(completions.prompts, completions.completions, scores)
        total = known.setdefault(THE_SUM, Spread())
        total.add(metrics["objective/scores"], metrics["objective/scores_std"], n)
        self.spreads = {name: asdict(spread) for name, spread in known.items()}
        self._say(problems(known), state, rollout_index)

    def on_eval_completions(self, args, state, control, *, rows, **kwargs):
        known = {}
        for name in rows[0].rewards:
            if name in self.spreads:  # training asks it too
                continue
            scores = [row.rewards[name] for row in rows if math.isfinite(row.rewards[name])]
            known[name] = spread = Spread(asked=len(rows))
            if scores and len(scores) == len(rows):
                same = max(scores) - min(scores) <= TOLERANCE * max(1.0, abs(scores[0]))
                spread.scored, spread.value, spread.has_differed = len(scores), scores[0], not same
            elif scores:
                spread.scored, spread.has_differed = len(scores), True
        if not self.spreads:  # before the first rollout it is not known which rewards training asks
            return
        for name, spread in known.items():
            found = _never_differed(name, spread, "it cannot tell policies apart", ENOUGH)
            self._say({f"{EVALUATION}{key}": f"evaluation: {line}" for key, line in found.items()}, state, None)

    def on_train_end(self, args, state, control, **kwargs):
        known = self._known()
        self._say(problems(known, enough=ENOUGH_AT_END), state, None)

    def lines_that_hold(self) -> list[str]:
        """The warnings that were logged and still hold: a reward that was constant at first may have differed later."""
        found = problems(self._known(), enough=ENOUGH_AT_END)
        lines = []
        for problem, line in self.lines.items():
            if problem.startswith(EVALUATION):
                lines.append(line)
            elif problem in found:
                lines.append(found[problem])  # with the numbers of now
        return lines

    def _known(self) -> dict[str, Spread]:
        return {name: Spread(**values) for name, values in self.spreads.items()}

    def _say(self, found: dict[str, str], state: Any, rollout_index: int | None) -> None:
        for problem, line in found.items():
            if problem in self.lines:
                continue
            self.lines[problem] = line
            if not state.is_world_process_zero:
                continue
            if rollout_index is None:
                logger.warning("step %d: %s.", state.global_step, line)
            else:
                logger.warning("step %d, rollout %d: %s.", state.global_step, rollout_index, line)


def said_of_rewards(callbacks: Iterable[Any]) -> list[str]:
    """The warnings of the `RewardSpread` among the callbacks of a trainer that hold, in the order of their logs."""
    spreads = [callback for callback in callbacks if isinstance(callback, RewardSpread)]
    return [line for spread in spreads for line in spread.lines_that_hold()]
