"""Loading of base models, policies and tokenizers, in any dtype and quantization."""

import contextlib
import logging
import os
import platform
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, TaskType
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..compat import suppress_seqcls_warning
from ..data.prompt_form import PromptForm, remember_form
from ..errors import UserError, last_line
from .adapter_files import adapter_weight_names, refuse_lost_modules, refuse_lost_weights
from .adapter_kinds import refuse_lost_start, task_name
from .base_record import warn_of_other_precision
from .cache_name import accept_old_cache_name
from .checkpoint_files import is_head, load_complete
from .embeddings import restore_embeddings
from .families import check_config
from .heads import install_fp32_score, is_encoder
from .locations import EMBEDDED_MODEL, resolve_location
from .lookup import adapter_base as adapter_base  # kept here for its callers
from .lookup import base_and_revision, found_or_refused, tokenizer_source
from .ownership import refuse_adapted_base
from .partitions import loaded_whole
from .quantization import (
    as_quantization_config,
    as_record,
    describe_quantization,
    keep_nf4_gradients_right,
    quantization_differs,
    quantization_record,
    refuse_trained_checkpoint,
    refuse_unloadable,
    require_bitsandbytes,
    stored_quantization,
    with_head_left_alone,
    with_trainable_kernels,
)
from .source import remember_revision, remember_source

logger = logging.getLogger(__name__)

ENCODER_TEMPLATE = (
    "{{ cls_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ sep_token }}{% endif %}"
)
"""Chat template for encoders, which have none: [CLS], the messages, [SEP]. The completion and [SEP] follow."""

_RENAMED_OPTIONS = {
    "torch_dtype": "it is called dtype now: pass dtype='float32', 'bfloat16' or 'float16'",
    "use_flash_attention_2": "pass attn_implementation='flash_attention_2'",
    "use_flash_attention": "pass attn_implementation='flash_attention_2'",
    "attention_implementation": "it is called attn_implementation: rename it",
    "load_in_8bit": "pass quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
    "bnb_4bit_compute_dtype": "pass quantization_config=BitsAndBytesConfig(...) with this option",
    "bnb_4bit_quant_type": "pass quantization_config=BitsAndBytesConfig(...) with this option",
    "use_auth_token": "log in with `hf auth login`, or set HF_TOKEN",
    "token": "log in with `hf auth login`, or set HF_TOKEN",
    "cache_dir": "set the environment variable HF_HOME",
    "low_cpu_mem_usage": "leave it out, as Transformers always loads like this now",
    "num_labels": "leave it out, as a reward model has one label",
    "use_cache": "leave it out, as training never uses the cache and generation always does",
}
"""Options of `from_pretrained` that are not options of `load_base_model`, with what to do instead."""

_HEADS = ("lm_head", "score")
"""Layers that are not quantized."""


def preferred_dtype() -> torch.dtype:
    """The dtype in which this machine computes fastest.

    Returns:
        bf16 on GPUs and CPUs with bf16 instructions, fp16 on other GPUs, and fp32 on other CPUs.
    """
    if torch.cuda.is_available():
        return torch.float16 if card_lacks_bf16() else torch.bfloat16
    if _cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def card_lacks_bf16() -> bool:
    """Whether there is a CUDA card, and it has no instructions for bf16, such as a T4, GTX 16 or RTX 20."""
    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def warn_of_emulated_bf16(args: TrainingArguments) -> None:
    """Logs a warning if bf16, the default of TRL's trainers, is slow on this CPU or this card."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")  # not measured on other processors
    if args.bf16 and args.device.type == "cpu" and on_x86 and not _cpu_has_bf16():
        logger.warning("bf16 on a CPU without bf16 instructions is several times slower than fp32: set bf16 to false.")
    if args.bf16 and args.device.type == "cuda" and card_lacks_bf16():
        logger.warning("bf16 is emulated on this card, which has no instructions for it: set fp16 to true instead.")


def warn_of_rounded_updates(name: str, model: torch.nn.Module) -> None:
    """Logs a warning if a model is trained without an adapter and its weights are not fp32, which loses small updates.

    Args:
        name: name of the argument, for the message.
        model: the model.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if dtype == torch.float32:
        return
    logger.warning(
        "%s is trained without an adapter and its weights are %s: small updates are lost by rounding. Load it with "
        "dtype='float32' (--dtype float32; bf16=True still computes in bf16), or train an adapter (peft_config, or "
        "--use_peft true).",
        name,
        str(dtype).removeprefix("torch."),
    )


