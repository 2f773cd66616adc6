"""Loads public preference and instruction datasets as comparisons or demonstrations, with a report."""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets
from tqdm.auto import tqdm

from ..data.cache import RowsFile, digest, kept
from ..data.conversion import (
    Collected,
    Converted,
    collect,
    convert,
    keep_one_kind,
    list_columns,
    read_each,
    readable_rows,
    require_rows,
    with_labels,
)
from ..data.grouping import Grouped
from ..data.json_columns import rows_of, without_arrow_fill
from ..data.origin import with_origin
from ..data.schema import (
    Comparison,
    LoadReport,
    PreferenceDataError,
    Row,
    Unusable,
    as_dataset,
    group_by_prompt,
    is_number,
    own_row,
    with_defaults,
    write_rows,
)
from ..data.templates import TEMPLATE_COLUMNS
from ..data.trl_rows import check_implicit_prompts
from . import demonstrations as demo
from .by_role import gather_rows, prompt_columns, read_row
from .columns import TEXT, ColumnWatch, UnreadColumn, account
from .guessing import guess_roles, nearest_reading
from .profile import Profile, profile_of, with_late_columns, without_columns
from .registry import COMPARISONS, DEMONSTRATIONS, Format, register_format, register_formats
from .roles import NOT_COLUMNS, Kind, Roles, cell, check_complete, column_of
from .sources import AnyDataset, Source, load_rows, open_source

__all__ = [
    "UnknownFormat",
    "UnreadColumn",
    "load_comparisons",
    "load_demonstrations",
    "load_rows",
    "register_format",
    "register_formats",
    "to_comparisons",
    "with_prompts",
]


class UnknownFormat(PreferenceDataError):
    """Raised when the columns of the data match no known format."""


def load_comparisons(
    source: str | Path | AnyDataset,
    format: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    *,
    config: str | None = None,
    columns: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    category_column: str | None = None,
    group: bool = True,
    streaming: bool = False,
) -> tuple[Dataset | IterableDataset, LoadReport]:
    """Loads preference data in any supported public format as comparison rows.

    A comparison row has the columns `prompt`, `completions`, `pairs` and `targets`; `hf_rlhf_ext.data.schema` describes
    all columns. Prompts are either all text or all lists of messages. If a source mixes both, the rows of the less
    frequent kind are dropped (with `streaming`: the rows that differ from the first one).

    A source with at least 10,000 rows, or a file over 8 MB, is converted once and stored in the cache of `datasets`.

    Args:
        source: Dataset in memory, path of a file or folder, or dataset id on the Hub. See `load_rows`.
        format: Name of the format, one of `hf_rlhf_ext.readers.registry.COMPARISONS`. `None` detects it from the column
            names and the first values.
        split: Split to load, such as `"train"` or `"train[:500]"`. It may be `None` if there is only one split.
        revision: Branch, tag or commit of a dataset on the Hub.
        config: Configuration ("subset") of a dataset on the Hub or in a folder, if it has several.
        columns: Role -> column, for data in no known format: `{"prompt": "query", "answers": ["output_1", "output_2"],
            "verdict": "label", "verdict_is": "1 or 2"}`. `hf_rlhf_ext.readers.roles.Roles` lists the roles, and
            `hf_rlhf_ext.readers.verdicts.decoder` the meanings of a verdict. Roles that are left out are found by the
            names of the columns.
        ignore: Columns that need not be read, although they look as if they mattered.
        category_column: Column of the source that is copied to `category`. `None` is the column that the format has
            for it, or `category`.
        group: Whether to merge rows with the same prompt into one row. Has no effect with `streaming`.
        streaming: Whether to convert the rows while iterating. The report is complete after the iteration.

    Returns:
        The comparison rows, and a `LoadReport` that accounts for every row of the source: `rows_in` equals `kept` plus
            all dropped rows.

    Raises:
        UnknownFormat: It is not clear what the columns hold. The message has the nearest reading.
        UnreadColumn: A column that was not read looks as if it mattered, such as a system text, images or ratings.
        PreferenceDataError: The source cannot be read, no row is usable, or a comparison row violates the schema.
    """
    opened = open_source(source, split, revision, config=config, streaming=streaming)
    options = _Options(group and not streaming, category_column, _names(ignore))
    return _load(opened, COMPARISONS, format, options, columns=columns, streaming=streaming)


