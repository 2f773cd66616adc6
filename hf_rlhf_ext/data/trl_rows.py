"""TRL's preference rows and comparison rows as comparison rows: all that the reward trainer reads.

Data sets of any other public shape become comparison rows by `load_comparisons` first.
"""

from typing import Any

from datasets import Dataset

from .cells import alike, optional_number, text_or_messages
from .conversion import collect, convert, list_columns, read_each, readable_rows, require_rows, with_labels
from .schema import (
    REQUIRED,
    Comparison,
    LoadReport,
    PreferenceDataError,
    Row,
    Unusable,
    as_dataset,
    own_row,
    same_kind,
)
from .transcripts import is_transcript, split_at_common_history, split_messages, split_text

SIDES = ("chosen", "rejected")
QUESTION_COLUMNS = ("instruction", "question", "input")
"""Where other formats keep the prompt of `chosen` and `rejected`."""


def read_comparisons(dataset: Dataset, *, source: str = "") -> tuple[Dataset, LoadReport]:
    """Comparison rows of TRL preference rows or of comparison rows, without grouping: a row in is a row out.

    TRL's rows have `chosen` and `rejected`, text or messages, with `prompt` or with the prompt at the start of both
    (HH-RLHF transcripts too), and `margin`, or `score_chosen` and `score_rejected`, `category` and `source` if the
    data set has them. Comparison rows are described in `data.schema`.

    Args:
        dataset: one split in memory.
        source: its name, for the report and for messages.

    Returns:
        The rows, and a report of what became of each row of `dataset` (`rows_in == kept + all dropped`).

    Raises:
        PreferenceDataError: another type, no rows, other columns, no usable row, or a comparison row that breaks the
            schema.
    """
    require_rows(dataset, source)
    # Comparison rows first: they may carry other columns of their source along.
    if set(REQUIRED) <= set(dataset.column_names):
        rows_are_ours = True
    elif _is_trl(dataset):
        rows_are_ours = False
    else:
        where = source or "data set"
        columns = list_columns(dataset.column_names)
        ours = ", ".join(REQUIRED)
        raise PreferenceDataError(
            f"{where}: columns {columns} are neither those of TRL's preferences (chosen, rejected, with or without "
            f"prompt) nor those of comparison rows ({ours}): read the data set with `load_comparisons(...)` first, and "
            "pass its result."
        )

    def read(row: Row, index: int) -> Comparison:
        if rows_are_ours:
            return own_row(row, source=source, index=index)
        return with_labels(trl_row(row), row)

    report = LoadReport(source=source)
    readings = read_each(readable_rows(dataset, report), read)
    rows = collect(convert(readings, report, valid=rows_are_ours), report)
    return as_dataset(rows, source), report


def _is_trl(dataset: Dataset) -> bool:
    columns = set(dataset.column_names)
    if not columns.issuperset(SIDES) or "conversations" in columns:
        return False
    # A question in a column of its own would be lost: TRL's rows have it in `prompt` or inside both sides.
    return _has_prompts(dataset) or columns.isdisjoint(QUESTION_COLUMNS)


def _has_prompts(dataset: Dataset) -> bool:
    """Whether one of the first hundred prompts is there and not empty."""
    if "prompt" not in dataset.column_names:
        return False
    first_prompts = dataset["prompt"][:100]
    return not all(prompt is None or prompt in ("", []) for prompt in first_prompts)


# --- one row ---------------------------------------------------------------------------------------------------------


def trl_row(row: Row) -> Comparison:
    """`chosen` and `rejected`, with `prompt` or with the prompt inside both; HH-RLHF transcripts too."""
    prompt = row.get("prompt")
    if prompt is not None:
        prompt = text_or_messages(prompt, "prompt")
    return preference_row(row, prompt, may_be_whole=not isinstance(prompt, list))


def preference_row(row: Row, prompt: Any, *, may_be_whole: bool) -> Comparison:
    """The comparison of `chosen` and `rejected` after `prompt`, None where the prompt is inside both.

    `may_be_whole`: sides that are conversations from their first turn on hold a better prompt than `prompt`, as in TRL,
    where a text prompt beside them is taken for a label.
    """
    chosen = text_or_messages(row["chosen"], "chosen")
    rejected = text_or_messages(row["rejected"], "rejected")
    if not same_kind(chosen, rejected):
        raise Unusable("one side is text, the other messages")
    if chosen == rejected:
        raise Unusable("chosen and rejected are equal")

    flags: list[str] = []
    are_whole = may_be_whole and _is_whole(chosen) and _is_whole(rejected)
    if prompt is None or are_whole:
        prompt, chosen, rejected, flags = _split(chosen, rejected)
        if not prompt or not str(prompt).strip():
            raise Unusable("the two sides share no prompt")
        if chosen == rejected:  # they differed in white space only
            raise Unusable("chosen and rejected are equal")
    # Where only one of prompt and answers is messages, the other becomes messages too.
    prompt, chosen, rejected = alike(prompt, chosen, rejected)
    margin, target = _margin_and_target(row, flags)
    return pair_row(prompt, chosen, rejected, target, margins=[margin], flags=flags)


def pair_row(prompt: Any, first: Any, second: Any, target: float, **columns: Any) -> Comparison:
    """A comparison of two completions; `target` is P(first is better)."""
    return {
        "prompt": prompt,
        "completions": [first, second],
        "pairs": [[0, 1]],
        "targets": [target],
        **columns,
    }


def _is_whole(side: Any) -> bool:
    """Whether a side is a conversation from its first turn on, and not an answer alone."""
    if isinstance(side, str):
        return is_transcript(side)
    return side[0]["role"] != "assistant"


def _split(chosen: Any, rejected: Any) -> tuple[Any, Any, Any, list[str]]:
    """(prompt, chosen, rejected, flags) of two sides that begin with the prompt; prompt None or "" without one."""
    if not isinstance(chosen, str):
        return *split_messages(chosen, rejected), []
    if is_transcript(chosen) and is_transcript(rejected):
        return split_at_common_history(chosen, rejected)
    return *split_text(chosen, rejected), []


def _margin_and_target(row: Row, flags: list[str]) -> tuple[float, float]:
    """From `margin`, else from the two scores, whose difference is the margin; equal scores are a tie."""
    margin = optional_number(row, "margin", "bad_margin", flags)
    score_chosen = optional_number(row, "score_chosen", "bad_margin", flags)
    score_rejected = optional_number(row, "score_rejected", "bad_margin", flags)
    if margin is not None:
        return margin, 1.0
    if score_chosen is None or score_rejected is None:
        return 0.0, 1.0
    target = 0.5 if score_chosen == score_rejected else 1.0
    return score_chosen - score_rejected, target
