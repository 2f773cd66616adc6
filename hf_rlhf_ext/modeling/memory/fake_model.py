"""Models without data: real code of Transformers and PEFT on fake tensors, which have sizes and a device only."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from ...errors import UserError, first_line
from ..families import loading_problem
from ..heads import ScalarHead, install_fp32_score, is_encoder
from .setup import Setup

_HEADS = ("lm_head", "score", "embed_out", "output")
_BLOCK_OF_4BIT = 64
_BLOCK_OF_SCALES = 256
_DEVICE = torch.device("cpu")
"""Where fake tensors say that they are. Fake tensors on CUDA would need a PyTorch that is built with it."""


def fake_mode() -> FakeTensorMode:
    """The mode in which fake tensors are made."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def shallow_config(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    """A copy of a config with the first `depth` layers."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    text.num_hidden_layers = depth
    if vars(text).get("layer_types"):  # as a property, as in Mamba and Jamba, it follows the number of layers by itself
        text.layer_types = list(text.layer_types)[:depth]
    return shallow


def build_base(config: PretrainedConfig, setup: Setup, *, task: str) -> nn.Module:
    """A model on the meta device, as `load_base_model` would load it.

    Args:
        config: its config.
        setup: options of the run, from which dtype, attention and quantization are taken.
        task: `causal_lm` or `reward`, a classifier with one fp32 score.

    Raises:
        UserError: if Transformers cannot build the architecture, or for an encoder.
    """
    options: dict[str, Any] = {"dtype": setup.dtype}
    if setup.attention is not None:
        options["attn_implementation"] = setup.attention
    family = AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM
    config = copy.deepcopy(config)
    if task == "reward":
        config.num_labels = 1
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # the layers are exchanged below
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0
    try:
        with torch.device("meta"):
            model = family.from_config(config, **options)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, NotImplementedError) as error:
        raise UserError(f"model: {config.model_type or 'this architecture'} {loading_problem(error)}.") from error
    if task == "reward" and is_encoder(model):
        raise UserError(
            f"model: {config.model_type} is an encoder, which is not planned: train it with a small batch, and watch "
            "the memory, or plan a decoder, such as Llama or Qwen."
        )
    model.tie_weights()
    if setup.quantization != "none":
        _quantize(model, setup)
    return install_fp32_score(model) if task == "reward" else model


def with_adapter(model: nn.Module, setup: Setup, *, task: str) -> PeftModel:
    """The model with a new adapter, which is on the meta device too."""
    targets = setup.lora_target_modules
    config = LoraConfig(
        r=setup.lora_r,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(setup.lora_modules_to_save) or None,
        use_dora=setup.use_dora,
        lora_dropout=setup.lora_dropout,
        task_type="SEQ_CLS" if task == "reward" else "CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise UserError(
            f"lora_target_modules: {first_line(error)}: name layers of this model, or leave it out."
        ) from error


