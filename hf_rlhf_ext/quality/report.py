"""Quality report on comparisons, to read before a reward model is trained on them."""

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

from ..data.schema import LoadReport, PreferenceDataError
from . import agreement
from .duplicates import near_duplicates, question_of
from .packages import data_package
from .tally import Tally, reasons_for_gaps

MEANINGS = {
    "prompts": "number of prompts; a few hundred are rarely enough for a reward model, a few thousand are",
    "pairs": "number of judgments; the pairs of one prompt share its weight",
    "prompt_words": "words per prompt, median and 95th percentile; compare with max_length (Chinese and Japanese: "
    "characters)",
    "completion_words": "words per completion, median and 95th percentile",
    "near_duplicate_prompts": "share of prompts that nearly equal an earlier prompt (without system messages); they "
    "add little data",
    "leaked_prompts": "share of held-out prompts that also occur (nearly) in the training rows; they inflate held-out "
    "metrics",
    "contradictions": "share of pairs that were judged both ways; a model cannot learn this noise",
    "intransitive_triples": "share of fully judged triples with a cycle (a over b, b over c, c over a); random "
    "judgments give 0.25",
    "ties": "share of judgments without a winner; they teach the model which differences do not matter",
    "longer_wins": "share of decided pairs won by the longer completion; far from 0.5, a model can score by length",
    "length_only_accuracy": "accuracy of choosing by the number of characters; a useful reward model is more accurate",
    "first_wins": "share of decided pairs won by the completion shown first; far from 0.5, annotators judged by "
    "position",
    "refusals": "share of completions that refuse to answer; a model may learn to prefer or to avoid refusals",
    "empty_completions": "number of completions without text, which are kept and flagged; a few are harmless",
    "languages": "shares of the most frequent languages in a sample of prompts",
    "agreement": "share of equal judgments among all pairs of judgments of one item; a tie is a third answer",
    "cohen_kappa": "agreement beyond chance, mean over pairs of annotators; below 0.4 is weak, above 0.6 is good",
    "fleiss_kappa": "agreement beyond chance of all annotators together",
    "krippendorff_alpha": "agreement beyond chance if not everybody judged every item; below 0.67, draw no firm "
    "conclusions",
    "annotators": "agreement of each annotator with the majority of the others, lowest first; check the lowest",
    "label_noise": "estimated share of single judgments that are wrong",
    "accuracy_ceiling": "1 - label noise; held-out accuracy on these labels is not expected to be higher",
}
"""Meaning of each metric for training, in one line."""

VOTE_METRICS = ("agreement", "cohen_kappa", "fleiss_kappa", "krippendorff_alpha", "annotators")

_CACHE_VERSION = 4  # version of the stored report; increase it when fields or their meaning change
_CACHED_FROM_ROWS = 10_000
_BAR_FROM_ROWS = 5000
_MANY_CONTRADICTIONS = 0.1
_MANY_TIES = 0.5
_FEW_REPEATS = 20  # with fewer pairs of judgments, label noise is not estimated
_SHOWN_SHARES = 8  # annotators or languages shown in one table cell


