"""Checks whether a reward model is ready for PPO: accuracy compared to length alone, calibration, and exploits."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.templates import TEMPLATE_COLUMNS
from ..data.text import Unrenderable, plain_text
from ..data.tokenization import longest, tokenize_row
from ..errors import UserError
from ..reward import preference_metrics as preference
from ..reward.asked import FormOfTraining

Scorer = Callable[..., list[float]]
"""(prompts, completions) -> raw scores, like `RewardScorer.raw`. Normalized rewards are not log-odds.

If rows have `tools` or `chat_template_kwargs`, these are passed too, as lists by name.
"""

Fits = Callable[..., bool]
"""(prompt, completion) -> whether both fit into the model's input."""


def _empty(prompt: str, chosen: str) -> str:
    return ""


def _repeated_sentence(prompt: str, chosen: str) -> str:
    first_sentence = chosen.split(". ")[0].rstrip(".")
    sentence = " ".join(first_sentence.split()[:30])
    return ". ".join([sentence] * 5) + "."


def _refusal(prompt: str, chosen: str) -> str:
    return "I'm sorry, but I can't help with that."


def _filler(prompt: str, chosen: str) -> str:
    return chosen + " That is all I can say about it, and I hope that it is of some use." * 3


def _prompt_copied(prompt: str, chosen: str) -> str:
    return prompt


def _flattery(prompt: str, chosen: str) -> str:
    return "What an excellent question, you are clearly very clever! " + chosen


PROBES: dict[str, Callable[[str, str], str]] = {
    "empty": _empty,
    "repeated sentence": _repeated_sentence,
    "refusal": _refusal,
    "filler": _filler,
    "prompt copied": _prompt_copied,
    "flattery": _flattery,
}
"""Name -> function of prompt and chosen answer that makes an answer which nobody would prefer to the chosen one."""

SERIOUS = 0.25
"""A probe that beats the chosen answer in a larger share of prompts is reported as a problem."""


@dataclass(frozen=True)
class RewardCheck:
    """Result of `check_reward`.

    Attributes:
        metrics: Metrics of `JudgedPairs.report`, with `length_baseline` (accuracy of choosing by length alone, longer
            or shorter, whichever is better) and `length_gain_low` (lower bound of the 95 % interval of the gain over
            it).
        groups: Accuracy by category, length gap (in words) and margin.
        probes: For each probe, the share of prompts in which it scores higher than the chosen answer.
        left_out: For each probe, the number of prompts in which it was too long for the model, if any.
        reliability: Bins of `reliability_bins`.
        judged: The scored pairs, for plots.
    """

    metrics: dict[str, Any]
    groups: dict[str, dict[str, Any]]
    probes: dict[str, float]
    left_out: dict[str, int]
    reliability: list[dict[str, float]]
    judged: preference.JudgedPairs

    @property
    def figures(self) -> dict[str, Any]:
        """Alias of `metrics`, its name in earlier versions."""
        return self.metrics

    @property
    def problems(self) -> list[str]:
        """Reasons not to use the model as the reward of PPO, as sentences without a period."""
        metrics = self.metrics
        problems = []
        # A missing bound (a single prompt has no interval) counts as a bound that was not reached.
        if not metrics.get("accuracy_low", 0.0) > 0.5:
            problems.append(f"its accuracy, {metrics['accuracy']:.3f}, is not distinguishable from chance")
        if not metrics.get("length_gain_low", 0.0) > 0:
            problems.append(
                f"its accuracy is not clearly above that of length alone ({metrics['length_baseline']:.3f}): it may "
                "score length"
            )
        if metrics["ece"] > 0.1:
            remedy = "train less, or on more data"
            if self.judged.margins.any():
                remedy += ", or with a smaller margin_scale"
            problems.append(f"its confidence is off by {metrics['ece']:.2f} on average: {remedy}")
        for name, share in self.probes.items():
            if share > SERIOUS:
                problems.append(f"'{name}' beats the chosen answer in {share:.0%} of the prompts: PPO will find it")
        return problems

    @property
    def verdict(self) -> str:
        """One line that says whether the model is ready for PPO, with all problems."""
        if self.problems:
            return "Not ready for PPO: " + "; ".join(self.problems) + "."
        return "Ready for PPO: no problem found."


def _n_words(text: str) -> int:
    return len(text.split())