def _quantize(model: nn.Module, setup: Setup) -> None:
    """Exchanges linear layers, but for the heads, for layers of bitsandbytes."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name.rsplit(".", 1)[-1] in _HEADS:
            continue
        shape = module.in_features, module.out_features
        with torch.device("meta"):
            if setup.quantization == "4bit":
                layer = bnb.nn.Linear4bit(
                    *shape,
                    bias=module.bias is not None,
                    compute_dtype=torch.bfloat16,
                    compress_statistics=setup.double_quant,
                    quant_type="nf4",
                )
            else:
                layer = bnb.nn.Linear8bitLt(*shape, bias=module.bias is not None, has_fp16_weights=False, threshold=6.0)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.to(setup.dtype), requires_grad=False)
        if setup.quantization == "4bit":
            layer.support_avx512bf16_for_cpu = False
        layer.requires_grad_(False)
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = setup.quantization == "4bit"
    model.is_loaded_in_8bit = setup.quantization == "8bit"
    model.is_quantized = True


def has_fused_experts(model: nn.Module) -> bool:
    """Whether all experts of a layer are slices of one parameter, (experts, out, in).

    Such a parameter is in no linear layer, so that Transformers has nothing that it would exchange for a layer of
    bitsandbytes.
    """
    convolutions = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv1d)}
    return any(weight.dim() == 3 and id(weight) not in convolutions for weight in model.parameters())


# ---- Fake tensors ----


def make_fake(model: nn.Module, mode: FakeTensorMode, setup: Setup) -> None:
    """Exchanges all parameters and buffers of a model for fake tensors, in place. Tied ones stay tied."""
    made: dict[int, Tensor] = {}
    kept = []  # so that no id is used twice

    def fake_of(tensor: Tensor, *, is_parameter: bool) -> Tensor:
        if id(tensor) not in made:
            kept.append(tensor)
            fake = FakeTensor(mode, tensor.detach().to("meta"), _DEVICE)
            made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
        return made[id(tensor)]

    for module in model.modules():
        if _is_4bit(module):
            _fake_4bit(module, mode, setup)
        elif _is_8bit(module):
            _fake_8bit(module, mode)
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not isinstance(parameter, FakeTensor):
                module._parameters[name] = fake_of(parameter, is_parameter=True)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and not isinstance(buffer, FakeTensor):
                module._buffers[name] = fake_of(buffer, is_parameter=False)


def _is_4bit(module: nn.Module) -> bool:
    return hasattr(module, "quant_state") and hasattr(module, "compute_dtype") and hasattr(module, "in_features")


def _is_8bit(module: nn.Module) -> bool:
    return hasattr(getattr(module, "state", None), "CB")


def _empty(mode: FakeTensorMode, *shape: int, dtype: torch.dtype) -> Tensor:
    return FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), _DEVICE)


def _fake_4bit(layer: nn.Module, mode: FakeTensorMode, setup: Setup) -> None:
    """Gives a layer in 4 bits its packed weight and the statistics of its blocks."""
    from bitsandbytes.functional import QuantState

    size = layer.in_features * layer.out_features
    blocks = -(-size // _BLOCK_OF_4BIT)
    further: dict[str, Any] = {}
    scales = _empty(mode, blocks, dtype=torch.uint8 if setup.double_quant else torch.float32)
    if setup.double_quant:
        further = {
            "offset": _empty(mode, dtype=torch.float32),
            "state2": QuantState(
                absmax=_empty(mode, -(-blocks // _BLOCK_OF_SCALES), dtype=torch.float32),
                code=_empty(mode, 256, dtype=torch.float32),
                blocksize=_BLOCK_OF_SCALES,
                dtype=torch.float32,
            ),
        }
    state = QuantState(
        absmax=scales,
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=_empty(mode, 16, dtype=torch.float32),
        blocksize=_BLOCK_OF_4BIT,
        quant_type="nf4",
        dtype=setup.dtype,
        **further,
    )
    weight = nn.Parameter(_empty(mode, (size + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = state
    weight.compress_statistics = setup.double_quant
    weight.quant_type = "nf4"
    weight.bnb_quantized = True
    layer._parameters["weight"] = weight


def _fake_8bit(layer: nn.Module, mode: FakeTensorMode) -> None:
    """Gives a layer in 8 bits its weight, and the scale of each row."""
    weight = nn.Parameter(_empty(mode, layer.out_features, layer.in_features, dtype=torch.int8), requires_grad=False)
    weight.CB = weight.data
    weight.SCB = _empty(mode, layer.out_features, dtype=torch.float32)
    layer._parameters["weight"] = weight
    layer.state.CB = weight.CB
    layer.state.SCB = weight.SCB
    weight.CB = None


def new_head(width: int) -> ScalarHead:
    """A scalar head with bias, on the meta device."""
    return ScalarHead(width, bias=True, device="meta")


@contextmanager
def without_fakes() -> Iterator[None]:
    """Inside the context, tensors are real, as for numbers that decide sizes."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        yield
