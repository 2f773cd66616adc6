"""Finds duplicate and near-duplicate prompts."""

import re

import numpy as np
from tqdm.auto import tqdm

from ..data.text import Messages, plain_text, text_key
from .packages import data_package

SAME = 0.8
"""Smallest Jaccard index of the word triples of two prompts that are near duplicates."""

_N_VALUES = 64  # values per MinHash sketch
_BANDS = (16, 4)  # LSH: buckets per sketch, and values that select each bucket
_FULL_BUCKET = 100
_CLOSELY_COMPARED = 5
_SKETCHES_ALIKE = 0.7  # a sketch estimates the Jaccard index with an error of about 0.05, so this is safely below SAME

_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")


class PromptIndex:
    """Index of prompts that finds duplicates and near duplicates.

    Each prompt has a MinHash sketch of 64 values. Every 4 of them select a bucket (LSH with 16 bands). Prompts that
    share a bucket are compared by their sketches, and the most similar ones by their word triples. Two prompts with a
    Jaccard index of 0.8 share a bucket with a probability of 0.9998. Near duplicates of stored prompts are not stored.
    """

    def __init__(self) -> None:
        self._exact: set[str] = set()
        self._empty = data_package("datasketch").MinHash(num_perm=_N_VALUES, seed=1)
        # Random factors: the weighted sum of the values of a band is its bucket number.
        self._mix = np.random.default_rng(0).integers(2**64, size=_BANDS, dtype=np.uint64)
        self._buckets: dict[int, list[int]] = {}
        self._texts: list[str] = []
        self._sketches = np.empty((1024, _N_VALUES), np.uint32)  # sketches of `_texts`, with room for more

    def holds(self, prompt: str, *, add: bool = False) -> bool:
        """Returns whether the prompt or a near duplicate was added before. With `add`, adds the prompt."""
        text = text_key(prompt).lower()
        if text in self._exact:
            return True
        if add:
            self._exact.add(text)
        triples = _word_triples(text)
        if len(triples) < 2:
            return False  # too few words for near duplicates

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
            # A full bucket holds prompts from one template. Their other buckets distinguish them.
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
    """Returns the number of prompts that are (nearly) equal to an earlier one, and an index of the others."""
    index = PromptIndex()
    n_near = 0
    for prompt in tqdm(prompts, desc="near duplicates", disable=len(prompts) < 5000):
        n_near += index.holds(prompt, add=True)
    return n_near, index


def words_of(text: str) -> list[str]:
    """Splits a text at white space. Chinese and Japanese are split into characters, since they have no spaces."""
    if text.isascii():
        return text.split()
    return _WORD.findall(text)


def question_of(prompt: str | Messages) -> str:
    """Returns the prompt without system messages. Many rows share them, which does not make rows duplicates."""
    if isinstance(prompt, str):
        return plain_text(prompt)
    asked = [message for message in prompt if message.get("role") != "system"]
    return plain_text(asked or prompt)
