"""Reads single files row by row: json, csv, tsv, xlsx and txt. A row that cannot be read is a string, the reason."""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..data.schema import PreferenceDataError, Row
from ..errors import first_line
from .columns import holds_text, is_conversation

KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".xlsx": "xlsx",
    ".txt": "text",
}
"""Ending of a file -> how it is read. Each but `.xlsx` may be compressed (`.gz`)."""
MAX_LINE = 2**28
"""Longest line that is read, in characters. A line needs several times its size in memory."""


class BadFile(Exception):
    """Why the content of a whole file does not match its extension."""


def kind_of(path: Path) -> str | None:
    """Returns how the file is read row by row, or None if it is not."""
    return KINDS.get(Path(path.name.removesuffix(".gz")).suffix.lower())


def rows_of(path: Path, sheet: str | None = None) -> Iterator[Row | str]:
    """Yields the rows of a file. `sheet` names one of several sheets of an xlsx file.

    Raises:
        PreferenceDataError: The file as a whole cannot be read.
    """
    kind = kind_of(path)
    try:
        if kind == "xlsx":
            yield from _excel_rows(path, sheet)
            return
        with _open_text(path) as file:
            yield from _READERS[kind](file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _refusal(path, "the gzip file is damaged or incomplete: download it again") from error
    except UnicodeDecodeError as error:
        reason = f"line {_broken_line(path)} is not UTF-8: convert the file to UTF-8"
        raise _refusal(path, reason) from error
    except (BadFile, csv.Error) as error:
        raise _refusal(path, str(error)) from error


def _open_text(path: Path) -> IO[str]:
    # The csv module handles line breaks itself, including those inside quotes.
    newline = "" if kind_of(path) in ("csv", "tsv") else None
    return _open(path, "rt", encoding="utf-8-sig", newline=newline)


def _open(path: Path, mode: str, **options: Any) -> IO:
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, mode, **options)


def _broken_line(path: Path) -> int:
    """Returns the number of the first line that is not UTF-8. The decoder only knows positions in its buffer."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with _open(path, "rb") as file:
        while part := file.read(2**20):
            try:
                decoder.decode(part)
            except UnicodeDecodeError as error:
                return line + error.object[: error.start].count(b"\n")
            line += part.count(b"\n")
    return line  # the file ends in the middle of a character


def _refusal(path: Path, reason: str) -> PreferenceDataError:
    return PreferenceDataError(f"{path.name}: cannot be read as {kind_of(path)}: {reason}")


# --- json -------------------------------------------------------------------------------------------------------------

_WRAPPERS = ("data", "rows", "train", "test", "examples", "instances", "samples", "items", "records")
"""Keys under which a JSON object may hold all rows of a file."""


def _json_rows(file: IO[str]) -> Iterator[Row | str]:
    """Yields the objects of a JSON array, or one object per line."""
    first = _first_character(file)
    file.seek(0)
    if not first:
        raise BadFile("it is empty")
    if first == "{":
        is_document = _is_object_of_many_lines(file)
    else:
        is_document = first == "["
    file.seek(0)
    if is_document:
        yield from _document_rows(file)
    else:
        yield from _line_rows(file)


def _first_character(file: IO[str]) -> str:
    """Returns the first character that is not white space, or ""."""
    while character := file.read(1):
        if not character.isspace():
            return character
    return ""


def _is_object_of_many_lines(file: IO[str]) -> bool:
    """True for a file that is a single JSON object, not one object per line.

    A single object on one line counts as a row, unless it contains a list of rows.
    """
    line = file.readline(MAX_LINE).strip("\ufeff")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        goes_on = ("{", "[", ",")
        return line.rstrip().endswith(goes_on)
    if not _is_wrapper(value):
        return False
    return not file.read().strip()  # nothing follows


def _is_wrapper(value: Row) -> bool:
    """True for an object with all rows under one of the usual keys, and at most one other entry."""
    return len(value) <= 2 and any(_holds_rows(value.get(key)) for key in _WRAPPERS)


def _holds_rows(value: Any) -> bool:
    """True for a list of objects that are not the turns of a conversation. Otherwise the object is itself a row."""
    if not isinstance(value, list):
        return False
    if value and not any(isinstance(entry, dict) for entry in value):
        return False  # UltraChat's `data` is a list of texts
    return not is_conversation(value)


def _document_rows(file: IO[str]) -> Iterator[Row | str]:
    """Yields the rows of a file that is one JSON value: an array, an object with an array inside, or a single row."""
    text = file.read(4 * MAX_LINE)
    if len(text) >= 4 * MAX_LINE:
        raise BadFile(f"one JSON value of more than {4 * MAX_LINE:,} characters: write one row per line")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", "?")
        raise BadFile(f"line {line}: {_reason(error)}") from error
    for row in _rows_in(value):
        yield _record(row)


def _rows_in(value: Any) -> list[Any]:
    """Returns the rows of a JSON value: an array, the array in an object, or the object as the only row."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    for name, entry in value.items():
        # One other entry may say what the rows are, such as a version.
        is_usual = name in _WRAPPERS and len(value) == 2
        if (is_usual or len(value) == 1) and _holds_rows(entry):
            return entry
    return [value]


