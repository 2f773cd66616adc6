"""Who won a judged pair, looked up by the words of prompt and completions, and the tasks that ask for it."""

import random
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ..data.text import plain_text
from .tasks import Task


def same_words(text: Any) -> str:
    """A key that is equal for text and messages with the same words. White space and roles do not count."""
    return " ".join(plain_text(text).split())


def pair_task(
    prompt: Any,
    sides: Sequence[tuple[str, Any]],
    *,
    category: str | None,
    batch: str,
    wanted: int,
    key: str,
) -> Task:
    """The comparison of two completions of a prompt, in an order that depends on `key` alone.

    Args:
        prompt: text or messages.
        sides: name of the policy and its completion, twice. People do not see the names.
        category: use case of the prompt.
        batch: name of the batch in a store.
        wanted: number of people who should judge it.
        key: draws the order.
    """
    shuffled = list(sides)
    random.Random(key).shuffle(shuffled)
    return Task(
        prompt=prompt,
        completions=[completion for _, completion in shuffled],
        made_by=[{"policy": name} for name, _ in shuffled],
        category=category,
        wanted=wanted,
        batch=batch,
    )


class PairOutcomes:
    """Looks up who won a judged pair by the texts of prompt and completions.

    Args:
        rows: comparison rows. A pair may be in several of them, such as one of each person in a file.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.targets: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for row in rows:
            prompt = same_words(row["prompt"])
            texts = [same_words(completion) for completion in row["completions"]]
            for (i, j), target in zip(row["pairs"], row["targets"], strict=True):
                self.targets[prompt, texts[i], texts[j]].append(target)
                self.targets[prompt, texts[j], texts[i]].append(1 - target)

    def of(self, prompt: Any, first: Any, second: Any) -> float | None:
        """P(`first` is better), the mean over people; None if the pair was not judged."""
        targets = self.targets.get((same_words(prompt), same_words(first), same_words(second)))
        return fmean(targets) if targets else None
