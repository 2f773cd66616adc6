"""Held-out prompts that also occur in training data: exact, normalized, nearly, or with most of their words.

A prompt that training has seen tells nothing about new ones, so a comparison leaves it out and counts it.

**Templates.** Prompts from one template share most of their words without being the same question ("Write a poem about
the sea" and "… about the night"). Words in a row that more than `COMMON` training texts share are therefore taken as a
template, and do not count: two prompts are alike in the words that are left. GPT-3's check of contamination ignores
common n-grams for the same reason (Brown et al. 2020, arXiv:2005.14165, appendix C). Equal prompts always count.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.text import Messages
from ..quality.duplicates import SAME, question_of, words_of

EXACT = "exact"
NORMALIZED = "normalized"
NEAR = "near"
CONTAINED = "contained"
KINDS = (EXACT, NORMALIZED, NEAR, CONTAINED)
"""How a leak was found: equal texts; equal but for case, punctuation and white space; `SAME` of their word triples; or
`CONTAINS` of the held-out prompt's word 8-grams in one training text."""

COMMON = 3
"""Number of different training texts up to which words in a row may be a copy. With more, they are a template."""
CONTAINS = 0.7
"""Share of a prompt's 8-grams in one training text that makes it a leak (PaLM, arXiv:2204.02311, sec. 8: 70 % of
8-grams)."""

_TRIPLE = 3
_LONG = 8  # words of an n-gram for containment
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Leak:
    """A held-out prompt that occurs in training.

    Attributes:
        row: number of the held-out prompt.
        train_row: number of the training text.
        kind: one of `KINDS`: the first that applies.
        similarity: 1 for equal texts; else the share of n-grams that they have in common, from 0 to 1.
        text: the held-out prompt.
        train_text: the training text.
    """

    row: int
    train_row: int
    kind: str
    similarity: float
    text: str
    train_text: str


@dataclass(frozen=True)
class Leaks:
    """All held-out prompts that occur in training, at most one leak per held-out prompt.

    Attributes:
        found: the leaks, in the order of the held-out prompts.
        n_train: number of training texts.
        n_heldout: number of held-out prompts.
    """

    found: tuple[Leak, ...]
    n_train: int
    n_heldout: int

    @property
    def heldout(self) -> list[int]:
        """Numbers of the held-out prompts that leaked."""
        return [leak.row for leak in self.found]

    def keep(self) -> list[int]:
        """Numbers of the held-out prompts that did not leak."""
        leaked = set(self.heldout)
        return [row for row in range(self.n_heldout) if row not in leaked]

    def as_dict(self, max_examples: int = 5) -> dict[str, Any]:
        """Returns numbers of rows, of leaks by kind, and the first examples (texts are cut) for JSON."""
        counts = Counter(leak.kind for leak in self.found)
        examples = []
        for leak in self.found[:max_examples]:
            example = {
                "row": leak.row,
                "train_row": leak.train_row,
                "kind": leak.kind,
                "similarity": leak.similarity,
                "text": leak.text[:_SHOWN_CHARACTERS],
                "train_text": leak.train_text[:_SHOWN_CHARACTERS],
            }
            examples.append(example)
        return {
            "heldout": self.n_heldout,
            "leaked": len(self.found),
            "kinds": {kind: counts[kind] for kind in KINDS},
            "examples": examples,
        }


def find_leaks(train_prompts: Sequence[str | Messages], heldout_prompts: Sequence[str | Messages]) -> Leaks:
    """Finds the held-out prompts that occur in training texts.

    System messages do not count, since many rows share them.

    Args:
        train_prompts: prompts, and other texts that training sees, such as demonstrations. Texts or messages.
        heldout_prompts: prompts of the evaluation. Texts or messages.
    """
    train = _TrainingTexts([question_of(prompt) for prompt in train_prompts])
    found = []
    for row, prompt in enumerate(heldout_prompts):
        text = question_of(prompt)
        match = train.match(text)
        if match is not None:
            train_row, kind, similarity = match
            found.append(Leak(row, train_row, kind, similarity, text, train.texts[train_row]))
    return Leaks(tuple(found), len(train_prompts), len(heldout_prompts))


