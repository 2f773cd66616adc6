"""Chooses the prompts whose completions people judge: uniformly, by use case, or where reward models disagree."""

import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from ..data.schema import Row
from ..data.text import Messages, is_text
from ..errors import UserError
from ..quality.duplicates import PromptIndex, question_of
from ..readers.mixture import DOLLY_USE_CASES, USE_CASE_SHARES, apportion
from ..reward.ensemble import ENSEMBLE_FILE, RewardEnsemble
from ..reward.scorer import local_folder
from .sampling import PolicySpec, free_memory, sample_tasks
from .tasks import Task

logger = logging.getLogger(__name__)

Ensemble = RewardEnsemble | str | Path | list[str | Path]
How = Literal["uniform", "mix", "disagreement"]
HOW = ("uniform", "mix", "disagreement")

POOL = 4
"""Number of candidates per wanted prompt, of which those with the largest disagreement are chosen."""

_SCORED_TOGETHER = 16  # tasks per step of the progress bar


@dataclass(frozen=True)
class ChosenPrompts:
    """Result of `choose_prompts`.

    Attributes:
        rows: the rows, in the order in which they should be judged. Their `category` is the use case.
        notes: what the caller should know, one line each, such as categories with too few prompts.
        left_out: reason -> number of rows that were not candidates for this reason.
        tasks: sampled completions of the chosen prompts, in the order of `rows`. Only with `how="disagreement"`.
        disagreement: disagreement of the ensemble on each chosen prompt, in units of reward. Only with
            `how="disagreement"`.
    """

    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    tasks: list[Task] | None = None
    disagreement: list[float] | None = None


def choose_prompts(
    rows: Sequence[Row],
    n: int,
    *,
    how: How = "uniform",
    seed: int = 0,
    shares: Mapping[str, float] = USE_CASE_SHARES,
    category_column: str = "category",
    exclude: Iterable[str | Messages] = (),
    ensemble: Ensemble | None = None,
    policies: Sequence[PolicySpec] = (),
    pool: int | None = None,
    **sampling: Any,
) -> ChosenPrompts:
    """Chooses `n` different prompts.

    `"uniform"` draws them at random. `"mix"` draws them so that the use cases have the given shares; if there are too
    few prompts of a use case, all of them are taken, and fewer than `n` prompts are chosen. `"disagreement"` draws
    `pool` candidates at random, samples completions of them, and chooses the prompts on which the members of the
    ensemble disagree most (see `pair_disagreement`). The completions are returned, ready to be judged.

    A prompt that is a near duplicate of another one (`quality.duplicates`) is left out. The same arguments give the
    same prompts.

    Args:
        rows: rows with `prompt` (text or messages).
        n: number of prompts to choose.
        how: how to choose.
        seed: seed of the random choice, and of sampling.
        shares: share of each use case for `"mix"`. They need not sum to 1.
        category_column: column with the use case of a row. Dolly's categories are translated.
        exclude: prompts that are not chosen, nor near duplicates of them, such as those judged in earlier rounds.
        ensemble: reward models for `"disagreement"`: loaded, or the folder or Hub id of an ensemble, or a list of those
            of its members. A folder is loaded after sampling, so that the policies and the ensemble are not in memory
            at the same time.
        policies: policies to sample from for `"disagreement"`.
        pool: number of candidates for `"disagreement"`; `None` means four per prompt.
        sampling: further options of `sample_tasks` for `"disagreement"`. `max_new_tokens` is required.

    Returns:
        The rows, and what should be known about them. If there are fewer candidates than `n`, all of them.

    Raises:
        UserError: for an option that is not usable, a row without a prompt, or if no prompt is left.
    """
    _check_options(n, how, ensemble, policies, pool, sampling)
    left_out: dict[str, int] = {}
    candidates = _distinct(rows, exclude, seed, category_column, left_out)
    if how == "mix":
        chosen, notes = _by_use_case(candidates, n, shares)
        return ChosenPrompts(chosen, _said(notes), left_out)
    if how == "uniform":
        chosen = _first(candidates, n)
        return ChosenPrompts(chosen, _said(_shortage(chosen, n, left_out)), left_out)

    drawn = _first(candidates, pool or POOL * n)
    notes = _shortage(drawn, n, left_out)
    return _where_members_disagree(drawn, n, ensemble, policies, seed, sampling, notes, left_out)