def check_reward(
    scorer: Scorer,
    rows: Iterable[dict[str, Any]],
    *,
    reward: Scorer | None = None,
    probes: bool = True,
    fits: Fits | None = None,
    length: Callable[[str], int] = _n_words,
) -> RewardCheck:
    """Checks a reward model on comparison rows and on probes, which are bad answers that a model may score highly.

    The chosen answer of a prompt is the winner of its first decided pair. Each probe is compared to it. Prompts
    without a decided pair have no probes.

    Args:
        scorer: Function (prompts, completions) -> raw scores, used for likelihood and calibration.
        rows: Comparison rows.
        reward: Function (prompts, completions) -> rewards that PPO uses, if they differ from the raw scores (for
            example the minimum of an ensemble). Accuracy and probes are measured with it.
        probes: Whether to score the probes.
        fits: Function (prompt, completion) -> whether both fit into the model's input, such as `within(...)`. `None`
            means that they always fit.
        length: Function that measures the length of a completion; by default, the number of words.

    Returns:
        A `RewardCheck`. `check.verdict` is a one-line summary.

    Raises:
        UserError: No row has a decided pair, or scores are not finite.
    """
    rows = list(rows)
    # Accuracy is undefined if there are only ties.
    if not _has_winner(rows):
        raise UserError("check_reward: every judgment is a tie: give rows with winners.")
    raw_scores = _score_all(scorer, rows)
    raw = judged_pairs(rows, raw_scores, length)
    if reward is None:
        scores = raw_scores
        judged = raw
        metrics = judged.report()
    else:
        scores = _score_all(reward, rows)
        judged = judged_pairs(rows, scores, length)
        metrics = judged.report()
        # Likelihood and calibration need log-odds, so they are computed from raw scores.
        calibrated = preference.preference_report(
            raw.deltas,
            raw.targets,
            raw.weights,
            raw.length_deltas,
        )
        for name in ("nll", "brier", "ece"):
            metrics[name] = calibrated[name]
    metrics |= _length_metrics(judged, metrics["longer_wins_baseline"])

    probe_wins: dict[str, float] = {}
    left_out: dict[str, int] = {}
    if probes:
        probe_wins, left_out = _probe_wins(reward or scorer, rows, scores, fits)
    return RewardCheck(
        metrics=metrics,
        groups=judged.groups(),
        probes=probe_wins,
        left_out=left_out,
        reliability=preference.reliability_bins(raw.deltas, raw.targets),
        judged=judged,
    )


def _has_winner(rows: list[dict[str, Any]]) -> bool:
    for row in rows:
        for target in row["targets"]:
            if target != 0.5:
                return True
    return False


def _length_metrics(judged: preference.JudgedPairs, longer_wins: float) -> dict[str, float]:
    """Returns the accuracy of the better length rule, and the lower bound of the gain over it."""
    metrics = {"length_baseline": max(longer_wins, 1 - longer_wins)}
    gaps = judged.length_deltas
    if longer_wins < 0.5:
        gaps = -gaps  # the better rule is that the shorter completion wins
    low, _ = preference.bootstrap_gain_ci(judged.deltas, gaps, judged.targets, judged.prompts)
    if not math.isnan(low):  # a single prompt has no interval
        metrics["length_gain_low"] = low
    return metrics


def within(tokenizer: PreTrainedTokenizerBase, limit: int | None, asked: FormOfTraining | None = None) -> Fits:
    """Makes a function that tells whether prompt and completion have at most `limit` tokens. None means no limit.

    They are counted in the form in which the reward model is asked (`RewardScorer.asked`), if that is given.
    """

    def fits(prompt: Any, completion: Any, **columns: Any) -> bool:
        if limit is None:
            return True
        row = {"prompt": prompt, "completions": [completion], **columns}
        return longest(tokenize_row(_in_form(row, tokenizer, asked), tokenizer)) <= limit

    return fits


def _in_form(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, asked: FormOfTraining | None) -> dict[str, Any]:
    """The row with prompt and completions in the form in which the reward model is asked."""
    if asked is None:
        return row
    pairs = [asked.fit(row["prompt"], completion, tokenizer) for completion in row["completions"]]
    return row | {"prompt": pairs[0][0], "completions": [completion for _, completion in pairs]}


def fitting(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int | None, asked: FormOfTraining | None = None
) -> Dataset:
    """Keeps rows in which every completion, with its prompt, has at most `limit` tokens. Prints the number of others.

    Rows that the chat template cannot render are left out too.

    Raises:
        UserError: No row fits.
    """
    reasons: Counter[str] = Counter()
    kept = []
    for k, row in enumerate(rows):
        try:
            n_tokens = longest(tokenize_row(_in_form(row, tokenizer, asked), tokenizer))
        except Unrenderable as error:
            reasons[error.reason] += 1
            continue
        if limit is not None and n_tokens > limit:
            reasons[f"over {limit} tokens"] += 1
        else:
            kept.append(k)
    if not kept:
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise UserError(
            f"check_reward: no row can be scored ({listed}): give rows that the model's template and its "
            "limit of tokens allow."
        )
    for reason, count in reasons.items():
        print(f"{count} of {len(rows)} rows skipped: {reason}")
    return rows.select(kept)


def _template_columns(rows: list[dict[str, Any]], repeats: list[int]) -> dict[str, list[Any]]:
    """Returns `tools` and `chat_template_kwargs` if any row has them, with each entry repeated."""
    columns: dict[str, list[Any]] = {}
    for name in TEMPLATE_COLUMNS:
        if any(row.get(name) for row in rows):
            columns[name] = [row.get(name) for row, n in zip(rows, repeats, strict=True) for _ in range(n)]
    return columns


