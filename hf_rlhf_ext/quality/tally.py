"""Counts made in one pass over comparison rows, for the quality report."""

import math
import re
from typing import Any

import numpy as np

from ..data.schema import Comparison
from ..data.text import plain_text
from ..reward.preference_metrics import bootstrap_mean_ci
from . import agreement
from .duplicates import question_of, words_of

_REFUSAL = re.compile(
    r"\b(i(?:['’]m| am) sorry,? but|i (?:can(?:no|['’])t|won['’]t|am unable to) (?:help|assist|provide|do that|answer"
    r"|comply)|as an ai(?: language)? model|i(?:['’]m| am) not able to)",
    re.IGNORECASE,
)


class Tally:
    """Counts made in one pass over the rows."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.annotators: dict[str, int] = {}
        """Name -> number, in the order of the first vote."""
        self.repeats: list[tuple[int, int]] = []
        """How often each side won, for pairs that were decided more than once."""
        self.n_rows_with_copies = 0

        self._n_pairs = 0
        self._n_ties = 0
        self._n_distinct_pairs = 0
        self._n_contradicted = 0
        self._n_triples = 0
        self._n_circles = 0
        self._n_refusals = 0
        self._n_empty = 0

        self._prompt_words: list[int] = []
        self._completion_words: list[int] = []
        self._winner_longer_by: list[int] = []  # words
        self._longer_won: list[float] = []  # 0 or 1
        self._first_won: list[float] = []  # 0 or 1

        self._n_vote_items = 0
        self._vote_items: list[int] = []
        self._vote_annotators: list[int] = []
        self._vote_labels: list[float] = []

    def add(self, row: Comparison) -> None:
        texts = [plain_text(completion) for completion in row["completions"]]
        n_words = [len(words_of(text)) for text in texts]
        self.prompts.append(question_of(row["prompt"]))
        self._prompt_words.append(len(words_of(plain_text(row["prompt"]))))
        self._completion_words += n_words
        for text in texts:
            self._n_empty += not text.strip()
            # A refusal begins with these words. Later in a text they may be a quote.
            self._n_refusals += _REFUSAL.search(text[:300]) is not None
        # `group_by_prompt` drops copies of a row, but keeps this flag.
        self.n_rows_with_copies += "duplicated_row" in (row.get("flags") or ())
        self._add_judgments(row, texts, n_words)
        self._add_votes(row.get("votes") or ())

    def _add_judgments(self, row: Comparison, texts: list[str], n_words: list[int]) -> None:
        targets_of_pair: dict[tuple[int, int], list[float]] = {}
        for (i, j), target in zip(row["pairs"], row["targets"], strict=True):
            pair, oriented_target = agreement.lower_first(i, j, target)
            targets_of_pair.setdefault(pair, []).append(oriented_target)
            self._n_pairs += 1
            if target == 0.5:
                self._n_ties += 1
                continue
            # A soft target counts as a win for the side that it favors.
            self._first_won.append(float(target > 0.5))
            if target > 0.5:
                winner, loser = i, j
            else:
                winner, loser = j, i
            self._winner_longer_by.append(n_words[winner] - n_words[loser])
            # Pairs of equal length are not evidence of length bias.
            if len(texts[i]) != len(texts[j]):
                self._longer_won.append(float(len(texts[winner]) > len(texts[loser])))
        self._add_repeats(targets_of_pair)
        self._add_triples(targets_of_pair)

    def _add_repeats(self, targets_of_pair: dict[tuple[int, int], list[float]]) -> None:
        self._n_distinct_pairs += len(targets_of_pair)
        for targets in targets_of_pair.values():
            # Ties are excluded: they neither agree with a win nor contradict it.
            first_wins = sum(target > 0.5 for target in targets)
            second_wins = sum(target < 0.5 for target in targets)
            if first_wins + second_wins > 1:
                self.repeats.append((first_wins, second_wins))
                self._n_contradicted += first_wins > 0 and second_wins > 0

    def _add_triples(self, targets_of_pair: dict[tuple[int, int], list[float]]) -> None:
        """Counts triples i < j < k with three decided pairs, and those that form a cycle."""
        wins: dict[int, dict[int, bool]] = {}  # i -> each j > i that it was compared to -> whether i won
        for (i, j), targets in targets_of_pair.items():
            # A pair with several judgments counts by their mean. Without a winner it is not decided.
            mean = sum(targets) / len(targets)
            if mean != 0.5:
                wins.setdefault(i, {})[j] = mean > 0.5
        for wins_of_i in wins.values():
            for j, i_beats_j in wins_of_i.items():
                wins_of_j = wins.get(j, {})
                for k in wins_of_i.keys() & wins_of_j.keys():
                    self._n_triples += 1
                    # i > j > k > i, or the reverse.
                    if i_beats_j == wins_of_j[k] and i_beats_j != wins_of_i[k]:
                        self._n_circles += 1

    def _add_votes(self, votes: list[dict[str, Any]]) -> None:
        item_of_pair: dict[tuple[int, int], int] = {}
        for vote in votes:
            if vote["annotator"] is None or vote["label"] is None:
                continue  # agreement between annotators requires their names and labels
            pair, label = agreement.lower_first(*vote["pair"], vote["label"])
            # Items are numbered over all rows. A pair is one item in either order.
            item = item_of_pair.setdefault(pair, self._n_vote_items + len(item_of_pair))
            annotator = self.annotators.setdefault(str(vote["annotator"]), len(self.annotators))
            self._vote_items.append(item)
            self._vote_annotators.append(annotator)
            self._vote_labels.append(label)
        self._n_vote_items += len(item_of_pair)

    def votes(self) -> agreement.Votes:
        """Returns the votes on pairs with at least two annotators, as first, tie or second."""
        votes = agreement.votes_of(self._vote_items, self._vote_annotators, self._vote_labels)
        return votes._replace(labels=agreement.three_way(votes.labels))

    def histograms(self) -> dict[str, dict[str, list[float]]]:
        """Returns histograms of the middle 98 % of the values, so that single outliers do not flatten the plot."""
        values_by_title = {
            "words per prompt": self._prompt_words,
            "words per completion": self._completion_words,
            "words in the winner minus words in the loser": self._winner_longer_by,
        }
        histograms = {}
        for title, values in values_by_title.items():
            if values:
                low, high = np.quantile(values, (0.01, 0.99))
                counts, edges = np.histogram(np.clip(values, low, high), bins=30)
                histograms[title] = {"edges": edges.tolist(), "counts": counts.tolist()}
        return histograms

    def metrics(self, order_known: bool) -> dict[str, Any]:
        """Returns the metrics that follow from the counts. `reasons_for_gaps` explains those that are None."""
        metrics = {
            "prompts": len(self.prompts),
            "pairs": self._n_pairs,
            "prompt_words": _median_and_tail(self._prompt_words),
            "completion_words": _median_and_tail(self._completion_words),
            "contradictions": None,
            "intransitive_triples": None,
            "ties": self._n_ties / self._n_pairs,
            "longer_wins": _share_with_interval(self._longer_won),
            "length_only_accuracy": None,
            "first_wins": None,
            "refusals": self._n_refusals / len(self._completion_words),
            "empty_completions": self._n_empty,
        }
        if self.repeats:
            metrics["contradictions"] = self._n_contradicted / self._n_distinct_pairs
        if self._n_triples:
            metrics["intransitive_triples"] = self._n_circles / self._n_triples
        if metrics["longer_wins"]:
            # If the shorter side wins more often, the rule is to choose the shorter one.
            share = metrics["longer_wins"]["share"]
            metrics["length_only_accuracy"] = max(share, 1 - share)
        if order_known:
            metrics["first_wins"] = _share_with_interval(self._first_won)
        return metrics


def reasons_for_gaps(order_known: bool) -> dict[str, str]:
    """Returns the reasons why metrics of `Tally` may be None."""
    no_first_wins = "not known which side annotators saw first"
    if order_known:
        no_first_wins = "no judgment has a winner"
    return {
        "first_wins": no_first_wins,
        "contradictions": "no pair was judged twice (equal rows count once)",
        "intransitive_triples": "no triple has three decided pairs",
        "longer_wins": "no decided pair has completions of different length",
        "length_only_accuracy": "no decided pair has completions of different length",
    }


def _share_with_interval(values: list[float]) -> dict[str, Any] | None:
    """Returns the mean of 0/1 values with its 95 % interval. None without values."""
    if not values:
        return None
    return {"share": float(np.mean(values)), "ci95": list(_share_interval(values))}


def _share_interval(values: list[float]) -> tuple[float, float]:
    if len(values) <= 2000:
        return bootstrap_mean_ci(values)
    # With many values, the normal approximation is as accurate and needs no resampling.
    mean = float(np.mean(values))
    half_width = 1.96 * float(np.std(values)) / math.sqrt(len(values))
    return max(0.0, mean - half_width), min(1.0, mean + half_width)


def _median_and_tail(values: list[int]) -> list[float]:
    median, percentile_95 = np.quantile(values, (0.5, 0.95))
    return [float(median), float(percentile_95)]