@dataclass
class QualityReport:
    """Result of `quality_report`.

    Attributes:
        source: Name of the dataset.
        metrics: Value of each metric by name. It is None if the data does not determine it. `MEANINGS` explains all
            metrics.
        notes: Metric -> reason why it has no value.
        histograms: Title -> `edges` (N + 1) and `counts` (N) of the bins.
        waived: Columns that looked as if they mattered, and that were not read because the user waived them.
    """

    source: str
    metrics: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)
    histograms: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    waived: list[str] = field(default_factory=list)

    @property
    def figures(self) -> dict[str, Any]:
        """Alias of `metrics`, its name in earlier versions."""
        return self.metrics

    @property
    def verdict(self) -> str:
        """One line that says whether the data is suited to train a reward model."""
        n_prompts = self.metrics["prompts"]
        noise = self.metrics["label_noise"]
        by_length = self.metrics["length_only_accuracy"]
        leaked = self.metrics["leaked_prompts"]
        contradictions = self.metrics["contradictions"]
        ties = self.metrics["ties"]
        doubts = []
        if n_prompts == 1:
            doubts.append("one prompt is not enough")
        elif n_prompts < 500:
            doubts.append(f"{n_prompts} prompts are few")
        if noise is not None and noise > 0.25:
            doubts.append(f"about {noise:.0%} of the labels are wrong")
        if by_length is not None and by_length > 0.65:
            doubts.append(f"length alone reaches {by_length:.2f}")
        # Where label noise is known, it says more: with many judgments per pair, some contradict each other.
        if noise is None and contradictions is not None and contradictions > _MANY_CONTRADICTIONS:
            doubts.append(f"{contradictions:.0%} of the pairs were judged both ways")
        if ties is not None and ties > _MANY_TIES:
            doubts.append(f"{ties:.0%} of the judgments are ties")
        if leaked is not None and leaked > 0.01:
            doubts.append(f"{leaked:.1%} of the held-out prompts are also in the training rows")
        if self.waived:
            shown = ", ".join(self.waived[:4])
            doubts.append(f"columns that may matter were ignored ({shown})")
        if doubts:
            return "Doubtful: " + "; ".join(doubts) + "."
        return "No problem found in the prompts and labels."

    def add(self, metrics: dict[str, Any], notes: dict[str, str]) -> None:
        """Adds metrics, and the reasons for those that have no value."""
        self.metrics.update(metrics)
        self.notes.update(notes)

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yields (metric, value as text, meaning or the reason why there is no value), for a table."""
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
    load_report: LoadReport | None = None,
) -> QualityReport:
    """Measures the quality of comparison rows: size, duplicates, leaks, bias, agreement and label noise.

    Two prompts are near duplicates if the Jaccard index of their word triples is at least 0.8 (estimated with MinHash,
    Broder 1997). Label noise is estimated from votes. Without annotator names, equal rows may be copies and count once,
    so that only rows that judge a pair repeatedly are used. The report on more than 10,000 rows is stored in the cache
    of `datasets`.

    Args:
        dataset: Comparison rows, as returned by `load_comparisons`.
        heldout: Held-out comparison rows, in which leaked prompts are counted.
        source: Name of the dataset, for the report and for messages.
        seed: Seed for the sample of prompts whose language is detected.
        order_known: Whether the first completion of each pair is the one that annotators saw first, as in
            `LoadReport.order_known`. Otherwise `first_wins` has no value. None takes it from `load_report`.
        load_report: Report of `load_comparisons`: for the name of the source, the order of the completions, and columns
            that were ignored, which the verdict mentions.

    Returns:
        A `QualityReport`. `report.verdict` is a one-line summary, and `report.rows()` is the table of metrics.

    Raises:
        PreferenceDataError: There are no rows, or the rows are not comparisons.
    """
    if not isinstance(dataset, Dataset) or not len(dataset) or "pairs" not in dataset.column_names:
        columns = getattr(dataset, "column_names", None) or ()
        what = ", ".join(columns) or type(dataset).__name__
        raise PreferenceDataError(
            f"{source or 'quality_report'}: these are not comparison rows ({what}): use load_comparisons."
        )
    if heldout is not None and not len(heldout):
        heldout = None  # an empty dataset counts as not given
    if load_report is not None:
        source = source or load_report.source
        order_known = load_report.order_known if order_known is None else order_known
    report = _cached_report(dataset, heldout, source, seed, bool(order_known))
    report.waived = load_report.waived if load_report is not None else []
    return report


def _cached_report(
    dataset: Dataset,
    heldout: Dataset | None,
    source: str,
    seed: int,
    order_known: bool,
) -> QualityReport:
    """Measures the rows, unless the report on as many rows is in the cache."""
    if len(dataset) <= _CACHED_FROM_ROWS:
        return _measure(dataset, heldout, source, seed, order_known)

    cached = _cache_file(dataset, heldout, source, seed, order_known)
    if cached.is_file():
        return QualityReport(**json.loads(cached.read_text()))
    report = _measure(dataset, heldout, source, seed, order_known)
    cached.parent.mkdir(parents=True, exist_ok=True)
    # Write to a file of this process and then rename it, so that other processes never read an incomplete report.
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

    # Ties count as agreement, but do not show how often the wrong winner is chosen.
    decided = votes.labels != 0.5
    decided_votes = agreement.votes_of(votes.items[decided], votes.annotators[decided], votes.labels[decided])
    report.add(*_noise_metrics(decided_votes, tally.repeats, has_copies=tally.n_rows_with_copies > 0))

    report.histograms = tally.histograms()
    return report


def _prompt_metrics(prompts: list[str], heldout: Dataset | None, seed: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns near duplicates, leaks and languages of the prompts, and the reasons for metrics without a value."""
    notes = {}
    n_near, index = near_duplicates(prompts)
    metrics: dict[str, Any] = {"near_duplicate_prompts": n_near / len(prompts)}
    if heldout is None:
        notes["leaked_prompts"] = "no held-out rows were given"
    else:
        n_leaked = sum(index.holds(question_of(prompt)) for prompt in heldout["prompt"])
        metrics["leaked_prompts"] = n_leaked / len(heldout)

    # A sample is enough for shares, and is fast for large datasets.
    sample = random.Random(seed).sample(prompts, min(500, len(prompts)))
    metrics["languages"] = languages(sample) or None
    notes["languages"] = "no prompt has text"
    return metrics, notes