class _TrainingTexts:
    """Index of training texts by text and by n-grams."""

    def __init__(self, texts: list[str]):
        self.texts = texts
        self._exact: dict[str, int] = {}
        self._normalized: dict[str, int] = {}
        self._words: dict[int, list[str]] = {}
        for row, text in enumerate(texts):
            self._exact.setdefault(text.strip(), row)
            words = _normalized_words(text)
            key = " ".join(words)
            # A text that occurs several times is one text: its words are no template.
            if key not in self._normalized:
                self._normalized[key] = row
                self._words[row] = words
        self._rows_with = {n: self._index(n) for n in (_TRIPLE, _LONG)}

    def _index(self, n: int) -> dict[str, list[int]]:
        rows_with: dict[str, list[int]] = {}
        for row, words in self._words.items():
            for ngram in _ngrams(words, n):
                rows_with.setdefault(ngram, []).append(row)
        return rows_with

    def match(self, text: str) -> tuple[int, str, float] | None:
        """The training row that a prompt occurs in, the kind of leak, and the similarity; None without one."""
        if text.strip() in self._exact:
            return self._exact[text.strip()], EXACT, 1.0
        words = _normalized_words(text)
        if not words:
            return None
        key = " ".join(words)
        if key in self._normalized:
            return self._normalized[key], NORMALIZED, 1.0
        return self._near(words) or self._containing(words)

    def _near(self, words: list[str]) -> tuple[int, str, float] | None:
        """A text with `SAME` of the triples (Jaccard index), among all of them and among those of no template."""
        triples = _ngrams(words, _TRIPLE)
        for row, _ in self._sharing(triples, _TRIPLE):
            other = _ngrams(self._words[row], _TRIPLE)
            similarity = _jaccard(triples, other)
            if similarity >= SAME and _jaccard(self._special(triples, _TRIPLE), self._special(other, _TRIPLE)) >= SAME:
                return row, NEAR, similarity
        return None

    def _containing(self, words: list[str]) -> tuple[int, str, float] | None:
        """A text that has `CONTAINS` of the 8-grams, among all of them and among those of no template."""
        ngrams = _ngrams(words, _LONG)
        special = self._special(ngrams, _LONG)
        for row, n_shared in self._sharing(ngrams, _LONG):
            # `n_shared` counts those of no template. With them, others may be shared too.
            if n_shared < CONTAINS * len(special):
                return None  # rows are sorted: the others share less
            share = len(ngrams & _ngrams(self._words[row], _LONG)) / len(ngrams)
            if share >= CONTAINS:
                return row, CONTAINED, share
        return None

    def _special(self, ngrams: set[str], n: int) -> set[str]:
        """The n-grams that are no template's."""
        rows_with = self._rows_with[n]
        return {ngram for ngram in ngrams if len(rows_with.get(ngram, ())) <= COMMON}

    def _sharing(self, ngrams: set[str], n: int) -> Iterator[tuple[int, int]]:
        """Rows that share n-grams of no template, and how many, most first."""
        counts: Counter[int] = Counter()
        for ngram in self._special(ngrams, n):
            counts.update(self._rows_with[n].get(ngram, ()))
        yield from counts.most_common()


def _normalized_words(text: str) -> list[str]:
    return words_of(_PUNCTUATION.sub(" ", text.casefold()))


def _ngrams(words: Sequence[str], n: int) -> set[str]:
    return {" ".join(words[start : start + n]) for start in range(len(words) - n + 1)}


def _jaccard(one: set[str], other: set[str]) -> float:
    either = len(one | other)
    return len(one & other) / either if either else 0.0
