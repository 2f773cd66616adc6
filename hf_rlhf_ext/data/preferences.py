"""Public preference formats: each function turns one source row into comparison rows, or raises `Unusable`.

Where a format is published is said beside it in `registry.py`. Prompts become messages unless the source is plain text.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, product
from typing import Any

from .cells import (
    alike,
    as_label,
    ask,
    instruction,
    is_absent,
    json_texts,
    messages,
    number,
    optional_number,
    records,
    reply,
    text,
    text_or_messages,
    with_system,
)
from .schema import Comparison, Unusable, is_number
from .text import text_key
from .transcripts import is_transcript, read_transcript, split_at_common_history, split_messages, split_text


def ranked(prompt: Any, completions: list, scores: list[float], *, margins: bool = False) -> Comparison:
    """All pairs of completions by score, the higher the better; equal scores tie."""
    pairs = list(combinations(range(len(completions)), 2))
    gaps = [scores[i] - scores[j] for i, j in pairs]
    row = {"prompt": prompt, "completions": completions, "pairs": [list(pair) for pair in pairs]}
    row["targets"] = [0.5 if gap == 0 else float(gap > 0) for gap in gaps]
    return row | ({"margins": gaps} if margins else {})


def judged(prompt: Any, first: Any, second: Any, target: float, **further: Any) -> Comparison:
    """One pair; `target` is P(first is better)."""
    return {"prompt": prompt, "completions": [first, second], "pairs": [[0, 1]], "targets": [target], **further}


def vote(annotator: Any, target: float, **further: Any) -> dict[str, Any]:
    return {"annotator": str(annotator), "pair": [0, 1], "label": target, **further}


def single_vote(row: dict[str, Any], column: str, target: float, **further: Any) -> list[dict[str, Any]] | None:
    """The vote of whoever the column names, if it names someone."""
    return None if is_absent(row.get(column)) else [vote(row[column], target, **further)]


# --- one function a format -------------------------------------------------------------------------------------------


def trl(row: dict[str, Any]) -> Comparison:
    """`chosen` and `rejected`, with `prompt` or with the prompt inside both; HH-RLHF transcripts too."""
    prompt = row.get("prompt")
    prompt = None if prompt is None else text_or_messages(prompt, "prompt")
    return _preferred(row, prompt, may_be_whole=not isinstance(prompt, list))


def asked(column: str) -> Callable[[dict[str, Any]], Comparison]:
    """A reader of `chosen` and `rejected` after a question in this column, with `input`, `system`, `history` if any."""

    def read(row: dict[str, Any]) -> Comparison:
        return _preferred(row, instruction(row, column), may_be_whole=True)

    return read


def _preferred(row: dict[str, Any], prompt: Any, *, may_be_whole: bool) -> Comparison:
    """`may_be_whole`: sides that are conversations from their first turn on hold a better prompt than `prompt`, as in

    TRL, where a text prompt beside them is taken for a label.
    """
    chosen, rejected = (text_or_messages(row[column], column) for column in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise Unusable("one side is text, the other messages")
    flags: list[str] = []
    if chosen == rejected:
        raise Unusable("chosen and rejected are equal")
    if prompt is None or (may_be_whole and _is_whole(chosen) and _is_whole(rejected)):
        prompt, chosen, rejected, flags = _split(chosen, rejected)
        if not prompt or not str(prompt).strip():
            raise Unusable("the two sides share no prompt")
        if chosen == rejected:
            raise Unusable("chosen and rejected are equal")
    prompt, chosen, rejected = alike(prompt, chosen, rejected)
    margin, target = _margin(row, flags)
    return judged(prompt, chosen, rejected, target, margins=[margin], flags=flags)


def _is_whole(side: Any) -> bool:
    return is_transcript(side) if isinstance(side, str) else side[0]["role"] != "assistant"


def _margin(row: dict[str, Any], flags: list[str]) -> tuple[float, float]:
    """(margin, target): of `margin`, else of the two scores, whose difference is the margin; equal scores are a tie."""
    margin = optional_number(row, "margin", "bad_margin", flags)
    scores = [optional_number(row, f"score_{side}", "bad_margin", flags) for side in ("chosen", "rejected")]
    if margin is None and None not in scores:
        return scores[0] - scores[1], 0.5 if scores[0] == scores[1] else 1.0
    return margin or 0.0, 1.0


def _split(chosen: Any, rejected: Any) -> tuple[Any, Any, Any, list[str]]:
    if not isinstance(chosen, str):
        return *split_messages(chosen, rejected), []
    if is_transcript(chosen) and is_transcript(rejected):
        return split_at_common_history(chosen, rejected)
    return *split_text(chosen, rejected), []


def ultrafeedback(row: dict[str, Any]) -> Comparison:
    rated = [(reply(c.get("response")), _rating(c)) for c in records(row, "completions")]
    rated = [(completion, score) for completion, score in rated if score is not None]
    if len(rated) < 2:
        raise Unusable("fewer than two rated completions")
    return ranked(ask(text(row, "instruction")), *map(list, zip(*rated, strict=True)), margins=True)


def _rating(completion: dict[str, Any]) -> float | None:
    """`overall_score`, else `fine-grained_score`, else the mean of the ratings of its annotations."""
    for column in ("overall_score", "fine-grained_score"):
        if is_number(completion.get(column)):
            return float(completion[column])
    aspects = completion.get("annotations")
    aspects = aspects.values() if isinstance(aspects, dict) else ()
    cells = [aspect.get("Rating") for aspect in aspects if isinstance(aspect, dict)]
    ratings = [float(cell) for cell in cells if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", str(cell))]
    return sum(ratings) / len(ratings) if ratings else None


def oasst_tree(row: dict[str, Any]) -> list[Comparison]:
    """A message tree (`prompt` with nested `replies`): one comparison a turn with two or more ranked replies."""
    found: list[Comparison] = []
    flags: list[str] = []  # of the row: shared by its comparisons

    def walk(node: Any, before: list[dict[str, Any]]) -> None:
        node = node if isinstance(node, dict) else {}
        turns = [*before, *messages([{"role": node.get("role"), "content": node.get("text")}], "prompt")]
        replies = node.get("replies") or []
        if not isinstance(replies, list):
            raise Unusable("replies is not a list")
        with_rank = [child for child in replies if isinstance(child, dict) and is_number(child.get("rank"))]
        if turns[-1]["role"] == "user" and len(with_rank) > 1:
            scores = [-float(child["rank"]) for child in with_rank]
            replied = [reply(child.get("text")) for child in with_rank]
            found.append(ranked(turns, replied, scores) | {"flags": flags})
        for child in replies:
            try:
                walk(child, turns)
            except Unusable:
                flags[:] = ["broken_branch"]

    walk(row["prompt"], [])
    if not found:
        raise Unusable("no turn with two ranked replies")
    return found


def ranked_outputs(row: dict[str, Any]) -> Comparison:
    if not isinstance(row["output"], list):
        raise Unusable("output is not a list of replies")
    return ranked(instruction(row), [reply(value) for value in row["output"]], [-k for k in range(len(row["output"]))])


def pandalm(row: dict[str, Any]) -> Comparison:
    sides = [reply(text(row, column)) for column in ("response1", "response2")]
    votes = []
    for column in sorted(name for name in row if re.fullmatch(r"annotator\d+", name)):
        if not is_absent(row[column]):
            target = {0: 0.5, 1: 1.0, 2: 0.0}.get(number(row, column))
            if target is None:
                raise Unusable(f"{column} is not 0, 1 or 2")
            votes.append(vote(column, target))
    if not votes:
        raise Unusable("no annotator judged it")
    target = sum(v["label"] for v in votes) / len(votes)
    return judged(instruction(row), *sides, target, votes=votes, category=as_label(row.get("motivation_app")))


def alpaca_farm(row: dict[str, Any]) -> Comparison:
    """`preference`: 1 the first, 2 the second, between them a probability, 0 a tie."""
    preference = number(row, "preference")
    if preference != 0 and not 1 <= preference <= 2:
        raise Unusable("preference is not between 1 and 2")
    target = 2 - preference if preference else 0.5
    sides = [reply(text(row, column)) for column in ("output_1", "output_2")]
    return judged(instruction(row), *sides, target, votes=single_vote(row, "annotator", target))


def shp(row: dict[str, Any]) -> Comparison:
    label = number(row, "labels")
    if label not in (0, 1):
        raise Unusable("labels is not 0 or 1")
    sides = [reply(text(row, f"human_ref_{side}")) for side in "AB"]
    return judged(ask(text(row, "history")), *sides, label, category=as_label(row.get("domain")))


def stack_exchange(row: dict[str, Any]) -> Comparison:
    answers = records(row, "answers")
    scores = [number(answer, "pm_score") for answer in answers]
    return ranked(ask(text(row, "question")), [reply(answer.get("text")) for answer in answers], scores)


def stack_paired(row: dict[str, Any]) -> Comparison:
    sides = [reply(text(row, f"response_{side}")) for side in "jk"]
    return judged(ask(text(row, "question")), *sides, 1.0)


def summarize_from_feedback(row: dict[str, Any]) -> Comparison:
    """The prompts are the paper's templates (Stiennon et al. 2020, arXiv:2009.01325, app. B.2), for news too."""
    info, summaries, choice = row["info"], records(row, "summaries"), number(row, "choice")
    if not isinstance(info, dict) or len(summaries) != 2 or choice not in (0, 1):
        raise Unusable("not an info, two summaries and a choice of 0 or 1")
    if info.get("post"):
        subreddit = text(info, "subreddit", "").removeprefix("r/")
        head = [f"SUBREDDIT: r/{subreddit}"] if subreddit else []
        head += [f"TITLE: {text(info, 'title')}"] if info.get("title") is not None else []
        parts = [*head, f"POST: {text(info, 'post')}"]
    else:
        parts = ["Article:", text(info, "article")]
    extra = row.get("extra") if isinstance(row.get("extra"), dict) else {}
    flags: list[str] = []
    confidence = optional_number(extra, "confidence", "bad_confidence", flags)
    votes = single_vote(row, "worker", 1 - choice, confidence=confidence)
    sides = [text(summary, "text") for summary in summaries]
    return judged("\n\n".join([*parts, "TL;DR:"]), *sides, 1 - choice, votes=votes, flags=flags)


