"""What comparisons are worth before a reward model is trained on them: one report, each figure with its meaning."""

import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, config
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from ..metrics import agreement
from ..metrics.preference import bootstrap_mean_ci
from .duplicates import near_duplicates, question_of, words_of
from .schema import Comparison, PreferenceDataError
from .text import plain_text

MEANINGS = {
    "prompts": "what a reward model learns from: a few hundred rarely carry one, a few thousand do",
    "pairs": "judgements in all; pairs of one prompt share its weight",
    "prompt_words": "median and 95th percentile: compare with max_length (Chinese and Japanese: characters)",
    "completion_words": "median and 95th percentile",
    "near_duplicate_prompts": "share of prompts (system texts aside) almost equal to an earlier one: less data",
    "leaked_prompts": "share of held-out prompts that are (almost) in the training rows: they flatter held-out figures",
    "contradictions": "share of pairs with opposite answers: noise that no model can learn",
    "intransitive_triples": "share of fully judged triples that go round in a circle; coin tosses give 0.25",
    "ties": "share of judgements without a winner: they teach the model what does not matter",
    "longer_wins": "share of decided pairs won by the longer side: far from 0.5, the model can score by length",
    "length_only_accuracy": "what counting characters reaches: a reward model must beat it to be worth its name",
    "first_wins": "share of decided pairs won by the side shown first: far from 0.5, people judged by position",
    "refusals": "share of completions that decline: a model may learn that refusing is good, or bad",
    "empty_completions": "completions without text: kept and flagged; harmless in a handful",
    "languages": "share of the most frequent languages in a sample of prompts",
    "agreement": "share of judgement pairs of an item that are equal; with ties, three ways to differ",
    "cohen_kappa": "agreement beyond chance, mean over pairs of annotators: under 0.4 is weak, over 0.6 good",
    "fleiss_kappa": "the same for all annotators at once",
    "krippendorff_alpha": "the same where not everybody judged everything: under 0.67 nothing firm can be concluded",
    "annotators": "each one's agreement with the majority of the others, lowest first: these are worth a look",
    "label_noise": "estimated share of wrong single judgements",
    "accuracy_ceiling": "1 - noise: held-out accuracy on such labels cannot be expected above it",
}
"""One line a figure: what it means for training."""

_REFUSAL = re.compile(
    r"\b(i(?:['’]m| am) sorry,? but|i (?:can(?:no|['’])t|won['’]t|am unable to) (?:help|assist|provide|do that|answer"
    r"|comply)|as an ai(?: language)? model|i(?:['’]m| am) not able to)",
    re.IGNORECASE,
)
_FEW_REPEATS = 20  # pairs of judgements under which a label noise is not worth a figure