def load_demonstrations(
    source: str | Path | AnyDataset,
    format: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    *,
    config: str | None = None,
    columns: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    every_turn: bool = False,
    labels: demo.Labels = "liked",
    category_column: str | None = None,
    streaming: bool = False,
) -> tuple[Dataset | IterableDataset, LoadReport]:
    """Loads instruction data in any supported public format as demonstrations.

    A demonstration has the columns `prompt` and `completion`, and `category`, `rating` and `tools` if the source has
    them. The last answer of a conversation is the completion, and all turns before it are the prompt.

    Args:
        source: Dataset in memory, path of a file or folder, or dataset id on the Hub. See `load_rows`.
        format: Name of the format, one of `hf_rlhf_ext.readers.registry.DEMONSTRATIONS`. `None` detects it from the
            column names and the first values.
        split: Split to load, such as `"train"` or `"train[:500]"`. It may be `None` if there is only one split.
        revision: Branch, tag or commit of a dataset on the Hub.
        config: Configuration ("subset") of a dataset on the Hub or in a folder, if it has several.
        columns: Role -> column, for data in no known format: `{"prompt": "query", "completion": "reply"}`, or
            `{"messages": "thread"}`. `hf_rlhf_ext.readers.roles.Roles` lists the roles.
        ignore: Columns that need not be read, although they look as if they mattered.
        every_turn: Whether to make one row per answer of a conversation instead of one row for its last answer.
        labels: "liked" drops answers that a label calls disliked, unsafe or wrong. "all" keeps every answer.
        category_column: Column of the source that is copied to `category`. `None` is `category`.
        streaming: Whether to convert the rows while iterating. The report is complete after the iteration.

    Returns:
        The demonstrations, and a `LoadReport` that accounts for every row of the source.

    Raises:
        UnknownFormat: It is not clear what the columns hold. The message has the nearest reading.
        UnreadColumn: A column that was not read looks as if it mattered, such as a system text, images or ratings.
        PreferenceDataError: The source cannot be read, or no row is usable.
    """
    opened = open_source(source, split, revision, config=config, streaming=streaming)
    reading = {"every_turn": every_turn, "labels": labels}
    options = _Options(False, category_column, _names(ignore), reading)
    return _load(opened, DEMONSTRATIONS, format, options, columns=columns, streaming=streaming)


def to_comparisons(
    dataset: Dataset,
    *,
    source: str = "",
    columns: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
) -> tuple[Dataset, LoadReport]:
    """Runs `load_comparisons` on a dataset in memory, without merging rows that have the same prompt."""
    require_rows(dataset, source)
    options = _Options(ignore=_names(ignore))
    return _load(Source(source, dataset), COMPARISONS, None, options, columns=columns)


def with_prompts(dataset: Dataset, columns: Mapping[str, Any], *, source: str = "") -> Dataset:
    """Adds the column `prompt` to rows for PPO, built from the columns that have a part of it.

    Args:
        dataset: Rows in any form. All of their columns are kept, as reward functions may read them.
        columns: Role -> column: `prompt`, and optionally `system`, `history`, `context`, `tools` and `template_kwargs`.
        source: Name of the source, for messages.

    Raises:
        PreferenceDataError: A role or column is not known, or a row has no prompt.
    """
    where = source or "dataset"
    roles = Roles.from_mapping(columns, "demonstrations")
    _check_columns_exist(roles, profile_of((), dataset.column_names), where)
    if roles.prompt is None:
        raise PreferenceDataError("columns: give prompt, the column with the question.")

    def add(row: Row, index: int) -> Row:
        try:
            return prompt_columns(roles, row)
        except Unusable as reason:
            raise PreferenceDataError(f"{where} row {index}: {reason}: fix or drop the row.") from None

    rows = [add(row, index) for index, row in enumerate(dataset)]
    built = as_dataset([row | {"row": index} for index, row in enumerate(rows)], source).remove_columns("row")
    kept = [name for name in dataset.column_names if name not in built.column_names]
    return concatenate_datasets([built, dataset.select_columns(kept)], axis=1) if kept else built


