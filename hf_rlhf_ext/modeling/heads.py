"""Scalar heads for rewards and values: always fp32, whatever the trunk computes in."""

from typing import Self

import torch
from torch import Tensor, nn

from ..errors import UserError


class ScalarHead(nn.Linear):
    """Linear map of hidden states (..., H) of any floating dtype to fp32 scores (..., 1).

    Weights are fp32 and autocast is off inside, so a saved head gives the same scores to the bit when it is loaded
    again; a head rounded to bf16 moves them by about 1e-3. State-dict keys are those of `nn.Linear`.
    """

    def __init__(self, in_features: int, bias: bool = False, device=None, dtype=torch.float32):
        super().__init__(in_features, 1, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """An fp32 copy of a one-output linear layer."""
        head = cls(linear.in_features, bias=linear.bias is not None, device=linear.weight.device)
        with torch.no_grad():
            head.weight.copy_(linear.weight)
            if linear.bias is not None:
                head.bias.copy_(linear.bias)
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


def install_fp32_score(model: nn.Module) -> nn.Module:
    """Replaces `model.score` of a one-label sequence-classification model by a `ScalarHead`; returns the model.

    Call it before PEFT attaches: `modules_to_save` copies the head as it is then.
    """
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{type(model).__name__} has no linear `score` head: take a decoder (Llama, Qwen, Gemma, …).")
    if not isinstance(model.score, ScalarHead):
        model.score = ScalarHead.from_linear(model.score)
    return model