@dataclass
class QualityReport:
    """Figures by name (`MEANINGS` explains each; None where the data cannot tell) and what the plots show."""

    source: str
    figures: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)
    histograms: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Title -> `edges` (N + 1) and `counts` (N) of the bins."""

    @property
    def verdict(self) -> str:
        """One line: can these labels carry a reward model?"""
        f, doubts = self.figures, []
        if f["prompts"] < 500:
            doubts.append(f"{f['prompts']} prompts are few" if f["prompts"] > 1 else "one prompt is not enough")
        if f["label_noise"] is not None and f["label_noise"] > 0.25:
            doubts.append(f"about {f['label_noise']:.0%} of the labels are wrong")
        if f["length_only_accuracy"] is not None and f["length_only_accuracy"] > 0.65:
            doubts.append(f"length alone reaches {f['length_only_accuracy']:.2f}")
        if (f["leaked_prompts"] or 0) > 0.01:
            doubts.append(f"{f['leaked_prompts']:.1%} of the held-out prompts leak")
        return "Doubtful: " + "; ".join(doubts) + "." if doubts else "Nothing here speaks against training."

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """(figure, value as text, meaning or why there is no value), for a table."""
        for name, meaning in MEANINGS.items():
            value = self.figures[name]
            yield name.replace("_", " "), _shown(value), self.notes.get(name, meaning) if value is None else meaning


def quality_report(
    dataset: Dataset,
    heldout: Dataset | None = None,
    *,
    source: str = "",
    seed: int = 0,
    order_known: bool | None = None,
) -> QualityReport:
    """Measures comparison rows (`load_comparisons`).

    Near duplicates share 0.8 of their word triples or more (MinHash, Broder 1997). Label noise is measured on votes;
    where no annotator is named, equal rows of a source may be copies and count once (`schema.group_by_prompt`), so that
    only a row that judges a pair repeatedly tells. The report of more than 10,000 rows is kept in the data sets cache:
    a second call is instant.

    Args:
        heldout: rows to look for leaks in.
        order_known: the first side of each pair is the one that people saw first (`LoadReport.order_known`); without
            that there is no `first_wins`.

    Raises:
        PreferenceDataError: no rows, or rows that are no comparisons.
    """
    if not isinstance(dataset, Dataset) or not len(dataset) or "pairs" not in dataset.column_names:
        found = ", ".join(getattr(dataset, "column_names", None) or ()) or type(dataset).__name__
        raise PreferenceDataError(f"{source or 'quality_report'}: no comparison rows ({found}): use load_comparisons.")
    heldout = heldout if heldout is not None and len(heldout) else None
    prints = [data._fingerprint for data in (dataset, heldout) if data is not None]
    key = Hasher.hash(("quality", 2, prints, source, seed, bool(order_known)))
    cached = Path(config.HF_DATASETS_CACHE) / "hf_rlhf_ext" / f"{key}.json"
    if len(dataset) > 10_000 and cached.is_file():
        return QualityReport(**json.loads(cached.read_text()))
    report = _measure(dataset, heldout, source, seed, bool(order_known))
    if len(dataset) > 10_000:
        cached.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cached.with_suffix(f".{os.getpid()}.tmp")  # of this process alone
        unfinished.write_text(json.dumps(vars(report), allow_nan=False))
        unfinished.replace(cached)
    return report


def _measure(dataset: Dataset, heldout: Dataset | None, source: str, seed: int, order_known: bool) -> QualityReport:
    tally = _Tally()
    for row in tqdm(dataset, desc="comparisons", disable=len(dataset) < 5000):
        tally.add(row)
    report = QualityReport(source, dict.fromkeys(MEANINGS))
    report.figures |= tally.figures(order_known)
    report.notes |= tally.notes
    prompts = tally.prompts
    near, index = near_duplicates(prompts)
    report.figures["near_duplicate_prompts"] = near / len(prompts)
    if heldout is None:
        report.notes["leaked_prompts"] = "no held-out rows were given"
    else:
        report.figures["leaked_prompts"] = sum(index.holds(question_of(p)) for p in heldout["prompt"]) / len(heldout)
    report.figures["languages"] = languages(random.Random(seed).sample(prompts, min(500, len(prompts)))) or None
    report.notes["languages"] = "no prompt has text"
    votes = agreement.votes_of(tally.votes["item"], tally.votes["annotator"], tally.votes["label"])
    votes = votes._replace(labels=agreement.three_way(votes.labels))
    report.figures |= vote_figures(votes, list(tally.annotators), report.notes)
    decided = votes.labels != 0.5
    decided = agreement.votes_of(*(column[decided] for column in votes))
    _estimate_noise(report, agreement.agreeing_pairs(decided), tally.repeats, copies=bool(tally.counts["copies"]))
    report.histograms = tally.histograms()
    return report


class _Tally:
    """One pass over the rows."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.notes: dict[str, str] = {}
        self.annotators: dict[str, int] = {}
        self.votes: dict[str, list] = {"item": [], "annotator": [], "label": []}
        self.repeats: list[tuple[int, int]] = []
        """How often each side won, of pairs that were decided more than once."""
        self.counts: Counter[str] = Counter()
        self._words: dict[str, list[int]] = {"prompt": [], "completion": []}
        self._gaps: list[int] = []
        self._longer: list[float] = []
        self._first: list[float] = []

    def add(self, row: Comparison) -> None:
        texts = [plain_text(completion) for completion in row["completions"]]
        words = [len(words_of(text)) for text in texts]
        self.prompts.append(question_of(row["prompt"]))
        self._words["prompt"].append(len(words_of(plain_text(row["prompt"]))))
        self._words["completion"] += words
        self.counts["empty"] += sum(not text.strip() for text in texts)
        self.counts["refusals"] += sum(bool(_REFUSAL.search(text[:300])) for text in texts)
        self.counts["pairs"] += len(row["pairs"])
        self.counts["copies"] += "duplicated_row" in (row.get("flags") or ())
        answers: dict[tuple[int, int], list[float]] = {}
        for (i, j), target in zip(row["pairs"], row["targets"], strict=True):
            answers.setdefault((min(i, j), max(i, j)), []).append(target if i < j else 1 - target)
            if target == 0.5:
                self.counts["ties"] += 1
                continue
            won, lost = (i, j) if target > 0.5 else (j, i)
            self._first.append(float(target > 0.5))
            self._gaps.append(words[won] - words[lost])
            if len(texts[i]) != len(texts[j]):
                self._longer.append(float(len(texts[won]) > len(texts[lost])))
        self._repeated(answers)
        self._triples({pair: sum(targets) / len(targets) for pair, targets in answers.items()})
        self._vote(row.get("votes") or ())

    def _vote(self, votes: list[dict[str, Any]]) -> None:
        items: dict[tuple[int, int], int] = {}
        for vote in votes:
            if vote["annotator"] is None or vote["label"] is None:
                continue  # agreement is between people: it must be known who said what
            i, j = vote["pair"]
            self.votes["item"].append(self.counts["items"] + items.setdefault((min(i, j), max(i, j)), len(items)))
            name = str(vote["annotator"])
            self.votes["annotator"].append(self.annotators.setdefault(name, len(self.annotators)))
            self.votes["label"].append(vote["label"] if i < j else 1 - vote["label"])
        self.counts["items"] += len(items)

    def _repeated(self, answers: dict[tuple[int, int], list[float]]) -> None:
        self.counts["judged"] += len(answers)
        for targets in answers.values():
            first, second = (sum(side) for side in zip(*((t > 0.5, t < 0.5) for t in targets), strict=True))
            if first + second > 1:
                self.repeats.append((first, second))
                self.counts["contradicted"] += bool(first and second)

    def _triples(self, target: dict[tuple[int, int], float]) -> None:
        above: dict[int, dict[int, bool]] = {}  # i -> j > i that it was compared with -> whether i won
        for (i, j), mean in target.items():
            if mean != 0.5:
                above.setdefault(i, {})[j] = mean > 0.5
        for of_i in above.values():
            for j, ij in of_i.items():
                of_j = above.get(j, {})
                for k in of_i.keys() & of_j.keys():
                    self.counts["triples"] += 1
                    self.counts["circles"] += ij == of_j[k] != of_i[k]

    def histograms(self) -> dict[str, dict[str, list[float]]]:
        """The middle 98 % of each, so that one giant does not flatten the rest."""
        shown = {"words of a prompt": self._words["prompt"], "words of a completion": self._words["completion"]}
        shown |= {"words by which the winner is longer": self._gaps}
        binned = {}
        for title, values in shown.items():
            if values:
                counts, edges = np.histogram(np.clip(values, *np.quantile(values, (0.01, 0.99))), bins=30)
                binned[title] = {"edges": edges.tolist(), "counts": counts.tolist()}
        return binned

    def figures(self, order_known: bool) -> dict[str, Any]:
        n, longer = self.counts, _share(self._longer)
        self.notes |= {
            "first_wins": "no judgement has a winner" if order_known else "not known which side people saw first",
            "contradictions": "no pair was judged twice (equal rows count once)",
            "intransitive_triples": "no triple was judged in full",
        } | dict.fromkeys(("longer_wins", "length_only_accuracy"), "no winner is longer or shorter than its loser")
        return {
            "prompts": len(self.prompts),
            "pairs": n["pairs"],
            "prompt_words": _middle_and_tail(self._words["prompt"]),
            "completion_words": _middle_and_tail(self._words["completion"]),
            "contradictions": n["contradicted"] / n["judged"] if self.repeats else None,
            "intransitive_triples": n["circles"] / n["triples"] if n["triples"] else None,
            "ties": n["ties"] / n["pairs"],
            "longer_wins": longer,
            "length_only_accuracy": max(longer["share"], 1 - longer["share"]) if longer else None,
            "first_wins": _share(self._first) if order_known else None,
            "refusals": n["refusals"] / len(self._words["completion"]),
            "empty_completions": n["empty"],
        }