ROLES = "roles"
"""Name of the format of data that are read by the names of their columns, or by the user's `columns={…}`."""


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    Attributes:
        format: The format, with all roles that this source has.
        read: Columns that are read.
        convert: Converts a row; with `format.gathers`, all rows.
    """

    format: Format
    read: frozenset[str]
    convert: Callable[..., Any]

    @property
    def is_ours(self) -> bool:
        return self.convert is own_row


def resolve(
    profile: Profile,
    formats: Sequence[Format],
    name: str = "",
    asked: str | None = None,
    columns: Mapping[str, Any] | None = None,
) -> Reading:
    """Finds out how to read a source: by a named format, by the user's `columns`, or by the names of the columns.

    Raises:
        UnknownFormat: The columns match no format, and it is not clear what they hold.
        PreferenceDataError: `asked` is no format, or `columns` names an unknown role or a missing column.
    """
    where = name or "dataset"
    kind = "comparisons" if formats is COMPARISONS else "demonstrations"
    candidates = _candidates(formats, where, asked)
    fmt = next((fmt for fmt in candidates if fmt.matches(profile.first)), None)
    if columns:
        return _read_by_columns(profile, fmt, columns, kind, where)
    if fmt is not None:
        return _read_by_format(profile, fmt, kind, where)
    if asked is None:
        if kind == "demonstrations":
            reader = demo.guess_demonstration(profile)
            if reader is not None:
                return _demonstration_reading(reader)
        else:
            roles = guess_roles(profile)
            if roles is not None:
                return _comparison_reading(Format(ROLES, tuple(sorted(roles.columns)), roles=roles), profile, where)
    raise UnknownFormat(_unknown(profile, candidates, where, asked, kind))


def _candidates(formats: Sequence[Format], where: str, asked: str | None) -> Sequence[Format]:
    if asked is None:
        return formats
    candidates = [fmt for fmt in formats if fmt.name == asked]
    if not candidates:
        names = dict.fromkeys(fmt.name for fmt in formats)  # some formats have two forms
        known = ", ".join(names)
        raise PreferenceDataError(f"{where}: no format {asked!r}; known are {known}.")
    return candidates


def _read_by_format(profile: Profile, fmt: Format, kind: str, where: str) -> Reading:
    if fmt.roles is None:
        read = frozenset((*fmt.columns, *fmt.reads, "source"))
        if fmt.convert is own_row:
            read = frozenset(profile.columns)  # rows in our own schema keep all of their columns
        return Reading(fmt, read, fmt.convert)
    if kind == "demonstrations":
        return _demonstration_reading(demo.with_further_columns(fmt.roles, profile), fmt)
    # The format says what decides. Optional columns, such as a system text, are found by their names.
    roles = guess_roles(profile, fmt.roles, fmt.known) or fmt.roles
    return _comparison_reading(replace(fmt, roles=roles), profile, where)


def _comparison_reading(fmt: Format, profile: Profile, where: str) -> Reading:
    roles = _with_one_kind_of_prompt(fmt.roles)
    _check_label_is_yes_or_no(roles, profile, where)
    gathers = roles.answer is not None
    convert = partial(gather_rows if gathers else read_row, roles)
    return Reading(replace(fmt, gathers=gathers, roles=roles), frozenset((*roles.columns, "source")), convert)


def _check_label_is_yes_or_no(roles: Roles, profile: Profile, where: str) -> None:
    """Raises `PreferenceDataError` if the label of a row's only answer is one of more than two grades."""
    if roles.answer is None or roles.verdict is None or roles.verdict_is is not None:
        return
    for row in profile.rows:
        value = cell(row, roles.verdict)
        if is_number(value) and not -1 <= value <= 1:
            raise PreferenceDataError(
                f"{where}: {roles.verdict} is {value} in a row, which is neither yes nor no: if higher is better, give "
                f'columns={{"answer": "{roles.answer}", "ratings": "{roles.verdict}"}} (recipes: --columns).'
            )


