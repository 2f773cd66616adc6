"""Verdicts of published datasets: what the values of a column say about which answer is better.

`decoder` turns a meaning, such as "1 or 2, 0 is a tie", into a function that reads one value. `guess_meaning` finds the
meaning from the name of the column, its values and the names of the answers, or says that it is not clear: a label of 0
or 1 next to `answer_a` and `answer_b` may mean either answer.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.cells import is_absent, number
from ..data.schema import PreferenceDataError, Unusable, is_number

Meaning = str | Mapping[str, str]


@dataclass(frozen=True)
class Judgment:
    """What one verdict says.

    Attributes:
        best: Index of the best answer; None for a tie, or where only a probability is known.
        target: P(the first answer is better), for two answers.
        strength: How much better the first answer is than the second; None if the verdict does not say.
        flags: Flags for the row.
    """

    best: int | None
    target: float
    strength: float | None = None
    flags: tuple[str, ...] = ()


Decoder = Callable[[Any, str], Judgment]
"""Reads one value; the second argument is its column, for the reason of a dropped row."""

BEST_FIRST = "best first"
"""Meaning without a verdict column: the answers are in the order of their quality."""
BELOW_ZERO = "below zero for the first"
ABOVE_ZERO = "above zero for the first"

_TIES = {
    "tie", "ties", "tied", "tied_up", "draw", "equal", "equally", "equally_good", "same", "the_same", "similar", "even",
    "both", "neither", "none_is_better", "no_preference", "indifferent", "toss_up", "about_the_same", "bothbad",
    "both_bad", "both_good", "bothgood", "both_are_good", "both_are_bad", "tie_bothbad", "tie_both_bad",
    "tie_inconsistent", "all_tie", "tie_game", "equally_bad", "no_difference", "no_winner", "undecided",
}  # fmt: skip
_ANSWER_WORDS = r"(?:the|model|response|answer|assistant|output|option|candidate|completion|reply|summary|conversation"
_ANSWER_WORDS += r"|conv|side|choice|text|sample|system|chatbot|generation|id)"
_LEADING = re.compile(rf"^(?:{_ANSWER_WORDS}_?)+(?=.)")
_TRAILING = re.compile(rf"(?:_(?:{_ANSWER_WORDS}|is|much|slightly|clearly|wins?|won|better|best|preferred))+$")
_ORDER = re.compile(r"^(?P<left>\w+?)(?P<sign>>+|<+|=+|~+|≻|≺|≈)(?P<right>\w+)$")


# --- reading a value --------------------------------------------------------------------------------------------------


def decoder(meaning: Meaning) -> Decoder:
    """Returns the function that reads a verdict with this meaning.

    Args:
        meaning: One of

            - "X or Y": X says that the first answer is better, Y that the second is: "0 or 1", "1 or 2", "1 or 0",
              "A or B", "true or false", "left or right". More answers: "0 or 1 or 2". Spellings such as `model_a`,
              `[[A]]` and `A>B` are read as A. With ", Z is a tie", the value Z is a tie. Words such as "tie" and "both
              bad" are ties anyhow.
            - "X to Y": the index of the best answer, from X for the first to Y for the last.
            - "between X and Y": a number that is X if the first answer is better for sure, and Y if the second is.
              "between 1 and 0" is the probability that the first is better.
            - "below zero for the first", "above zero for the first": the sign says which answer is better, the size how
              much.
            - A dictionary of value -> "first", "second" or "tie".

    Raises:
        PreferenceDataError: The meaning is none of these.
    """
    if isinstance(meaning, Mapping):
        return _dictionary_decoder(meaning)
    text = " ".join(str(meaning).split())
    if text.lower() in (BELOW_ZERO, ABOVE_ZERO):
        return _signed_decoder(-1.0 if text.lower() == BELOW_ZERO else 1.0)
    if between := re.fullmatch(r"between (-?[\d.]+) and (-?[\d.]+)(?:, (-?[\d.]+) is a tie)?", text):
        tie = None if between[3] is None else float(between[3])
        return _probability_decoder(text, float(between[1]), float(between[2]), tie)
    if between := re.fullmatch(r"(\d+) to (\d+)", text):
        indices = range(int(between[1]), int(between[2]) + 1)
        return _names_decoder(text, list(map(str, indices)), [])

    names, _, ties = text.partition(", ")
    values = names.split(" or ")
    tie_values = []
    if ties:
        if not (stated := re.fullmatch(r"(.+) is a tie", ties)):
            raise _unknown_meaning(meaning)
        tie_values = stated[1].split(" or ")
    if len(values) < 2 or len({_token(value) for value in values}) < len(values):
        raise _unknown_meaning(meaning)
    return _names_decoder(text, values, tie_values)


def _unknown_meaning(meaning: Any) -> PreferenceDataError:
    return PreferenceDataError(
        f"verdict_is: {meaning!r} is not understood: write '0 or 1', '1 or 2, 0 is a tie', 'A or B', "
        f"'between 1 and 0', '{BELOW_ZERO}', or a dictionary of value: first, second or tie."
    )


def _names_decoder(meaning: str, values: Sequence[str], tie_values: Sequence[str]) -> Decoder:
    places = {_token(value): place for place, value in enumerate(values)}
    if places.keys() == {"0", "1"}:  # booleans, and booleans as text, count as numbers
        for number_word, words in (("0", ("false", "no")), ("1", ("true", "yes"))):
            places |= dict.fromkeys(words, places[number_word])
    ties = {_token(value) for value in tie_values}

    def read(value: Any, column: str) -> Judgment:
        if is_absent(value):
            raise Unusable(f"{column} is empty")
        token = _token(value)
        if token in ties:
            return tie_judgment(value)
        if token in places:
            return _winner(places[token])
        if is_tie(value):
            return tie_judgment(value)
        ordered = _winner_of_order(value)
        if ordered == "":
            return tie_judgment(value)
        if ordered in places:
            return _winner(places[ordered])
        raise Unusable(f"{column} is not {meaning}")

    return read


def _dictionary_decoder(meaning: Mapping[Any, str]) -> Decoder:
    judgments = {"first": _winner(0), "second": _winner(1), "tie": Judgment(None, 0.5)}
    by_token = {}
    for value, winner in meaning.items():
        if winner not in judgments:
            raise _unknown_meaning(dict(meaning))
        by_token[_token(value)] = judgments[winner]
    values = ", ".join(map(str, meaning))

    def read(value: Any, column: str) -> Judgment:
        judgment = by_token.get(_token(value))
        if judgment is None:
            raise Unusable(f"{column} is none of {values}")
        return judgment

    return read


def _signed_decoder(sign: float) -> Decoder:
    def read(value: Any, column: str) -> Judgment:
        if is_tie(value):
            return tie_judgment(value)
        strength = sign * number({column: value}, column)
        if strength == 0:
            return Judgment(None, 0.5, 0.0)
        winner = _winner(0 if strength > 0 else 1)
        return Judgment(winner.best, winner.target, strength)

    return read


def _probability_decoder(meaning: str, first: float, second: float, tie: float | None) -> Decoder:
    if first == second:
        raise _unknown_meaning(meaning)

    def read(value: Any, column: str) -> Judgment:
        if is_tie(value):
            return tie_judgment(value)
        stated = number({column: value}, column)
        if stated == tie:
            return tie_judgment()
        probability = (stated - second) / (first - second)
        if not 0 <= probability <= 1:
            raise Unusable(f"{column} is not {meaning}")
        best = None
        if probability != 0.5:
            best = 0 if probability > 0.5 else 1
        return Judgment(best, probability)

    return read


def _winner(place: int) -> Judgment:
    return Judgment(place, 1.0 if place == 0 else 0.0)


def tie_judgment(value: Any = None) -> Judgment:
    """The judgment of a tie. "tie (bothbad)" is flagged `both_bad`."""
    flags = ("both_bad",) if isinstance(value, str) and "bad" in value.lower() else ()
    return Judgment(None, 0.5, flags=flags)


def is_tie(value: Any) -> bool:
    """True for a word that says that no answer is better."""
    if not isinstance(value, str):
        return False
    word = _plain(value)
    return word in _TIES or word.startswith("tie_")


def _plain(text: str) -> str:
    """Lower case, with one `_` for everything that is no letter or digit: "Tie (both bad)" -> "tie_both_bad"."""
    # "modelA" is written in one word in some sets.
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z0-9])", "_", text.strip())
    return re.sub(r"[\W_]+", "_", spaced.lower()).strip("_")


def _token(value: Any) -> str:
    """The name of an answer in a value: `model_a`, `[[A]]` and "Response A is better" are "a"; 1.0 and "1" are "1"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}" if is_number(value) else str(value)[:30]
    text = str(value).strip()
    if re.fullmatch(r"-?\d+(\.\d*)?", text):
        return f"{float(text):g}"
    if _ORDER.match(text):
        return text
    word = _plain(text)
    shorter = _TRAILING.sub("", word)
    return _LEADING.sub("", shorter) or word or text  # a thumb up has no letters


