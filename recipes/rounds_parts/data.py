"""The data of the rounds: which prompts a round judges, which of them are held out, and the weight of a judgment."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_rlhf_ext.collect.outcomes import same_words
from hf_rlhf_ext.data.schema import with_defaults
from hf_rlhf_ext.data.text import is_text, plain_text, text_key
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.readers.formats import load_rows
from hf_rlhf_ext.readers.prompts import blank_lines_of

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Reads the rows that `write_rows` wrote."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_prompts(source: str, option: str) -> list[Row]:
    """Distinct prompts of a source, with their category. Prints how many rows repeat a prompt.

    Raises:
        UserError: the source cannot be read, or has no column `prompt`, or a prompt that is neither text nor messages.
    """
    try:
        rows = load_rows(source)
    except UserError as error:
        raise UserError(f"{option}: {str(error).removeprefix('dataset: ')}") from error
    if "prompt" not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise UserError(f"{option}: {source} has no column prompt, but {columns}: rename the column of the prompts.")
    n_blank = len(blank_lines_of(source))
    if n_blank:
        print(f"{source}: {n_blank} blank lines skipped")
    distinct: dict[str, Row] = {}
    for number, row in enumerate(rows):
        prompt = row["prompt"]
        if not is_text(prompt) or not plain_text(prompt).strip():
            raise UserError(f"{option}: row {number} of {source} has no prompt of text or messages: add or drop it.")
        kept = {"prompt": prompt, "category": row.get("category"), "row": number}
        distinct.setdefault(text_key(prompt), kept)
    n_repeats = len(rows) - len(distinct)
    if n_repeats:
        print(f"{source}: {n_repeats} of {len(rows)} rows left out: they repeat a prompt")
    return list(distinct.values())


def split_prompts(rows: Sequence[Row], heldout: Sequence[Row] | None, n_eval: int, seed: int) -> tuple[list, list]:
    """The prompts to sample and to train on, in shuffled order, and the held-out prompts of the evaluation.

    Args:
        rows: distinct prompts.
        heldout: distinct prompts to evaluate on. If None, `n_eval` of `rows` are held out.
        n_eval: number of held-out prompts.
        seed: seed of the order.

    Raises:
        UserError: there are too few prompts.
    """
    shuffled = list(rows)
    random.Random(f"{seed}|rounds|prompts").shuffle(shuffled)
    if heldout is None:
        if len(shuffled) < n_eval + 1:
            raise UserError(
                f"prompts: {len(shuffled)} prompts, of which eval_prompts={n_eval} are held out: add some, or lower "
                "--eval_prompts."
            )
        return shuffled[n_eval:], shuffled[:n_eval]
    if len(heldout) < n_eval:
        raise UserError(f"heldout_prompts: {len(heldout)} prompts for eval_prompts={n_eval}: lower --eval_prompts.")
    heldout = list(heldout[:n_eval])
    # A prompt that is judged and trained on must not be in the evaluation, also if one file has text and the other
    # messages.
    evaluated = {same_words(row["prompt"]) for row in heldout}
    train = [row for row in shuffled if same_words(row["prompt"]) not in evaluated]
    if not train:
        raise UserError("prompts: every prompt is in heldout_prompts too: give other prompts.")
    if len(train) < len(shuffled):
        print(f"{len(shuffled) - len(train)} of {len(shuffled)} prompts left out: they are in --heldout_prompts too")
    return train, heldout


def prompts_of_round(rows: Sequence[Row], number: int, n: int) -> list[Row]:
    """The `n` prompts that round `number` (from 1) judges: the next ones, and from the start when all were judged.

    With fewer than `n` prompts, every round judges all of them.
    """
    n = min(n, len(rows))
    start = (number - 1) * n
    return [rows[(start + offset) % len(rows)] for offset in range(n)]


def repeated_prompts(n_prompts: int, n_rounds: int, n_per_round: int) -> str | None:
    """A line that says which rounds judge prompts again, or None if no round does.

    Args:
        n_prompts: number of prompts to train on.
        n_rounds: number of rounds.
        n_per_round: number of prompts that a round should judge.
    """
    if n_per_round > n_prompts:
        return f"every round judges the same {n_prompts} prompts: there are fewer than prompts_per_round={n_per_round}"
    if n_rounds * n_per_round > n_prompts:
        first = n_prompts // n_per_round + 1
        return f"{n_prompts} prompts to train on: from round {first} on, prompts of earlier rounds are judged again"
    return None


def is_heldout(prompt: Any, share: float, seed: int) -> bool:
    """Whether the judgments of a prompt are held out from the reward model.

    It depends on the prompt and the seed only, so that a prompt is on the same side in every round.
    """
    digest = hashlib.sha256(f"{seed}|{text_key(prompt)}".encode()).digest()
    uniform = int.from_bytes(digest[:8], "big") / 2**64  # in [0, 1)
    return uniform < share


def weigh_by_round(row: Row, age: int, round_weight: float) -> Row:
    """The comparison row with the weights of its judgments multiplied by `round_weight ** age`.

    Args:
        row: comparison row.
        age: number of rounds since it was judged, 0 for the current round.
        round_weight: factor per round. 1 leaves the row as it is.
    """
    factor = round_weight**age
    if factor == 1:
        return row
    weights = [weight * factor for weight in with_defaults(row)["weights"]]
    return row | {"weights": weights}


def judged_so_far(
    judged: Sequence[Sequence[Row]], *, round_weight: float, heldout_share: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """The comparisons that the reward model trains on, and the held-out ones, of all rounds so far.

    Args:
        judged: comparison rows of each round, from round 1 to the current one.
        round_weight: see `weigh_by_round`. Held-out rows are not weighted.
        heldout_share: see `is_heldout`.
        seed: seed of the split.
    """
    train = []
    heldout = []
    for age, rows in zip(range(len(judged) - 1, -1, -1), judged, strict=True):
        for row in rows:
            if is_heldout(row["prompt"], heldout_share, seed):
                heldout.append(row)
            else:
                train.append(weigh_by_round(row, age, round_weight))
    return train, heldout


def count_labels(rows: Sequence[Row]) -> int:
    """Number of judged pairs of completions."""
    return sum(len(row["pairs"]) for row in rows)


def decided_pairs(rows: Sequence[Row]) -> list[Row]:
    """Pairs for DPO, `prompt`, `chosen` and `rejected`, of all judgments that are not ties."""
    pairs = []
    for row in rows:
        for (i, j), target in zip(row["pairs"], row["targets"], strict=True):
            if target == 0.5:
                continue
            chosen, rejected = (i, j) if target > 0.5 else (j, i)
            completions = row["completions"]
            pairs.append({"prompt": row["prompt"], "chosen": completions[chosen], "rejected": completions[rejected]})
    return pairs
