"""Metrics of generated texts without a model: distinct-n, repetition, and refusals by their phrases."""

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


def words_of(text: str) -> list[str]:
    """The words and punctuation marks of a text, in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def _check_n(n: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n={n!r}: give the number of words of an n-gram, a whole number of at least 1.")


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError("texts: give a list of texts; of messages, their contents.")


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct-n (Li et al. 2016, arXiv:1510.03055, sec. 5.1): how diverse texts are, all together.

    It is the number of distinct n-grams of all texts, divided by the number of words. Many texts, or long ones, have a
    smaller one: compare systems by as many answers to the same prompts, and look at the lengths, too.

    Args:
        texts: generated texts.
        n: number of words in an n-gram.

    Returns:
        A number in [0, 1]; 0 without any words.
    """
    _check_n(n)
    _check_texts(texts)
    distinct = set()
    n_words = 0
    for text in texts:
        words = words_of(text)
        n_words += len(words)
        distinct.update(_ngrams(words, n))
    return len(distinct) / n_words if n_words else 0.0


def repetition(texts: Sequence[str], n: int = 4) -> float:
    """Share of repeated n-grams in a text, mean over texts.

    It is seq-rep-n of Welleck et al. 2020 (arXiv:1908.04319, sec. 4.2). Of one text it is
    1 - (distinct n-grams / n-grams). Of a text with fewer than n words it is 0.

    Args:
        texts: generated texts.
        n: number of words in an n-gram.

    Returns:
        A number in [0, 1): 0 if no text repeats itself, or there is none.
    """
    _check_n(n)
    _check_texts(texts)
    shares = []
    for text in texts:
        ngrams = _ngrams(words_of(text), n)
        shares.append(1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0)
    return sum(shares) / len(shares) if shares else 0.0


# --- refusals ---------------------------------------------------------------------------------------------------------

_NOT_ABLE = (
    "(?:can't|cannot|can not|won't|will not|am unable to|'m unable to|am not able to|'m not able to"
    "|am not going to|'m not going to|am not willing to|'m not willing to)"
)
_HELP = (
    "(?:answer|assist|comply|condone|continue|discuss|do (?:that|this|so)|encourage|engage|fulfill|generate|help"
    "|give (?:you|out|that|this|any)|participate|produce|promote|provide|respond|share|support|talk about|tell you"
    "|write)"
)
"""What a refusal says that it does not do: "I can't swim" is none."""
_NO_KNOWLEDGE = "(?! (?:really )?(?:remember|understand|see|hear|find|figure|tell the))"
"""What "sorry, I can't" may go on with and not be a refusal."""

REFUSALS: tuple[str, ...] = (
    # "I can't help you with that", "I'm really not able to provide", "I can't in good conscience answer"
    rf"\bi ?{_NOT_ABLE}(?: \w+)?(?: in good conscience)? {_HELP}\b(?! (?:you )?(?:an? |any )?(?:exact|precise))",
    rf"\bi (?:just |really |simply |also )+{_NOT_ABLE}(?: be able to)? {_HELP}\b",
    r"\b(?:i'm|i am) (?:really )?not (?:comfortable|allowed|permitted|programmed|prepared) (?:with|to|answering)\b",
    r"\bi (?:don't|do not) (?:feel|think i'm|think i am) comfortable\b",
    r"\bi (?:must|have to|need to|will have to|respectfully) (?:respectfully )?(?:decline|refuse)\b",
    r"\bi (?:decline|refuse) to\b",
    rf"\bsorry,?(?: but)? (?:i|that|this|it) ?(?:really )?{_NOT_ABLE}{_NO_KNOWLEDGE}",
    rf"\bapologi[sz]e,? but i ?{_NOT_ABLE}",
    rf"\bas an? (?:ai|artificial intelligence|language model)\b[^.!?]*\bi ?{_NOT_ABLE}",
    r"\b(?:that|this|it)(?:'s| is| would be) (?:against my|not something (?:that )?i(?:'m)? (?:can|will|want|able))",
    r"\bi (?:don't|do not) want to (?:help|answer|talk about|discuss|give you|tell you|encourage|be a part)",
    r"\bnot (?:be )?(?:appropriate|ethical) for me to\b",
)
"""Regular expressions, in lower case and with plain apostrophes, of which one is at the beginning of a refusal."""
_REFUSAL = re.compile("|".join(REFUSALS))
_BEGINNING = 2
"""Sentences at the beginning in which a refusal is looked for: a later one is about a part of the answer."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


def is_refusal(text: str) -> bool:
    """Whether an answer refuses, by its phrases: one of `REFUSALS` is in its first two sentences.

    It is a measure of manners, not of safety: an answer that refuses in other words is missed, and one that explains
    harm after a refusal counts as a refusal. Phrases are English.
    """
    sentences = [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]
    beginning = " ".join(sentences[:_BEGINNING]).lower().replace("’", "'")
    return _REFUSAL.search(" ".join(beginning.split())) is not None


def refusal_rate(texts: Sequence[str]) -> float:
    """Share of the answers that refuse (`is_refusal`); 0 without any."""
    _check_texts(texts)
    return sum(map(is_refusal, texts)) / len(texts) if len(texts) else 0.0
