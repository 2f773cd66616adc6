"""Converts TRL's preference rows to comparison rows, the only format that the reward trainer uses.

Other public formats are converted by `load_comparisons` before.
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
"""Columns that hold the prompt of `chosen` and `rejected` in other formats."""


def read_comparisons(dataset: Dataset, *, source: str = "") -> tuple[Dataset, LoadReport]:
    """Reads TRL's preference rows, or comparison rows, without merging rows that have the same prompt.

    TRL's rows have `chosen` and `rejected`, which are text or messages. The prompt is in `prompt` or at the start of
    both sides (as in HH-RLHF transcripts). `margin`, `score_chosen` with `score_rejected`, `category` and `source` are
    optional. Comparison rows are described in `hf_rlhf_ext.data.schema`.

    Args:
        dataset: One split in memory.
        source: Name of the dataset, for the report and for messages.

    Returns:
        The comparison rows, and a report that accounts for every row of `dataset`.

    Raises:
        PreferenceDataError: `dataset` is not a `Dataset`, has no rows, other columns or no usable row, or a comparison
            row violates the schema.
    """
    require_rows(dataset, source)
    # Check for comparison rows first: they may have additional columns from their source.
    if set(REQUIRED) <= set(dataset.column_names):
        rows_are_ours = True
    elif _is_trl(dataset):
        rows_are_ours = False
    else:
        where = source or "dataset"
        columns = list_columns(dataset.column_names)
        ours = ", ".join(REQUIRED)
        raise PreferenceDataError(
            f"{where}: columns {columns} are neither those of TRL's preference format (chosen, rejected, with or "
            f"without prompt) nor those of comparison rows ({ours}): convert the dataset with `load_comparisons(...)` "
            "and pass the result."
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
    # In TRL's rows the question is in `prompt` or in both sides. A question in another column would be lost.
    return _has_prompts(dataset) or columns.isdisjoint(QUESTION_COLUMNS)


def _has_prompts(dataset: Dataset) -> bool:
    """True if any of the first hundred prompts is not empty."""
    if "prompt" not in dataset.column_names:
        return False
    first_prompts = dataset["prompt"][:100]
    return not all(prompt is None or prompt in ("", []) for prompt in first_prompts)


# --- one row ---------------------------------------------------------------------------------------------------------


def trl_row(row: Row) -> Comparison:
    """Reads `chosen` and `rejected`, with `prompt` or with the prompt at the start of both (HH-RLHF transcripts)."""
    prompt = row.get("prompt")
    if prompt is not None:
        prompt = text_or_messages(prompt, "prompt")
    return preference_row(row, prompt, may_be_whole=not isinstance(prompt, list))


def preference_row(row: Row, prompt: Any, *, may_be_whole: bool) -> Comparison:
    """Builds the comparison of `chosen` and `rejected`. `prompt` is None if both sides begin with the prompt.

    With `may_be_whole`, sides that are conversations from their first turn on contain the prompt, and `prompt` is
    ignored. TRL does the same: it treats a text prompt next to such conversations as a label.
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
        if chosen == rejected:  # they only differed in white space
            raise Unusable("chosen and rejected are equal")
    # If only one of prompt and answers is messages, the other becomes messages too.
    prompt, chosen, rejected = alike(prompt, chosen, rejected)
    margin, target = _margin_and_target(row, flags)
    return pair_row(prompt, chosen, rejected, target, margins=[margin], flags=flags)


def pair_row(prompt: Any, first: Any, second: Any, target: float, **columns: Any) -> Comparison:
    """Builds a comparison of two completions. `target` is P(first is better)."""
    return {
        "prompt": prompt,
        "completions": [first, second],
        "pairs": [[0, 1]],
        "targets": [target],
        **columns,
    }


def _is_whole(side: Any) -> bool:
    """True if a side is a conversation from its first turn on, not only an answer."""
    if isinstance(side, str):
        return is_transcript(side)
    return side[0]["role"] != "assistant"


def _split(chosen: Any, rejected: Any) -> tuple[Any, Any, Any, list[str]]:
    """Splits two sides that begin with the prompt into (prompt, chosen, rejected, flags). The prompt may be empty."""
    if not isinstance(chosen, str):
        return *split_messages(chosen, rejected), []
    if is_transcript(chosen) and is_transcript(rejected):
        return split_at_common_history(chosen, rejected)
    return *split_text(chosen, rejected), []


def _margin_and_target(row: Row, flags: list[str]) -> tuple[float, float]:
    """Returns `margin`, or the difference of the two scores, and the target. Equal scores are a tie."""
    margin = optional_number(row, "margin", "bad_margin", flags)
    score_chosen = optional_number(row, "score_chosen", "bad_margin", flags)
    score_rejected = optional_number(row, "score_rejected", "bad_margin", flags)
    if margin is not None:
        return margin, 1.0
    if score_chosen is None or score_rejected is None:
        return 0.0, 1.0
    target = 0.5 if score_chosen == score_rejected else 1.0
    return score_chosen - score_rejected, target