def _check_options(
    n: int, how: str, ensemble: Any, policies: Sequence[PolicySpec], pool: int | None, sampling: Mapping
) -> None:
    if how not in HOW:
        raise UserError(f"how={how!r}: choose one of {', '.join(HOW)}.")
    if n < 1:
        raise UserError(f"n={n}: give a number of prompts of 1 or more.")
    if how == "disagreement":
        if ensemble is None or not policies:
            raise UserError(
                "how='disagreement' needs an ensemble of reward models and the policies to sample from: give both."
            )
        if sampling.get("k", 2) < 2:
            raise UserError("k=1: how='disagreement' compares completions of a prompt: give k=2 or more.")
        if pool is not None and pool < n:
            raise UserError(f"pool={pool}: {n} prompts cannot be chosen from fewer candidates: raise pool, or lower n.")
        _check_ensemble(ensemble)
        return
    unused = [*sampling]
    if ensemble is not None:
        unused.append("ensemble")
    if policies:
        unused.append("policies")
    if pool is not None:
        unused.append("pool")
    if unused:
        raise UserError(f"{', '.join(unused)}: used with how='disagreement' only, not with {how!r}: leave them out.")


def _check_ensemble(ensemble: Ensemble) -> None:
    """Raises `UserError` for a single reward model, before anything is sampled."""
    if isinstance(ensemble, RewardEnsemble | list):
        return
    if not (local_folder(ensemble, None) / ENSEMBLE_FILE).is_file():
        raise UserError(
            f"ensemble: {ensemble} is a single reward model, which cannot disagree with itself: train an ensemble "
            "(hf-rlhf reward --members 3), or choose prompts with how='uniform'."
        )


def _said(notes: list[str]) -> list[str]:
    """Logs the notes, which the caller gets too."""
    for note in notes:
        logger.warning(note)
    return notes


# --- candidates ------------------------------------------------------------------------------------------------------


def _distinct(
    rows: Sequence[Row], exclude: Iterable[str | Messages], seed: int, column: str, left_out: dict[str, int]
) -> Iterator[Row]:
    """Rows with different prompts, in random order. Counts the others in `left_out`, as far as it is read."""
    earlier = PromptIndex()
    for prompt in exclude:
        earlier.holds(question_of(prompt), add=True)
    taken = PromptIndex()
    order = list(range(len(rows)))
    random.Random(f"choose {seed}").shuffle(order)
    for number in order:
        row = rows[number]
        if not is_text(row.get("prompt")):
            raise UserError(
                f"prompts row {number}: `prompt` is {row.get('prompt')!r:.80}, not text or a list of messages: fix or "
                "drop the row."
            )
        question = question_of(row["prompt"])
        if not question.strip():
            _count(left_out, "empty prompt")
        elif earlier.holds(question):
            _count(left_out, "judged before")
        elif taken.holds(question, add=True):
            _count(left_out, "near duplicate")
        else:
            yield _with_use_case(row, column)


def _count(left_out: dict[str, int], reason: str) -> None:
    left_out[reason] = left_out.get(reason, 0) + 1


def _with_use_case(row: Row, column: str) -> Row:
    label = row.get(column)
    if label is None:
        return dict(row)
    return dict(row) | {"category": DOLLY_USE_CASES.get(str(label), str(label))}


def _first(candidates: Iterator[Row], n: int) -> list[Row]:
    """The first `n` candidates, or all if there are fewer."""
    chosen = []
    for row in candidates:
        chosen.append(row)
        if len(chosen) == n:
            break
    return chosen


def _shortage(chosen: list[Row], n: int, left_out: Mapping[str, int]) -> list[str]:
    """A note if there are fewer prompts than wanted. Raises `UserError` if there is none."""
    if len(chosen) >= n:
        return []
    counted = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none left out"
    if not chosen:
        raise UserError(f"prompts: none is left to choose from ({counted}): give more prompts.")
    return [f"only {len(chosen)} of {n} prompts could be chosen ({counted})"]


# --- by use case -----------------------------------------------------------------------------------------------------