def nectar(row: dict[str, Any]) -> Comparison:
    prompt, answers = text(row, "prompt"), records(row, "answers")
    turns = read_transcript(prompt.strip().removesuffix("Assistant:")) if is_transcript(prompt) else ask(prompt)
    scores = [-number(answer, "rank") for answer in answers]
    return ranked(turns, [reply(answer.get("answer")) for answer in answers], scores)


def arena(row: dict[str, Any]) -> Comparison:
    """Two conversations and `winner`: model_a, model_b, tie, or tie (bothbad), which is kept and flagged."""
    winner = re.sub(r"[^a-z]", "", str(row["winner"]).lower())  # "tie (both bad)", "both_bad": spelled in many ways
    target = {"modela": 1.0, "modelb": 0.0, "tie": 0.5, "tiebothbad": 0.5, "bothbad": 0.5}.get(winner)
    if target is None:
        raise Unusable("winner is not model_a, model_b or a tie")
    sides = [messages(row[f"conversation_{side}"], f"conversation_{side}") for side in "ab"]
    prompt, *completions = split_messages(*sides)
    if prompt is None:
        raise Unusable("the two sides share no prompt")
    flags = ["both_bad"] if "bad" in winner else []
    return judged(prompt, *completions, target, flags=flags, votes=single_vote(row, "judge", target))