def vote_metrics(votes: agreement.Votes, names: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the agreement of annotators with these names, and the reasons for metrics without a value."""
    if not len(votes.labels):
        return {}, dict.fromkeys(VOTE_METRICS, _why_no_votes(names))
    # Agreement beyond chance is undefined (NaN) if all votes have the same label.
    notes = dict.fromkeys(VOTE_METRICS, "undefined, since all votes are equal")
    notes["annotators"] = "no pair has a majority"
    notes["cohen_kappa"] = "no two annotators judged five pairs in common, or all their votes are equal"

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
        return "only one annotator"
    return "the source has no votes of single annotators"


def _noise_metrics(
    votes: agreement.Votes, repeats: list[tuple[int, int]], *, has_copies: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Estimates label noise and the accuracy ceiling from the agreement of decided judgments on one pair.

    Args:
        votes: Decided votes, which are used if there are any.
        repeats: How often each side of a pair won, used otherwise.
        has_copies: Whether rows were dropped as copies.

    Returns:
        The metrics, and the reasons if they have no value.
    """
    n_equal, n_all = agreement.agreeing_pairs(votes)
    from_votes = n_all > 0
    if not from_votes:
        n_equal, n_all = agreement.agreeing(np.array(repeats).reshape(-1, 2))

    why_not = None
    if not n_all:
        why_not = "needs pairs that were judged more than once"
    elif not from_votes and (has_copies or not n_equal):
        # Copies count once, so agreeing judgments are missing and contradictions would be overrated.
        why_not = "needs `votes` that name the annotator, since equal rows may be copies"
    elif n_all < _FEW_REPEATS:
        why_not = f"{n_all} repeated judgments are too few"
    if why_not:
        return {}, {"label_noise": why_not, "accuracy_ceiling": why_not}
    noise = agreement.flip_rate(n_equal / n_all)
    return {"label_noise": noise, "accuracy_ceiling": 1 - noise}, {}


def languages(sample: list[str]) -> dict[str, float]:
    """Returns the shares of the five most frequent languages (detected by py3langid) in a sample of prompts."""
    py3langid = data_package("py3langid")
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
