"""Where a run is in its prompts, and how many optimizer steps it takes, also if its batch sizes changed on the way."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .config import PPOConfig


class Sizes(NamedTuple):
    """The size of a rollout.

    Attributes:
        completions: number of completions, over all processes.
        steps: number of optimizer steps on them.
        generations: number of completions per prompt.
    """

    completions: int
    steps: int
    generations: int = 1

    @property
    def prompts(self) -> int:
        """Number of prompts, over all processes."""
        return self.completions // self.generations

    @classmethod
    def of(cls, geometry: Mapping[str, int]) -> Self:
        """The sizes that the options of a run give, see `state.geometry`."""
        per_process = geometry["per_device_train_batch_size"] * geometry["gradient_accumulation_steps"]
        completions = per_process * geometry["num_mini_batches"] * geometry["num_processes"]
        steps = geometry["num_ppo_epochs"] * geometry["num_mini_batches"]
        return cls(completions, steps, geometry.get("num_generations", 1))  # earlier versions sampled one


class Stretch(NamedTuple):
    """A part of a run in which all rollouts have the same size. A resumed run with other sizes begins a new one.

    A position counts prompts from the start of training, pass after pass over the dataset: 0 is the first prompt of the
    first pass.

    Attributes:
        rollout: number of its first rollout.
        prompt: position of the first prompt of that rollout.
        step: number of optimizer steps before it.
        run: position of the first prompt of the run: not 0 if `train` was called again in the same process.
        completions: number of completions before it since the start of training; `None` if there was one per prompt.
    """

    rollout: int = 0
    prompt: int = 0
    step: int = 0
    run: int = 0
    completions: int | None = None

    @classmethod
    def of(cls, state: Mapping) -> Self:
        """The stretch in the state file of a checkpoint. Earlier versions saved none, or fewer fields."""
        return cls(**state.get("stretch", {}))

    def position(self, rollout: int, prompts: int) -> int:
        """Position of the first prompt of a rollout in this stretch, whose rollouts have `prompts` prompts."""
        return self.prompt + (rollout - self.rollout) * prompts

    def completions_before(self, rollout: int, completions: int) -> int:
        """Number of completions before a rollout in this stretch, whose rollouts have `completions` completions."""
        before = self.prompt if self.completions is None else self.completions
        return before + (rollout - self.rollout) * completions

    def steps_before(self, rollout: int, steps: int) -> int:
        """Number of optimizer steps of the run before a rollout in this stretch, whose rollouts take `steps` steps."""
        return self.step + (rollout - self.rollout) * steps

    def steps_in_run(self, num_train_epochs: float, n_prompts: int, sizes: Sizes) -> int:
        """The optimizer step after which `n_prompts` prompts were used `num_train_epochs` times since the run began."""
        asked = round(num_train_epochs * n_prompts, 6)  # 1.1 * 200 is 220.00000000000003
        left = asked - (self.prompt - self.run)
        rollouts = max(0, math.ceil(left / sizes.prompts))
        return self.step + rollouts * sizes.steps


def stretch_after(checkpoint: Path, state: Mapping, now: Sizes) -> Stretch:
    """The stretch in which a run goes on from a checkpoint.

    Args:
        checkpoint: folder of the checkpoint.
        state: content of its state file. Earlier versions saved no stretch.
        now: the sizes of the resumed run.

    Returns:
        The stretch of the checkpoint if the sizes are the same, or else a new one. It begins with the next rollout.
    """
    stretch = Stretch.of(state)
    saved = Sizes.of(state["geometry"])
    if saved == now:
        return stretch
    following = state["rollouts"] + 1
    step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
    return Stretch(
        rollout=following,
        prompt=stretch.position(following, saved.prompts),
        step=step,
        run=stretch.run,
        completions=stretch.completions_before(following, saved.completions),
    )


@contextmanager
def steps_after(
    stretch: Stretch, args: PPOConfig, n_prompts: int, sizes: Sizes, *, counts_epochs: bool
) -> Iterator[None]:
    """Inside the context, `max_steps` is that of a run with `num_train_epochs` that goes on with other sizes.

    Without it, its steps, of which the earlier ones had other sizes, would use more or fewer prompts than asked for.

    Args:
        stretch: the stretch in which the run goes on.
        args: options, with `max_steps`.
        n_prompts: number of prompts in the dataset.
        sizes: the sizes of the rollouts.
        counts_epochs: whether `max_steps` was computed from `num_train_epochs`. A number that was set afterward stays.
    """
    given = args.max_steps
    has_other_steps = counts_epochs and stretch.step > 0
    if has_other_steps and given == Stretch().steps_in_run(args.num_train_epochs, n_prompts, sizes):
        args.max_steps = stretch.steps_in_run(args.num_train_epochs, n_prompts, sizes)
    try:
        yield
    finally:
        args.max_steps = given


def said_of_other_sizes(saved: Sizes, now: Sizes, position: int, args: PPOConfig, *, counts_epochs: bool) -> str:
    """What changes where a run goes on with other sizes, in one line."""
    end = f"max_steps={args.max_steps}, which counts steps of both sizes"
    if counts_epochs:
        end = f"step {args.max_steps}, when num_train_epochs={args.num_train_epochs:g} are complete"
    size, before = f"{now.completions} completions", f"{saved.completions}"
    if saved.generations != now.generations:
        size += f" of {now.prompts} prompts"
        before += f" of {saved.prompts}"
    return (
        f"a rollout now has {size} for {now.steps} steps, and had {before} for {saved.steps}: the prompts go on after "
        f"the first {position}, and training ends at {end}"
    )