def _with_one_kind_of_prompt(roles: Roles) -> Roles:
    """Makes messages of all prompts if a system text or earlier turns, which only some rows may have, need messages."""
    has_turns = roles.system or roles.history
    if not (roles.as_text and has_turns) or roles.started is not None:
        return roles
    return replace(roles, as_text=False)


def _demonstration_reading(reader: demo.DemonstrationReader, fmt: Format | None = None) -> Reading:
    reader = replace(reader, roles=_with_one_kind_of_prompt(reader.roles))
    fmt = fmt or Format(ROLES, tuple(sorted(reader.columns)), roles=reader.roles)
    return Reading(fmt, frozenset((*reader.columns, "source")), reader)


def _read_by_columns(
    profile: Profile, fmt: Format | None, columns: Mapping[str, Any], kind: Kind, where: str
) -> Reading:
    """Reads by the user's roles. The others come from the format, if it has roles, or from the columns' names."""
    given = Roles.from_mapping(columns, kind)
    _check_columns_exist(given, profile, where)
    if kind == "demonstrations":
        return _demonstration_by_columns(profile, columns)
    says_what_is_compared = given.rejected or given.answers or given.answer
    if fmt is not None and fmt.roles is not None and not says_what_is_compared:
        given = _changed(fmt.roles, columns)
        # What decided before is another judgment now.
        replaced = fmt.roles.columns - given.columns
        fmt = replace(fmt, known=(*fmt.known, *sorted(replaced)))
    else:
        fmt = Format(ROLES, ())
    roles = guess_roles(profile, given, [column for column in fmt.known if column not in given.columns])
    if roles is None:
        check_complete(given)
        raise UnknownFormat(_unknown(profile, (), where, None, kind, given))
    return _comparison_reading(replace(fmt, roles=roles), profile, where)


_DECIDING = ("verdict", "verdict_is", "ratings", "ranks", "votes")


def _changed(roles: Roles, columns: Mapping[str, Any]) -> Roles:
    """The roles of a format with the user's changes. What decides is replaced as a whole."""
    if not set(_DECIDING).isdisjoint(columns):
        roles = replace(roles, verdict=None, verdict_is=None, ratings=(), ranks=(), votes=())
    return roles.updated(columns)


def _check_columns_exist(roles: Roles, profile: Profile, where: str) -> None:
    for role, value in roles.as_mapping().items():
        if role in NOT_COLUMNS:
            continue
        for path in [value] if isinstance(value, str) else value:
            if path not in profile.values and column_of(path) not in profile.values:
                known = list_columns(profile.columns)
                raise PreferenceDataError(f"{where}: columns: {role} is {path!r}, which is no column; found {known}.")


def _demonstration_by_columns(profile: Profile, columns: Mapping[str, Any]) -> Reading:
    reader = demo.guess_demonstration(profile) or demo.DemonstrationReader(Roles(kind="demonstrations"))
    found = reader.roles
    if "messages" in columns:
        found = replace(found, prompt=None, completion=None, context=None)
    elif "prompt" in columns or "completion" in columns:
        found = replace(found, messages=None)
    # A column that was found in one role may have another one.
    named = set(columns.values()) if all(isinstance(value, str | bool) for value in columns.values()) else set()
    taken = {role: None for role, column in found.as_mapping().items() if column in named and role != "as_text"}
    roles = replace(found, **taken).updated(columns)
    check_complete(roles)
    labels = tuple(column for column in reader.label_columns if column not in roles.columns)
    repeats = demo.answers_repeat_prompt(roles, profile)
    return _demonstration_reading(demo.DemonstrationReader(roles, labels, repeats_prompt=repeats))


