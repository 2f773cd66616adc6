"""Automatic batch size: after an out-of-memory error, passes become smaller, and what did not fit is repeated.

A run begins with the largest sizes that fit by its plan, see `planned_sizes`.

The global batch stays as it is. Only the sizes in `SIZES` change, which bound what goes through a model at one time:

- What a process computes alone, such as sampling or scoring, is repeated from its start (`until_it_fits`).
- An optimizer step is repeated from its first micro-step (`OptimizerStep`): gradients are dropped, and random states
  and counters are those from before. So no copy of gradients is needed, and the step is the same as if the smaller
  size had been set.
- Afterward all processes take the smallest sizes (`agree`).
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainingArguments

from ..errors import UserError, first_line
from .engines import Engine, active_engine
from .leaving import RandomState
from .out_of_memory import free_memory, is_out_of_memory

logger = logging.getLogger(__name__)

AUTO_BATCH_FILE = "auto_batch.json"
"""File of the sizes in a checkpoint."""

TOKENS = "max_tokens_per_batch"
COMPLETIONS = "generation_batch_size"
REWARD_TOKENS = "max_tokens of the reward model"

SIZES = {TOKENS: "tokens", COMPLETIONS: "completions", REWARD_TOKENS: "tokens"}
"""Sizes that bound a pass -> their unit. The first two are options, the last one belongs to reward models of PPO."""

_NO_LIMIT = 2**62
_REMEDIES = (
    "set activation_checkpointing, a smaller max_completion_length or max_length, or load_in_4bit, or use fewer "
    "completions per prompt"
)

Result = TypeVar("Result")
Sizes = dict[str, int | None]


def initial_sizes(args: TrainingArguments, plan: Callable[[], Mapping[str, int | None]] | None = None) -> Sizes:
    """The sizes with which a run starts.

    Args:
        args: options of the run.
        plan: returns the largest sizes that should fit, by their names in `SIZES`; `None` as a size means no limit. If
            left out, the run starts with the sizes of the options.

    Returns:
        For each of `SIZES`, the size of the options or a smaller one of the plan; `None` means no limit.
    """
    planned = plan() if plan is not None else {}
    return {name: smaller_of(getattr(args, name, None), planned.get(name)) for name in SIZES}


def smaller_of(*sizes: int | None) -> int | None:
    """The smallest size, where `None` means no limit."""
    limits = [size for size in sizes if size is not None]
    return min(limits, default=None)


@dataclass(frozen=True)
class Pass:
    """What goes through a model at one time.

    Attributes:
        what: what it is for, such as `training`.
        option: the size that bounds it, one of `SIZES`.
        size: its own size, in the unit of `option`, padding included.
        shape: its shape in words.
        n_parts: the number of passes that it takes if `option` has this value. It must not hold large tensors.
    """

    what: str
    option: str
    size: int
    shape: str
    n_parts: Callable[[int], int]


class PassTooLarge(Exception):
    """A pass has run out of memory. It is caught where the pass can be repeated."""

    def __init__(self, failed: Pass):
        super().__init__(failed.what)
        self.failed = failed


class FixedSizes:
    """The sizes of a run without `auto_batch`: those of its options. An out-of-memory error ends it."""

    enabled = False

    @contextmanager
    def one_pass(
        self,
        what: str,
        option: str,
        *,
        rows: int,
        width: int,
        n_parts: Callable[[int], int],
        tokens: int | None = None,
    ) -> Iterator[None]:
        """Around a pass through a model. Here it does nothing.

        Args:
            what: what the pass is for, in words.
            option: the size that bounds it, one of `SIZES`.
            rows: number of sequences.
            width: number of tokens of the longest one.
            n_parts: see `Pass`.
            tokens: number of tokens in which `option` counts the pass; `None` means `rows * width`.
        """
        yield

    def until_it_fits(self, work: Callable[[], Result]) -> Result:
        """Calls a function, and again with smaller passes as long as a pass in it does not fit."""
        return work()

    def attempt(self, work: Callable[[], Result]) -> tuple[Result | None, Pass | None]:
        """Calls a function. Returns its result, or the pass in it that did not fit."""
        return work(), None

    def make_smaller(self, failed: Pass) -> None:
        """Halves the size that bounds a pass until the pass is split, and says so.

        Raises:
            UserError: if the pass cannot be split.
        """

    def limit(self, option: str, own: int | None) -> int | None:
        """The size in force, where an object has one of its own."""
        return own

    def agree(self, *, failed: bool = False) -> bool:
        """Sets the smallest sizes of all processes, which call it together.

        Args:
            failed: whether a pass of this process did not fit.

        Returns:
            Whether a pass of any process did not fit, or a process had larger sizes. It is the same on all of them.
        """
        return False

    def save(self, folder: Path) -> None:
        """Writes the sizes into a checkpoint."""

    def load(self, folder: Path) -> None:
        """Takes the sizes of a checkpoint where they are smaller."""


class AutoBatch(FixedSizes):
    """The sizes of a run with `auto_batch`.

    Args:
        args: options of the run, of which those in `SIZES` always have the current sizes.
        accelerator: the accelerator of the trainer.
        sizes: see `initial_sizes`.
    """

    enabled = True

    def __init__(self, args: TrainingArguments, accelerator: Accelerator, sizes: Sizes):
        self._args = args
        self._accelerator = accelerator
        self.sizes: Sizes = {}
        self._set(sizes)

    def _set(self, sizes: Sizes) -> None:
        self.sizes = sizes
        for name, size in sizes.items():
            if hasattr(self._args, name):
                setattr(self._args, name, size)

    @contextmanager
    def one_pass(
        self,
        what: str,
        option: str,
        *,
        rows: int,
        width: int,
        n_parts: Callable[[int], int],
        tokens: int | None = None,
    ) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.info("auto_batch: %s: %s", type(error).__name__, first_line(error))
        else:
            return
        shape = f"{rows} row{'s' * (rows != 1)} of up to {width} tokens"
        size = rows if SIZES[option] == "completions" else rows * width
        raise PassTooLarge(Pass(what, option, tokens or size, shape, n_parts))

    def until_it_fits(self, work: Callable[[], Result]) -> Result:
        before = RandomState.now(self._accelerator.device)
        while True:
            result, failed = self.attempt(work)
            if failed is None:
                return result
            self.make_smaller(failed)
            before.restore()

    def attempt(self, work: Callable[[], Result]) -> tuple[Result | None, Pass | None]:
        try:
            return work(), None
        except PassTooLarge as error:
            failed = error.failed
        # Only here is the error gone, and with it the tensors that its traceback holds.
        free_memory()
        return None, failed

    def make_smaller(self, failed: Pass) -> None:
        before = self.sizes[failed.option]
        size = smaller_of(before, failed.size)
        while size > 1:
            size //= 2
            if failed.n_parts(size) > 1:
                break
        else:
            raise UserError(
                f"auto_batch: out of memory in {failed.what}, in a pass of {failed.shape}, which cannot be split: "
                f"{_REMEDIES}."
            )
        self._set(self.sizes | {failed.option: size})
        logger.warning(
            "auto_batch: out of memory in %s, in a pass of %s%s: %s is now %d %s (was: %s), and the pass is repeated.",
            failed.what,
            failed.shape,
            "" if self._is_alone else f" on process {self._accelerator.process_index}",
            failed.option,
            size,
            SIZES[failed.option],
            "no limit" if before is None else before,
        )

    def limit(self, option: str, own: int | None) -> int | None:
        return smaller_of(own, self.sizes[option])

    @property
    def _is_alone(self) -> bool:
        return self._accelerator.num_processes == 1

    def agree(self, *, failed: bool = False) -> bool:
        if self._is_alone:
            return failed
        own = [_NO_LIMIT if self.sizes[name] is None else self.sizes[name] for name in SIZES]
        numbers = torch.tensor([[*own, int(failed)]], device=self._accelerator.device)
        of_all = self._accelerator.gather(numbers).cpu()  # (processes, sizes and one more)
        smallest = of_all[:, :-1].min(0).values
        is_any_different = bool((of_all[:, :-1] != smallest).any())
        sizes = [None if size == _NO_LIMIT else size for size in smallest.tolist()]
        self._set(dict(zip(SIZES, sizes, strict=True)))
        return is_any_different or bool(of_all[:, -1].any())

    def save(self, folder: Path) -> None:
        (folder / AUTO_BATCH_FILE).write_text(json.dumps(self.sizes))

    def load(self, folder: Path) -> None:
        path = folder / AUTO_BATCH_FILE
        if not path.is_file():  # of a run without auto_batch
            return
        saved = json.loads(path.read_text())
        self._set({name: smaller_of(size, saved.get(name)) for name, size in self.sizes.items()})


def sizes_of_run(
    args: TrainingArguments,
    accelerator: Accelerator,
    plan: Callable[[], Mapping[str, int | None]] | None = None,
) -> FixedSizes:
    """The sizes of a run: fixed ones, or those of `auto_batch`.

    Args:
        args: options of the run.
        accelerator: the accelerator of the trainer.
        plan: see `initial_sizes`.

    Raises:
        UserError: if `auto_batch` is set, and passes of one process need those of the others.
    """
    if not args.auto_batch:
        return FixedSizes()
    check_engine_of_auto_batch(args, active_engine(accelerator))
    asked = initial_sizes(args)
    sizes = AutoBatch(args, accelerator, initial_sizes(args, plan))
    sizes.agree()  # cards may differ
    for name, size in sizes.sizes.items():
        if size != asked[name] and accelerator.is_main_process:
            was = "no limit" if asked[name] is None else asked[name]
            logger.warning(
                "auto_batch: %s begins with %d %s (was: %s), by the plan of the run.",
                name,
                size,
                SIZES[name],
                was,
            )
    return sizes


def check_engine_of_auto_batch(args: TrainingArguments, engine: Engine) -> None:
    """Refuses `auto_batch` with an engine that shards the model.

    Args:
        args: options of a trainer, which may lack `auto_batch`.
        engine: the engine that is asked for, or runs.

    Raises:
        UserError: if passes of one process need those of the others.
    """
    if getattr(args, "auto_batch", False) and engine is not Engine.DDP:
        raise UserError(
            f"auto_batch is not supported with {engine}, where all processes wait in a pass that one of them cannot "
            f"finish: set max_tokens_per_batch, or use --accelerate_config {Engine.DDP}."
        )


class OptimizerStep:
    """The micro-steps of an optimizer step, which are repeated together if a pass in them does not fit.

    All processes take part in `run` with the last micro-step, and repeat the step together, so that all of them use
    the same sizes in all of it.

    Args:
        sizes: the sizes of the run.
        model: the model, with all weights that are trained.
        device: device of this process.
        snapshot: called before the first micro-step, it returns a function that sets counters, such as those of
            metrics, to what they were then.
    """

    def __init__(
        self,
        sizes: FixedSizes,
        model: nn.Module,
        device: torch.device,
        snapshot: Callable[[], Callable[[], None]],
    ):
        self._sizes = sizes
        self._model = model
        self._device = device
        self._snapshot = snapshot
        self.forget()

    def forget(self) -> None:
        """Begins a new step."""
        self._micro_steps: list[Callable[[], Tensor]] = []
        self._returned: list[Tensor] = []
        self._failed = False
        self._before: RandomState | None = None
        self._restore_counters: Callable[[], None] | None = None

    def run(self, micro_step: Callable[[], Tensor], *, is_last: bool) -> Tensor:
        """Runs a micro-step, and with the last one whatever must be repeated.

        Args:
            micro_step: adds to gradients and counters, and returns its loss. It may be called several times, and reads
                the sizes each time.
            is_last: whether it is the last one of the optimizer step.

        Returns:
            A scalar. The sum over the micro-steps is the loss of the step.
        """
        if not self._sizes.enabled:
            return micro_step()
        if not self._micro_steps:
            self._before = RandomState.now(self._device)
            self._restore_counters = self._snapshot()
        self._micro_steps.append(micro_step)
        loss = self._try(micro_step)
        if is_last:
            loss = self._complete(loss)
            self.forget()
        else:
            self._returned.append(loss)
        return loss

    def _try(self, micro_step: Callable[[], Tensor]) -> Tensor:
        if not self._failed:
            loss, failed = self._sizes.attempt(micro_step)
            if failed is None:
                return loss
            self._sizes.make_smaller(failed)
            self._failed = True
        return torch.zeros((), device=self._device)  # the step will be repeated

    def _complete(self, last: Tensor) -> Tensor:
        """The loss of the last micro-step, or what is missing in the sum if the step was repeated."""
        losses = [*self._returned, last]
        is_repeated = False
        while self._sizes.agree(failed=self._failed):
            is_repeated = True
            self._failed = False
            for parameter in self._model.parameters():
                parameter.grad = None  # as at the start of every optimizer step
            self._before.restore()
            self._restore_counters()
            losses = [self._try(micro_step) for micro_step in self._micro_steps]
        if not is_repeated:
            return last
        return sum(losses[1:], losses[0]) - sum(self._returned, torch.zeros((), device=self._device))
