"""What comparisons are worth before a reward model is trained on them: one report of metrics with their meaning."""

import json
import math
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, config
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from ..data.schema import PreferenceDataError
from . import agreement
from .duplicates import near_duplicates, question_of
from .tally import Tally, reasons_for_gaps

MEANINGS = {
    "prompts": "what a reward model learns from: a few hundred are rarely enough, a few thousand are",
    "pairs": "number of judgements; pairs of one prompt share its weight",
    "prompt_words": "median and 95th percentile: compare with max_length (Chinese and Japanese: characters)",
    "completion_words": "median and 95th percentile",
    "near_duplicate_prompts": "share of prompts (system texts aside) almost equal to an earlier one: less data",
    "leaked_prompts": "share of held-out prompts that are (almost) in the training rows: they inflate held-out metrics",
    "contradictions": "share of pairs with opposite answers: noise that no model can learn",
    "intransitive_triples": "share of fully judged triples that form a circle; random judgements give 0.25",
    "ties": "share of judgements without a winner: they teach the model what does not matter",
    "longer_wins": "share of decided pairs won by the longer side: far from 0.5, the model can score by length",
    "length_only_accuracy": "accuracy of counting characters: a useful reward model is more accurate",
    "first_wins": "share of decided pairs won by the side shown first: far from 0.5, people judged by position",
    "refusals": "share of completions that decline: a model may learn that refusing is good, or bad",
    "empty_completions": "completions without text, which are kept and flagged: harmless if there are few",
    "languages": "share of the most frequent languages in a sample of prompts",
    "agreement": "share of judgement pairs of an item that are equal; with ties, three ways to differ",
    "cohen_kappa": "agreement beyond chance, mean over pairs of annotators: under 0.4 is weak, over 0.6 good",
    "fleiss_kappa": "the same for all annotators at once",
    "krippendorff_alpha": "the same where not everybody judged everything: under 0.67 no firm conclusions",
    "annotators": "each one's agreement with the majority of the others, lowest first: check those",
    "label_noise": "estimated share of wrong single judgements",
    "accuracy_ceiling": "1 - noise: no model can be expected to have a higher held-out accuracy on such labels",
}
"""What each metric means for training, in one line."""

VOTE_METRICS = ("agreement", "cohen_kappa", "fleiss_kappa", "krippendorff_alpha", "annotators")

_CACHE_VERSION = 3  # of the stored report: raised when its fields or their meaning change
_CACHED_FROM_ROWS = 10_000
_BAR_FROM_ROWS = 5000
_FEW_REPEATS = 20  # pairs of judgements below which the label noise is not estimated
_SHOWN_SHARES = 8  # annotators or languages in one table cell


