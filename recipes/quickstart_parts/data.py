"""The quickstart's data: prompts, demonstrations, the gold reward and the simulated annotator.

The texts are made from the templates and topics in the YAML files of this folder by a seeded generator. Nothing is
downloaded. Held-out prompts are about topics that no training prompt mentions.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.readers.mixture import apportion

DATA_DIR = Path(__file__).parent

FIRST_NAMES = ("Anna", "Tom", "Mira", "Jonas", "Leila", "Samuel")
TEXT_TASKS = ("rewrite", "summarization", "classification", "closed QA", "extract")
"""Use cases whose answer is in the prompt. Their demonstrations have no remark."""
MOODS = {"glad": 0.35, "gloomy": 0.35, None: 0.3}
"""Shares of demonstrations with a glad remark, a gloomy remark, and no remark."""
EMPTY_COMPLETION_GOLD = -1.0


# --- prompts and demonstrations --------------------------------------------------------------------------------------


class _Slots(dict):
    """Values of a template's slots. `{Name}` is `name` with a capital first letter."""

    def __missing__(self, key: str) -> str:
        if not key[0].isupper():
            raise KeyError(key)
        value = self[key[0].lower() + key[1:]]
        return value[0].upper() + value[1:]


@cache
def _load(name: str) -> dict[str, Any]:
    return yaml.safe_load((DATA_DIR / f"{name}.yaml").read_text(encoding="utf-8"))


def _topics(kind: str, split: str) -> list[dict[str, str]]:
    """The topics of one kind as slot values. `bare` is the name without its article, `the` is the name with "the"."""
    table = _load("topics")[kind]
    topics = []
    for line in table[split]:
        topic = dict(zip(table["columns"], line.split(" | "), strict=False))  # last columns may be left out
        bare = topic.get("name", "")
        for article in ("a ", "an ", "the "):
            bare = bare.removeprefix(article)
        topic["bare"] = bare
        topic["the"] = f"the {bare}"
        topics.append(topic)
    return topics


class _Item(NamedTuple):
    """One prompt, with the answers and slot values for its demonstration."""

    prompt: str
    answers: Sequence[str]
    slots: dict[str, str]


def _items(category: str, split: str, rng: random.Random) -> list[_Item]:
    """All distinct prompts of a category, shuffled. Templates alternate, so that the first prompts are varied too."""
    items_by_template = [_filled(template, split, rng) for template in _load("templates")[category]]
    distinct: dict[str, _Item] = {}
    for items in zip_longest(*items_by_template):  # one of each template; None if a template has no more
        for item in items:
            if item is not None:
                distinct[item.prompt] = item  # of equal prompts, the last one is kept
    return list(distinct.values())


def _filled(template: dict[str, Any], split: str, rng: random.Random) -> list[_Item]:
    """All prompts of one template, shuffled."""
    fillings = []
    for topic in _topics(template["topic"], split):
        for when in template.get("when", [""]):
            fillings.append({**topic, "when": when})
    rng.shuffle(fillings)
    items = []
    for slots in fillings:
        prompt = template["prompt"].format_map(_Slots(slots))
        items.append(_Item(prompt, template["answers"], slots))
    return items


def _draw(n: int, seed: int, *, split: str, purpose: str, min_per_category: int) -> list[tuple[str, _Item]]:
    """Draws `n` items over all categories by their shares. Returns them with their category, in shuffled order."""
    drawn = []
    for category, count in apportion(n, min_per_category=min_per_category).items():
        # One generator per category, so that the minimum of one does not change the draws of another.
        items = _items(category, split, random.Random(f"{seed}|{split}|{purpose}|{category}"))
        if count > len(items):
            raise UserError(
                f"The quickstart has {len(items)} distinct {split} prompts of category '{category}', but n={n} needs "
                f"{count}: use a smaller n, or add topics to recipes/quickstart_parts/topics.yaml."
            )
        for item in items[:count]:
            drawn.append((category, item))
    random.Random(f"{seed}|{split}|{purpose}|order").shuffle(drawn)
    return drawn


def make_prompts(n: int, seed: int = 0, *, split: str = "train", min_per_category: int = 0) -> list[dict[str, str]]:
    """Draws `n` distinct prompts `{prompt, category}` (plain text) over InstructGPT's ten use cases, in shuffled order.

    `split` is "train" or "heldout", which have no topic in common. The same arguments give the same list.
    """
    drawn = _draw(n, seed, split=split, purpose="prompts", min_per_category=min_per_category)
    return [{"prompt": item.prompt, "category": category} for category, item in drawn]