def _by_use_case(candidates: Iterable[Row], n: int, shares: Mapping[str, float]) -> tuple[list[Row], list[str]]:
    """Prompts with the given shares of use cases, in random order, and a note on use cases with too few prompts."""
    quotas = apportion(n, dict(shares))
    taken: dict[str, list[Row]] = {name: [] for name in quotas}
    found: dict[str | None, None] = {}  # use cases in the data, in their order
    chosen = []
    for row in candidates:  # in random order, so the first ones are a random choice
        name = row.get("category")
        found[name] = None
        if name in taken and len(taken[name]) < quotas[name]:
            taken[name].append(row)
            chosen.append(row)
    if not chosen:
        known = ", ".join(map(str, found)) or "nothing"
        raise UserError(
            f"how='mix': no prompt has one of the categories {', '.join(quotas)}; found {known}: name the column with "
            "category_column, or give other shares."
        )
    scarce = []
    for name, quota in quotas.items():
        if len(taken[name]) < quota:
            scarce.append(f"{name} {len(taken[name])} of {quota}")
    if not scarce:
        return chosen, []
    return chosen, [f"mix: {len(chosen)} of {n} prompts chosen, as there are too few of {', '.join(scarce)}"]


# --- where an ensemble disagrees -------------------------------------------------------------------------------------


def pair_disagreement(rewards: ArrayLike) -> float:
    """How much the members of an ensemble disagree on which completions of one prompt are better.

    For each pair of completions, members differ by the standard deviation of r_i - r_j over members. Returned is the
    mean over all pairs. What a member adds to the reward of every completion of a prompt does not count, as it decides
    no comparison.

    Args:
        rewards: (M, K) rewards of M members for the K ≥ 2 completions of a prompt.

    Returns:
        The mean standard deviation (population), in units of reward.
    """
    rewards = np.asarray(rewards, dtype=float)  # (M, K)
    deviations = []
    for i, j in combinations(range(rewards.shape[1]), 2):
        differences = rewards[:, i] - rewards[:, j]  # (M,)
        deviations.append(differences.std())
    return float(np.mean(deviations))


def task_disagreement(tasks: Sequence[Task], ensemble: RewardEnsemble) -> list[float]:
    """`pair_disagreement` of each task, from the normalized rewards of the ensemble."""
    disagreements = []
    starts = range(0, len(tasks), _SCORED_TOGETHER)
    for start in tqdm(starts, desc="scoring with the ensemble", leave=False, disable=None):  # None: on terminals only
        some = tasks[start : start + _SCORED_TOGETHER]
        prompts = [task.prompt for task in some for _ in task.completions]
        completions = [completion for task in some for completion in task.completions]
        rewards = ensemble.rewards(prompts, completions)  # (M, N)
        first = 0
        for task in some:
            last = first + len(task.completions)
            disagreements.append(pair_disagreement(rewards[:, first:last]))
            first = last
    return disagreements


def _where_members_disagree(
    candidates: list[Row],
    n: int,
    ensemble: Ensemble,
    policies: Sequence[PolicySpec],
    seed: int,
    sampling: dict[str, Any],
    notes: list[str],
    left_out: dict[str, int],
) -> ChosenPrompts:
    """Samples completions of the candidates, and chooses the prompts with the largest disagreement."""
    sampled = sample_tasks(candidates, policies, seed=seed, **sampling)
    for entry in sampled.dropped:
        _count(left_out, entry.reason)
    if not sampled.tasks:
        raise UserError(f"how='disagreement': no candidate has completions to compare ({sampled.summary()}).")
    if isinstance(ensemble, RewardEnsemble):
        disagreement = task_disagreement(sampled.tasks, ensemble)
    else:
        disagreement = task_disagreement(sampled.tasks, RewardEnsemble.from_pretrained(ensemble))
        free_memory()  # the ensemble that was loaded here is of no use to the caller
    # Largest first. The sort is stable, so that prompts with equal values stay in their random order.
    order = sorted(range(len(sampled.tasks)), key=lambda number: -disagreement[number])[:n]
    if len(order) < n and not notes:
        notes = [f"only {len(order)} of {n} prompts could be chosen ({sampled.summary()})"]
    return ChosenPrompts(
        rows=[candidates[sampled.rows[number]] for number in order],
        notes=_said(notes),
        left_out=left_out,
        tasks=[sampled.tasks[number] for number in order],
        disagreement=[disagreement[number] for number in order],
    )