@dataclass
class QualityReport:
    """Metrics by name (`MEANINGS` explains each; None where the data cannot tell) and what the plots show."""

    source: str
    metrics: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)
    """Metric -> why it has no value."""
    histograms: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Title -> `edges` (N + 1) and `counts` (N) of the bins."""

    @property
    def figures(self) -> dict[str, Any]:
        """The same as `metrics`, under its earlier name."""
        return self.metrics

    @property
    def verdict(self) -> str:
        """One line: can these labels carry a reward model?"""
        n_prompts = self.metrics["prompts"]
        noise = self.metrics["label_noise"]
        by_length = self.metrics["length_only_accuracy"]
        leaked = self.metrics["leaked_prompts"]
        doubts = []
        if n_prompts == 1:
            doubts.append("one prompt is not enough")
        elif n_prompts < 500:
            doubts.append(f"{n_prompts} prompts are few")
        if noise is not None and noise > 0.25:
            doubts.append(f"about {noise:.0%} of the labels are wrong")
        if by_length is not None and by_length > 0.65:
            doubts.append(f"length alone reaches {by_length:.2f}")
        if leaked is not None and leaked > 0.01:
            doubts.append(f"{leaked:.1%} of the held-out prompts leak")
        if doubts:
            return "Doubtful: " + "; ".join(doubts) + "."
        return "Nothing here speaks against training."

    def add(self, metrics: dict[str, Any], notes: dict[str, str]) -> None:
        """Adds metrics, and reasons for those that have no value."""
        self.metrics.update(metrics)
        self.notes.update(notes)

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """(metric, value as text, meaning or why there is no value), for a table."""
        for name, meaning in MEANINGS.items():
            value = self.metrics[name]
            explanation = meaning
            if value is None:
                explanation = self.notes.get(name, meaning)
            yield name.replace("_", " "), _value_as_text(value), explanation


def quality_report(
    dataset: Dataset,
    heldout: Dataset | None = None,
    *,
    source: str = "",
    seed: int = 0,
    order_known: bool | None = None,
) -> QualityReport:
    """Measures comparison rows (`load_comparisons`).

    Near duplicates share 0.8 of their word triples or more (MinHash, Broder 1997). Label noise is measured on votes.
    Where no annotator is named, equal rows of a source may be copies and count once (`schema.group_by_prompt`), so that
    only a row that judges a pair repeatedly is evidence. The report of more than 10,000 rows is kept in the cache of
    `datasets`: a second call is instant.

    Args:
        heldout: rows to look for leaks in.
        order_known: the first side of each pair is the one that people saw first (`LoadReport.order_known`); without
            that there is no `first_wins`.

    Raises:
        PreferenceDataError: no rows, or rows that are no comparisons.
    """
    if not isinstance(dataset, Dataset) or not len(dataset) or "pairs" not in dataset.column_names:
        columns = getattr(dataset, "column_names", None) or ()
        what = ", ".join(columns) or type(dataset).__name__
        raise PreferenceDataError(f"{source or 'quality_report'}: no comparison rows ({what}): use load_comparisons.")
    if heldout is not None and not len(heldout):
        heldout = None  # no rows: the same as none given
    order_known = bool(order_known)
    if len(dataset) <= _CACHED_FROM_ROWS:
        return _measure(dataset, heldout, source, seed, order_known)

    cached = _cache_file(dataset, heldout, source, seed, order_known)
    if cached.is_file():
        return QualityReport(**json.loads(cached.read_text()))
    report = _measure(dataset, heldout, source, seed, order_known)
    cached.parent.mkdir(parents=True, exist_ok=True)
    # Written under this process's own name and then renamed: another process never reads half a report.
    unfinished = cached.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(vars(report), allow_nan=False))
    unfinished.replace(cached)
    return report


def _cache_file(
    dataset: Dataset,
    heldout: Dataset | None,
    source: str,
    seed: int,
    order_known: bool,
) -> Path:
    fingerprints = [dataset._fingerprint]
    if heldout is not None:
        fingerprints.append(heldout._fingerprint)
    key = Hasher.hash(("quality", _CACHE_VERSION, fingerprints, source, seed, order_known))
    return Path(config.HF_DATASETS_CACHE) / "hf_rlhf_ext" / f"{key}.json"


def _measure(
    dataset: Dataset,
    heldout: Dataset | None,
    source: str,
    seed: int,
    order_known: bool,
) -> QualityReport:
    tally = Tally()
    for row in tqdm(dataset, desc="comparisons", disable=len(dataset) < _BAR_FROM_ROWS):
        tally.add(row)
    report = QualityReport(source, metrics=dict.fromkeys(MEANINGS))
    report.add(tally.metrics(order_known), reasons_for_gaps(order_known))
    report.add(*_prompt_metrics(tally.prompts, heldout, seed))

    votes = tally.votes()
    report.add(*vote_metrics(votes, list(tally.annotators)))

    # Two who call a tie agree, but say nothing about how often a winner is named wrongly.
    decided = votes.labels != 0.5
    decided_votes = agreement.votes_of(votes.items[decided], votes.annotators[decided], votes.labels[decided])
    report.add(*_noise_metrics(decided_votes, tally.repeats, has_copies=tally.n_rows_with_copies > 0))

    report.histograms = tally.histograms()
    return report


def _prompt_metrics(prompts: list[str], heldout: Dataset | None, seed: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Near duplicates, leaks and languages of the prompts, and why one that is None or missing has no value."""
    notes = {}
    n_near, index = near_duplicates(prompts)
    metrics: dict[str, Any] = {"near_duplicate_prompts": n_near / len(prompts)}
    if heldout is None:
        notes["leaked_prompts"] = "no held-out rows were given"
    else:
        n_leaked = sum(index.holds(question_of(prompt)) for prompt in heldout["prompt"])
        metrics["leaked_prompts"] = n_leaked / len(heldout)

    # A sample is enough for shares, and keeps a large set fast.
    sample = random.Random(seed).sample(prompts, min(500, len(prompts)))
    metrics["languages"] = languages(sample) or None
    notes["languages"] = "no prompt has text"
    return metrics, notes


