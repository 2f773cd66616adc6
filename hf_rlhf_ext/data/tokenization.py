"""Tokenizes comparison rows, and drops or truncates rows that are too long."""

from collections.abc import Collection
from typing import Any, Literal, get_args

from datasets import Dataset

from ..errors import UserError
from .schema import LoadReport, Row
from .templates import template_options
from .text import (
    Unrenderable,
    check_tokenizer,
    encode_completion,
    encode_prompt,
    is_messages,
    prefill_of,
    refused_row,
    rendered_completion,
    start_ids,
)

Unrenderables = Literal["error", "drop"]
UNRENDERABLES: tuple[str, ...] = get_args(Unrenderables)

Overflow = Literal["error", "drop", "truncate_prompt_left", "truncate_completion"]
OVERFLOWS: tuple[str, ...] = get_args(Overflow)

CATEGORY_CODE = "category_code"
TOKENIZED_COLUMNS = ("prompt_ids", "completion_ids", "pairs", "targets", "weights", "margins")


def tokenize_row(row: Row, tokenizer) -> dict[str, list]:
    """Returns `prompt_ids` (tokens of the prompt) and `completion_ids` (K lists that end with the stop token).

    `tools` and `chat_template_kwargs` of the row are passed to the chat template.

    Raises:
        Unrenderable: The chat template cannot render the row.
    """
    prompt = row["prompt"]
    options = template_options(row)
    completion_ids = []
    for completion in row["completions"]:
        completion_ids.append(encode_completion(tokenizer, prompt, completion, options))
    return {"prompt_ids": encode_prompt(tokenizer, prompt, options), "completion_ids": completion_ids}


def longest(row: Row) -> int:
    """Returns the number of tokens of the prompt with its longest completion."""
    longest_completion = max(map(len, row["completion_ids"]))
    return len(row["prompt_ids"]) + longest_completion


# --- too long --------------------------------------------------------------------------------------------------------


def fit_row(
    row: Row,
    *,
    max_length: int,
    overflow: Overflow,
    where: str,
    start_ids: Collection[int] = (),
) -> Row | None:
    """Shortens a tokenized row to at most `max_length` tokens, as `overflow` specifies.

    `truncate_prompt_left` keeps the last tokens of the prompt, so that all completions still have the same prompt. It
    also keeps the first token if that is one of `start_ids`: BOS, or CLS, where encoders read the score.
    `truncate_completion` keeps the first tokens of a completion and its stop token, where decoders read the score.

    Returns:
        The row, or None if it is to be dropped.

    Raises:
        UserError: `overflow` is "error", or truncation leaves nothing of the prompt or of a completion.
    """
    excess = longest(row) - max_length
    if excess <= 0:
        return row
    if overflow == "drop":
        return None

    prompt_ids = row["prompt_ids"]
    if overflow == "truncate_prompt_left":
        opens = bool(prompt_ids) and prompt_ids[0] in start_ids
        opening = prompt_ids[:1] if opens else []
        rest = prompt_ids[len(opening) :]
        if excess < len(rest):
            return row | {"prompt_ids": opening + rest[excess:]}

    room = max_length - len(prompt_ids)
    if overflow == "truncate_completion" and room >= 2:  # a token of text and the stop token
        completion_ids = [_cut_completion(ids, room) for ids in row["completion_ids"]]
        n_distinct = len(set(map(tuple, completion_ids)))
        if n_distinct < len(completion_ids):
            return None  # two completions are equal now, so there is nothing to compare
        return row | {"completion_ids": completion_ids}

    tried = "" if overflow == "error" else f", and overflow={overflow!r} would leave nothing of the text"
    raise UserError(
        f"{where}: {longest(row)} tokens, {excess} over max_length={max_length}{tried}. Raise max_length, or pass "
        "overflow='drop' (or 'truncate_prompt_left', 'truncate_completion'): affected rows are counted in the report."
    )


def _cut_completion(ids: list[int], room: int) -> list[int]:
    """Keeps at most `room` tokens, including the last one (the stop token)."""
    if len(ids) <= room:
        return ids
    return ids[: room - 1] + ids[-1:]


