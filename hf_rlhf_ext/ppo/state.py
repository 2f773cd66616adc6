"""The state of a PPO run that Trainer does not carry: what changes while it trains, and what a resumed run needs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from torch import Tensor

from ..errors import UserError
from .config import PPOConfig
from .ranks import Ranks
from .rollout import Rollout
from .shaping import RunningMoments

STATE_FILE = "ppo_state.json"
ROLLOUT_FILE = "ppo_rollout.safetensors"


class NextRows(NamedTuple):
    """Rows of the rollout that this process trains on next, and the emitted tokens of their whole mini-batch."""

    rows: Tensor
    minibatch_tokens: Tensor


@dataclass
class PPOState:
    """What changes while PPO trains. `PPOTrainer` alone changes it.

    Attributes:
        kl_coef: β in force, reward per nat.
        moments: of all scores so far.
        rollout_index: number of the rollout in use, or of the next one.
        step_in_rollout: micro-steps taken on it; `steps_in_all` of them use it up.
        rollout: the one in use, None before the first.
        approx_kl: sum over the mini-batch so far of the KL to the policy that made the rollout, nats per token.
        clip_fraction, clip_weight: sums over the rollout in use of the clipped fraction of tokens and of its weight.
        stop_reason: why a guard ended training, in one line; then no further step may change the weights.
        skipped_in_a_row: optimizer steps without finite gradients since the last one that had them.
        rollbacks: how often the run went back to a checkpoint.
        good_checkpoint: name of the last one whose policy kept below the KL ceiling in the rollout that followed.
        new_checkpoint: name of the newest one, which is good once a rollout of its weights is.
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

    @property
    def updates(self) -> int:
        """Rollouts that the policy has been trained on, the one in use included."""
        return self.rollout_index + (self.step_in_rollout > 0)

    def leave_rollout(self, args: PPOConfig) -> None:
        """The next micro-step takes a new rollout, whatever is left of this one."""
        self.step_in_rollout = steps_in_all(args)

    def next_micro_batch(self, args: PPOConfig, ranks: Ranks) -> NextRows:
        """Counts a micro-step, and says which rows of the rollout it trains on.

        A mini-batch is drawn from the rollout of all processes; each takes its share of it.
        """
        per_epoch = args.num_mini_batches * args.gradient_accumulation_steps  # micro-steps
        epoch, in_epoch = divmod(self.step_in_rollout, per_epoch)
        self.step_in_rollout += 1
        order = self.rollout.order[epoch]  # the same on all processes
        mini_batches = order.split(args.minibatch_size * ranks.count)
        micro_batches = order.split(args.per_device_train_batch_size * ranks.count)
        mini_batch = mini_batches[in_epoch // args.gradient_accumulation_steps]
        minibatch_tokens = self.rollout.completion_lengths[mini_batch].sum()
        return NextRows(ranks.share(micro_batches[in_epoch]), minibatch_tokens)

    # ---- In a checkpoint ----

    def save(self, folder: Path, args: PPOConfig, ranks: Ranks, *, critic: str) -> None:
        """Writes counters and coefficients, and the rollout where one is in use."""
        (folder / ROLLOUT_FILE).unlink(missing_ok=True)  # of a checkpoint that is written again
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
        }
        (folder / STATE_FILE).write_text(json.dumps(content))

    @classmethod
    def load(cls, folder: Path, args: PPOConfig, ranks: Ranks, *, critic: str) -> Self:
        """What `save` wrote.

        Raises:
            UserError: a folder without state, of another kind of critic, or saved in the middle of a rollout of another
                geometry.
        """
        content = read_state(folder)
        if content["critic"] != critic:
            raise UserError(f"{folder} was trained with critic={content['critic']!r}: set it, it is {critic!r} now.")
        in_use = (folder / ROLLOUT_FILE).is_file()
        # Between two rollouts, sizes may change freely; in the middle of one, the micro-steps left would be others.
        if in_use:
            _check_geometry(folder, content["geometry"], geometry(args, ranks))
        guards = content["guards"]
        state = cls(
            kl_coef=content["kl_coef"],
            moments=RunningMoments.from_dict(content["reward_moments"]),
            rollout_index=content["rollouts"],
            step_in_rollout=steps_in_all(args),  # used up: the next micro-step takes a new rollout
            clip_fraction=guards["clipped"][0],
            clip_weight=guards["clipped"][1],
            skipped_in_a_row=guards["skipped_in_a_row"],
            rollbacks=guards["rollbacks"],
            good_checkpoint=guards["good_checkpoint"],
            new_checkpoint=guards["new_checkpoint"],
        )
        if in_use:
            state.step_in_rollout = content["step_in_rollout"]
            state.rollout = Rollout.load(folder / ROLLOUT_FILE, ranks.device)
        return state


def steps_in_all(args: PPOConfig) -> int:
    """Micro-steps that use a rollout up."""
    return args.steps_per_rollout * args.gradient_accumulation_steps


def geometry(args: PPOConfig, ranks: Ranks) -> dict[str, int]:
    """What the micro-steps of a rollout in use depend on."""
    return {
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_mini_batches": args.num_mini_batches,
        "num_ppo_epochs": args.num_ppo_epochs,
        "num_processes": ranks.count,
    }


def read_state(folder: Path) -> dict:
    """The content of the state file; raises `UserError` where a checkpoint has none."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {STATE_FILE}: it was saved with save_only_model=True or elsewhere.")
    return json.loads(path.read_text())


def _check_geometry(folder: Path, saved: dict[str, int], now: dict[str, int]) -> None:
    for name, value in now.items():
        if saved[name] != value:
            raise UserError(
                f"{folder} was saved in the middle of a rollout with {name}={saved[name]}, it is {value} now: set "
                f"{saved[name]}, or resume from a checkpoint between two rollouts."
            )
