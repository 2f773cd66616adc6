"""The measured numbers of a report for its card, with readable names and the number of samples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ...errors import UserError
from ..report import PPOSection, RunReport, Section


class Result(NamedTuple):
    """One measured number, for the table and the model index of the card.

    Attributes:
        key: Name in the report.
        name: Readable name.
        value: Measured value.
        n: Number of samples; None if it is not known.
        of: What the samples are, such as "held-out pairs".
        ci95: 95 % confidence interval (low, high).
        dataset: Name of the evaluation set, if there are several.
    """

    key: str
    name: str
    value: float
    n: int | None
    of: str
    ci95: tuple[float, float] | None = None
    dataset: str | None = None


class Measure(NamedTuple):
    """A number that a report may have: its key, its readable name, and the key of its number of samples."""

    key: str
    name: str
    count: str


_REWARD_MODEL = (
    Measure("accuracy", "Pairwise accuracy", "decided_pairs"),
    Measure("nll", "Negative log-likelihood, nats per pair", "heldout_pairs"),
    Measure("brier", "Brier score (0.25 is chance)", "heldout_pairs"),
    Measure("ece", "Expected calibration error", "heldout_pairs"),
    Measure("longer_wins_baseline", "Accuracy of always preferring the longer completion", "decided_pairs"),
    Measure("gain", "Gain in accuracy over preferring the longer completion", "decided_pairs"),
    Measure("annotator_ceiling", "Highest expected accuracy, given the noise of the annotator", "decided_pairs"),
    Measure("disagreement", "Disagreement of the members, standard deviation of their rewards", ""),
)
_SFT = (
    Measure("eval_loss", "Loss, nats per token", "heldout_rows"),
    Measure("eval_mean_token_accuracy", "Accuracy of the next token", "heldout_rows"),
)
_DPO = (
    Measure("gold_after", "Gold reward", "n"),
    Measure("gold_gain", "Gain in gold reward", "n"),
    Measure("kl", "KL to the initial policy, nats per completion", "n"),
    Measure("mean_length_after", "Mean length, tokens", "n"),
)
_COUNTED = {"n": "held-out prompts", "heldout_rows": "held-out demonstrations"}
"""Key of a count -> what it counts, if not held-out pairs."""


def collect_results(kind: str, report: RunReport) -> list[Result]:
    """Returns the measured numbers for a card of this kind: without a name of the set first, then those of each set.

    Raises:
        UserError: A number is not finite.
    """
    if kind == "reward_model":
        return _results_of_sets("reward_model", _REWARD_MODEL, report.reward_model, kind)
    if kind == "dpo":
        return _results_of_sets("dpo", _DPO, report.dpo, kind)
    results = []
    if kind == "sft":
        results += _results_of_sets("sft", _SFT, report.sft, kind)
    ppo = report.ppo
    if report.categories and ppo.metrics:  # older reports only have the number of prompts by category
        prompts = sum(row["n"] for row in report.categories.values())
        ppo = replace(ppo, metrics={"n": prompts or None, **ppo.metrics})
    results += _results_of_sets("ppo", _ppo_measures(kind, ppo), ppo, kind)
    return results


def _results_of_sets(section: str, measures: Sequence[Measure], measured: Section, kind: str) -> list[Result]:
    """The results of the evaluation set without a name, and of those with one."""
    results = _results_of(section, measures, measured.metrics, kind)
    for name, metrics in (measured.evaluation_sets or {}).items():
        for result in _results_of(f"{section}']['{name}", measures, metrics, kind):
            results.append(result._replace(dataset=name))
    return results


def _results_of(
    section: str,
    measures: Sequence[Measure],
    metrics: Mapping[str, Any],
    kind: str,
) -> list[Result]:
    results = []
    for measure in measures:
        if measure.key not in metrics:  # not measured
            continue
        value = metrics[measure.key]
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(
                f"write_card: report['{section}']['{measure.key}'] is {value!r}; a {kind} card needs a finite number."
            )
        n = metrics.get(measure.count)
        reward, _, _ = measure.key.rpartition("_")
        own_count = f"{reward}_n"
        if own_count in metrics:  # a reward that does not score every prompt
            n = metrics[own_count]
        interval = metrics.get(f"{measure.key}_ci95")
        result = Result(
            key=measure.key,
            name=measure.name,
            value=float(value),
            n=n,
            of=_COUNTED.get(measure.count, "held-out pairs"),
            ci95=tuple(interval) if interval else None,
        )
        results.append(result)
    return results


def _ppo_measures(kind: str, ppo: PPOSection) -> list[Measure]:
    """Returns the numbers that a PPO report may have about the start (kind "sft") or the end of PPO."""
    rewards = {}
    for reward in ppo.eval_rewards or ():
        rewards[reward] = f"Reward {reward}, unseen by PPO"
    if "gold_before" in ppo.metrics:
        rewards["gold"] = "Gold reward"
    rewards["proxy"] = "Proxy reward"  # the reward that PPO maximized, listed after the others
    when = "before" if kind == "sft" else "after"  # PPO started from the SFT policy
    measures = []
    for reward, name in rewards.items():
        measures.append(Measure(f"{reward}_{when}", name, "n"))
    if kind == "policy":
        for reward, name in rewards.items():
            within_sentence = name[0].lower() + name[1:]
            measures.append(Measure(f"{reward}_gain", f"Gain in {within_sentence}", "n"))
        measures.append(Measure("kl", "KL to the initial policy, nats per completion", "n"))
    measures.append(Measure(f"mean_length_{when}", "Mean length, tokens", "n"))
    return measures
