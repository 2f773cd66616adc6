"""What a trained reward model records beside its weights: the scale of its scores, and the precision it ran in."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

import torch
from torch import nn

from ..modeling.adapters import bare_model

NORMALIZATION_FILE = "reward_normalization.json"


@dataclass(frozen=True)
class RewardNormalization:
    """What turns raw scores into rewards, and what a reload must repeat to get the same scores.

    `mean` and `std` (population) of `n` raw scores, 0 and 1 where none were measured; `base_dtype` of the trunk's
    weights; `autocast` dtype or None; `load_in_4bit`; the `layout` of the batches; `base_model` as a Hub id, None where
    it was a local folder.
    """

    mean: float = 0.0
    std: float = 1.0
    n: int = 0
    base_dtype: str = "auto"
    autocast: str | None = None
    load_in_4bit: bool = False
    layout: str = "plain"
    base_model: str | None = None

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """`autocast` as `RewardScorer` and `mixed_precision` take it."""
        if self.autocast is None:
            return None
        return getattr(torch, self.autocast)

    @property
    def is_measured(self) -> bool:
        """Whether rewards differ from raw scores."""
        return (self.mean, self.std) != (0.0, 1.0)

    def save(self, folder: str | Path) -> None:
        """Writes `reward_normalization.json` into `folder`."""
        (Path(folder) / NORMALIZATION_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self | None:
        """The file in `folder`, None where there is none; keys of later versions are ignored."""
        path = Path(folder) / NORMALIZATION_FILE
        if not path.is_file():
            return None
        content = json.loads(path.read_text())
        known = {}  # an earlier version wrote fewer keys, a later one may write more
        for field in fields(cls):
            if field.name in content:
                known[field.name] = content[field.name]
        return cls(**known)


def dtype_name(model: nn.Module) -> str:
    """Dtype of the trunk's weights as `RewardNormalization.base_dtype` has it."""
    return str(bare_model(model).dtype).removeprefix("torch.")


def is_4bit(model: nn.Module) -> bool:
    """Whether the base was loaded in 4 bits."""
    return bool(getattr(bare_model(model), "is_loaded_in_4bit", False))
