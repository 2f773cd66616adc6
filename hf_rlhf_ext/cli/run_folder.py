"""Finds the models in the folder of a whole run: of `hf-rlhf pipeline`, `quickstart` or `rounds`."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..modeling.loading import base_and_revision
from ..modeling.locations import LOCAL_PREFIXES
from ..reward.ensemble import ENSEMBLE_FILE
from .stages import has_manifest

STAGES = ("sft", "reward_model", "policy")
"""Folders of the stages that train a model, in their order."""
PIPELINE_FILE = "pipeline.yaml"
"""The options of `hf-rlhf pipeline`, as they were run."""
ROWS_READ = 1000
"""Rows of a run that are read to find its system text."""
_ROUND = re.compile(r"round-(\d+)")


@dataclass
class RunFolder:
    """The models of a run, each as a folder, a Hub id or the name of the embedded model.

    Attributes:
        folder: the folder of the run.
        base: the base model; `None` if it is not known.
        base_revision: branch, tag or commit of the base on the Hub.
        sft: the policy before PPO.
        policy: the policy after PPO, of the last round if there are several.
        reward_model: the reward model, or the ensemble.
        system: the system text that the run put before its prompts.
        left_out: why a model of the run is not there, or a part of its reward is not used, by its name.
        n_reward_models: number of reward models in the reward of PPO.
        reward_funcs: names of the functions in the reward of PPO. The folder may come from someone else: they are code
            that only the user may name.
        reward_sources: the file of each function, with a digest, as the manifest has it.
        reward_weights: weights of the reward models and then of the functions, as the run has them, unchecked.
        completion_length: largest number of tokens of a completion in PPO; `None` if it is not known.
    """

    folder: Path
    base: str | None = None
    base_revision: str | None = None
    sft: str | None = None
    policy: str | None = None
    reward_model: str | None = None
    system: str | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    n_reward_models: int = 0
    reward_funcs: list[str] = field(default_factory=list)
    reward_sources: dict[str, str] = field(default_factory=dict)
    reward_weights: Any = None
    completion_length: int | None = None

    def require_policy(self) -> None:
        """Raises `UserError` if no stage of the run has finished a model that answers."""
        if self.sft is not None or self.policy is not None:
            return
        stages = f": {'; '.join(self.left_out.values())}" if self.left_out else ""
        raise UserError(f"{self.folder}: this run has no policy yet{stages}: run its command again, which goes on.")


def has_model(folder: str | Path) -> bool:
    """Whether a folder has a complete model: an adapter, a whole model or an ensemble, with its weights."""
    folder = Path(folder)
    if (folder / ENSEMBLE_FILE).is_file():
        return True
    if (folder / "adapter_config.json").is_file():
        return any(folder.glob("adapter_model.*"))
    return (folder / "config.json").is_file() and any(folder.glob("*model*.safetensors*"))


def is_run_folder(folder: str | Path) -> bool:
    """Whether a folder is that of a whole run, and not of a single model."""
    folder = Path(folder).expanduser()
    if not folder.is_dir() or has_model(folder):
        return False
    return has_manifest(folder) or bool(_rounds(folder)) or any((folder / name).is_dir() for name in STAGES)


def find_models(folder: str | Path) -> RunFolder:
    """Finds the models in the folder of a run.

    Args:
        folder: a folder for which `is_run_folder` is true.
    """
    folder = Path(folder).expanduser()
    run = RunFolder(folder)
    for name, place in _places(folder).items():
        if has_model(place):
            setattr(run, name, str(place))
        elif place.is_dir():
            run.left_out[name] = f"{place} has no complete model yet"
    _add_given_models(run)
    _add_base(run)
    _add_reward(run)
    run.completion_length = None if run.policy is None else completion_length(run.policy)
    run.system = _system_text(run)
    return run


def _places(folder: Path) -> dict[str, Path]:
    """Where the stages of a run write: in the folder itself, or in that of the last round that has a policy."""
    places = {name: folder / name for name in STAGES}
    for number in sorted(_rounds(folder), reverse=True):
        in_round = folder / f"round-{number}"
        if has_model(in_round / "policy"):
            places |= {name: in_round / name for name in ("policy", "reward_model")}
            break
    return places


def _rounds(folder: Path) -> list[int]:
    numbers = []
    for path in folder.glob("round-*"):
        named = _ROUND.fullmatch(path.name)
        if named and path.is_dir():
            numbers.append(int(named[1]))
    return numbers


def _add_given_models(run: RunFolder) -> None:
    """Adds models that the run did not train, but was given: by the YAML of a pipeline, or by the options of rounds."""
    options = _mapping(run.folder / PIPELINE_FILE)
    settings = _settings(run.folder)
    if _rounds(run.folder):
        options = {"sft_policy": settings.get("model")} | options
    reward_models = _names(options.get("reward_model"))
    for name, given, recorded in (
        ("sft", _names(options.get("sft_policy")), _names(settings.get("sft_policy"))),
        ("reward_model", reward_models, _names(settings.get("reward_model"))),
    ):
        if getattr(run, name) is not None or not given:
            continue
        if _is_lost(given[0], recorded[0] if recorded else ""):
            run.left_out[name] = f"{given[0]} is not there, seen from this folder"
        else:
            setattr(run, name, given[0])
    for other in reward_models[1:]:
        run.left_out[f"reward model {other}"] = "answers are scored by the first one"


def _add_reward(run: RunFolder) -> None:
    """Adds what the reward of PPO was, as a pipeline records it."""
    options = _mapping(run.folder / PIPELINE_FILE)
    run.n_reward_models = len(_names(options.get("reward_model"))) or int(run.reward_model is not None)
    run.reward_funcs = _names(options.get("reward_funcs"))
    run.reward_weights = options.get("reward_weights")
    sources = _settings(run.folder).get("ppo.reward_funcs")
    run.reward_sources = sources if isinstance(sources, dict) else {}


def _names(given: Any) -> list[str]:
    """Names in a config or manifest, which may be one name, a list, or nothing."""
    names = given if isinstance(given, list) else [given]
    return [name for name in names if isinstance(name, str)]


def _is_lost(given: str, recorded: str) -> bool:
    """Whether a model was a local folder that is not there, and so must not be taken for a Hub id.

    Args:
        given: the model, as the run was given it. "<path>/sft" stands for a path of another machine.
        recorded: what the manifest says of it, see `lineage_of`; may be empty.
    """
    was_local = given.startswith((*LOCAL_PREFIXES, "<")) or recorded.startswith("local ")
    return was_local and not Path(given).expanduser().exists()


def _add_base(run: RunFolder) -> None:
    """Adds the base of the adapters, or what the run names if it trained a whole model."""
    for model in (run.sft, run.policy):
        if model is None:
            continue
        base, revision = base_and_revision(model)
        if base is not None and base not in (run.sft, str(Path(run.sft or "").absolute())):
            run.base, run.base_revision = base, revision
            return
    options = _mapping(run.folder / PIPELINE_FILE)
    if options.get("sft_policy"):  # a whole model, which is the base itself: model_name_or_path has no part in the run
        return
    name, revision = options.get("model_name_or_path"), options.get("model_revision")
    if name is None:
        name = _settings(run.folder).get("model")
    if isinstance(name, str) and name != run.sft and not _is_lost(name, ""):
        run.base = name
        run.base_revision = None if revision == "main" else revision


def completion_length(model: str | Path) -> int | None:
    """Largest number of tokens that a policy had for a completion in PPO; `None` if its folder does not say it."""
    length = _mapping(Path(model).expanduser() / "training_config.yaml").get("max_completion_length")
    return length if isinstance(length, int) else None


def _settings(folder: Path) -> Mapping[str, Any]:
    """The settings in the manifest of a run."""
    return _mapping(folder / "manifest.json").get("settings") or {}


def _system_text(run: RunFolder) -> str | None:
    """The system text of the run: that of a card, or the one that all of its prompts begin with."""
    for model in (run.policy, run.sft):
        text = None if model is None else system_of_card(model)
        if text is not None:
            return text
    return system_of_data(run.folder)


def system_of_data(folder: Path) -> str | None:
    """The system text that all prompts of a pipeline begin with; `None` if they have none or several."""
    for role in ("prompts", "demonstrations", "comparisons"):
        path = folder / "data" / role / "train.jsonl"
        if path.is_file():
            return _system_of_rows(path)
    return None


def system_of_card(model: str | Path) -> str | None:
    """The system text that the card of a model names; `None` for none, and for models on the Hub."""
    folder = Path(model).expanduser()
    card = _mapping(folder / "report.json").get("card")
    text = card.get("system_prompt") if isinstance(card, dict) else None
    return text if isinstance(text, str) else None


def _system_of_rows(path: Path) -> str | None:
    """The system text with which the prompt of every row of a file begins; `None` if they have none or several."""
    texts: set[str | None] = set()
    with path.open(encoding="utf-8") as lines:
        for line in islice(lines, ROWS_READ):
            try:
                first = json.loads(line)["prompt"][0]
            except (ValueError, TypeError, LookupError):
                return None
            has_system = isinstance(first, dict) and first.get("role") == "system"
            texts.add(first.get("content") if has_system else None)
            if len(texts) > 1:
                return None
    return next(iter(texts), None)


def _mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; empty if there is none, or if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
