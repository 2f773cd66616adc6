"""Several reward models as one: what they agree on is worth more than what one of them says."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from peft import PeftModel

from ..errors import UserError
from ..modeling.loading import base_and_revision, load_tokenizer
from .scorer import RewardNormalization, RewardScorer, local_folder

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
    return rewards.mean(0) - (penalty * rewards.std(0) if how == "conservative" else 0.0)


class RewardEnsemble:
    """Callable as `RewardScorer`, over several of them: adapters of one base (that is loaded once), or whole models.

    Args:
        members: scorers, each with its own normalisation, which puts them on one scale.
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
        self.members, self.combine, self.penalty = members, combine, penalty

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
        saved: dict[str, Any] = {}
        revision, code = options.pop("revision", None), options.get("trust_remote_code", False)
        if not isinstance(folders, list):
            root = local_folder(folders, revision, code=code)
            if not (root / ENSEMBLE_FILE).is_file():
                raise UserError(f"{folders}: no {ENSEMBLE_FILE}: give the folders of the members as a list.")
            saved = json.loads((root / ENSEMBLE_FILE).read_text())
            folders = [root / name for name in saved["members"]]
        folders = [local_folder(folder, revision, code=code) for folder in folders]
        first = RewardScorer.from_pretrained(folders[0], **options)
        members = [first] + [_member(folder, k, first, folders[0], options) for k, folder in enumerate(folders) if k]
        if any(member.model is first.model for member in members[1:]):
            first.adapter = "default"  # loading others may have changed what is active
        given = {"combine": combine, "penalty": penalty}
        return cls(
            members,
            **{name: saved[name] for name in given if name in saved}
            | {name: value for name, value in given.items() if value is not None},
        )

    @staticmethod
    def save(folder: str | Path, members: list[str], *, combine: str = "mean", penalty: float = 1.0) -> None:
        """Writes which subfolders of `folder` are the members, and how they are combined."""
        content = {"members": members, "combine": combine, "penalty": penalty}
        (Path(folder) / ENSEMBLE_FILE).write_text(json.dumps(content, indent=2) + "\n")

    def __call__(
        self, prompts: list, completions: list, log_metric: Callable[[str, float], None] | None = None, **columns: Any
    ) -> list[float]:
        """Combined rewards of completions given their prompts; further columns are ignored."""
        rewards = self.rewards(prompts, completions)
        if log_metric is not None and rewards.size:
            log_metric("reward_disagreement", float(rewards.std(0).mean()))
        return combine_rewards(rewards, self.combine, self.penalty).tolist()

    def rewards(self, prompts: list, completions: list) -> np.ndarray:
        """(M, N) normalised rewards, a row a member."""
        return np.array([member(prompts, completions) for member in self.members])

    def raw(self, prompts: list, completions: list) -> list[float]:
        """Mean of the members' raw scores: log-odds of the averaged model."""
        return np.mean([member.raw(prompts, completions) for member in self.members], 0).tolist()

    def disagreement(self, prompts: list, completions: list) -> np.ndarray:
        """(N,) standard deviation (population) of the members' normalised rewards."""
        return self.rewards(prompts, completions).std(0)


def load_reward(folder_or_repo: str | Path, **options: Any) -> RewardScorer | RewardEnsemble:
    """What the folder or Hub repository holds: one reward model, or an ensemble of them."""
    code = options.get("trust_remote_code", False)
    folder = local_folder(folder_or_repo, options.pop("revision", None), code=code)
    return (RewardEnsemble if (folder / ENSEMBLE_FILE).is_file() else RewardScorer).from_pretrained(folder, **options)


def _member(
    folder: str | Path, number: int, first: RewardScorer, first_folder: str | Path, options: dict[str, Any]
) -> RewardScorer:
    """A further member, on the base of the first where it has the same one, dtype and precision."""
    recorded = RewardNormalization.load(folder)
    base = base_and_revision(str(folder))
    if recorded is None or base[0] is None or not isinstance(first.model, PeftModel):
        return RewardScorer.from_pretrained(folder, **options)
    of_first = RewardNormalization.load(first_folder)
    same = [(r.base_dtype, r.autocast, r.load_in_4bit) for r in (recorded, of_first) if r is not None]
    if base != base_and_revision(str(first_folder)) or len(set(same)) != 1:
        logger.warning("%s has another base or precision than %s: loaded on its own.", folder, first_folder)
        return RewardScorer.from_pretrained(folder, **options)
    name = f"member-{number}"
    first.model.load_adapter(str(folder), adapter_name=name)
    scales = {"mean": recorded.mean, "std": recorded.std}
    limits = {"batch_size": first.batch_size, "autocast": first.autocast}
    tokenizer = load_tokenizer(str(folder), trust_remote_code=options.get("trust_remote_code", False))
    return RewardScorer(first.model, tokenizer, **scales, **limits, adapter=name)
