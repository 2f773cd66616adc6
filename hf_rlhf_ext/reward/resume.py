"""Resumes a reward model from a checkpoint, and refuses checkpoints of something else."""

from pathlib import Path

from peft import PeftModel
from torch import nn

from ..checkpointing import PPO_STATE_FILE
from ..errors import UserError
from ..modeling.adapter_config import check_same_adapter
from ..modeling.adapters import load_adapter_weights
from ..modeling.stack import read_weights


def refuse_other_checkpoint(model: nn.Module, folder: Path) -> None:
    """Raises `UserError` if a checkpoint was saved by another trainer, or is of another model or adapter.

    Args:
        model: The reward model that is trained.
        folder: Folder of the checkpoint.
    """
    if (folder / PPO_STATE_FILE).is_file():
        raise UserError(
            f"resume_from_checkpoint: {folder} was saved by PPOTrainer: give a checkpoint of a reward model, or start "
            "without one."
        )
    # DeepSpeed and FSDP save the optimizer under other names, or in a folder.
    saved_optimizer = [*folder.glob("optimizer*"), *folder.glob("global_step*")]
    if not saved_optimizer:
        raise UserError(
            f"resume_from_checkpoint: {folder} has no optimizer.pt, so training cannot go on from it: it was saved "
            "with save_only_model=True, or copied in part. Start without resume_from_checkpoint."
        )
    check_same_adapter(model, getattr(model, "active_adapter", None), folder)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Reads the weights of a checkpoint into a reward model, in place.

    `Trainer` itself passes over weights that a checkpoint lacks, and does not read the encoder of virtual tokens.

    Args:
        model: The reward model that is trained, without wrappers such as DDP.
        folder: Folder of the checkpoint.

    Raises:
        UserError: If a weight is missing in the checkpoint, or if it is of another model.
    """
    if isinstance(model, PeftModel):
        load_adapter_weights(model, model.active_adapter, folder)
    else:
        read_weights(model, folder)
