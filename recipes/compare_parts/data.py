"""The data of `hf-rlhf compare`: the same rows for all systems, a budget of labels, and held-out prompts."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_rlhf_ext.cli.options import ComparisonArguments, DataArguments, DemonstrationArguments
from hf_rlhf_ext.collect.tasks import write_rows
from hf_rlhf_ext.data.text import text_key
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.readers.demonstrations import RATING_COLUMNS
from hf_rlhf_ext.readers.formats import load_rows
from hf_rlhf_ext.recipes.compare_parts.options import CompareArguments
from hf_rlhf_ext.recipes.compare_parts.systems import OF_SELECTION, RATED, SystemOptions
from hf_rlhf_ext.recipes.pipeline_parts.data import (
    UserFile,
    in_one_form,
    prompt_key,
    prompts_of,
    read_comparisons,
    read_demonstrations,
    read_prompts,
)
from hf_rlhf_ext.recipes.rounds_parts.data import Row, count_labels, is_heldout, read_rows
from hf_rlhf_ext.study.leaks import find_leaks
from hf_rlhf_ext.study.styles import select

RATING = "rating"
"""Column with the ratings in the demonstrations of a run."""
MOST_HELDOUT_TEXTS = 200
"""Plain texts on which the perplexity is measured at most: more cost time and change little."""
NOTED = ("source", "row", "flags")
"""What readers note about demonstrations, which is no part of them."""


@dataclass
class CompareData:
    """The rows of a run, the same for all seeds.

    Attributes:
        demonstrations: demonstrations to train on; with `rating` if there is a column of ratings.
        own: demonstrations of single systems, by the file that was given.
        comparisons: comparisons to train on, before the budget of labels cuts them.
        heldout_comparisons: comparisons on which the reward model is measured.
        prompts: prompts to train on.
        heldout: prompts on which the systems are compared.
        leaks: what was found of held-out prompts in the training data.
        texts: plain texts for the language-model loss of PPO-ptx.
        heldout_texts: plain texts for the perplexity.
        lines: what was read, for the terminal.
    """

    demonstrations: list[Row]
    own: dict[str, list[Row]]
    comparisons: list[Row]
    heldout_comparisons: list[Row]
    prompts: list[Row]
    heldout: list[Row]
    leaks: dict[str, Any]
    texts: list[str] = field(default_factory=list)
    heldout_texts: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> dict[str, Any]:
        """Writes the rows that all systems share into the folder of a seed's data. Returns their numbers."""
        write_rows(without_notes(self.demonstrations), folder / "demonstrations.jsonl")
        write_rows(self.comparisons, folder / "comparisons" / "all.jsonl")
        write_rows(self.heldout_comparisons, folder / "comparisons" / "test.jsonl")
        write_rows(self.prompts, folder / "prompts" / "train.jsonl")
        write_rows(self.heldout, folder / "prompts" / "heldout.jsonl")
        write_rows([{"text": text} for text in self.texts], folder / "plain_text" / "train.jsonl")
        write_rows([{"text": text} for text in self.heldout_texts], folder / "plain_text" / "heldout.jsonl")
        return {
            "demonstrations": len(self.demonstrations),
            "judgments": count_labels(self.comparisons),
            "heldout_judgments": count_labels(self.heldout_comparisons),
            "prompts": len(self.prompts),
            "heldout_prompts": len(self.heldout),
            "leaks": self.leaks,
        }

    def own_rows(self, given: str) -> list[Row]:
        """The demonstrations of single systems in a file."""
        return without_notes(self.own[given])

    def digest_of_own(self, given: str) -> str:
        """A digest of `own_rows`, on which only their systems depend, so that others are kept when one is added."""
        text = json.dumps(self.own_rows(given), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- Reading ----


def read_data(args: CompareArguments, has_chat_template: Callable[[], bool]) -> CompareData:
    """Reads all files, brings them into one form, and holds out prompts and comparisons.

    Args:
        args: the options.
        has_chat_template: whether the model is asked in conversations, where the rows do not say it.

    Raises:
        UserError: a file cannot be read, has no ratings that are needed, or no row is left.
    """
    with naming_option("demonstrations"):
        demonstrations = demonstrations_of(args.demonstrations, args, "demonstrations")
    own = {}
    for spec in args.specs.values():
        given = spec.options.demonstrations
        if given is not None and given not in own:
            with naming_option(f"systems: {spec.name}: demonstrations", "demonstrations"):
                own[given] = demonstrations_of(given, args, f"systems: {spec.name}: demonstrations")
    comparisons = given_prompts = heldout = None
    if args.comparisons is not None:
        with naming_option("comparisons"):
            comparisons = read_comparisons(args.comparisons, no_options(args.comparisons), ComparisonArguments())
    if args.prompts is not None:
        with naming_option("prompts"):
            given_prompts = read_prompts(args.prompts, no_options(args.prompts))
    if args.heldout_prompts is not None:
        with naming_option("heldout_prompts", "prompts"):
            heldout = read_prompts(args.heldout_prompts, no_options(args.heldout_prompts))
        heldout.lines = [f"heldout_{line}" for line in heldout.lines]
    files = [file for file in (demonstrations, *own.values(), comparisons, given_prompts, heldout) if file is not None]
    in_one_form(files, asks_in_chat=has_chat_template)
    prompts = given_prompts or prompts_of(comparisons or demonstrations)
    if given_prompts is None:
        files.append(prompts)

    train_prompts, heldout_prompts = split(prompts.train, heldout and heldout.train, demonstrations, comparisons, args)
    if heldout is None:
        hold_out(files, heldout_prompts)
    train_rows = comparisons.train if comparisons is not None else []
    pairs, heldout_pairs = split_comparisons(train_rows, args)
    data = CompareData(
        demonstrations=demonstrations.train,
        own={given: file.train for given, file in own.items()},
        comparisons=pairs,
        heldout_comparisons=heldout_pairs,
        prompts=train_prompts,
        heldout=heldout_prompts,
        leaks={},
        lines=[line for file in files for line in file.lines],
    )
    leave_out_leaks(data)
    if args.plain_text is not None:
        data.texts, data.heldout_texts = plain_texts(args.plain_text, args.data_seed)
    return data


@contextmanager
def naming_option(option: str, role: str | None = None) -> Iterator[None]:
    """Lets messages of readers name the option, and a remedy that this command has.

    Args:
        option: the option, such as `heldout_prompts`.
        role: what readers call the file, if that differs from the option.
    """
    try:
        yield
    except UserError as error:
        line = str(error)
        if line.startswith("ratings_column"):
            raise
        for prefix in ("dataset: ", f"{role or option}: "):
            line = line.removeprefix(prefix)
        if "--columns" in line or "--ignore" in line:
            line += " Here: rename or remove the column in the file, as hf-rlhf compare has no such option."
        raise UserError(f"{option}: {line}") from error


def plain_texts(given: str, seed: int) -> tuple[list[str], list[str]]:
    """Plain texts to train on, and held-out ones for the perplexity.

    Raises:
        UserError: there is no column `text`, or fewer than two texts.
    """
    with naming_option("plain_text"):
        rows = load_rows(given)
    if "text" not in rows.column_names:
        raise UserError(f"plain_text: {given} has no column text, but {', '.join(rows.column_names)}: rename one.")
    column = rows["text"]
    for number, text in enumerate(column):
        if text is not None and not isinstance(text, str):
            raise UserError(f"plain_text: row {number} of {given} has {text!r} in column text: give texts.")
    texts = [text for text in dict.fromkeys(column) if text and text.strip()]
    if len(texts) < 2:
        raise UserError(f"plain_text: {given} has {len(texts)} texts: give one to train on and one to measure on.")
    random.Random(f"{seed}|compare|texts").shuffle(texts)
    n_heldout = min(MOST_HELDOUT_TEXTS, max(1, len(texts) // 5))
    return texts[n_heldout:], texts[:n_heldout]


def no_options(given: str) -> DataArguments:
    return DataArguments(dataset_name=given)


def demonstrations_of(given: str, args: CompareArguments, where: str) -> UserFile:
    """Reads demonstrations, with their ratings in the column `rating` if a column of ratings is named.

    Raises:
        UserError: the column is not there, or has no number.
    """
    column = args.ratings_column
    uses_ratings = any(
        spec.options.uses_ratings(args) and (spec.options.demonstrations or args.demonstrations) == given
        for spec in args.specs.values()
    )
    rows = load_rows_or_none(given) if column is not None else None
    has_column = rows is not None and column in rows.column_names
    if rows is not None and uses_ratings and not has_column:
        raise UserError(
            f"ratings_column: {given} has no column {column} ({where}), but {', '.join(rows.column_names)}: name the "
            "column of the ratings."
        )
    # The readers refuse to pass over a column that looks like ratings.
    ignore = column if has_column and column not in RATING_COLUMNS else None
    file = read_demonstrations(given, DataArguments(dataset_name=given, ignore=ignore), DemonstrationArguments())
    if not has_column:
        return file
    ratings = rows[column]
    for row in file.train:
        row[RATING] = number_or_none(ratings[row["row"]])
    if uses_ratings and all(row[RATING] is None for row in file.train):
        raise UserError(f"ratings_column: column {column} of {given} has no number: name the column of the ratings.")
    return file


def load_rows_or_none(given: str) -> Dataset | None:
    """The rows of a file; None if it cannot be read, as its reader says why."""
    try:
        return load_rows(given)
    except UserError:
        return None


def number_or_none(value: Any) -> float | None:
    """A rating as a number; None for text without one and for a missing one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number else None  # NaN is how pandas writes a missing rating


def without_notes(rows: Sequence[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name not in NOTED} for row in rows]


# ---- Splitting ----


def split(
    prompts: Sequence[Row],
    heldout: Sequence[Row] | None,
    demonstrations: UserFile,
    comparisons: UserFile | None,
    args: CompareArguments,
) -> tuple[list[Row], list[Row]]:
    """The prompts to train on and the held-out ones, each prompt once.

    Prompts that no demonstration and no comparison has are held out first, so that few rows are lost to training.

    Raises:
        UserError: there are too few prompts.
    """
    distinct = list({prompt_key(row["prompt"]): row for row in prompts}.values())
    random.Random(f"{args.data_seed}|compare|prompts").shuffle(distinct)
    if heldout is not None:
        chosen = list({prompt_key(row["prompt"]): row for row in heldout}.values())[: args.eval_prompts]
        evaluated = {prompt_key(row["prompt"]) for row in chosen}
        train = [row for row in distinct if prompt_key(row["prompt"]) not in evaluated]
        if not train:
            raise UserError("prompts: every prompt is in heldout_prompts too: give other prompts.")
        return train, chosen
    if len(distinct) <= args.eval_prompts:
        raise UserError(
            f"eval_prompts: {args.eval_prompts} of {len(distinct)} prompts cannot be held out: give more prompts, or "
            "lower eval_prompts."
        )
    files = [demonstrations] + ([comparisons] if comparisons is not None else [])
    trained = {prompt_key(row["prompt"]) for file in files for row in file.train}
    distinct.sort(key=lambda row: prompt_key(row["prompt"]) in trained)  # stable: new ones first, in random order
    return distinct[args.eval_prompts :], distinct[: args.eval_prompts]


def hold_out(files: Sequence[UserFile], heldout: Sequence[Row]) -> None:
    """Removes the rows with held-out prompts from demonstrations and comparisons, in place, and counts them.

    Raises:
        UserError: no row of a file is left.
    """
    keys = {prompt_key(row["prompt"]) for row in heldout}
    for file in files:
        if file.role == "prompts":
            continue
        kept = [row for row in file.train if prompt_key(row["prompt"]) not in keys]
        if not kept:
            raise UserError(
                f"eval_prompts: every prompt of {file.given} is held out: lower eval_prompts, or give heldout_prompts."
            )
        if len(kept) < len(file.train):
            file.lines.append(f"  {len(file.train) - len(kept)} rows left out: their prompts are held out")
        file.train = kept


def split_comparisons(rows: Sequence[Row], args: CompareArguments) -> tuple[list[Row], list[Row]]:
    """Comparisons to train on, and those on which the reward model is measured, by prompt."""
    train, heldout = [], []
    for row in rows:
        side = heldout if is_heldout(row["prompt"], args.heldout_share, args.data_seed) else train
        side.append(row)
    if rows and not train:
        raise UserError("heldout_share: no comparison is left to train on: lower heldout_share.")
    random.Random(f"{args.data_seed}|compare|pairs").shuffle(train)
    return train, heldout


def leave_out_leaks(data: CompareData) -> None:
    """Takes held-out prompts that are in the training data out, in place, and counts them.

    Raises:
        UserError: no held-out prompt is left.
    """
    sources = [data.prompts, data.demonstrations, data.comparisons, *data.own.values()]
    trained = {text_key(row["prompt"]): row["prompt"] for rows in sources for row in rows}
    found = find_leaks(list(trained.values()), [row["prompt"] for row in data.heldout])
    kept = [data.heldout[number] for number in found.keep()]
    n_leaked = len(data.heldout) - len(kept)
    if not kept:
        raise UserError(
            f"heldout_prompts: all {n_leaked} of them are in the training data, word for word or nearly: give others."
        )
    described = found.as_dict()
    data.leaks = {"train": len(trained), "heldout_left_out": n_leaked, **described}
    data.heldout = kept
    if n_leaked:
        prompts, are = ("prompt", "it is") if n_leaked == 1 else ("prompts", "they are")
        data.lines.append(f"{n_leaked} held-out {prompts} left out: {are} in the training data, or nearly")


# ---- What a system is trained on ----


@dataclass(frozen=True)
class Chosen:
    """The rows that a system is trained on, the labels that it needed, and the rule in a sentence."""

    rows: list[Row]
    labels: dict[str, int]
    rule: str | None = None


def within_budget(rows: Sequence[Row], labels: int | None, seed: int) -> list[Row]:
    """Comparisons with at most `labels` judged pairs, in an order by the seed. The last row may lose some pairs."""
    if labels is None:
        return list(rows)
    shuffled = list(rows)
    random.Random(f"{seed}|compare|labels").shuffle(shuffled)
    kept = []
    left = labels
    for row in shuffled:
        if left == 0:
            break
        n = min(left, len(row["pairs"]))
        kept.append(row if n == len(row["pairs"]) else with_pairs(row, n))
        left -= n
    return kept


def with_pairs(row: Row, n: int) -> Row:
    """A comparison row with its first `n` judged pairs."""
    n_pairs = len(row["pairs"])
    cut = dict(row)
    for name, value in row.items():
        # `pairs` and what there is for each of them, such as `targets` and `weights`.
        of_pairs = name in ("pairs", "targets", "weights", "votes", "annotators", "margins")
        if of_pairs and isinstance(value, list) and len(value) == n_pairs:
            cut[name] = value[:n]
    return cut


def top_rated(rows: Sequence[Row], min_rating: float | None, labels: int | None, seed: int, source: str) -> Chosen:
    """Demonstrations with the highest ratings, of at most `labels` rated ones.

    All rated ones count as labels, as people had to write them too before the best could be chosen.

    Raises:
        UserError: none is rated that high.
    """
    rated = [row for row in rows if row.get(RATING) is not None]
    random.Random(f"{seed}|compare|ratings").shuffle(rated)
    if labels is not None:
        rated = rated[:labels]
    chosen = select("feedme", rated, seed=seed, min_rating=min_rating, rating_column=RATING, source=source)
    return Chosen(chosen.rows, {"demonstrations": len(rated), "ratings": len(rated)}, chosen.rule)


def in_style(rows: Sequence[Row], options: SystemOptions, seed: int, source: str) -> Chosen:
    """Demonstrations that a style chooses, see `study.styles`.

    A style that chooses by ratings or ranks counts all rows that it chose from, as `top_rated` does.

    Raises:
        UserError: the rows lack what the style needs.
    """
    given = {name: getattr(options, name) for name in OF_SELECTION if getattr(options, name) is not None}
    chosen = select(options.style, rows, seed=seed, rating_column=RATING, source=source, **given)
    labels = {"demonstrations": len(chosen.rows)}
    if options.style in RATED:
        n_rated = sum(row.get(RATING) is not None for row in rows)
        labels = {"demonstrations": n_rated, "ratings": n_rated} if n_rated else {"demonstrations": len(rows)}
    return Chosen(chosen.rows, labels, chosen.rule)


def preferred(rows: Sequence[Row], source: str) -> Chosen:
    """Completions that were preferred to all that they were compared with, as demonstrations.

    Raises:
        UserError: no comparison is decided.
    """
    chosen = []
    for row in rows:
        beaten, winners = set(), []
        for (i, j), target in zip(row["pairs"], row["targets"], strict=True):
            if target == 0.5:
                beaten |= {i, j}  # a tie is not preferred
                continue
            better, worse = (i, j) if target > 0.5 else (j, i)
            beaten.add(worse)
            winners.append(better)
        for winner in dict.fromkeys(winners):
            if winner not in beaten:
                chosen.append({"prompt": row["prompt"], "completion": row["completions"][winner]})
    if not chosen:
        raise UserError(f"comparisons: {source} has no preferred completion, only ties: judge more pairs.")
    labels = {"demonstrations": 0, "judgments": count_labels(rows)}
    rule = f"{len(chosen)} completions of {source} that were preferred to all that they were compared with"
    return Chosen(chosen, labels, rule)


def rows_of_seed(folder: Path, name: str) -> list[Row]:
    """Rows that `CompareData.write` wrote into the folder of a seed's data."""
    path = folder / name
    return read_rows(path) if path.is_file() else []
