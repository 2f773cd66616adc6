"""Reads preference rows by the roles of their columns: prompt x answers x verdict -> a comparison row.

`read_row` reads a row that has several answers. `gather_rows` reads rows that have one answer each, and compares the
answers to the same prompt.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from typing import Any

from ..data.cells import as_label, is_absent, number, optional_number, template_kwargs_record, tools_as_json, truth
from ..data.conversations import alike, ask, reply, text_or_messages, to_messages
from ..data.conversion import Reading
from ..data.prompting import build_prompt, read_question, take_off_prompt, take_off_prompts
from ..data.schema import Comparison, Row, Unusable, is_number
from ..data.text import Messages, is_messages, text_key
from ..data.transcripts import is_transcript, read_transcript
from ..data.trl_rows import preference_row
from . import verdicts
from .guessing import suffixes_of
from .roles import Roles, cell, parsed

Text = str | Messages

TOOLS = "tools"
TEMPLATE_KWARGS = "chat_template_kwargs"


def read_row(roles: Roles, row: Row) -> Comparison:
    """Reads a row with two or more answers.

    Raises:
        Unusable: The prompt, an answer or the verdict is missing or cannot be read.
    """
    answers = _answers_of(roles, row)
    flags: list[str] = []
    prompt, texts = _with_prompt(roles, row, answers.texts, flags)
    comparison = {"prompt": prompt, "completions": texts}
    comparison |= _judged(roles, row, answers, flags)
    comparison |= _further_columns(roles, row, flags)
    comparison["flags"] = flags
    return comparison


# --- the answers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answers:
    """The answers of a row.

    Attributes:
        texts: Text or messages; None for an entry of a list that is neither.
        n_good: Of chosen and rejected answers, the number of chosen ones. They come first.
    """

    texts: list[Text | None]
    n_good: int | None = None


def _answers_of(roles: Roles, row: Row) -> _Answers:
    if roles.rejected is not None:
        good = _side(roles, row, roles.chosen)
        bad = _side(roles, row, roles.rejected)
        if roles.chosen == roles.prompt:  # the better one is a turn of the conversation, so the other one is too
            bad = [reply(text) if isinstance(text, str) else text for text in bad]
        if len(good) == len(bad) == 1 and good == bad:
            raise Unusable(f"{roles.chosen} and {roles.rejected} are equal")
        return _Answers(good + bad, len(good))
    if len(roles.answers) == 1:
        return _Answers(_list_of_answers(row, roles.answers[0]))
    return _Answers([_answer(cell(row, column), column) for column in roles.answers])


def _side(roles: Roles, row: Row, column: str | None) -> list[Text | None]:
    """The answers of `chosen` or `rejected`: one, or a list of them."""
    value = cell(row, column)
    if column == roles.prompt:  # a conversation that ends with the answer
        return [_last_turn(to_messages(value, column))]
    if _is_list_of_answers(value):
        return _list_of_answers(row, column)
    return [_answer(value, column)]


def _is_list_of_answers(value: Any) -> bool:
    """True for a list of texts or of conversations. A list of turns is one conversation."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(entry, str | list) for entry in value)


def _list_of_answers(row: Row, column: str) -> list[Text | None]:
    values = parsed(cell(row, column))
    if not isinstance(values, list):
        raise Unusable(f"{column} is not a list of answers")
    texts: list[Text | None] = []
    for value in values:
        try:
            texts.append(_answer(value, column))
        except Unusable:
            texts.append(None)  # `settle` leaves out this answer only, and flags the row
    return texts


def _answer(value: Any, column: str) -> Text:
    """Returns an answer as text or messages: a text, a message, a conversation, or JSON text of these."""
    if value is None:
        raise Unusable(f"{column} is missing")
    return text_or_messages(value, column)


def _last_turn(turns: Messages) -> Messages:
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise Unusable("the conversation does not end with an answer")
    return turns[-1:]


# --- the prompt -------------------------------------------------------------------------------------------------------


