"""Ensembles: several reward models combined into one reward function."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from peft import PeftConfig, PeftModel

from ..data.prompt_form import PromptForm
from ..errors import UserError
from ..modeling.adapter_files import adapter_weight_names, refuse_lost_modules, refuse_lost_weights
from ..modeling.embeddings import embedding_mismatch
from ..modeling.loading import adapter_base, load_tokenizer
from ..modeling.source import public_name
from .scorer import RewardNormalization, RewardScorer, local_folder
from .sharing import base_mismatch

logger = logging.getLogger(__name__)

ENSEMBLE_FILE = "ensemble.json"
COMBINATIONS = ("mean", "min", "conservative")


def combine_rewards(rewards: np.ndarray, how: str, penalty: float = 1.0) -> np.ndarray:
    """Combines the rewards of several members, so that a policy gains less from the mistakes of one of them.

    See Coste et al. 2024, arXiv:2310.02743, eq. 2 to 4. Their eq. 4 subtracts the variance instead of the standard
    deviation.

    Args:
        rewards: (M, N) rewards of M members for N completions.
        how: `"mean"`, `"min"`, or `"conservative"`, which is the mean minus `penalty` times the standard deviation
            (population) over members.
        penalty: λ of `"conservative"`.

    Returns:
        (N,) combined rewards.
    """
    if how == "min":
        return rewards.min(0)
    if how == "conservative":
        return rewards.mean(0) - penalty * rewards.std(0)
    return rewards.mean(0)


@dataclass
class EnsembleRecord:
    """The content of `ensemble.json`.

    Attributes:
        members: names of the subfolders of the members.
        combine: how their rewards are combined, see `combine_rewards`.
        penalty: λ of `"conservative"`.
    """

    members: list[str]
    combine: str = "mean"
    penalty: float = 1.0

    def save(self, folder: str | Path) -> None:
        """Writes `ensemble.json` into `folder`."""
        (Path(folder) / ENSEMBLE_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads `ensemble.json` in `folder`."""
        content = json.loads((Path(folder) / ENSEMBLE_FILE).read_text())
        record = cls(members=content["members"])
        record.combine = content.get("combine", record.combine)
        record.penalty = content.get("penalty", record.penalty)
        return record


