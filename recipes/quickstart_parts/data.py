"""The quickstart's data: prompts, demonstrations, the gold reward and the simulated annotator.

The texts are ours: templates and topics in the YAML files beside this one, filled by a seeded generator. Nothing is
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
"""Use cases whose answer is in the prompt: their demonstrations carry no remark."""
MOODS = {"glad": 0.35, "gloomy": 0.35, None: 0.3}
"""Shares of the demonstrators who add a glad remark, a gloomy one, and none."""
EMPTY_COMPLETION_GOLD = -1.0


# --- prompts and demonstrations --------------------------------------------------------------------------------------


class _Slots(dict):
    """Values of a template's slots; `{Name}` reads `name` and capitalises its first letter."""

    def __missing__(self, key: str) -> str:
        if not key[0].isupper():
            raise KeyError(key)
        value = self[key[0].lower() + key[1:]]
        return value[0].upper() + value[1:]


@cache
def _load(name: str) -> dict[str, Any]:
    return yaml.safe_load((DATA_DIR / f"{name}.yaml").read_text(encoding="utf-8"))


def _topics(kind: str, split: str) -> list[dict[str, str]]:
    """The rows of one kind of topic as slot values; `the` and `bare` are derived from a leading article."""
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
    """One filled prompt, and what its demonstration can be made of."""

    prompt: str
    answers: Sequence[str]
    slots: dict[str, str]


def _items(category: str, split: str, rng: random.Random) -> list[_Item]:
    """Every distinct prompt of a category, shuffled, its templates in turn so that any prefix is varied."""
    items_by_template = [_filled(template, split, rng) for template in _load("templates")[category]]
    distinct: dict[str, _Item] = {}
    # In turn over the templates, so that the first n prompts are varied whatever n is.
    for items in zip_longest(*items_by_template):  # one of each template; None where a template has no more
        for item in items:
            if item is not None:
                distinct[item.prompt] = item  # of equal prompts the last one, in the place of the first
    return list(distinct.values())


def _filled(template: dict[str, Any], split: str, rng: random.Random) -> list[_Item]:
    """Every prompt of one template, shuffled."""
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
    """Items with their category, `n` over all categories by their shares, in shuffled order."""
    drawn = []
    for category, count in apportion(n, min_per_category=min_per_category).items():
        # One generator per category, so that the minimum of one does not move the draws of another.
        items = _items(category, split, random.Random(f"{seed}|{split}|{purpose}|{category}"))
        if count > len(items):
            raise UserError(
                f"The quickstart has {len(items)} distinct {split} prompts of category '{category}', n={n} needs "
                f"{count}: use a smaller n, or add topics to recipes/quickstart_parts/topics.yaml."
            )
        for item in items[:count]:
            drawn.append((category, item))
    random.Random(f"{seed}|{split}|{purpose}|order").shuffle(drawn)
    return drawn


def make_prompts(n: int, seed: int = 0, *, split: str = "train", min_per_category: int = 0) -> list[dict[str, str]]:
    """Draws `n` distinct prompts `{prompt, category}` (plain text) over InstructGPT's ten use cases, in shuffled order.

    `split` is "train" or "heldout": two sets of topics with nothing in common. The same arguments give the same list.
    """
    drawn = _draw(n, seed, split=split, purpose="prompts", min_per_category=min_per_category)
    return [{"prompt": item.prompt, "category": category} for category, item in drawn]


def make_demonstrations(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Draws `n` demonstrations on training topics: a message each for prompt and completion, and the category.

    Answers are complete sentences of at most 36 words in a plain register that follow from the prompt. Demonstrators
    have moods: outside `TEXT_TASKS`, `MOODS` says how many add a remark from `remarks.yaml`, before or after.
    """
    rows = []
    for index, (category, item) in enumerate(_draw(n, seed, split="train", purpose="demos", min_per_category=0)):
        rng = random.Random(f"{seed}|demos|{index}")
        # The order of the draws is part of the data: another one gives other demonstrations for the same seed.
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


# --- the gold reward and the people it stands for --------------------------------------------------------------------


def _completion_text(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, given as a string or as messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion)


class GoldReward:
    """Sentiment of a completion: VADER's compound score in [-1, 1] (Hutto & Gilbert 2014), as a reward function.

    It stands for what people want, so that a run can be measured without people; it appears only in the evaluation and
    inside `SimulatedAnnotator`, never as PPO's reward. It is a lexicon: it sees neither the prompt nor the grammar, and
    repeated praise scores high. That a policy does not end there is the task of the KL term and of the reading of
    samples, not of this function. An empty completion, which VADER calls neutral (0), gets -1: no answer is the worst
    answer.
    """

    __name__ = "gold"

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        """Scores `completions` (text or messages); `prompts` and further columns are ignored."""
        return [self._score(_completion_text(completion)) for completion in completions]

    def _score(self, text: str) -> float:
        if not text.strip():
            return EMPTY_COMPLETION_GOLD
        return float(self._analyzer.polarity_scores(text)["compound"])


class Judgements(NamedTuple):
    """Comparison rows, and what their noise allows.

    rows: comparison rows (prompt, completions, pairs, targets, weights, category, source, row).
    ceiling: expected accuracy of the noise-free gold order on the pairs that are no ties, the mean of max(p, 1 - p).
    gold_accuracy: the accuracy that order has on their labels as drawn. Both are NaN where every pair is a tie.
    dropped: row numbers of the prompts whose completions were all the same.
    """

    rows: list[dict[str, Any]]
    ceiling: float
    gold_accuracy: float
    dropped: list[int]


@dataclass(frozen=True)
class SimulatedAnnotator:
    """Judges all pairs of a prompt's completions by a noisy look at the gold reward (Bradley & Terry 1952).

    P(i beats j) = sigmoid((gold_i - gold_j) / noise), one 0/1 draw per pair. `noise` is in units of gold: two
    completions that lie `noise` apart are judged in gold's order 73 % of the time; at 0 always. Equal golds are a tie:
    whoever sees no difference says so, instead of tossing a coin. A draw depends on the seed, the row number and the
    texts only, not on the order or batching of rows, or of completions.
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

    def judge(self, rows: Sequence[dict[str, Any]]) -> Judgements:
        """Labels rows `{prompt, completions, category?, source?, row?}` with K >= 2 completions (text or messages).

        Identical completions of a prompt are merged. `row` defaults to the position in `rows`: pass it when judging in
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
                if chance != 0.5:  # a tie has no order that could be right
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
        return Judgements(judged, _mean(expected_accuracies), _mean(hits), dropped)

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
