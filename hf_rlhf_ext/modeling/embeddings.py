"""Token embeddings and output heads of a base that were resized or trained: saved with an adapter, and restored.

An adapter changes the layers that it targets, and the rest of its base is loaded by name. Rows for new tokens are not
in that base, so they are saved beside the weights of the adapter, under the names that PEFT uses for them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftConfig, PeftModel, load_peft_weights
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from .adapter_files import adapter_weights_path
from .partitions import whole_shape
from .probing import unchanged_random_state
from .shards import as_shard, whole

_WRAPPER_INFIXES = ("", ".base_layer", ".original_module", ".token_adapter.base_layer")
"""What PEFT puts between the name of a layer and that of its weight, depending on what wraps the layer."""

_CHANGED = "_embeddings_changed_by"
"""Attribute of a base whose embeddings were replaced by those of an adapter: the folder of the adapter."""


@dataclass(frozen=True)
class TokenLayer:
    """The input embedding or the output head of a model.

    Attributes:
        name: its name in the model without wrappers, such as `model.embed_tokens`.
        module: the layer, with the wrappers of PEFT.
        plain: the layer of the base inside them.
        is_output: whether it is the output head.
    """

    name: str
    module: nn.Module
    plain: nn.Module
    is_output: bool


def token_layers(model: PreTrainedModel | PeftModel) -> list[TokenLayer]:
    """The input embedding and, if the model has one, the output head."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    names = {id(module): name for name, module in model.named_modules()}
    layers = []
    for module, is_output in ((_input_embedding(model), False), (model.get_output_embeddings(), True)):
        if module is None or id(module) not in names or not hasattr(plain_layer(module), "weight"):
            continue
        layers.append(TokenLayer(names[id(module)], module, plain_layer(module), is_output))
    return layers


def _input_embedding(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # an architecture without an embedding that Transformers knows
        return None


def plain_layer(layer: nn.Module) -> nn.Module:
    """The embedding or head of the base inside the wrappers of PEFT."""
    while True:
        if isinstance(layer, AuxiliaryTrainingWrapper):
            layer = layer.original_module
        elif isinstance(layer, BaseTunerLayer):
            layer = layer.get_base_layer()
        else:
            return layer


def n_rows(model: PreTrainedModel | PeftModel) -> int:
    """Number of tokens for which the input embedding has a row."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    embedding = _input_embedding(base)
    weight = None if embedding is None else getattr(plain_layer(embedding), "weight", None)
    if weight is None:
        return base.config.get_text_config().vocab_size
    return whole_shape(weight)[0]


# ---- Saving ----


def embeddings_to_save(
    model: PeftModel,
    adapter: str,
    *,
    resized: bool,
    start: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The weights of embedding and output head of the base that have to be saved with an adapter.

    These are both layers if the base was resized, and otherwise those that are trained themselves, or that the adapter
    targets, as PEFT's `save_embedding_layers="auto"` does. Tied weights are contained once. What an initialization such
    as PiSSA took out of a layer (`start`) is added again, since the saved adapter is one for the original base.

    Args:
        model: model with adapters.
        adapter: name of the adapter.
        resized: whether the base has another number of tokens than the base of its name.
        start: name of the adapter that was taken out of the base, see `save_adapter`.
        state_dict: the weights of the model by name, where they are gathered from several devices.

    Returns:
        The weights by their names in the file of the adapter.
    """
    tensors: dict[str, Tensor] = {}
    saved: set[int] = set()
    for layer in token_layers(model):
        taken_out = _taken_out(layer, start)
        # The original weight of a layer that was changed is that of the base, exactly.
        is_needed = _is_targeted(layer, adapter) and taken_out is None
        if not (resized or _is_trained(layer) or is_needed):
            continue
        for name, parameter in layer.plain.named_parameters(recurse=False):
            if id(parameter) in saved or not parameter.is_floating_point():  # tied, or quantized
                continue
            saved.add(id(parameter))
            key = f"{_prefix(model)}{layer.name}{_wrapped_by(layer.module, adapter)}.{name}"
            tensors[key] = _gathered(model, parameter, state_dict)
            if taken_out is not None and name == "weight":
                tensors[key] = (tensors[key].float() + taken_out.to(tensors[key].device)).to(parameter.dtype)
    return tensors


def _taken_out(layer: TokenLayer, start: str | None) -> Tensor | None:
    """The part of the weight of a layer that `start` was initialized with, in fp32; `None` for other layers."""
    if start is None or not _is_targeted(layer, start):
        return None
    return whole(layer.module.get_delta_weight(start).detach()).float()


def _is_trained(layer: TokenLayer) -> bool:
    return any(parameter.requires_grad for parameter in layer.plain.parameters(recurse=False))


def _is_targeted(layer: TokenLayer, adapter: str) -> bool:
    module = layer.module
    if not isinstance(module, BaseTunerLayer) or isinstance(module, TrainableTokensLayer):
        return False
    return _wrapped_by(module, adapter) != ""


def _wrapped_by(module: nn.Module, adapter: str) -> str:
    """What the name of the base's weight contains in a model with this adapter only, see `_WRAPPER_INFIXES`."""
    if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
        return ".original_module"
    if isinstance(module, TrainableTokensWrapper) and adapter in module.token_adapter.trainable_tokens_delta:
        return ".token_adapter.base_layer"
    if isinstance(module, BaseTunerLayer) and adapter in module._get_available_adapters():
        return ".base_layer"
    return ""


def _prefix(model: PeftModel) -> str:
    # Prompt learning has no model of PEFT between the wrapper and the base.
    return "base_model." if model.base_model is model.get_base_model() else "base_model.model."


def _gathered(model: PeftModel, parameter: nn.Parameter, state_dict: Mapping[str, Tensor] | None) -> Tensor:
    if state_dict is not None:
        for name, candidate in model.named_parameters():
            if candidate is parameter and name in state_dict:
                return state_dict[name]
    return whole(parameter.detach())


# ---- What the file of an adapter contains ----


@dataclass
class SavedEmbeddings:
    """Embedding and output head in the file of an adapter.

    Attributes:
        base: weights of the base itself, by name of the layer and of the weight, such as `("lm_head", "weight")`.
        rows: number of tokens of each layer, also of copies that belong to the adapter (`modules_to_save`).
        keys: the names of the weights in `base` in the file.
    """

    base: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)

    @classmethod
    def among(cls, weights: Any, config: PeftConfig, layers: list[TokenLayer]) -> Self:
        """Finds them among the weights of an adapter, a mapping or an open safetensors file."""
        found = cls()
        own_copies = _layers_with_own_copy(config, layers)
        for key in list(weights.keys()):
            for layer, between, name in _matches(key, layers):
                tensor = _tensor(weights, key)
                if name == "weight":
                    found.rows[layer.name] = tensor.shape[0]
                if between == "" and layer.name in own_copies:
                    continue  # a weight of the adapter, which PEFT loads
                found.base[layer.name, name] = tensor
                found.keys.add(key)
        return found


