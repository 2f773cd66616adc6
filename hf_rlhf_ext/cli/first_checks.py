"""Mistakes that the options and the files of a recipe show, before anything is loaded."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..errors import UserError, first_line
from ..modeling.locations import LOCAL_PREFIXES
from ..reward.ensemble import ENSEMBLE_FILE


def check_training(args: TrainingArguments) -> None:
    """Refuses options of a trainer with which a run would train nothing, or would not do what they say.

    Raises:
        UserError: the learning rate is 0, or the best model is asked for without evaluations.
    """
    if args.learning_rate == 0:
        raise UserError("learning_rate must be positive, got 0: nothing would be trained.")
    if args.load_best_model_at_end and args.eval_strategy == "no":
        raise UserError("load_best_model_at_end needs evaluations: pass --eval_strategy steps and --eval_steps.")


def check_ppo(args: TrainingArguments, *, value_model: str | None, ptx_dataset: str | None, patience: Any) -> None:
    """Refuses options of PPO that belong together, where one of them is missing.

    Raises:
        UserError: for the first of them.
    """
    if args.critic == "model" and value_model is None:
        raise UserError("critic: 'model' needs the model that it starts from: pass --value_model, or another critic.")
    if args.critic == "none" and value_model is not None:
        raise UserError("value_model: critic 'none' has no values: leave it out, or pass --critic model.")
    if args.ptx_coef > 0 and ptx_dataset is None:
        raise UserError("ptx_coef: PPO-ptx needs texts: pass --ptx_dataset, or leave ptx_coef out.")
    if patience is not None and args.eval_strategy == "no":
        raise UserError("early_stopping_patience needs evaluations: pass --eval_strategy steps and --eval_steps.")


def check_policy_folder(name: str, option: str = "model_name_or_path") -> None:
    """Refuses a local folder that holds a classifier or a reward model where a policy or its base is needed.

    Raises:
        UserError: it does.
    """
    kind = _kind_of(name, option)
    if kind in ("classifier", "reward adapter", "ensemble"):
        raise UserError(
            f"{option}: {name} is a reward model or classifier ({kind}), not a policy: give a language model, or the "
            "adapter of a policy."
        )


def check_reward_folder(name: str, option: str = "reward_model") -> None:
    """Refuses a local folder that holds no reward model.

    Raises:
        UserError: it does not exist, is a file, or holds a language model or the adapter of a policy.
    """
    if name.endswith(".py") or ".py:" in name:
        raise UserError(f"{option}: {name} is a file of Python: pass its function with --reward_funcs {name}.")
    what = option.replace("_", " ")  # as the library calls it, which knows no options
    kind = _kind_of(name, what)
    if kind == "policy adapter":
        raise UserError(f"{what}: {name} is a policy adapter, without a score head: give a reward model's.")
    if kind == "language model":
        raise UserError(
            f"{what}: {name} is a language model, without a score head: give a reward model, as "
            "`hf-rlhf reward` saves it."
        )


def check_model_folder(name: str, option: str = "model_name_or_path") -> None:
    """Refuses a local name that is no folder of a model.

    Raises:
        UserError: it is not.
    """
    _kind_of(name, option)


def _kind_of(name: str, option: str) -> str | None:
    """What a local folder of a model holds; None for a name on the Hub, and for what the files do not show.

    Raises:
        UserError: there is no such folder, or it holds no model.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        if name.startswith(LOCAL_PREFIXES):
            raise UserError(f"{option}: no folder at {name}: check the path, or give a Hub id.")
        return None
    if not folder.is_dir():
        if folder.suffix == ".gguf":
            return None
        raise UserError(f"{option}: {name} is a file: give the folder of a model, or a Hub id.")
    if (folder / ENSEMBLE_FILE).is_file():
        return "ensemble"
    adapter = _read_json(folder / "adapter_config.json")
    if adapter is not None:
        return {"SEQ_CLS": "reward adapter", "CAUSAL_LM": "policy adapter"}.get(str(adapter.get("task_type")))
    config = _read_json(folder / "config.json")
    if config is None:
        runs = sorted(part.parent.name for part in folder.glob("*/adapter_config.json"))
        inside = f", but {', '.join(runs)}" if runs else ""
        raise UserError(
            f"{option}: {name} holds no model (neither config.json nor adapter_config.json){inside}: give the folder "
            "of a model, or a Hub id."
        )
    architecture = (config.get("architectures") or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        return "classifier"
    return "language model" if architecture.endswith("ForCausalLM") else None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: it is no JSON ({first_line(error)}): copy the model again.") from error
