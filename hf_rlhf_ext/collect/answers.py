"""What a person says about a task: checks of an answer, and its form in display order and in completion order.

An answer from the page counts positions: position 0 is shown first. The store keeps answers by completion, as a person
may see the completions in any order. `order[position]` is the index of the completion at that position. Stored answers
have the same entries, except that `edited` has `completion` instead of `position`, and that for two completions,
`preference` 1 says that completion 0 is much better.
"""

from typing import Any

from ..errors import UserError
from .tasks import is_whole

FLAGS = ("harmful", "nonsense", "wrong_language")
"""What a person may say about one completion."""
MOST_COMMENT = 2000
"""Longest comment, in characters."""
MOST_EDITED = 20_000
"""Longest edited answer, in characters."""
MOST_CATEGORY = 100
"""Longest name of a category, in characters."""
_KNOWN = ("preference", "ranks", "skip", "flags", "category", "comment", "ratings", "edited")

Answer = dict[str, Any]


class BadAnswer(UserError):
    """Raised for an answer that does not fit its task. The message names the entry and the remedy."""


class Conflict(UserError):
    """Raised if the judgment contradicts an earlier one, or if others have taken the task in the meantime."""


class NotLeased(UserError):
    """Raised for a judgment on a task that was not given to this person."""


def checked_answer(answer: Any, n_completions: int) -> Answer:
    """Returns an answer in display order without its empty entries.

    Args:
        answer: Has `preference` (two completions), `ranks` (more) or `ratings` (one), or `skip`. Also `flags`,
            `category`, `comment`, `ratings` and `edited`.
        n_completions: Number of completions of the task.

    Raises:
        BadAnswer: An entry is missing, unknown or wrong.
    """
    if not isinstance(answer, dict):
        raise BadAnswer("the answer is not an object: give preference, ranks, ratings or skip")
    for name in answer:
        if name not in _KNOWN:
            raise BadAnswer(f"answer: {name!r} is unknown: an answer has {', '.join(_KNOWN)}")
    given = {name: value for name, value in answer.items() if value is not None and value is not False}
    checked: Answer = {}
    checked |= _verdict(given, n_completions)
    checked |= _flags(given.get("flags"), n_completions)
    checked |= _ratings(given.get("ratings"), n_completions)
    checked |= _texts(given)
    checked |= _edited(given.get("edited"), n_completions)
    if n_completions == 1 and "ratings" not in checked and "skip" not in checked:
        raise BadAnswer("answer: ratings is missing: give one rating from 1 to 7, or skip")
    return checked


def _verdict(given: Answer, n_completions: int) -> Answer:
    """Returns what decides: the preference, the ranks or the skip."""
    verdicts = [name for name in ("preference", "ranks", "skip") if name in given]
    if len(verdicts) > 1:
        raise BadAnswer(f"answer: {verdicts[0]} and {verdicts[1]} exclude each other: give one of them")
    if "skip" in given:
        if given["skip"] is not True:
            raise BadAnswer(f"answer: skip is {given['skip']!r}: give true, or leave it out")
        return {"skip": True}
    needed = {1: None, 2: "preference"}.get(n_completions, "ranks")
    if verdicts and verdicts[0] != needed:
        raise BadAnswer(f"answer: {verdicts[0]} does not fit {n_completions} completions: give {needed or 'ratings'}")
    if needed is None:
        return {}
    if not verdicts:
        raise BadAnswer(f"answer: {needed} is missing: {n_completions} completions need it, or skip")
    if needed == "preference":
        return {"preference": _preference(given["preference"])}
    return {"ranks": _ranks(given["ranks"], n_completions)}


def _preference(value: Any) -> int:
    if not is_whole(value) or not 1 <= value <= 7:
        raise BadAnswer(f"answer: preference is {value!r}: give a whole number from 1 (first much better) to 7")
    return value


def _ranks(values: Any, n_completions: int) -> list[int]:
    if not isinstance(values, list) or len(values) != n_completions:
        raise BadAnswer(f"answer: ranks is {values!r}: give a list of {n_completions} ranks, one per completion")
    for value in values:
        if not is_whole(value) or not 1 <= value <= n_completions:
            raise BadAnswer(f"answer: a rank is {value!r}: give whole numbers from 1 (best) to {n_completions}")
    return values