def tokenize_comparisons(
    dataset: Dataset,
    tokenizer,
    *,
    max_length: int | None,
    overflow: Overflow,
    report: LoadReport,
    num_proc: int | None = None,
    unrenderable: Unrenderables = "drop",
) -> Dataset:
    """Tokenizes comparison rows. The result has the columns `TOKENIZED_COLUMNS`, and `category_code` if present.

    Rows that the chat template cannot render are dropped, or refused if `unrenderable` is "error". Rows longer than
    `max_length` tokens are handled as `overflow` specifies. `report` counts truncated and dropped rows. If `max_length`
    is None, rows keep their length.

    Raises:
        UserError: A row is too long and `overflow` is "error", the chat template cannot render a row and `unrenderable`
            is "error", truncation leaves nothing of a text, or no row is left.
    """
    name = report.source or "dataset"
    numbers = list(dataset["row"])
    # All prompts are either text or messages, so the first one tells which.
    first_prompt = dataset[0]["prompt"]
    check_tokenizer(tokenizer, needs_chat_template=not isinstance(first_prompt, str))
    tokenized = dataset.map(
        _tokenize_or_say_why_not,
        fn_kwargs={"tokenizer": tokenizer},
        num_proc=num_proc,
        desc=f"Tokenizing {name} dataset",
    )
    _flag_two_turns(dataset, numbers, report)
    if unrenderable == "error":
        _refuse_unrenderable(tokenized, numbers, name)
    tokenized, numbers = _without_unusable(tokenized, numbers, report)
    columns = list(TOKENIZED_COLUMNS)
    if CATEGORY_CODE in tokenized.column_names:
        columns.append(CATEGORY_CODE)
    tokenized = tokenized.select_columns(columns)
    if max_length is None:
        return tokenized

    # Only rows that are too long are rewritten: most datasets have few of them.
    fitted: dict[int, Row | None] = {}
    opening = start_ids(tokenizer)
    for k, row in enumerate(tokenized):
        if longest(row) > max_length:
            where = f"{name} row {numbers[k]}"
            fitted[k] = fit_row(row, max_length=max_length, overflow=overflow, where=where, start_ids=opening)
    if not fitted:
        return tokenized
    _count_long_rows(fitted, numbers, report, max_length=max_length, overflow=overflow)

    def replace(row: Row, k: int) -> Row:
        return fitted.get(k) or {}

    dropped = {k for k, row in fitted.items() if row is None}
    kept = [k for k in range(len(tokenized)) if k not in dropped]
    if not kept:
        raise UserError(f"{report.summary()}: no row is left: raise max_length.")
    return tokenized.map(replace, with_indices=True).select(kept)


def drop_unrenderable(demonstrations: Dataset, tokenizer, *, source: str) -> tuple[Dataset, LoadReport]:
    """Drops demonstrations that the chat template refuses, or of which it leaves out a thought or a tool call.

    TRL's trainers stop at the former, and train on the rest of the latter.

    Args:
        demonstrations: Rows with `prompt` and `completion`, and optionally `tools` and `chat_template_kwargs`.
        tokenizer: The tokenizer, with its chat template.
        source: Name of the dataset, for the report.

    Returns:
        The other rows, and a report on which rows were dropped and why. There may be no rows left.
    """
    report = LoadReport(source=source, rows_in=len(demonstrations))
    numbers = list(demonstrations["row"]) if "row" in demonstrations.column_names else range(len(demonstrations))
    kept = []
    for k, row in enumerate(demonstrations):
        try:
            if is_messages(row["prompt"]) and is_messages(row["completion"]):
                rendered_completion(tokenizer, row["prompt"], row["completion"], template_options(row))
        except Unrenderable as error:
            report.drop(error.reason, numbers[k])
        else:
            kept.append(k)
    report.kept = len(kept)
    return demonstrations if len(kept) == len(demonstrations) else demonstrations.select(kept), report


_PROBLEM = "why_not_tokenized"
"""Column with the reason why a row could not be tokenized, or ""."""
_EQUAL = "two completions are the same tokens, so there is nothing to compare"


def _tokenize_or_say_why_not(row: Row, tokenizer) -> dict[str, Any]:
    try:
        ids = tokenize_row(row, tokenizer)
    except Unrenderable as error:
        return {"prompt_ids": [], "completion_ids": [], _PROBLEM: error.reason}
    n_distinct = len(set(map(tuple, ids["completion_ids"])))
    if n_distinct < len(ids["completion_ids"]):
        return ids | {_PROBLEM: _EQUAL}
    return ids | {_PROBLEM: ""}


def _flag_two_turns(dataset: Dataset, numbers: list[int], report: LoadReport) -> None:
    """Flags rows whose prompt ends with a turn of the assistant: the completions are a second turn, as in TRL.

    A policy would continue the turn of such a prompt instead.
    """
    for k, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str) and prefill_of(prompt) is not None:
            report.flag("prompt_ends_with_assistant", numbers[k])


def _refuse_unrenderable(tokenized: Dataset, numbers: list[int], name: str) -> None:
    """Raises `UserError` for the first row that the chat template cannot render."""
    for k, problem in enumerate(tokenized[_PROBLEM]):
        if problem and problem != _EQUAL:
            raise refused_row(f"{name} row {numbers[k]}", problem)


def _without_unusable(tokenized: Dataset, numbers: list[int], report: LoadReport) -> tuple[Dataset, list[int]]:
    """Drops rows that could not be tokenized, with their reasons. Also returns the numbers of the other rows."""
    kept = []
    for k, problem in enumerate(tokenized[_PROBLEM]):
        if problem:
            report.drop(problem, numbers[k])
            report.kept -= 1
        else:
            kept.append(k)
    if not kept:
        raise UserError(f"{report.summary()}: no row is left: use a tokenizer whose chat template renders these rows.")
    if len(kept) == len(tokenized):
        return tokenized, numbers
    return tokenized.select(kept), [numbers[k] for k in kept]


def _count_long_rows(
    fitted: dict[int, Row | None],
    numbers: list[int],
    report: LoadReport,
    *,
    max_length: int,
    overflow: Overflow,
) -> None:
    """Reports dropped and truncated rows by their row numbers in the source."""
    for k, row in fitted.items():
        if row is None:
            report.drop(f"over max_length={max_length}", numbers[k])
            report.kept -= 1
        else:
            report.flag(overflow, numbers[k])


# Alias with the British spelling of earlier versions.
tokenise_row = tokenize_row