def _unknown(
    profile: Profile,
    candidates: Sequence[Format],
    where: str,
    asked: str | None,
    kind: str,
    given: Roles | None = None,
) -> str:
    """The line about columns that match no format, with the nearest reading."""
    columns = list_columns(profile.columns)
    if asked is not None:
        wanted = "; ".join(map(str, candidates))
        return f"{where}: found columns {columns}; looked for {wanted}: rename yours, or leave the format out."
    if not profile.rows:
        return f"{where}: it has no rows that can be read, found columns {columns}: check the file."
    if profile.columns[0].lstrip().lower().startswith(("<!doctype", "<html")):  # a csv reader takes a page for a table
        return f"{where}: found columns {columns}, it looks like HTML: download the file again."
    if len(profile.values) == 1 and any(mark in columns for mark in ";\t|"):
        return f"{where}: found columns {columns}, which hold no {kind}. Is the delimiter a comma?"
    example = nearest_reading(profile, given) if kind == "comparisons" else demo.nearest_demonstration(profile)
    columns = list_columns(profile.columns, most=6)  # the nearest reading has those that count
    return f"{where}: found columns {columns}, no known {kind}: did you mean columns={example} (--columns)?"


@dataclass(frozen=True)
class _Options:
    """What changes the result of a conversion, beside the format.

    Attributes:
        group: Whether rows with the same prompt are merged.
        category_column: Column that becomes `category`; None for the one of the format, or `category`.
        ignore: Columns that the user waives.
        reading: Options of the format's function.
    """

    group: bool = False
    category_column: str | None = None
    ignore: tuple[str, ...] = ()
    reading: Mapping[str, Any] = field(default_factory=dict)


def _load(
    source: Source,
    formats: Sequence[Format],
    name: str | None,
    options: _Options,
    *,
    columns: Mapping[str, Any] | None = None,
    streaming: bool = False,
) -> tuple[Dataset | IterableDataset, LoadReport]:
    given = source.rows
    source = replace(source, rows=without_arrow_fill(given))
    profile = _profile_of_source(source, columns, options.ignore)
    reading = resolve(profile.without(options.ignore), formats, source.name, name, columns)
    if options.category_column is not None and options.category_column not in profile.values and columns is None:
        _check_category_column(options.category_column, profile, formats, source.name)
    report = LoadReport(source=source.name, order_known=reading.format.order_known)
    if streaming and reading.format.gathers:
        raise PreferenceDataError(
            f"{source.name}: format {reading.format.name} does not support streaming, since it needs all rows at once: "
            "leave streaming out."
        )
    roles = reading.format.roles
    if roles is not None and roles.prompt is None:
        sides = (roles.chosen, roles.rejected) if roles.rejected is not None else roles.answers
        if len(sides) == 2:
            pairs = [(cell(row, sides[0]), cell(row, sides[1])) for row in profile.rows]
            check_implicit_prompts(pairs, source.name or "dataset")
    conversion = Conversion(source, reading, report, profile, options)
    conversion.account()
    if streaming:
        return IterableDataset.from_generator(_iterate, gen_kwargs={"stream": _Stream(conversion)}), report

    key = _cache_key(source, reading, options)
    if key is None:
        rows = collect(convert_source(conversion), report)
        if options.group:
            rows = group_by_prompt(rows, report)
        return with_origin(as_dataset(rows, source.name), given, source.name), report

    # Large sources are converted once, in batches. Later calls read the rows and the report from the cache.
    def build(file: RowsFile) -> dict[str, Any]:
        counted = replace(conversion, report=copy.deepcopy(report))
        rows = Collected(convert_source(counted), counted.report)
        write_rows((Grouped(rows, counted.report) if options.group else rows), file, source.name)
        return asdict(counted.report)

    prepared = kept(key, build)
    vars(report).update(prepared.notes)
    return with_origin(prepared.rows, given, source.name), report


