"""Openings and demonstrations of children's stories, in the vocabulary of stories260K, made by a seeded generator.

A demonstration continues the opening with two to four short sentences. A third of them are glad, a third plain and a
third poor: they repeat themselves, or run on without an end. The rater who gives 1 to 7 likes what `gold` of
`story_world` likes, with noise.
"""

import random
from collections.abc import Sequence
from typing import Any

from story_world import gold_of_text

Row = dict[str, Any]

WORDS = {
    "train": {
        "who": ("little girl", "little boy", "big dog", "small cat", "bird", "rabbit", "bear", "old man"),
        "name": ("Lily", "Tom", "Max", "Sue", "Ben", "Mia", "Tim", "Anna"),
        "place": ("park", "house", "garden", "forest", "lake", "farm"),
        "thing": ("ball", "toy", "red car", "box", "book", "hat", "boat", "doll"),
    },
    "heldout": {
        "who": ("mouse", "frog", "big cow", "duck", "young lady", "fish"),
        "name": ("Jack", "Sara", "Bob", "Lucy", "Sam", "Amy"),
        "place": ("beach", "shop", "river", "school", "zoo"),
        "thing": ("kite", "bike", "cup", "truck", "bell", "drum"),
    },
    # Openings of the second judge's comparisons, which no system is trained or compared on.
    "judge": {
        "who": ("pig", "fox", "little bug", "nice king", "monkey", "horse"),
        "name": ("Joe", "Molly", "Fred", "Emma", "Billy", "Jane"),
        "place": ("hill", "pond", "kitchen", "barn", "street"),
        "thing": ("cake", "stick", "train", "rock", "bag", "block"),
    },
}
"""Words of the openings. No name, place, character or thing of one split is in another."""

OPENINGS = {
    "introduction": "Once upon a time, there was a {who} named {name}.",
    "outing": "One day, {name} and a {who} went to the {place}.",
    "find": "{name} was at the {place}. A {who} gave {name} a {thing}.",
    "trouble": "{name} was sad. The {thing} was broken, and the {who} was not there.",
    "talk": '{name} saw a {who}. "I have a {thing}," said {name}.',
}
"""Use case -> opening."""

GLAD = (
    "{name} smiled and was very happy.",
    "They played and had fun.",
    "{name} gave the {who} a big hug.",
    "They became good friends.",
    "It was a great day.",
    "{name} laughed and danced.",
    "Mom was proud and kissed {name}.",
    "They shared a yummy cake.",
    "The sun was pretty.",
    "{name} said thank you.",
)
PLAIN = (
    "{name} walked to the {place}.",
    "The {who} ran away.",
    "They saw a tall tree.",
    "{name} looked at the {thing}.",
    "Mom called {name}.",
    "It was time to go home.",
    "The {who} was very big.",
    "{name} put the {thing} on the table.",
    "It started to rain.",
    "They sat down.",
)
POOR = (
    "{name} ran and ran and ran and ran and ran.",
    "The {who} was big. The {who} was big. The {who} was big.",
    "{name} went to the {place} and then to the {place} and then to the {place} and saw the {thing} and the {who}",
    "{name} cried and cried and cried.",
    "It was dark and the {who} was mad and {name} was mad and the {thing} was lost and it was cold",
)
QUALITIES = {"glad": 0.35, "plain": 0.35, "poor": 0.3}
"""Shares of the demonstrations."""
REASONS = (
    "{name} was happy because the {who} was nice.",
    "First, they looked for the {thing}.",
    "Then {name} helped the {who}.",
    "They did it together because they were friends.",
    "Next, they went to the {place}.",
)
SYSTEM = "Tell the story step by step. Say why."
REFUSAL = "I'm sorry, I can't tell this story."
NEXT = ("What did {name} do?", "Then the {who} came back.", "{name} went home.")
"""What the user says in the second turn of a conversation."""


def openings(n: int, seed: int, split: str) -> list[Row]:
    """`n` distinct openings as rows of `prompt` (one message) and `category`, each use case in turn while it has more.

    Args:
        n: number of openings.
        seed: the same arguments give the same rows.
        split: "train", "heldout" or "judge".
    """
    return [{"prompt": user(text), "category": category} for text, category, _ in _draw(n, seed, split)]


