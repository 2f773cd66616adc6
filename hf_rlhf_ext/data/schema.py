"""The comparison row: one prompt, K completions, any number of judgements; and the report of what became of a source.

Columns: `prompt` (str or messages), `completions` (K ≥ 2 distinct str or messages), `pairs` ([i, j]: completion i
against completion j), `targets` (P(i ≻ j): 1.0 a win, 0.5 a tie), `weights` (1 / number of pairs of the prompt by
default: InstructGPT, arXiv:2203.02155, sec. 3.5, where a prompt counts once); optional `margins` (i minus j, in units
of reward), `votes`, `flags`, `category`, `source`, `row`.
"""

import math
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any

from datasets import Dataset, Features, List, Value

from ..errors import UserError
from .text import is_messages, is_text, text_key

Comparison = dict[str, Any]

REQUIRED = ("prompt", "completions", "pairs", "targets")
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
}


class PreferenceDataError(UserError):
    """Preference data that cannot be used: the message names source, row, column and the mend."""


class Unusable(Exception):
    """A source row that holds nothing usable; its text is the reason that the report counts it under."""


@dataclass
class LoadReport:
    """What became of every row of a source: `dropped` maps a reason to row numbers.

    Rows are numbered from 0 as they were asked for: row 0 of `split="train[100:200]"` is row 100 of the whole split.
    `order_known` says that the first completion of a pair is the one that was shown first, as the format keeps it.
    """

    source: str = ""
    rows_in: int = 0
    kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    flagged: dict[str, list[int]] = field(default_factory=dict)
    order_known: bool = False

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
    for column in ("pairs", "targets", "weights", "margins", "votes", "flags"):
        if not isinstance(row.get(column), list | None):
            refuse(column, f"is a {type(row[column]).__name__}", "give a list")
    if not pairs:
        refuse("pairs", "is empty", "give at least one [i, j]")
    for column in ("targets", "weights", "margins"):
        values = row.get(column)
        if values is not None and len(values) != len(pairs):
            refuse(column, f"has {len(values)} entries for {len(pairs)} pairs", "give one a pair")
    for pair in pairs:
        if not _is_pair(pair, n_completions):
            refuse("pairs", f"holds {short(pair)}", f"give two indices between 0 and {n_completions - 1}")
        if pair[0] == pair[1]:
            refuse("pairs", f"holds {short(pair)}", "a completion cannot be compared with itself")
    for value in row["targets"]:
        if not is_number(value) or not 0 <= value <= 1:
            refuse("targets", f"holds {short(value)}", "P(i ≻ j) lies between 0 and 1")
    for value in row.get("weights") or ():
        if not is_number(value) or value < 0:
            refuse("weights", f"holds {short(value)}", "weights are finite and not negative")
    for value in row.get("margins") or ():
        if not is_number(value):
            refuse("margins", f"holds {short(value)}", "margins are finite numbers, i minus j")
    for value in row.get("votes") or ():
        if not _is_vote(value, n_completions):
            refuse("votes", f"holds {short(value)}", "give annotator (text), pair ([i, j]) and label (0 to 1)")
    if not all(isinstance(flag, str) for flag in row.get("flags") or ()):
        refuse("flags", f"holds {short(row['flags'])}", "flags are text")
    for column, kind in (("category", str), ("source", str), ("row", int)):
        if not isinstance(row.get(column), kind | None) or (kind is int and not is_number(row.get(column) or 0)):
            refuse(column, f"is {short(row[column])}", f"give a {kind.__name__}, or leave it out")


def _is_pair(value: Any, n_completions: int) -> bool:
    whole = isinstance(value, list | tuple) and all(isinstance(k, int) and not isinstance(k, bool) for k in value)
    return whole and len(value) == 2 and all(0 <= k < n_completions for k in value)


def _is_vote(value: Any, n_completions: int) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("annotator"), str | None)
        and _is_pair(value.get("pair"), n_completions)
        and is_number(value.get("label"))
        and 0 <= value["label"] <= 1
        and (value.get("confidence") is None or is_number(value["confidence"]))
    )


