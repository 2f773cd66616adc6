"""Comparison rows as token ids, and what happens to those that are too long."""

from collections.abc import Collection
from typing import Any, Literal, get_args

from datasets import Dataset

from ..errors import UserError
from .schema import LoadReport
from .text import check_tokenizer, encode_completion, encode_prompt

Overflow = Literal["error", "drop", "truncate_prompt_left", "truncate_completion"]
OVERFLOWS: tuple[str, ...] = get_args(Overflow)

CATEGORY_CODE = "category_code"
TOKENISED_COLUMNS = ("prompt_ids", "completion_ids", "pairs", "targets", "weights", "margins")


def tokenise_row(row: dict[str, Any], tokenizer) -> dict[str, list]:
    """Adds `prompt_ids` (tokens of the prompt) and `completion_ids` (K lists, the stop token last in each)."""
    return {
        "prompt_ids": encode_prompt(tokenizer, row["prompt"]),
        "completion_ids": [encode_completion(tokenizer, row["prompt"], text) for text in row["completions"]],
    }


def longest(row: dict[str, Any]) -> int:
    """Tokens of the prompt with its longest completion."""
    return len(row["prompt_ids"]) + max(map(len, row["completion_ids"]))


def fit_row(
    row: dict[str, Any], *, max_length: int, overflow: Overflow, where: str, start_ids: Collection[int] = ()
) -> dict[str, Any] | None:
    """Brings a tokenised row under `max_length` tokens as `overflow` says; None means that it is to be dropped.

    `truncate_prompt_left` keeps the prompt's last tokens (all completions still see the same prompt), and its first one
    if that is among `start_ids`: BOS, or the CLS token where encoders are read;
    `truncate_completion` keeps a completion's first tokens and its stop token, where scores are read.

    Raises:
        UserError: overflow is "error", or truncation leaves nothing of the prompt or a completion.
    """
    excess = longest(row) - max_length
    if excess <= 0:
        return row
    if overflow == "drop":
        return None
    prompt, kept = row["prompt_ids"], int(row["prompt_ids"][:1] != [] and row["prompt_ids"][0] in start_ids)
    if overflow == "truncate_prompt_left" and excess < len(prompt) - kept:
        return row | {"prompt_ids": prompt[:kept] + prompt[kept + excess :]}
    room = max_length - len(row["prompt_ids"])
    if overflow == "truncate_completion" and room >= 2:
        completions = [ids if len(ids) <= room else ids[: room - 1] + ids[-1:] for ids in row["completion_ids"]]
        distinct = len({tuple(ids) for ids in completions}) == len(completions)
        return row | {"completion_ids": completions} if distinct else None  # equal now: nothing left to compare
    tried = "" if overflow == "error" else f", and overflow={overflow!r} would leave nothing of the text"
    raise UserError(
        f"{where}: {longest(row)} tokens, {excess} over max_length={max_length}{tried}. Raise max_length, or pass "
        "overflow='drop' (or 'truncate_prompt_left', 'truncate_completion'): such rows are then counted."
    )


def start_ids(tokenizer) -> set[int]:
    """Tokens that open a text: a cut prompt keeps them."""
    return {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}


def tokenise_comparisons(
    dataset: Dataset,
    tokenizer,
    *,
    max_length: int | None,
    overflow: Overflow,
    report: LoadReport,
    num_proc: int | None = None,
) -> Dataset:
    """Comparison rows as `TOKENISED_COLUMNS`, each at most `max_length` tokens; `report` counts the cut and dropped."""
    name, numbers = report.source or "data set", list(dataset["row"])
    check_tokenizer(tokenizer, needs_chat_template=not isinstance(dataset[0]["prompt"], str))
    dataset = dataset.map(
        tokenise_row, fn_kwargs={"tokenizer": tokenizer}, num_proc=num_proc, desc=f"Tokenizing {name} dataset"
    )
    dataset = dataset.select_columns([*TOKENISED_COLUMNS, *({CATEGORY_CODE} & set(dataset.column_names))])
    over = [k for k, row in enumerate(dataset) if max_length is not None and longest(row) > max_length]
    if not over:
        return dataset
    options = {"max_length": max_length, "overflow": overflow, "start_ids": start_ids(tokenizer)}
    fitted = {k: fit_row(dataset[k], where=f"{name} row {numbers[k]}", **options) for k in over}
    for k, row in fitted.items():
        if row is None:
            report.drop(f"over max_length={max_length}", numbers[k])
            report.kept -= 1
        else:
            report.flagged.setdefault(overflow, []).append(numbers[k])
    dataset = dataset.map(lambda row, k: fitted.get(k) or {}, with_indices=True)
    kept = [k for k in range(len(dataset)) if fitted.get(k, True) is not None]
    if not kept:
        raise UserError(f"{report.summary()}: no row is left: raise max_length.")
    return dataset.select(kept)
