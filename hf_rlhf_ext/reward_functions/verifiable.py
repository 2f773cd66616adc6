"""Rewards that a program can check: a format, an exact answer, a number, a choice.

Each factory returns a function with TRL's signature. Scores are 1 and 0, or `None` for a row without an answer.
"""

import re
import string
import unicodedata
from decimal import Decimal, InvalidOperation
from numbers import Real
from typing import Any

import regex as regex_engine

from ..errors import UserError, first_line
from .base import AnswerFunction, RewardFunction, WarnOnce, accepted_texts

REGEX_SECONDS = 1.0
"""Limit for a pattern on one completion, in CPU seconds: some patterns take exponential time on some texts."""


def regex(pattern: str, *, ignore_case: bool = False, whole: bool = False) -> RewardFunction:
    r"""1 if a pattern is found in the completion, else 0.

    `^` and `$` match at line ends, and `.` matches line ends too. Where matching takes more than a second of CPU time,
    which is longer by the clock on a busy machine, the score is 0, and a warning says so once.

    Args:
        pattern: a regular expression of the package `regex`, which takes all of those of Python's `re`.
        ignore_case: whether `a` matches `A`.
        whole: whether the whole completion must match, without spaces around it.

    Raises:
        UserError: the pattern is not a regular expression, or empty.
    """
    return Regex(pattern, ignore_case=ignore_case, whole=whole)


def think_format() -> RewardFunction:
    """1 if the completion has the form `<think>…</think>…`, else 0: TRL's `think_format_reward`, also for texts."""
    return ThinkFormat()


def exact_match(
    column: str = "answer",
    *,
    after: str | None = None,
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    ignore_articles: bool = False,
) -> RewardFunction:
    """1 if the completion is the value of a column, else 0. Spaces around it and runs of spaces do not count.

    All three options together are the normalization of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250, sec. 6.1).

    Args:
        column: column with the answer: a text, a number, or a list of accepted texts.
        after: only what follows the last occurrence of this mark counts, such as `</think>` or `Answer:`.
        ignore_case: whether case does not count.
        ignore_punctuation: whether ASCII punctuation does not count.
        ignore_articles: whether `a`, `an` and `the` do not count.
    """
    return ExactMatch(
        column,
        after=after,
        ignore_case=ignore_case,
        ignore_punctuation=ignore_punctuation,
        ignore_articles=ignore_articles,
    )


def multiple_choice(column: str = "answer", *, choices: str = "ABCD", after: str | None = None) -> RewardFunction:
    r"""1 if the completion chooses the letter of a column, else 0.

    A choice is, in this order: the last `\boxed{B}`, the last `answer is (B)`, `Answer: B` or `correct option is B`,
    or a completion that starts with the letter alone, as `B`, `(B)`, `B.`, `B) Paris` or on a line of its own. Marks
    such as `**`, `$` and quotes around the letter do not matter. A completion without one of these scores 0.

    Args:
        column: column with the letter, or with the index of the choice, which starts at 0. A value that is one of the
            choices is that choice: 1 is the first of `1234`.
        choices: the letters.
        after: only what follows the last occurrence of this mark counts.

    Raises:
        UserError: there are fewer than two letters, or a value of the column is none of the choices.
    """
    return MultipleChoice(column, choices=choices, after=after)


def number(
    column: str = "answer", *, tolerance: float = 0.0, relative: bool = False, after: str | None = None
) -> RewardFunction:
    """1 if the last number of the completion is the number of a column, else 0. Numbers are compared as decimals.

    `1,234.5`, `-3`, `.5` and `2e3` are numbers; a fraction is two, and `1.234,5` is read as in English. Units and what
    else stands around do not count. For expressions, use `math`.

    Args:
        column: column with a number, or a text whose last number counts, such as the answers of GSM8K
            (`… #### 72`), or a list of which any is met. A row without a number is not scored. Numbers that were
            computed, such as 0.30000000000000004, need a tolerance.
        tolerance: largest difference that counts as equal.
        relative: whether `tolerance` is a share of the right number.
        after: only what follows the last occurrence of this mark counts.

    Raises:
        UserError: `tolerance` is negative.
    """
    return Number(column, tolerance=tolerance, relative=relative, after=after)