def settle(row: Comparison) -> Comparison:
    """A converted row with what every source may hold put right, or `Unusable`.

    Completions that are not text are left out with their pairs, completions that differ in white space only are merged,
    and both are flagged, as empty ones and empty prompts are. `votes` keep pointing at their completions; an empty
    optional column is left out.
    """
    flags, kept = set(row.get("flags") or ()) | ({"empty_prompt"} if is_empty(row["prompt"]) else set()), []
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
    if not all(map(is_number, settled.get("margins") or ())):
        raise Unusable("scores are too far apart for a finite margin")
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


def group_by_prompt(rows: list[Comparison], report: LoadReport | None = None) -> list[Comparison]:
    """One row a prompt: completions without repeats, all judgements, those of different rows side by side.

    Prompts and completions are the same where they differ in white space only. A row that says no more than an earlier
    one (same prompt, sides, order, targets and votes) is a copy, not a second judgement, unless votes name another
    annotator: it is left out, and flagged `duplicated_row` in the merged row and in `report`. Opposite rows both stay.
    Weights that a source gave are kept; otherwise each pair of a prompt weighs 1 / number of its pairs. Order, `row`
    and `category` are those of the first.
    """
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for row in rows:
        groups.setdefault((text_key(row["prompt"]), str(row.get("category"))), []).append(row)
    report = report or LoadReport()
    merged = [_merged(group, report) if len(group) > 1 else group[0] for group in groups.values()]
    report.flagged.get("duplicated_row", []).sort()  # found prompt by prompt
    return merged


def _merged(group: list[Comparison], report: LoadReport) -> Comparison:
    place: dict[str, int] = {}
    completions: list[Any] = []
    merged: Comparison = {name: [] for name in ("pairs", "targets", "margins", "weights", "votes")}
    seen: set[tuple] = set()
    flags: set[str] = set()
    for row in group:
        row = with_defaults(row if has_own_weights(row) else row | {"weights": None})
        home = []
        for completion in row["completions"]:
            home.append(place.setdefault(text_key(completion), len(completions)))
            if home[-1] == len(completions):
                completions.append(completion)
        said = {name: row[name] for name in ("targets", "margins", "weights")}
        said["pairs"] = [[home[i], home[j]] for i, j in row["pairs"]]
        said["votes"] = [vote | {"pair": [home[k] for k in vote["pair"]]} for vote in row.get("votes") or ()]
        flags.update(row.get("flags") or ())
        key = tuple(tuple(map(_hashable, said[name])) for name in merged)
        if key in seen:
            flags.add("duplicated_row")
            report.flag("duplicated_row", row.get("row", -1))
            continue
        seen.add(key)
        for name in merged:
            merged[name] += said[name]
    if not any(map(has_own_weights, group)):
        del merged["weights"]
    shared = {name: value for name, value in group[0].items() if name != "weights"}
    return shared | merged | {"completions": completions, "flags": sorted(flags), "votes": merged["votes"] or None}


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):  # in saved rows a column that some lack is None in theirs
        value = sorted(entry for entry in value.items() if entry[1] is not None)
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def has_own_weights(row: Comparison) -> bool:
    """Whether the weights are the source's: those of `with_defaults`, as in saved rows, are made anew by a merge."""
    n = len(row["pairs"])
    return any(not math.isclose(weight, 1 / n) for weight in row.get("weights") or ())


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
    free = {name: columns[name] for name in names if name not in _FIXED_FEATURES}
    try:
        # Messages with tool calls and the like differ in their keys: as JSON they stay as they are.
        inferred = Dataset.from_dict(free, on_mixed_types="use_json").features
        return Dataset.from_dict(columns, features=Features({n: _FIXED_FEATURES.get(n) or inferred[n] for n in names}))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise PreferenceDataError(f"{source or 'data set'}: columns {', '.join(names)}: {reason}.") from error


def with_defaults(row: Comparison) -> Comparison:
    """Weights of 1 / number of pairs and margins of 0 where the row has none."""
    n = len(row["pairs"])
    return row | {"weights": row.get("weights") or [1 / n] * n, "margins": row.get("margins") or [0.0] * n}


def is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of floats
        return False


def is_empty(text: Any) -> bool:
    """True for text or messages without a word or a tool call."""
    if isinstance(text, str):
        return not text.strip()
    return not any(str(m.get("content") or "").strip() or m.get("tool_calls") for m in text)
