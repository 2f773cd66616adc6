"""The record beside the weights of a reward model: the scale of its scores, precision and quantization of training."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from ..modeling.adapters import bare_model

NORMALIZATION_FILE = "reward_normalization.json"


@dataclass(frozen=True)
class RewardNormalization:
    """The content of `reward_normalization.json`: what turns raw scores into rewards, and how to load the model.

    Attributes:
        mean: mean of the raw scores; 0 if it was not measured.
        std: standard deviation (population) of the raw scores; 1 if it was not measured.
        n: number of scores that were measured.
        base_dtype: dtype of the weights of the base, such as `bfloat16`.
        autocast: dtype of autocast in training; `None` without autocast.
        load_in_4bit: whether the base was loaded in 4 bits.
        quantization: the whole quantization configuration of the base, see `quantization_record`; `None` if it was not
            quantized, or if an earlier version wrote the file.
        layout: layout of the batches in training.
        base_model: Hub id of the base; `None` if it was a local folder.
    """

    mean: float = 0.0
    std: float = 1.0
    n: int = 0
    base_dtype: str = "auto"
    autocast: str | None = None
    load_in_4bit: bool = False
    layout: str = "plain"
    base_model: str | None = None
    quantization: dict[str, Any] | None = None

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """`autocast` as a dtype, for `RewardScorer` and `mixed_precision`."""
        if self.autocast is None:
            return None
        return getattr(torch, self.autocast)

    @property
    def is_measured(self) -> bool:
        """Whether a mean and a standard deviation were measured, so that rewards differ from raw scores."""
        return (self.mean, self.std) != (0.0, 1.0)

    def save(self, folder: str | Path) -> None:
        """Writes `reward_normalization.json` into `folder`."""
        content = asdict(self)
        if self.quantization is None:
            del content["quantization"]
        (Path(folder) / NORMALIZATION_FILE).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self | None:
        """Reads the file in `folder`; returns `None` if there is none. Unknown keys are ignored."""
        path = Path(folder) / NORMALIZATION_FILE
        if not path.is_file():
            return None
        content = json.loads(path.read_text())
        known = {}  # earlier versions wrote fewer keys, later ones may write more
        for field in fields(cls):
            if field.name in content:
                known[field.name] = content[field.name]
        return cls(**known)


def dtype_name(model: nn.Module) -> str:
    """Dtype of the weights of the base, in the form of `RewardNormalization.base_dtype`."""
    return str(bare_model(model).dtype).removeprefix("torch.")


def is_4bit(model: nn.Module) -> bool:
    """Whether the base was loaded in 4 bits."""
    return bool(getattr(bare_model(model), "is_loaded_in_4bit", False))
