"""Everything that depends on TRL's internals or on installed versions.

TRL may change its private names in any release. Each private name that this library uses is therefore listed in
`_TRL_NAMES` and has a contract test in `tests/test_compat.py`, which fails when TRL changes it. Names are imported on
first use: importing this module imports neither torch nor TRL.
"""

import os
import platform
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

TRL_SUPPORTED = SpecifierSet(">=1.16,<1.17")
ANY_TRL = "HF_RLHF_EXT_ANY_TRL"
"""Environment variable with which `make test-newest` asks what moved in a TRL that is not supported yet."""

# tqdm warns at its import in a notebook without ipywidgets, and then draws its bars as text: nothing is missing.
warnings.filterwarnings("ignore", "IProgress not found")

RENAMED_OPTIONS = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Options of `TrainingArguments` with a new name since Transformers 5.23: old name -> new name. Both are taken here."""

OLD_NAME_WARNINGS = (
    (r"`is_gradient_checkpointing` is deprecated", FutureWarning),
    (r"`past_key_values` is deprecated", FutureWarning),
)
"""What Transformers says about old names: the beginning, a regular expression, and the category."""

# PEFT reads `is_gradient_checkpointing` from every model, and passes the cache under its old name: whoever trains could
# do nothing about it. `gradient_checkpointing` in a config of TRL is not here: it is for its user to rename.
for _beginning, _category in OLD_NAME_WARNINGS:
    warnings.filterwarnings("ignore", _beginning, _category)

_REPORTED = (
    "hf-rlhf-ext",
    "trl",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "huggingface-hub",
    "evaluate",
    "torch",
    "bitsandbytes",
)

# Our name -> (module, name in that module), as of trl 1.16.0. Public names are imported from `trl` directly.
_TRL_NAMES: dict[str, tuple[str, str]] = {
    "add_fused_lm_head": ("trl.trainer.utils", "add_fused_lm_head"),
    "BaseTrainer": ("trl.trainer.base_trainer", "_BaseTrainer"),
    "BaseConfig": ("trl.trainer.base_config", "_BaseConfig"),
    "chunked_logprob": ("trl.kernels", "chunked_logprob"),
    "disable_dropout_in_model": ("trl.trainer.utils", "disable_dropout_in_model"),
    "print_prompt_completions_sample": ("trl.trainer.utils", "print_prompt_completions_sample"),
    "get_callable_name": ("trl.trainer.utils", "get_callable_name"),
    "selective_log_softmax_and_entropy": ("trl.trainer.utils", "selective_log_softmax_and_entropy"),
    "suppress_seqcls_warning": ("trl.trainer.reward_trainer", "suppress_seqcls_warning"),
    "trainer_utils": ("trl.trainer", "utils"),
    "use_adapter": ("trl.trainer.utils", "use_adapter"),
}

# Methods of TRL's and Transformers' trainers that ours override; tests/test_compat.py checks their signatures.
OVERRIDDEN_METHODS: dict[str, tuple[str, ...]] = {
    "PPOTrainer": (
        "_clip_grad_norm",
        "_determine_best_metric",
        "_finish_current_push",
        "_load_best_model",
        "_load_from_checkpoint",
        "_maybe_log_save_evaluate",
        "_prepare_inputs",
        "_push_from_checkpoint",
        "_save",
        "_save_checkpoint",
        "_save_rng_state",
        "compute_loss",
        "create_model_card",
        "create_optimizer",
        "evaluate",
        "floating_point_ops",
        "get_train_dataloader",
        "init_hf_repo",
        "log",
        "predict",
        "push_to_hub",
        "save_model",
        "train",
        "training_step",
    ),
    "BradleyTerryTrainer": (
        "_determine_best_metric",
        "_finish_current_push",
        "_load_best_model",
        "_load_from_checkpoint",
        "_maybe_log_save_evaluate",
        "_get_dataloader",
        "_get_eval_sampler",
        "_get_train_sampler",
        "_prepare_dataset",
        "_push_from_checkpoint",
        "_run_epoch",
        "_save",
        "_save_checkpoint",
        "_save_rng_state",
        "_set_signature_columns_if_needed",
        "compute_loss",
        "create_model_card",
        "create_optimizer",
        "evaluate",
        "floating_point_ops",
        "get_batch_samples",
        "init_hf_repo",
        "log",
        "predict",
        "prediction_step",
        "push_to_hub",
        "save_model",
        "train",
        "training_step",
    ),
    "PublishingSFTTrainer": (
        "_finish_current_push",
        "_push_from_checkpoint",
        "_run_epoch",
        "_save",
        "_save_checkpoint",
        "create_model_card",
        "init_hf_repo",
        "push_to_hub",
        "save_model",
    ),
}


def versions() -> dict[str, str]:
    """Returns the versions of Python, of this library and of its dependencies. Packages not installed are left out."""
    installed = {"python": platform.python_version()}
    for name in _REPORTED:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def require_supported_trl() -> None:
    """Checks that the installed TRL is a version that this library was tested with.

    Raises:
        ImportError: if TRL is missing or its version is not supported; one line with the command that installs it.
    """
    try:
        trl_version = version("trl")
    except PackageNotFoundError:
        raise ImportError(
            f"hf_rlhf_ext needs trl{TRL_SUPPORTED}, found none: pip install 'trl{TRL_SUPPORTED}'"
        ) from None
    if not TRL_SUPPORTED.contains(trl_version, prereleases=True) and not os.environ.get(ANY_TRL):
        raise ImportError(
            f"hf_rlhf_ext needs trl{TRL_SUPPORTED}, found {trl_version}: pip install 'trl{TRL_SUPPORTED}'"
        )


def resolve_renamed_options(args: Any) -> None:
    """Sets each option of `RENAMED_OPTIONS` from its old name, unless it is set; without a warning.

    Call it before `TrainingArguments.__post_init__`, which does the same with a warning, also for TRL's default, and
    then gives both names the same value.

    Args:
        args: a config whose class derives from `TrainingArguments`; changed in place.
    """
    for old, new in RENAMED_OPTIONS.items():
        if getattr(args, new) is None:
            setattr(args, new, getattr(args, old))


def accelerate_configs() -> dict[str, Path]:
    """Returns the configurations for `accelerate launch` that TRL ships, by name (`multi_gpu`, …)."""
    folder = Path(find_spec("trl").origin).parent / "accelerate_configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def __getattr__(name: str) -> Any:
    if name not in _TRL_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_supported_trl()
    module, attribute = _TRL_NAMES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value