def _layers_with_own_copy(config: PeftConfig, layers: list[TokenLayer]) -> set[str]:
    """Names of the layers of which the adapter has a copy (`modules_to_save`)."""
    copied = set()
    for layer in layers:
        for name in getattr(config, "modules_to_save", None) or ():
            if layer.name == name or layer.name.endswith(f".{name}"):
                copied.add(layer.name)
    tied = len({id(layer.plain.weight) for layer in layers}) == 1
    if copied and tied and getattr(config, "ensure_weight_tying", False):
        copied.update(layer.name for layer in layers)  # PEFT copies both, and lists one
    return copied


def _matches(key: str, layers: list[TokenLayer]) -> Iterator[tuple[TokenLayer, str, str]]:
    for layer in layers:
        for between in _WRAPPER_INFIXES:
            for name in ("weight", "bias"):
                end = f"{layer.name}{between}.{name}"
                if key == end or key.endswith(f".{end}"):
                    yield layer, between, name


def _tensor(weights: Any, key: str) -> Tensor:
    return weights.get_tensor(key) if hasattr(weights, "get_tensor") else weights[key]


def read_embeddings(
    folder_or_repo: str | Path, model: PreTrainedModel | PeftModel, *, revision: str | None = None
) -> SavedEmbeddings:
    """Reads embedding and output head from the file of an adapter; empty if it has none.

    Args:
        folder_or_repo: local folder or Hub id of the adapter.
        model: a model of the base's architecture.
        revision: branch, tag or commit on the Hub.
    """
    config = PeftConfig.from_pretrained(str(folder_or_repo), revision=revision)
    layers = token_layers(model)
    path = adapter_weights_path(folder_or_repo, revision)
    if path is not None:
        with safe_open(path, framework="pt") as weights:
            return SavedEmbeddings.among(weights, config, layers)
    older_file = load_peft_weights(str(folder_or_repo), device="cpu", revision=revision)
    return SavedEmbeddings.among(older_file, config, layers)


# ---- Loading ----


@torch.no_grad()
def restore_embeddings(
    base: PreTrainedModel, folder_or_repo: str | Path, *, revision: str | None = None
) -> SavedEmbeddings:
    """Gives a base the embedding and output head that were saved with an adapter, before the adapter is attached.

    If they have more or fewer tokens, the base is resized. A base without adapters is expected, which nothing shares.

    Args:
        base: the base model, changed in place.
        folder_or_repo: local folder or Hub id of the adapter.
        revision: branch, tag or commit of the adapter on the Hub.

    Returns:
        What the file of the adapter contains.

    Raises:
        UserError: if the rows of new tokens are missing in the file.
    """
    saved = read_embeddings(folder_or_repo, base, revision=revision)
    if not saved.rows:
        return saved
    wanted = max(saved.rows.values())
    present = n_rows(base)
    if wanted != present:
        config = PeftConfig.from_pretrained(str(folder_or_repo), revision=revision)
        _check_rows_are_saved(base, saved, config, folder_or_repo, present, wanted)
        with unchanged_random_state(base.device):  # new rows are drawn, and replaced by the saved ones
            base.resize_token_embeddings(wanted, mean_resizing=False)
    for layer in token_layers(base):
        for name, parameter in layer.plain.named_parameters(recurse=False):
            tensor = saved.base.get((layer.name, name))
            if tensor is None or not parameter.is_floating_point():
                continue
            tensor = tensor.to(parameter)
            common = min(present, wanted)
            if not torch.equal(parameter[:common], tensor[:common]):
                setattr(base, _CHANGED, str(folder_or_repo))
            parameter.copy_(tensor)
    return saved


