"""Public preference formats: each function converts one source row to comparison rows, or raises `Unusable`.

`registry.py` names a published dataset for each format. Prompts become messages unless the source is plain text.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from ..data.cells import alike, as_label, ask, is_absent, number, optional_number, reply, text_or_messages
from ..data.conversion import Reading
from ..data.schema import Comparison, Row, Unusable, is_number
from ..data.text import Messages, text_key
from ..data.transcripts import is_transcript, read_transcript, split_messages
from ..data.trl_rows import pair_row, preference_row
from .cells import instruction, records, text_cell, text_list, to_messages, with_system

_PANDALM_TARGETS = {0: 0.5, 1: 1.0, 2: 0.0}
"""Label of an annotator -> P(first is better). Labels are 0 for a tie, 1 for the first and 2 for the second."""
_ARENA_TARGETS = {
    "modela": 1.0,
    "modelb": 0.0,
    "tie": 0.5,
    "tiebothbad": 0.5,
    "bothbad": 0.5,
}


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


def asked(column: str) -> Callable[[Row], Comparison]:
    """Makes a reader for `chosen` and `rejected` with the question in `column`, and `input`, `system` and `history`."""

    def read(row: Row) -> Comparison:
        return preference_row(row, instruction(row, column), may_be_whole=True)

    return read


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


def ranked_outputs(row: Row) -> Comparison:
    """Reads a list of replies, with the best one first."""
    outputs = row["output"]
    if not isinstance(outputs, list):
        raise Unusable("output is not a list of replies")
    scores = [-place for place in range(len(outputs))]
    completions = list(map(reply, outputs))
    return ranked(instruction(row), completions, scores)


def pandalm(row: Row) -> Comparison:
    first = reply(text_cell(row, "response1"))
    second = reply(text_cell(row, "response2"))
    votes = []
    for column in sorted(row):
        if not re.fullmatch(r"annotator\d+", column) or is_absent(row[column]):
            continue
        label = _PANDALM_TARGETS.get(number(row, column))
        if label is None:
            raise Unusable(f"{column} is not 0, 1 or 2")
        votes.append(vote(column, label))
    if not votes:
        raise Unusable("no annotator gave a label")
    # The mean of the labels. It is between 0 and 1 if annotators disagree.
    target = sum(cast["label"] for cast in votes) / len(votes)
    category = as_label(row.get("motivation_app"))
    return pair_row(instruction(row), first, second, target, votes=votes, category=category)


def alpaca_farm(row: Row) -> Comparison:
    """Reads `preference`: 1 prefers the first, 2 the second, values in between are probabilities, and 0 is a tie."""
    preference = number(row, "preference")
    if preference != 0 and not 1 <= preference <= 2:
        raise Unusable("preference is not between 1 and 2")
    # 1 means that the first is better for sure, 2 that the second is.
    target = 2 - preference if preference else 0.5
    first = reply(text_cell(row, "output_1"))
    second = reply(text_cell(row, "output_2"))
    votes = single_vote(row, "annotator", target)
    return pair_row(instruction(row), first, second, target, votes=votes)


def shp(row: Row) -> Comparison:
    """Reads `labels`, which is 1 if A was preferred."""
    label = number(row, "labels")
    if label not in (0, 1):
        raise Unusable("labels is not 0 or 1")
    first = reply(text_cell(row, "human_ref_A"))
    second = reply(text_cell(row, "human_ref_B"))
    prompt = ask(text_cell(row, "history"))
    category = as_label(row.get("domain"))
    return pair_row(prompt, first, second, label, category=category)


def stack_exchange(row: Row) -> Comparison:
    answers = records(row, "answers")
    scores = [number(answer, "pm_score") for answer in answers]
    prompt = ask(text_cell(row, "question"))
    return ranked(prompt, _replies(answers, "text"), scores)


def stack_paired(row: Row) -> Comparison:
    """Reads pairs in which response j has more votes than response k."""
    first = reply(text_cell(row, "response_j"))
    second = reply(text_cell(row, "response_k"))
    prompt = ask(text_cell(row, "question"))
    return pair_row(prompt, first, second, 1.0)


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


def nectar(row: Row) -> Comparison:
    prompt = text_cell(row, "prompt")
    answers = records(row, "answers")
    if is_transcript(prompt):
        turns = read_transcript(prompt.strip().removesuffix("Assistant:"))
    else:
        turns = ask(prompt)
    scores = [-number(answer, "rank") for answer in answers]  # rank 1 is the best
    return ranked(turns, _replies(answers, "answer"), scores)


def arena(row: Row) -> Comparison:
    """Reads two conversations and `winner`: model_a, model_b, tie, or tie (bothbad), which is kept and flagged."""
    # Datasets spell it in several ways: "tie (both bad)", "tie (bothbad)", "both_bad".
    winner = re.sub(r"[^a-z]", "", str(row["winner"]).lower())
    target = _ARENA_TARGETS.get(winner)
    if target is None:
        raise Unusable("winner is not model_a, model_b or a tie")
    conversation_a = to_messages(row["conversation_a"], "conversation_a")
    conversation_b = to_messages(row["conversation_b"], "conversation_b")
    prompt, first, second = _split_conversations(conversation_a, conversation_b)
    flags = ["both_bad"] if "bad" in winner else []
    votes = single_vote(row, "judge", target)
    return pair_row(prompt, first, second, target, flags=flags, votes=votes)


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


def share_gpt(row: Row) -> Comparison:
    chosen = to_messages([row["chosen"]], "chosen")
    rejected = to_messages([row["rejected"]], "rejected")
    prompt = with_system(to_messages(row["conversations"]), row)
    return pair_row(prompt, chosen, rejected, 1.0)


# --- formats that need several rows for one comparison ---------------------------------------------------------------


@dataclass(frozen=True)
class _LabeledAnswer:
    index: int
    row: Row
    prompt: Any
    completion: Any
    is_good: bool


def gather_unpaired(rows: Iterable[tuple[int, Row]]) -> Iterator[Reading]:
    """Pairs KTO rows (`label` with `prompt` and `completion`, or with `messages`) if a prompt has both labels."""
    by_prompt: dict[str, list[_LabeledAnswer]] = {}
    for index, row in rows:
        try:
            is_good = number(row, "label") > 0.5
            prompt, completion = split_demonstration(row)
            answer = _LabeledAnswer(index, row, prompt, completion, is_good)
            by_prompt.setdefault(text_key(prompt), []).append(answer)
        except Unusable as reason:
            yield Reading([index], reason)
    for answers in by_prompt.values():
        indices = [answer.index for answer in answers]
        yield Reading(indices, _unpaired_comparison(answers))


def _unpaired_comparison(answers: list[_LabeledAnswer]) -> Comparison | Unusable:
    """Compares each answer with a true label to each answer with a false label."""
    good = []
    bad = []
    for k, answer in enumerate(answers):
        if answer.is_good:
            good.append(k)
        else:
            bad.append(k)
    if not good or not bad:
        return Unusable("unpaired: all completions of the prompt have the same label")
    pairs = list(map(list, product(good, bad)))
    comparison = {
        "prompt": answers[0].prompt,
        "completions": [answer.completion for answer in answers],
        "pairs": pairs,
        "targets": [1.0] * len(pairs),
    }
    comparison |= shared_labels([answer.row for answer in answers])
    return comparison


def shared_labels(rows: list[Row]) -> dict[str, str]:
    """Returns `category` and `source` if all rows that have one agree on it."""
    agreed = {}
    for column in ("category", "source"):
        labels = {as_label(row.get(column)) for row in rows}
        labels.discard(None)
        if len(labels) == 1:
            agreed[column] = labels.pop()
    return agreed


def split_demonstration(row: Row) -> tuple[Any, Any]:
    """Returns (prompt, completion) of a row with `messages`, or with `prompt` and `completion`."""
    if row.get("messages") is not None:
        turns = to_messages(row["messages"], "messages")
        is_answered = turns[-1]["role"] == "assistant"
        if not is_answered or len(turns) < 2:
            raise Unusable("messages do not end with an answer")
        return turns[:-1], turns[-1:]
    prompt = text_or_messages(row.get("prompt"), "prompt")
    completion = text_or_messages(row.get("completion"), "completion")
    return alike(prompt, completion)


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
