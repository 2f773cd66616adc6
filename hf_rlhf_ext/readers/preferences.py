"""Preference formats that roles cannot say: each function converts one source row to comparisons, or raises `Unusable`.

`registry.py` names a published dataset for each format. Prompts become messages unless the source is plain text.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from ..data.cells import is_absent, number, optional_number
from ..data.conversations import ask, reply, to_messages
from ..data.conversion import Reading
from ..data.schema import Comparison, Row, Unusable, is_number
from ..data.text import Messages
from ..data.transcripts import split_messages
from ..data.trl_rows import pair_row
from .by_role import shared_labels
from .cells import records, text_cell, text_list


def ranked(prompt: Any, completions: list, scores: list[float], *, margins: bool = False) -> Comparison:
    """Compares all pairs of completions by score. A higher score is better, and equal scores are a tie."""
    pairs = []
    gaps = []
    for i, j in combinations(range(len(completions)), 2):
        pairs.append([i, j])
        gaps.append(scores[i] - scores[j])
    row = {"prompt": prompt, "completions": completions, "pairs": pairs}
    row["targets"] = list(map(_target_of_gap, gaps))
    if margins:
        row["margins"] = gaps
    return row


def _target_of_gap(gap: float) -> float:
    if gap == 0:
        return 0.5
    return float(gap > 0)


def _replies(entries: list[Row], field: str) -> list[Messages | None]:
    """Converts the text in `field` of each entry to an assistant message."""
    return [reply(entry.get(field)) for entry in entries]


def vote(annotator: Any, target: float, **further: Any) -> Row:
    """Builds a vote on the only pair of a row. `target` is P(first is better)."""
    return {
        "annotator": str(annotator),
        "pair": [0, 1],
        "label": target,
        **further,
    }


def single_vote(row: Row, column: str, target: float, **further: Any) -> list[Row] | None:
    """Builds the vote of the annotator named in the column, or returns None if the column is empty."""
    if is_absent(row.get(column)):
        return None
    return [vote(row[column], target, **further)]


# --- one function per format -----------------------------------------------------------------------------------------


def ultrafeedback(row: Row) -> Comparison:
    completions, scores = [], []
    for entry in records(row, "completions"):
        score = _rating(entry)
        # Some entries have no rating. The others can still be compared.
        if score is not None:
            completions.append(reply(entry.get("response")))
            scores.append(score)
    if len(completions) < 2:
        raise Unusable("fewer than two rated completions")
    prompt = ask(text_cell(row, "instruction"))
    return ranked(prompt, completions, scores, margins=True)


def _rating(completion: Row) -> float | None:
    """Returns `overall_score`, else `fine-grained_score`, else the mean rating of the annotations."""
    for column in ("overall_score", "fine-grained_score"):
        if is_number(completion.get(column)):
            return float(completion[column])
    annotations = completion.get("annotations")
    if not isinstance(annotations, dict):
        return None
    ratings = []
    for aspect in annotations.values():
        if not isinstance(aspect, dict):
            continue
        rating = str(aspect.get("Rating"))
        if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", rating):  # some ratings are "N/A"
            ratings.append(float(rating))
    return sum(ratings) / len(ratings) if ratings else None


def oasst_tree(row: Row) -> list[Comparison]:
    """Reads a message tree (`prompt` with nested `replies`): one comparison per turn with two or more ranked ones."""
    comparisons, is_broken = _tree_comparisons(row["prompt"], before=[])
    if not comparisons:
        raise Unusable("no turn with two ranked replies")
    flags = ["broken_branch"] if is_broken else []
    return [comparison | {"flags": flags} for comparison in comparisons]


def _tree_comparisons(node: Any, before: Messages) -> tuple[list[Comparison], bool]:
    """Returns the comparisons at this node and below it, and whether an unreadable branch was dropped."""
    if not isinstance(node, dict):
        node = {}
    turns = before + to_messages([_turn(node)], "prompt")
    replies = node.get("replies") or []
    if not isinstance(replies, list):
        raise Unusable("replies is not a list")

    comparisons: list[Comparison] = []
    with_rank = [child for child in replies if _has_rank(child)]
    is_question = turns[-1]["role"] == "user"
    if is_question and len(with_rank) > 1:
        comparison = ranked(turns, _replies(with_rank, "text"), _scores_of_ranks(with_rank))
        comparisons.append(comparison)

    # If a branch cannot be read, only that branch is dropped, not the whole tree.
    is_broken = False
    for child in replies:
        try:
            below, broken_below = _tree_comparisons(child, turns)
        except Unusable:
            is_broken = True
            continue
        comparisons += below
        is_broken = is_broken or broken_below
    return comparisons, is_broken


def _turn(node: Row) -> Row:
    """Converts an OASST message to a turn of a conversation."""
    return {"role": node.get("role"), "content": node.get("text")}


def _has_rank(node: Any) -> bool:
    return isinstance(node, dict) and is_number(node.get("rank"))


def _scores_of_ranks(nodes: list[Row]) -> list[float]:
    """Converts ranks to scores. Rank 0 is the best."""
    return [-float(node["rank"]) for node in nodes]


def stack_exchange(row: Row) -> Comparison:
    answers = records(row, "answers")
    scores = [number(answer, "pm_score") for answer in answers]
    prompt = ask(text_cell(row, "question"))
    return ranked(prompt, _replies(answers, "text"), scores)


def summarize_from_feedback(row: Row) -> Comparison:
    """Reads pairs of summaries, with the prompt templates of Stiennon et al. 2020, arXiv:2009.01325, app. B.2."""
    info = row["info"]
    summaries = records(row, "summaries")
    choice = number(row, "choice")
    is_pair = len(summaries) == 2 and choice in (0, 1)
    if not isinstance(info, dict) or not is_pair:
        raise Unusable("info, two summaries or a choice of 0 or 1 is missing")
    prompt = _summary_prompt(info)
    target = 1 - choice
    flags: list[str] = []
    confidence = None
    if isinstance(row.get("extra"), dict):
        confidence = optional_number(row["extra"], "confidence", "bad_confidence", flags)
    votes = single_vote(row, "worker", target, confidence=confidence)
    first = text_cell(summaries[0], "text")
    second = text_cell(summaries[1], "text")
    return pair_row(prompt, first, second, target, votes=votes, flags=flags)


def _summary_prompt(info: Row) -> str:
    parts = []
    # Reddit posts have `post`, news articles have `article`.
    if info.get("post"):
        subreddit = text_cell(info, "subreddit", "").removeprefix("r/")
        if subreddit:
            parts.append(f"SUBREDDIT: r/{subreddit}")
        if info.get("title") is not None:
            parts.append(f"TITLE: {text_cell(info, 'title')}")
        parts.append(f"POST: {text_cell(info, 'post')}")
    else:
        parts += ["Article:", text_cell(info, "article")]
    return "\n\n".join([*parts, "TL;DR:"])


def arena_responses(row: Row) -> Comparison:
    """Reads the format of the Kaggle competition: JSON lists of turns in text cells, and one-hot winners."""
    target = number(row, "winner_model_a") + 0.5 * number(row, "winner_tie")
    if target not in (0, 0.5, 1):
        raise Unusable("winner_model_a and winner_tie must be 0 or 1, and not both 1")
    questions = text_list(row, "prompt")
    answers_a = text_list(row, "response_a")
    answers_b = text_list(row, "response_b")
    conversation_a = _interleave(questions, answers_a)
    conversation_b = _interleave(questions, answers_b)
    prompt, first, second = _split_conversations(conversation_a, conversation_b)
    return pair_row(prompt, first, second, target)


def _interleave(questions: list[str], answers: list[str]) -> Messages:
    messages: Messages = []
    # Questions without an answer at the end are dropped.
    for question, answer in zip(questions, answers, strict=False):
        messages += ask(question)
        messages += reply(answer)
    return messages


def _split_conversations(first: Messages, second: Messages) -> tuple[Messages, Messages, Messages]:
    prompt, first_answer, second_answer = split_messages(first, second)
    if prompt is None:
        raise Unusable("the two sides share no prompt")
    return prompt, first_answer, second_answer


# --- formats that need several rows for one comparison ---------------------------------------------------------------


@dataclass(frozen=True)
class _TableMessage:
    index: int
    row: Row


_Table = dict[str, _TableMessage]


def gather_oasst(rows: Iterable[tuple[int, Row]]) -> Iterator[Reading]:
    """Reads OASST's flat table, one message per row. Every turn with two or more ranked replies is a comparison."""
    table: _Table = {}
    for index, row in rows:
        name = row.get("message_id")
        if not isinstance(name, str) or name in table:
            yield Reading([index], Unusable("message_id is missing or repeated"))
        elif not isinstance(row.get("parent_id"), str | None):
            yield Reading([index], Unusable("parent_id is not text"))
        else:
            table[name] = _TableMessage(index, row)

    # A message that precedes several comparisons counts for the first of them, so that each row is counted once.
    used: set[int] = set()
    for parent, replies in _ranked_replies(table).items():
        if len(replies) < 2:
            continue
        try:
            above = _messages_above(table, parent)
            result = _table_comparison(above, replies)
        except Unusable as reason:
            result = reason
            indices = [message.index for message in replies]
        else:
            indices = [message.index for message in above + replies]
            indices = [index for index in indices if index not in used]
        used.update(indices)
        yield Reading(indices, result)
    for message in table.values():
        if message.index not in used:
            yield Reading([message.index], Unusable("not part of a turn with two ranked replies"))