def refuse_fp16_weights(model: torch.nn.Module) -> None:
    """Raises `UserError` if trained weights are fp16, as a gradient scaler does not support them."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise UserError(
                "fp16=True: training of weights in fp16 is not supported: load the model with dtype='float32', or "
                "train an adapter (peft_config)."
            )


def warn_of_unscaled_fp16(args: TrainingArguments, model: torch.nn.Module) -> None:
    """Logs a warning if gradients pass through fp16 weights without a loss scale, in which small ones become zero.

    Args:
        args: options of the run; `fp16` brings the loss scale.
        model: the model to train, also with frozen weights under an adapter.
    """
    if not args.fp16 and any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        logger.warning(
            "weights are in fp16 and fp16=False: without a loss scale, small gradients are rounded to zero: set "
            "fp16=True (bf16=False), or load the model with dtype='float32'."
        )


def load_base_model(
    model_name_or_path: str | Path = EMBEDDED_MODEL,
    *,
    task: Literal["causal_lm", "reward"] = "causal_lm",
    dtype: str | torch.dtype = "auto",
    load_in_4bit: bool = False,
    quantization_config: QuantizationConfigMixin | dict[str, Any] | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | dict | None = None,
    trains_weights: bool = False,
    may_lack: Literal["head"] | Collection[str] = "head",
    **unknown: Any,
) -> PreTrainedModel:
    """Loads a base model.

    Args:
        model_name_or_path: Hub id, folder, path of a `.gguf` file (unpacked once), or `EMBEDDED_MODEL`.
        task: `"causal_lm"`, or `"reward"` for sequence classification with one label and an fp32 `ScalarHead`.
        dtype: dtype of the weights, such as `"float32"`; `"auto"` means the fastest one on this machine
            (`preferred_dtype`). Encoders with a head are always fp32.
        load_in_4bit: whether to quantize to NF4 with double quantization (QLoRA, arXiv:2305.14314), computed in bf16,
            or in fp16 on GPUs without bf16.
        quantization_config: another quantization, as a configuration of Transformers such as `BitsAndBytesConfig`, or
            its values; not together with `load_in_4bit`. A checkpoint that is quantized already keeps its own.
        revision: branch, tag or commit on the Hub; `None` means the default branch.
        attn_implementation: attention implementation, as in Transformers.
        trust_remote_code: whether to run Python code from the repository, as in Transformers.
        device_map: placement on devices, as in Transformers.
        trains_weights: whether the weights themselves will be trained, so that a checkpoint with quantized ones is
            refused before they are read.
        may_lack: weights of a reward model that the checkpoint may lack. `"head"` means the layers that are new where a
            reward model is trained from a base: the head, and the pooler of an encoder. To score with a reward model
            that was trained, pass `()`, or the names of the weights that an adapter brings.
        unknown: other options of Transformers, which are refused.

    Returns:
        The model.

    Raises:
        UserError: if the model cannot be loaded, if it is of a family that does not fit the task, for an option that
            does not exist, if weights are missing in the checkpoint or have another shape, for a quantization without
            its package or of an encoder, for an unknown dtype, or for the embedded model without its package.
    """
    _refuse_unknown(unknown)
    model_name_or_path = os.fspath(model_name_or_path)
    options = {
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "device_map": device_map,
        "dtype": resolve_dtype(dtype),
    }
    requested = _requested_quantization(load_in_4bit, quantization_config, task)
    path, location = resolve_location(model_name_or_path, revision)
    with found_or_refused("model_name_or_path", model_name_or_path), loaded_whole(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # said below in one line
        check_config(path, name=model_name_or_path, task=task, trust_remote_code=trust_remote_code, **location)
        stored = stored_quantization(path, **location)
        if trains_weights:
            refuse_trained_checkpoint(model_name_or_path, stored)
        refuse_unloadable(model_name_or_path, stored)
        if stored is not None:
            _say_other_quantization(model_name_or_path, stored, requested)
            options |= _options_of_stored(stored, device_map)
        elif requested is not None:
            options["quantization_config"] = requested
        if task == "reward":
            model = _load_classifier(path, name=model_name_or_path, may_lack=may_lack, **location, **options)
        else:
            model = load_complete(AutoModelForCausalLM, path, name=model_name_or_path, **location, **options)

    # A saved adapter names its base by this.
    known_name = model_name_or_path
    if os.path.exists(os.path.expanduser(known_name)):
        known_name = os.path.abspath(os.path.expanduser(known_name))
    model.name_or_path = known_name
    model.config.name_or_path = known_name
    remember_revision(model, model_name_or_path, revision)

    keep_nf4_gradients_right(model)
    if task == "reward":
        refuse_quantized_encoder(model, _quantizing_option(load_in_4bit, requested))
        install_fp32_score(model)
    return model


def _refuse_unknown(unknown: Iterable[str]) -> None:
    """Raises `UserError` for the first option that `load_base_model` does not have, with what to do instead."""
    for name in sorted(unknown):
        remedy = _RENAMED_OPTIONS.get(name)
        if remedy is None:
            remedy = "leave it out, or load the model with Transformers and pass the loaded model"
        raise UserError(f"{name}: not an option for a model that is loaded by name: {remedy}.")


def _requested_quantization(
    load_in_4bit: bool, quantization_config: QuantizationConfigMixin | dict[str, Any] | None, task: str
) -> QuantizationConfigMixin | None:
    """The quantization that the options of `load_base_model` ask for; `None` for none."""
    if quantization_config is None:
        return four_bit_config() if load_in_4bit else None
    if load_in_4bit:
        raise UserError("load_in_4bit and quantization_config are both given: leave load_in_4bit out.")
    config = as_quantization_config(quantization_config)
    if task == "reward":
        config = with_head_left_alone(config)
    return config


def _quantizing_option(load_in_4bit: bool, requested: QuantizationConfigMixin | None) -> str:
    """Name of the option that asks for a quantization, for messages."""
    if load_in_4bit:
        return "load_in_4bit"
    if getattr(requested, "load_in_8bit", False):
        return "quantization_config (load_in_8bit)"
    return "quantization_config"


def _say_other_quantization(name: str, stored: dict[str, Any], requested: QuantizationConfigMixin | None) -> None:
    """Logs a warning if a checkpoint is quantized already, in another way than requested."""
    wanted = None if requested is None else as_record(requested)
    if wanted is not None and quantization_differs(stored, wanted):
        logger.warning(
            "%s is quantized already (%s) and is loaded like this, instead of %s.",
            name,
            describe_quantization(stored),
            describe_quantization(wanted),
        )


def _options_of_stored(stored: dict[str, Any], device_map: str | dict | None) -> dict[str, Any]:
    """Further options of `from_pretrained` for a checkpoint that is quantized already."""
    config = with_trainable_kernels(stored)
    if config is None:
        return {}
    if device_map is None and torch.cuda.is_available():
        # Trainer moves no quantized model, and Transformers puts these on the CPU, unlike those of bitsandbytes.
        device_map = {"": torch.cuda.current_device()}
    return {"quantization_config": config, "device_map": device_map}


def refuse_quantized_encoder(model: torch.nn.Module, option: str) -> None:
    """Raises `UserError` if an encoder is quantized. `option` is the name of the option that quantized it."""
    if is_encoder(model) and quantization_record(model) is not None:
        raise UserError(f"{option}: {model.name_or_path} is an encoder, which is trained in fp32: leave it out.")


def _load_classifier(
    path: str, *, dtype: torch.dtype, may_lack: Literal["head"] | Collection[str], **options: Any
) -> PreTrainedModel:
    """Loads a sequence classifier with one label. An encoder is loaded again in fp32."""
    # TRL's context hides the new head from the report, which is right only where a new head may be trained.
    context = suppress_seqcls_warning() if may_lack == "head" else contextlib.nullcontext()
    options = {"may_lack": may_lack, "num_labels": 1} | options
    with context:
        model = load_complete(AutoModelForSequenceClassification, path, dtype=dtype, **options)
        quantized = quantization_record(model) is not None
        if is_encoder(model) and not quantized and dtype != torch.float32:
            model = load_complete(AutoModelForSequenceClassification, path, dtype=torch.float32, **options)
    return model


def load_tokenizer(
    model_name_or_path: str | Path = EMBEDDED_MODEL,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer that pads on the left, as generation needs.

    If it has no pad token, eos is used, which is safe in this library: padding is never recognized by its id. The
    tokenizer of an encoder gets its separator as eos, and a chat template. An adapter that was saved without a
    tokenizer has that of its base.

    Args:
        model_name_or_path: Hub id, folder, path of a `.gguf` file, or `EMBEDDED_MODEL`.
        revision: branch, tag or commit on the Hub; `None` means the default branch.
        trust_remote_code: whether to run Python code from the repository, as in Transformers.

    Returns:
        The tokenizer.

    Raises:
        UserError: if the tokenizer cannot be loaded.
    """
    model_name_or_path, revision = tokenizer_source(os.fspath(model_name_or_path), revision)
    path, location = resolve_location(model_name_or_path, revision)
    with found_or_refused("tokenizer", model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(path, **location, trust_remote_code=trust_remote_code)
    tokenizer.padding_side = "left"
    if tokenizer.eos_token is None:  # encoders end texts with their separator
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None and tokenizer.cls_token and tokenizer.sep_token:
        tokenizer.chat_template = ENCODER_TEMPLATE
    tokenizer.name_or_path = model_name_or_path
    tokenizer.init_kwargs["name_or_path"] = model_name_or_path
    # A saved tokenizer contains its `init_kwargs`. These two describe this machine.
    tokenizer.init_kwargs.pop("is_local", None)
    tokenizer.init_kwargs.pop("local_files_only", None)
    return tokenizer


def load_policy(
    folder_or_repo: str | Path,
    *,
    revision: str | None = None,
    is_trainable: bool = False,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **base_options: Any,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Loads a policy and its tokenizer: an adapter with its base, or a whole model.

    If an adapter was trained on a base in another precision than the one it gets here, a warning is logged that names
    the options of training.

    Args:
        folder_or_repo: local folder or Hub id of an adapter or of a model.
        revision: branch, tag or commit of `folder_or_repo`; `None` means the default branch.
        is_trainable: whether the adapter can be trained further, such as an SFT adapter with PPO.
        trust_remote_code: whether to run Python code from the repositories, as in Transformers.
        tokenizer: the tokenizer, if another one is wanted, or if there is none in the folder.
        base_options: options of `load_base_model`, such as `dtype` and `load_in_4bit`.

    Returns:
        The policy and the tokenizer.

    Raises:
        UserError: if the policy cannot be loaded, or if the adapter does not fit its base.
    """
    folder_or_repo = os.path.expanduser(folder_or_repo)
    remote = {"trust_remote_code": trust_remote_code}
    base_id, base_revision = base_and_revision(folder_or_repo, revision)
    if base_id is not None:
        _refuse_reward_adapter(folder_or_repo, revision)
    path, location = resolve_location(base_id or folder_or_repo, base_revision if base_id else revision)
    with found_or_refused("model_name_or_path", base_id or folder_or_repo):
        check_config(path, name=base_id or folder_or_repo, task="causal_lm", **remote, **location)
    if tokenizer is None:  # before the weights, which may take minutes
        tokenizer = load_tokenizer(folder_or_repo, revision=revision, **remote)
    if base_id is None:
        # A whole model, not an adapter.
        model = load_base_model(folder_or_repo, revision=revision, **remote, **base_options)
    else:
        base = load_base_model(base_id, revision=base_revision, **remote, **base_options)
        model = attach_adapter(base, folder_or_repo, revision=revision, is_trainable=is_trainable)
        warn_of_other_precision(model, folder_or_repo, revision)
    remember_form(model, PromptForm.load(folder_or_repo, revision))
    remember_source(model, folder_or_repo, revision)
    return model, tokenizer


def _refuse_reward_adapter(folder_or_repo: str, revision: str | None) -> None:
    """Raises `UserError` if an adapter is a reward model or classifier, before its base is loaded as a policy."""
    config = PeftConfig.from_pretrained(folder_or_repo, revision=revision)
    heads = [key for key in adapter_weight_names(folder_or_repo, revision) if is_head(key) and "lora_" not in key]
    if config.task_type == TaskType.SEQ_CLS or (heads and config.task_type != TaskType.CAUSAL_LM):
        raise UserError(
            f"{folder_or_repo}: is a reward adapter (task_type={task_name(config)}), not a policy: give the adapter of "
            "a policy, or a base model."
        )


def attach_adapter(base: PreTrainedModel, folder_or_repo: str | Path, **options: Any) -> PeftModel:
    """Loads an adapter onto a base.

    If the adapter was trained with more or fewer tokens, or with trained embeddings, the base gets these first.

    Args:
        base: the base model, changed in place.
        folder_or_repo: local folder or Hub id of the adapter.
        options: options of `PeftModel.from_pretrained`.

    Raises:
        UserError: if the adapter was trained on another base, or if weights are missing in its file.
    """
    revision = options.get("revision")
    weights = adapter_weight_names(folder_or_repo, revision)
    config = PeftConfig.from_pretrained(str(folder_or_repo), revision=revision)
    refuse_lost_modules(folder_or_repo, config, weights, base)  # PEFT changes the base before it reads the weights
    refuse_adapted_base("base", base)
    is_trainable = options.get("is_trainable", False)
    refuse_lost_start(folder_or_repo, config, is_trainable=is_trainable)
    if is_trainable and config.is_prompt_learning:
        raise UserError(
            f"{folder_or_repo}: an adapter of type {config.peft_type.value} "
            "cannot be trained further once it is saved, as PEFT loads its virtual tokens frozen: load it without "
            "is_trainable, or train a new adapter on the base (peft_config)."
        )
    restore_embeddings(base, folder_or_repo, revision=revision)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below
            model = PeftModel.from_pretrained(base, str(folder_or_repo), **options)
    # Shapes differ, target modules are missing, or a trained token is not in the vocabulary.
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"{folder_or_repo}: this adapter does not fit the base model {base.name_or_path}: {last_line(error)}."
        ) from error
    refuse_lost_weights(folder_or_repo, model, model.active_adapter, weights)
    accept_old_cache_name(model, None)
    return model


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Returns the torch dtype of a name such as `"bfloat16"`; `"auto"` means `preferred_dtype()`.

    Raises:
        UserError: if the name is not a floating-point dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return preferred_dtype()
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise UserError(f"dtype: {dtype!r} is not a floating-point dtype: choose auto, float32, bfloat16 or float16.")
    return named


def four_bit_config(
    quant_type: str = "nf4", *, double_quant: bool = True, storage: str | None = None
) -> BitsAndBytesConfig:
    """The configuration for 4 bits, computed in bf16, or in fp16 on GPUs without bf16. The heads are not quantized.

    Args:
        quant_type: `"nf4"` or `"fp4"`.
        double_quant: whether the scales of the blocks are quantized too, which saves 0.4 bits per weight.
        storage: dtype in which the packed weights are stored, such as `"bfloat16"`; `None` means uint8.

    Raises:
        UserError: if bitsandbytes is not installed.
    """
    require_bitsandbytes("load_in_4bit")
    compute_dtype = torch.bfloat16
    if preferred_dtype() == torch.float16:
        compute_dtype = torch.float16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=list(_HEADS),
    )


def eight_bit_config() -> BitsAndBytesConfig:
    """The configuration for 8 bits (LLM.int8, arXiv:2208.07339). The heads are not quantized.

    Raises:
        UserError: if bitsandbytes is not installed.
    """
    require_bitsandbytes("load_in_8bit")
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(_HEADS))
