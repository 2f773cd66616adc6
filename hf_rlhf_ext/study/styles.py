"""Choices of demonstrations in the style of systems that were trained with supervised fine-tuning alone.

The data of these systems are not here. A style takes the user's own rows and repeats the shape of the original's rows
and the way in which they were chosen. Its system is named `sft_<style>_style`, and never by the original's name.

The originals, with the source of each fact:

- alpaca: 52,000 instructions of one turn, written by text-davinci-003 from 175 tasks that people wrote. Instructions
  whose ROUGE-L with an earlier one is above 0.7 were left out (Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca;
  the filter is that of Self-Instruct, arXiv:2212.10560).
- gpt4all: about a million answers of GPT-3.5-Turbo. 437,605 were left after refusals, malformed answers and very short
  answers were removed, which removed a whole source, P3 (Anand et al. 2023, arXiv:2311.04931, sec. 2.1).
- vicuna: about 70,000 conversations that users shared on ShareGPT. Inappropriate and low-quality ones were removed, and
  all answers of a conversation are learned from (Chiang et al. 2023, lmsys.org/blog/2023-03-30-vicuna).
- guanaco: the top-ranked reply at each level of the conversation trees of OASST1, 9,209 rows, with a LoRA on a base in
  4 bits (Dettmers et al. 2023, arXiv:2305.14314, sec. 5 and appendix B).
- lima: 1,000 rows chosen by hand for quality and diversity: 750 of community forums, where an answer of Stack Exchange
  needs a score of 10 and 1,200 to 4,096 characters, and 250 written by the authors (Zhou et al. 2023,
  arXiv:2305.11206, sec. 2).
- orca: five million tasks with a system message that asks for an explanation, answered step by step by ChatGPT, and one
  million of them by GPT-4 (Mukherjee et al. 2023, arXiv:2306.02707, sec. 3).
- feedme: demonstrations, and answers of models that labelers rated 7 of 7, for text-davinci-001 and -002 (OpenAI,
  "Model index for researchers", 2022). Their number was not published.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..data.text import plain_text, text_key
from ..errors import UserError
from ..metrics.texts import is_refusal
from ..quality.duplicates import PromptIndex, question_of, words_of

Row = dict[str, Any]

RATED = ("lima", "feedme")
"""Styles that choose by the column of ratings. "guanaco" takes ranks in its place."""
LIMA_SHARE = 4
"""By default, the style of LIMA chooses at most one of so many rows."""
REASONS = re.compile(
    r"\b(because|so that|therefore|this means|first|then|next|finally|step)\b|^\s*(\d+[.)]|[-*])\s", re.I | re.M
)
"""Words and list marks of an answer that explains, or goes step by step."""
SENTENCE_END = re.compile(r"[.!?][\"')]*(\s|$)|\n")


@dataclass(frozen=True)
class Selection:
    """Demonstrations that a style chose.

    Attributes:
        rows: the chosen rows in their order. "vicuna" makes a row of each answer of a conversation.
        rule: the rule in one sentence, with the source and the numbers of rows.
        counts: number of rows `given` and `chosen`, and of those that were left out, by reason.
    """

    rows: list[Row]
    rule: str
    counts: dict[str, int]


@dataclass(frozen=True)
class Style:
    """What is known about a style.

    Attributes:
        size: rows of the original, and the most that are chosen by default. `None` if it was not published: all that
            fit.
        rule: which rows are chosen, after "rows of SOURCE:".
        needs: what the rows must have, for the documentation and messages.
        training: what is special in the training of the original, if anything.
        min_words: fewest words of an answer.
    """

    size: int | None
    rule: str
    needs: str
    training: str | None = None
    min_words: int = 1


STYLES = {
    "alpaca": Style(
        size=52_000,
        rule="instructions of one turn, without near duplicates of earlier instructions",
        needs="prompts of one turn",
    ),
    "gpt4all": Style(
        size=437_605,
        rule="all but near-duplicate prompts, refusals, malformed answers and answers of fewer than {min_words} words",
        needs="prompts and answers",
        min_words=3,
    ),
    "vicuna": Style(
        size=70_000,
        rule="conversations of several turns, without refusals, with a row for each answer",
        needs="prompts that are messages with at least one earlier answer of the assistant",
        training="all answers of a conversation are learned from",
    ),
    "guanaco": Style(
        size=9_209,
        rule="the best answer of each prompt by {order}",
        needs="several answers to a prompt, with a column of ratings (or `rank`, 1 is best)",
        training="a LoRA on a base in 4 bits (QLoRA)",
    ),
    "lima": Style(
        size=1_000,
        rule="rated {min_rating:g} or more, with at least {min_words} words, no refusals and no near duplicates, the "
        "best rated first, in turn from each category",
        needs="a column of ratings",
        min_words=12,
    ),
    "orca": Style(
        size=5_000_000,
        rule="a system message, and an answer of at least two sentences that gives reasons or steps",
        needs="prompts that are messages with a system message, and answers that explain",
        training="the system message is part of the prompt",
    ),
    "feedme": Style(
        size=None,
        rule="rated {min_rating:g} or more",
        needs="a column of ratings",
    ),
}
"""Name -> the style."""


def select(
    style: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    seed: int,
    size: int | None = None,
    min_words: int | None = None,
    min_rating: float | None = None,
    rating_column: str = "rating",
    source: str = "the demonstrations",
) -> Selection:
    """Chooses demonstrations in a style. The same arguments choose the same rows.

    Args:
        style: one of `STYLES`: "alpaca", "gpt4all", "vicuna", "guanaco", "lima", "orca" or "feedme".
        rows: demonstrations as `load_demonstrations` returns them: `prompt` and `completion`, each text or messages,
            `category` and the column of ratings where the style uses them, and `rank` (1 is best) in place of ratings
            for "guanaco".
        seed: for the rows that are kept where more fit than `size`, and for the order of equal ratings.
        size: rows to choose at most. `None` takes the size of the original, and for "lima" at most a quarter of the
            rows, as few rows out of many are the point.
        min_words: fewest words of an answer. `None` is the style's own: 3 for "gpt4all", 12 for "lima", else 1.
        min_rating: lowest rating that is chosen, for "feedme" and "lima". `None` is the highest rating in the rows
            for "feedme", and the median rating for "lima".
        rating_column: column with ratings, of which a higher one is better.
        source: name of the file of the rows, for the rule and messages.

    Returns:
        The rows, the rule and the counts.

    Raises:
        UserError: the style is not known, an option has no effect on the style, or the rows lack what the style needs.
    """
    _check_options(style, size, min_words, min_rating)
    known = STYLES[style]
    chooser = _Chooser(
        style=style,
        source=source,
        seed=seed,
        min_words=known.min_words if min_words is None else min_words,
        min_rating=min_rating,
        rating_column=rating_column,
    )
    kept = chooser.choose(rows)
    limit = _limit(style, size, len(rows))
    if style == "lima":
        kept = chooser.in_turn(kept, limit)
    elif limit is not None and len(kept) > limit:
        kept = sorted(random.Random(f"{seed}|{style}").sample(kept, limit), key=lambda choice: choice.number)
    chooser.left_out["more than `size`"] += chooser.fitting - len(kept)
    if not kept:
        chooser.refuse("no row fits", "pass other rows with `source`, or lower `min_words` or `min_rating`")

    counts = {"given": len(rows), "chosen": len(kept)}
    counts |= {reason: n for reason, n in chooser.left_out.items() if n}
    chosen = f"{len(kept)} answers" if style == "vicuna" else str(len(kept))
    rule = known.rule.format(
        min_words=chooser.min_words, min_rating=chooser.min_rating or 0, order=chooser.order or "rating"
    )
    return Selection(
        rows=[choice.row for choice in kept],
        rule=f"{chosen} of {len(rows)} rows of {source}: {rule}",
        counts=counts,
    )


def _check_options(style: str, size: int | None, min_words: int | None, min_rating: float | None) -> None:
    if style not in STYLES:
        raise UserError(f"style={style!r} is not known: use one of {', '.join(STYLES)}")
    for name, value in (("size", size), ("min_words", min_words)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} of sft_{style}_style: use a number of at least 1")
    if min_rating is not None and style not in RATED:
        raise UserError(
            f"min_rating={min_rating:g} has no effect on sft_{style}_style: remove it, or use {' or '.join(RATED)}"
        )


def _limit(style: str, size: int | None, n_rows: int) -> int | None:
    """The most rows to choose; `None` for all that fit."""
    if size is not None:
        return size
    if style == "lima":
        return max(1, min(STYLES[style].size, n_rows // LIMA_SHARE))
    return STYLES[style].size


@dataclass(frozen=True)
class _Choice:
    """A row that fits, with its number in the source and its rating, if it has one."""

    row: Row
    number: int
    rating: float | None = None


class _Chooser:
    """Finds the rows that fit a style, and counts the others by reason."""

    def __init__(
        self, *, style: str, source: str, seed: int, min_words: int, min_rating: float | None, rating_column: str
    ):
        self.style = style
        self.source = source
        self.seed = seed
        self.min_words = min_words
        self.min_rating = min_rating
        self.rating_column = rating_column
        self.order: str | None = None
        self.left_out: Counter[str] = Counter()
        self.fitting = 0

    def refuse(self, what: str, remedy: str) -> None:
        raise UserError(f"sft_{self.style}_style: {what} in {self.source}: {remedy}")

    def choose(self, rows: Sequence[Mapping[str, Any]]) -> list[_Choice]:
        """The rows that fit, in their order."""
        if not rows:
            self.refuse("there are no rows", "pass a file with demonstrations")
        of_style: dict[str, Callable[[list[Row]], list[_Choice]]] = {
            "alpaca": self._alpaca,
            "gpt4all": self._gpt4all,
            "vicuna": self._vicuna,
            "guanaco": self._guanaco,
            "lima": self._lima,
            "orca": self._orca,
            "feedme": self._feedme,
        }
        kept = of_style[self.style]([dict(row) for row in rows])
        self.fitting = len(kept)
        return kept

    # The rules

    def _alpaca(self, rows: list[Row]) -> list[_Choice]:
        single = []
        for choice in self._long_enough(_numbered(rows)):
            if _earlier_answers(choice.row["prompt"]):
                self.left_out["several turns"] += 1
            else:
                single.append(choice)
        if not single:
            self.refuse("no prompt has one turn only", "pass a file of instructions with `source`")
        return self._without_near_duplicates(single)

    def _gpt4all(self, rows: list[Row]) -> list[_Choice]:
        kept = []
        for choice in self._without_refusals(self._long_enough(_numbered(rows))):
            if _is_malformed(plain_text(choice.row["completion"])):
                self.left_out["malformed"] += 1
            else:
                kept.append(choice)
        return self._without_near_duplicates(kept)

    def _vicuna(self, rows: list[Row]) -> list[_Choice]:
        answers: dict[tuple[str, str], _Choice] = {}
        conversations = 0
        for choice in self._without_refusals(self._long_enough(_numbered(rows))):
            if not _earlier_answers(choice.row["prompt"]):
                self.left_out["one turn"] += 1
                continue
            conversations += 1
            for part in _every_answer(choice.row):
                key = (text_key(part["prompt"]), text_key(part["completion"]))
                # A source with a row for each answer has the earlier ones already.
                answers.setdefault(key, _Choice(part, choice.number))
        if not conversations:
            self.refuse(
                "no prompt has an earlier answer of the assistant", "pass a file of conversations with `source`"
            )
        return list(answers.values())

    def _guanaco(self, rows: list[Row]) -> list[_Choice]:
        self.order = self.rating_column if any(self._has_number(row, self.rating_column) for row in rows) else "rank"
        if not any(self._has_number(row, self.order) for row in rows):
            self.refuse(
                f"there is neither a column {self.rating_column!r} nor a column 'rank'",
                "rate the answers, or name the column with `rating_column`",
            )
        sign = -1 if self.order == "rank" else 1
        by_prompt: dict[str, list[_Choice]] = defaultdict(list)
        for choice in self._long_enough(_numbered(rows)):
            if not self._has_number(choice.row, self.order):
                self.left_out[f"no {self.order}"] += 1
                continue
            rated = _Choice(choice.row, choice.number, sign * float(choice.row[self.order]))
            by_prompt[text_key(rated.row["prompt"])].append(rated)
        if all(len(answers) == 1 for answers in by_prompt.values()):
            self.refuse("no prompt has two answers", "pass a file with several rated answers to a prompt with `source`")
        best = []
        for answers in by_prompt.values():
            best.append(max(answers, key=lambda choice: choice.rating))  # of equal ones, the first
            self.left_out["not the best answer"] += len(answers) - 1
        return best

    def _lima(self, rows: list[Row]) -> list[_Choice]:
        rated = self._rated(rows)
        if self.min_rating is None:
            self.min_rating = median(choice.rating for choice in rated)
        kept = self._without_refusals(self._long_enough(self._good(rated)))
        kept.sort(key=lambda choice: -choice.rating)  # of near duplicates, the best rated is kept
        return self._without_near_duplicates(kept)

    def _orca(self, rows: list[Row]) -> list[_Choice]:
        with_system = []
        for choice in self._long_enough(_numbered(rows)):
            if _has_system(choice.row["prompt"]):
                with_system.append(choice)
            else:
                self.left_out["no system message"] += 1
        if not with_system:
            self.refuse("no prompt has a system message", "pass a file of explanations with `source`")
        kept = []
        for choice in with_system:
            if _explains(plain_text(choice.row["completion"])):
                kept.append(choice)
            else:
                self.left_out["no explanation"] += 1
        if not kept:
            self.refuse("no answer gives reasons or steps", "pass a file of explanations with `source`")
        return kept

    def _feedme(self, rows: list[Row]) -> list[_Choice]:
        rated = self._rated(rows)
        if self.min_rating is None:
            self.min_rating = max(choice.rating for choice in rated)
        return self._long_enough(self._good(rated))

    def in_turn(self, choices: list[_Choice], limit: int) -> list[_Choice]:
        """At most `limit` choices, the best rated of each category in turn, in the order of the source."""
        rng = random.Random(f"{self.seed}|{self.style}")
        shuffled = rng.sample(choices, len(choices))
        shuffled.sort(key=lambda choice: -choice.rating)  # stable: equal ratings stay shuffled
        by_category: dict[Any, list[_Choice]] = defaultdict(list)
        for choice in shuffled:
            by_category[choice.row.get("category")].append(choice)
        chosen: list[_Choice] = []
        place = 0
        while len(chosen) < min(limit, len(choices)):
            for members in by_category.values():
                if place < len(members):
                    chosen.append(members[place])
            place += 1
        return sorted(chosen[:limit], key=lambda choice: choice.number)

    # The parts of rules

    def _has_number(self, row: Row, column: str) -> bool:
        return isinstance(row.get(column), int | float) and not isinstance(row.get(column), bool)

    def _rated(self, rows: list[Row]) -> list[_Choice]:
        """The rows that have a rating. A row without one is counted."""
        rated = []
        for choice in _numbered(rows):
            if self._has_number(choice.row, self.rating_column):
                rated.append(_Choice(choice.row, choice.number, float(choice.row[self.rating_column])))
            else:
                self.left_out["no rating"] += 1
        if not rated:
            self.refuse(
                f"there is no column {self.rating_column!r} with numbers",
                "rate the demonstrations, or name the column with `rating_column`",
            )
        return rated

    def _good(self, rated: list[_Choice]) -> list[_Choice]:
        kept = [choice for choice in rated if choice.rating >= self.min_rating]
        self.left_out["low rating"] += len(rated) - len(kept)
        return kept

    def _long_enough(self, choices: list[_Choice]) -> list[_Choice]:
        kept = [choice for choice in choices if len(words_of(plain_text(choice.row["completion"]))) >= self.min_words]
        self.left_out["too short"] += len(choices) - len(kept)
        return kept

    def _without_refusals(self, choices: list[_Choice]) -> list[_Choice]:
        kept = [choice for choice in choices if not is_refusal(plain_text(choice.row["completion"]))]
        self.left_out["refusal"] += len(choices) - len(kept)
        return kept

    def _without_near_duplicates(self, choices: list[_Choice]) -> list[_Choice]:
        index = PromptIndex()
        kept = []
        for choice in choices:
            if index.holds(question_of(choice.row["prompt"]), add=True):
                self.left_out["near duplicate"] += 1
            else:
                kept.append(choice)
        return kept


def _numbered(rows: list[Row]) -> list[_Choice]:
    return [_Choice(row, number) for number, row in enumerate(rows)]


def _earlier_answers(prompt: Any) -> int:
    """Number of answers of the assistant in a prompt."""
    if isinstance(prompt, str):
        return 0
    return sum(message["role"] == "assistant" for message in prompt)


def _has_system(prompt: Any) -> bool:
    return not isinstance(prompt, str) and any(message["role"] == "system" for message in prompt)


def _every_answer(row: Row) -> list[Row]:
    """A row for each answer of a conversation, the last one included."""
    prompt = row["prompt"]
    parts = []
    for place, message in enumerate(prompt):
        if message["role"] == "assistant" and place > 0:
            parts.append(row | {"prompt": prompt[:place], "completion": [message]})
    return [*parts, row]


def _is_malformed(text: str) -> bool:
    """True for an answer with characters that could not be decoded, or with a code block that is not closed."""
    return "\ufffd" in text or text.count("```") % 2 == 1


def _explains(text: str) -> bool:
    """True for an answer of at least two sentences (or lines) that has a word of reason or order, or a list."""
    return len(SENTENCE_END.findall(text.strip())) >= 2 and REASONS.search(text) is not None