def _names(columns: str | Sequence[str]) -> tuple[str, ...]:
    """One name, or several."""
    return (columns,) if isinstance(columns, str) else tuple(columns)


def _profile_of_source(source: Source, columns: Mapping[str, Any] | None, ignore: Sequence[str]) -> Profile:
    """Looks at the first rows, and at later ones for columns that the user names but that the first rows lack.

    Raises:
        PreferenceDataError: A column to ignore does not exist, or has a role in `columns` too.
    """
    of_dataset = _columns_of(source.rows)
    profile = profile_of(source.rows, of_dataset)
    paths = _paths_in(columns)
    if not of_dataset:
        # `answers[].text` begins in the column `answers`, unless a column has a dot in its name.
        unseen = [path for path in paths if column_of(path) not in profile.values]
        profile = with_late_columns(profile, source.rows, [*ignore, *unseen, *map(column_of, unseen)])
    where = source.name or "dataset"
    for column in ignore:
        if column not in profile.values:
            found = list_columns(profile.columns)
            raise PreferenceDataError(f"{where}: ignore: {column!r} is no column; found {found}.")
        if column in (*paths, *map(column_of, paths)):
            raise PreferenceDataError(f"{where}: columns and ignore both name {column!r}: take it out of one of them.")
    return profile


def _paths_in(columns: Mapping[str, Any] | None) -> list[str]:
    """The columns that the user gave a role."""
    paths: list[str] = []
    if not isinstance(columns, Mapping):  # `Roles.from_mapping` refuses it
        return paths
    for role, value in columns.items():
        if role in NOT_COLUMNS:
            continue
        if isinstance(value, list | tuple):
            paths += map(str, value)
        elif isinstance(value, str):
            paths.append(value)
    return paths


def _columns_of(rows: Any) -> list[str]:
    """The columns of a dataset, which may have more than its first rows show."""
    return list(getattr(rows, "column_names", None) or ())


def _check_category_column(column: str, profile: Profile, formats: Sequence[Format], name: str) -> None:
    if formats is COMPARISONS:
        found = list_columns(profile.columns)
        raise PreferenceDataError(f"{name or 'dataset'}: category_column: {column!r} is no column; found {found}.")


def _cache_key(source: Source, reading: Reading, options: _Options) -> str | None:
    """Returns the key of a large source in the cache. None for a small source, or one without a fingerprint."""
    if not source.large or not source.fingerprint:
        return None
    # `repr`, as the hash of an object depends on more than its values.
    what = (reading.format.name, repr(reading.format.roles), sorted(reading.read), repr(options))
    return digest("rows", source.name, source.fingerprint, what)


class _Stream:
    """The rows behind a streamed dataset. Nothing copies it, so iterating fills the report that the caller has."""

    def __init__(self, conversion: "Conversion"):
        self.conversion = conversion

    def __iter__(self) -> Iterator[Comparison]:
        # Every pass counts from zero.
        report = self.conversion.report
        report.rows_in = 0
        report.kept = 0
        report.dropped.clear()
        report.flagged.clear()
        for row in keep_one_kind(convert_source(self.conversion), report):
            yield with_defaults(row) if "pairs" in row else row


def _iterate(stream: _Stream) -> Iterator[Comparison]:
    yield from stream


