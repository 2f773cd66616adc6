"""A gold reward that asks for the prompt: an answer is good if its sentences are on topic and kind."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .simulated import GoldReward, completion_text

COMMON = 0.03
"""Words in at least this share of the prompts say nothing about the topic of one."""
RARE = 0.015
"""Words in at most this share of the prompts count in full."""
WARM = 0.4
"""VADER's score of a sentence that is as kind as can be: about one kind word ("glad" 0.46, "love" 0.64)."""
NEUTRAL = 0.5
"""Kindness of a sentence without sentiment."""
FUNCTION_WORDS = 1 / 5
"""A sentence has at least this share of words such as "the" and "is"; a list of words has fewer."""

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+|\n+")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return [word.lower() for word in _WORD.findall(text)]


def sentences_of(text: str) -> list[str]:
    """The sentences of a text. The last one may be cut off, and counts as well."""
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if words_of(sentence)]


class OnTopicGold:
    """Share of an answer that is on the prompt's topic and kind, in [0, 1], as a reward function.

    A sentence scores topic × kindness, and an answer has the mean over its sentences:

        gold = 1/n · Σ topic(sentence, prompt) · kindness(sentence)

    Topic, in [0, 1], is the weight of the sentence's most telling word of the prompt. Words are compared by their stems
    (Snowball, Porter 2001). Stop words and words of sentiment have no weight, the others

        weight(word) = log(COMMON / share) / log(COMMON / RARE), cut to [0, 1],

    where `share` is that of `usual_prompts` with this word, as in inverse document frequency (Spärck Jones 1972). The
    prompt's most telling word has the weight 1. So a compliment that fits any prompt scores 0. What is copied from the
    prompt scores less, and nothing if the whole sentence is copied. A sentence that the answer had before scores 0.

    Kindness, in [0, 1], is VADER's compound score (Hutto & Gilbert 2014), cut at ±WARM and stretched: 0.5 without
    sentiment. More than one kind word gains nothing, and a list of words without function words is not kind. Words of
    the prompt have no sentiment here: an answer is not kind because it is about "a free afternoon".

    It knows words, not meaning. It cannot see whether an answer is true, or whether it obeys the prompt. A sentence
    that has the topic in other words ("They eat grass") scores less. A prompt's question with a kind word put into it,
    or a list of kind words and topic words between function words, scores well. English only.

    Args:
        usual_prompts: prompts of the same kind as those that are judged. Words that many of them have are no topic.
    """

    __name__ = "on_topic"

    def __init__(self, usual_prompts: Sequence[str]) -> None:
        import snowballstemmer
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # takes seconds, not needed for `--help`

        self._stop_words = ENGLISH_STOP_WORDS
        self._stem = snowballstemmer.stemmer("english").stemWord
        self._sentiment = GoldReward()
        counts: Counter[str] = Counter()
        for prompt in usual_prompts:
            counts.update(self._stems(words_of(prompt)))
        self._shares = {stem: count / len(usual_prompts) for stem, count in counts.items()}

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        """Scores `completions` (text or messages) as answers to `prompts` (text or messages)."""
        scores = []
        for prompt, completion in zip(prompts, completions, strict=True):
            scores.append(self._score(_question(prompt), completion_text(completion)))
        return scores

    def topic_words(self, prompt: str) -> dict[str, float]:
        """Stems of the prompt's words with their weights, of which the largest is 1. Empty if no word tells a topic."""
        weights = {}
        for stem in self._stems(words_of(prompt)):
            share = max(self._shares.get(stem, 0.0), RARE)
            weight = math.log(COMMON / share) / math.log(COMMON / RARE)
            if weight > 0:
                weights[stem] = weight
        largest = max(weights.values(), default=1.0)
        return {stem: weight / largest for stem, weight in weights.items()}

    def topicality(self, prompt: str, sentence: str) -> float:
        """How much a sentence is about the prompt, in [0, 1]. It is 1 if the prompt has no topic ("What is it?")."""
        weights = self.topic_words(prompt)
        if not weights:
            return 1.0
        words = words_of(sentence)
        topic = max((weights.get(stem, 0.0) for stem in self._stems(words)), default=0.0)
        # Half of a sentence may be copied: "A toy shop in winter" is how an answer may begin.
        copied = _longest_common_run(words, words_of(prompt)) / len(words)
        return topic * min(1.0, 2 * (1 - copied))

    def kindness(self, prompt: str, sentence: str) -> float:
        """How kind a sentence is by words that are not the prompt's, in [0, 1]: 0.5 without sentiment."""
        own = sentence
        for word in set(words_of(prompt)) & set(words_of(sentence)):
            if word in self._sentiment.lexicon:
                own = re.sub(rf"\b{re.escape(word)}\b", "", own, flags=re.IGNORECASE)
        compound = self._sentiment([""], [own])[0] if own.strip() else 0.0
        stretched = max(-1.0, min(1.0, compound / WARM))
        words = words_of(sentence)
        n_function_words = sum(word in self._stop_words for word in words)
        if n_function_words < FUNCTION_WORDS * len(words):
            stretched = min(stretched, 0.0)
        return NEUTRAL * (1 + stretched)

    def _score(self, prompt: str, completion: str) -> float:
        sentences = sentences_of(completion)
        if not sentences:
            return 0.0
        seen: set[tuple[str, ...]] = set()
        total = 0.0
        for sentence in sentences:
            words = tuple(words_of(sentence))
            if words not in seen:
                total += self.topicality(prompt, sentence) * self.kindness(prompt, sentence)
            seen.add(words)
        return total / len(sentences)

    def _stems(self, words: Sequence[str]) -> set[str]:
        """Stems of the words that can tell a topic: no stop words, no words of sentiment."""
        stems = set()
        for word in words:
            if word not in self._stop_words and word not in self._sentiment.lexicon:
                stems.add(self._stem(word))
        return stems


def _question(prompt: str | list[dict[str, str]]) -> str:
    """The text that the user wrote."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt if message["role"] == "user")


def _longest_common_run(words: Sequence[str], others: Sequence[str]) -> int:
    """Length of the longest run of words that both have."""
    longest = 0
    lengths = [0] * (len(others) + 1)  # of the run that ends with this word of `words` and of `others`
    for word in words:
        previous = lengths
        lengths = [0] * (len(others) + 1)
        for position, other in enumerate(others):
            if word == other:
                lengths[position + 1] = previous[position] + 1
        longest = max(longest, *lengths)
    return longest