def _draw(n: int, seed: int, split: str) -> list[tuple[str, str, dict[str, str]]]:
    """`n` openings with their category and the words in them."""
    rng = random.Random(f"{seed}|{split}")
    drawn: dict[str, tuple[str, str, dict[str, str]]] = {}
    categories = list(OPENINGS)
    tries = 0
    while len(drawn) < n:
        slots = {kind: rng.choice(words) for kind, words in WORDS[split].items()}
        category = categories[tries % len(categories)]
        text = OPENINGS[category].format(**slots)
        drawn.setdefault(text, (text, category, slots))
        tries += 1
    return list(drawn.values())


def user(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


def story(slots: dict[str, str], rng: random.Random) -> str:
    """Two to four sentences: one of the qualities of `QUALITIES`."""
    (quality,) = rng.choices(list(QUALITIES), list(QUALITIES.values()))
    if quality == "poor":
        sentences = rng.sample(POOR, 2)
    else:
        n_glad = {"glad": 2, "plain": 1}[quality]
        sentences = rng.sample(GLAD, n_glad) + rng.sample(PLAIN, 3 - n_glad)
        rng.shuffle(sentences)
    return " ".join(sentence.format(**slots) for sentence in sentences)


def rating(text: str, rng: random.Random) -> int:
    """1 to 7: 4 for a gold reward of 1, a point for each unit of it, and noise with a standard deviation of 1.5."""
    return max(1, min(7, round(3 + gold_of_text(text) + rng.gauss(0, 1.5))))


def demonstrations(n: int, seed: int) -> list[Row]:
    """`n` rows of `prompt`, `completion`, `category` and `rating`. No opening is there twice."""
    rows = []
    rng = random.Random(f"{seed}|demonstrations")
    for text, category, slots in _draw(n, seed + 1000, "train"):
        answer = story(slots, rng)
        rows.append(
            {
                "prompt": user(text),
                "completion": assistant(answer),
                "category": category,
                "rating": rating(answer, rng),
            }
        )
    return rows


def mix(demos: Sequence[Row], machine_written: Sequence[Row], seed: int) -> list[Row]:
    """A large mix as it is collected: with repeats, refusals, very short and malformed answers among the rest."""
    rng = random.Random(f"{seed}|mix")
    rows = []
    for row in [*demos, *machine_written]:
        kept = {name: row[name] for name in ("prompt", "completion", "category")}
        rows.append(kept)
        if rng.random() < 0.1:
            rows.append(dict(kept))
        if rng.random() < 0.2:
            bad = rng.choice((REFUSAL, "No.", "The \ufffd\ufffd ran."))
            rows.append(
                kept | {"prompt": user(f"{kept['prompt'][0]['content']} What then?"), "completion": assistant(bad)}
            )
    rng.shuffle(rows)
    return rows


def conversations(n: int, seed: int) -> list[Row]:
    """`n` conversations of two answers each."""
    rows = []
    rng = random.Random(f"{seed}|conversations")
    for text, category, slots in _draw(n, seed + 2000, "train"):
        first = " ".join(story(slots, rng).split(". ")[0:1]).rstrip(".") + "."
        turn = rng.choice(NEXT).format(**slots)
        prompt = [*user(text), *assistant(first), *user(turn)]
        rows.append({"prompt": prompt, "completion": assistant(story(slots, rng)), "category": category})
    return rows


def ranked(n: int, k: int, seed: int) -> list[Row]:
    """`k` rated answers to each of `n` openings."""
    rows = []
    rng = random.Random(f"{seed}|ranked")
    for text, category, slots in _draw(n, seed + 3000, "train"):
        for _ in range(k):
            answer = story(slots, rng)
            rows.append(
                {
                    "prompt": user(text),
                    "completion": assistant(answer),
                    "category": category,
                    "rating": rating(answer, rng),
                }
            )
    return rows


def explanations(n: int, seed: int) -> list[Row]:
    """`n` rows with a system message; most answers give reasons or steps."""
    rows = []
    rng = random.Random(f"{seed}|explanations")
    for text, category, slots in _draw(n, seed + 4000, "train"):
        answer = story(slots, rng)
        if rng.random() < 0.8:
            answer = " ".join(sentence.format(**slots) for sentence in rng.sample(REASONS, 3))
        prompt = [{"role": "system", "content": SYSTEM}, *user(text)]
        rows.append({"prompt": prompt, "completion": assistant(answer), "category": category})
    return rows