def _record(value: Any) -> Row | str:
    return value if isinstance(value, dict) else "not a JSON object"


def _reason(error: Exception) -> str:
    """Returns the message of a JSON error, without the position in the file."""
    return str(getattr(error, "msg", error))


def _line_rows(file: IO[str]) -> Iterator[Row | str]:
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if len(line) >= MAX_LINE:
            raise BadFile(f"line {number} is longer than {MAX_LINE:,} characters: write one row per line")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == 1:  # not a file of JSON at all
                html = ", it looks like HTML" if line.lstrip().startswith("<") else ""
                raise BadFile(f"line 1 is not JSON{html}: {_reason(error)}") from error
            yield "not JSON"
        else:
            yield _record(row)


# --- other kinds ------------------------------------------------------------------------------------------------------


_DELIMITERS = ",;\t|"
"""What may separate the cells of a csv file. Excel writes semicolons where the comma is the decimal separator."""
_EXCEL_SEPARATOR = re.compile(r"sep=(.)\r?\n")
"""First line of some files that Excel wrote: it names the delimiter, and is no part of the table."""


class CsvLayout(NamedTuple):
    """How the cells of a csv file are separated.

    Attributes:
        delimiter: The character between cells.
        names: The names of the columns.
        skipped: Lines before the header.
    """

    delimiter: str
    names: list[str]
    skipped: int = 0


def csv_layout(path: Path) -> CsvLayout | None:
    """Returns how the cells of a csv file are separated; None if its header cannot be read."""
    try:
        with _open_text(path) as file:
            return _layout(file, "\t" if kind_of(path) == "tsv" else ",")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error, BadFile):
        return None


def _layout(file: IO[str], usual: str) -> CsvLayout:
    """Reads the header, and finds the delimiter by it: the usual one, unless with another there are more columns.

    That counts where the header is one column with the usual one, or has names that begin or end with a space, as in
    `question;the better, longer answer;winner`.
    """
    marked = _EXCEL_SEPARATOR.fullmatch(file.readline(MAX_LINE))
    file.seek(0)
    if marked:
        return CsvLayout(marked[1], _header_by(file, marked[1], skipped=1), skipped=1)
    first = CsvLayout(usual, _header_by(file, usual))
    if len(first.names) > 1 and _are_names(first.names):
        return first
    layouts = [first]
    for delimiter in _DELIMITERS:
        with suppress(csv.Error):  # with this delimiter, the quotes of the header would be wrong
            layouts.append(CsvLayout(delimiter, _header_by(file, delimiter)))
    # A delimiter between words: one in front of a space is a part of the only column's name.
    able = [layout for layout in layouts if _are_names(layout.names)]
    candidates = [first, *able] if len(first.names) > 1 else able or layouts
    return max(candidates, key=lambda layout: len(layout.names))


def _are_names(names: Sequence[str]) -> bool:
    return all(name == name.strip() for name in names)


def _header_by(file: IO[str], delimiter: str, *, skipped: int = 0) -> list[str]:
    """The names of the columns if this is the delimiter. Leaves the file at its beginning."""
    for _ in range(skipped):
        file.readline()
    names = csv.DictReader(_lines(file), strict=True, delimiter=delimiter).fieldnames
    file.seek(0)
    return list(names or ())


def _lines(file: IO[str]) -> Iterator[str]:
    """The lines of a file. A file whose lines are iterated directly cannot tell or seek afterward."""
    while line := file.readline():
        yield line


