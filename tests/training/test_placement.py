"""A model is moved before the checks of what it computes, only where `Trainer` would move it too."""

import pytest
import torch
from torch import nn

from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.training import placement
from hf_rlhf_ext.training.engines import Engine


class Elsewhere(PPOConfig):
    """Options of a run on a device that holds no numbers, to which a model can be moved anywhere."""

    @property
    def device(self):
        return torch.device("meta")


class NotPlaced(Elsewhere):
    @property
    def place_model_on_device(self):
        return False


@pytest.mark.parametrize(
    "kind, marks, engine, is_moved",
    [
        (Elsewhere, {}, Engine.DDP, True),
        (NotPlaced, {}, Engine.DDP, False),
        (Elsewhere, {"quantization_method": "bitsandbytes"}, Engine.DDP, False),
        (Elsewhere, {"hf_device_map": {"": 0}}, Engine.DDP, False),
        (Elsewhere, {}, Engine.FSDP2, False),
    ],
)
def test_a_model_is_moved_where_trainer_would_move_it(tmp_path, monkeypatch, kind, marks, engine, is_moved):
    monkeypatch.setattr(placement, "asked_engine", lambda args: engine)
    model = nn.Linear(2, 2)
    for name, value in marks.items():
        setattr(model, name, value)
    placement.move_before_probes(model, kind(str(tmp_path), use_cpu=True, bf16=False))
    assert (model.weight.device.type == "meta") is is_moved
