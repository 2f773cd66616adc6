"""The quickstart's data: prompts, demonstrations, the gold reward and the simulated annotator.

The texts are ours: templates and topics in `recipes/quickstart/*.yaml`, filled by a seeded generator. Nothing is
downloaded. Held-out prompts are about topics that no training prompt mentions.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, combinations, product, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hf_rlhf_ext.data.mixture import apportion
from hf_rlhf_ext.errors import UserError

DATA_DIR = Path(__file__).with_name("quickstart")

FIRST_NAMES = ("Anna", "Tom", "Mira", "Jonas", "Leila", "Samuel")
TEXT_TASKS = ("rewrite", "summarization", "classification", "closed QA", "extract")
"""Use cases whose answer is in the prompt: their demonstrations carry no remark."""
MOODS = (("glad", 0.35), ("gloomy", 0.35), (None, 0.3))
"""Shares of the demonstrators who add a glad remark, a gloomy one, and none."""
EMPTY_COMPLETION_GOLD = -1.0


# --- prompts and demonstrations --------------------------------------------------------------------------------------


class _Slots(dict):
    """Values of a template's slots; `{Name}` reads `name` and capitalises its first letter."""

    def __missing__(self, key: str) -> str:
        value = self[key[0].lower() + key[1:]] if key[0].isupper() else None
        if value is None:
            raise KeyError(key)
        return value[0].upper() + value[1:]


@cache
def _load(name: str) -> dict[str, Any]:
    return yaml.safe_load((DATA_DIR / f"{name}.yaml").read_text(encoding="utf-8"))


def _topics(kind: str, split: str) -> list[dict[str, str]]:
    """The rows of one kind of topic as slot values; `the` and `bare` are derived from a leading article."""
    table = _load("topics")[kind]
    rows = [dict(zip(table["columns"], line.split(" | "), strict=False)) for line in table[split]]
    for row in rows:
        bare = row.get("name", "")
        for article in ("a ", "an ", "the "):
            bare = bare.removeprefix(article)
        row |= {"bare": bare, "the": f"the {bare}"}
    return rows


class _Item(NamedTuple):
    """One filled prompt, and what its demonstration can be made of."""

    prompt: str
    answers: Sequence[str]
    slots: dict[str, str]


def _items(category: str, split: str, rng: random.Random) -> list[_Item]:
    """Every distinct prompt of a category, shuffled, its templates in turn so that any prefix is varied."""
    columns = []
    for template in _load("templates")[category]:
        slots = [
            topic | {"when": when}
            for topic, when in product(_topics(template["topic"], split), template.get("when", [""]))
        ]
        rng.shuffle(slots)
        columns.append([_Item(template["prompt"].format_map(_Slots(s)), template["answers"], s) for s in slots])
    in_turn = [item for item in chain.from_iterable(zip_longest(*columns)) if item is not None]
    return list({item.prompt: item for item in in_turn}.values())


def _draw(n: int, seed: int, *, split: str, purpose: str, min_per_category: int) -> list[tuple[str, _Item]]:
    drawn = []
    for category, count in apportion(n, min_per_category=min_per_category).items():
        # One generator a category, so that the minimum of one does not move the draws of another.
        items = _items(category, split, random.Random(f"{seed}|{split}|{purpose}|{category}"))
        if count > len(items):
            raise UserError(
                f"The quickstart has {len(items)} distinct {split} prompts of category '{category}', n={n} needs "
                f"{count}: use a smaller n, or add topics to recipes/quickstart/topics.yaml."
            )
        drawn += [(category, item) for item in items[:count]]
    random.Random(f"{seed}|{split}|{purpose}|order").shuffle(drawn)
    return drawn


def make_prompts(n: int, seed: int = 0, *, split: str = "train", min_per_category: int = 0) -> list[dict[str, str]]:
    """Draws `n` distinct prompts `{prompt, category}` (plain text) over InstructGPT's ten use cases, in shuffled order.

    `split` is "train" or "heldout": two sets of topics with nothing in common. The same arguments give the same list.
    """
    drawn = _draw(n, seed, split=split, purpose="prompts", min_per_category=min_per_category)
    return [{"prompt": item.prompt, "category": category} for category, item in drawn]


