"""What PPO adds to Trainer's checkpoints, so that a resumed run gives the weights of an uninterrupted one."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import TrainOutput

from ..checkpointing import resolve_checkpoint
from ..errors import UserError
from ..modeling.adapters import load_adapter_weights, save_adapter
from .rollout import Rollout
from .setup import REFERENCE_ADAPTER

VALUE_HEAD_FILE = "value_head.safetensors"
STATE_FILE = "ppo_state.json"
ROLLOUT_FILE = "ppo_rollout.safetensors"


class CheckpointMixin:
    """Saving and loading for `PPOTrainer`.

    A finished run's folder holds the policy adapter (or the whole model), the tokenizer and the value head. A
    checkpoint adds the reference adapter, counters, the KL coefficient, and the rollout in use with its permutations.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """Trains; `resume_from_checkpoint=True` takes the last checkpoint that was written completely."""
        return super().train(resolve_checkpoint(resume_from_checkpoint, self.args.output_dir), **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Policy, value head and tokenizer; unlike Trainer's, no other adapter and no pickle of the arguments."""
        output_dir = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            save_adapter(model, model.active_adapter, output_dir)
        else:
            weights = state_dict or model.state_dict()
            model.save_pretrained(output_dir, state_dict={k: v for k, v in weights.items() if "value_head" not in k})
        save_file(self.value_head.state_dict(), output_dir / VALUE_HEAD_FILE)
        self.processing_class.save_pretrained(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        """Called for checkpoints only, on every process, before `trainer_state.json` makes the checkpoint complete."""
        super()._save_rng_state(output_dir)
        folder = Path(output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if self.reference.adapter is not None:
            save_adapter(model, REFERENCE_ADAPTER, folder / REFERENCE_ADAPTER)
        elif self.reference.model is not None:
            self.reference.model.save_pretrained(folder / REFERENCE_ADAPTER)
        (folder / ROLLOUT_FILE).unlink(missing_ok=True)
        if self._micro_step % (self.args.steps_per_rollout * self.args.gradient_accumulation_steps):
            self._rollout.save(folder / ROLLOUT_FILE)
        state = {"micro_step": self._micro_step, "kl_coef": self.kl_coef}
        (folder / STATE_FILE).write_text(json.dumps(state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / STATE_FILE).is_file():
            raise UserError(f"{folder} has no {STATE_FILE}: it was saved with save_only_model=True or elsewhere.")
        self._load_weights(folder)
        if self.reference.adapter is not None:
            load_adapter_weights(self.model, REFERENCE_ADAPTER, folder / REFERENCE_ADAPTER)
        elif self.reference.model is not None:
            saved = type(self.reference.model).from_pretrained(folder / REFERENCE_ADAPTER, dtype="auto")
            self.reference.model.load_state_dict(saved.state_dict())
        state = json.loads((folder / STATE_FILE).read_text())
        self._micro_step, self.kl_coef = state["micro_step"], state["kl_coef"]
        if (folder / ROLLOUT_FILE).is_file():
            self._rollout = Rollout.load(folder / ROLLOUT_FILE, self.accelerator.device)

    def _load_best_model(self) -> None:
        self._load_weights(Path(self.state.best_model_checkpoint))

    def _load_weights(self, folder: Path) -> None:
        """Policy and value head from a checkpoint, into the parameters that the optimizer already holds."""
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            load_adapter_weights(model, model.active_adapter, folder)
        else:
            saved = type(model).from_pretrained(folder, dtype="auto")
            with torch.no_grad():
                for name, value in saved.state_dict().items():
                    model.state_dict()[name].copy_(value)
        self.value_head.load_state_dict(load_file(folder / VALUE_HEAD_FILE))