def _ranked_replies(table: _Table) -> dict[str | None, list[_TableMessage]]:
    """Returns the replies with a rank, by the id of the message that they answer."""
    replies: dict[str | None, list[_TableMessage]] = {}
    for message in table.values():
        row = message.row
        if row.get("role") == "assistant" and _has_rank(row):
            replies.setdefault(row.get("parent_id"), []).append(message)
    return replies


def _messages_above(table: _Table, parent: str | None) -> list[_TableMessage]:
    """Returns the parent, its parent, and so on up to the root."""
    path: list[_TableMessage] = []
    name = parent
    while name in table and len(path) < len(table):  # a damaged table may contain a cycle
        path.append(table[name])
        name = table[name].row.get("parent_id")
    if not path or name in table:
        raise Unusable("parent message is not in the table")
    return path


def _table_comparison(above: list[_TableMessage], replies: list[_TableMessage]) -> Comparison:
    """Builds a comparison. `above` begins with the turn that the replies answer and ends with the root."""
    from_root = [message.row for message in reversed(above)]
    answers = [message.row for message in replies]
    prompt = to_messages(list(map(_turn, from_root)), "text")
    comparison = ranked(prompt, _replies(answers, "text"), _scores_of_ranks(answers))
    comparison |= shared_labels(from_root + answers)
    comparison["row"] = min(message.index for message in above + replies)
    return comparison
