"""Tokenizes comparison rows, and drops or truncates rows that are too long."""

import copy
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from multiprocessing import Pool
from typing import Any, Literal, get_args

import pyarrow as pa
from datasets import Dataset, Features, List, Value

from ..errors import UserError
from .batch_encoding import BATCH, RowIds, encode_batches, encode_rows
from .cache import RowsFile, in_batches, kept
from .json_columns import rows_of
from .schema import LoadReport, Row
from .storage import arrow_table, columns_of, list_array, nested_list_array
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
_NUMBERS = List(Value("float64"))
_FEATURES = {
    "prompt_ids": List(Value("int64")),
    "completion_ids": List(List(Value("int64"))),
    "pairs": List(List(Value("int64"))),
    "targets": _NUMBERS,
    "weights": _NUMBERS,
    "margins": _NUMBERS,
}
TOKENIZED_COLUMNS = tuple(_FEATURES)


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
    tokenization = Tokenization(tokenizer, max_length=max_length, overflow=overflow, unrenderable=unrenderable)
    labels = [CATEGORY_CODE] if CATEGORY_CODE in dataset.column_names else []

    def build(file: RowsFile) -> dict[str, Any]:
        counted = copy.deepcopy(report)  # as it is before, if the disk was full in between
        columns = {name: dataset.features[name] for name in labels}
        tokenization.write(rows_of(dataset), file, counted, columns=columns, num_proc=num_proc)
        return {"report": asdict(counted)}

    prepared = kept(None, build)
    vars(report).update(prepared.notes["report"])
    return prepared.rows


class Tokenization:
    """Tokenizes comparison rows in batches, and writes those that can be used. See `tokenize_comparisons`."""

    def __init__(self, tokenizer, *, max_length: int | None, overflow: Overflow, unrenderable: Unrenderables):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.overflow: Overflow = overflow
        self.unrenderable = unrenderable
        self._start_ids = start_ids(tokenizer)

    def write(
        self,
        rows: Iterable[Row],
        file: RowsFile,
        report: LoadReport,
        *,
        columns: Mapping[str, Any] | None = None,
        num_proc: int | None = None,
        advance: Callable[[int], None] = lambda n: None,
    ) -> None:
        """Writes the tokenized rows, and counts the others in `report`.

        Args:
            rows: Comparison rows with their number in the source, `row`.
            file: Takes the rows.
            report: The report on the source.
            columns: Further columns to keep, with their types.
            num_proc: Number of processes that tokenize; None means this one.
            advance: Is called with the number of rows of each batch.
        """
        name = report.source or "dataset"
        features = Features(_FEATURES | dict(columns or {}))
        outcome = _Outcome(self, name)
        batches = in_batches(rows, BATCH)
        for batch, encoded in _encode_batches(self.tokenizer, self._checked(batches), num_proc):
            used = outcome.usable_rows(batch, encoded)
            if used:
                file.write(_table(used, features))
            advance(len(batch))
        outcome.count_in(report)

    def _checked(self, batches: Iterable[list[Row]]) -> Iterator[list[Row]]:
        """Checks the tokenizer before it is used. All prompts are of one kind, text or messages."""
        for number, batch in enumerate(batches):
            if number == 0:
                check_tokenizer(self.tokenizer, needs_chat_template=not isinstance(batch[0]["prompt"], str))
            yield batch

    def fit(self, row: Row, where: str) -> Row | None:
        return fit_row(row, max_length=self.max_length, overflow=self.overflow, where=where, start_ids=self._start_ids)


def _table(rows: list[Row], features: Features) -> pa.Table:
    columns: dict[str, Any] = columns_of(rows, features)
    columns["prompt_ids"] = list_array(columns["prompt_ids"])
    columns["completion_ids"] = nested_list_array(columns["completion_ids"])
    return arrow_table(columns, features)


class _Outcome:
    """What became of the rows. Problems wait until all rows are tokenized, as the first kind of problem is reported."""

    def __init__(self, tokenization: Tokenization, name: str):
        self._tokenization = tokenization
        self._name = name
        self._n_fitting = 0  # rows that are tokenized, whether or not they are too long
        self._n_kept = 0
        self._two_turns: list[int] = []
        self._unusable: list[tuple[int, str]] = []
        self._long: list[tuple[int, bool]] = []  # number, and whether the row is kept
        self._too_long: UserError | None = None  # of the first row that is refused

    def usable_rows(self, rows: list[Row], encoded: list[RowIds | str]) -> list[Row]:
        """The rows of a batch with their tokens, without those that cannot be used."""
        usable = []
        for row, ids in zip(rows, encoded, strict=True):
            number = row["row"]
            # The completions are a second turn, as in TRL. A policy would continue the turn of such a prompt instead.
            if not isinstance(row["prompt"], str) and prefill_of(row["prompt"]) is not None:
                self._two_turns.append(number)
            if isinstance(ids, str):
                self._unusable.append((number, ids))
            elif len(set(map(tuple, ids.completion_ids))) < len(ids.completion_ids):
                self._unusable.append((number, _EQUAL))
            else:
                self._n_fitting += 1
                tokens = self._fitted(ids._asdict(), number)
                if tokens is not None:
                    usable.append(row | tokens)
        self._n_kept += len(usable)
        return usable

    def _fitted(self, tokens: Row, number: int) -> Row | None:
        limit = self._tokenization.max_length
        if limit is None or longest(tokens) <= limit:
            return tokens
        try:
            fitted = self._tokenization.fit(tokens, f"{self._name} row {number}")
        except UserError as error:
            self._too_long = self._too_long or error
            return None
        self._long.append((number, fitted is not None))
        return fitted

    def count_in(self, report: LoadReport) -> None:
        """Adds the rows to the report.

        Raises:
            UserError: A row is refused, or no row is left.
        """
        for number in self._two_turns:
            report.flag("prompt_ends_with_assistant", number)
        if self._tokenization.unrenderable == "error":
            for number, problem in self._unusable:
                if problem != _EQUAL:
                    raise refused_row(f"{self._name} row {number}", problem)
        for number, problem in self._unusable:
            report.drop(problem, number)
            report.kept -= 1
        if self._n_fitting == 0:
            raise UserError(
                f"{report.summary()}: no row is left: use a tokenizer whose chat template renders these rows."
            )
        if self._too_long is not None:
            raise self._too_long
        for number, is_kept in self._long:
            if is_kept:
                report.flag(self._tokenization.overflow, number)
            else:
                report.drop(f"over max_length={self._tokenization.max_length}", number)
                report.kept -= 1
        if self._n_kept == 0:
            raise UserError(f"{report.summary()}: no row is left: raise max_length.")


def _encode_batches(
    tokenizer, batches: Iterable[list[Row]], num_proc: int | None
) -> Iterator[tuple[list[Row], list[RowIds | str]]]:
    """Yields each batch with its token ids, in order."""
    if num_proc is None or num_proc < 2:
        yield from encode_batches(tokenizer, batches)
        return
    with Pool(num_proc) as pool:
        waiting: deque = deque()
        for batch in batches:
            waiting.append((batch, pool.apply_async(encode_rows, (tokenizer, batch))))
            if len(waiting) > 2 * num_proc:  # not all at once, so that memory does not grow with the rows
                batch, result = waiting.popleft()
                yield batch, result.get()
        for batch, result in waiting:
            yield batch, result.get()


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


_EQUAL = "two completions are the same tokens, so there is nothing to compare"


# Alias with the British spelling of earlier versions.
tokenise_row = tokenize_row
