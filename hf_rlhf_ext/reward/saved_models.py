"""Reward models as `BradleyTerryTrainer` saved them: their folders, and their weights with an fp32 head."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, TaskType
from safetensors import safe_open
from transformers import PreTrainedModel

from ..data.prompt_form import PromptForm, remember_form
from ..errors import UserError
from ..modeling.adapter_files import adapter_weight_names, base_weight_names, refuse_lost_modules
from ..modeling.checkpoint_files import is_head
from ..modeling.heads import head_name, install_fp32_score
from ..modeling.loading import attach_adapter, base_and_revision, found_or_refused, load_base_model
from ..modeling.quantization import keep_nf4_gradients_right
from .normalization import RewardNormalization

_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""The files that are downloaded for a reward model on the Hub. Pickle files are not among them."""


def local_folder(folder_or_repo: str | Path, revision: str | None, *, code: bool = False) -> Path:
    """Returns a local folder, or downloads a reward model from the Hub.

    Args:
        folder_or_repo: local folder or Hub id.
        revision: branch, tag or commit on the Hub; `None` means the default branch.
        code: whether to download Python files too.

    Returns:
        The local folder.

    Raises:
        UserError: if the folder does not exist, or if the download fails.
    """
    local = Path(folder_or_repo).expanduser()
    if local.is_dir():
        return local
    if isinstance(folder_or_repo, Path) or local.is_absolute() or str(folder_or_repo).startswith("."):
        raise UserError(f"reward model: no folder at {folder_or_repo}: check the path, or give a Hub id.")
    patterns = list(_MODEL_FILES)
    if code:
        patterns.append("*.py")
    with found_or_refused("reward model", str(folder_or_repo)):
        path = snapshot_download(
            str(folder_or_repo), revision=revision, allow_patterns=patterns, ignore_patterns=["checkpoint-*/*"]
        )
    return Path(path)


def quantization_options(recorded: RewardNormalization, load_in_4bit: bool | None) -> dict[str, Any]:
    """The options of `load_base_model` that quantize the base as in training, unless `load_in_4bit` says otherwise.

    Args:
        recorded: what was saved with the reward model.
        load_in_4bit: whether to load the base in 4 bits; `None` means as in training.
    """
    if load_in_4bit is None:
        as_trained = True
    else:
        as_trained = load_in_4bit and recorded.load_in_4bit
    if as_trained and recorded.quantization is not None:
        return {"quantization_config": recorded.quantization}
    if load_in_4bit is None:
        load_in_4bit = recorded.load_in_4bit
    return {"load_in_4bit": load_in_4bit}


def is_adapter(folder_or_repo: str, revision: str | None = None) -> bool:
    """Whether a local folder or a repository on the Hub holds an adapter."""
    if (Path(folder_or_repo).expanduser() / "adapter_config.json").is_file():  # it may name no base
        return True
    return base_and_revision(folder_or_repo, revision)[0] is not None


def load_trainable_adapter(folder_or_repo: str, *, revision: str | None = None, **options: Any) -> PeftModel:
    """Loads a reward adapter to train it further, on its base as it was trained.

    Args:
        folder_or_repo: local folder or Hub id of the adapter.
        revision: branch, tag or commit of the adapter.
        options: options of `load_base_model`. Without a dtype or a quantization, those of training are used.

    Raises:
        UserError: if it is the adapter of a policy, if it names no base, or if weights are missing.
    """
    folder = local_folder(folder_or_repo, revision, code=options.get("trust_remote_code", False))
    if PeftConfig.from_pretrained(str(folder)).task_type == TaskType.CAUSAL_LM:
        raise UserError(
            f"model: {folder_or_repo} is the adapter of a policy, without a score head: give its base and peft_config, "
            "or merge it first (hf-rlhf merge)."
        )
    recorded = RewardNormalization.load(folder) or RewardNormalization()
    options = {"dtype": recorded.base_dtype} | options
    if "load_in_4bit" not in options and options.get("quantization_config") is None:
        options |= quantization_options(recorded, None)
    model = load_reward_model(folder, None, options, is_trainable=True)
    remember_form(model, PromptForm.load(folder))
    return model


def load_reward_model(
    folder: Path, base: str | PreTrainedModel | None, options: dict, *, is_trainable: bool = False
) -> PreTrainedModel | PeftModel:
    """Loads the model in a folder, with its head in fp32.

    Args:
        folder: local folder of the reward model.
        base: base of an adapter, loaded or as a name; `None` means the one that the adapter names.
        options: options of `load_base_model`.
        is_trainable: whether an adapter is loaded to be trained.

    Raises:
        UserError: if the folder is not that of a reward model, if weights are missing, or if no base is named.
    """
    base_id, base_revision = base_and_revision(str(folder))
    if not (folder / "adapter_config.json").is_file():
        model = load_base_model(str(folder), task="reward", may_lack=(), **options)
        _restore_fp32_head(model, folder)
        return model

    weights = adapter_weight_names(folder)
    _refuse_policy_adapter(folder, weights)
    if base is None:
        base = base_id
        options = options | {"revision": base_revision}
    if not base:
        raise UserError(f"{folder.name}: the adapter names no base model: pass base= with a model or its id.")
    if isinstance(base, str | Path):
        base = load_base_model(base, task="reward", may_lack=base_weight_names(weights), **options)
    else:
        keep_nf4_gradients_right(base)  # a user's own: repacked weights would round otherwise than in training
    install_fp32_score(base)  # before PEFT, which would copy the head in the dtype of the base
    return attach_adapter(base, folder, is_trainable=is_trainable)


def load_reward_weights(folder: Path, **options: Any) -> PreTrainedModel | PeftModel:
    """Loads the model in the folder of a reward model, with all checks but without tokenizer and normalization.

    Args:
        folder: local folder of the reward model.
        options: options of `load_base_model`, such as `dtype`.
    """
    return load_reward_model(folder, None, options)


def _refuse_policy_adapter(folder: Path, weights: set[str]) -> None:
    """Raises `UserError` if an adapter has no score head, before its base is loaded."""
    config = PeftConfig.from_pretrained(str(folder))
    if config.task_type == TaskType.CAUSAL_LM:
        raise UserError(f"reward model: {folder} is a policy adapter, without a score head: give a reward model's.")
    refuse_lost_modules(folder, config, weights)
    if not any(is_head(name) for name in weights):
        raise UserError(
            f"reward model: {folder} has no score head in its adapter, so it is a policy adapter, or its head was not "
            "saved: give a reward model as BradleyTerryTrainer saves it."
        )


def _restore_fp32_head(model: PreTrainedModel, folder: Path) -> None:
    """Reads the head again in fp32, as loading a whole model in bf16 has rounded it."""
    head = head_name(model)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():
                if name in (f"{head}.weight", f"{head}.bias"):
                    model.get_parameter(name).data.copy_(weights.get_tensor(name))
