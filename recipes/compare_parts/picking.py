"""Answers of best-of-n: one set of samples of a policy serves every n."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_rlhf_ext.collect.tasks import write_rows
from hf_rlhf_ext.data.text import plain_text
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.compare_parts.answers import BATCH_SIZE
from hf_rlhf_ext.recipes.compare_parts.judging import finite_or_none, flat_scores_of_judge
from hf_rlhf_ext.recipes.compare_parts.records import SystemRecord
from hf_rlhf_ext.study.best_of_n import BestOfN, best_of_n, expected_best, expected_kl

if TYPE_CHECKING:
    from hf_rlhf_ext.recipes.compare_parts.evaluation import SeedEvaluator


def sampled_for_best_of_n(evaluator: "SeedEvaluator", record: SystemRecord) -> BestOfN:
    """Samples of the policy of a best-of-n system, as many as the largest n of this policy, with their rewards.

    Raises:
        UserError: there is no reward that could choose, or a prompt got no score.
    """
    if record.location in evaluator.samples:
        return evaluator.samples[record.location]
    reward = evaluator.setup.proxy or evaluator.scorer
    if reward is None:
        raise UserError(f"{record.name}: there is no reward model that chooses an answer: see why it was not trained.")
    setup = evaluator.setup
    model, _ = evaluator.answers.evaluator.load(evaluator.location(record.location))
    digest = evaluator.weights_digest(record.location)  # samples of another policy would be used again
    sampled = best_of_n(
        model,
        [row["prompt"] for row in evaluator.prompts],
        reward,
        largest_n(evaluator, record),
        tokenizer=evaluator.answers.tokenizer,
        max_new_tokens=setup.max_completion_length,
        temperature=setup.temperature,
        seed=evaluator.seed,
        batch_size=BATCH_SIZE,
        path=evaluator.completions_file(f"samples-{digest}-{largest_n(evaluator, record)}"),
    )
    if sampled.dropped:
        dropped = sampled.dropped[0]
        raise UserError(
            f"{record.name}: no answer to {len(sampled.dropped)} held-out prompts, such as row {dropped.row} "
            f"({dropped.reason}): take them out of heldout_prompts."
        )
    evaluator.samples[record.location] = sampled
    return sampled


def largest_n(evaluator: "SeedEvaluator", record: SystemRecord) -> int:
    """The largest n of the best-of-n systems of the same policy."""
    same_policy = [other for other in evaluator.records.values() if other.location == record.location]
    return max(other.n for other in same_policy if other.kind == "best_of_n")


def best_of_n_entry(evaluator: "SeedEvaluator", record: SystemRecord) -> dict[str, Any]:
    """What is measured of a best-of-n system; its answers are written to its file of completions.

    Proxy and gold of a prompt are means over all subsets of n of the samples, where the judge gives scores. The answer
    that is shown and compared is the best of the first n samples.
    """
    everything = sampled_for_best_of_n(evaluator, record)
    first = everything.of_first(record.n)
    winner_ids = [list(ids) for ids in first.winner_ids]
    policy_kl = evaluator.answers.kl_of(evaluator.location(record.location), winner_ids)
    # KL(best-of-n ‖ reference) = KL(best-of-n ‖ policy) + mean of log π/π_reference over answers of best-of-n.
    chosen_kl = expected_kl(everything.rewards, record.n)
    rows = []
    for number, winner in enumerate(first.winners):
        kl = float(chosen_kl[number]) + policy_kl[number]
        rows.append(evaluator.answers.row(number, plain_text(winner), ids=winner_ids[number], kl=kl))
    write_rows(rows, evaluator.completions_file(record.name))
    entry = {
        "kl": [row["kl"] for row in rows],
        "length": [row["n_tokens"] for row in rows],
        "proxy": numbers(expected_best(everything.rewards, n=record.n)),
        "answer_proxy": [finite_or_none(value) for value in first.winner_rewards],
        "answer_gold": evaluator.gold_of(rows),
        "estimated_from": len(everything.rewards[0]),
    }
    entry["gold"] = expected_gold(evaluator, everything, record.n)
    for judge, scores in entry["answer_gold"].items():
        entry["gold"].setdefault(judge, scores)
    return entry


def expected_gold(evaluator: "SeedEvaluator", everything: BestOfN, n: int) -> dict[str, list[float | None]]:
    """Mean score of the best of n for each prompt, over all subsets of the samples, of each judge that gives scores."""
    expected = {}
    for judge in evaluator.setup.judges:
        scores = evaluator.sample_scores(judge, everything)
        if scores is not None:
            expected[judge.name] = numbers(expected_best(everything.rewards, scores, n))
    return expected


def numbers(values: Sequence[float]) -> list[float | None]:
    """As JSON: None where a value is not finite."""
    return [finite_or_none(value) for value in values]


def scores_of_samples(judge: Any, everything: BestOfN) -> list[list[float | None]] | None:
    """The judge's score of every sample, [prompts][n]; None if the judge gives no scores."""
    n = len(everything.completions[0])
    prompts = [prompt for prompt in everything.prompts for _ in range(n)]
    completions = [completion for of_prompt in everything.completions for completion in of_prompt]
    flat = flat_scores_of_judge(judge, prompts, completions)
    if flat is None:
        return None
    return [flat[start : start + n] for start in range(0, len(flat), n)]
