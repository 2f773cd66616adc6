"""The quickstart's data: prompts and demonstrations.

The gold reward and the simulated annotator are in `hf_rlhf_ext.collect.simulated`, and can be imported from here too.

The texts are made from the templates and topics in the YAML files of this folder by a seeded generator. Nothing is
downloaded. Held-out prompts are about topics that no training prompt mentions.
"""

import random
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hf_rlhf_ext.collect.on_topic import OnTopicGold
from hf_rlhf_ext.collect.simulated import GoldReward, Judgments, SimulatedAnnotator
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.readers.mixture import apportion

DATA_DIR = Path(__file__).parent

FIRST_NAMES = ("Anna", "Tom", "Mira", "Jonas", "Leila", "Samuel")
TEXT_TASKS = ("rewrite", "summarization", "classification", "closed QA", "extract")
"""Use cases whose answer is in the prompt. Their demonstrations have no remark."""
MOODS = {"glad": 0.35, "gloomy": 0.35, None: 0.3}
"""Shares of demonstrations with a glad remark, a gloomy remark, and no remark."""
ON_TOPIC_SHARE = 0.5
"""Share of the remarks that are about the topic of the prompt, where remarks of both kinds are wanted."""

__all__ = ["GoldReward", "Judgments", "SimulatedAnnotator", "make_demonstrations", "make_prompts", "on_topic_gold"]


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
    """One prompt, with the kind of its topic, and the answers and slot values for its demonstration."""

    prompt: str
    topic: str
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
        items.append(_Item(prompt, template["topic"], template["answers"], slots))
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


def make_demonstrations(n: int, seed: int = 0, *, on_topic_remarks: bool = False) -> list[dict[str, Any]]:
    """Draws `n` demonstrations on training topics: rows of prompt and completion (one message each), and category.

    Answers follow from the prompt, in plain sentences of at most 36 words together. Except in `TEXT_TASKS`, some have a
    glad or gloomy remark before or after the answer, with the shares of `MOODS`. The remarks of `remarks.yaml` fit any
    prompt. With `on_topic_remarks`, about half of them are replaced by remarks of `remarks_on_topic.yaml`, which name
    the topic of the prompt. All else stays as it is without.
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
            remark = rng.choice(_load("remarks")[mood])
            if on_topic_remarks and rng.random() < ON_TOPIC_SHARE:
                remark = rng.choice(_load("remarks_on_topic")[item.topic][mood]).format_map(slots)
            parts.insert(position, remark)
        rows.append(
            {
                "prompt": [{"role": "user", "content": item.prompt}],
                "completion": [{"role": "assistant", "content": " ".join(parts)}],
                "category": category,
            }
        )
    return rows


@cache
def on_topic_gold() -> OnTopicGold:
    """The quickstart's gold reward. 500 training prompts, the same for all runs, tell what is usual in a prompt."""
    return OnTopicGold([row["prompt"] for row in make_prompts(500)])