@dataclass
class Conversion:
    """One source, how it is read, and the report on it."""

    source: Source
    reading: Reading
    report: LoadReport
    profile: Profile
    options: _Options = field(default_factory=_Options)

    def __post_init__(self):
        roles = self.reading.format.roles
        of_roles = roles.category if roles is not None else None
        self.category_column = self.options.category_column or of_roles or "category"
        self.ignore = set(self.options.ignore)
        # `with_labels` reads what the chat template gets in every format.
        self.read_columns = {*self.reading.read, *TEMPLATE_COLUMNS, self.category_column} - self.ignore

    def account(self) -> None:
        """Fills `report.unread`. Raises `UnreadColumn` for a column that was not read and looks as if it mattered."""
        self.report.unread = account(
            self.profile,
            self.read_columns,
            self._converted_sample(),
            self.ignore,
            known=self.reading.format.known,
            source=self.source.name,
        )
        self._refuse_guessed_prompts()

    def _refuse_guessed_prompts(self) -> None:
        """Raises `UnreadColumn` if prompts would be the common words of two texts, although a column may have them."""
        roles = self.reading.format.roles
        if roles is None or roles.prompt is not None or roles.answer is not None:
            return
        results = [result for _, result in self._converted_sample() if isinstance(result, dict)]
        if not any("prompt_from_common_words" in result["flags"] for result in results):
            return
        for column, meaning in self.report.unread.items():
            is_free_text = meaning == TEXT and any(" " in str(value).strip() for value in self.profile.values[column])
            if is_free_text and column not in self.ignore:
                raise UnreadColumn(
                    f"{self.source.name or 'dataset'}: no column was read as the prompt, and {column} may be it: name "
                    f'it with columns={{"prompt": "{column}"}} (recipes: --columns), or leave out with '
                    f'ignore=["{column}"] (--ignore).'
                )

    def read(self, row: Row, index: int) -> Comparison | list[Comparison]:
        """Converts a row to rows in the schema, with category and source."""
        row = without_columns(row, self.ignore)
        if self.reading.is_ours:
            return own_row(row, source=self.source.name, index=index)
        result = self.reading.convert(row, **self.options.reading)
        return with_labels(result, row, self.category_column)

    def _converted_sample(self) -> list[tuple[Row, Any]]:
        """The first rows with what they are converted to, so that columns that repeat it are recognized."""
        rows = self.profile.rows
        if self.reading.is_ours:
            return []
        if self.reading.format.gathers:
            sample = []
            for indices, result in self.reading.convert(enumerate(self.profile.without(self.ignore).rows)):
                sample += [(rows[index], result) for index in indices]
            return sample
        return [(row, _read_or_none(self.read, row)) for row in rows]


def _read_or_none(read: Callable[[Row, int], Any], row: Row) -> Any:
    try:
        return read(row, 0)
    except (Unusable, KeyError, RecursionError):  # the row is dropped later, with the reason
        return None


def convert_source(conversion: Conversion) -> Iterator[Converted]:
    """Converts the rows of the source to the schema, in order. Dropped rows go to the report with a reason."""
    source, reading, report = conversion.source, conversion.reading, conversion.report
    watch = ColumnWatch(
        conversion.profile,
        conversion.read_columns,
        conversion.ignore,
        known=reading.format.known,
        source=source.name,
        unread=report.unread,
    )

    def read(row: Row, index: int) -> Comparison | list[Comparison]:
        result = conversion.read(row, index)
        if not reading.is_ours:
            watch.check(row, index, result)
        return result

    total = len(source.rows) if hasattr(source.rows, "__len__") else None
    shown = tqdm(rows_of(source.rows), total=total, desc=source.name or "rows", unit=" rows", disable=not source.large)
    rows = readable_rows(shown, report)
    if reading.format.gathers:
        readings = reading.convert(_watched(rows, watch, conversion.ignore))
    else:
        readings = read_each(rows, read)
    return convert(readings, report, valid=reading.is_ours)


def _watched(rows: Iterable[tuple[int, Row]], watch: ColumnWatch, ignore: Collection[str]) -> Iterator[tuple[int, Row]]:
    for index, row in rows:
        watch.check(row, index)
        yield index, without_columns(row, ignore)
