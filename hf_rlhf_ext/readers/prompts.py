"""Loads prompts without answers: for PPO, for sampling, and for people who judge."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.json_columns import rows_of
from ..data.prompting import HISTORY_COLUMNS, SYSTEM_COLUMNS
from ..data.schema import LoadReport, PreferenceDataError, is_empty
from ..data.text import is_text
from .columns import PROMPT, normal_name
from .files import blank_lines, kind_of
from .formats import with_prompts
from .guessing import PROMPT as NAMES_OF_PROMPTS
from .sources import AnyDataset, load_rows


def load_prompts(
    source: str | Path | AnyDataset,
    split: str | None = None,
    revision: str | None = None,
    *,
    config: str | None = None,
    columns: Mapping[str, Any] | None = None,
) -> tuple[Dataset, LoadReport]:
    """Loads rows with the column `prompt`. All other columns are kept, as reward functions may read them.

    Args:
        source: Dataset in memory, path of a file or folder, or dataset id on the Hub. See `load_rows`. A `.txt` file
            has one prompt per line; blank lines are dropped.
        split: Split to load, such as `"train"` or `"train[:500]"`. It may be `None` if there is only one split.
        revision: Branch, tag or commit of a dataset on the Hub.
        config: Configuration ("subset") of a dataset on the Hub or in a folder, if it has several.
        columns: Role -> column, from which the prompts are built. See `with_prompts`. `None` takes the column `prompt`.

    Returns:
        The rows, and a `LoadReport`: blank lines are dropped, empty prompts are kept and flagged, and columns that look
            like a part of the prompt (a system text, earlier turns) and that `columns` does not name are unread.

    Raises:
        PreferenceDataError: The source cannot be read, or there is no column `prompt`.
    """
    rows = load_rows(source, split, revision, config=config)
    name = "dataset"
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        name = path.name if path.exists() else str(source)
    dropped = blank_lines_of(source)
    if columns is not None:
        rows = with_prompts(rows, columns, source=name)
    elif "prompt" not in rows.column_names:
        raise PreferenceDataError(_no_prompts(rows.column_names, name))
    report = LoadReport(source=name, rows_in=len(rows) + len(dropped), kept=len(rows))
    if dropped:
        report.dropped["blank line"] = dropped
    for number, row in enumerate(rows_of(rows.select_columns("prompt"))):
        prompt = row["prompt"]
        if is_text(prompt) and is_empty(prompt):
            report.flag("empty_prompt", number)
    if columns is None:
        for column in rows.column_names:
            if normal_name(column) in (*SYSTEM_COLUMNS, *HISTORY_COLUMNS):
                report.unread[column] = PROMPT
    return rows, report


def blank_lines_of(source: Any) -> list[int]:
    """The numbers, from 0, of the blank lines between the prompts of a `.txt` file; empty for any other source."""
    if not isinstance(source, str | Path):
        return []
    path = Path(source).expanduser()
    return blank_lines(path) if path.is_file() and kind_of(path) == "text" else []


def prompt_column(names: list[str]) -> str | None:
    """The column whose name says that it has the prompts; the only column, if there is one; or None."""
    by_name = {normal_name(name): name for name in reversed(names)}
    for usual in NAMES_OF_PROMPTS:
        if usual in by_name:
            return by_name[usual]
    return names[0] if len(names) == 1 else None


def _no_prompts(names: list[str], where: str) -> str:
    column = prompt_column(names) or "…"
    found = ", ".join(names[:8])
    return (
        f"{where}: there is no column prompt, found {found}: name the column of the prompts with "
        f'--columns "{{prompt: {column}}}" (columns={{"prompt": "{column}"}} in Python).'
    )