def _csv_rows(file: IO[str], usual: str = ",") -> Iterator[Row | str]:
    csv.field_size_limit(MAX_LINE)  # Python's default limit of 131,072 characters is too low for some conversations
    layout = _layout(file, usual)
    if not layout.names:
        raise BadFile("it is empty")
    _check_header(layout.names)
    for _ in range(layout.skipped):
        file.readline()
    reader = csv.DictReader(file, strict=True, delimiter=layout.delimiter)
    only = layout.names[0] if len(layout.names) == 1 else None
    n_rows = 0
    for row in reader:
        n_rows += 1
        more_cells = row.pop(None, None)  # the reader stores extra cells under the key None
        if more_cells and only is not None:
            # A list of texts, one a line, some of which have commas: nothing else can be meant.
            row[only] = layout.delimiter.join([row[only], *more_cells])
        elif more_cells:
            yield "more cells than columns"
            continue
        yield row
    if n_rows == 0:
        raise BadFile(f"it has a header ({_first_names(layout.names)}) and no rows: check how it was written")


def _check_header(names: Sequence[str]) -> None:
    """Raises `BadFile` for a name that two columns have."""
    named = [name for name in names if name.strip()]  # columns without a name may follow the table
    twice = [name for name in dict.fromkeys(named) if named.count(name) > 1]
    if twice:
        raise BadFile(f"two columns have the name {twice[0]!r}: rename or remove one")


def _first_names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(shown) <= 100 and shown.isprintable() else f"{len(names)} columns"


def _text_rows(file: IO[str]) -> Iterator[Row | str]:
    """Yields one prompt per line. Blank lines are skipped; `blank_lines` counts them."""
    n_rows = 0
    while line := file.readline(MAX_LINE):
        if line.strip():
            n_rows += 1
            yield {"prompt": line.strip()}
    if n_rows == 0:
        raise BadFile("it is empty: write one prompt per line")


def blank_lines(path: Path) -> list[int]:
    """The numbers, from 0, of the blank lines of a text file, without those at its end."""
    blank = []
    last = -1
    with _open_text(path) as file:
        for number, line in enumerate(file):
            if line.strip():
                last = number
            else:
                blank.append(number)
    return [number for number in blank if number < last]


def _excel_rows(path: Path, sheet: str | None) -> Iterator[Row | str]:
    """Yields the rows of the only sheet with content, or of the named one. Texts stay texts, numbers stay numbers."""
    import pandas  # installed with `datasets`

    try:
        # Without `keep_default_na`, the answers "None" and "NA" are not missing.
        sheets = pandas.read_excel(
            path, sheet_name=sheet, engine="openpyxl", dtype=object, keep_default_na=False, na_values=[""]
        )
    except ImportError as error:
        raise BadFile("this needs openpyxl: pip install openpyxl, or save the sheet as csv") from error
    except Exception as error:  # damaged archives and missing sheets raise errors of many kinds
        raise BadFile(f"{first_line(error)}: check the file and the name of the sheet (config=)") from error
    if isinstance(sheets, dict):
        filled = {name: table for name, table in sheets.items() if len(table)}
        if len(filled) != 1:
            found = ", ".join(map(str, filled)) or "no rows"
            raise BadFile(f"its sheets with rows are {found}: pass one of them as config= (recipes: --dataset_config)")
        sheets = next(iter(filled.values()))
    yield from table_rows(sheets)


def table_rows(table: Any) -> Iterator[Row]:
    """Yields the rows of a pandas DataFrame as Python values. Missing cells are None."""
    names = list(map(str, table.columns))
    text_columns = {name for name in names if holds_text(name)}
    for cells in table.itertuples(index=False, name=None):
        row = dict(zip(names, map(_plain, cells), strict=True))
        for name in text_columns:
            # A column of answers may have the cell 42.
            if isinstance(row.get(name), int | float) and not isinstance(row[name], bool):
                row[name] = str(row[name])
        yield row


def _plain(value: Any) -> Any:
    """Returns a cell of a DataFrame as a Python value: arrays are lists, NaN and NA are None."""
    if hasattr(value, "tolist"):  # arrays and numbers of numpy
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    is_missing = value is None or type(value).__name__ in ("NAType", "NaTType") or value != value
    return None if is_missing else value


_READERS: dict[str | None, Callable[[IO[str]], Iterator[Row | str]]] = {
    "json": _json_rows,
    "csv": _csv_rows,
    "tsv": partial(_csv_rows, usual="\t"),
    "text": _text_rows,
}