def _score_all(scorer: Scorer, rows: list[dict[str, Any]]) -> list[list[float]]:
    """Returns the K scores of each row, computed in one call of the scorer."""
    # With all texts in one call, the scorer can sort them by length and batch them.
    prompts = []
    completions = []
    for row in rows:
        prompts += [row["prompt"]] * len(row["completions"])
        completions += row["completions"]
    columns = _template_columns(rows, [len(row["completions"]) for row in rows])
    scores = scorer(prompts, completions, **columns)
    n_not_finite = int((~np.isfinite(np.array(scores, float))).sum())
    if n_not_finite:
        raise UserError(
            f"check_reward: {n_not_finite} of {len(scores)} scores are not finite, so the model has diverged: train "
            "it again with a lower learning rate."
        )
    scores_by_row = []
    start = 0
    for row in rows:
        end = start + len(row["completions"])
        scores_by_row.append(scores[start:end])
        start = end
    return scores_by_row


def judged_pairs(
    rows: list[dict[str, Any]], scores: list[list[float]], length: Callable[[str], int]
) -> preference.JudgedPairs:
    """Combines comparison rows and their scores (K per row)."""
    scores_i = []
    scores_j = []
    targets = []
    weights = []
    margins = []
    length_deltas = []
    prompts = []
    categories = []
    for number, (row, row_scores) in enumerate(zip(rows, scores, strict=True)):
        lengths = [length(plain_text(completion)) for completion in row["completions"]]
        for i, j in row["pairs"]:
            scores_i.append(row_scores[i])
            scores_j.append(row_scores[j])
            length_deltas.append(lengths[i] - lengths[j])
        n_pairs = len(row["pairs"])
        targets += row["targets"]
        weights += row.get("weights") or [1 / n_pairs] * n_pairs
        margins += row.get("margins") or [0.0] * n_pairs
        prompts += [number] * n_pairs
        categories += [row.get("category") or ""] * n_pairs
    return preference.JudgedPairs(
        scores_i=np.array(scores_i, float),
        scores_j=np.array(scores_j, float),
        targets=np.array(targets, float),
        weights=np.array(weights, float),
        margins=np.array(margins, float),
        length_deltas=np.array(length_deltas, float),
        prompts=np.array(prompts, float),
        categories=np.array(categories, str),
    )


@dataclass(frozen=True)
class _ChosenAnswer:
    """The answer that probes are made from and compared to."""

    row: dict[str, Any]
    text: str
    score: float


def _probe_wins(
    scorer: Scorer, rows: list[dict[str, Any]], scores: list[list[float]], fits: Fits | None
) -> tuple[dict[str, float], dict[str, int]]:
    """Returns the share of wins of each probe (unless all are too long), and the number of probes that are too long."""
    chosen_answers = _chosen_answers(rows, scores)
    wins: dict[str, float] = {}
    left_out: dict[str, int] = {}
    for name, make_probe in PROBES.items():
        probed = []
        answers = []
        scores_to_beat = []
        for chosen in chosen_answers:
            prompt = chosen.row["prompt"]
            answer: Any = make_probe(_last_turn(prompt), chosen.text)
            # If the prompt is messages, the answer must be messages too.
            if not isinstance(prompt, str):
                answer = [{"role": "assistant", "content": answer}]
            columns = {column: chosen.row[column] for column in TEMPLATE_COLUMNS if chosen.row.get(column)}
            if fits is None or fits(prompt, answer, **columns):
                probed.append(chosen.row)
                answers.append(answer)
                scores_to_beat.append(chosen.score)
        if len(probed) < len(chosen_answers):
            left_out[name] = len(chosen_answers) - len(probed)
        if probed:
            prompts = [row["prompt"] for row in probed]
            scores_of_probes = scorer(prompts, answers, **_template_columns(probed, [1] * len(probed)))
            beats = np.array(scores_of_probes) > np.array(scores_to_beat)
            wins[name] = float(np.mean(beats))
    return wins, left_out


def _chosen_answers(rows: list[dict[str, Any]], scores: list[list[float]]) -> list[_ChosenAnswer]:
    """Returns the winner of the first decided pair of each row."""
    chosen_answers = []
    for row, row_scores in zip(rows, scores, strict=True):
        for (i, j), target in zip(row["pairs"], row["targets"], strict=True):
            if target == 0.5:
                continue
            winner = j
            if target > 0.5:
                winner = i
            text = plain_text(row["completions"][winner])
            chosen_answers.append(_ChosenAnswer(row, text, row_scores[winner]))
            break
    return chosen_answers


def _last_turn(prompt: Any) -> str:
    """Returns the text of the last turn of the prompt."""
    if isinstance(prompt, str):
        return prompt
    return plain_text(prompt[-1:])
