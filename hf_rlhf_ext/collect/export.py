"""Exports a store to comparison rows and demonstrations, and imports comparison rows that were judged elsewhere."""

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from ..data.schema import Comparison, LoadReport, Row, validate_comparison
from ..data.text import text_key
from ..errors import UserError
from ..readers.formats import load_comparisons
from .records import Judgment
from .store import Store
from .tasks import Task, Text, write_rows
from .votes import by_task, category_of, comparison_row, flags_by_completion, flags_of, preference_of

logger = logging.getLogger(__name__)

IMPORTED = "imported"
"""Annotator of imported judgments that name nobody."""
_IMPORTED_COLUMNS = (
    "prompt",
    "completions",
    "pairs",
    "targets",
    "weights",
    "margins",
    "votes",
    "flags",
    "made_by",
    "category",
    "source",
    "row",
)
"""Columns that `import_judged` keeps, or says itself what it does not keep of them."""


def comparisons(
    store: Store,
    *,
    batch: str | None = None,
    annotators: Collection[str] | None = None,
    include_gold: bool = False,
) -> tuple[list[Comparison], LoadReport]:
    """Returns the judgments of a store as comparison rows, one per task, with the vote of each person.

    `targets` are the means of the votes. The column `made_by`, if there is one, says how each completion was made.

    Args:
        store: The store.
        batch: Only tasks of this batch.
        annotators: Only judgments of these people.
        include_gold: Whether to export the judgments of gold questions too.

    Returns:
        The rows, and a report on all tasks of the store (or batch) by their ids. It flags the tasks with judgments
            that say more than the rows hold.

    Raises:
        UserError: An annotator or the batch is unknown.
    """
    _check_batch(store, batch)
    judged = by_task(_chosen(store.judgments(batch), store, annotators))
    tasks = store.tasks(batch)
    report = LoadReport(source=store.path.name, rows_in=len(tasks))
    rows = []
    for task in tasks:
        judgments = judged.get(task.id, [])
        row = comparison_row(task, judgments)
        reason = _why_not(task, judgments, row, include_gold=include_gold)
        if reason == _NOT_JUDGED and annotators is not None:
            reason = "not judged by these people"
        if reason is None:
            rows.append(row)
            report.kept += 1
        else:
            report.drop(reason, task.id)
        _flag_what_stays(report, task, judgments, is_kept=reason is None)
    return rows, report


def _check_batch(store: Store, batch: str | None) -> None:
    known = store.batches()
    if batch is not None and batch not in known:
        names = ", ".join(known) or "no batches"
        raise UserError(f"batch: {batch!r} is unknown in {store.path}: it has {names}.")


def _flag_what_stays(report: LoadReport, task: Task, judgments: list[Judgment], *, is_kept: bool) -> None:
    """Flags what the judgments of a task say, and its comparison row does not."""
    named = set()
    for judgment in judgments:
        named.update(judgment.answer)
    if "skip" in named and is_kept:
        report.flag("skipped by some", task.id)
    if "comment" in named:
        report.flag("comments, which stay in the store", task.id)
    if named & {"edited", "ratings"}:
        report.flag("edits or ratings, which are exported as demonstrations", task.id)
    if flags_of(judgments) and not is_kept:
        report.flag("flags of tasks without a row, which stay in the store", task.id)


def _chosen(judgments: list[Judgment], store: Store, annotators: Collection[str] | None) -> Iterable[Judgment]:
    if annotators is None:
        return judgments
    known = {annotator.name for annotator in store.annotators()}
    for name in annotators:
        if name not in known:
            raise UserError(f"annotators: {name!r} is unknown in {store.path}: give names of its annotators.")
    return [judgment for judgment in judgments if judgment.annotator in annotators]


_NOT_JUDGED = "not judged yet"


def _why_not(task: Task, judgments: list[Judgment], row: Row | None, *, include_gold: bool) -> str | None:
    """Returns the reason why a task is no comparison row, or None if it is one."""
    if task.gold is not None and not include_gold:
        return "gold question"
    if row is not None:
        return None
    if not judgments:
        return _NOT_JUDGED
    if all(judgment.is_skip for judgment in judgments):
        return "skipped"
    return "rated, not compared"


