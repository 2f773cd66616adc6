"""What comparisons are worth before a reward model is trained on them: one report, each figure with its meaning."""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, config
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from ..metrics import agreement
from ..metrics.preference import bootstrap_mean_ci
from .schema import Comparison
from .text import plain_text, text_key

MEANINGS = {
    "prompts": "what a reward model learns from: a few hundred rarely carry one, a few thousand do",
    "pairs": "judgements in all; pairs of one prompt share its weight",
    "prompt_words": "median and 95th percentile: compare with max_length",
    "completion_words": "median and 95th percentile",
    "near_duplicate_prompts": "share of prompts almost equal to an earlier one: less data than the count says",
    "leaked_prompts": "share of held-out prompts that are (almost) in the training rows: they flatter held-out figures",
    "contradictions": "share of repeatedly judged pairs with opposite answers: noise that no model can learn",
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
    "annotators": "each annotator's agreement with the majority of the others: the lowest are worth a look",
    "label_noise": "estimated share of wrong single judgements",
    "accuracy_ceiling": "1 - noise: held-out accuracy on such labels cannot be expected above it",
}
"""One line a figure: what it means for training."""

_REFUSAL = re.compile(
    r"\b(i(?:'m| am) sorry,? but|i (?:can(?:no|')t|won't|am unable to) (?:help|assist|provide|do that|answer|comply)"
    r"|as an ai(?: language)? model|i(?:'m| am) not able to)",
    re.IGNORECASE,
)


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
            doubts.append(f"{f['prompts']} prompts are few")
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
    dataset: Dataset, heldout: Dataset | None = None, *, source: str = "", seed: int = 0
) -> QualityReport:
    """Measures comparison rows (`load_comparisons`); `heldout` are rows to look for leaks in.

    Near duplicates share at least 0.8 of their word triples (MinHash, Broder 1997). The report of more than 10,000 rows
    is kept in the data sets cache, so that a second call is instant.
    """
    prints = [data._fingerprint for data in (dataset, heldout) if data is not None]
    key = Hasher.hash(("quality", 1, prints, source, seed))
    cached = Path(config.HF_DATASETS_CACHE) / "hf_rlhf_ext" / f"{key}.json"
    if len(dataset) > 10_000 and cached.is_file():
        return QualityReport(**json.loads(cached.read_text()))
    report = _measure(dataset, heldout, source, seed)
    if len(dataset) > 10_000:
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.with_suffix(".tmp").write_text(json.dumps(vars(report)))
        cached.with_suffix(".tmp").replace(cached)
    return report


def _measure(dataset: Dataset, heldout: Dataset | None, source: str, seed: int) -> QualityReport:
    tally = _Tally()
    for row in tqdm(dataset, desc="comparisons", disable=len(dataset) < 5000):
        tally.add(row)
    report = QualityReport(source, dict.fromkeys(MEANINGS))
    report.figures |= tally.figures()
    report.notes |= tally.notes
    prompts = tally.prompts
    near, index = near_duplicates(prompts)
    report.figures["near_duplicate_prompts"] = near / len(prompts)
    if heldout is None:
        report.notes["leaked_prompts"] = "no held-out rows were given"
    else:
        report.figures["leaked_prompts"] = sum(index.holds(plain_text(p)) for p in heldout["prompt"]) / len(heldout)
    report.figures["languages"] = languages(random.Random(seed).sample(prompts, min(500, len(prompts))))
    report.figures |= vote_figures(tally.votes, report.notes)
    _estimate_noise(report)
    report.histograms = tally.histograms()
    return report