def _winner_of_order(value: Any) -> str | None:
    """The better side of "A>B" or "B<<A" as a token, "" for "A=B"; None for anything else."""
    if not isinstance(value, str):
        return None
    compact = re.sub(r"[\s\[\]]", "", value)
    order = _ORDER.match(compact)
    if order is None:
        return None
    sign = order["sign"][0]
    if sign in ">≻":
        return _token(order["left"])
    if sign in "<≺":
        return _token(order["right"])
    return ""


# --- finding the meaning ----------------------------------------------------------------------------------------------

SIGNED = {"preference_strength", "overall_preference", "signed_preference"}
"""Columns with a strength below zero if the first answer is better (HelpSteer2, HelpSteer3)."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def guess_meaning(name: str, values: Iterable[Any], suffixes: Sequence[str], count: int) -> str | None:
    """Returns what the values of a verdict mean, or None if it is not clear.

    Args:
        name: Name of the column in lower case, with `_` between words.
        values: Its values.
        suffixes: What tells the columns of the answers apart, in order: ["a", "b"], ["1", "2"], ["0", "1"]. Empty if
            one column has a list of answers.
        count: Number of answers.
    """
    suffixes = [suffix.lower() for suffix in suffixes]
    if count == 2 and suffixes:
        directed = _meaning_of_direction(name, suffixes)
        if directed is not None:
            return directed
    seen = _seen_tokens(values)
    if count == 2 and name in SIGNED and all(_is_token_of_number(token) for token in seen):
        # 1 to 5 may be a scale with its middle at 3, and 1 and 2 the numbers of the answers.
        return BELOW_ZERO if any(token.startswith("-") for token in seen) else None
    if not seen:
        return None
    # A word that names no answer, such as "skip", costs its row.
    clear = {token for token in seen if _may_name_an_answer(token, suffixes)}
    return _meaning_of_tokens(clear, suffixes, count) if clear else None


def _meaning_of_direction(name: str, suffixes: Sequence[str]) -> str | None:
    """The meaning of a column that names one of two answers: `prob_a`, `a_is_better`, `winner_model_b`."""
    patterns = (
        (
            r"(?:p|prob|probability|preference_prob)_(?:of_)?(?:model_|response_|answer_)?(\w+?)(?:_wins|_better)?",
            "between",
        ),
        (r"(?:is_)?(?:model_|response_|answer_)?(\w+?)_?(?:is_)?(?:better|wins|preferred|won)", "or"),
        (r"(?:prefers?|winner|wins|better_is)_(?:model_|response_|answer_)?(\w+)", "or"),
    )
    for pattern, kind in patterns:
        found = re.fullmatch(pattern, name)
        if found is None:
            continue
        for place, names in enumerate(((suffixes[0], "first"), (suffixes[1], "second"))):
            if found[1] in names:
                sure = ("1", "0") if place == 0 else ("0", "1")
                if kind == "between":
                    return f"between {sure[0]} and {sure[1]}"
                return f"{sure[0]} or {sure[1]}"
    return None


def _seen_tokens(values: Iterable[Any]) -> set[str]:
    """The names of answers in the values, without ties."""
    seen = set()
    for value in values:
        if is_absent(value) or is_tie(value) or isinstance(value, list | dict):
            continue
        ordered = _winner_of_order(value)
        if ordered == "":
            continue
        seen.add(ordered if ordered is not None else _token(value))
    return seen


def _may_name_an_answer(token: str, suffixes: Sequence[str]) -> bool:
    is_short = len(token) == 1 or _is_token_of_number(token)
    return is_short or token in suffixes or token in ("first", "second", "left", "right", "true", "false")


def _is_token_of_number(token: str) -> bool:
    return re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", token) is not None


def _meaning_of_tokens(seen: set[str], suffixes: Sequence[str], count: int) -> str | None:
    words = _meaning_of_words(seen, count)
    if words is not None:
        return words
    from_one = [str(place + 1) for place in range(count)]
    from_zero = [str(place) for place in range(count)]
    if count == 2 and suffixes == from_one and seen == {"0", "1", "2"}:
        return "1 or 2, 0 is a tie"
    # A number is clear if the answers are numbered in this way, or if only one way of counting has it. A list counts
    # from 0 or from 1; a 0 next to `answer_a` and `answer_b` may as well be a "false".
    if seen <= set(from_one):
        is_clear = suffixes == from_one or (str(count) in seen and suffixes != from_zero)
        if is_clear:
            return " or ".join(from_one)
    if seen <= set(from_zero):
        is_clear = suffixes == from_zero or (not suffixes and "0" in seen)
        if is_clear:
            return " or ".join(from_zero)
    if suffixes and seen <= set(suffixes):
        return " or ".join(suffixes)
    return None


def _meaning_of_words(seen: set[str], count: int) -> str | None:
    """The meaning of values that are letters or words, which need no numbered answers."""
    letters = _LETTERS[:count]
    as_letters = " or ".join(letters.upper())
    if seen <= set(letters):
        return as_letters
    if count != 2:
        return None
    if seen <= {"a", "b", "c"}:
        return f"{as_letters}, C is a tie"
    if seen <= {"first", "second"}:
        return "first or second"
    if seen <= {"left", "right"}:
        return "left or right"
    return None
