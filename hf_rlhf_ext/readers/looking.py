"""Says how a source would be read: for a file of which it is not known what it holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from ..data.schema import LoadReport
from .formats import ROLES, _profile_of_source, load_comparisons, load_demonstrations, resolve
from .profile import Profile
from .registry import COMPARISONS, DEMONSTRATIONS
from .roles import Kind
from .sources import AnySource, open_source

SPLIT = "train"
"""The split that is looked at. A file, or a dataset without splits, has this one."""


@dataclass(frozen=True)
class Look:
    """A source as it is read.

    Attributes:
        kind: What its rows become.
        rows: The rows.
        report: What became of the rows of the source.
        format: Name of the format; None if the columns are read by their names, or by the user's roles.
        columns: Role -> column, for `columns={…}`; empty for a format that is not described by roles.
    """

    kind: Kind
    rows: Dataset
    report: LoadReport
    format: str | None
    columns: dict[str, Any]


def look(
    source: AnySource, kind: Kind, *, columns: Mapping[str, Any] | None = None, ignore: Sequence[str] = ()
) -> Look:
    """Reads a source as comparisons or demonstrations, and tells how.

    Raises:
        UnknownFormat: Its columns have no such rows.
        PreferenceDataError: It cannot be read, or no row is usable.
    """
    profile = profile_of_source(source, columns, ignore).without(ignore)
    formats = COMPARISONS if kind == "comparisons" else DEMONSTRATIONS
    reading = resolve(profile, formats, str(source), None, columns)
    load = load_comparisons if kind == "comparisons" else load_demonstrations
    options: dict[str, Any] = {} if kind == "comparisons" else {"every_turn": True}
    rows, report = load(source, split=SPLIT, columns=columns, ignore=ignore, **options)
    roles = reading.format.roles
    return Look(
        kind,
        rows,
        report,
        format=None if reading.format.name == ROLES else reading.format.name,
        columns={} if roles is None else roles.as_mapping(),
    )


def profile_of_source(
    source: AnySource, columns: Mapping[str, Any] | None = None, ignore: Sequence[str] = ()
) -> Profile:
    """The columns of a source and the values of its first rows."""
    return _profile_of_source(open_source(source, SPLIT), columns, ignore)