def arena_responses(row: dict[str, Any]) -> Comparison:
    """The competition's form: JSON lists of turns in text cells, and one-hot winners."""
    target = number(row, "winner_model_a") + 0.5 * number(row, "winner_tie")
    if target not in (0, 0.5, 1):
        raise Unusable("winner_model_a and winner_tie are not 0 or 1, one of them at most")
    asked, *answers = [json_texts(row, column) for column in ("prompt", "response_a", "response_b")]
    sides = []
    for answered in answers:
        turns = zip(asked, answered, strict=False)
        sides.append([m for q, a in turns for m in (ask(q)[0], reply(a)[0])])
    prompt, *completions = split_messages(*sides)
    if prompt is None:
        raise Unusable("the two sides share no prompt")
    return judged(prompt, *completions, target)


def share_gpt(row: dict[str, Any]) -> Comparison:
    sides = [messages([row[side]], side) for side in ("chosen", "rejected")]
    return judged(with_system(messages(row["conversations"]), row), *sides, 1.0)


# --- formats that need several rows for one comparison ---------------------------------------------------------------


def gather_unpaired(rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[tuple[list[int], Comparison | Unusable]]:
    """KTO's rows (`prompt` and `completion`, or `messages`; `label`), paired where a prompt has both labels."""
    prompts: dict[str, list[tuple[int, Any, Any, bool, dict]]] = {}
    for index, row in rows:
        try:
            good = number(row, "label") > 0.5
            prompt, completion = split_demonstration(row)
            prompts.setdefault(text_key(prompt), []).append((index, prompt, completion, good, row))
        except Unusable as reason:
            yield [index], reason
    for group in prompts.values():
        indices, (prompt, *_), completions, labels, given = map(list, zip(*group, strict=True))
        good, bad = ([k for k, label in enumerate(labels) if label == wanted] for wanted in (True, False))
        if good and bad:
            pairs = [list(pair) for pair in product(good, bad)]
            row = {"prompt": prompt, "completions": completions, "pairs": pairs, "targets": [1.0] * len(pairs)}
            yield indices, row | shared_labels(given)
        else:
            yield indices, Unusable("unpaired: its prompt has completions of one label only")


def shared_labels(rows: list[dict[str, Any]]) -> dict[str, str]:
    """`category` and `source` where the rows that have one agree on it."""
    found = {name: {as_label(row.get(name)) for row in rows} - {None} for name in ("category", "source")}
    return {name: values.pop() for name, values in found.items() if len(values) == 1}


def split_demonstration(row: dict[str, Any]) -> tuple[Any, Any]:
    """(prompt, completion) of a row with `messages`, or with `prompt` and `completion`."""
    if row.get("messages") is not None:
        turns = messages(row["messages"], "messages")
        if turns[-1]["role"] != "assistant" or len(turns) < 2:
            raise Unusable("messages do not end with an answer")
        return turns[:-1], turns[-1:]
    prompt, completion = (text_or_messages(row.get(name), name) for name in ("prompt", "completion"))
    return alike(prompt, completion)


def gather_oasst(rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[tuple[list[int], Comparison | Unusable]]:
    """OASST's flat table, one message a row: every turn with two or more ranked replies is a comparison."""
    table: dict[str, tuple[int, dict[str, Any]]] = {}
    for index, row in rows:
        name = row.get("message_id")
        if not isinstance(name, str) or name in table:
            yield [index], Unusable("message_id is missing or repeated")
        elif not isinstance(row.get("parent_id"), str | None):
            yield [index], Unusable("parent_id is not text")
        else:
            table[name] = index, row
    children: dict[Any, list[Any]] = {}
    for name, (_, row) in table.items():
        if row.get("role") == "assistant" and is_number(row.get("rank")):
            children.setdefault(row.get("parent_id"), []).append(name)
    used: set[int] = set()
    for parent, names in children.items():
        if len(names) < 2:
            continue
        path, node = [], parent
        while node in table and len(path) < len(table):  # a damaged table may hold a cycle
            path.append(node)
            node = table[node][1].get("parent_id")
        indices = [table[name][0] for name in [*path, *names]]
        try:
            if not path or node in table:
                raise Unusable("its parent is not in the table")
            above = [table[name][1] for name in reversed(path)]
            prompt = messages([{"role": turn.get("role"), "content": turn.get("text")} for turn in above], "text")
            replies = [table[name][1] for name in names]
            row = ranked(prompt, [reply(r.get("text")) for r in replies], [-float(r["rank"]) for r in replies])
            row |= shared_labels([*above, *replies]) | {"row": min(indices)}
        except Unusable as reason:
            new, row = [table[name][0] for name in names], reason
        else:
            new = [index for index in indices if index not in used]
        used.update(new)
        yield new, row
    for index, _ in table.values():
        if index not in used:
            yield [index], Unusable("not among two ranked replies, nor above them")
