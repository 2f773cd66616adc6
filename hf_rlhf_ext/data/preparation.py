"""Prepares comparison rows for the reward trainer: read, checked and tokenized once, and kept for later starts."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset, Value

from ..errors import first_line
from .cache import Kept, RowsFile, dataset_digest, digest, kept, tokenizer_digest
from .schema import Comparison, LoadReport, PreferenceDataError, with_defaults
from .templates import template_kwargs, tools_text
from .tokenization import Tokenization
from .trl_rows import collected_comparisons

Advance = Callable[[int], None]


@dataclass(frozen=True)
class PreparedComparisons:
    """Tokenized comparisons.

    Attributes:
        rows: Rows with `TOKENIZED_COLUMNS`, and `category` (its name) if the dataset has categories.
        report: Which rows were dropped or cut, and why.
        first_prompt: Prompt of the first row that was read.
        categories: Names of the categories in the order of the rows that were read, also of rows dropped later.
    """

    rows: Dataset
    report: LoadReport
    first_prompt: Any
    categories: list[str | None]


def prepare_comparisons(
    dataset: Dataset,
    tokenization: Tokenization,
    *,
    source: str,
    num_proc: int | None = None,
    advance: Advance = lambda n: None,
) -> PreparedComparisons:
    """Reads rows as `read_comparisons` and tokenizes them as `tokenize_comparisons`.

    The result is kept in the cache of `datasets`, under a digest of rows, tokenizer, options and versions.

    Args:
        dataset: TRL's preference rows, or comparison rows.
        tokenization: How they are tokenized.
        source: Name of the dataset, for the report and for messages.
        num_proc: Number of processes that tokenize; None means this one.
        advance: Is called with the number of rows that were tokenized.

    Raises:
        UserError: As these two functions.
    """

    def build(file: RowsFile) -> dict[str, Any]:
        report = LoadReport(source=source)
        rows = _Noted(collected_comparisons(dataset, report), source)
        columns = {"category": Value("string")} if "category" in dataset.column_names else {}
        tokenization.write(rows, file, report, columns=columns, num_proc=num_proc, advance=advance)
        return {
            "report": asdict(report),
            # Of a record with other types than JSON has, only its form counts.
            "first_prompt": rows.first_prompt if isinstance(rows.first_prompt, str) else [{"role": "user"}],
            "categories": list(rows.categories),
        }

    prepared = kept(_key(dataset, tokenization, source), build)
    return _of_notes(prepared)


def _of_notes(prepared: Kept) -> PreparedComparisons:
    notes = prepared.notes
    return PreparedComparisons(prepared.rows, LoadReport(**notes["report"]), notes["first_prompt"], notes["categories"])


def _key(dataset: Dataset, tokenization: Tokenization, source: str) -> str | None:
    rows = dataset_digest(dataset)
    tokens = tokenizer_digest(tokenization.tokenizer)
    if rows is None or tokens is None:
        return None
    options = (tokenization.max_length, tokenization.overflow, tokenization.unrenderable)
    return digest("comparisons", rows, tokens, options, source)


class _Noted:
    """Comparison rows as they are tokenized, with notes on the rows that have passed."""

    def __init__(self, rows: Any, source: str):
        self._rows = rows
        self._source = source
        self.first_prompt: Any = None
        self.categories: dict[str | None, None] = {}

    def __iter__(self) -> Iterator[Comparison]:
        for number, row in enumerate(self._rows):
            if number == 0:
                self.first_prompt = row["prompt"]
            self.categories[row.get("category")] = None
            yield self._as_stored(row)

    def _as_stored(self, row: Comparison) -> Comparison:
        """The row as a dataset of comparisons has it."""
        row = with_defaults(row)
        try:
            if row.get("tools") is not None:
                row["tools"] = tools_text(row["tools"])
            if row.get("chat_template_kwargs") is not None:
                row["chat_template_kwargs"] = template_kwargs(row["chat_template_kwargs"])
        except (TypeError, ValueError, RecursionError) as error:
            names = ", ".join(row)
            raise PreferenceDataError(f"{self._source or 'dataset'}: columns {names}: {first_line(error)}.") from error
        return row
