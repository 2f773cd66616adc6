"""Prompts that were (almost) seen before."""

import re

import numpy as np
from tqdm.auto import tqdm

from ..data.text import Messages, plain_text, text_key

SAME = 0.8
"""Jaccard index of the word triples of two prompts from which on they are near duplicates."""

_N_VALUES = 64  # of a MinHash sketch
_BANDS = (16, 4)  # of LSH: buckets per sketch, values that choose each
_FULL_BUCKET = 100
_CLOSELY_COMPARED = 5
_SKETCHES_ALIKE = 0.7  # a sketch estimates the Jaccard index to 0.05: this is a safe distance under SAME

_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")


class PromptIndex:
    """Prompts seen so far, exact and near: those that share a bucket are compared, the likeliest word by word.

    A prompt's sketch has 64 values (MinHash), of which each 4 choose a bucket (LSH, 16 bands): two prompts that share
    0.8 of their word triples meet with a chance of 0.9998. What is near an earlier prompt is not stored.
    """

    def __init__(self) -> None:
        from datasketch import MinHash

        self._exact: set[str] = set()
        self._empty = MinHash(num_perm=_N_VALUES, seed=1)
        # Random factors: the weighted sum of a band's values is the number of its bucket.
        self._mix = np.random.default_rng(0).integers(2**64, size=_BANDS, dtype=np.uint64)
        self._buckets: dict[int, list[int]] = {}
        self._texts: list[str] = []
        self._sketches = np.empty((1024, _N_VALUES), np.uint32)  # of `_texts`, and room for more

    def holds(self, prompt: str, *, add: bool = False) -> bool:
        """Whether the prompt, or one near it, was added before; `add` adds it."""
        text = text_key(prompt).lower()
        if text in self._exact:
            return True
        if add:
            self._exact.add(text)
        triples = _word_triples(text)
        if len(triples) < 2:
            return False  # a few words are equal, or they are not

        sketch = self._sketch(triples)
        buckets = (sketch.reshape(_BANDS) * self._mix).sum(1).tolist()
        seen_before = self._holds_near(triples, sketch, buckets)
        if add and not seen_before:
            self._store(text, sketch, buckets)
        return seen_before

    def _sketch(self, triples: set[str]) -> np.ndarray:
        minhash = self._empty.copy()
        minhash.update_batch(triple.encode() for triple in triples)
        return minhash.hashvalues.astype(np.uint32)

    def _holds_near(self, triples: set[str], sketch: np.ndarray, buckets: list[int]) -> bool:
        candidates: set[int] = set()
        for bucket in buckets:
            candidates.update(self._buckets.get(bucket, ()))
        candidate_numbers = np.array(list(candidates), int)
        similarity = (self._sketches[candidate_numbers] == sketch).mean(1)  # estimates the Jaccard index
        n_compared = min(_CLOSELY_COMPARED, int((similarity >= _SKETCHES_ALIKE).sum()))
        most_similar_first = candidate_numbers[np.argsort(-similarity)]
        for number in most_similar_first[:n_compared]:
            if _jaccard(triples, _word_triples(self._texts[number])) >= SAME:
                return True
        return False

    def _store(self, text: str, sketch: np.ndarray, buckets: list[int]) -> None:
        number = len(self._texts)
        if number == len(self._sketches):
            self._sketches = np.concatenate([self._sketches, np.empty_like(self._sketches)])
        self._sketches[number] = sketch
        self._texts.append(text)
        for bucket in buckets:
            members = self._buckets.setdefault(bucket, [])
            # A full bucket holds prompts of one template: their other buckets tell them apart.
            if len(members) < _FULL_BUCKET:
                members.append(number)


def _word_triples(text: str) -> set[str]:
    words = words_of(text)
    triples = set()
    for start in range(len(words) - 2):
        triples.add(" ".join(words[start : start + 3]))
    return triples


def _jaccard(one: set[str], other: set[str]) -> float:
    both = len(one & other)
    return both / (len(one) + len(other) - both)


def near_duplicates(prompts: list[str]) -> tuple[int, PromptIndex]:
    """How many prompts are (almost) equal to an earlier one, and the index of those that are not."""
    index = PromptIndex()
    n_near = 0
    for prompt in tqdm(prompts, desc="near duplicates", disable=len(prompts) < 5000):
        n_near += index.holds(prompt, add=True)
    return n_near, index


def words_of(text: str) -> list[str]:
    """Words separated by white space; in Chinese and Japanese, which have none, characters."""
    if text.isascii():
        return text.split()
    return _WORD.findall(text)


def question_of(prompt: str | Messages) -> str:
    """The prompt without system texts, which many rows share: they alone make no two prompts alike."""
    if isinstance(prompt, str):
        return plain_text(prompt)
    asked = [message for message in prompt if message.get("role") != "system"]
    return plain_text(asked or prompt)