def _with_prompt(
    roles: Roles,
    row: Row,
    texts: list[Text | None],
    flags: list[str],
) -> tuple[Text, list[Text | None]]:
    """Returns the prompt, and the answers without it."""
    if roles.turn is not None:
        texts = [_up_to_turn(roles, row, text) for text in texts]
    question = _question(roles, row)
    prompt = None if question is None else _built(roles, row, question)
    if len(texts) == 2 and None not in texts:
        prompt, texts = _prompt_of_pair(roles, question, prompt, texts, flags)
    else:
        prompt, texts = _prompt_of_several(roles, question, prompt, texts)
    if question is None:  # the prompt was the beginning of the answers
        prompt = _built(roles, row, prompt)
    if isinstance(prompt, str) and not roles.as_text:
        prompt = ask(prompt)
    if not isinstance(prompt, str):
        texts = [reply(text) if isinstance(text, str) else text for text in texts]
    return prompt, texts


def _prompt_of_pair(
    roles: Roles, question: Any, prompt: Text | None, texts: list[Text | None], flags: list[str]
) -> tuple[Text, list[Text | None]]:
    """Finds the prompt in two answers, or takes it off if they repeat it, as TRL's rows are read."""
    if texts[0] == texts[1]:
        raise Unusable("completions are equal")
    sides = {"chosen": texts[0], "rejected": texts[1]}
    if roles.prompt is not None:
        sides["prompt"] = None  # so that a missing cell costs the row
    pair = preference_row(sides, prompt, may_be_whole=isinstance(question, str))
    flags += pair["flags"]
    return pair["prompt"], pair["completions"]


def _prompt_of_several(
    roles: Roles, question: Any, prompt: Text | None, texts: list[Text | None]
) -> tuple[Text, list[Text | None]]:
    """As `_prompt_of_pair`, for any number of answers, some of which may be missing."""
    given = [text for text in texts if text is not None]
    if any(isinstance(text, list) for text in given):
        given = [reply(text) if isinstance(text, str) else text for text in given]
    if not given:
        raise Unusable("no answer is text")
    are_whole = all(isinstance(text, list) and text[0]["role"] != "assistant" for text in given)
    if are_whole and not isinstance(question, list):
        shared = _n_shared(given)
        if not shared:
            raise Unusable("the answers share no prompt")
        prompt = given[0][:shared]
        given = [text[shared:] for text in given]
    elif prompt is None:
        raise Unusable(f"{roles.prompt or 'prompt'} is missing")
    else:
        prompt, *given = alike(prompt, *take_off_prompts(prompt, given))
    rests = iter(given)
    return prompt, [None if text is None else next(rests) for text in texts]