def make_splits(n_train: int, n_heldout: int, seed: int = 0, *, min_per_category: int = 0) -> tuple[list, list]:
    """Train and held-out prompts; `min_per_category` holds for the held-out ones, which are reported by category."""
    train = make_prompts(n_train, seed)
    return train, make_prompts(n_heldout, seed, split="heldout", min_per_category=min_per_category)


def make_demonstrations(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Draws `n` demonstrations on training topics: a message each for prompt and completion, and the category.

    Answers are complete sentences of at most 36 words in a plain register that follow from the prompt. Demonstrators
    have moods: outside `TEXT_TASKS`, `MOODS` says how many add a remark from `remarks.yaml`, before or after.
    """
    rows = []
    for index, (category, item) in enumerate(_draw(n, seed, split="train", purpose="demos", min_per_category=0)):
        rng = random.Random(f"{seed}|demos|{index}")
        slots = _Slots(item.slots, who2=rng.choice(FIRST_NAMES))
        parts = [rng.choice(item.answers).format_map(slots)]
        (mood,) = rng.choices([name for name, _ in MOODS], [share for _, share in MOODS])
        if mood and category not in TEXT_TASKS:
            parts.insert(rng.randrange(2), rng.choice(_load("remarks")[mood]))
        rows.append(
            {
                "prompt": [{"role": "user", "content": item.prompt}],
                "completion": [{"role": "assistant", "content": " ".join(parts)}],
                "category": category,
            }
        )
    return rows


# --- the gold reward and the people it stands for --------------------------------------------------------------------


def _text(completion: str | list[dict[str, str]]) -> str:
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
        return [self._score(_text(completion)) for completion in completions]

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

    P(i beats j) = sigmoid((gold_i - gold_j) / noise), one 0/1 draw a pair. `noise` is in units of gold: two completions
    that lie `noise` apart are judged in gold's order 73 % of the time; at 0 always. Equal golds are a tie: whoever sees
    no difference says so, instead of tossing a coin. A draw depends on the seed, the row number and the texts only, not
    on the order or batching of rows, or of completions.
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
            return 0.5 if gold_i == gold_j else float(gold_i > gold_j)
        return 1 / (1 + math.exp(-max(-700.0, min(700.0, (gold_i - gold_j) / self.noise))))  # exp(710) overflows

    def judge(self, rows: Sequence[dict[str, Any]]) -> Judgements:
        """Labels rows `{prompt, completions, category?, source?, row?}` with K >= 2 completions (text or messages).

        Identical completions of a prompt are merged. `row` defaults to the position in `rows`: pass it when judging in
        batches.
        """
        judged, ceilings, agreements, dropped = [], [], [], []
        for position, row in enumerate(rows):
            number = row.get("row", position)
            distinct: dict[str, Any] = {}
            for completion in row["completions"]:
                distinct.setdefault(_text(completion), completion)
            texts, completions = list(distinct), list(distinct.values())
            if len(texts) < 2:
                dropped.append(number)
                continue
            golds = self.gold([row["prompt"]] * len(completions), completions)
            pairs = list(combinations(range(len(texts)), 2))
            chances = [self.preference(golds[i], golds[j]) for i, j in pairs]
            targets = [self._draw(number, texts[i], texts[j], p) for (i, j), p in zip(pairs, chances, strict=True)]
            ceilings += [max(p, 1 - p) for p in chances if p != 0.5]
            agreements += [float((p > 0.5) == t) for p, t in zip(chances, targets, strict=True) if p != 0.5]
            judged.append(
                {
                    "prompt": row["prompt"],
                    "completions": completions,
                    "pairs": [list(pair) for pair in pairs],
                    "targets": targets,
                    "weights": [1 / len(pairs)] * len(pairs),
                    "category": row.get("category"),
                    "source": row.get("source", "simulated annotator"),
                    "row": number,
                }
            )
        return Judgements(judged, _mean(ceilings), _mean(agreements), dropped)

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
    return sum(values) / len(values) if values else math.nan