def vote_figures(votes: agreement.Votes, names: list[str], notes: dict[str, str]) -> dict[str, Any]:
    """Agreement figures of annotators with these names; `notes` says why there are none."""
    figures = ("agreement", "cohen_kappa", "fleiss_kappa", "krippendorff_alpha", "annotators")
    if not len(votes.labels):
        known = "one annotator only" if names else "the source has no single votes"
        notes |= dict.fromkeys(figures, "no pair has votes of two annotators" if len(names) > 1 else known)
        return {}
    notes |= dict.fromkeys(figures, "all votes are equal: nothing is left to chance")
    notes |= {
        "annotators": "no pair has a majority",
        "cohen_kappa": "no two share five pairs, or their votes are equal",
    }
    found = {
        "agreement": agreement.percent_agreement(votes),
        "cohen_kappa": agreement.mean_cohen_kappa(votes),
        "fleiss_kappa": agreement.fleiss_kappa(votes),
        "krippendorff_alpha": agreement.krippendorff_alpha(votes),
    }
    found = {name: None if math.isnan(value) else value for name, value in found.items()}
    rest = sorted((share, names[k]) for k, (share, _) in agreement.agreement_with_rest(votes).items())
    return found | {"annotators": {name: share for share, name in rest} or None}


def _estimate_noise(
    report: QualityReport, voted: tuple[int, int], repeats: list[tuple[int, int]], *, copies: bool
) -> None:
    """From how many decided judgements of one pair agree: `voted` are (equal, all) pairs of votes; else `repeats`."""
    equal, pairs = voted if voted[1] else agreement.agreeing(np.array(repeats).reshape(-1, 2))
    why = None
    if not pairs:
        why = "needs pairs that were judged more than once"
    elif not voted[1] and (copies or not equal):  # what is left are the quarrels
        why = "equal rows may be copies and count once: needs `votes` that name the annotator"
    elif pairs < _FEW_REPEATS:
        why = f"{pairs} repeated judgements are too few"
    if why:
        report.notes |= {"label_noise": why, "accuracy_ceiling": why}
        return
    report.figures["label_noise"] = agreement.flip_rate(equal / pairs)
    report.figures["accuracy_ceiling"] = 1 - report.figures["label_noise"]


