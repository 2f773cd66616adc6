"""What keeps a PPO run from ruining itself. Guards judge and return a verdict; the trainer acts on it."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from .config import PPOConfig

MAX_ROLLBACKS = 3


@dataclass(frozen=True)
class Verdict:
    """What is to be done with a rollout.

    Attributes:
        action: `train` on it, `resample` (with other prompts) after going back, or `stop` training.
        kl_coef: β from here on.
        restore: checkpoint whose weights are to be loaded first, None for none.
        message: one line that says why, with the remedy; empty where nothing is wrong.
    """

    action: Literal["train", "resample", "stop"]
    kl_coef: float
    restore: Path | None = None
    message: str = ""

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong with the rollout. One above the ceiling may be trained on too, with a larger β."""
        return self.action == "train" and not self.message


@dataclass(frozen=True)
class KLGuard:
    """A ceiling on KL(policy ‖ reference) of a rollout.

    Attributes:
        ceiling: nats per completion; None: no ceiling.
        when_exceeded: what to do above it: `stop`, `raise_kl_coef` (double β), or `rollback` (and double β).
    """

    ceiling: float | None
    when_exceeded: Literal["stop", "raise_kl_coef", "rollback"]

    def judge(
        self, metrics: Mapping[str, float], *, kl_coef: float, rollbacks: int, checkpoint: Path | None
    ) -> Verdict:
        """The verdict on a rollout with these metrics.

        Args:
            metrics: of the rollout; without `objective/kl` there is nothing to judge.
            kl_coef: β in force.
            rollbacks: how often the run went back already.
            checkpoint: the one to go back to, None where there is none below the ceiling.
        """
        kl = metrics.get("objective/kl")
        if self.ceiling is None or kl is None or kl <= self.ceiling:
            return Verdict("train", kl_coef)
        problem = f"KL is {kl:.1f} nats a completion, above max_kl = {self.ceiling:g}"
        remedy = "raise kl_coef, set kl_target, or lower learning_rate"

        # A larger penalty pulls the policy back while it trains on.
        if self.when_exceeded == "raise_kl_coef":
            return Verdict("train", 2 * kl_coef, message=f"{problem}: kl_coef is now {2 * kl_coef:g}")
        if checkpoint is None:
            problem += ", and there is no checkpoint below it to go back to"
            return Verdict("stop", kl_coef, message=f"{problem}: {remedy}")
        # A few times only: a run that comes back again and again has another problem.
        if self.when_exceeded == "rollback" and rollbacks < MAX_ROLLBACKS:
            message = f"{problem}: back to {checkpoint.name} (no. {rollbacks + 1}), with kl_coef {2 * kl_coef:g}"
            return Verdict("resample", 2 * kl_coef, restore=checkpoint, message=message)
        problem += f", the weights are those of {checkpoint.name} (to go on, resume from that one)"
        return Verdict("stop", kl_coef, restore=checkpoint, message=f"{problem}: {remedy}")

    def is_exceeded(self, kl: float) -> bool:
        """Whether a KL is above the ceiling, or no number."""
        if self.ceiling is None:
            return not kl <= float("inf")
        return not kl <= self.ceiling


@dataclass(frozen=True)
class StepVerdict:
    """What is to be done with the gradients of an optimizer step.

    Attributes:
        skip: the step must change nothing.
        in_a_row: steps skipped since the last one with finite gradients, this one included where it counts.
        warning: one line to say; empty for none.
        stop_reason: why training ends; None where it goes on.
    """

    skip: bool
    in_a_row: int
    warning: str = ""
    stop_reason: str | None = None


@dataclass(frozen=True)
class GradientGuard:
    """Steps whose gradients are not finite are skipped; after `max_skipped` in a row training ends."""

    max_skipped: int

    def judge(self, finite: bool, *, in_a_row: int, loss_scale: float | None) -> StepVerdict:
        """The verdict on a step.

        Args:
            finite: whether all gradients are numbers, on all processes.
            in_a_row: steps skipped since the last one with finite gradients.
            loss_scale: of the fp16 gradient scaler, None without one. Above 1 an overflow may be the scale's and no
                fault of the run, so it does not count.
        """
        if finite:
            return StepVerdict(skip=False, in_a_row=0)
        # The scaler starts high and looks for the largest scale that works: its first overflows are part of that.
        if loss_scale is not None and loss_scale > 1:
            warning = f"gradients overflow at a loss scale of {loss_scale:g}: this step is skipped and the scale halved"
            return StepVerdict(skip=True, in_a_row=in_a_row, warning=warning)
        in_a_row += 1
        if in_a_row < self.max_skipped:
            warning = "gradients are not finite: this step is skipped and the learning-rate schedule goes on"
            return StepVerdict(skip=True, in_a_row=in_a_row, warning=warning)
        reason = (
            f"{in_a_row} optimizer steps in a row had gradients that are not finite: lower learning_rate or clip "
            "rewards with reward_clip; the weights are those before the first of them"
        )
        return StepVerdict(skip=True, in_a_row=in_a_row, stop_reason=reason)


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers of all tensors are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _is_sharded(args: PPOConfig) -> bool:
    """Whether DeepSpeed or FSDP is on: by an option, or by `accelerate`, which says so in environment variables."""
    by_option = args.deepspeed or args.fsdp or getattr(args, "deepspeed_plugin", None)
    by_accelerate = [os.environ.get(f"ACCELERATE_USE_{name}", "false") for name in ("DEEPSPEED", "FSDP")]
    return bool(by_option) or "true" in [value.lower() for value in by_accelerate]


def check_setup(args: PPOConfig) -> None:
    """Raises `UserError` for set-ups that PPO's own gradient reduction, or its KL controller, does not cover."""
    if args.n_gpu > 1:
        raise UserError(
            "PPOTrainer uses one device per process: start it with `accelerate launch`, or hide all but one."
        )
    if _is_sharded(args):
        raise UserError(
            "PPOTrainer runs with plain data parallelism: leave deepspeed and fsdp out (--accelerate_config multi_gpu)."
        )
    if args.kl_target is None or args.kl_horizon is None:
        return
    completions = args.rollout_size * args.world_size
    if completions >= 5 * args.kl_horizon:
        raise UserError(
            f"kl_horizon={args.kl_horizon} is a fifth or less of a rollout's {completions} completions: kl_coef could "
            "become zero or negative; set it to several rollouts, or leave it out."
        )
