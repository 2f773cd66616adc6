"""Converts TRL's preference rows to comparison rows, the only format that the reward trainer uses.

Other public formats are converted by `load_comparisons` before.
"""

import logging
from collections.abc import Iterable
from typing import Any

from datasets import Dataset, List, Value

from .cells import is_absent, optional_number
from .conversations import alike, text_or_messages
from .conversion import Collected, convert, list_columns, read_each, readable_rows, require_rows, with_labels
from .media import MEDIA_COLUMNS, refuse_media_columns
from .prompting import SYSTEM_COLUMNS, build_prompt, common_words, put_system_first, system_text, take_off_prompts
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
from .text import Messages, plain_text, text_key
from .transcripts import is_marked, is_transcript, read_marked, read_transcript, split_marked, split_messages, style_of

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
MARGIN_COLUMNS = ("margin", "score_chosen", "score_rejected")
QUESTION_COLUMNS = (
    "instruction", "question", "input", "query", "problem", "messages", "conversation", "conversations", "trajectory",
    "context", "history", "inputs", "user", "human",
)  # fmt: skip
"""Columns that hold the prompt of `chosen` and `rejected`, or a part of it, in other formats."""


def read_comparisons(dataset: Dataset, *, source: str = "") -> tuple[Dataset, LoadReport]:
    """Reads TRL's preference rows, or comparison rows, without merging rows that have the same prompt.

    TRL's rows have `chosen` and `rejected`, which are text or messages. The prompt is in `prompt` or at the start of
    both sides (as in HH-RLHF transcripts). `system`, `tools`, `chat_template_kwargs`, `margin`, `score_chosen` with
    `score_rejected`, `category` and `source` are optional. Comparison rows are described in `hf_rlhf_ext.data.schema`.

    Args:
        dataset: One split in memory.
        source: Name of the dataset, for the report and for messages.

    Returns:
        The comparison rows, and a report that accounts for every row of `dataset`.

    Raises:
        PreferenceDataError: `dataset` is not a `Dataset`, has no rows, other columns or no usable row, or a comparison
            row violates the schema.
    """
    report = LoadReport(source=source)
    return as_dataset(list(collected_comparisons(dataset, report)), source), report


def collected_comparisons(dataset: Dataset, report: LoadReport) -> Collected:
    """Reads the rows as `read_comparisons`, of which the result is not in memory.

    Args:
        dataset: One split.
        report: Empty report, which has the name of the source.
    """
    source = report.source
    require_rows(dataset, source)
    # Check for comparison rows first: they may have additional columns from their source.
    rows_are_ours = set(REQUIRED) <= set(dataset.column_names)
    if rows_are_ours:
        refuse_media_columns(dataset, where=source or "dataset")
    else:
        _check_columns(dataset, source or "dataset")
    # A system text needs messages, so with one in any row the prompts of all rows become messages.
    as_text = not _has_system_text(dataset)

    def read(row: Row, index: int) -> Comparison:
        if rows_are_ours:
            return own_row(row, source=source, index=index)
        return with_labels(trl_row(row, as_text=as_text), row)

    readings = read_each(readable_rows(dataset, report), read)
    converted = convert(readings, report, valid=rows_are_ours)
    return Collected(converted, report, is_text=_kind_of_prompts(dataset) if rows_are_ours else None)


def _kind_of_prompts(dataset: Dataset) -> bool | None:
    """True if the type of the column says that prompts are text, False if they are messages, None if it does not."""
    feature = dataset.features["prompt"]
    if isinstance(feature, Value):
        return True if feature.dtype == "string" else None
    return False if isinstance(feature, List) else None


def _has_system_text(dataset: Dataset) -> bool:
    columns = [column for column in SYSTEM_COLUMNS if column in dataset.column_names]
    if not columns:
        return False
    return any(str(row[column] or "").strip() for row in dataset.select_columns(columns) for column in columns)


def warn_of_nan_margins(dataset: Dataset, *, source: str) -> None:
    """Logs a warning that names the rows whose margin, or a score of which it is made, is NaN: they have no margin.

    NaN is how pandas writes a missing number, but as often it is the result of a computation that went wrong.
    """
    for column in MARGIN_COLUMNS:
        if column not in dataset.column_names:
            continue
        rows = _rows_with_nan(dataset, column)
        if rows:
            shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
            logger.warning(
                "%s: %s is NaN in %d of %d rows (row %s), which have no margin: correct these rows, or set None.",
                source,
                column,
                len(rows),
                len(dataset),
                shown,
            )


def _rows_with_nan(dataset: Dataset, column: str) -> list[int]:
    if dataset.features[column] in (Value("string"), Value("int64")):
        return []
    values = (value for batch in dataset.select_columns(column).iter(1000) for value in batch[column])
    return [row for row, value in enumerate(values) if isinstance(value, float) and value != value]