def write_comparisons(store: Store, path: str | Path, **options: Any) -> LoadReport:
    """Writes the comparison rows of a store, one JSON object a line, for `load_comparisons`.

    Args:
        store: The store.
        path: The file. It is complete or absent.
        options: Those of `comparisons`.

    Returns:
        The report of `comparisons`.

    Raises:
        UserError: No task has a judgment that compares completions, or the file is the store.
    """
    store.refuse_own_file(path)
    rows, report = comparisons(store, **options)
    if not rows:
        raise UserError(f"{store.path}: there is nothing to export ({report.summary()}): judge some tasks first.")
    write_rows(rows, path)
    return report


def write_demonstrations(store: Store, path: str | Path, **options: Any) -> int:
    """Writes the demonstrations of a store, one JSON object a line, for `load_demonstrations`. Returns their number.

    Raises:
        UserError: Nobody has edited or rated an answer, or the file is the store.
    """
    store.refuse_own_file(path)
    rows = demonstrations(store, **options)
    if not rows:
        raise UserError(f"{store.path}: no answer was edited or rated: there are no demonstrations to export.")
    write_rows(rows, path)
    return len(rows)


# --- demonstrations --------------------------------------------------------------------------------------------------


def demonstrations(store: Store, *, batch: str | None = None, annotators: Collection[str] | None = None) -> list[Row]:
    """Returns answers that people wrote or edited, and answers that they rated, for `load_demonstrations`.

    An edited answer has no `rating`, so that `--min_rating` keeps it. A rated one has the mean of its ratings, 1 to 7.
    `annotators` names the people, separated by commas. Edits that changed nothing are left out, with a warning.
    Answers to gold questions are included.

    Raises:
        UserError: An annotator or the batch is unknown.
    """
    _check_batch(store, batch)
    judged = by_task(_chosen(store.judgments(batch), store, annotators))
    rows = []
    n_unchanged = 0
    for task in store.tasks(batch):
        judgments = judged.get(task.id, [])
        category = category_of(task, judgments)
        for judgment in judgments:
            if "edited" not in judgment.answer:
                continue
            completion = _edited(task, judgment)
            if completion is None:
                n_unchanged += 1
            else:
                rows.append(_demonstration(task, completion, category, [judgment]))
        rows += _rated(task, category, judgments)
    if n_unchanged:
        logger.warning("%s: edits that changed nothing are left out: %d", store.path.name, n_unchanged)
    return rows


def _edited(task: Task, judgment: Judgment) -> Text | None:
    """Returns the edited answer, or None if it is the completion from which the person started."""
    edited = judgment.answer["edited"]
    completion: Text = edited["text"]
    if not isinstance(task.prompt, str):
        completion = [{"role": "assistant", "content": edited["text"]}]
    start = edited["completion"]
    if start is not None and text_key(task.completions[start]) == text_key(completion):
        return None
    return completion


def _rated(task: Task, category: str | None, judgments: list[Judgment]) -> list[Row]:
    rows = []
    for k, completion in enumerate(task.completions):
        ratings = []
        rated_by = []
        for judgment in judgments:
            rating = None
            if "ratings" in judgment.answer:
                rating = judgment.answer["ratings"][k]
            if rating is not None:
                ratings.append(rating)
                rated_by.append(judgment)
        if ratings:
            row = _demonstration(task, completion, category, rated_by)
            row["rating"] = fmean(ratings)
            rows.append(row)
    return rows


def _demonstration(task: Task, completion: Text, category: str | None, judgments: list[Judgment]) -> Row:
    row: Row = {"prompt": task.prompt, "completion": completion}
    if category is not None:
        row["category"] = category
    if task.source is not None:
        row["source"] = task.source
    row["annotators"] = ", ".join(judgment.annotator for judgment in judgments)
    return row


# --- import ----------------------------------------------------------------------------------------------------------


