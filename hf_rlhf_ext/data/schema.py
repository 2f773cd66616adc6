"""The comparison row (one prompt, K completions, any number of judgments) and the report on a loaded source.

Required columns:

- `prompt`: Text, or a list of messages.
- `completions`: K ≥ 2 different completions, each text or a list of messages like the prompt.
- `pairs`: List of `[i, j]`: completion i was compared to completion j.
- `targets`: One number per pair, P(i ≻ j): 1.0 means that i is better, 0.0 that j is better, 0.5 is a tie.

Optional columns:

- `weights`: Weight of each pair in the loss. The default is 1 / number of pairs of the prompt, so that each prompt
  counts once (InstructGPT, arXiv:2203.02155, sec. 3.5).
- `margins`: How much better i is than j, in units of reward, one number per pair. The default is 0.
- `votes`: Judgments of single annotators: `annotator`, `pair`, `label` (P(i ≻ j)) and optionally `confidence`.
- `flags`: Properties of a row worth knowing, such as `empty_completion`. `harmful:1` is about completion 1.
- `made_by`: How each completion was made: one record per completion.
- `tools`, `chat_template_kwargs`: Function schemas (JSON text of a list) and arguments for the chat template.
- `category`, `source`: Labels, such as a use case and the name of the dataset.
- `row`: Row number in the source.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any, NamedTuple

from datasets import Dataset, Features, Json, List, Value

from ..errors import UserError, first_line
from .cache import RowsFile, in_batches
from .json_columns import as_json_column, json_text, json_values
from .storage import TypesOfRows, arrow_table, as_dataset_of, columns_of, usual_type, values_of
from .templates import TEMPLATE_COLUMNS, template_kwargs, tools_text
from .text import Messages, is_text, text_key

Row = dict[str, Any]
Comparison = dict[str, Any]

REQUIRED = ("prompt", "completions", "pairs", "targets")
PER_PAIR = ("targets", "weights", "margins")
"""Columns that hold one number per pair."""
_VOTE = {
    "annotator": Value("string"),
    "pair": List(Value("int64")),
    "label": Value("float64"),
    "confidence": Value("float64"),
}
_FIXED_FEATURES = {
    "pairs": List(List(Value("int64"))),
    "targets": List(Value("float64")),
    "weights": List(Value("float64")),
    "margins": List(Value("float64")),
    "votes": List(_VOTE),
    "flags": List(Value("string")),
    "category": Value("string"),
    "source": Value("string"),
    "row": Value("int64"),
    "tools": Value("string"),
    "chat_template_kwargs": Json(),
}


class PreferenceDataError(UserError):
    """Raised for preference data that cannot be used. The message names the source, row, column and the remedy."""


class Unusable(Exception):
    """Raised for a source row without usable content. Its text is the reason in the report."""


@dataclass
class LoadReport:
    """Accounts for every row of a source.

    Rows are numbered from 0 within the requested split: row 0 of `split="train[100:200]"` is row 100 of `train`.

    Attributes:
        source: Name of the source.
        rows_in: Number of rows read.
        kept: Number of rows that were used. `rows_in` equals `kept` plus all dropped rows.
        dropped: Reason -> numbers of the dropped rows.
        flagged: Flag -> numbers of the rows that were kept with this flag, such as `empty_completion`.
        order_known: Whether the first completion of a pair is the one that annotators saw first.
        unread: Column that was not read -> what it looks like, such as "metadata" or "text". A column that repeats what
            was read counts as read. ", ignored" follows if the column looked as if it mattered, and the user waived it.
    """

    source: str = ""
    rows_in: int = 0
    kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    flagged: dict[str, list[int]] = field(default_factory=dict)
    order_known: bool = False
    unread: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, row: int) -> None:
        """Counts a dropped row."""
        self.dropped.setdefault(reason, []).append(row)

    def flag(self, name: str, row: int) -> None:
        """Counts a row that is kept with a flag."""
        self.flagged.setdefault(name, []).append(row)

    def summary(self) -> str:
        """Returns one line with the counts, and the first rows of each reason."""
        name = self.source or "dataset"
        parts = [f"{name}: {self.kept} of {self.rows_in} rows kept"]
        for reason, rows in self.dropped.items():
            parts.append(_summarize("dropped", reason, rows))
        for reason, rows in self.flagged.items():
            parts.append(_summarize("flagged", reason, rows))
        if unread := self.unread_in_words():
            parts.append(f"not read: {unread}")
        return "; ".join(parts)

    def unread_in_words(self, most: int = 5) -> str:
        """Lists the columns that were not read by what they look like, at most `most` of each. Empty ones are left out.

        Columns that the user waived come first, then text, as the reader may miss these most.
        """
        by_meaning: dict[str, list[str]] = {}
        for column, meaning in self.unread.items():
            by_meaning.setdefault(meaning, []).append(_printable(column))
        by_meaning.pop("empty", None)
        parts = []
        for meaning in sorted(by_meaning, key=_importance):
            columns = by_meaning[meaning]
            shown = ", ".join(columns[:most])
            if len(columns) > most:
                shown += f" and {len(columns) - most} more"
            parts.append(f"{shown} ({meaning})")
        return ", ".join(parts)

    @property
    def waived(self) -> list[str]:
        """Columns that looked as if they mattered, and that were not read because the user waived them."""
        return [column for column, meaning in self.unread.items() if meaning.endswith(", ignored")]


def _importance(meaning: str) -> tuple[bool, bool, bool]:
    """Sorts waived columns first, then text, and metadata last."""
    return not meaning.endswith(", ignored"), meaning != "text", meaning == "metadata"


def _printable(column: str) -> str:
    # The summary is one line, so a line break in a name is escaped.
    return column if column.isprintable() else repr(column)


def _summarize(verb: str, reason: str, rows: list[int]) -> str:
    """Returns how many rows were dropped or flagged for a reason, and the first five row numbers."""
    numbers = ", ".join(map(str, rows[:5]))
    if len(rows) > 5:
        numbers += ", …"
    return f"{len(rows)} {verb}: {reason} (row {numbers})"


# --- what a comparison row must hold ---------------------------------------------------------------------------------


def validate_comparison(row: Row, *, source: str = "", index: int | None = None) -> None:
    """Raises `PreferenceDataError`, in one line, unless `row` is a comparison row (see the module docstring)."""
    if _is_usual(row):
        return
    where = source or "comparisons"
    if index is not None:
        where += f" row {index}"
    try:
        _check_comparison(row)
    except _BrokenRow as problem:
        raise PreferenceDataError(f"{where}: {problem}.") from None


def _is_usual(row: Row) -> bool:
    """True for a correct row with one judgment of two completions: nearly all rows, checked in a third of the time.

    False says nothing about a row.
    """
    for column in PER_PAIR:
        values = row.get(column)
        if values is None and column != "targets":
            continue
        if type(values) is not list or len(values) != 1 or type(values[0]) is not float or not math.isfinite(values[0]):
            return False
    if not 0 <= row["targets"][0] <= 1 or (row.get("weights") or [1.0])[0] < 0:
        return False
    pairs = row.get("pairs")
    if pairs != [[0, 1]] or not all(type(place) is int for place in pairs[0]):
        return False
    if row.get("votes") or not is_list_of(row.get("flags") or [], str):
        return False
    labels = [row.get(column) for column in ("category", "source")]
    if not all(label is None or type(label) is str for label in labels) or type(row.get("row")) not in (
        int,
        type(None),
    ):
        return False
    prompt, completions = row.get("prompt"), row.get("completions")
    if type(completions) is not list or len(completions) != 2 or completions[0] == completions[1]:
        return False
    return is_text(prompt) and all(is_text(text) and same_kind(text, prompt) for text in completions)


class _BrokenRow(Exception):
    """Names the wrong column of a comparison row, the problem and the remedy."""

    def __init__(self, column: str, problem: str, remedy: str):
        super().__init__(f"`{column}` {problem}: {remedy}")


def _bad_value(column: str, value: Any, remedy: str) -> _BrokenRow:
    return _BrokenRow(column, f"holds {short(value)}", remedy)


def _check_comparison(row: Row) -> None:
    for column in REQUIRED:
        if row.get(column) is None:
            needed = ", ".join(REQUIRED)
            raise _BrokenRow(column, "is missing", f"a comparison row needs {needed}")
    _check_prompt(row["prompt"])
    _check_completions(row["completions"], row["prompt"])

    # Check types and lengths of the lists first. The checks below look at single entries.
    _check_lists(row)
    n_completions = len(row["completions"])
    _check_pairs(row["pairs"], n_completions)
    _check_targets(row["targets"])
    _check_weights(row.get("weights") or [])
    _check_margins(row.get("margins") or [])
    _check_votes(row.get("votes") or [], n_completions)
    _check_flags(row.get("flags") or [])
    _check_labels(row)


def _check_prompt(prompt: Any) -> None:
    if not is_text(prompt):
        kind = type(prompt).__name__
        raise _BrokenRow("prompt", f"is a {kind}", "give a string or a list of messages with role and content")


def _check_completions(completions: Any, prompt: str | Messages) -> None:
    if not isinstance(completions, list) or len(completions) < 2:
        raise _BrokenRow("completions", "has fewer than two entries", "a comparison needs at least two completions")
    wanted = "string" if isinstance(prompt, str) else "list of messages"
    for k, completion in enumerate(completions):
        if not is_text(completion) or not same_kind(completion, prompt):
            kind = type(completion).__name__
            raise _BrokenRow("completions", f"entry {k} is a {kind}", f"give a {wanted}, like the prompt")
        if completion in completions[:k]:
            first = completions.index(completion)
            raise _BrokenRow("completions", f"entries {first} and {k} are equal", "merge them, or remove the row")


def _check_lists(row: Comparison) -> None:
    for column in ("pairs", *PER_PAIR, "votes", "flags"):
        value = row.get(column)
        if not isinstance(value, list | None):
            kind = type(value).__name__
            raise _BrokenRow(column, f"is a {kind}", "give a list")
    n_pairs = len(row["pairs"])
    if n_pairs == 0:
        raise _BrokenRow("pairs", "is empty", "give at least one [i, j]")
    for column in PER_PAIR:
        values = row.get(column)
        if values is not None and len(values) != n_pairs:
            raise _BrokenRow(column, f"has {len(values)} entries for {n_pairs} pairs", "give one per pair")


def _check_pairs(pairs: list[Any], n_completions: int) -> None:
    for pair in pairs:
        if not _is_pair(pair, n_completions):
            last = n_completions - 1
            raise _bad_value("pairs", pair, f"give two indices between 0 and {last}")
        i, j = pair
        if i == j:
            raise _bad_value("pairs", pair, "a completion cannot be compared with itself")


def _check_targets(targets: list[Any]) -> None:
    for target in targets:
        if not _is_probability(target):
            raise _bad_value("targets", target, "give a probability P(i ≻ j) between 0 and 1")


def _check_weights(weights: list[Any]) -> None:
    for weight in weights:
        if not is_number(weight) or weight < 0:
            raise _bad_value("weights", weight, "give a finite number that is not negative")


def _check_margins(margins: list[Any]) -> None:
    for margin in margins:
        if not is_number(margin):
            raise _bad_value("margins", margin, "give a finite number, i minus j")


def _check_votes(votes: list[Any], n_completions: int) -> None:
    for vote in votes:
        if not _is_vote(vote, n_completions):
            remedy = "give annotator (text), pair ([i, j]) and label (0 to 1)"
            raise _bad_value("votes", vote, remedy)


def _check_flags(flags: list[Any]) -> None:
    if not is_list_of(flags, str):
        raise _bad_value("flags", flags, "give a list of text")


def _check_labels(row: Comparison) -> None:
    for column in ("category", "source"):
        label = row.get(column)
        if not isinstance(label, str | None):
            raise _BrokenRow(column, f"is {short(label)}", "give a str, or leave it out")
    number = row.get("row")
    if number is not None and not _is_whole(number):
        raise _BrokenRow("row", f"is {short(number)}", "give an int, or leave it out")


def _is_pair(value: Any, n_completions: int) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return all(_is_whole(k) and 0 <= k < n_completions for k in value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and is_number(value)


def _is_probability(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _is_vote(value: Any, n_completions: int) -> bool:
    if not isinstance(value, dict):
        return False
    if not isinstance(value.get("annotator"), str | None):
        return False
    confidence = value.get("confidence")
    if confidence is not None and not is_number(confidence):
        return False
    return _is_pair(value.get("pair"), n_completions) and _is_probability(value.get("label"))


# --- cleaning rows ---------------------------------------------------------------------------------------------------


def renumbered(
    row: Comparison,
    home: Mapping[int, int],
    kept_pairs: Iterable[int] | None = None,
) -> Comparison:
    """Renumbers the completions in the judgments of a row.

    Args:
        row: A comparison row. Its `completions` are not changed here; the caller does that.
        home: Old index of a completion -> new index. Removed completions are missing.
        kept_pairs: Indices of the `pairs` to keep, in this order. `None` keeps all. `home` must have both completions
            of each kept pair.

    Returns:
        The row with new `pairs`, with the `targets`, `weights` and `margins` of the kept pairs, and with `votes`.
            Votes on removed completions are removed, and `votes` is None if none is left.
    """
    old_pairs = row["pairs"]
    kept = list(range(len(old_pairs)))
    if kept_pairs is not None:
        kept = list(kept_pairs)
    changed = dict(row)
    changed["pairs"] = [_new_pair(old_pairs[n], home) for n in kept]
    for column in PER_PAIR:
        values = row.get(column)
        if values:
            changed[column] = [values[n] for n in kept]

    votes = []
    for vote in row.get("votes") or ():
        if home.keys() >= set(vote["pair"]):
            votes.append(vote | {"pair": _new_pair(vote["pair"], home)})
    changed["votes"] = votes or None
    if row.get("made_by"):
        changed["made_by"] = _made_by_of(row["made_by"], home)
    if row.get("flags"):
        changed["flags"] = _renumbered_flags(row["flags"], home)
    return changed


def _made_by_of(made_by: Any, home: Mapping[int, int]) -> Any:
    """Returns the records in the new order. Of merged completions, the first one counts."""
    if not is_list_of(made_by, dict) or home and max(home) >= len(made_by):
        return made_by  # a column of the source that has this name by chance
    records: dict[int, Row] = {}
    for old, new in home.items():
        records.setdefault(new, made_by[old])
    return [records[new] for new in sorted(records)]


def _renumbered_flags(flags: Iterable[str], home: Mapping[int, int]) -> list[str]:
    """Renumbers flags of single completions, such as `harmful:1`. Those of removed completions are removed."""
    renamed = []
    for flag in flags:
        name, _, number = flag.rpartition(":")
        if not name or not number.isdecimal():
            renamed.append(flag)  # about the whole row
        elif int(number) in home:
            renamed.append(f"{name}:{home[int(number)]}")
    return renamed


def _new_pair(pair: Iterable[int], home: Mapping[int, int]) -> list[int]:
    i, j = pair
    return [home[i], home[j]]


def settle(row: Comparison) -> Comparison:
    """Cleans a converted row.

    Completions that are not text are removed with their pairs, and completions that differ only in white space are
    merged. Both are flagged, and so are empty completions and prompts. `votes` are renumbered accordingly.

    Raises:
        Unusable: No pair of two different completions is left.
    """
    prompt = row["prompt"]
    flags = set(row.get("flags") or ())
    if is_empty(prompt):
        flags.add("empty_prompt")

    distinct = DistinctTexts()
    home: dict[int, int] = {}  # index in the row -> index among the distinct completions
    for k, completion in enumerate(row["completions"]):
        if is_text(completion) and same_kind(completion, prompt):
            home[k] = distinct.add(completion)
        else:
            flags.add("completion_not_text")
    have_merged = len(distinct.texts) < len(home)
    if have_merged:
        flags.add("equal_completions_merged")

    kept_pairs = []
    for n, pair in enumerate(row["pairs"]):
        # Remove pairs with a side that is not text, and pairs whose sides are now the same completion.
        sides = [home.get(k) for k in pair]
        if None not in sides and _names_two(sides):
            kept_pairs.append(n)
    if not kept_pairs:
        raise Unusable("completions are equal" if have_merged else "fewer than two completions are text")

    settled = renumbered(row, home, kept_pairs)
    settled["completions"] = distinct.texts
    # The difference of two finite scores may exceed the range of floats.
    margins = settled.get("margins") or []
    if not all(map(is_number, margins)):
        raise Unusable("scores are too far apart for a finite margin")
    votes = settled["votes"] or []
    votes = [vote for vote in votes if _names_two(vote["pair"])]
    settled["votes"] = votes or None
    if any(map(is_empty, distinct.texts)):
        flags.add("empty_completion")
    settled["flags"] = sorted(flags)
    return settled


def _names_two(pair: list[int]) -> bool:
    i, j = pair
    return i != j


class DistinctTexts:
    """Distinct texts in the order in which they were added. Texts that differ only in white space count as equal."""

    def __init__(self):
        self.texts: list[str | Messages] = []
        self._places: dict[str, int] = {}

    def add(self, text: str | Messages) -> int:
        """Adds the text unless an equal one was added before. Returns the index of the text."""
        key = text_key(text)
        if key not in self._places:
            self._places[key] = len(self.texts)
            self.texts.append(text)
        return self._places[key]


def own_row(row: Comparison, *, source: str = "", index: int | None = None) -> Comparison:
    """Validates a comparison row and returns it unchanged, except that empty completions are flagged."""
    validate_comparison(row, source=source, index=index)
    flags = set(row.get("flags") or ())
    if any(map(is_empty, row["completions"])):
        flags.add("empty_completion")
    checked = without_missing(row)
    checked["flags"] = sorted(flags)
    return checked


def without_missing(row: Row) -> Row:
    """Returns the row without the columns that are None."""
    return {name: value for name, value in row.items() if value is not None}


# --- one row per prompt ----------------------------------------------------------------------------------------------


def group_by_prompt(rows: list[Comparison], report: LoadReport | None = None) -> list[Comparison]:
    """Merges rows with the same prompt, category and tools into one row with distinct completions and all judgments.

    Prompts and completions that differ only in white space count as equal. A row that equals an earlier one (same
    prompt, sides, order, targets and votes) is a copy, not a second judgment. It is dropped, and flagged
    `duplicated_row` in the merged row and in `report`. Rows that contradict each other are both kept.

    Weights given by the source are kept. Otherwise the weight of a pair is 1 / number of pairs of the prompt. Order,
    `row` and other columns are those of the first row.
    """
    report = report or LoadReport()
    groups: dict[Any, list[Comparison]] = {}
    for row in rows:
        groups.setdefault(prompt_key(row), []).append(row)

    grouped = []
    for group in groups.values():
        if len(group) > 1:
            grouped.append(merge_rows(group, report))
        else:
            grouped.append(group[0])  # unchanged, including its weights
    if "duplicated_row" in report.flagged:
        report.flagged["duplicated_row"].sort()  # they were found in the order of the prompts
    return grouped


def prompt_key(row: Comparison) -> tuple[str, ...]:
    """Returns what is equal in rows that `group_by_prompt` merges."""
    # With other tools, or other arguments of the chat template, the question is another one.
    labels = [str(row.get(column)) for column in ("category", *TEMPLATE_COLUMNS)]
    return text_key(row["prompt"]), *labels


def merge_rows(group: list[Comparison], report: LoadReport) -> Comparison:
    """Merges the rows of one prompt into one row."""
    completions = DistinctTexts()
    judgments: Comparison = {}
    for column in ("pairs", "targets", "margins", "weights", "votes"):
        judgments[column] = []
    made_by: dict[int, Row] = {}  # index among the merged completions -> record
    seen: set[tuple] = set()
    flags: set[str] = set()
    for row in group:
        home = {}
        for k, completion in enumerate(row["completions"]):
            home[k] = completions.add(completion)
        if not has_own_weights(row):
            row = row | {"weights": None}  # default weights: recomputed below for the merged row
        judged = renumbered(with_defaults(row), home)
        judged["votes"] = judged["votes"] or []
        flags.update(judged.get("flags") or ())
        if is_list_of(row.get("made_by"), dict) and len(row["made_by"]) == len(home):
            for old, new in home.items():
                made_by.setdefault(new, row["made_by"][old])

        # A row that is equal in every judgment, including votes, is a copy.
        key = tuple(_hashable(judged[column]) for column in judgments)
        if key in seen:
            flags.add("duplicated_row")
            report.flag("duplicated_row", row.get("row", -1))
            continue
        seen.add(key)
        for column, values in judgments.items():
            values.extend(judged[column])

    merged = dict(group[0])
    merged.pop("weights", None)
    merged.update(judgments)
    if not any(map(has_own_weights, group)):
        del merged["weights"]  # the default is 1 / number of pairs of the merged row
    merged["completions"] = completions.texts
    merged["flags"] = sorted(flags)
    merged["votes"] = judgments["votes"] or None
    if made_by:
        merged["made_by"] = [made_by.get(k, {}) for k in range(len(completions.texts))]
    return merged


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        # In saved rows, a field that some rows lack is None.
        value = sorted(without_missing(value).items())
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    return value


# --- conversion to a dataset -----------------------------------------------------------------------------------------


def as_dataset(rows: list[Comparison], source: str = "") -> Dataset:
    """Converts rows to a dataset with fixed column types, which do not depend on the first or empty rows.

    Weights default to 1 / number of pairs, and margins to 0. Columns that are None in every row are removed.

    Raises:
        PreferenceDataError: Some prompts are text and others are messages, or a column cannot be stored.
    """
    _check_one_kind(rows, source)
    columns = _columns(rows)
    try:
        return dataset_of(columns)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _not_stored(columns, source, error) from error


def _not_stored(columns: Iterable[str], source: str, error: Exception) -> PreferenceDataError:
    return PreferenceDataError(f"{source or 'dataset'}: columns {', '.join(columns)}: {first_line(error)}.")


def _check_one_kind(rows: list[Comparison], source: str) -> None:
    """Raises if some prompts are text and others are messages."""
    for row in rows:
        first = rows[0]
        if not same_kind(row["prompt"], first["prompt"]):
            where = source or "dataset"
            raise PreferenceDataError(
                f"{where}: row {first['row']} is {_kind(first)}, row {row['row']} is {_kind(row)}: use the same kind "
                "in all rows, or load them as two datasets."
            )


def _kind(row: Row) -> str:
    return "text" if isinstance(row["prompt"], str) else "messages"


def _columns(rows: list[Comparison]) -> dict[str, list[Any]]:
    """Returns the values of each column, in the order in which columns appear in the rows."""
    names: dict[str, None] = {}
    filled = []
    for row in rows:
        filled.append(_filled(row))
        names.update(dict.fromkeys(filled[-1]))

    columns = {}
    for name in names:
        values = [row.get(name) for row in filled]
        if any(value is not None for value in values):
            columns[name] = values
    return columns


def _filled(row: Row) -> Row:
    return with_defaults(row) if "pairs" in row else row  # demonstrations have no pairs


def dataset_of(columns: dict[str, list[Any]]) -> Dataset:
    """Returns the columns as a dataset: the types of the schema, JSON for records that differ, others inferred.

    Raises:
        TypeError, ValueError, OverflowError, RecursionError: A column cannot be stored.
    """
    kinds = {name: column_kind(name, values) for name, values in columns.items()}
    features = Features({name: kind.feature for name, kind in kinds.items()})
    return as_dataset_of({name: stored_values(name, values, kinds[name]) for name, values in columns.items()}, features)


class ColumnKind(NamedTuple):
    """How a column is stored.

    Attributes:
        feature: Its type for `datasets`.
        is_json: Whether each message is JSON text, as messages differ in their fields.
    """

    feature: Any
    is_json: bool = False


def column_kind(name: str, values: list[Any]) -> ColumnKind:
    """Returns how a column is stored: as the schema says, as JSON if its records differ, or by the type of its values.

    Raises:
        TypeError, ValueError, OverflowError, RecursionError: The column cannot be stored.
    """
    if name in _FIXED_FEATURES:
        return ColumnKind(_FIXED_FEATURES[name])
    feature = usual_type(values)
    if feature is not None:
        return ColumnKind(feature)
    as_json = as_json_column(values)
    if as_json is not None:
        return ColumnKind(as_json[1], is_json=True)
    return ColumnKind(Dataset.from_dict({name: values}, on_mixed_types="use_json").features[name])


def stored_values(name: str, values: list[Any], kind: ColumnKind) -> list[Any]:
    """Returns the values of a column as they are written: tools and records as JSON text.

    Raises:
        TypeError, ValueError, OverflowError, RecursionError: The column cannot be stored.
    """
    if name == "tools":
        return list(map(tools_text, values))
    if name == "chat_template_kwargs":
        # TRL's trainers unpack it, so rows without arguments have an empty record.
        return [json_text(template_kwargs(value)) for value in values]
    return json_values(values, kind.feature) if kind.is_json else values


def write_rows(rows: Iterable[Comparison], file: RowsFile, source: str = "") -> None:
    """Writes rows as `as_dataset` stores them, of which only a batch is in memory.

    Args:
        rows: The rows, which are iterated several times.
        file: Takes the rows.
        source: Name of the source, for messages.

    Raises:
        PreferenceDataError: As `as_dataset`.
    """
    types = TypesOfRows(_FIXED_FEATURES)
    first = None
    for batch in in_batches(rows, 1000):
        first = first or batch[0]
        _check_one_kind([first, *batch], source)
        types.look_at(list(map(_filled, batch)))
    try:
        kinds = {name: ColumnKind(feature) for name, feature in (_FIXED_FEATURES | types.usual()).items()}
        for name in types.unusual:
            kinds[name] = column_kind(name, list(values_of(rows, name)))
        features = Features({name: kinds[name].feature for name in types.names})
        for batch in in_batches(rows, 1000):
            columns = columns_of(list(map(_filled, batch)), types.names)
            stored = {name: stored_values(name, values, kinds[name]) for name, values in columns.items()}
            file.write(arrow_table(stored, features))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _not_stored(types.names, source, error) from error


def with_defaults(row: Comparison) -> Comparison:
    """Fills in missing weights (1 / number of pairs) and missing margins (0)."""
    n_pairs = len(row["pairs"])
    filled = dict(row)
    filled["weights"] = row.get("weights") or [1 / n_pairs] * n_pairs
    filled["margins"] = row.get("margins") or [0.0] * n_pairs
    return filled


def has_own_weights(row: Comparison) -> bool:
    """True if the weights are given by the source, not the default of `with_defaults`, which merging recomputes."""
    default = 1 / len(row["pairs"])
    weights = row.get("weights") or []
    # Not `==`, since files may store rounded numbers.
    return not all(math.isclose(weight, default) for weight in weights)


# --- values ----------------------------------------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    """True for a finite number. Booleans do not count as numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def is_list_of(value: Any, kind: type) -> bool:
    """True for a list in which all entries have this type, or an empty list."""
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def same_kind(first: str | Messages, second: str | Messages) -> bool:
    """True if both are text or both are messages."""
    return isinstance(first, str) == isinstance(second, str)


def is_empty(text: str | Messages) -> bool:
    """True for text or messages that contain only white space and no tool call."""
    if isinstance(text, str):
        return not text.strip()
    for message in text:
        content = str(message.get("content") or "")
        if content.strip() or message.get("tool_calls"):
            return False
    return True