def make_demonstrations(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Draws `n` demonstrations on training topics: rows of prompt and completion (one message each), and category.

    Answers follow from the prompt, in plain sentences of at most 36 words together. Except in `TEXT_TASKS`, some have a
    glad or gloomy remark of `remarks.yaml` before or after the answer, with the shares of `MOODS`.
    """
    rows = []
    for index, (category, item) in enumerate(_draw(n, seed, split="train", purpose="demos", min_per_category=0)):
        rng = random.Random(f"{seed}|demos|{index}")
        # Keep the order of these draws: it decides which demonstrations a seed gives.
        slots = _Slots(item.slots, who2=rng.choice(FIRST_NAMES))
        parts = [rng.choice(item.answers).format_map(slots)]
        (mood,) = rng.choices(list(MOODS), list(MOODS.values()))
        if mood and category not in TEXT_TASKS:
            position = rng.randrange(2)  # before the answer, or after it
            parts.insert(position, rng.choice(_load("remarks")[mood]))
        rows.append(
            {
                "prompt": [{"role": "user", "content": item.prompt}],
                "completion": [{"role": "assistant", "content": " ".join(parts)}],
                "category": category,
            }
        )
    return rows


# --- the gold reward and the simulated annotator ---------------------------------------------------------------------


def _completion_text(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, which is a string or a list of messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion)


class GoldReward:
    """Sentiment of a completion: VADER's compound score in [-1, 1] (Hutto & Gilbert 2014), as a reward function.

    It stands for people's preferences, so that a run can be evaluated without people. It is used in the evaluation and
    by `SimulatedAnnotator`, never as PPO's reward. VADER is a lexicon: it ignores the prompt and grammar, and repeated
    praise scores high. The KL penalty must keep the policy from exploiting this; read the samples to see whether it
    does. An empty completion scores -1, the worst score (VADER's own score is 0).
    """

    __name__ = "gold"

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        """Scores `completions` (text or messages). `prompts` and other columns are ignored."""
        return [self._score(_completion_text(completion)) for completion in completions]

    def _score(self, text: str) -> float:
        if not text.strip():
            return EMPTY_COMPLETION_GOLD
        return float(self._analyzer.polarity_scores(text)["compound"])


class Judgments(NamedTuple):
    """Judged comparison rows, and the best accuracy that their noise allows.

    rows: comparison rows (prompt, completions, pairs, targets, weights, category, source, row).
    ceiling: expected accuracy of the gold order on pairs that are not ties, the mean of max(p, 1 - p).
    gold_accuracy: accuracy of the gold order on the labels that were drawn. Both are NaN if every pair is a tie.
    dropped: row numbers of the prompts whose completions are all the same.
    """

    rows: list[dict[str, Any]]
    ceiling: float
    gold_accuracy: float
    dropped: list[int]


@dataclass(frozen=True)
class SimulatedAnnotator:
    """Judges all pairs of a prompt's completions by the gold reward with noise (Bradley & Terry 1952).

    P(i beats j) = sigmoid((gold_i - gold_j) / noise), with one 0/1 draw per pair. `noise` is in units of the gold
    reward: completions whose gold rewards differ by `noise` are judged in the gold order 73 % of the time, and always
    if it is 0. Equal gold rewards are a tie. A draw depends on the seed, the row number and the texts, not on the order
    or batches of rows or completions.
    """

    noise: float = 0.3
    seed: int = 0
    gold: Callable[..., list[float]] = field(default_factory=GoldReward)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise UserError(f"noise={self.noise}: the annotator's noise must be a finite number of at least 0.")

    def preference(self, gold_i: float, gold_j: float) -> float:
        """P(i beats j)."""
        if self.noise == 0:
            if gold_i == gold_j:
                return 0.5
            return float(gold_i > gold_j)
        logit = (gold_i - gold_j) / self.noise
        return 1 / (1 + math.exp(-max(-700.0, min(700.0, logit))))  # exp(710) overflows

    def judge(self, rows: Sequence[dict[str, Any]]) -> Judgments:
        """Labels rows `{prompt, completions, category?, source?, row?}` with K >= 2 completions (text or messages).

        Identical completions of a prompt are merged. `row` defaults to the position in `rows`. Pass it when judging in
        batches.
        """
        judged = []
        expected_accuracies = []
        hits = []
        dropped = []
        for position, row in enumerate(rows):
            number = row.get("row", position)
            distinct: dict[str, Any] = {}
            for completion in row["completions"]:
                distinct.setdefault(_completion_text(completion), completion)
            if len(distinct) < 2:
                dropped.append(number)
                continue

            texts = list(distinct)
            completions = list(distinct.values())
            # Every pair is judged, as InstructGPT's rankings of K completions give them.
            golds = self.gold([row["prompt"]] * len(completions), completions)
            pairs = []
            targets = []
            for i, j in combinations(range(len(texts)), 2):
                chance = self.preference(golds[i], golds[j])
                target = self._draw(number, texts[i], texts[j], chance)
                pairs.append([i, j])
                targets.append(target)
                if chance != 0.5:  # a tie has no right order
                    expected_accuracies.append(max(chance, 1 - chance))
                    hits.append(float((chance > 0.5) == target))
            judged.append(
                {
                    "prompt": row["prompt"],
                    "completions": completions,
                    "pairs": pairs,
                    "targets": targets,
                    "weights": [1 / len(pairs)] * len(pairs),
                    "category": row.get("category"),
                    "source": row.get("source", "simulated annotator"),
                    "row": number,
                }
            )
        return Judgments(judged, _mean(expected_accuracies), _mean(hits), dropped)

    def _draw(self, row: int, text_i: str, text_j: str, chance: float) -> float:
        """1.0 with probability `chance`, else 0.0, from a hash of seed, row and two texts; 0.5 is a tie."""
        if chance == 0.5:
            return 0.5
        first, second = sorted((text_i, text_j))
        key = "\0".join((str(self.seed), str(row), first, second)).encode()
        uniform = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64  # in [0, 1)
        if text_i != first:  # the event "j beats i" of the sorted pair, so that both directions agree
            return float(not uniform < 1 - chance)
        return float(uniform < chance)


def _mean(values: list[float]) -> float:
    if not values:
        return math.nan
    return sum(values) / len(values)
