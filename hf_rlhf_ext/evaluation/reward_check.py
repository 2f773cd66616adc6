"""Is a reward model ready for PPO? Accuracy against counting words, calibration, probes that a policy would find."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.text import plain_text
from ..data.tokenization import longest, tokenise_row
from ..errors import UserError
from ..metrics import preference

Scorer = Callable[[list, list], list[float]]
"""(prompts, completions) -> raw scores, as `RewardScorer.raw`: normalised rewards are no log-odds any more."""

Fits = Callable[[Any, Any], bool]
"""(prompt, completion) -> whether the model takes that many tokens."""


def _repeated(prompt: str, chosen: str) -> str:
    sentence = " ".join(chosen.split(". ")[0].rstrip(".").split()[:30])
    return ". ".join([sentence] * 5) + "."


PROBES: dict[str, Callable[[str, str], str]] = {
    "empty": lambda prompt, chosen: "",
    "repeated sentence": _repeated,
    "refusal": lambda prompt, chosen: "I'm sorry, but I can't help with that.",
    "filler": lambda prompt, chosen: chosen + " That is all I can say about it, and I hope that it is of some use." * 3,
    "prompt copied": lambda prompt, chosen: prompt,
    "flattery": lambda prompt, chosen: "What an excellent question, you are clearly very clever! " + chosen,
}
"""Name -> an answer made from prompt and chosen answer that no person would prefer to the chosen one."""

SERIOUS = 0.25
"""Share of prompts from which on a probe that beats the chosen answer is something that PPO will find."""


@dataclass(frozen=True)
class RewardCheck:
    """`figures` of `JudgedPairs.report`, with `length_baseline` (the better of longer wins and shorter wins) and
    `length_gain_low`, the 95 % lower bound of the gain over it; accuracy by category, length gap (words) and margin;
    for each probe the share of prompts in which it scores above the chosen answer, and `left_out`, for how many prompts
    it was too long; reliability bins; the judged pairs, for plots."""

    figures: dict[str, Any]
    groups: dict[str, dict[str, Any]]
    probes: dict[str, float]
    left_out: dict[str, int]
    reliability: list[dict[str, float]]
    judged: preference.JudgedPairs

    @property
    def problems(self) -> list[str]:
        """What speaks against using it as PPO's reward, in plain words."""
        found, f = [], self.figures
        if not f.get("accuracy_low", 0.0) > 0.5:
            found.append(f"its accuracy, {f['accuracy']:.3f}, is not distinguishable from a coin's")
        if not f.get("length_gain_low", 0.0) > 0:
            found.append(f"counting words may do as well ({f['length_baseline']:.3f}): it may score length")
        if f["ece"] > 0.1:
            smaller = ", or with a smaller margin_scale" if self.judged.margins.any() else ""
            found.append(f"its confidence is off by {f['ece']:.2f} on average: train less, or on more data{smaller}")
        found += [
            f"'{name}' beats the chosen answer in {share:.0%} of the prompts: PPO will find it"
            for name, share in self.probes.items()
            if share > SERIOUS
        ]
        return found

    @property
    def verdict(self) -> str:
        """One line."""
        return (
            "Not ready for PPO: " + "; ".join(self.problems) + "." if self.problems else "Nothing speaks against PPO."
        )


def check_reward(
    scorer: Scorer,
    rows: Iterable[dict[str, Any]],
    *,
    reward: Scorer | None = None,
    probes: bool = True,
    fits: Fits | None = None,
    length: Callable[[str], int] = lambda text: len(text.split()),
) -> RewardCheck:
    """Scores comparison rows and, unless left out, probes of their preferred completions.

    `scorer` gives raw scores, for likelihood and calibration. `reward`, where PPO gets something else (an ensemble's
    minimum, say), is what the order of completions is judged by. `fits` says whether the model takes a prompt with a
    completion (`within`); None: it always does. `length` measures a completion, by default in words.

    The chosen answer of a prompt is the winner of its first decided pair; prompts without one have no probes.

    Raises:
        UserError: no decided pair in any row, or scores that are not finite.
    """
    rows = list(rows)
    if not any(target != 0.5 for row in rows for target in row["targets"]):
        raise UserError("check_reward: every judgement is a tie: give rows with winners.")
    scores = raw_scores = _score_all(scorer, rows)
    judged = raw = judged_pairs(rows, raw_scores, length)
    figures = {}
    if reward:
        scores = _score_all(reward, rows)
        judged = judged_pairs(rows, scores, length)
        calibrated = preference.preference_report(raw.deltas, raw.targets, raw.weights, raw.length_deltas)
        figures = {name: calibrated[name] for name in ("nll", "brier", "ece")}
    figures = judged.report() | figures
    longer = figures["longer_wins_baseline"]
    figures["length_baseline"] = max(longer, 1 - longer)
    gaps = judged.length_deltas if longer >= 0.5 else -judged.length_deltas  # where shorter wins, that is the rule
    low, _ = preference.bootstrap_gain_ci(judged.deltas, gaps, judged.targets, judged.prompts)
    if not math.isnan(low):  # over a single prompt
        figures["length_gain_low"] = low
    found, left_out = _probes(reward or scorer, rows, scores, fits) if probes else ({}, {})
    bins = preference.reliability_bins(raw.deltas, raw.targets)
    return RewardCheck(figures, judged.groups(), found, left_out, bins, judged)


