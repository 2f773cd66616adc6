"""Public preference formats: each function turns one source row into comparison rows, or raises `Unusable`.

Where a format is published is said beside it in `registry.py`. Prompts become messages unless the source is plain text.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import combinations, product
from typing import Any

from .schema import Comparison, Unusable, is_number
from .text import is_messages, text_key
from .transcripts import is_transcript, read_transcript, split_at_common_history, split_messages, split_text

ROLES = {
    "user": "user", "human": "user", "prompter": "user", "prompt": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function_call": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""ShareGPT, Vicuna, LLaMA-Factory and OASST names of a turn's speaker -> the role of a chat message."""


def text(row: dict[str, Any], column: str, default: str | None = None) -> str:
    """The cell's text; `default` stands for a missing cell."""
    value = row.get(column)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise Unusable(f"{column} is not text")
    return value


def number(row: dict[str, Any], column: str) -> float:
    """The cell as a finite number, also where a csv file spells it."""
    value = row.get(column)
    try:
        value = float(value) if isinstance(value, str | bool) else value
    except ValueError:
        value = {"true": 1.0, "false": 0.0}.get(value.strip().lower())
    if not is_number(value):
        raise Unusable(f"{column} is not a finite number")
    return float(value)


def messages(turns: Any, column: str = "conversations") -> list[dict[str, str]]:
    """Turns as `{from, value}` or `{role, content}` -> messages."""
    if not isinstance(turns, list) or not turns:
        raise Unusable(f"{column} is not a list of turns")
    found = []
    for turn in turns:
        turn = turn if isinstance(turn, dict) else {}
        speaker = turn.get("role") or turn.get("from")
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        content = turn.get("content", turn.get("value"))
        if role is None or not isinstance(content, str):
            raise Unusable(f"{column} has a turn without a known speaker and text")
        found.append({"role": role, "content": content})
    return found


def ask(question: str, *, system: str = "", history: Iterable = ()) -> list[dict[str, str]]:
    """A question as messages, after a system text and earlier (question, answer) turns."""
    turns = [{"role": "system", "content": system}] if system else []
    for asked, answered in history:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*turns, {"role": "user", "content": question}]


def reply(value: Any) -> Any:
    """Text as an assistant's message; anything else as it is, for the schema to name."""
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def instruction(row: dict[str, Any]) -> list[dict[str, str]]:
    """Alpaca's `instruction` and `input` (and LLaMA-Factory's `system` and `history`) as messages."""
    given, history = text(row, "input", ""), row.get("history") or []
    if not isinstance(history, list) or not all(_is_exchange(turn) for turn in history):
        raise Unusable("history is not a list of [question, answer]")
    question = text(row, "instruction") + (f"\n\n{given}" if given.strip() else "")
    return ask(question, system=text(row, "system", ""), history=history)


def _is_exchange(turn: Any) -> bool:
    return isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(said, str) for said in turn)


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


def vote(annotator: Any, label: float) -> dict[str, Any]:
    return {"annotator": str(annotator), "pair": [0, 1], "label": label}


# --- one function a format -------------------------------------------------------------------------------------------


def trl(row: dict[str, Any]) -> Comparison:
    """`chosen` and `rejected`, with `prompt` or with the prompt inside both; HH-RLHF transcripts too."""
    chosen, rejected, prompt, margin = row["chosen"], row["rejected"], row.get("prompt"), row.get("margin")
    for column in ("chosen", "rejected") if prompt is None else ("chosen", "rejected", "prompt"):
        if not isinstance(row[column], str) and not is_messages(row[column]):
            raise Unusable(f"{column} is not text")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise Unusable("one side is text, the other messages")
    if margin is not None:
        margin = number(row, "margin")
    flags: list[str] = []
    if chosen == rejected:
        raise Unusable("chosen and rejected are equal")
    if prompt is None or isinstance(prompt, str) != isinstance(chosen, str):  # TRL: such a prompt is in both sides too
        prompt, chosen, rejected, flags = _split(chosen, rejected)
        if prompt is None:
            raise Unusable("the two sides share no prompt")
        if chosen == rejected:
            raise Unusable("chosen and rejected are equal")
    return judged(prompt, chosen, rejected, 1.0, margins=[margin or 0.0], flags=flags)