class RewardEnsemble:
    """A reward function that combines several reward models. It is called like a `RewardScorer`.

    Members that are adapters of the same base share that base, which is loaded once. If the trainer passes
    `log_metric`, as TRL's trainers do, each call logs the mean of `disagreement` as `reward_disagreement`.

    Args:
        members: two or more scorers. Their normalization puts their rewards on one scale.
        combine: `"mean"`, `"min"`, or `"conservative"`, which is the mean minus `penalty` times the standard deviation.
        penalty: λ of `"conservative"`, not negative.

    Raises:
        UserError: for fewer than two members, an unknown `combine` or a negative `penalty`.
    """

    __name__ = "reward_ensemble"

    def __init__(self, members: list[RewardScorer], *, combine: str = "mean", penalty: float = 1.0):
        if len(members) < 2:
            raise UserError(f"members: an ensemble needs two or more members, got {len(members)}.")
        if combine not in COMBINATIONS or penalty < 0:
            raise UserError(
                f"combine={combine!r}, penalty={penalty}: choose combine from {', '.join(COMBINATIONS)}, and a penalty "
                "of 0 or more."
            )
        self.members = members
        self.combine = combine
        self.penalty = penalty
        self.loaded_from: str | None = None
        """Hub id, or name of the local folder, of a saved ensemble that was loaded; `None` for others."""
        for member in members[1:]:  # what is said of one member's form is not repeated for the others
            member.asked.said = members[0].asked.said

    @property
    def form(self) -> str | None:
        """What the members were trained on, see `RewardScorer.form`; `None` if they differ."""
        forms = {member.form for member in self.members}
        return forms.pop() if len(forms) == 1 else None

    @classmethod
    def from_pretrained(
        cls,
        folders: str | Path | list[str | Path],
        *,
        combine: str | None = None,
        penalty: float | None = None,
        **options: Any,
    ) -> Self:
        """Loads an ensemble.

        Args:
            folders: a list of folders or Hub ids of reward models, or one folder or Hub id of a saved ensemble, such as
                `hf-rlhf reward --members` writes.
            combine: see the class; `None` means what was saved, or `"mean"`.
            penalty: see the class; `None` means what was saved, or 1.
            options: options of `RewardScorer.from_pretrained`.

        Returns:
            The ensemble.

        Raises:
            UserError: if a folder does not exist, is not a reward model, or has lost its weights.
        """
        revision = options.pop("revision", None)
        code = options.get("trust_remote_code", False)
        if isinstance(folders, list):
            record = EnsembleRecord(members=[])
            member_folders = [local_folder(folder, revision, code=code) for folder in folders]
        else:
            root = local_folder(folders, revision, code=code)
            if not (root / ENSEMBLE_FILE).is_file():
                raise UserError(f"{folders}: has no {ENSEMBLE_FILE}: give the folders of the members as a list.")
            record = EnsembleRecord.load(root)
            member_folders = [local_folder(root / name, None, code=code) for name in record.members]
        if combine is None:
            combine = record.combine
        if penalty is None:
            penalty = record.penalty
        ensemble = cls(_load_members(member_folders, options), combine=combine, penalty=penalty)
        if not isinstance(folders, list):
            ensemble.loaded_from = public_name(folders)
        return ensemble

    @staticmethod
    def save(folder: str | Path, members: list[str], *, combine: str = "mean", penalty: float = 1.0) -> None:
        """Writes `ensemble.json`, which makes a folder with reward models an ensemble.

        Args:
            folder: folder of the ensemble.
            members: names of the subfolders with the members.
            combine: see the class.
            penalty: see the class.
        """
        EnsembleRecord(members, combine, penalty).save(folder)

    def __call__(
        self, prompts: list, completions: list, log_metric: Callable[[str, float], None] | None = None, **columns: Any
    ) -> list[float]:
        """Combined rewards of completions.

        Args:
            prompts: N prompts, as text or as messages; or one, with one completion.
            completions: N completions, as text or as messages.
            log_metric: function of a trainer that logs a metric; `None` logs nothing.
            columns: `tools`, `chat_template_kwargs` and `per_prompt`, as for `RewardScorer`; others are not used.

        Returns:
            N rewards.
        """
        rewards = self.rewards(prompts, completions, **columns)
        if log_metric is not None and rewards.size:  # an empty batch has no mean
            log_metric("reward_disagreement", float(rewards.std(0).mean()))
        return combine_rewards(rewards, self.combine, self.penalty).tolist()

    def rewards(self, prompts: list, completions: list, **columns: Any) -> np.ndarray:
        """Normalized rewards (M, N), one row per member, of N completions given their prompts."""
        return np.array([member(prompts, completions, **columns) for member in self.members])

    def raw(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        """Mean of the members' raw scores, N numbers in log-odds."""
        return np.mean([member.raw(prompts, completions, **columns) for member in self.members], 0).tolist()

    def disagreement(self, prompts: list, completions: list, **columns: Any) -> np.ndarray:
        """Standard deviation (N,) (population) over the members' normalized rewards."""
        return self.rewards(prompts, completions, **columns).std(0)


def load_reward(folder_or_repo: str | Path, **options: Any) -> RewardScorer | RewardEnsemble:
    """Loads a reward model or an ensemble, depending on what the folder contains.

    Args:
        folder_or_repo: local folder or Hub id.
        options: options of `RewardScorer.from_pretrained`.

    Raises:
        UserError: if the folder does not exist or is not a reward model.
    """
    code = options.get("trust_remote_code", False)
    folder = local_folder(folder_or_repo, options.pop("revision", None), code=code)
    if (folder / ENSEMBLE_FILE).is_file():
        ensemble = RewardEnsemble.from_pretrained(folder, **options)
        ensemble.loaded_from = public_name(folder_or_repo)  # of the Hub, the folder is one of the cache
        return ensemble
    scorer = RewardScorer.from_pretrained(folder, **options)
    scorer.set_source(folder_or_repo)
    return scorer


def _load_members(folders: list[Path], options: dict[str, Any]) -> list[RewardScorer]:
    """Loads a scorer for each folder, on the base of the first one if scores are then the same as in training."""
    if not folders:
        return []
    for folder in folders:
        if adapter_base(str(folder)) is not None:
            adapter_weight_names(folder)  # a file that is lost or damaged is said before the base is loaded
    first = RewardScorer.from_pretrained(folders[0], **options)
    members = [first]
    for number, folder in enumerate(folders[1:], start=1):
        if _shares_base(folder, first, folders[0]):
            members.append(_attach_member(folder, f"member-{number}", first, options))
            # PEFT may change the active adapter at a load, so from now on each scorer names its adapter.
            first.adapter = "default"
        else:
            members.append(RewardScorer.from_pretrained(folder, **options))
    return members


def _shares_base(folder: Path, first: RewardScorer, first_folder: Path) -> bool:
    """Whether the member in `folder` can use the base of the first. Logs a warning if base or precision differ."""
    if adapter_base(str(folder)) is None or not isinstance(first.model, PeftModel):
        return False  # a whole model has no base to share
    if RewardNormalization.load(folder) is None:
        return False  # its precision is unknown; loading it logs a warning
    mismatch = base_mismatch(folder, first_folder)
    if mismatch is None:
        mismatch = embedding_mismatch(folder, first.model)
    if mismatch is None:
        return True
    logger.warning("%s was trained on %s (%s): it is loaded on a separate base.", folder, mismatch, first_folder)
    return False


def _attach_member(folder: Path, adapter: str, first: RewardScorer, options: dict[str, Any]) -> RewardScorer:
    """Loads the member in `folder` as another adapter on the base of the first one."""
    recorded = RewardNormalization.load(folder)
    weights = adapter_weight_names(folder)
    refuse_lost_modules(folder, PeftConfig.from_pretrained(str(folder)), weights, first.model)
    # This also loads the head, as PEFT holds one copy of it per adapter.
    first.model.load_adapter(str(folder), adapter_name=adapter)
    refuse_lost_weights(folder, first.model, adapter, weights)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=options.get("trust_remote_code", False))
    scorer = RewardScorer(
        first.model,
        tokenizer,
        mean=recorded.mean,
        std=recorded.std,
        batch_size=first.batch_size,
        autocast=first.autocast,
        adapter=adapter,
        trained_on=PromptForm.load(folder),
    )
    scorer.set_source(folder)
    return scorer
