"""The items of the exact-match task: beginnings of small stories whose next word a language model can know.

They are built from templates, in words that models of children's stories know, too. Six kinds ask for a word of the
story itself (who, which thing, which color), one for the end of a saying. There is no answer that the last word of a
prompt gives away, and each kind has several answers, so that no constant word is right for most.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, first_line


@dataclass(frozen=True)
class Item:
    """A prompt of the exact-match task.

    Attributes:
        prompt: plain text that the model continues.
        answers: words of which one must come next.
        kind: what the item asks for, for counts by kind.
    """

    prompt: str
    answers: tuple[str, ...]
    kind: str = "items"


PEOPLE = (
    ("Lily", "girl", "her"),
    ("Tom", "boy", "his"),
    ("Sue", "girl", "her"),
    ("Ben", "boy", "his"),
    ("Mia", "girl", "her"),
    ("Tim", "boy", "his"),
    ("Anna", "girl", "her"),
    ("Max", "boy", "his"),
    ("Amy", "girl", "her"),
    ("Sam", "boy", "his"),
)
COLORS = ("red", "blue", "green", "yellow")
THINGS = ("ball", "doll", "hat", "car", "book", "kite", "cup", "bear", "key", "box")
SAYINGS = (
    ("Once upon a", "time"),
    ("They lived happily ever", "after"),
    ('The mom said, "Thank', "you"),
    ("Birds can", "fly"),
    ("One, two,", "three"),
    ("She washed her hands with soap and", "water"),
    ("At night, they saw the moon and the", "stars"),
    ("He was tired, so he went to", "bed"),
    ("The sky is", "blue"),
    ("The cat and the", "dog"),
)
PER_KIND = 10


def default_items() -> list[Item]:
    """The shipped items: ten of each of seven kinds."""
    items = []
    things = list(islice(cycle(THINGS), PER_KIND + 3))
    people = list(islice(cycle(PEOPLE), PER_KIND + 1))
    colors = list(islice(cycle(COLORS), PER_KIND + 1))
    for k in range(PER_KIND):
        name, child, whose = people[k]
        other = people[k + 1][0]
        color, other_color = colors[k], colors[k + 1]
        thing, other_thing = things[k], things[k + 3]
        items += [
            Item(
                f"{name} lost {whose} {thing}. {name} looked for the {thing} under the bed. At last, {name} found the",
                (thing,),
                "lost thing",
            ),
            Item(
                f"{name} had a {color} {thing}. {other} had a {other_color} {other_thing}. They played all day. "
                f"{name} liked to play with {whose} {color}",
                (thing,),
                "thing of a color",
            ),
            Item(
                f"{name} and {other} were friends. {name} had a {thing}. {other} had a {other_thing}. {other} said, "
                f'"{name}, can I play with your',
                (thing,),
                "thing of a friend",
            ),
            Item(
                f'{name} gave the {thing} to {other}. {other} said, "Thank you,',
                (name,),
                "giver",
            ),
            Item(
                f"Once upon a time, there was a little {child} named {name}. One day, {whose} mom wanted to go to the "
                f'park. She said, "Come here,',
                (name,),
                "child",
            ),
            Item(
                f"Once upon a time, there was a {child} named {name}. {name} had a {color} {thing}. The color of the "
                f"{thing} was",
                (color,),
                "color",
            ),
            Item(SAYINGS[k][0], (SAYINGS[k][1],), "saying"),
        ]
    return items


# --- items of the user's own ------------------------------------------------------------------------------------------


def load_items(path: str | Path) -> list[Item]:
    """Reads items from a file: rows of `prompt`, `answers` (or `answer` for a single one), and `kind` if they have one.

    Args:
        path: a `.jsonl` file of one row a line, or a `.json` or `.yaml` file with a list of rows.

    Raises:
        UserError: the file cannot be read, or a row is no item. The message names it.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = yaml.safe_load(text)  # JSON is YAML
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"exact_match: {path}: {first_line(error)}: give a .jsonl, .json or .yaml file.") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"exact_match: {path} has no list of items: give rows with prompt and answers.")
    return [_item(row, f"{path.name} row {number}") for number, row in enumerate(rows)]


def _item(row: Any, where: str) -> Item:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise UserError(f"exact_match: {where}: `prompt` is missing or no text: give text that the model continues.")
    unknown = [name for name in row if name not in ("prompt", "answer", "answers", "kind")]
    if unknown:
        raise UserError(
            f"exact_match: {where}: column {unknown[0]!r} is unknown: an item has prompt, answers and kind."
        )
    answers = row.get("answers", row.get("answer"))
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, Sequence) or not answers or not all(_has_word(answer) for answer in answers):
        raise UserError(f"exact_match: {where}: `answers` is {answers!r}: give a list of words that may come next.")
    return Item(row["prompt"].rstrip(), tuple(answers), str(row.get("kind") or "items"))


def _has_word(answer: Any) -> bool:
    return isinstance(answer, str) and any(character.isalnum() for character in answer)