def _split(chosen: Any, rejected: Any) -> tuple[Any, Any, Any, list[str]]:
    if not isinstance(chosen, str):
        return *split_messages(chosen, rejected), []
    if is_transcript(chosen) and is_transcript(rejected):
        return split_at_common_history(chosen, rejected)
    return *split_text(chosen, rejected), []


def ultrafeedback(row: dict[str, Any]) -> Comparison:
    rated = [(reply(c.get("response")), _rating(c)) for c in _dicts(row, "completions")]
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
    cells = [aspect.get("Rating") for aspect in aspects.values() if isinstance(aspect, dict)] if aspects else []
    ratings = [float(cell) for cell in cells if re.fullmatch(r"\d+(\.\d+)?", str(cell))]
    return sum(ratings) / len(ratings) if ratings else None


def oasst_tree(row: dict[str, Any]) -> list[Comparison]:
    """A message tree (`prompt` with nested `replies`): one comparison a turn with two or more ranked replies."""
    found: list[Comparison] = []

    def walk(node: dict[str, Any], before: list[dict[str, str]]) -> None:
        turns = [*before, *messages([{"role": node.get("role"), "content": node.get("text")}], "prompt")]
        replies = [child for child in node.get("replies") or [] if isinstance(child, dict)]
        with_rank = [child for child in replies if is_number(child.get("rank"))]
        if turns[-1]["role"] == "user" and len(with_rank) > 1:
            scores = [-float(child["rank"]) for child in with_rank]
            found.append(ranked(turns, [reply(child.get("text")) for child in with_rank], scores))
        for child in replies:
            walk(child, turns)

    if not isinstance(row["prompt"], dict):
        raise Unusable("prompt is not a message with replies")
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
        if row[column] is not None:
            label = {0: 0.5, 1: 1.0, 2: 0.0}.get(number(row, column))
            if label is None:
                raise Unusable(f"{column} is not 0, 1 or 2")
            votes.append(vote(column, label))
    if not votes:
        raise Unusable("no annotator judged it")
    target = sum(v["label"] for v in votes) / len(votes)
    return judged(instruction(row), *sides, target, votes=votes, category=row.get("motivation_app"))


def alpaca_farm(row: dict[str, Any]) -> Comparison:
    """`preference`: 1 the first, 2 the second, between them a probability, 0 a tie."""
    preference = number(row, "preference")
    if preference != 0 and not 1 <= preference <= 2:
        raise Unusable("preference is not between 1 and 2")
    target = 2 - preference if preference else 0.5
    votes = {"votes": [vote(row["annotator"], target)]} if row.get("annotator") is not None else {}
    sides = [reply(text(row, column)) for column in ("output_1", "output_2")]
    return judged(instruction(row), *sides, target, **votes)


def shp(row: dict[str, Any]) -> Comparison:
    label = number(row, "labels")
    if label not in (0, 1):
        raise Unusable("labels is not 0 or 1")
    sides = [reply(text(row, f"human_ref_{side}")) for side in "AB"]
    return judged(ask(text(row, "history")), *sides, label, category=row.get("domain"))


def stack_exchange(row: dict[str, Any]) -> Comparison:
    answers = _dicts(row, "answers")
    scores = [number(answer, "pm_score") for answer in answers]
    return ranked(ask(text(row, "question")), [reply(answer.get("text")) for answer in answers], scores)


def stack_paired(row: dict[str, Any]) -> Comparison:
    sides = [reply(text(row, f"response_{side}")) for side in "jk"]
    return judged(ask(text(row, "question")), *sides, 1.0)


def summarize_from_feedback(row: dict[str, Any]) -> Comparison:
    """The prompt is the paper's template (Stiennon et al. 2020, arXiv:2009.01325, app. B.2)."""
    info, summaries, choice = row["info"], _dicts(row, "summaries"), number(row, "choice")
    if not isinstance(info, dict) or len(summaries) != 2 or choice not in (0, 1):
        raise Unusable("not an info, two summaries and a choice of 0 or 1")
    post = text(info, "post") if info.get("post") is not None else text(info, "article")
    head = [f"{name.upper()}: {text(info, name)}" for name in ("subreddit", "title") if info.get(name) is not None]
    votes = [vote(row["worker"], 1 - choice)] if row.get("worker") is not None else None
    sides = [text(summary, "text") for summary in summaries]
    return judged("\n\n".join([*head, f"POST: {post}", "TL;DR:"]), *sides, 1 - choice, votes=votes)