def _check_columns(dataset: Dataset, where: str) -> None:
    """Raises `PreferenceDataError` unless the columns are those of TRL's preference rows, and none would be lost."""
    names = set(dataset.column_names)
    columns = list_columns(names)
    remedy = "convert the dataset with `load_comparisons(...)` and pass the result."
    rows = dataset.select(range(min(100, len(dataset)))).to_list()
    # In TRL's rows the question is in `prompt` or in both sides. A question in another column would be lost.
    has_prompts = any(not is_absent(row.get("prompt")) and row["prompt"] != [] for row in rows)
    is_trl = names.issuperset(SIDES) and "conversations" not in names
    if not is_trl or not (has_prompts or names.isdisjoint(QUESTION_COLUMNS)):
        ours = ", ".join(REQUIRED)
        raise PreferenceDataError(
            f"{where}: columns {columns} are neither those of TRL's preference format (chosen, rejected, with or "
            f"without prompt) nor those of comparison rows ({ours}): {remedy}"
        )
    for column in sorted(names.intersection((*QUESTION_COLUMNS, *MEDIA_COLUMNS))):
        if not all(_repeats(row, column) for row in rows):
            raise PreferenceDataError(f"{where}: of columns {columns}, {column} would be lost: {remedy}")
    without_prompt = [row for row in rows if is_absent(row.get("prompt")) and row.get("prompt") != ""]
    check_implicit_prompts(((row["chosen"], row["rejected"]) for row in without_prompt), where)


def _repeats(row: Row, column: str) -> bool:
    """True if a cell is empty, or says only what the prompt and the sides say, as `messages` does in UltraFeedback."""
    value = row[column]
    if is_absent(value) or value in ([], {}):
        return True
    try:
        parts = _texts_of(text_or_messages(value, column))
        read = [text_or_messages(row[name], name) for name in ("prompt", *SIDES) if row.get(name)]
    except Unusable:
        return False
    words = text_key("\n".join(map(plain_text, read)))
    return all(part in words for part in parts)


def check_implicit_prompts(pairs: Iterable[tuple[Any, Any]], source: str) -> None:
    """Raises `PreferenceDataError` if sides without a prompt are texts that mostly do not begin with one.

    Args:
        pairs: The better and the worse side of the first rows. Sides that are no plain text are not looked at.
        source: Name of the source, for the message.
    """
    n_pairs = 0
    n_without = 0
    for sides in pairs:
        is_plain = all(isinstance(side, str) and not is_marked(side) for side in sides)
        if not is_plain or sides[0] == sides[1]:
            continue
        n_pairs += 1
        if common_words(*sides) == 0:
            n_without += 1
    # A single row is dropped with its reason.
    if n_pairs > 1 and n_without > n_pairs / 2:
        raise PreferenceDataError(
            f"{source}: no column was read as the prompt, and chosen and rejected begin with no common "
            f"prompt in {n_without} of the first {n_pairs} rows: add a column `prompt`, or name it with "
            "columns={'prompt': 'question'} (recipes: --columns)."
        )


# --- one row ---------------------------------------------------------------------------------------------------------


def trl_row(row: Row, *, as_text: bool = True) -> Comparison:
    """Reads `chosen` and `rejected`, with `prompt` or with the prompt at the start of both (HH-RLHF transcripts).

    A `system` text comes first. Without `as_text`, all prompts are messages. `with_labels` adds what the chat template
    reads, such as `tools`.
    """
    prompt = row.get("prompt")
    if is_absent(prompt) and prompt != "":
        prompt = None
    else:
        prompt = build_prompt(prompt, as_messages=False)
    comparison = preference_row(row, prompt, may_be_whole=not isinstance(prompt, list))
    system = system_text(row)
    if system is not None or not as_text:
        prompt = build_prompt(comparison["prompt"], system=system, as_messages=True)
        comparison["prompt"], *comparison["completions"] = alike(prompt, *comparison["completions"])
    return comparison


def preference_row(row: Row, prompt: Any, *, may_be_whole: bool) -> Comparison:
    """Builds the comparison of `chosen` and `rejected`. `prompt` is None if both sides begin with the prompt.

    With `may_be_whole`, sides that are conversations from their first turn on contain the prompt, and `prompt` is
    only a label, except for its system message. TRL does the same with a text prompt next to such conversations.
    Otherwise, a prompt that both sides repeat is taken off.
    """
    chosen, rejected = _read_sides(row)
    flags: list[str] = []
    if prompt is None:
        is_plain = isinstance(chosen, str) and not (is_marked(chosen) or is_marked(rejected))
        if is_plain and "prompt" in row:  # the cell is missing, and the texts do not say where an answer begins
            raise Unusable("prompt is missing")
        prompt, chosen, rejected, flags = split_sides(chosen, rejected)
    elif may_be_whole and _are_whole(chosen, rejected, prompt):
        label = prompt
        prompt, chosen, rejected, flags = split_sides(chosen, rejected)
        prompt = _compared_with_label(prompt, label, flags)
    else:
        prompt = _with_system_of_sides(prompt, chosen, rejected)
        chosen, rejected = take_off_prompts(prompt, [chosen, rejected])
        if chosen == rejected:
            raise Unusable("chosen and rejected are equal")

    # If only one of prompt and answers is messages, the other becomes messages too.
    prompt, chosen, rejected = alike(prompt, chosen, rejected)
    margin, target = _margin_and_target(row, flags)
    columns = {} if margin is None else {"margins": [margin]}
    return pair_row(prompt, chosen, rejected, target, **columns, flags=flags)


