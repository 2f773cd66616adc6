"""Habits of a policy: sentences that it uses for every prompt, repetition, and words that it takes from the prompt."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize

from hf_rlhf_ext.collect.on_topic import sentences_of, words_of
from hf_rlhf_ext.metrics.texts import distinct_n, repetition

STOCK_PROMPTS = 3
"""A sentence that is said to at least so many prompts is a stock phrase."""


def habits_of(prompts: Sequence[str], completions: Sequence[str]) -> dict[str, Any]:
    """What a policy repeats, over one completion for each prompt.

    Returns:
        distinct_2: distinct-2 of all completions together (Li et al. 2016), in [0, 1].
        repetition_4: share of repeated 4-grams within a completion, mean (Welleck et al. 2020).
        most_frequent_share: share of completions that have the most frequent sentence.
        most_frequent_sentence: this sentence, in lower case and without punctuation.
        stock_share: share of completions that have a sentence which is said to `STOCK_PROMPTS` prompts or more.
        prompt_similarity: cosine similarity of word counts with the prompt, without stop words, mean, in [0, 1].
    """
    sentences_by_completion = []
    for completion in completions:
        sentences_by_completion.append({" ".join(words_of(sentence)) for sentence in sentences_of(completion)})
    counts = Counter(sentence for sentences in sentences_by_completion for sentence in sentences)
    # Of equally frequent ones the first in the alphabet, so that a run gives the same one again.
    sentence, count = min(counts.items(), key=lambda item: (-item[1], item[0]), default=("", 0))
    stock = {sentence for sentence, count in counts.items() if count >= STOCK_PROMPTS}
    return {
        "distinct_2": distinct_n(completions, 2),
        "repetition_4": repetition(completions, 4),
        "most_frequent_share": count / len(completions),
        "most_frequent_sentence": sentence,
        "stock_share": fmean(bool(sentences & stock) for sentences in sentences_by_completion),
        "prompt_similarity": _similarity(prompts, completions),
    }


def _similarity(prompts: Sequence[str], completions: Sequence[str]) -> float:
    vectorizer = CountVectorizer(stop_words="english").fit([*prompts, *completions])
    of_prompts = normalize(vectorizer.transform(prompts))
    of_completions = normalize(vectorizer.transform(completions))  # a row of zeros stays one: its similarity is 0
    return float(of_prompts.multiply(of_completions).sum() / len(prompts))
