"""Guards, which stop a PPO run before it diverges. A guard returns a verdict, and the trainer acts on it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..training.engines import Engine, asked_engine, require_engine
from .config import PPOConfig
from .trainer_options import ENGINES

MAX_ROLLBACKS = 3


@dataclass(frozen=True)
class Verdict:
    """What to do with a rollout.

    Attributes:
        action: `train` on it, `resample` other prompts after restoring a checkpoint, or `stop` training.
        kl_coef: KL coefficient from now on, reward per nat.
        restore: checkpoint whose weights are loaded first; `None` for none.
        message: one line with cause and remedy; empty if nothing is wrong.
    """

    action: Literal["train", "resample", "stop"]
    kl_coef: float
    restore: Path | None = None
    message: str = ""

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong with the rollout.

        It may be `False` although the rollout is trained on: with `raise_kl_coef`, a rollout above the limit is.
        """
        return self.action == "train" and not self.message


@dataclass(frozen=True)
class KLGuard:
    """A limit on KL(policy ‖ reference) of a rollout.

    Attributes:
        ceiling: the limit in nats per completion; `None` means no limit.
        when_exceeded: what to do above it: `stop`, `raise_kl_coef` (double the KL coefficient), or `rollback` (restore
            a checkpoint and double the KL coefficient).
    """

    ceiling: float | None
    when_exceeded: Literal["stop", "raise_kl_coef", "rollback"]

    def judge(
        self, metrics: Mapping[str, float], *, kl_coef: float, rollbacks: int, checkpoint: Path | None
    ) -> Verdict:
        """Judges a rollout by its metrics.

        Args:
            metrics: metrics of the rollout. Without `objective/kl` every rollout is good.
            kl_coef: current KL coefficient, reward per nat.
            rollbacks: number of earlier rollbacks in this run.
            checkpoint: the last checkpoint below the limit; `None` if there is none.

        Returns:
            What to do with the rollout.
        """
        kl = metrics.get("objective/kl")
        if self.ceiling is None or kl is None or kl <= self.ceiling:
            return Verdict("train", kl_coef)
        problem = f"KL is {kl:.1f} nats per completion, above max_kl = {self.ceiling:g}"
        remedy = "raise kl_coef, set kl_target, or lower learning_rate"

        # Training continues with a larger penalty.
        if self.when_exceeded == "raise_kl_coef":
            return Verdict("train", 2 * kl_coef, message=f"{problem}: kl_coef is now {2 * kl_coef:g}")
        if checkpoint is None:
            problem += ", and there is no checkpoint below it to go back to"
            return Verdict("stop", kl_coef, message=f"{problem}: {remedy}")
        # Only a few times: if rollbacks do not help, the run has another problem.
        if self.when_exceeded == "rollback" and rollbacks < MAX_ROLLBACKS:
            message = (
                f"{problem}: went back to {checkpoint.name} (rollback {rollbacks + 1} of {MAX_ROLLBACKS}), with "
                f"kl_coef {2 * kl_coef:g}"
            )
            return Verdict("resample", 2 * kl_coef, restore=checkpoint, message=message)
        problem += f", the weights are those of {checkpoint.name} (to continue, resume from it)"
        return Verdict("stop", kl_coef, restore=checkpoint, message=f"{problem}: {remedy}")

    def is_exceeded(self, kl: float) -> bool:
        """Whether a KL (nats per completion) is above the limit, or is NaN."""
        if self.ceiling is None:
            return not kl <= float("inf")
        return not kl <= self.ceiling


@dataclass(frozen=True)
class StepVerdict:
    """What to do with the gradients of an optimizer step.

    Attributes:
        skip: whether to skip the step, so that it changes nothing.
        in_a_row: number of consecutive skipped steps that count, including this one.
        warning: one line to log; empty for none.
        stop_reason: why training stops; `None` if it continues.
    """

    skip: bool
    in_a_row: int
    warning: str = ""
    stop_reason: str | None = None


@dataclass(frozen=True)
class GradientGuard:
    """Skips steps with non-finite gradients, and stops training after `max_skipped` of them in a row."""

    max_skipped: int

    def judge(self, finite: bool, *, in_a_row: int, loss_scale: float | None) -> StepVerdict:
        """Judges the gradients of a step.

        Args:
            finite: whether all gradients are finite, on all processes.
            in_a_row: number of steps skipped since the last one with finite gradients.
            loss_scale: loss scale of the fp16 gradient scaler; `None` without one. If it is above 1, the scale may have
                caused the overflow, so the skipped step does not count.

        Returns:
            What to do with the step.
        """
        if finite:
            return StepVerdict(skip=False, in_a_row=0)
        # The scaler starts with a large scale and lowers it at each overflow: the first overflows are expected.
        if loss_scale is not None and loss_scale > 1:
            warning = f"gradients overflow at a loss scale of {loss_scale:g}: this step is skipped and the scale halved"
            return StepVerdict(skip=True, in_a_row=in_a_row, warning=warning)
        in_a_row += 1
        if in_a_row < self.max_skipped:
            warning = "gradients are not finite: this step is skipped and the learning-rate schedule continues"
            return StepVerdict(skip=True, in_a_row=in_a_row, warning=warning)
        reason = (
            f"{in_a_row} optimizer steps in a row had gradients that are not finite: lower learning_rate or clip "
            "rewards with reward_clip; the weights are those before the first of them"
        )
        return StepVerdict(skip=True, in_a_row=in_a_row, stop_reason=reason)


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values of all tensors are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def check_setup(args: PPOConfig) -> None:
    """Refuses setups that PPO does not support.

    Args:
        args: options of the run.

    Raises:
        UserError: for several devices in one process, for an engine that PPO does not support, and for a `kl_horizon`
            that is too small for the size of a rollout.
    """
    if args.n_gpu > 1:
        raise UserError(
            "PPOTrainer uses one device per process: start it with `accelerate launch`, or hide all but one with "
            "CUDA_VISIBLE_DEVICES."
        )
    # Once more: the user may have made an `Accelerator` since.
    require_engine("PPOTrainer", asked_engine(args), ENGINES)
    if args.kl_target is None or args.kl_horizon is None:
        return
    completions = args.rollout_size * args.world_size
    if completions >= 5 * args.kl_horizon:
        raise UserError(
            f"kl_horizon={args.kl_horizon} is a fifth or less of a rollout's {completions} completions: kl_coef could "
            "become zero or negative; set it to several rollouts, or leave it out."
        )


def check_sharded_roles(args: PPOConfig, *, has_adapter: bool, has_value_model: bool) -> None:
    """Refuses roles that cannot share the shards of one model.

    FSDP2 shards the base, and policy, reference and critic are adapters and heads on it.

    Args:
        args: options of the run.
        has_adapter: whether the policy is an adapter.
        has_value_model: whether a model was given for the critic.

    Raises:
        UserError: for a whole policy and for `critic="model"`, under FSDP2.
    """
    if asked_engine(args) is not Engine.FSDP2:
        return
    if not has_adapter:
        raise UserError(
            "fsdp2: PPOTrainer supports it for adapters only, not for a whole model: pass peft_config (--use_peft), or "
            "use --accelerate_config ddp."
        )
    if has_value_model or args.critic == "model":
        raise UserError(
            "critic='model' is not supported with fsdp2: choose critic='adapter' or 'head', or use --accelerate_config "
            "ddp."
        )
