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

    def __init__(
        self,
        in_features: int,
        bias: bool = False,
        device=None,
        dtype=torch.float32,
    ):
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
    name_of_last = None
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == 1:
            # The classifier itself, where it is one linear layer, has the empty name.
            name_of_last = f"classifier.{name}" if name else "classifier"
    return name_of_last


def is_encoder(model: nn.Module) -> bool:
    """True for sequence classification on an encoder (BERT, DeBERTa, MiniLM …): one score per row, of `classifier`."""
    if hasattr(model, "score"):
        return False
    return isinstance(getattr(model, "classifier", None), nn.Module)


def untrained_layers(model: nn.Module) -> list[str]:
    """Names of an encoder's layers that a checkpoint may lack: an adapter must carry them (`modules_to_save`)."""
    names = set()
    for name, module in model.named_children():
        has_parameters = next(module.parameters(), None) is not None
        if has_parameters and name != model.base_model_prefix:
            names.add(name)
    # A pooler sits inside the backbone, yet pretraining without next-sentence prediction leaves it out.
    for name, _ in model.named_modules():
        if name.endswith(".pooler"):
            names.add("pooler")
    return sorted(names)


def position_limit(model: nn.Module) -> int | None:
    """Tokens that a model with learned positions takes (RoBERTa's begin after the pad id); None for rotary ones."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or name.rsplit(".", 1)[-1] not in _POSITIONS:
            continue
        limit = model.config.get_text_config().max_position_embeddings
        if name.endswith("position_embeddings") and module.padding_idx is not None:
            limit -= module.padding_idx + 1  # RoBERTa counts positions from behind the pad id
        return limit
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
    head = model.get_submodule(name)
    if not isinstance(head, ScalarHead):
        model.set_submodule(name, ScalarHead.from_linear(head))
    return model
