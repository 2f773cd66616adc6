"""Scalar heads for rewards and values: always fp32, whatever the trunk computes in."""

from typing import Self

import torch
from torch import Tensor, nn

from ..errors import UserError

_POSITIONS = ("position_embeddings", "embed_positions", "wpe")
"""Names of tables of learned positions, in encoders, OPT and GPT-2."""


class ScalarHead(nn.Linear):
    """Linear map of hidden states (..., H) of any floating dtype to fp32 scores (..., 1).

    Weights are fp32 and autocast is off inside, so a saved head gives the same scores to the bit when it is loaded
    again; a head rounded to bf16 moves them by about 1e-3. State-dict keys are those of `nn.Linear`.
    """

    def __init__(self, in_features: int, bias: bool = False, device=None, dtype=torch.float32):
        super().__init__(in_features, 1, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """An fp32 copy of a one-output linear layer; `UserError` for another."""
        if linear.out_features != 1:
            raise UserError(f"model: its score head has {linear.out_features} outputs: load it with num_labels=1.")
        head = cls(linear.in_features, bias=linear.bias is not None, device=linear.weight.device)
        with torch.no_grad():
            head.weight.copy_(linear.weight)
            if linear.bias is not None:
                head.bias.copy_(linear.bias)
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


def head_name(model: nn.Module) -> str | None:
    """Dotted name of the linear layer that ends a sequence-classification model with one label; None without one.

    `score` in decoders; in encoders `classifier`, or the last layer inside it.
    """
    if isinstance(getattr(model, "score", None), nn.Linear):
        return "score"
    layers = getattr(model, "classifier", None)
    if not isinstance(layers, nn.Module):
        return None
    found = [name for name, m in layers.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    return ".".join(filter(None, ("classifier", found[-1]))) if found else None


def is_encoder(model: nn.Module) -> bool:
    """True for sequence classification on an encoder (BERT, DeBERTa, MiniLM …): one score a row, from `classifier`."""
    return not hasattr(model, "score") and isinstance(getattr(model, "classifier", None), nn.Module)


def untrained_layers(model: nn.Module) -> list[str]:
    """Names of an encoder's layers that a checkpoint may lack: an adapter must carry them (`modules_to_save`)."""
    outside = {name for name, m in model.named_children() if next(m.parameters(), None) is not None}
    outside.discard(model.base_model_prefix)
    poolers = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if name.endswith(".pooler")}
    return sorted(outside | poolers)


def position_limit(model: nn.Module) -> int | None:
    """Tokens that a model with learned positions takes (RoBERTa's begin after the pad id); None for rotary ones."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in _POSITIONS:
            after_pad = name.endswith("position_embeddings") and module.padding_idx is not None
            taken = module.padding_idx + 1 if after_pad else 0
            return model.config.get_text_config().max_position_embeddings - taken
    return None


def install_fp32_score(model: nn.Module) -> nn.Module:
    """Makes the last layer of a sequence-classification model with one label a `ScalarHead`; returns the model.

    Call it before PEFT attaches: `modules_to_save` copies the head as it is then. An encoder becomes fp32 throughout,
    as layers beside the last one are new too.
    """
    name = head_name(model)
    if name is None:
        raise UserError(
            f"{type(model).__name__} has no linear `score` or `classifier` head with one output: load it with "
            "num_labels=1, and take a decoder (Llama, Qwen, Gemma, …) or an encoder (BERT, DeBERTa, …)."
        )
    if is_encoder(model):
        model.float()
    if not isinstance(model.get_submodule(name), ScalarHead):
        model.set_submodule(name, ScalarHead.from_linear(model.get_submodule(name)))
    return model
