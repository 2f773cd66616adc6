"""The file of an adapter: where it is, what it holds, and whether every weight of the adapter is in it."""

from collections.abc import Collection, Iterable
from pathlib import Path

from peft import PeftConfig, PeftModel, load_peft_weights
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import cached_file

from ..errors import UserError
from .checkpoint_files import HEAD_NAMES, is_head, listed_keys, may_be_head
from .ownership import adapter_state


def adapter_weights_path(folder_or_repo: str | Path, revision: str | None = None) -> str | None:
    """The path of the safetensors file of an adapter; `None` if there is none, so that an older file may be there.

    Args:
        folder_or_repo: local folder or Hub id of the adapter.
        revision: branch, tag or commit on the Hub.
    """
    folder = Path(folder_or_repo)
    if folder.is_dir():
        path = folder / SAFETENSORS_WEIGHTS_NAME
        return str(path) if path.is_file() else None
    return cached_file(
        str(folder_or_repo),
        SAFETENSORS_WEIGHTS_NAME,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def adapter_weight_names(folder_or_repo: str | Path, revision: str | None = None) -> set[str]:
    """Returns the names of the weights in the file of an adapter.

    Args:
        folder_or_repo: local folder or Hub id of the adapter.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: if the file is missing or damaged.
    """
    path = adapter_weights_path(folder_or_repo, revision)
    try:
        if path is not None:
            with safe_open(path, framework="pt") as weights:
                return set(weights.keys())
        return set(load_peft_weights(str(folder_or_repo), device="cpu", revision=revision))  # an older `.bin` file
    except SafetensorError as error:
        raise UserError(
            f"{folder_or_repo}: {SAFETENSORS_WEIGHTS_NAME} is damaged or incomplete ({error}): save or download it "
            "again."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder_or_repo}: has no {SAFETENSORS_WEIGHTS_NAME}, the weights of the adapter: save or download it "
            "again."
        ) from error


def base_weight_names(adapter_weights: Iterable[str]) -> set[str]:
    """The weights of a base that an adapter replaces by its own (`modules_to_save`), from the names in its file."""
    names = set()
    for name in adapter_weights:
        names.add(name.removeprefix("base_model.model."))  # base_model.model.score.weight, with LoRA
        names.add(name.removeprefix("base_model."))  # base_model.score.weight, with virtual tokens
        names.add(name.removeprefix("base_model.").removeprefix("model."))  # model.score.weight
    return names


def refuse_lost_modules(
    folder_or_repo: str | Path, config: PeftConfig, weights: set[str], base: nn.Module | None = None
) -> None:
    """Raises `UserError` if a module that the configuration of an adapter saves is not in its file.

    Call it before PEFT changes the base. A reward adapter with `task_type="SEQ_CLS"` has its head among these.

    Args:
        folder_or_repo: folder or Hub id, for the message.
        config: configuration of the adapter.
        weights: names of the weights in its file.
        base: the base of the adapter; `None` checks the score head only.
    """
    saved_modules = set(getattr(config, "modules_to_save", None) or ())
    expected = saved_modules - HEAD_NAMES
    if saved_modules & HEAD_NAMES and not any(is_head(name) for name in weights):
        # PEFT lists both names, and a model has one of them.
        others = [name for name in sorted(weights) if may_be_head(name.removeprefix("base_model.model."))]
        instead = f"; it has {listed_keys(others)} instead" if others else ""
        raise UserError(
            f"{folder_or_repo}: the score head, which its configuration saves, is not in the adapter's file{instead}: "
            "give a reward model as BradleyTerryTrainer saves it, or train it again."
        )
    base_modules = [] if base is None else [name for name, _ in base.named_modules()]
    for module in sorted(expected):
        if not any(name == module or name.endswith(f".{module}") for name in base_modules):
            continue  # PEFT lists names for a task, which the model may not have
        if not any(f".{module}." in name for name in weights):
            raise UserError(
                f"{folder_or_repo}: {module!r}, which modules_to_save of its configuration lists, is not in the "
                "adapter's file: save or download it again."
            )


def refuse_lost_weights(folder_or_repo: str | Path, model: PeftModel, adapter: str, weights: Collection[str]) -> None:
    """Raises `UserError` if a weight of a loaded adapter was not in its file; PEFT only warns.

    Args:
        folder_or_repo: folder or Hub id, for the message.
        model: the model with the adapter.
        adapter: name of the adapter.
        weights: names of the weights in its file.
    """
    state = adapter_state(model, adapter)
    lost = sorted(state.keys() - set(weights))
    if lost:
        raise UserError(
            f"{folder_or_repo}: the adapter's file lacks {listed_keys(lost)}, which would keep random values: save or "
            "download it again."
        )