def languages(sample: list[str]) -> dict[str, float]:
    """Shares of the five most frequent languages (py3langid), of a sample."""
    import py3langid

    found = Counter(py3langid.classify(prompt)[0] for prompt in sample if prompt.strip())
    return {name: count / found.total() for name, count in found.most_common(5)}


def _share(values: list[float]) -> dict[str, Any] | None:
    """Mean of 0/1 values with its 95 % interval."""
    return {"share": float(np.mean(values)), "ci95": list(_interval(values))} if values else None


def _interval(values: list[float]) -> tuple[float, float]:
    if len(values) <= 2000:
        return bootstrap_mean_ci(values)
    mean, half = float(np.mean(values)), 1.96 * float(np.std(values)) / math.sqrt(len(values))
    return max(0.0, mean - half), min(1.0, mean + half)


def _middle_and_tail(values: list[int]) -> list[float]:
    return [float(q) for q in np.quantile(values, (0.5, 0.95))]


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict) and "share" in value:
        return f"{value['share']:.3f} ({value['ci95'][0]:.3f} to {value['ci95'][1]:.3f})"
    if isinstance(value, dict):
        shown = [f"{name} {share:.2f}" for name, share in value.items()]
        return ", ".join(shown[:8] + ["…"] * (len(shown) > 8))
    if isinstance(value, list):
        return ", ".join(f"{v:g}" for v in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