def _n_shared(conversations: list[Messages]) -> int:
    """Number of turns with which all conversations begin. Each keeps its last turn as the answer."""
    shared = 0
    for turns in zip(*(conversation[:-1] for conversation in conversations), strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        shared += 1
    return shared


def _question(roles: Roles, row: Row) -> Any:
    """The cell of the prompt: text, or a conversation. None if it is missing."""
    value = cell(row, roles.prompt)
    if roles.prompt is not None and roles.prompt in (roles.chosen, roles.answer):
        return to_messages(value, roles.prompt)[:-1]
    if is_absent(value) and value != "":
        return None
    if isinstance(value, str) and not roles.as_text and is_transcript(value):
        return read_transcript(value.strip().removesuffix("Assistant:"))
    return read_question(value, str(roles.prompt))


def _up_to_turn(roles: Roles, row: Row, text: Text | None) -> Text | None:
    """Cuts a conversation after the answer of the turn that was judged."""
    turn = optional_number(row, str(roles.turn), "bad_turn", [])
    if turn is None or not isinstance(text, list):
        return text
    answers_seen = 0
    for place, message in enumerate(text):
        follows = text[place + 1] if place + 1 < len(text) else None
        if message["role"] == "assistant" and (follows is None or follows["role"] == "user"):
            answers_seen += 1
        if answers_seen == turn:
            return text[: place + 1]
    return text


def _part(column: str | None, row: Row) -> str | None:
    """A text beside the question. None if the cell is empty."""
    value = cell(row, column)
    if is_absent(value):
        return None
    if not isinstance(value, str):
        raise Unusable(f"{column} is not text")
    return value


def _built(roles: Roles, row: Row, question: Any) -> Text:
    prompt = build_prompt(
        question,
        system=_part(roles.system, row),
        history=cell(row, roles.history),
        context=_part(roles.context, row),
        as_messages=not roles.as_text,
        column=roles.prompt or "prompt",
    )
    started = cell(row, roles.started)
    if is_absent(started):
        return prompt
    if not isinstance(prompt, str) or not isinstance(started, str):
        raise Unusable(f"{roles.started} begins the answers, which needs a prompt and answers that are text")
    return f"{prompt}\n{started}"


# --- the judgments ----------------------------------------------------------------------------------------------------

_cached_decoder = lru_cache(maxsize=256)(verdicts.decoder)


def _decoder(meaning: Any) -> verdicts.Decoder:
    return verdicts.decoder(meaning) if isinstance(meaning, dict) else _cached_decoder(meaning)


def _judged(roles: Roles, row: Row, answers: _Answers, flags: list[str]) -> Row:
    """Returns pairs, targets, margins and votes."""
    count = len(answers.texts)
    gap = _gap(roles, row, answers, flags)
    if answers.n_good is not None:
        judged = _good_and_bad(answers.n_good, count)
        if gap == 0:  # equal scores are a tie
            judged["targets"] = [0.5] * len(judged["pairs"])
    elif roles.verdict is not None and is_absent(cell(row, roles.verdict)) and _is_tie(roles, row):
        judged = _all_tied(count)
    elif roles.verdict is not None:
        judged = _by_verdict(roles, row, count, flags)
    elif roles.votes:
        judged = {"pairs": [[0, 1]], "targets": [_mean_vote(roles, row)]}
    elif roles.verdict_is == verdicts.BEST_FIRST:
        judged = _by_scores([-float(place) for place in range(count)], with_margins=False)
    else:
        return _by_ratings(roles, row, count)
    if _is_tie(roles, row):
        judged |= {"targets": [0.5] * len(judged["pairs"]), "margins": None}
    if len(judged["pairs"]) == 1:
        _add_margin(roles, row, judged, gap, flags)
    if roles.votes:
        judged["votes"] = _votes(roles, row)
        if _all_disagree(judged):
            flags.append("votes_contradict_label")
    elif roles.annotator is not None and len(judged["pairs"]) == 1:
        judged["votes"] = _only_vote(roles, row, judged["targets"][0])
    return judged


def _good_and_bad(n_good: int, count: int) -> Row:
    """Compares each good answer to each bad one."""
    pairs = [list(pair) for pair in product(range(n_good), range(n_good, count))]
    return {"pairs": pairs, "targets": [1.0] * len(pairs)}


def _all_tied(count: int) -> Row:
    pairs = [list(pair) for pair in combinations(range(count), 2)]
    return {"pairs": pairs, "targets": [0.5] * len(pairs)}


def _all_disagree(judged: Row) -> bool:
    """True if the verdict names one answer, and every vote the other one."""
    votes = judged["votes"] or []
    side = judged["targets"][0] - 0.5
    return bool(votes) and all((vote["label"] - 0.5) * side < 0 for vote in votes)


def _by_verdict(roles: Roles, row: Row, count: int, flags: list[str]) -> Row:
    column = str(roles.verdict)
    judgment = _decoder(roles.verdict_is)(cell(row, column), column)
    flags += judgment.flags
    if count == 2:
        margins = None if judgment.strength is None else [judgment.strength]
        return {"pairs": [[0, 1]], "targets": [judgment.target], "margins": margins}
    if judgment.best is None:
        return _all_tied(count)
    if judgment.best >= count:
        raise Unusable(f"{column} names an answer that is not there")
    pairs = [[judgment.best, other] for other in range(count) if other != judgment.best]
    return {"pairs": pairs, "targets": [1.0] * len(pairs)}


def _by_ratings(roles: Roles, row: Row, count: int) -> Row:
    """Compares all answers by their ratings. Answers without a rating are left out."""
    scores, are_labels = _scores(roles, row, count)
    if sum(score is not None for score in scores) < 2:
        raise Unusable("fewer than two answers have a rating")
    return _by_scores(scores, with_margins=not roles.ranks and not are_labels, with_ties=not are_labels)


def _by_scores(scores: list[float | None], *, with_margins: bool, with_ties: bool = True) -> Row:
    pairs = []
    gaps = []
    for i, j in combinations(range(len(scores)), 2):
        if scores[i] is None or scores[j] is None:
            continue
        gap = scores[i] - scores[j]
        if gap == 0 and not with_ties:
            continue
        pairs.append([i, j])
        gaps.append(gap)
    if not pairs:
        raise Unusable("all answers have the same label")
    targets = [0.5 if gap == 0 else float(gap > 0) for gap in gaps]
    return {"pairs": pairs, "targets": targets, "margins": gaps if with_margins else None}


def _scores(roles: Roles, row: Row, count: int) -> tuple[list[float | None], bool]:
    """Returns a score for each answer, higher is better, and whether they are only right or wrong."""
    columns = roles.ratings or roles.ranks
    sign = 1.0 if roles.ratings else -1.0
    if len(columns) == 1:
        values = parsed(cell(row, columns[0]))
        if not isinstance(values, list) or len(values) != count:
            raise Unusable(f"{columns[0]} is not a list of one number per answer")
        named = [(columns[0], value) for value in values]
    else:
        named = [(column, cell(row, column)) for column in columns]
        if len(named) != count:
            raise Unusable(f"{len(named)} columns rate {count} answers")
    scores = []
    for column, value in named:
        scores.append(None if is_absent(value) else sign * number({column: value}, column))
    are_labels = all(isinstance(value, bool) for _, value in named)
    return scores, are_labels


def _gap(roles: Roles, row: Row, answers: _Answers, flags: list[str]) -> float | None:
    """How much higher the first of two answers is rated than the second; None if this is not known."""
    if len(answers.texts) != 2 or (answers.n_good is None and not (roles.verdict or roles.votes)):
        return None
    if roles.candidate_ratings is not None:
        gap = _gap_of_candidates(roles, row)
        if gap is not None:
            return gap
    if not roles.ratings and not roles.ranks:
        return None
    try:
        (first, second), _ = _scores(roles, row, 2)
    except Unusable:
        flags.append("bad_margin")
        return None
    if first is None or second is None:
        return None
    return first - second


def _gap_of_candidates(roles: Roles, row: Row) -> float | None:
    """The difference of the ratings of chosen and rejected, which are among a list of rated answers."""
    candidates = parsed(cell(row, roles.candidates))
    ratings = parsed(cell(row, roles.candidate_ratings))
    if not isinstance(candidates, list) or not isinstance(ratings, list) or len(candidates) != len(ratings):
        return None
    rating_of = {}
    for candidate, rating in zip(candidates, ratings, strict=True):
        if is_number(rating):
            rating_of.setdefault(_last_words(candidate), float(rating))
    first = rating_of.get(_last_words(cell(row, roles.chosen)))
    second = rating_of.get(_last_words(cell(row, roles.rejected)))
    return None if first is None or second is None else first - second


def _last_words(value: Any) -> str:
    """The last message of a conversation, or the text, without differences in white space."""
    if is_messages(value):
        value = value[-1]["content"]
    return text_key(value) if isinstance(value, str) else ""


def _add_margin(roles: Roles, row: Row, judged: Row, gap: float | None, flags: list[str]) -> None:
    """Adds the margin of the only pair. Scores that contradict the verdict are flagged and not used."""
    target = judged["targets"][0]
    margin = None
    if roles.margin is not None:
        margin = optional_number({roles.margin: cell(row, roles.margin)}, roles.margin, "bad_margin", flags)
        # The column says how much better the better answer is, or, below zero, that the second one is better. The
        # margin belongs to the first one.
        if margin is not None and margin < 0 and target > 0.5:
            flags.append("scores_contradict_label")
            margin = None
        elif margin is not None and target < 0.5:
            margin = -abs(margin)
    if margin is None and gap is not None and target != 0.5:
        if (gap > 0) == (target > 0.5) or gap == 0:
            margin = gap
        else:
            flags.append("scores_contradict_label")
    if margin is not None:
        judged["margins"] = [margin]


@lru_cache(maxsize=256)
def _is_of_other_answer(verdict: str, column: str) -> bool:
    """True for `winner_b` next to the verdict `winner_a`."""
    return bool(suffixes_of((verdict, column)) or suffixes_of((column, verdict)))


def _is_tie(roles: Roles, row: Row) -> bool:
    """True if the status or the tie column says so, or if both answers won or lost."""
    if roles.status is not None and verdicts.is_tie(cell(row, roles.status)):
        return True
    for other in roles.repeats:
        # `winner_a` and `winner_b` say the same, unless both are 0.
        if not _is_of_other_answer(str(roles.verdict), other):
            continue
        value = cell(row, other)
        if value == cell(row, roles.verdict):
            return True
        if not is_absent(value) and truth(value) is None and roles.verdict_is in ("0 or 1", "1 or 0"):
            raise Unusable(f"{other} is neither yes nor no")  # 3 wins against 1
    if roles.tie is None or is_absent(cell(row, roles.tie)):
        return False
    return number({roles.tie: cell(row, roles.tie)}, roles.tie) > 0.5


# --- the votes --------------------------------------------------------------------------------------------------------


def _mean_vote(roles: Roles, row: Row) -> float:
    """The mean of the votes. It is between 0 and 1 if annotators disagree."""
    votes = _votes(roles, row)
    if not votes:
        raise Unusable("no annotator gave a label")
    return sum(vote["label"] for vote in votes) / len(votes)


def _votes(roles: Roles, row: Row) -> list[Row] | None:
    decode = _decoder(roles.verdict_is)
    votes = []
    for column in roles.votes:
        value = cell(row, column)
        value = parsed(value)
        of_column = value if isinstance(value, list) else [value]
        for place, cast in enumerate(of_column, start=1):
            if is_absent(cast):
                continue
            name = str(place) if isinstance(value, list) else column
            votes.append({"annotator": name, "pair": [0, 1], "label": decode(cast, column).target})
    return votes or None


def _only_vote(roles: Roles, row: Row, target: float) -> list[Row] | None:
    name = cell(row, roles.annotator)
    if is_absent(name) or isinstance(name, list | dict):
        return None
    return [{"annotator": str(name), "pair": [0, 1], "label": target}]


# --- tools and the template -------------------------------------------------------------------------------------------


def _further_columns(roles: Roles, row: Row, flags: list[str]) -> Row:
    columns: Row = {}
    tools = tools_as_json(cell(row, roles.tools), flags)
    if tools is not None:
        columns[TOOLS] = tools
    kwargs = template_kwargs_record(cell(row, roles.template_kwargs), flags)
    if kwargs is not None:
        columns[TEMPLATE_KWARGS] = kwargs
    if roles.category is not None:
        columns["category"] = as_label(cell(row, roles.category))
    return columns


def prompt_columns(roles: Roles, row: Row) -> Row:
    """The prompt of a row without answers, with its tools and further arguments of the chat template."""
    question = _question(roles, row)
    if question is None:
        raise Unusable(f"{roles.prompt} is missing")
    return {"prompt": _built(roles, row, question), **_further_columns(roles, row, [])}


# --- one answer a row -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RatedAnswer:
    """The answer of one row.

    Attributes:
        index: Number of the row.
        row: The row.
        prompt: Its prompt.
        completion: Its answer.
        is_good: What its label says; None without a label.
        score: Its rating; None without one.
    """

    index: int
    row: Row
    prompt: Text
    completion: Text
    is_good: bool | None
    score: float | None


def gather_rows(roles: Roles, rows: Iterable[tuple[int, Row]]) -> Iterator[Reading]:
    """Compares the answers to the same prompt, which are in rows of their own, by their label or rating."""
    by_prompt: dict[Any, list[_RatedAnswer]] = {}
    for index, row in rows:
        try:
            answer = _rated_answer(roles, index, row)
        except Unusable as reason:
            yield Reading([index], reason)
            continue
        key = (text_key(answer.prompt), str(cell(row, roles.tools)))
        by_prompt.setdefault(key, []).append(answer)
    for answers in by_prompt.values():
        indices = [answer.index for answer in answers]
        yield Reading(indices, _compared(roles, answers))


def _rated_answer(roles: Roles, index: int, row: Row) -> _RatedAnswer:
    is_good = None
    if roles.verdict is not None:
        is_good = _liked(roles, row) > 0.5
    score = _score_of_answer(roles, row, is_needed=is_good is None)
    question = _question(roles, row)
    if roles.answer == roles.prompt:
        completion: Text = _last_turn(to_messages(cell(row, roles.prompt), str(roles.prompt)))
    else:
        completion = _answer(cell(row, roles.answer), str(roles.answer))
    is_whole = isinstance(completion, list) and completion[0]["role"] != "assistant"
    if is_whole and not isinstance(question, list):
        question = completion[:-1]
        completion = _last_turn(completion)
    if question is None:
        raise Unusable(f"{roles.prompt or 'prompt'} is missing")
    prompt = _built(roles, row, question)
    prompt, completion = alike(prompt, take_off_prompt(prompt, completion))
    return _RatedAnswer(index, row, prompt, completion, is_good, score)


def _score_of_answer(roles: Roles, row: Row, *, is_needed: bool) -> float | None:
    """The rating of the answer. Next to a label, it may be missing."""
    columns = roles.ratings or roles.ranks
    if not columns:
        return None
    column = columns[0]
    value = cell(row, column)
    if not is_needed and not is_number(value):
        return None
    score = number({column: value}, column)
    return score if roles.ratings else -score


def _liked(roles: Roles, row: Row) -> float:
    column = str(roles.verdict)
    value = cell(row, column)
    if roles.verdict_is is not None:
        return _decoder(roles.verdict_is)(value, column).target
    is_good = truth(value)
    if is_good is None:  # a 3 may be one of 1 to 5
        raise Unusable(f"{column} is neither yes nor no")
    return float(is_good)


def _compared(roles: Roles, answers: list[_RatedAnswer]) -> Comparison | Unusable:
    """Compares the answers of one prompt."""
    flags: list[str] = []
    if roles.verdict is not None:
        judged = _liked_and_disliked(answers, flags)
        if not judged["pairs"]:
            return Unusable("unpaired: all completions of the prompt have the same label")
    elif len(answers) < 2:
        return Unusable("unpaired: the prompt has only one answer")
    else:
        judged = _by_scores([answer.score for answer in answers], with_margins=not roles.ranks)
    comparison = {"prompt": answers[0].prompt, "completions": [answer.completion for answer in answers]}
    comparison |= judged
    comparison |= _further_columns(roles, answers[0].row, flags)
    comparison |= shared_labels([answer.row for answer in answers], roles.category or "category")
    comparison["flags"] = flags
    return comparison


def _liked_and_disliked(answers: list[_RatedAnswer], flags: list[str]) -> Row:
    """Compares each good answer to each bad one. Ratings, if all answers have one, give the margins."""
    good = [place for place, answer in enumerate(answers) if answer.is_good]
    bad = [place for place, answer in enumerate(answers) if not answer.is_good]
    pairs = [list(pair) for pair in product(good, bad)]
    judged: Row = {"pairs": pairs, "targets": [1.0] * len(pairs)}
    if any(answer.score is None for answer in answers):
        return judged
    margins = [answers[i].score - answers[j].score for i, j in pairs]
    if any(margin < 0 for margin in margins):
        flags.append("scores_contradict_label")
        margins = [max(margin, 0.0) for margin in margins]
    return judged | {"margins": margins}


def shared_labels(rows: list[Row], category_column: str = "category") -> dict[str, str]:
    """Returns `category` and `source` if all rows that have one agree on it."""
    agreed = {}
    for name, column in (("category", category_column), ("source", "source")):
        labels = {as_label(row.get(column)) for row in rows}
        labels.discard(None)
        if len(labels) == 1:
            agreed[name] = labels.pop()
    return agreed