# --- formats ---------------------------------------------------------------------------------------------------------


class Regex(RewardFunction):
    """See `regex`."""

    __name__ = "regex"

    def __init__(self, pattern: str, *, ignore_case: bool, whole: bool):
        super().__init__()
        flags = regex_engine.MULTILINE | regex_engine.DOTALL
        if ignore_case:
            flags |= regex_engine.IGNORECASE
        if not isinstance(pattern, str) or not pattern:
            raise UserError(f"regex: pattern={pattern!r} is no text with a pattern: every completion would have it.")
        try:
            self.pattern = regex_engine.compile(pattern, flags)
        except (regex_engine.error, TypeError) as error:
            raise UserError(f"regex: pattern {pattern!r} is no regular expression ({first_line(error)}).") from None
        self.looked_for = (pattern,)
        self.whole = whole
        self._warn = WarnOnce()

    def scores(self, texts: list[str], prompts: Any, columns: dict[str, Any]) -> list[float | None]:
        return [self._score(text) for text in texts]

    def _score(self, text: str) -> float:
        text = text.replace("\r\n", "\n")  # else `$` does not match at the ends of such lines
        try:
            if self.whole:
                found = self.pattern.fullmatch(text.strip(), timeout=REGEX_SECONDS)
            else:
                found = self.pattern.search(text, timeout=REGEX_SECONDS)
        except TimeoutError:
            self._warn(
                "timeout",
                "regex: %s took more than %g CPU seconds on a completion, which scores 0: simplify the pattern.",
                self.pattern.pattern,
                REGEX_SECONDS,
            )
            return 0.0
        return float(found is not None)


class ThinkFormat(RewardFunction):
    """See `think_format`."""

    __name__ = "think_format"

    def scores(self, texts: list[str], prompts: Any, columns: dict[str, Any]) -> list[float | None]:
        from trl.rewards import think_format_reward

        return think_format_reward([[{"role": "assistant", "content": text}] for text in texts])


# --- answers ---------------------------------------------------------------------------------------------------------


class ExactMatch(AnswerFunction):
    """See `exact_match`."""

    __name__ = "exact_match"

    def __init__(
        self,
        column: str,
        *,
        after: str | None,
        ignore_case: bool,
        ignore_punctuation: bool,
        ignore_articles: bool,
    ):
        super().__init__(column, after)
        self.ignore_case = ignore_case
        self.ignore_punctuation = ignore_punctuation
        self.ignore_articles = ignore_articles

    def score(self, answer: str, expected: Any) -> float:
        accepted = {self.normalized(text) for text in accepted_texts(expected, self.columns[0])}
        return float(self.normalized(answer) in accepted)

    def normalized(self, text: str) -> str:
        """The text without what does not count."""
        text = unicodedata.normalize("NFC", text)  # é is one character, or a letter with an accent
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = text.translate(str.maketrans("", "", string.punctuation))
        if self.ignore_articles:
            text = re.sub(r"\b(a|an|the)\b", " ", text, flags=re.IGNORECASE)
        return " ".join(text.split())