def vote_metrics(votes: agreement.Votes, names: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Agreement of annotators with these names, and why a metric that is None or missing has no value."""
    if not len(votes.labels):
        return {}, dict.fromkeys(VOTE_METRICS, _why_no_votes(names))
    # Chance-corrected agreement is undefined (NaN) where only one label was ever given.
    notes = dict.fromkeys(VOTE_METRICS, "all votes are equal: nothing is left to chance")
    notes["annotators"] = "no pair has a majority"
    notes["cohen_kappa"] = "no two share five pairs, or their votes are equal"

    metrics: dict[str, Any] = {
        "agreement": agreement.percent_agreement(votes),
        "cohen_kappa": agreement.mean_cohen_kappa(votes),
        "fleiss_kappa": agreement.fleiss_kappa(votes),
        "krippendorff_alpha": agreement.krippendorff_alpha(votes),
    }
    for name, value in metrics.items():
        if math.isnan(value):
            metrics[name] = None

    ranking = []
    for annotator, (share, _) in agreement.agreement_with_rest(votes).items():
        ranking.append((share, names[annotator]))
    lowest_first = {name: share for share, name in sorted(ranking)}
    metrics["annotators"] = lowest_first or None
    return metrics, notes


def _why_no_votes(names: list[str]) -> str:
    if len(names) > 1:
        return "no pair has votes of two annotators"
    if names:
        return "one annotator only"
    return "the source has no single votes"


def _noise_metrics(
    votes: agreement.Votes, repeats: list[tuple[int, int]], *, has_copies: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Label noise and its ceiling, from how often two decided judgements of one pair agree; or why there are none.

    Args:
        votes: decided votes, which are used if there are any.
        repeats: how often each side of a pair won, used otherwise.
        has_copies: some rows were left out as copies.
    """
    n_equal, n_all = agreement.agreeing_pairs(votes)
    from_votes = n_all > 0
    if not from_votes:
        n_equal, n_all = agreement.agreeing(np.array(repeats).reshape(-1, 2))

    why_not = None
    if not n_all:
        why_not = "needs pairs that were judged more than once"
    elif not from_votes and (has_copies or not n_equal):
        # Agreeing judgements were counted once as copies, so only the contradictions would be left.
        why_not = "equal rows may be copies and count once: needs `votes` that name the annotator"
    elif n_all < _FEW_REPEATS:
        why_not = f"{n_all} repeated judgements are too few"
    if why_not:
        return {}, {"label_noise": why_not, "accuracy_ceiling": why_not}
    noise = agreement.flip_rate(n_equal / n_all)
    return {"label_noise": noise, "accuracy_ceiling": 1 - noise}, {}


def languages(sample: list[str]) -> dict[str, float]:
    """Shares of the five most frequent languages (py3langid), of a sample."""
    import py3langid

    counts: Counter[str] = Counter()
    for prompt in sample:
        if prompt.strip():
            counts[py3langid.classify(prompt)[0]] += 1
    return {name: count / counts.total() for name, count in counts.most_common(5)}


def _value_as_text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict) and "share" in value:
        low, high = value["ci95"]
        return f"{value['share']:.3f} ({low:.3f} to {high:.3f})"
    if isinstance(value, dict):
        shares = [f"{name} {share:.2f}" for name, share in value.items()]
        if len(shares) > _SHOWN_SHARES:
            shares = shares[:_SHOWN_SHARES] + ["…"]
        return ", ".join(shares)
    if isinstance(value, list):
        return ", ".join(f"{entry:g}" for entry in value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}"