def pair_row(prompt: Any, first: Any, second: Any, target: float, **columns: Any) -> Comparison:
    """Builds a comparison of two completions. `target` is P(first is better)."""
    return {
        "prompt": prompt,
        "completions": [first, second],
        "pairs": [[0, 1]],
        "targets": [target],
        **columns,
    }


def _read_sides(row: Row) -> tuple[str | Messages, str | Messages]:
    for side in SIDES:
        if row[side] is None:
            raise Unusable(f"{side} is missing")
    chosen = text_or_messages(row["chosen"], "chosen")
    rejected = text_or_messages(row["rejected"], "rejected")
    if not same_kind(chosen, rejected):
        raise Unusable("one side is text, the other messages")
    if chosen == rejected:
        raise Unusable("chosen and rejected are equal")
    return chosen, rejected


def _are_whole(chosen: str | Messages, rejected: str | Messages, label: str | Messages) -> bool:
    """True if the sides are conversations from their first turn on, not only answers to the prompt (`label`)."""
    if not isinstance(chosen, str):
        return chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant"
    if is_transcript(chosen) and is_transcript(rejected):
        return True
    # An answer may be a dialog that was asked for. It does not repeat the prompt.
    return is_marked(chosen) and is_marked(rejected) and _holds(chosen, label) and _holds(rejected, label)


def _holds(text: str, label: str | Messages) -> bool:
    """True if a text contains every text of the prompt column, apart from white space."""
    words = text_key(text)
    return all(part in words for part in _texts_of(label))


def _texts_of(label: str | Messages) -> list[str]:
    """Returns the texts of a prompt column: itself, its messages, or the turns of a transcript."""
    if isinstance(label, str):
        style = style_of(label)
        if is_transcript(label):
            label = read_transcript(label.strip())
        elif style is not None:
            label = read_marked(label, style)
        else:
            return [text_key(label)]
    return [text_key(str(message.get("content") or "")) for message in label]


def _with_system_of_sides(prompt: str | Messages, chosen: Any, rejected: Any) -> str | Messages:
    """Puts the system message of two whole sides before a prompt that lacks it."""
    if isinstance(prompt, str) or isinstance(chosen, str):
        return prompt
    first = chosen[0]
    if first["role"] != "system" or first != rejected[0] or prompt[0]["role"] == "system":
        return prompt
    return [first, *prompt]


def _compared_with_label(prompt: str | Messages, label: str | Messages, flags: list[str]) -> str | Messages:
    """Returns the prompt of two whole sides, with the system message of the prompt column.

    A row whose prompt column says something else than the sides is flagged.
    """
    if isinstance(prompt, list) and isinstance(label, list) and label[0]["role"] == "system":
        prompt = put_system_first(prompt, label[0]["content"])
    if not _holds(plain_text(prompt), label):
        flags.append("prompt_not_in_conversation")
    return prompt


def split_sides(
    chosen: str | Messages, rejected: str | Messages
) -> tuple[str | Messages, str | Messages, str | Messages, list[str]]:
    """Splits two sides that begin with the prompt into (prompt, chosen, rejected, flags).

    Raises:
        Unusable: The sides share no prompt, or they are equal without it.
    """
    flags: list[str] = []
    if not isinstance(chosen, str):
        prompt, first, second = split_messages(chosen, rejected)
    elif is_marked(chosen) or is_marked(rejected):
        prompt, first, second, flags = split_marked(chosen, rejected)
    else:
        # TRL's implicit prompt without any marks: the whole words that both texts begin with.
        cut = common_words(chosen, rejected)
        prompt, first, second = chosen[:cut], chosen[cut:], rejected[cut:]
        flags.append("prompt_from_common_words")
    if not prompt or not plain_text(prompt).strip():
        raise Unusable("the two sides share no prompt")
    if first == second:  # they only differed in white space
        raise Unusable("chosen and rejected are equal")
    return prompt, first, second, flags


def _margin_and_target(row: Row, flags: list[str]) -> tuple[float | None, float]:
    """Returns `margin`, or the difference of the two scores, or None, and the target. Equal scores are a tie."""
    margin = optional_number(row, "margin", "bad_margin", flags)
    score_chosen = optional_number(row, "score_chosen", "bad_margin", flags)
    score_rejected = optional_number(row, "score_rejected", "bad_margin", flags)
    if margin is not None:
        return margin, 1.0
    if score_chosen is None or score_rejected is None:
        return None, 1.0
    target = 0.5 if score_chosen == score_rejected else 1.0
    return score_chosen - score_rejected, target
