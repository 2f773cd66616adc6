"""The state of a PPO run that `Trainer` does not hold: what changes during training and what a resumed run needs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpointing import PPO_STATE_FILE
from ..errors import UserError
from ..training.leaving import RandomState
from .config import PPOConfig
from .ranks import Ranks
from .reference_file import record_of, recorded_digest
from .rollout import Rollout
from .shaping import RunningMoments
from .stretch import Sizes, Stretch, stretch_after

ROLLOUT_FILE = "ppo_rollout.safetensors"


class NextRows(NamedTuple):
    """The rows of the rollout that this process trains on next.

    Attributes:
        rows: (b,) int64, indices of rows.
        minibatch_tokens: scalar, number of tokens of their whole mini-batch on all processes, see
            `Rollout.counted_tokens`.
    """

    rows: Tensor
    minibatch_tokens: Tensor


@dataclass
class PPOState:
    """Everything that changes while PPO trains. Only `PPOTrainer` changes it.

    Attributes:
        kl_coef: current KL coefficient β, reward per nat.
        moments: running moments of all scores so far.
        rollout_index: number of the current rollout, or of the next one.
        step_in_rollout: number of micro-steps taken on it. After `steps_in_all` micro-steps it is used up.
        rollout: the current rollout; `None` before the first.
        approx_kl: KL(rollout policy ‖ policy) of the current mini-batch so far, in nats per token (k3).
        clip_fraction: sum of the clipped fraction of tokens over the current rollout.
        clip_weight: sum of the weights of these fractions.
        stop_reason: why a guard stopped training, in one line; `None` if none did. Once it is set, no step changes the
            weights.
        skipped_in_a_row: number of consecutive optimizer steps with non-finite gradients.
        rollbacks: number of rollbacks to a checkpoint.
        good_checkpoint: name of the last good checkpoint, one whose next rollout was below `max_kl`.
        new_checkpoint: name of the newest checkpoint. It becomes the good one if the next rollout is below `max_kl`.
        critic_learning_rate: learning rate of the critic in the last optimizer step; `None` before the first, and
            without a critic.
        evaluated_rows: number of prompts of the last evaluation, by the prefix of its metrics.
        stretch: the part of the run with the batch sizes of now, which determines the prompts of a rollout.
        next_text: position of the first PPO-ptx text of the next optimizer step, see `PTXTexts.batches`.
        reference: digest of the frozen reference, known from the first checkpoint on; `None` also if the reference is
            the base without an adapter.
        random_state: the random states after the last optimizer step, if a new rollout follows it; `None` before the
            first step of a call of `train`.
    """

    kl_coef: float
    moments: RunningMoments = RunningMoments()
    rollout_index: int = 0
    step_in_rollout: int = 0
    rollout: Rollout | None = None
    approx_kl: float = 0.0
    clip_fraction: float | Tensor = 0.0
    clip_weight: float = 0.0
    stop_reason: str | None = None
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    good_checkpoint: str | None = None
    new_checkpoint: str | None = None
    critic_learning_rate: float | None = None
    evaluated_rows: dict[str, int] = field(default_factory=dict)
    stretch: Stretch = Stretch()
    next_text: int = 0
    reference: str | None = None
    random_state: RandomState | None = None

    @property
    def updates(self) -> int:
        """Number of rollouts that were trained on, including the current one. In a warm-up, only the critic was."""
        return self.rollout_index + (self.step_in_rollout > 0)

    def is_warm_up(self, args: PPOConfig, rollout: int | None = None) -> bool:
        """Whether a rollout trains the critic only, see `critic_warmup_steps`. It is the same on every process.

        Args:
            args: options of the run.
            rollout: number of the rollout; `None` means the current one.
        """
        rollout = self.rollout_index if rollout is None else rollout
        steps = args.steps_per_rollout
        if self.stretch.run > 0:
            # `train` was called again: its steps are counted from 0, but the critic does not start again.
            before = rollout * steps
        else:
            # Earlier stretches had other numbers of steps per rollout.
            before = self.stretch.steps_before(rollout, steps)
        return before < args.critic_warmup_steps

    def follows_warm_up(self, args: PPOConfig) -> bool:
        """Whether the current rollout is the first one after a warm-up, see `is_warm_up`."""
        previous = self.rollout_index - 1
        # Of rollouts before a resumed run with other sizes, only the sum of the steps is known.
        is_known = previous >= self.stretch.rollout or self.stretch.run > 0
        if previous < 0 or not is_known or self.is_warm_up(args):
            return False
        return self.is_warm_up(args, previous)

    def leave_rollout(self, args: PPOConfig) -> None:
        """Skips the rest of the current rollout: the next micro-step starts a new one."""
        self.step_in_rollout = steps_in_all(args)

    def is_used_up(self, args: PPOConfig) -> bool:
        """Whether the next micro-step starts a new rollout."""
        return self.step_in_rollout >= steps_in_all(args)

    def forget_next_rollout(self, args: PPOConfig) -> None:
        """Goes back from a rollout that was begun to the end of the one before it."""
        self.rollout_index -= 1
        self.leave_rollout(args)

    def first_prompt(self, args: PPOConfig, ranks: Ranks) -> int:
        """Position of the first prompt of the current rollout, see `Stretch`."""
        return self.stretch.position(self.rollout_index, sizes_of(args, ranks).prompts)

    def completions_before(self, args: PPOConfig, ranks: Ranks) -> int:
        """Number of completions of all rollouts before the current one."""
        return self.stretch.completions_before(self.rollout_index, sizes_of(args, ranks).completions)

    def begin_again(self, args: PPOConfig, ranks: Ranks) -> None:
        """Forgets everything half done before a new call of `train`, which starts with a new rollout."""
        following = self.updates
        sizes = sizes_of(args, ranks)
        position = self.stretch.position(following, sizes.prompts)
        completions = self.stretch.completions_before(following, sizes.completions)
        self.stretch = Stretch(following, position, step=0, run=position, completions=completions)
        if self.step_in_rollout > 0:  # 0: its rollout was never finished, or this is the first call
            self.leave_rollout(args)
        self.rollout = None
        self.approx_kl = 0.0
        self.clip_fraction = 0.0
        self.clip_weight = 0.0
        self.stop_reason = None
        self.skipped_in_a_row = 0
        self.random_state = None

    def next_micro_batch(self, args: PPOConfig, ranks: Ranks) -> NextRows:
        """Counts a micro-step and returns the rows of the rollout that it trains on.

        A mini-batch is drawn from the rollout of all processes, and each process takes its share of it: all completions
        of a prompt or none.
        """
        per_epoch = args.num_mini_batches * args.gradient_accumulation_steps  # micro-steps
        epoch, in_epoch = divmod(self.step_in_rollout, per_epoch)
        self.step_in_rollout += 1
        order = self.rollout.order[epoch]  # the same on all processes
        mini_batches = order.split(args.minibatch_size * ranks.count)
        micro_batches = order.split(args.per_device_train_batch_size * ranks.count)
        mini_batch = mini_batches[in_epoch // args.gradient_accumulation_steps]
        minibatch_tokens = self.rollout.counted_tokens(mini_batch)
        return NextRows(ranks.share(micro_batches[in_epoch], args.num_generations), minibatch_tokens)

    # ---- In a checkpoint ----

    def save(self, folder: Path, args: PPOConfig, ranks: Ranks, *, critic: str) -> None:
        """Writes counters and coefficients, and the rollout if it is not used up."""
        (folder / ROLLOUT_FILE).unlink(missing_ok=True)  # left over if the checkpoint is overwritten
        if self.step_in_rollout < steps_in_all(args):
            self.rollout.save(folder / ROLLOUT_FILE)
        guards = {
            "skipped_in_a_row": self.skipped_in_a_row,
            "rollbacks": self.rollbacks,
            "good_checkpoint": self.good_checkpoint,
            "new_checkpoint": self.new_checkpoint,
            "clipped": [float(self.clip_fraction), float(self.clip_weight)],
        }
        content = {
            "rollouts": self.rollout_index,
            "step_in_rollout": self.step_in_rollout,
            "kl_coef": self.kl_coef,
            "critic": critic,
            "reward_moments": self.moments.to_dict(),
            "guards": guards,
            "kl_coef_option": args.kl_coef,
            "geometry": geometry(args, ranks),
            "evaluated_rows": self.evaluated_rows,
            "stretch": self.stretch._asdict(),
            "next_text": self.next_text,
            "reference": record_of(self.reference),
            "files": _needed_files(folder),
        }
        (folder / PPO_STATE_FILE).write_text(json.dumps(content))

    @classmethod
    def load(cls, folder: Path, args: PPOConfig, ranks: Ranks, *, critic: str) -> Self:
        """Reads the state that `save` wrote.

        Raises:
            UserError: if the folder has no state, if it was trained with another kind of critic, or if it was saved in
                the middle of a rollout with other batch sizes.
        """
        content = read_state(folder)
        if content["critic"] != critic:
            raise UserError(
                f"{folder} was trained with critic={content['critic']!r}, but critic is now {critic!r}: set "
                f"critic={content['critic']!r}."
            )
        in_use = (folder / ROLLOUT_FILE).is_file()
        # Between two rollouts, batch sizes may change. In the middle of one, they determine the remaining micro-steps.
        if in_use:
            _check_geometry(folder, content["geometry"], geometry(args, ranks))
        guards = content["guards"]
        state = cls(
            kl_coef=content["kl_coef"],
            moments=RunningMoments.from_dict(content["reward_moments"]),
            rollout_index=content["rollouts"],
            step_in_rollout=steps_in_all(args),  # used up: the next micro-step starts a new rollout
            clip_fraction=guards["clipped"][0],
            clip_weight=guards["clipped"][1],
            skipped_in_a_row=guards["skipped_in_a_row"],
            rollbacks=guards["rollbacks"],
            good_checkpoint=guards["good_checkpoint"],
            new_checkpoint=guards["new_checkpoint"],
            evaluated_rows=content.get("evaluated_rows", {}),  # earlier versions did not save them
            stretch=stretch_after(folder, content, sizes_of(args, ranks)),
            next_text=_next_text(folder, content, args),
            reference=recorded_digest(content),
        )
        if in_use:
            state.step_in_rollout = content["step_in_rollout"]
            state.rollout = Rollout.load(folder / ROLLOUT_FILE, ranks.device, per_prompt=args.num_generations)
        return state


def steps_in_all(args: PPOConfig) -> int:
    """Number of micro-steps after which a rollout is used up."""
    return args.steps_per_rollout * args.gradient_accumulation_steps


def geometry(args: PPOConfig, ranks: Ranks) -> dict[str, int]:
    """The options that determine the micro-steps of a rollout."""
    return {
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_mini_batches": args.num_mini_batches,
        "num_ppo_epochs": args.num_ppo_epochs,
        "num_generations": args.num_generations,
        "num_processes": ranks.count,
    }


def sizes_of(args: PPOConfig, ranks: Ranks) -> Sizes:
    """The size of a rollout, over all processes."""
    return Sizes.of(geometry(args, ranks))


def read_state(folder: Path) -> dict:
    """Reads the state file of a checkpoint; raises `UserError` if there is none."""
    path = folder / PPO_STATE_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} has no {PPO_STATE_FILE}, so training cannot resume from it: it was saved with "
            "save_only_model=True, or by another trainer. Start without resume_from_checkpoint."
        )
    return json.loads(path.read_text())


def _next_text(folder: Path, content: Mapping[str, Any], args: PPOConfig) -> int:
    if "next_text" in content:
        return content["next_text"]
    # Earlier versions counted steps.
    saved = content["geometry"]
    of_process = args.ptx_batch_size or saved["per_device_train_batch_size"] * saved["gradient_accumulation_steps"]
    step = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).global_step
    return step * of_process * saved["num_processes"]


def _needed_files(folder: Path) -> list[str]:
    """The files without which a checkpoint is not complete, once its models and heads are written.

    The weights of a model or an adapter are not listed, as they may be in one file or in several.
    """
    names = []
    for path in sorted([*folder.rglob("*config.json"), *folder.rglob("*.safetensors")]):
        may_be_split = path.name.startswith(("model", "adapter_model"))
        if not may_be_split and path.name not in ("generation_config.json", "tokenizer_config.json"):
            names.append(path.relative_to(folder).as_posix())
    return names


def _check_geometry(folder: Path, saved: dict[str, int], now: dict[str, int]) -> None:
    saved = {"num_generations": 1} | saved  # earlier versions sampled one completion per prompt
    for name, value in now.items():
        if saved[name] != value:
            raise UserError(
                f"{folder} was saved in the middle of a rollout with {name}={saved[name]}, but it is now {value}: set "
                f"{name}={saved[name]}, or resume from a checkpoint between two rollouts."
            )