def import_judged(
    store: Store, source: str | Path | Iterable[Mapping[str, Any]], *, batch: str | None = None
) -> LoadReport:
    """Adds comparison rows that were judged elsewhere, with every vote.

    The votes of one person on a row become a judgment of an annotator of this name, who is added without a link. Pairs
    without votes become a judgment of the annotator `imported`, with the targets as labels.

    Args:
        store: The store.
        source: Rows, or a file in any format of `load_comparisons`.
        batch: Batch of the tasks that are added.

    Returns:
        A report on the rows: dropped are those whose people have all judged the task already, and flagged are those
            that lose judgments for this reason, and those with columns or values that a store does not keep.

    Raises:
        UserError: A row is no comparison row.
    """
    if isinstance(source, str | Path):
        dataset, loaded = load_comparisons(source)
        name, rows = loaded.source, dataset.to_list()
    else:
        name, rows = "rows", [dict(row) for row in source]
    for index, row in enumerate(rows):
        validate_comparison(row, source=name, index=index)
    report = LoadReport(source=name, rows_in=len(rows))
    judged = []
    for index, row in enumerate(rows):
        try:
            judged.append(_judged_task(row, batch, report, index))
        except UserError as error:  # completions that differ only in white space
            raise UserError(f"{name} row {index}: {error}.") from None
    for index, n_added in enumerate(store.add_judged(judged)):
        _, answers = judged[index]
        if not n_added:
            report.drop("already judged by the same people", index)
            continue
        report.kept += 1
        if n_added < len(answers):
            report.flag("some judgments are of people who have judged it already, whose first one counts", index)
    return report


def _judged_task(row: Comparison, batch: str | None, report: LoadReport, index: int) -> tuple[Task, dict[str, Row]]:
    """Returns the task of a comparison row, and annotator -> answer by completion."""
    votes: dict[str, list[Row]] = {}
    voted = set()
    for vote in row.get("votes") or ():
        name = vote.get("annotator") or IMPORTED
        stored = {"pair": list(vote["pair"]), "label": vote["label"], "confidence": vote.get("confidence")}
        votes.setdefault(name, []).append(stored)
        voted.add(frozenset(vote["pair"]))
    for pair, target in zip(row["pairs"], row["targets"], strict=True):
        if frozenset(pair) not in voted:
            votes.setdefault(IMPORTED, []).append({"pair": list(pair), "label": target, "confidence": None})
    n_completions = len(row["completions"])
    answers = {name: _answer_of(of_person, n_completions) for name, of_person in votes.items()}

    flags = flags_by_completion(row.get("flags") or (), n_completions)
    if any(flags):
        next(iter(answers.values()))["flags"] = flags  # who gave them is not known
    made_by = row.get("made_by") or []
    task = Task(
        prompt=row["prompt"],
        completions=row["completions"],
        made_by=made_by,
        category=row.get("category"),
        source=row.get("source"),
        row=row.get("row"),
        wanted=len(answers),
        batch=batch,
    )
    _flag_what_is_lost(row, report, index)
    return task, answers


def _answer_of(votes: list[Row], n_completions: int) -> Row:
    """Returns the answer with these votes: a preference if they are one, else the votes themselves."""
    if n_completions == 2 and len(votes) == 1 and votes[0]["pair"] == [0, 1]:
        preference = preference_of(votes[0]["label"], votes[0]["confidence"])
        if preference is not None:
            return {"preference": preference}
    return {"votes": votes}


def _flag_what_is_lost(row: Comparison, report: LoadReport, index: int) -> None:
    for name, value in row.items():
        if name not in _IMPORTED_COLUMNS and value is not None:
            report.flag(f"column {name}, which the store does not keep", index)
    n_kept_flags = sum(map(len, flags_by_completion(row.get("flags") or (), len(row["completions"]))))
    if n_kept_flags < len(set(row.get("flags") or ())):
        report.flag("flags of other kinds, which the store does not keep", index)
    n_pairs = len(row["pairs"])
    for weight in row.get("weights") or ():
        if abs(weight - 1 / n_pairs) > 1e-9:
            report.flag("weights, which the store does not keep", index)
            break
    if any(row.get("margins") or ()):
        report.flag("margins, which the store does not keep", index)
    labels: dict[frozenset[int], list[float]] = {}
    for vote in row.get("votes") or ():
        first = min(vote["pair"])
        label = vote["label"] if vote["pair"][0] == first else 1 - vote["label"]
        labels.setdefault(frozenset(vote["pair"]), []).append(label)
    for (i, j), target in zip(row["pairs"], row["targets"], strict=True):
        of_pair = labels.get(frozenset((i, j)))
        wanted = target if i < j else 1 - target
        if of_pair and abs(fmean(of_pair) - wanted) > 1e-6:
            report.flag("targets that are not the means of the votes, which the store uses", index)
            break
