"""Scores every benchmark with every reward model, and turns the scores into entries of the report."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_rlhf_ext.cli.row_records import trained_prompts
from hf_rlhf_ext.data.prompt_form import MIXED
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.bench_reward_parts.models import Candidate, model_digest
from hf_rlhf_ext.recipes.bench_reward_parts.sources import BenchSource
from hf_rlhf_ext.reward.ensemble import RewardEnsemble, load_reward
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.study.reward_benchmarks.measures import Outcome
from hf_rlhf_ext.study.reward_benchmarks.scoring import (
    Scores,
    fits_into,
    input_limit,
    score_rows,
    scores_function,
)

SCORES_FOLDER = "scores"
AS_TURNS = "prompts were turns of the user in the chat template, as the reward model does not say its form of training"
TRAINED_ON = "with a prompt that the reward model was trained on"


@dataclass(frozen=True)
class Sizes:
    """Sizes of forward passes.

    Attributes:
        max_length: Tokens of a prompt with its completion. None means what the model supports.
        max_tokens: Tokens of a forward pass at most, with padding.
        batch_size: Sequences of a forward pass at most.
    """

    max_length: int | None
    max_tokens: int
    batch_size: int


def measure_models(
    models: Sequence[Candidate],
    sources: Sequence[BenchSource],
    *,
    folder: Path,
    sizes: Sizes,
    seed: int,
    include_trained: bool,
    trust_remote_code: bool,
) -> dict[str, dict[str, Any]]:
    """Measures all models on all benchmarks. Scores are kept in `folder`, and used again by a later run.

    Returns:
        For each model by name: `digest`, `location`, and `benchmarks` with an entry for each benchmark.
    """
    measured = {}
    for model in models:
        digest = model_digest(model.location, trust_remote_code=trust_remote_code)
        scorer = load_reward(model.location, batch_size=sizes.batch_size, trust_remote_code=trust_remote_code)
        _limit_batches(scorer, sizes.max_tokens)
        limit = input_limit(scorer, sizes.max_length)
        trained = None if include_trained else trained_prompts(model.location)
        entries = {}
        for source in sources:
            as_turns = source.benchmark is not None and renders_text(scorer)
            path = folder / SCORES_FOLDER / _score_file(source, digest, limit, as_turns)
            rows = [row for row in source.rows if trained is None or source.prompts.get(row.position) not in trained]
            if as_turns:
                rows = [row.as_turns() for row in rows]
            scores = score_rows(
                scores_function(scorer),
                rows,
                fits=fits_into(scorer, limit),
                limit=limit,
                path=path,
                title=f"{model.name}, {source.title}",
            )
            n_trained = len(source.rows) - len(rows)
            if n_trained:
                scores.coverage.rows += n_trained
                scores.coverage.left_out[TRAINED_ON] = n_trained
            is_ensemble = isinstance(scorer, RewardEnsemble)
            entries[source.key] = entry_of(source, scores, seed=seed, calibrated=not is_ensemble) | {
                "max_length": limit,
                "model_digest": digest,
            }
            if as_turns:
                entries[source.key]["notes"].append(AS_TURNS)
        measured[model.name] = {"digest": digest, "benchmarks": entries}
        del scorer  # before the next one is loaded
    if not any(entry["scored"] for one in measured.values() for entry in one["benchmarks"].values()):
        raise UserError(
            "benchmark: no row could be scored, as all are longer than the reward model reads, cannot be rendered by "
            "its chat template, or were trained on: raise --max_length, or use another reward model."
        )
    return measured


def _limit_batches(scorer: RewardScorer | RewardEnsemble, max_tokens: int) -> None:
    """Limits the tokens of the forward passes."""
    for member in scorer.members if isinstance(scorer, RewardEnsemble) else [scorer]:
        member.max_tokens = max_tokens


def renders_text(scorer: RewardScorer | RewardEnsemble) -> bool:
    """Whether prompts of public benchmarks are turns for a reward model whose form of training is not known.

    It is so where the tokenizer has a chat template: those who publish benchmarks use it for every reward model.
    """
    first = scorer.members[0] if isinstance(scorer, RewardEnsemble) else scorer
    return first.asked.trained.prompt_form in (None, MIXED) and first.tokenizer.chat_template is not None


def _score_file(source: BenchSource, digest: str, limit: int | None, as_turns: bool) -> str:
    """The name of the file with the scores of one benchmark by one reward model, in one form."""
    form = " turns" if as_turns else ""
    content = hashlib.sha256(f"{source.sha256} {digest} {limit}{form}".encode()).hexdigest()[:16]
    name = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in source.key)
    return f"{name}-{content}.jsonl"


def entry_of(source: BenchSource, scores: Scores, *, seed: int, calibrated: bool) -> dict[str, Any]:
    """The entry of a benchmark in the report.

    Args:
        source: The benchmark.
        scores: The scores of its rows.
        seed: Seed of the intervals.
        calibrated: Whether the scores are log-odds.
    """
    coverage = scores.coverage
    if scores.by_position:
        outcome = source.measure(scores.by_position, seed=seed, calibrated=calibrated)
    else:
        outcome = Outcome(measures={}, notes=("no row could be scored",))
    benchmark = source.benchmark
    return {
        "title": source.title,
        "dataset": source.dataset,
        "hub_id": benchmark.hub_id if benchmark else None,
        "revision": source.revision,
        "sha256": source.sha256,
        "rows": coverage.rows,
        "rows_of_dataset": source.total,
        "is_sample": source.is_sample,
        "scored": coverage.scored,
        "left_out": dict(coverage.left_out),
        "measures": {name: measure.as_dict() for name, measure in outcome.measures.items()},
        "details": outcome.details,
        "notes": list(outcome.notes),
        "aggregation": benchmark.source if benchmark else None,
    }
