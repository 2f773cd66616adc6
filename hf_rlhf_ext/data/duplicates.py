"""Prompts that were (almost) seen before."""

import re

import numpy as np
from tqdm.auto import tqdm

from .text import Messages, plain_text, text_key

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


class PromptIndex:
    """Prompts seen so far, exact and near: those that share a bucket are compared, the likeliest word by word.

    A prompt's sketch has 64 values (MinHash), of which each 4 choose a bucket (LSH, 16 bands): two prompts that share
    0.8 of their word triples meet with a chance of 0.9998. What is near an earlier prompt is not stored.
    """

    def __init__(self) -> None:
        from datasketch import MinHash

        self._exact: set[str] = set()
        self._empty = MinHash(num_perm=64, seed=1)
        self._mix = np.random.default_rng(0).integers(2**64, size=(16, 4), dtype=np.uint64)  # 4 values -> a bucket
        self._buckets: dict[int, list[int]] = {}
        self._texts: list[str] = []
        self._sketches = np.empty((1024, 64), np.uint32)  # of `_texts`, and room for more

    def holds(self, prompt: str, *, add: bool = False) -> bool:
        text = text_key(prompt).lower()
        if text in self._exact:
            return True
        if add:
            self._exact.add(text)
        triples = _triples(text)
        if len(triples) < 2:
            return False  # a few words are equal, or they are not
        minhash = self._empty.copy()
        minhash.update_batch(triple.encode() for triple in triples)
        sketch = minhash.hashvalues.astype(np.uint32)
        buckets = (sketch.reshape(16, 4) * self._mix).sum(1).tolist()
        near = np.array(list({n for bucket in buckets for n in self._buckets.get(bucket, ())}), int)
        shared = (self._sketches[near] == sketch).mean(1)  # estimates the Jaccard index to 0.05
        likeliest = near[np.argsort(-shared)[: min(5, (shared >= 0.7).sum())]]
        found = any(_jaccard(triples, _triples(self._texts[n])) >= 0.8 for n in likeliest)
        if add and not found:
            self._store(text, sketch, buckets)
        return found

    def _store(self, text: str, sketch: np.ndarray, buckets: list[int]) -> None:
        n = len(self._texts)
        if n == len(self._sketches):
            self._sketches = np.concatenate([self._sketches, np.empty_like(self._sketches)])
        self._sketches[n] = sketch
        self._texts.append(text)
        for bucket in buckets:
            members = self._buckets.setdefault(bucket, [])
            if len(members) < 100:  # full of one template's prompts: their other buckets tell them apart
                members.append(n)


def _triples(text: str) -> set[str]:
    words = words_of(text)
    return {" ".join(words[k : k + 3]) for k in range(len(words) - 2)}


def _jaccard(one: set[str], other: set[str]) -> float:
    both = len(one & other)
    return both / (len(one) + len(other) - both)


def near_duplicates(prompts: list[str]) -> tuple[int, PromptIndex]:
    """How many prompts are (almost) equal to an earlier one that is not, and the index of those."""
    index = PromptIndex()
    shown = tqdm(prompts, desc="near duplicates", disable=len(prompts) < 5000)
    return sum(index.holds(prompt, add=True) for prompt in shown), index


def words_of(text: str) -> list[str]:
    """Words as white space parts them; in Chinese and Japanese, where it does not, characters."""
    return text.split() if text.isascii() else _WORD.findall(text)


def question_of(prompt: str | Messages) -> str:
    """The prompt without system texts: many rows share one, which makes no two of them alike."""
    asked = prompt if isinstance(prompt, str) else [m for m in prompt if m.get("role") != "system"]
    return plain_text(asked or prompt)
