"""The comparison row: one prompt, K completions, any number of judgements; and the report of what became of a source.

Columns: `prompt` (str or messages), `completions` (K ≥ 2 distinct str or messages), `pairs` ([i, j]: completion i
against completion j), `targets` (P(i ≻ j): 1.0 a win, 0.5 a tie), `weights` (1 / number of pairs of the prompt by
default: InstructGPT, arXiv:2203.02155, sec. 3.5, where a prompt counts once); optional `margins` (i minus j, in units
of reward), `votes`, `flags`, `category`, `source`, `row`.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, Features, List, Value

from ..errors import UserError
from .text import is_messages, is_text, text_key

Comparison = dict[str, Any]

REQUIRED = ("prompt", "completions", "pairs", "targets")
_VOTE = {"annotator": Value("string"), "pair": List(Value("int64")), "label": Value("float64")}
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
}


class PreferenceDataError(UserError):
    """Preference data that cannot be used: the message names source, row, column and the mend."""


class Unusable(Exception):
    """A source row that holds nothing usable; its text is the reason that the report counts it under."""


@dataclass
class LoadReport:
    """What became of every row of a source: `dropped` maps a reason to row numbers in the source."""

    source: str = ""
    rows_in: int = 0
    kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    flagged: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, reason: str, row: int) -> None:
        self.dropped.setdefault(reason, []).append(row)

    def flag(self, name: str, row: int) -> None:
        self.flagged.setdefault(name, []).append(row)

    def summary(self) -> str:
        """One line: counts, and the first rows of each reason."""
        line = f"{self.source or 'data set'}: {self.kept} of {self.rows_in} rows kept"
        for verb, reasons in (("dropped", self.dropped), ("flagged", self.flagged)):
            for reason, rows in reasons.items():
                shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
                line += f"; {len(rows)} {verb}: {reason} (row {shown})"
        return line


def validate_comparison(row: dict[str, Any], *, source: str = "", index: int | None = None) -> None:
    """Raises `PreferenceDataError`, in one line, unless `row` is a comparison row (see the module's docstring)."""
    where = (source or "comparisons") + (f" row {index}" if index is not None else "")

    def refuse(column: str, problem: str, mend: str):
        raise PreferenceDataError(f"{where}: `{column}` {problem}: {mend}.")

    for column in REQUIRED:
        if row.get(column) is None:
            refuse(column, "is missing", f"a comparison row needs {', '.join(REQUIRED)}")
    _check_texts(row["prompt"], row["completions"], refuse)
    _check_judgements(row, len(row["completions"]), refuse)


def _check_texts(prompt: Any, completions: Any, refuse) -> None:
    if not isinstance(prompt, str) and not is_messages(prompt):
        refuse("prompt", f"is a {type(prompt).__name__}", "give a string or a list of messages with role and content")
    if not isinstance(completions, list) or len(completions) < 2:
        refuse("completions", "has fewer than two entries", "a comparison needs at least two completions")
    for k, completion in enumerate(completions):
        if isinstance(prompt, str) != isinstance(completion, str) or not is_text(completion):
            kind = "string" if isinstance(prompt, str) else "list of messages"
            refuse("completions", f"entry {k} is a {type(completion).__name__}", f"the prompt is a {kind}: give that")
        if completion in completions[:k]:
            first = completions.index(completion)
            refuse("completions", f"entries {first} and {k} are equal", "merge them, or drop the row")


def _check_judgements(row: dict[str, Any], n_completions: int, refuse) -> None:
    pairs = row["pairs"]
    if not pairs:
        refuse("pairs", "is empty", "give at least one [i, j]")
    for column in ("targets", "weights", "margins"):
        values = row.get(column)
        if values is not None and len(values) != len(pairs):
            refuse(column, f"has {len(values)} entries for {len(pairs)} pairs", "give one a pair")
    for pair in pairs:
        integers = len(pair) == 2 and all(isinstance(k, int) and not isinstance(k, bool) for k in pair)
        if not integers or not all(0 <= k < n_completions for k in pair):
            refuse("pairs", f"holds {list(pair)}", f"give two indices between 0 and {n_completions - 1}")
        if pair[0] == pair[1]:
            refuse("pairs", f"holds {list(pair)}", "a completion cannot be compared with itself")
    for value in row["targets"]:
        if not is_number(value) or not 0 <= value <= 1:
            refuse("targets", f"holds {value!r}", "P(i ≻ j) lies between 0 and 1")
    for value in row.get("weights") or ():
        if not is_number(value) or value < 0:
            refuse("weights", f"holds {value!r}", "weights are finite and not negative")
    for value in row.get("margins") or ():
        if not is_number(value):
            refuse("margins", f"holds {value!r}", "margins are finite numbers, i minus j")


def settle(row: Comparison) -> Comparison:
    """A converted row with what every source may hold put right, or `Unusable`.

    Completions that are not text are left out with their pairs, completions that differ in white space only are merged,
    and both are flagged, as empty ones are. `votes` keep pointing at their completions; an empty optional column is
    left out.
    """
    flags, kept = set(row.get("flags") or ()), []
    home: dict[int, int] = {}
    place: dict[str, int] = {}
    for k, completion in enumerate(row["completions"]):
        if not is_text(completion) or isinstance(completion, str) != isinstance(row["prompt"], str):
            flags.add("completion_not_text")
            continue
        key = text_key(completion)
        if key in place:
            flags.add("equal_completions_merged")
        else:
            place[key] = len(kept)
            kept.append(completion)
        home[k] = place[key]
    pairs = [(home.get(i), home.get(j)) for i, j in row["pairs"]]
    usable = [n for n, (i, j) in enumerate(pairs) if i is not None and j is not None and i != j]
    if not usable:
        raise Unusable("completions are equal" if len(kept) < len(home) else "fewer than two completions are text")
    settled = row | {"completions": kept, "pairs": [list(pairs[n]) for n in usable]}
    for column in ("targets", "weights", "margins"):
        if row.get(column):
            settled[column] = [row[column][n] for n in usable]
    votes = [vote | {"pair": [home.get(k) for k in vote["pair"]]} for vote in row.get("votes") or ()]
    votes = [vote for vote in votes if None not in vote["pair"] and vote["pair"][0] != vote["pair"][1]]
    settled["votes"] = votes or None
    if any(is_empty(completion) for completion in kept):
        flags.add("empty_completion")
    return settled | {"flags": sorted(flags)}


def own_row(row: Comparison, *, source: str = "", index: int | None = None) -> Comparison:
    """A comparison row as it is, after `validate_comparison`; empty completions are flagged."""
    validate_comparison(row, source=source, index=index)
    flags = set(row.get("flags") or ()) | ({"empty_completion"} if any(map(is_empty, row["completions"])) else set())
    return {name: value for name, value in row.items() if value is not None} | {"flags": sorted(flags)}


def group_by_prompt(rows: list[Comparison]) -> list[Comparison]:
    """One row a prompt: completions without repeats, all judgements, those of different rows side by side.

    Prompts and completions are the same where they differ in white space only. Weights that a source gave are kept;
    otherwise each pair of a prompt weighs 1 / number of its pairs. Order, `row` and `category` are those of the first.
    """
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for row in rows:
        groups.setdefault((text_key(row["prompt"]), str(row.get("category"))), []).append(row)
    return [_merged(group) if len(group) > 1 else group[0] for group in groups.values()]


def _merged(group: list[Comparison]) -> Comparison:
    completions: dict[str, Any] = {}
    merged: Comparison = group[0] | {name: [] for name in ("pairs", "targets", "flags", "votes", "margins", "weights")}
    for row in group:
        for completion in row["completions"]:
            completions.setdefault(text_key(completion), completion)
        place = {key: k for k, key in enumerate(completions)}
        home = [place[text_key(completion)] for completion in row["completions"]]
        merged["pairs"] += [[home[i], home[j]] for i, j in row["pairs"]]
        merged["targets"] += row["targets"]
        merged["flags"] = sorted({*merged["flags"], *row["flags"]})
        merged["votes"] += [vote | {"pair": [home[k] for k in vote["pair"]]} for vote in row.get("votes") or ()]
        for column, default in (("margins", 0.0), ("weights", None)):
            merged[column] += row.get(column) or [default] * len(row["pairs"])
    merged["completions"] = list(completions.values())
    if None in merged["weights"]:
        del merged["weights"]
    return merged | {"votes": merged["votes"] or None}


def as_dataset(rows: list[Comparison], source: str = "") -> Dataset:
    """Rows as a data set whose column types do not depend on which rows happen to be first or empty.

    Weights default to 1 / number of pairs, margins to 0.

    Raises:
        PreferenceDataError: some rows are text, others messages.
    """
    if len({isinstance(row["prompt"], str) for row in rows}) > 1:
        first = isinstance(rows[0]["prompt"], str)
        other = next(k for k, row in enumerate(rows) if isinstance(row["prompt"], str) != first)
        kinds = ("text", "messages") if first else ("messages", "text")
        raise PreferenceDataError(
            f"{source or 'data set'}: row {rows[0]['row']} is {kinds[0]}, row {rows[other]['row']} is {kinds[1]}: "
            "give all rows one kind, or load them as two data sets."
        )
    rows = [with_defaults(row) if "pairs" in row else row for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    columns = {name: [row.get(name) for row in rows] for name in names}
    inferred = Dataset.from_dict({name: columns[name] for name in names if name not in _FIXED_FEATURES}).features
    return Dataset.from_dict(columns, features=Features({n: _FIXED_FEATURES.get(n) or inferred[n] for n in names}))


def with_defaults(row: Comparison) -> Comparison:
    """Weights of 1 / number of pairs and margins of 0 where the row has none."""
    n = len(row["pairs"])
    return row | {"weights": row.get("weights") or [1 / n] * n, "margins": row.get("margins") or [0.0] * n}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_empty(completion: Any) -> bool:
    text = completion if isinstance(completion, str) else "".join(str(m.get("content") or "") for m in completion)
    return not text.strip()
