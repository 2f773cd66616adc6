"""Which base a run has whose model is a folder that an earlier stage will make."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MAX_STAGES = 5  # the longest chain of configs that name each other's folders

OF_THE_ADAPTER = ("lora_r", "lora_alpha", "lora_target_modules", "use_dora", "use_rslora")
"""Options of the stage that makes an adapter, which decide on its size where the next stage trains it further."""


@dataclass(frozen=True)
class MadeFrom:
    """What a model is made from.

    Attributes:
        base: Name of the base: a folder that exists, or one on the Hub.
        adapter: Options of the adapter that an earlier stage will put on it. None if the model is the base itself.
    """

    base: str
    adapter: dict[str, Any] | None = None


def made_from(name: str, config: Path | None) -> MadeFrom:
    """The base of a model, which may be the `output_dir` of another config in the folder of `config`.

    Args:
        name: Folder or Hub id.
        config: The config file of the stage. None without one.

    Returns:
        The name itself, if the folder exists or no config beside this one makes it.
    """
    adapter: dict[str, Any] | None = None
    for _ in range(MAX_STAGES):
        made_by = None if config is None or Path(name).expanduser().exists() else _maker_of(name, config.parent)
        if made_by is None or "model_name_or_path" not in made_by:
            break
        if made_by.get("use_peft", True):
            adapter = adapter or {option: made_by[option] for option in OF_THE_ADAPTER if option in made_by}
        name = made_by["model_name_or_path"]
    return MadeFrom(name, adapter)


def _maker_of(name: str, folder: Path) -> dict[str, Any] | None:
    """The config in a folder whose run is saved as `name`."""
    for path in sorted(folder.glob("*.yaml")):
        try:
            options = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # a file that nobody asked for, and that need not be a config
        if isinstance(options, dict) and Path(str(options.get("output_dir"))) == Path(name):
            return options
    return None
