"""Gets the tasks of a round judged: on the page, by simulated annotators, by both, or by a file put in by hand."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hf_rlhf_ext.collect.outcomes import PairOutcomes, pair_task, same_words
from hf_rlhf_ext.collect.tasks import Task, write_rows
from hf_rlhf_ext.data.schema import PER_PAIR, REQUIRED, Row, has_own_weights, with_defaults
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.readers.formats import load_comparisons
from hf_rlhf_ext.recipes.rounds_parts.data import read_rows
from hf_rlhf_ext.recipes.rounds_parts.options import RoundsArguments

STORE = "judgments.sqlite"
"""File of the store in the folder of the run."""
HAND_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
KEPT_COLUMNS = (*REQUIRED, "weights", "margins", "votes", "flags", "category", "source", "row")
"""Columns of a comparison row that training reads."""


class WaitingForFile(Exception):
    """Raised when the next step is up to a person: to judge a file. The text says which, and where to put it."""


class Judging:
    """Gets tasks judged in the way that the options ask for.

    Args:
        args: options of the rounds.
        gold: gold reward of simulated annotators; None without any.
    """

    def __init__(self, args: RoundsArguments, gold: Any):
        self.args = args
        self.gold = gold

    def check_packages(self) -> None:
        """Imports what the page and the simulated annotators need, so that nothing is sampled without it.

        Raises:
            ModuleNotFoundError: the extra `collect` is not installed; the command names it in one line.
        """
        if self.args.judge != "file":
            for package in ("starlette", "uvicorn", "httpx2"):
                import_module(package)

    def judge(self, tasks: Sequence[Task], batch: str, folder: Path, suffix: str = "") -> list[Row]:
        """The judged tasks as comparison rows, which are also written to `comparisons.jsonl` in the folder.

        It may be called again after a stop: judgments that were made are kept.

        Args:
            tasks: what to judge, all of the same batch.
            batch: name of the batch in the store.
            folder: folder of the round.
            suffix: ending of the names of files, such as "_evaluation".

        Raises:
            WaitingForFile: with `--judge file`, as long as there is no judged file.
        """
        path = folder / f"comparisons{suffix}.jsonl"
        if path.is_file():
            return read_rows(path)
        if not tasks:
            rows = []
        elif self.args.judge == "file":
            rows = self._from_file(tasks, folder, suffix)
        else:
            rows = self._from_store(tasks, batch)
        write_rows(rows, path)
        return rows

    def judged_by(self, rows: Sequence[Row]) -> str:
        """Who judged comparison rows: "file", "page", "simulated", or "mixed" for people and simulated annotators.

        It is told by the votes, as another `--judge` may have made a part of them before the run was stopped.
        """
        if self.args.judge == "file":
            return "file"
        annotators = {vote["annotator"] for row in rows for vote in row["votes"]}
        simulated = annotators & set(self.args.simulated_people)
        if annotators == simulated:
            return "simulated"
        return "mixed" if simulated else "page"

    # ---- A file ----

    def _from_file(self, tasks: Sequence[Task], folder: Path, suffix: str) -> list[Row]:
        judged = hand_judged_file(folder, suffix)
        if judged is None:
            to_judge = folder / f"to_judge{suffix}.jsonl"
            write_rows([blinded(task) for task in tasks], to_judge)
            target = folder / f"judged{suffix}.jsonl"
            raise WaitingForFile(
                f"{len(tasks)} tasks to judge are in {to_judge}: put the judged file at {target} (or .json, .csv, "
                ".parquet, in any format of preference data), and run the same command again"
            )
        rows, report = load_comparisons(judged)
        print(report.summary())
        return match_to_tasks(rows.to_list(), tasks, judged)

    # ---- People and simulated annotators ----

    def _from_store(self, tasks: Sequence[Task], batch: str) -> list[Row]:
        # Imported here: they need the packages of the extra `collect`, which `--judge file` does without.
        from hf_rlhf_ext.collect.export import comparisons
        from hf_rlhf_ext.collect.judging import judge_tasks
        from hf_rlhf_ext.collect.simulated import SimulatedPerson
        from hf_rlhf_ext.collect.store import Store

        args = self.args
        simulated = []
        if args.judge in ("simulated", "mixed"):
            for name in args.simulated_people:
                simulated.append(SimulatedPerson(name=name, gold=self.gold, noise=args.noise, seed=args.seed))
        with Store(args.folder / STORE) as store:
            store.add_tasks(tasks)
            judge_tasks(
                store,
                how=args.judge,
                batch=batch,
                people=simulated,
                names=args.people,
                host=args.host,
                port=args.port,
                url=args.url,
            )
            rows, report = comparisons(store, batch=batch)
        print(report.summary())
        return [only_kept(row) for row in rows]


def only_kept(row: Row) -> Row:
    """The row without columns that training does not read, and without empty ones."""
    return {name: row[name] for name in KEPT_COLUMNS if row.get(name) is not None}


def blinded(task: Task) -> Row:
    """What a person who judges a file sees of a task: not which policy wrote what."""
    row = {"prompt": task.prompt, "completions": task.completions}
    if task.category is not None:
        row["category"] = task.category
    return row


def hand_judged_file(folder: Path, suffix: str) -> Path | None:
    """The judged file that a person put into the folder of a round, or None.

    Raises:
        UserError: there are several.
    """
    found = []
    for ending in HAND_SUFFIXES:
        path = folder / f"judged{suffix}{ending}"
        if path.is_file():
            found.append(path)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder}: {names} are judged files of the same tasks: leave one of them.")
    return found[0] if found else None


def prompt_keys(prompt: Any) -> set[str]:
    """The texts by which a prompt is found: all of it, and its last message, as files of plain text have it."""
    keys = {same_words(prompt)}
    if not isinstance(prompt, str):
        keys.add(same_words(prompt[-1:]))
    return keys


def match_to_tasks(rows: Sequence[Row], tasks: Sequence[Task], source: str | Path) -> list[Row]:
    """The judgments of a file as comparison rows of the tasks, with the tasks' own texts.

    Prompts and completions are compared by their words. A pair that no task has is left out and counted.

    Raises:
        UserError: no pair of the file belongs to a task.
    """
    rows_of_prompt: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        for key in prompt_keys(row["prompt"]):
            rows_of_prompt.setdefault(key, []).append(number)

    matched = []
    used: set[tuple[int, int]] = set()  # row and pair
    for task in tasks:
        numbers = set()
        for key in prompt_keys(task.prompt):
            numbers.update(rows_of_prompt.get(key, []))
        judged = _JudgedTask(task)
        for number in sorted(numbers):
            used.update((number, pair) for pair in judged.add(rows[number]))
        if judged.row["pairs"]:
            matched.append(judged.finished_row())

    n_pairs = sum(len(row["pairs"]) for row in rows)
    if not matched:
        raise UserError(f"{source}: none of its {len(rows)} rows has a prompt and two completions of a task: check it.")
    print(f"{source}: {len(matched)} of {len(tasks)} tasks are judged; {n_pairs - len(used)} other pairs left out")
    return matched


class _JudgedTask:
    """The judgments of a file on one task, as a comparison row with the texts of the task.

    Args:
        task: whose completions are judged.
    """

    def __init__(self, task: Task):
        self.row: Row = {"prompt": task.prompt, "completions": list(task.completions)}
        self.row |= {name: [] for name in ("pairs", "targets", "weights", "margins", "votes", "flags")}
        self.row |= {"category": task.category, "row": task.row}
        self._place = {same_words(completion): k for k, completion in enumerate(task.completions)}
        self._has_own_weights = False

    def add(self, row: Row) -> list[int]:
        """Adds what a row of the file says of this task's completions. Returns the numbers of its pairs that it has."""
        index = [self._place.get(same_words(completion)) for completion in row["completions"]]
        known = with_defaults(row)
        used = []
        for number, (i, j) in enumerate(row["pairs"]):
            if index[i] is None or index[j] is None:
                continue
            used.append(number)
            self.row["pairs"].append([index[i], index[j]])
            for column in PER_PAIR:
                self.row[column].append(known[column][number])
        if not used:
            return []
        for vote in row.get("votes") or []:
            i, j = vote["pair"]
            if index[i] is not None and index[j] is not None:
                self.row["votes"].append(vote | {"pair": [index[i], index[j]]})
        for flag in row.get("flags") or []:
            self._add_flag(flag, index)
        self._has_own_weights |= has_own_weights(row)
        self.row["category"] = row.get("category") or self.row["category"]  # a person may correct it
        return used

    def _add_flag(self, flag: str, index: Sequence[int | None]) -> None:
        """Adds a flag of a row. The number in `harmful:1`, of the completion that it is about, becomes the task's."""
        name, _, number = flag.rpartition(":")
        if name and number.isdecimal() and int(number) < len(index):
            place = index[int(number)]
            if place is None:
                return  # about a completion of no task
            flag = f"{name}:{place}"
        if flag not in self.row["flags"]:
            self.row["flags"].append(flag)

    def finished_row(self) -> Row:
        """The row without what has the default value."""
        row = dict(self.row)
        if not self._has_own_weights:
            row["weights"] = []
        if not any(row["margins"]):
            row["margins"] = []
        return only_kept({name: value for name, value in row.items() if value != []})


# --- the evaluation of a round ----------------------------------------------------------------------------------------


def evaluation_task(new: Row, old: Row, *, names: tuple[str, str], batch: str, wanted: int, seed: int) -> Task:
    """The comparison of two policies' completions of a held-out prompt, in an order drawn by the seed."""
    return pair_task(
        new["prompt"],
        [(names[0], new["completion"]), (names[1], old["completion"])],
        category=new.get("category"),
        batch=batch,
        wanted=wanted,
        key=f"{seed}|{batch}|{names[1]}|{same_words(new['prompt'])}",
    )


class Outcomes(PairOutcomes):
    """Looks up who won a judged pair of completion rows. `rows` are the judged comparison rows."""

    def of(self, new: Row, old: Row) -> float | None:
        """P(`new` is better), the mean over people; None if the pair was not judged."""
        return super().of(new["prompt"], new["completion"], old["completion"])