class MultipleChoice(AnswerFunction):
    """See `multiple_choice`."""

    __name__ = "multiple_choice"

    def __init__(self, column: str, *, choices: str, after: str | None):
        super().__init__(column, after)
        if not isinstance(choices, str):
            raise UserError(f"multiple_choice: choices={choices!r}: give the letters as one text, such as ABCD.")
        self.choices = choices.upper()
        if len(self.choices) < 2 or not self.choices.isalnum() or len(set(self.choices)) < len(self.choices):
            raise UserError(f"multiple_choice: choices={choices!r}: give the letters, such as ABCD.")
        letter = f"([{self.choices}])"
        said = (
            r"(?i:\b(?:answer|(?:correct|right|best|final)\s+(?:choice|option))\b[*_]*"
            r"(?:\s+(?:is|would\s+be|should\s+be|must\s+be)\b)?\s*[:=]?\s*(?:(?:option|choice)\s+)?)"
        )
        self._said_last = (
            re.compile(rf"\\boxed\{{\s*(?:\\\w+\s*\{{)?\s*\(?{letter}\)?\s*\}}", re.IGNORECASE),
            # Without a bracket the letter must be a capital one: "the answer is a cat" chooses nothing.
            re.compile(rf"{said}{MARKS}(?:[(\[]{MARKS}(?i:{letter}){MARKS}[)\]]|{letter}(?![\w'-]))"),
        )
        # "A cat" starts with an article: a letter alone on its line, in brackets, or before a sign.
        self._said_first = re.compile(
            rf"\s*(?:<answer>\s*)?(?:[$*_`\"'(\[]+{letter}[$*_`\"')\]]+|{letter}\s*?(?:[.):,]|<|\r?$))",
            re.IGNORECASE | re.MULTILINE,
        )

    def score(self, answer: str, expected: Any) -> float:
        return float(self.chosen(answer) == self._letter(expected))

    def chosen(self, answer: str) -> str | None:
        """The letter that an answer chooses; `None` without one."""
        for pattern in self._said_last:
            matches = list(pattern.finditer(answer))
            if matches:
                return matches[-1][matches[-1].lastindex].upper()
        first = self._said_first.match(answer)
        return None if first is None else first[first.lastindex].upper()

    def _letter(self, expected: Any) -> str:
        is_whole = isinstance(expected, Real) and not isinstance(expected, bool) and float(expected).is_integer()
        if is_whole and str(int(expected)) in self.choices:
            return str(int(expected))
        if is_whole and 0 <= expected < len(self.choices):
            return self.choices[int(expected)]
        letter = str(expected).strip().strip("().[]").upper()
        if len(letter) != 1 or letter not in self.choices:
            raise UserError(
                f"multiple_choice: column {self.columns[0]!r} has {expected!r}, which is none of {self.choices}: give "
                "the letter or its index from 0, or pass `choices`."
            )
        return letter


MARKS = r"(?:[*_$`\"'“\s]|\\\()*"
"""What may stand around the letter of a choice."""
GROUPS = re.compile(r"(?<=\d)(?:\{,\}|\\[,;:! ]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
"""What separates thousands in LaTeX and typography."""
NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+][$€£¥]?)?"  # a sign; the minus of `5-3` is none
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"  # with commas, without, or decimals alone
    r"(?:[eE][-+]?\d+)?"
)


class Number(AnswerFunction):
    """See `number`."""

    __name__ = "number"

    def __init__(self, column: str, *, tolerance: float, relative: bool, after: str | None):
        super().__init__(column, after)
        if not tolerance >= 0:
            raise UserError(f"number: tolerance={tolerance} must be 0 or more.")
        self.tolerance = Decimal(str(tolerance))
        self.relative = relative

    def score(self, answer: str, expected: Any) -> float | None:
        accepted = [right for right in map(last_number, accepted_texts(expected, self.columns[0])) if right is not None]
        if not accepted:
            return None
        given = last_number(answer)
        return float(given is not None and any(self._are_near(given, right) for right in accepted))

    def _are_near(self, given: Decimal, right: Decimal) -> bool:
        allowed = self.tolerance * abs(right) if self.relative else self.tolerance
        try:
            return abs(given - right) <= allowed
        except ArithmeticError:  # an exponent of more than six digits
            return False


def last_number(text: str) -> Decimal | None:
    """The last number of a text; `None` without one."""
    found = NUMBER.findall(GROUPS.sub(",", text.replace("\N{MINUS SIGN}", "-")))
    if not found:
        return None
    try:
        return Decimal(re.sub("[,$€£¥]", "", found[-1]))
    except InvalidOperation:
        return None