def _flags(values: Any, n_completions: int) -> Answer:
    if not values:
        return {}
    if not isinstance(values, list) or len(values) != n_completions:
        raise BadAnswer(f"answer: flags is {values!r}: give a list of {n_completions} lists, one per completion")
    flags = []
    for names in values:
        if not isinstance(names, list) or not all(name in FLAGS for name in names):
            raise BadAnswer(f"answer: flags of a completion are {names!r}: give a list from {', '.join(FLAGS)}")
        flags.append([name for name in FLAGS if name in names])
    return {"flags": flags} if any(flags) else {}


def _ratings(values: Any, n_completions: int) -> Answer:
    if not values:
        return {}
    if not isinstance(values, list) or len(values) != n_completions:
        raise BadAnswer(f"answer: ratings is {values!r}: give a list of {n_completions} ratings, one per completion")
    for value in values:
        if value is not None and (not is_whole(value) or not 1 <= value <= 7):
            raise BadAnswer(f"answer: a rating is {value!r}: give a whole number from 1 to 7, or null")
    has_rating = any(value is not None for value in values)
    return {"ratings": values} if has_rating else {}


def _texts(given: Answer) -> Answer:
    texts = {}
    for name, most in (("category", MOST_CATEGORY), ("comment", MOST_COMMENT)):
        text = given.get(name, "")
        if not isinstance(text, str):
            raise BadAnswer(f"answer: {name} is a {type(text).__name__}: give text")
        if len(text) > most:
            raise BadAnswer(f"answer: {name} has {len(text):,} characters: at most {most:,} are kept, shorten it")
        if text.strip():
            texts[name] = storable(text.strip())
    return texts


def _edited(value: Any, n_completions: int) -> Answer:
    if not value:
        return {}
    if not isinstance(value, dict) or not value.keys() <= {"position", "text"}:
        raise BadAnswer("answer: edited is not an object with position and text")
    position = value.get("position")
    if position is not None and (not is_whole(position) or not 0 <= position < n_completions):
        raise BadAnswer(f"answer: edited has position {position!r}: give 0 to {n_completions - 1}, or null")
    text = value.get("text")
    if not isinstance(text, str) or not text.strip():
        raise BadAnswer("answer: edited has no text: write an answer, or leave edited out")
    if len(text) > MOST_EDITED:
        raise BadAnswer(f"answer: edited has {len(text):,} characters: at most {MOST_EDITED:,} are kept, shorten it")
    return {"edited": {"position": position, "text": storable(text)}}


def storable(text: str) -> str:
    """Replaces what UTF-8 cannot hold, which JSON may carry: single halves of a surrogate pair."""
    return text.encode("utf-8", "replace").decode("utf-8")


def by_completion(answer: Answer, order: list[int]) -> Answer:
    """Rewrites a checked answer from display order to completion order."""
    stored = dict(answer)
    if "preference" in answer and order[0] == 1:
        stored["preference"] = 8 - answer["preference"]
    for name in ("ranks", "flags", "ratings"):
        if name in answer:
            values: list[Any] = [None] * len(order)
            for position, completion in enumerate(order):
                values[completion] = answer[name][position]
            stored[name] = values
    if "edited" in answer:
        position = answer["edited"]["position"]
        completion = None if position is None else order[position]
        stored["edited"] = {"completion": completion, "text": answer["edited"]["text"]}
    return stored


def by_position(stored: Answer, order: list[int]) -> Answer:
    """Rewrites a stored answer from completion order to display order. The inverse of `by_completion`."""
    answer = dict(stored)
    if "preference" in stored and order[0] == 1:
        answer["preference"] = 8 - stored["preference"]
    for name in ("ranks", "flags", "ratings"):
        if name in stored:
            answer[name] = [stored[name][completion] for completion in order]
    if "edited" in stored:
        completion = stored["edited"]["completion"]
        position = None if completion is None else order.index(completion)
        answer["edited"] = {"position": position, "text": stored["edited"]["text"]}
    return answer
