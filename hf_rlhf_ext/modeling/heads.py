"""Scalar heads for rewards and values. They are always fp32, also if the model computes in another dtype."""

from typing import Self

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ..errors import UserError

_POSITIONS = ("position_embeddings", "embed_positions", "wpe")
"""Names of embeddings of learned positions, in encoders, OPT and GPT-2."""


class ScalarHead(nn.Linear):
    """Linear layer from hidden states (..., H) of any floating dtype to fp32 scores (..., 1).

    Its weights are fp32 and autocast is off inside, so that a saved head gives exactly the same scores when it is
    loaded again. A head that is rounded to bf16 changes scores by about 1e-3. The keys of its state dict are those of
    `nn.Linear`.

    Args:
        in_features: H, size of the hidden states.
        bias: whether the head has a bias.
        device: device of the weights.
        dtype: dtype of the weights, fp32 by default.
    """

    def __init__(
        self,
        in_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(in_features, 1, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Returns a head with the weights of a linear layer with one output, which become fp32.

        Args:
            linear: the layer.

        Raises:
            UserError: if the layer has more than one output.
        """
        if linear.out_features != 1:
            raise UserError(f"model: its score head has {linear.out_features} outputs: load it with num_labels=1.")
        head = cls(linear.in_features, bias=linear.bias is not None, device=linear.weight.device)
        with torch.no_grad():
            head.weight.copy_(dequantize_module_weight(linear))
            if linear.bias is not None:
                head.bias.copy_(linear.bias)
        for name, copied in list(head.named_parameters()):
            original = getattr(linear, name)
            if original.is_floating_point() and original.shape == copied.shape:
                # The same parameter, now fp32, as an optimizer that was made before may hold it.
                original.data = copied.data
                setattr(head, name, original.requires_grad_())
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores (..., 1) fp32 of hidden states (..., H)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


def head_name(model: nn.Module) -> str | None:
    """Finds the last linear layer of a sequence-classification model with one label.

    Args:
        model: the model, without wrappers.

    Returns:
        Its dotted name: `score` in decoders, `classifier` or the last layer inside it in encoders. `None` if there is
        no such layer.
    """
    if isinstance(getattr(model, "score", None), nn.Linear):
        return "score"
    layers = getattr(model, "classifier", None)
    if not isinstance(layers, nn.Module):
        return None
    name_of_last = None
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == 1:
            # If the classifier is itself a linear layer, its name here is empty.
            name_of_last = f"classifier.{name}" if name else "classifier"
    return name_of_last


def is_encoder(model: nn.Module) -> bool:
    """Whether a sequence-classification model is an encoder (BERT, DeBERTa, …), which has a `classifier` head."""
    if hasattr(model, "score"):
        return False
    return isinstance(getattr(model, "classifier", None), nn.Module)


def untrained_layers(model: nn.Module) -> list[str]:
    """Names of layers of an encoder that a checkpoint may lack. An adapter must save them (`modules_to_save`)."""
    names = set()
    for name, module in model.named_children():
        has_parameters = next(module.parameters(), None) is not None
        if has_parameters and name != model.base_model_prefix:
            names.add(name)
    # A pooler is part of the backbone, but models pretrained without next-sentence prediction have no weights for it.
    for name, _ in model.named_modules():
        if name.endswith(".pooler"):
            names.add("pooler")
    return sorted(names)


def learned_positions(model: nn.Module) -> int | None:
    """Maximum number of tokens of a model with learned positions; `None` for rotary positions."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or name.rsplit(".", 1)[-1] not in _POSITIONS:
            continue
        limit = model.config.get_text_config().max_position_embeddings
        if name.endswith("position_embeddings") and module.padding_idx is not None:
            limit -= module.padding_idx + 1  # the positions of RoBERTa start after the pad id
        return limit
    return None


def install_fp32_score(model: nn.Module) -> nn.Module:
    """Replaces the last layer of a sequence-classification model with one label by a `ScalarHead`, in place.

    Call it before attaching PEFT, as `modules_to_save` copies the head at that time. An encoder becomes fp32 as a
    whole, as it has other new layers too.

    Args:
        model: the model, without wrappers.

    Returns:
        The same model.

    Raises:
        UserError: if the model has no linear head with one output.
    """
    name = head_name(model)
    if name is None:
        raise UserError(
            f"{type(model).__name__} has no linear `score` or `classifier` head with one output: load it with "
            "num_labels=1, and choose a decoder (Llama, Qwen, Gemma, …) or an encoder (BERT, DeBERTa, …)."
        )
    if is_encoder(model):
        model.float()
    head = model.get_submodule(name)
    if not isinstance(head, ScalarHead):
        model.set_submodule(name, ScalarHead.from_linear(head))
    return model
