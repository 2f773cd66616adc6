"""What PPO adds to Trainer's checkpoints, so that a resumed run gives the weights of an uninterrupted one."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, sort_checkpoints

from ..checkpointing import resolve_checkpoint
from ..errors import UserError
from ..modeling.stack import ADAPTER_NAMES, read_weights
from .rollout import Rollout
from .shaping import RunningMoments

VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_FOLDER = "value"
REFERENCE_FOLDER = ADAPTER_NAMES["reference"]
STATE_FILE = "ppo_state.json"
ROLLOUT_FILE = "ppo_rollout.safetensors"


class CheckpointMixin:
    """Saving and loading for `PPOTrainer`.

    A finished run's folder holds the policy adapter (or the whole model), the tokenizer and the critic: its head beside
    the policy, or adapter (or model) and head in `value/`. A checkpoint adds the reference, counters, the KL
    coefficient, reward statistics, the guards' memory, and the rollout in use with its permutations.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """Trains; `resume_from_checkpoint=True` takes the last checkpoint that was written completely."""
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if self.stopped_by is not None:  # by an earlier call, whose rollout is not to be trained on
            self.stopped_by, self._step_in_rollout = None, self._steps_in_all
        self._skipped_in_a_row = 0
        with self._signal.listening():
            return super().train(checkpoint, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's, but a folder that is written again is incomplete at once, and `save_total_limit` is ours.

        Beside the newest and the best, the last good checkpoint is kept: the one that guards go back to.
        """
        folder, limit = Path(self.args.output_dir), self.args.save_total_limit
        newest = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / newest / TRAINER_STATE_NAME).unlink(missing_ok=True)
        self.args.save_total_limit = None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit is not None and limit > 0:
            best = self.state.best_model_checkpoint
            kept = {newest, best and Path(best).name, self._good_checkpoint}
            folders = [Path(path) for path in sort_checkpoints(str(folder), use_mtime=True)]
            for old in [path for path in folders if path.name not in kept][: max(0, len(folders) - limit)]:
                shutil.rmtree(old, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Policy, critic and tokenizer; unlike Trainer's, no other adapter and no pickle of the arguments."""
        output_dir = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        if self.stack.roles["policy"].adapter is not None:
            self.stack.save("policy", output_dir)
        else:
            weights = state_dict or self.policy.state_dict()
            attached = tuple(f"{role}_{kind}." for role in self.stack.roles for kind in ("head", "model"))
            weights = {name: value for name, value in weights.items() if not name.startswith(attached)}
            self.policy.save_pretrained(output_dir, state_dict=weights)
        if self.critic == "head":
            save_file(self.value_head.state_dict(), output_dir / VALUE_HEAD_FILE)
        else:
            self.stack.save("value", output_dir / VALUE_FOLDER)
        self.processing_class.save_pretrained(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        """Called for checkpoints only, on every process, before `trainer_state.json` makes the checkpoint complete."""
        super()._save_rng_state(output_dir)
        folder = Path(output_dir)
        self._new_checkpoint = folder.name
        if self.args.should_save:
            self._save_ppo_state(folder)
        self.accelerator.wait_for_everyone()  # a checkpoint is complete with the random state of all

    def _save_ppo_state(self, folder: Path) -> None:
        self.stack.save("reference", folder / REFERENCE_FOLDER)
        (folder / ROLLOUT_FILE).unlink(missing_ok=True)
        if self._step_in_rollout < self._steps_in_all:
            self._rollout.save(folder / ROLLOUT_FILE)
        state = {"rollouts": self._rollouts, "step_in_rollout": self._step_in_rollout, "kl_coef": self.kl_coef}
        state |= {"critic": self.critic, "reward_moments": self.reward_moments.to_dict(), "guards": self.guard_state}
        state |= {"kl_coef_option": self.args.kl_coef, "geometry": self._geometry}
        (folder / STATE_FILE).write_text(json.dumps(state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / STATE_FILE).is_file():
            raise UserError(f"{folder} has no {STATE_FILE}: it was saved with save_only_model=True or elsewhere.")
        state = json.loads((folder / STATE_FILE).read_text())
        if state["critic"] != self.critic:
            raise UserError(f"{folder} was trained with critic={state['critic']!r}: set it, it is {self.critic!r} now.")
        in_use = (folder / ROLLOUT_FILE).is_file()
        for name, now in self._geometry.items():
            if in_use and (then := state["geometry"][name]) != now:
                raise UserError(
                    f"{folder} was saved in the middle of a rollout with {name}={then}, it is {now} now: set {then}, "
                    "or resume from a checkpoint between two rollouts."
                )
        self._init_state()  # of this process's own training so far
        self._init_guards()
        self._load_weights(folder)
        self.stack.load("reference", folder / REFERENCE_FOLDER)
        self._rollouts, self._step_in_rollout = state["rollouts"], self._steps_in_all
        self.kl_coef, self.guard_state = state["kl_coef"], state["guards"]
        self.reward_moments = RunningMoments.from_dict(state["reward_moments"])
        if in_use:
            self._step_in_rollout = state["step_in_rollout"]
            self._rollout = Rollout.load(folder / ROLLOUT_FILE, self.accelerator.device)
        if state["kl_coef_option"] != self.args.kl_coef:
            was = f"{state['kl_coef_option']:g} (adapted to {self.kl_coef:g})"
            self._warn(f"kl_coef was {was} in {folder.name}: it is {self.args.kl_coef:g} from here on, as set now")
            self.kl_coef = self.args.kl_coef

    @property
    def _geometry(self) -> dict[str, int]:
        """What the micro-steps of a rollout in use depend on."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches", "num_ppo_epochs")
        return {name: getattr(self.args, name) for name in names} | {"num_processes": self.accelerator.num_processes}

    def _load_best_model(self) -> None:
        self._load_weights(Path(self.state.best_model_checkpoint))

    def _load_weights(self, folder: Path) -> None:
        """Policy and critic from a checkpoint, into the parameters that the optimizer already holds."""
        if self.stack.roles["policy"].adapter is not None:
            self.stack.load("policy", folder)
        else:
            read_weights(self.policy, folder)
        if self.critic == "head":
            self.value_head.load_state_dict(load_file(folder / VALUE_HEAD_FILE))
        else:
            self.stack.load("value", folder / VALUE_FOLDER)