class _Tally:
    """One pass over the rows."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.notes: dict[str, str] = {}
        self.votes: dict[tuple, dict[str, float]] = {}
        self.counts: Counter[str] = Counter()
        self._words: dict[str, list[int]] = {"prompt": [], "completion": []}
        self._gaps: list[int] = []
        self._longer: list[float] = []
        self._first: list[float] = []

    def add(self, row: Comparison) -> None:
        texts = [plain_text(completion) for completion in row["completions"]]
        self.prompts.append(plain_text(row["prompt"]))
        self._words["prompt"].append(len(self.prompts[-1].split()))
        self._words["completion"] += [len(text.split()) for text in texts]
        self.counts["empty"] += sum(not text.strip() for text in texts)
        self.counts["refusals"] += sum(bool(_REFUSAL.search(text[:300])) for text in texts)
        self.counts["pairs"] += len(row["pairs"])
        answers: dict[tuple[int, int], list[float]] = {}
        for (i, j), target in zip(row["pairs"], row["targets"], strict=True):
            answers.setdefault((min(i, j), max(i, j)), []).append(target if i < j else 1 - target)
            if target == 0.5:
                self.counts["ties"] += 1
                continue
            won, lost = (i, j) if target > 0.5 else (j, i)
            self._first.append(float(target > 0.5))
            self._gaps.append(len(texts[won].split()) - len(texts[lost].split()))
            if len(texts[i]) != len(texts[j]):
                self._longer.append(float(len(texts[won]) > len(texts[lost])))
        self._repeated(answers)
        self._triples({pair: np.mean(targets) for pair, targets in answers.items()}, len(texts))
        for vote in row.get("votes") or ():
            i, j = vote["pair"]
            label = vote["label"] if i < j else 1 - vote["label"]
            item = (len(self.prompts), min(i, j), max(i, j))
            self.votes.setdefault(item, {})[vote["annotator"]] = label

    def _repeated(self, answers: dict[tuple[int, int], list[float]]) -> None:
        for targets in answers.values():
            decided = [target > 0.5 for target in targets if target != 0.5]
            if len(decided) > 1:
                self.counts["repeated"] += 1
                self.counts["contradicted"] += len(set(decided)) > 1

    def _triples(self, target: dict[tuple[int, int], float], n: int) -> None:
        for i, j, k in combinations(range(n), 3):
            sides = [target.get(pair) for pair in ((i, j), (j, k), (i, k))]
            if None in sides or 0.5 in sides:
                continue
            self.counts["triples"] += 1
            ij, jk, ik = (side > 0.5 for side in sides)
            self.counts["circles"] += ij == jk != ik

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

    def figures(self) -> dict[str, Any]:
        n, longer = self.counts, _share(self._longer)
        by_position = len(set(self._first)) > 1  # `chosen` is always first: the order that people saw is lost
        if not by_position:
            self.notes["first_wins"] = "the order of presentation is not known"
        for name, needs in (("contradictions", "repeated"), ("intransitive_triples", "triples")):
            if not n[needs]:
                self.notes[name] = "no pair was judged twice" if needs == "repeated" else "no triple was judged in full"
        return {
            "prompts": len(self.prompts),
            "pairs": n["pairs"],
            "prompt_words": _middle_and_tail(self._words["prompt"]),
            "completion_words": _middle_and_tail(self._words["completion"]),
            "contradictions": n["contradicted"] / n["repeated"] if n["repeated"] else None,
            "intransitive_triples": n["circles"] / n["triples"] if n["triples"] else None,
            "ties": n["ties"] / n["pairs"],
            "longer_wins": longer,
            "length_only_accuracy": max(longer["share"], 1 - longer["share"]) if longer else None,
            "first_wins": _share(self._first) if by_position else None,
            "refusals": n["refusals"] / len(self._words["completion"]),
            "empty_completions": n["empty"],
        }


def vote_figures(votes: dict[tuple, dict[str, float]], notes: dict[str, str]) -> dict[str, Any]:
    """Agreement figures from item -> annotator -> label; `notes` says why there are none."""
    names = sorted({name for item in votes.values() for name in item})
    if len(names) < 2:
        reason = "one annotator only" if names else "the source has no single votes"
        notes |= dict.fromkeys(("agreement", "cohen_kappa", "fleiss_kappa", "krippendorff_alpha", "annotators"), reason)
        return {}
    labels = np.array([[item.get(name, np.nan) for name in names] for item in votes.values()])
    rest = agreement.agreement_with_rest(labels)
    found = {
        "agreement": agreement.percent_agreement(labels),
        "cohen_kappa": agreement.mean_cohen_kappa(labels),
        "fleiss_kappa": agreement.fleiss_kappa(labels),
        "krippendorff_alpha": agreement.krippendorff_alpha(labels),
    }
    found = {name: None if math.isnan(value) else value for name, value in found.items()}
    decided = np.where(labels == 0.5, np.nan, labels)
    found["_decided_agreement"] = agreement.percent_agreement(decided)
    return found | {"annotators": {n: float(s) for n, s in zip(names, rest, strict=True) if not math.isnan(s)} or None}


def _estimate_noise(report: QualityReport) -> None:
    """From how often two judgements of one pair agree: votes where there are some, else repeated pairs."""
    figures = report.figures
    agreed = figures.pop("_decided_agreement", float("nan"))
    if math.isnan(agreed) and figures["contradictions"] is not None:
        agreed = 1 - figures["contradictions"]
    if math.isnan(agreed):
        why = "needs pairs that were judged more than once"
        report.notes |= {"label_noise": why, "accuracy_ceiling": why}
        return
    figures["label_noise"] = agreement.flip_rate(agreed)
    figures["accuracy_ceiling"] = 1 - figures["label_noise"]


class _PromptIndex:
    """Prompts seen so far, exact and near."""

    def __init__(self) -> None:
        from datasketch import MinHash, MinHashLSH

        self._exact: set[str] = set()
        self._near = MinHashLSH(threshold=0.8, num_perm=64)
        self._empty = MinHash(num_perm=64, seed=1)

    def holds(self, prompt: str, *, add: bool = False) -> bool:
        key = text_key(prompt).lower()
        if key in self._exact:
            return True
        words = key.split()
        triples = {" ".join(words[k : k + 3]).encode() for k in range(max(1, len(words) - 2))}
        sketch = self._empty.copy()
        sketch.update_batch(list(triples))
        found = len(words) > 3 and bool(self._near.query(sketch))  # of a few words a sketch says nothing
        if add:
            self._exact.add(key)
            self._near.insert(str(len(self._exact)), sketch, check_duplication=False)
        return found


def near_duplicates(prompts: list[str]) -> tuple[int, _PromptIndex]:
    """How many prompts are (almost) equal to an earlier one, and the index of all."""
    index = _PromptIndex()
    shown = tqdm(prompts, desc="near duplicates", disable=len(prompts) < 5000)
    return sum(index.holds(prompt, add=True) for prompt in shown), index


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
    half = 1.96 * float(np.std(values)) / math.sqrt(len(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def _middle_and_tail(values: list[int]) -> list[float]:
    return [float(q) for q in np.quantile(values, (0.5, 0.95))]


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict) and "share" in value:
        return f"{value['share']:.3f} ({value['ci95'][0]:.3f} to {value['ci95'][1]:.3f})"
    if isinstance(value, dict):
        return ", ".join(f"{name} {share:.2f}" for name, share in list(value.items())[:8])
    if isinstance(value, list):
        return ", ".join(f"{v:g}" for v in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
