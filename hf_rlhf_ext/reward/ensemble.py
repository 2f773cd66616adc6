"""Several reward models as one: what they agree on is worth more than what one of them says."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from peft import PeftModel

from ..errors import UserError
from ..modeling.loading import adapter_base, load_tokenizer
from .scorer import RewardNormalization, RewardScorer, local_folder
from .sharing import base_mismatch

logger = logging.getLogger(__name__)

ENSEMBLE_FILE = "ensemble.json"
COMBINATIONS = ("mean", "min", "conservative")


def combine_rewards(rewards: np.ndarray, how: str, penalty: float = 1.0) -> np.ndarray:
    """(M, N) rewards of M members as one, (N,): their mean, their minimum, or mean - λ std (population).

    Coste et al. 2024, arXiv:2310.02743, eq. 2 to 4 (whose third takes the variance): a policy gains less from the
    mistakes of one member. `conservative` with λ = `penalty`; λ = 0 is the mean.
    """
    if how == "min":
        return rewards.min(0)
    if how == "conservative":
        return rewards.mean(0) - penalty * rewards.std(0)
    return rewards.mean(0)


@dataclass
class EnsembleRecord:
    """`ensemble.json`: names of the subfolders of the members, and how their rewards are combined."""

    members: list[str]
    combine: str = "mean"
    penalty: float = 1.0

    def save(self, folder: str | Path) -> None:
        (Path(folder) / ENSEMBLE_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        content = json.loads((Path(folder) / ENSEMBLE_FILE).read_text())
        record = cls(members=content["members"])
        record.combine = content.get("combine", record.combine)
        record.penalty = content.get("penalty", record.penalty)
        return record


class RewardEnsemble:
    """Callable as `RewardScorer`, over several of them: adapters of one base (that is loaded once), or whole models.

    Args:
        members: scorers, each with its own normalization, which puts them on one scale.
        combine: `"mean"`, `"min"`, or `"conservative"` (mean - `penalty` · std).
        penalty: λ of the latter, in units of reward.

    `disagreement` is the standard deviation over members; a trainer that passes `log_metric`, as TRL's do, gets its
    mean at every call as `reward_disagreement`.
    """

    __name__ = "reward_ensemble"

    def __init__(self, members: list[RewardScorer], *, combine: str = "mean", penalty: float = 1.0):
        if len(members) < 2:
            raise UserError(f"members: an ensemble has two or more, got {len(members)}.")
        if combine not in COMBINATIONS or penalty < 0:
            raise UserError(f"combine={combine!r}, penalty={penalty}: {', '.join(COMBINATIONS)}, with a penalty >= 0.")
        self.members = members
        self.combine = combine
        self.penalty = penalty

    @classmethod
    def from_pretrained(
        cls,
        folders: str | Path | list[str | Path],
        *,
        combine: str | None = None,
        penalty: float | None = None,
        **options: Any,
    ) -> Self:
        """Loads reward models by their folders or Hub ids, or the folder of an ensemble (`save`, `recipes/reward.py`).

        `options` are those of `RewardScorer.from_pretrained`; `combine` and `penalty` default to what was saved.
        """
        revision = options.pop("revision", None)
        code = options.get("trust_remote_code", False)
        if isinstance(folders, list):
            record = EnsembleRecord(members=[])
            member_folders = [local_folder(folder, revision, code=code) for folder in folders]
        else:
            root = local_folder(folders, revision, code=code)
            if not (root / ENSEMBLE_FILE).is_file():
                raise UserError(f"{folders}: no {ENSEMBLE_FILE}: give the folders of the members as a list.")
            record = EnsembleRecord.load(root)
            member_folders = [local_folder(root / name, None, code=code) for name in record.members]
        if combine is None:
            combine = record.combine
        if penalty is None:
            penalty = record.penalty
        return cls(_load_members(member_folders, options), combine=combine, penalty=penalty)

    @staticmethod
    def save(folder: str | Path, members: list[str], *, combine: str = "mean", penalty: float = 1.0) -> None:
        """Writes which subfolders of `folder` are the members, and how they are combined."""
        EnsembleRecord(members, combine, penalty).save(folder)

    def __call__(
        self, prompts: list, completions: list, log_metric: Callable[[str, float], None] | None = None, **columns: Any
    ) -> list[float]:
        """Combined rewards of completions given their prompts; further columns are ignored."""
        rewards = self.rewards(prompts, completions)
        if log_metric is not None and rewards.size:  # an empty batch has no mean
            log_metric("reward_disagreement", float(rewards.std(0).mean()))
        return combine_rewards(rewards, self.combine, self.penalty).tolist()

    def rewards(self, prompts: list, completions: list) -> np.ndarray:
        """(M, N) normalized rewards, one row per member."""
        return np.array([member(prompts, completions) for member in self.members])

    def raw(self, prompts: list, completions: list) -> list[float]:
        """Mean of the members' raw scores: log-odds of the averaged model."""
        return np.mean([member.raw(prompts, completions) for member in self.members], 0).tolist()

    def disagreement(self, prompts: list, completions: list) -> np.ndarray:
        """(N,) standard deviation (population) of the members' normalized rewards."""
        return self.rewards(prompts, completions).std(0)


def load_reward(folder_or_repo: str | Path, **options: Any) -> RewardScorer | RewardEnsemble:
    """What the folder or Hub repository holds: one reward model, or an ensemble of them."""
    code = options.get("trust_remote_code", False)
    folder = local_folder(folder_or_repo, options.pop("revision", None), code=code)
    if (folder / ENSEMBLE_FILE).is_file():
        return RewardEnsemble.from_pretrained(folder, **options)
    return RewardScorer.from_pretrained(folder, **options)


def _load_members(folders: list[Path], options: dict[str, Any]) -> list[RewardScorer]:
    """Scorers of all folders, on the base of the first wherever that gives their scores of training."""
    if not folders:
        return []
    first = RewardScorer.from_pretrained(folders[0], **options)
    members = [first]
    for number, folder in enumerate(folders[1:], start=1):
        if _shares_base(folder, first, folders[0]):
            members.append(_attach_member(folder, f"member-{number}", first, options))
            # Which adapter is active is PEFT's to change at a load: from now on each scorer names its own.
            first.adapter = "default"
        else:
            members.append(RewardScorer.from_pretrained(folder, **options))
    return members


def _shares_base(folder: Path, first: RewardScorer, first_folder: Path) -> bool:
    """Whether the member in `folder` goes onto the base of the first; logged where only base or precision differ."""
    if adapter_base(str(folder)) is None or not isinstance(first.model, PeftModel):
        return False  # a whole model has no base to share
    if RewardNormalization.load(folder) is None:
        return False  # without a record nobody knows its precision: the scorer's loading says so
    mismatch = base_mismatch(folder, first_folder)
    if mismatch is None:
        return True
    logger.warning("%s was trained on %s (%s): loaded on its own.", folder, mismatch, first_folder)
    return False


def _attach_member(folder: Path, adapter: str, first: RewardScorer, options: dict[str, Any]) -> RewardScorer:
    """The member in `folder` as an adapter beside the first one."""
    recorded = RewardNormalization.load(folder)
    # The head comes along: PEFT holds one copy of it per adapter.
    first.model.load_adapter(str(folder), adapter_name=adapter)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=options.get("trust_remote_code", False))
    return RewardScorer(
        first.model,
        tokenizer,
        mean=recorded.mean,
        std=recorded.std,
        batch_size=first.batch_size,
        autocast=first.autocast,
        adapter=adapter,
    )
