"""The user's files: how they are read, which rows are held out, and in which form prompts are."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_rlhf_ext.cli.options import ComparisonArguments, DataArguments, DemonstrationArguments
from hf_rlhf_ext.cli.rows import describe_comparisons
from hf_rlhf_ext.collect.tasks import write_rows
from hf_rlhf_ext.data.conversations import reply
from hf_rlhf_ext.data.json_columns import RowsWithoutFill
from hf_rlhf_ext.data.prompting import as_user_turn
from hf_rlhf_ext.data.templates import TEMPLATE_COLUMNS, template_options
from hf_rlhf_ext.data.text import (
    Unrenderable,
    encode_generation_prompt,
    is_messages,
    is_text,
    plain_text,
    text_key,
)
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.readers.files import kind_of
from hf_rlhf_ext.readers.formats import load_comparisons, load_demonstrations
from hf_rlhf_ext.readers.prompts import load_prompts

Row = dict[str, Any]

MOST_HELD_OUT = 200
"""Number of rows of a file that are held out at most: more cost time and change little."""
TOKENS_OF_TEMPLATE = 1000
"""More tokens than a chat template adds to the text of a prompt."""
FEWEST_ROWS = 8
"""Of a file with fewer rows, none is held out."""


@dataclass
class UserFile:
    """The rows of one of the user's files.

    Attributes:
        role: `demonstrations`, `comparisons` or `prompts`.
        given: the file, folder or Hub id; for prompts that come from another file, that file.
        train: rows to train on; before `split_rows`, all rows.
        heldout: rows that nothing is trained on.
        lines: what was read, and what became of it.
        is_trained_on: False for comparisons that only check a given reward model.
    """

    role: str
    given: str
    train: list[Row]
    heldout: list[Row] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    is_trained_on: bool = True

    @property
    def is_chat(self) -> bool:
        return is_messages(self.train[0]["prompt"])

    def write(self, folder: Path) -> None:
        """Writes `train.jsonl`, and `test.jsonl` if rows are held out, into the folder with the name of the role."""
        # What readers note about demonstrations is no part of them: it would be reported as columns that are not read.
        noted = ("source", "row", "flags") if self.role == "demonstrations" else ()
        for name, rows in (("train", self.train), ("test", self.heldout)):
            path = folder / self.role / f"{name}.jsonl"
            path.unlink(missing_ok=True)
            if rows:
                write_rows(({key: value for key, value in row.items() if key not in noted} for row in rows), path)

    def counts(self) -> dict[str, int]:
        """Numbers of rows for the report."""
        if not self.is_trained_on:
            return {"checked": len(self.train)}
        return {"train": len(self.train), "heldout": len(self.heldout)}


# --- reading ---------------------------------------------------------------------------------------------------------


def read_demonstrations(given: str, data: DataArguments, options: DemonstrationArguments) -> UserFile:
    """Reads demonstrations, one row per answer."""

    def load() -> tuple[Dataset, Any]:
        return load_demonstrations(
            given,
            split=data.dataset_train_split,
            every_turn=options.every_turn,
            category_column=options.category_column,
            **data.reading(),
        )

    rows, report = _read_or_refused("demonstrations", given, load, other=load_comparisons)
    kept = _first_rows(rows, data)
    return UserFile("demonstrations", given, kept, lines=[f"demonstrations: {report.summary()}"])


def read_comparisons(given: str, data: DataArguments, options: ComparisonArguments) -> UserFile:
    """Reads comparisons. Rows with the same prompt are merged into one."""

    def load() -> tuple[Dataset, Any]:
        return load_comparisons(
            given, split=data.dataset_train_split, category_column=options.category_column, **data.reading()
        )

    rows, report = _read_or_refused("comparisons", given, load, other=load_demonstrations)
    kept = _first_rows(rows, data)
    return UserFile("comparisons", given, kept, lines=[f"comparisons: {describe_comparisons(rows, report)}"])


def read_prompts(given: str, data: DataArguments) -> UserFile:
    """Reads prompts with all of their columns, which reward functions may read."""

    def load() -> tuple[Dataset, Any]:
        return load_prompts(
            given,
            data.dataset_train_split,
            data.dataset_revision,
            config=data.dataset_config,
            columns=data.column_roles(),
        )

    rows, report = _read_or_refused("prompts", given, load)
    kept = _first_rows(rows, data)
    for number, row in enumerate(kept):
        if not is_text(row["prompt"]) or not plain_text(row["prompt"]).strip():
            raise UserError(f"prompts: row {number} of {given} is neither text nor messages: add it or drop the row.")
        _check_json(row, number, given)
    return UserFile("prompts", given, kept, lines=[f"prompts: {report.summary()}"])


def _check_json(row: Row, number: int, given: str) -> None:
    """Raises `UserError` for a value that a row of JSON cannot hold, such as a time or an image."""
    for name, value in row.items():
        try:
            json.dumps(value)
        except TypeError:
            kind = type(value).__name__
            raise UserError(
                f"prompts: column {name} of {given} has values that JSON cannot hold ({kind} in row {number}): save "
                "them as text, or drop the column."
            ) from None


def prompts_of(source: UserFile) -> UserFile:
    """The distinct prompts of comparisons or demonstrations, for PPO."""
    distinct: dict[str, Row] = {}
    for row in source.train:
        kept = {name: row[name] for name in ("prompt", *TEMPLATE_COLUMNS) if row.get(name) is not None}
        distinct.setdefault(text_key(row["prompt"]), kept)
    line = f"prompts: the {len(distinct)} distinct prompts of the {source.role}, as none are given"
    return UserFile("prompts", source.given, list(distinct.values()), lines=[line])


def _read_or_refused(
    role: str, given: str, load: Callable[[], tuple[Dataset, Any]], other: Callable | None = None
) -> tuple[Dataset, Any]:
    """Reads a file. The line of a refusal begins with the option, and says if the file has the other kind of rows."""
    try:
        rows, report = load()
    except UserError as error:
        reason = str(error).removeprefix("dataset: ")
        if other is not None and _reads(other, given):
            options = {"demonstrations": "comparisons", "comparisons": "demonstrations"}
            reason = f"{given} has {options[role]}: give it with that option"
        raise UserError(f"{role}: {reason}") from error
    if not len(rows):
        raise UserError(f"{role}: {given} has no rows: give another file.")
    return rows, report


def _reads(load: Callable, given: str) -> bool:
    try:
        load(given)
    except Exception:  # whatever is wrong with it, it is not such a file
        return False
    return True


def _first_rows(rows: Dataset, data: DataArguments) -> list[Row]:
    """The rows as they are written to JSON; with `train_rows`, the first ones."""
    n = len(rows) if data.train_rows is None else min(data.train_rows, len(rows))
    return list(RowsWithoutFill(rows.select(range(n))))


# --- form ------------------------------------------------------------------------------------------------------------


def in_one_form(files: Sequence[UserFile], *, asks_in_chat: Callable[[], bool]) -> None:
    """Turns text into messages, in place, where other rows of the run are messages, with a line that says so.

    A policy that is trained on conversations is asked in conversations: text would reach it without its template.
    Questions and answers without white space between them are no text to be continued: the model decides about them.

    Args:
        files: what was read.
        asks_in_chat: whether the policy is asked in messages, where the rows do not decide; only called then.
    """
    others = [file for file in files if file.role != "prompts"]
    in_chat = [Path(file.given).name for file in others if file.is_chat]
    are_questions = bool(others) and not in_chat and all(map(_joins_without_space, others))
    for file in files:
        is_open = are_questions or (not others and kind_of(Path(file.given)) == "text")
        by_model = is_open and asks_in_chat()
        if file.is_chat or not (in_chat or by_model):
            continue
        file.train = [_as_messages(row) for row in file.train]
        what = "each prompt is asked as a user's message"
        if file.role != "prompts":
            what = "each prompt is asked as a user's message and each answer is the assistant's"
        reason = "as the policy is asked in conversations" if by_model else f"like the prompts in {in_chat[0]}"
        file.lines.append(f"  {what}, {reason}")


def _joins_without_space(file: UserFile) -> bool:
    """Whether no row has white space between prompt and answer, so that text would run on as `about rain.Rain is`."""
    for row in file.train:
        answers = row["completions"] if "completions" in row else [row.get("completion")]
        if not row["prompt"] or not all(isinstance(answer, str) for answer in answers):
            return False
        if row["prompt"][-1].isspace() or any(answer[:1].isspace() for answer in answers):
            return False
    return True


def _as_messages(row: Row) -> Row:
    """The row with messages in place of text."""
    changed = dict(row)
    changed["prompt"] = as_user_turn(row["prompt"])
    if isinstance(row.get("completion"), str):
        changed["completion"] = reply(row["completion"].strip())
    if "completions" in row:
        changed["completions"] = [reply(text.strip()) if isinstance(text, str) else text for text in row["completions"]]
    return changed


# --- long prompts ----------------------------------------------------------------------------------------------------


def drop_long_prompts(file: UserFile, tokenizer: PreTrainedTokenizerBase, most_tokens: int, limit: str) -> None:
    """Drops rows whose prompt has more than `most_tokens` tokens, in place, with a line that counts them.

    PPO would refuse such a prompt, and SFT would cut the whole answer off.

    Args:
        file: demonstrations or prompts.
        tokenizer: tokenizer of the policy.
        most_tokens: number of tokens.
        limit: what the number follows from, for messages.

    Raises:
        UserError: no row is left.
    """
    kept = [row for row in file.train if _fits(row, tokenizer, most_tokens)]
    n_dropped = len(file.train) - len(kept)
    why = f"the prompt has more than {most_tokens} tokens ({limit})"
    if not kept:
        raise UserError(f"{file.role}: every row of {file.given} is too long, as {why}: shorten them, or change that.")
    if n_dropped:
        file.lines.append(f"  rows dropped: {n_dropped}, as {why}")
    file.train = kept


def _fits(row: Row, tokenizer: PreTrainedTokenizerBase, most_tokens: int) -> bool:
    options = template_options(row)
    # A token has at least one byte, so most prompts need not be tokenized.
    if not options and len(plain_text(row["prompt"]).encode(errors="replace")) + TOKENS_OF_TEMPLATE <= most_tokens:
        return True
    try:
        return len(encode_generation_prompt(tokenizer, row["prompt"], options)) <= most_tokens
    except Unrenderable:  # dropped by PPO, which says why
        return True


# --- held-out rows ---------------------------------------------------------------------------------------------------


def split_rows(files: Sequence[UserFile], share: float, seed: int) -> None:
    """Holds out rows of each file by prompt, in place: a held-out prompt is in no row that is trained on, of any file.

    Prompts are drawn in an order that depends on the prompt and the seed only, so files with the same prompts hold out
    the same ones.

    Raises:
        UserError: no row of a file is left.
    """
    keys = {file.role: [prompt_key(row["prompt"]) for row in file.train] for file in files}
    heldout: set[str] = set()
    for file in files:
        heldout |= drawn_prompts(keys[file.role], share, seed)
    for file in files:
        rows = list(zip(keys[file.role], file.train, strict=True))
        file.heldout = [row for key, row in rows if key in heldout]
        file.train = [row for key, row in rows if key not in heldout]
        if not file.train:
            raise UserError(
                f"heldout_share: no row of {file.given} is left to train on, as its prompts are held out from the "
                "other files: lower heldout_share, or give 0."
            )
        file.lines.append(_line_of_split(file, share))


def _line_of_split(file: UserFile, share: float) -> str:
    rows = "prompts" if file.role == "prompts" else "rows"
    line = f"  {len(file.train)} {rows} to train on, {len(file.heldout)} held out"
    if file.heldout:
        return f"{line} (none of their prompts is trained on)"
    if share == 0:
        return f"{line}, as heldout_share is 0: nothing is measured on new prompts"
    if len(file.train) < FEWEST_ROWS:
        return f"{line}, as there are fewer than {FEWEST_ROWS}: nothing is measured on new prompts"
    return f"{line}, as the rows have too few different prompts: nothing is measured on new prompts"


def drawn_prompts(keys: Sequence[str], share: float, seed: int) -> set[str]:
    """Prompts of about a share of the rows of a file, at least one.

    Args:
        keys: the key of the prompt of each row.
        share: share of the rows, from 0 to 0.5.
        seed: seed of the order in which prompts are drawn.

    Returns:
        Keys; empty for a share of 0, for fewer than `FEWEST_ROWS` rows, and if each prompt has over half of the rows.
    """
    if share == 0 or len(keys) < FEWEST_ROWS:
        return set()
    wanted = min(MOST_HELD_OUT, math.ceil(len(keys) * share))
    rows_of = Counter(keys)
    order = sorted(rows_of, key=lambda key: hashlib.sha256(f"{seed}|{key}".encode()).digest())
    drawn: set[str] = set()
    n_rows = 0
    for key in order:
        if n_rows + rows_of[key] <= wanted:
            drawn.add(key)
            n_rows += rows_of[key]
    if not drawn:  # every prompt has more rows than that
        fewest = min(order, key=rows_of.__getitem__)
        if rows_of[fewest] <= len(keys) / 2:
            drawn.add(fewest)
    return drawn


def prompt_key(prompt: Any) -> str:
    """The words by which prompts are the same: of a conversation, those of its first user.

    Answers to several turns of one conversation stay on one side, and a system text or white space makes no difference.
    """
    if is_messages(prompt):
        asked = [message for message in prompt if message["role"] == "user"] or prompt
        prompt = plain_text(asked[:1])
    return " ".join(prompt.split())


def all_counts(files: Sequence[UserFile]) -> Mapping[str, Any]:
    """What the data stage measured: the rows of each file, and the lines that it printed."""
    return {file.role: {**file.counts(), "read": file.lines} for file in files}
