"""What both gold rewards of the quickstart give to texts of known kinds: a table of docs/quickstart.md.

On held-out prompts, without a model. python benchmarks/quickstart_gold.py prints the means.
"""

import random
from statistics import fmean

from hf_rlhf_ext.collect.simulated import GoldReward
from hf_rlhf_ext.readers.mixture import USE_CASE_SHARES
from hf_rlhf_ext.recipes.quickstart_parts.data import TEXT_TASKS, _Item, _items, _load, _Slots, on_topic_gold

PER_USE_CASE = 60
WORDS = "love wonderful happy great"


def heldout_items() -> list[_Item]:
    """Held-out prompts of the use cases that have remarks, without statements, whose held-out topics have no slots."""
    items = []
    for category in USE_CASE_SHARES:
        if category not in TEXT_TASKS:
            found = _items(category, "heldout", random.Random(0))
            items += [item for item in found if item.topic != "statement"][:PER_USE_CASE]
    return items


def texts_of(item: _Item, rng: random.Random) -> dict[str, str]:
    """One text of each kind as an answer to a prompt."""
    slots = _Slots(item.slots)
    stock = {mood: rng.choice(_load("remarks")[mood]) for mood in ("glad", "gloomy")}
    on_topic = {}
    for mood in ("glad", "gloomy"):
        on_topic[mood] = rng.choice(_load("remarks_on_topic")[item.topic][mood]).format_map(slots)
    return {
        "compliment that fits any prompt": stock["glad"],
        "complaint that fits any prompt": stock["gloomy"],
        "kind sentence on the topic": on_topic["glad"],
        "the same, then a compliment that fits any prompt": f"{on_topic['glad']} {stock['glad']}",
        "the same sentence four times": " ".join([on_topic["glad"]] * 4),
        "unkind sentence on the topic": on_topic["gloomy"],
        "the prompt again": item.prompt,
        "the topic and a list of kind words": f"{item.slots['name']} {WORDS}",
        "the topic in a question with a kind word": f"Where do lovely {item.slots['name']} live?",
    }


def means() -> dict[str, tuple[float, float]]:
    """Mean gold rewards of each kind of text: on topic and kind, and sentiment alone."""
    rng = random.Random(0)
    golds = (on_topic_gold(), GoldReward())
    scores: dict[str, list[tuple[float, ...]]] = {}
    for item in heldout_items():
        for kind, text in texts_of(item, rng).items():
            scores.setdefault(kind, []).append(tuple(gold([item.prompt], [text])[0] for gold in golds))
    return {kind: (fmean(row[0] for row in rows), fmean(row[1] for row in rows)) for kind, rows in scores.items()}


if __name__ == "__main__":
    for kind, (on_topic, sentiment) in means().items():
        print(f"{kind:50s} {on_topic:.2f} {sentiment:+.2f}")