def within(tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Fits:
    """Whether a prompt with a completion is at most `limit` tokens; None is no limit."""

    def fits(prompt: Any, completion: Any) -> bool:
        row = {"prompt": prompt, "completions": [completion]}
        return limit is None or longest(tokenise_row(row, tokenizer)) <= limit

    return fits


def fitting(rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Dataset:
    """The rows of which every completion fits into `limit` tokens with its prompt; says how many do not."""
    fits = within(tokenizer, limit)
    kept = rows.filter(lambda row: all(fits(row["prompt"], text) for text in row["completions"]), desc="Measuring")
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} of {len(rows)} rows left out: over {limit} tokens")
    if not len(kept):
        raise UserError(f"check_reward: every row is over {limit} tokens.")
    return kept


def _score_all(scorer: Scorer, rows: list[dict[str, Any]]) -> list[list[float]]:
    flat = scorer(
        [row["prompt"] for row in rows for _ in row["completions"]], [c for row in rows for c in row["completions"]]
    )
    if lost := int((~np.isfinite(np.array(flat, float))).sum()):
        raise UserError(
            f"check_reward: {lost} of {len(flat)} scores are not finite: the model has diverged, train it again with a "
            "lower learning rate."
        )
    ends = np.cumsum([len(row["completions"]) for row in rows])
    return [flat[end - len(row["completions"]) : end] for row, end in zip(rows, ends.tolist(), strict=True)]


def judged_pairs(
    rows: list[dict[str, Any]], scores: list[list[float]], length: Callable[[str], int]
) -> preference.JudgedPairs:
    """Comparison rows with their K scores each."""
    found = []
    for number, (row, score) in enumerate(zip(rows, scores, strict=True)):
        words = [length(plain_text(completion)) for completion in row["completions"]]
        margins = row.get("margins") or [0.0] * len(row["pairs"])
        weights = row.get("weights") or [1 / len(row["pairs"])] * len(row["pairs"])
        judged = zip(row["pairs"], row["targets"], weights, margins, strict=True)
        found += [(score[i], score[j], t, w, m, words[i] - words[j], number) for (i, j), t, w, m in judged]
    categories = [row.get("category") or "" for row in rows for _ in row["pairs"]]
    columns = [np.array(column, float) for column in zip(*found, strict=True)]
    return preference.JudgedPairs(*columns, np.array(categories, str))


def _probes(
    scorer: Scorer, rows: list[dict[str, Any]], scores: list[list[float]], fits: Fits | None
) -> tuple[dict[str, float], dict[str, int]]:
    """For each probe its share of wins (none where all are too long), and how many were too long (if any)."""
    asked, texts, best = [], [], []
    for row, score in zip(rows, scores, strict=True):
        decided = [(i if t > 0.5 else j) for (i, j), t in zip(row["pairs"], row["targets"], strict=True) if t != 0.5]
        if decided:
            asked.append(row["prompt"])
            texts.append(plain_text(row["completions"][decided[0]]))
            best.append(score[decided[0]])
    found, left_out = {}, {}
    for name, make in PROBES.items():
        made = [make(_last_words(prompt), text) for prompt, text in zip(asked, texts, strict=True)]
        answers = [
            a if isinstance(p, str) else [{"role": "assistant", "content": a}] for p, a in zip(asked, made, strict=True)
        ]
        tried = [(p, a, b) for p, a, b in zip(asked, answers, best, strict=True) if fits is None or fits(p, a)]
        if len(tried) < len(asked):
            left_out[name] = len(asked) - len(tried)
        if tried:
            prompts, answers, beaten = map(list, zip(*tried, strict=True))
            found[name] = float(np.mean(np.array(scorer(prompts, answers)) > np.array(beaten)))
    return found, left_out


def _last_words(prompt: Any) -> str:
    """What the user said last."""
    return prompt if isinstance(prompt, str) else plain_text(prompt[-1:])