def nectar(row: dict[str, Any]) -> Comparison:
    prompt, answers = text(row, "prompt"), _dicts(row, "answers")
    turns = read_transcript(prompt.strip().removesuffix("Assistant:")) if is_transcript(prompt) else ask(prompt)
    scores = [-number(answer, "rank") for answer in answers]
    return ranked(turns, [reply(answer.get("answer")) for answer in answers], scores)


def arena(row: dict[str, Any]) -> Comparison:
    """Two conversations and `winner`: model_a, model_b, tie, or tie (bothbad), which is kept and flagged."""
    target = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5, "both_bad": 0.5}.get(str(row["winner"]))
    if target is None:
        raise Unusable("winner is not model_a, model_b or a tie")
    sides = [messages(row[f"conversation_{side}"], f"conversation_{side}") for side in "ab"]
    prompt, *completions = split_messages(*sides)
    if prompt is None:
        raise Unusable("the two sides share no prompt")
    flags = ["both_bad"] if "bad" in row["winner"] else []
    votes = [vote(row["judge"], target)] if row.get("judge") is not None else None
    return judged(prompt, *completions, target, flags=flags, votes=votes)


def arena_responses(row: dict[str, Any]) -> Comparison:
    """The competition's form: JSON lists of turns in text cells, and one-hot winners."""
    target = number(row, "winner_model_a") + 0.5 * number(row, "winner_tie")
    asked, *answers = [_json_list(row, column) for column in ("prompt", "response_a", "response_b")]
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
    return judged(messages(row["conversations"]), *sides, 1.0)


def _dicts(row: dict[str, Any], column: str) -> list[dict[str, Any]]:
    value = row[column]
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise Unusable(f"{column} is not a list of records")
    return value


def _json_list(row: dict[str, Any], column: str) -> list[str]:
    try:
        value = json.loads(text(row, column)) if isinstance(row[column], str) else row[column]
    except ValueError:
        value = None
    if not isinstance(value, list) or not value or not all(isinstance(turn, str) for turn in value):
        raise Unusable(f"{column} is not a list of texts")
    return value


# --- formats that need several rows for one comparison ---------------------------------------------------------------


def gather_unpaired(rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[tuple[list[int], Comparison | Unusable]]:
    """KTO's rows (`prompt` and `completion`, or `messages`; `label`), paired where a prompt has both labels."""
    prompts: dict[str, list[tuple[int, Any, Any, bool]]] = {}
    for index, row in rows:
        try:
            label = number(row, "label") > 0.5
            prompt, completion = split_demonstration(row)
        except Unusable as reason:
            yield [index], reason
            continue
        prompts.setdefault(text_key(prompt), []).append((index, prompt, completion, label))
    for group in prompts.values():
        indices, (prompt, *_), completions, labels = map(list, zip(*group, strict=True))
        good, bad = ([k for k, label in enumerate(labels) if label == wanted] for wanted in (True, False))
        if good and bad:
            pairs = [list(pair) for pair in product(good, bad)]
            row = {"prompt": prompt, "completions": completions, "pairs": pairs, "targets": [1.0] * len(pairs)}
            yield indices, row
        else:
            yield indices, Unusable("unpaired: its prompt has completions of one label only")


def split_demonstration(row: dict[str, Any]) -> tuple[Any, Any]:
    """(prompt, completion) of a row with `messages`, or with `prompt` and `completion`."""
    if row.get("messages") is not None:
        turns = messages(row["messages"], "messages")
        if turns[-1]["role"] != "assistant" or len(turns) < 2:
            raise Unusable("messages do not end with an answer")
        return turns[:-1], turns[-1:]
    sides = row.get("prompt"), row.get("completion")
    if not all(isinstance(side, str) for side in sides) and not all(is_messages(side) for side in sides):
        raise Unusable("prompt and completion are not both text or both messages")
    return sides


def gather_oasst(rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[tuple[list[int], Comparison | Unusable]]:
    """OASST's flat table, one message a row: every turn with two or more ranked replies is a comparison."""
    table: dict[str, tuple[int, dict[str, Any]]] = {}
    for index, row in rows:
        name = row.get("message_id")
        if not isinstance(name, str) or name in table:
            yield [index], Unusable("message_id is missing or repeated")
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
        except Unusable as reason:
            new, row = [table[name][0] for name in names], reason
        else:
            new = [index for index in indices if index not in used]
        used.update(new)
        yield new, row
    for index, _ in table.values():
        if index not in used:
            yield [index], Unusable("not among two ranked replies, nor above them")