def _check_rows_are_saved(
    base: PreTrainedModel,
    saved: SavedEmbeddings,
    config: PeftConfig,
    folder_or_repo: str | Path,
    present: int,
    wanted: int,
) -> None:
    """Raises `UserError` if resizing would leave random rows, because a layer is not in the file."""
    new_rows = set(range(present, wanted))
    tied = len({id(layer.plain.weight) for layer in token_layers(base)}) == 1
    for layer in token_layers(base):
        rows = saved.rows.get(layer.name)
        if rows == wanted or (rows is None and (tied or not new_rows)):
            continue
        if rows is None and not layer.is_output and new_rows <= _trainable_tokens(config):
            continue  # their rows are among the weights of the adapter itself
        raise UserError(
            f"{folder_or_repo}: the adapter was trained with {wanted} tokens and the base {base.name_or_path} has "
            f"{present}, but its file has no rows of new tokens for {layer.name}: save it again with "
            "save_embedding_layers=True, or pass a base that was resized like this."
        )


def _trainable_tokens(config: PeftConfig) -> set[int]:
    """Tokens whose rows are trained one by one, and therefore saved by PEFT."""
    indices = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or ()
    if isinstance(indices, Mapping):
        return {index for some in indices.values() for index in some}
    return set(indices)


@torch.no_grad()
def load_embeddings(model: PeftModel, weights: dict[str, Tensor], adapter: str, *, start: str | None = None) -> None:
    """Moves embedding and output head of the base from the weights of an adapter into the model, in place.

    They are removed from `weights`, as PEFT would not find them where another adapter wraps these layers.

    Args:
        model: the model that the weights were saved from, or one like it.
        weights: weights of an adapter by name, as in its file.
        adapter: name of the adapter in the model.
        start: as in `embeddings_to_save`.

    Raises:
        UserError: if the numbers of tokens differ.
    """
    layers = token_layers(model)
    saved = SavedEmbeddings.among(weights, model.peft_config[adapter], layers)
    for layer in layers:
        taken_out = _taken_out(layer, start)
        for name, parameter in layer.plain.named_parameters(recurse=False):
            tensor = saved.base.get((layer.name, name))
            if tensor is None:
                continue
            if tensor.shape != parameter.shape:
                raise UserError(
                    f"the adapter was saved with {tensor.shape[0]} tokens and the model has {parameter.shape[0]}: call "
                    f"model.resize_token_embeddings({tensor.shape[0]}) before the trainer is made."
                )
            if taken_out is not None and name == "weight":
                tensor = tensor.to(parameter.device).float() - taken_out
                rounding = torch.finfo(parameter.dtype).eps
                if torch.allclose(whole(parameter).float(), tensor, rtol=4 * rounding, atol=4 * rounding):
                    continue  # it is this weight, which the subtraction has rounded
            parameter.copy_(as_shard(tensor, parameter))
    for key in saved.keys:
        del weights[key]


# ---- Sharing a base ----


def embedding_mismatch(folder: str | Path, model: PreTrainedModel | PeftModel) -> str | None:
    """Why an adapter cannot use the embeddings of a base that is shared already, in a few words; `None` if it can.

    Args:
        folder: local folder of the adapter.
        model: the base, or a `PeftModel` of it.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    saved = read_embeddings(folder, base)
    present = n_rows(base)
    for rows in saved.rows.values():
        if rows > present:
            return f"it has rows for {rows} tokens, the base for {present}"
    changed_by = getattr(base, _CHANGED, None)
    if not saved.base:
        if changed_by is not None and Path(changed_by) != Path(folder):
            return f"the base has the trained embeddings of {changed_by}"
        if any(rows != present for rows in saved.rows.values()):
            return f"it has rows for {max(saved.rows.values())} tokens, the base for {present}"
        return None
    for layer in token_layers(base):
        for name, parameter in layer.plain.named_parameters(recurse=False):
            tensor = saved.base.get((layer.name, name))
            if tensor is None or not parameter.is_floating_point():
                continue
            # The base may have further tokens, which this adapter does not know.
            if not torch.equal(parameter[: len(tensor)], tensor.to(parameter)):
                return f"it was trained with another {layer.name}"
    return None
