"""The prompts of PPO: checks and tokenizes them once, and selects the prompts of each rollout."""

import copy
import logging
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ..data.batch_encoding import BATCH, encode_prompt_batches
from ..data.cache import RowsFile, dataset_digest, digest, in_batches, kept, tokenizer_digest
from ..data.json_columns import RowsWithoutFill
from ..data.media import refuse_media_columns
from ..data.prompt_form import MESSAGES, TEXT, PromptForm
from ..data.schema import LoadReport
from ..data.storage import arrow_table, list_array
from ..data.templates import TEMPLATE_COLUMNS
from ..data.text import check_tokenizer, is_messages, refused_row
from ..errors import UserError
from ..modeling.vocabulary import check_token_ids
from ..training.bars import Advance, no_bars, progress_bar
from .config import PPOConfig
from .generation_options import SAMPLING_OPTIONS
from .stretch import Sizes, Stretch

logger = logging.getLogger(__name__)

_FEATURES = Features({"row": Value("int64"), "prompt_ids": List(Value("int64"))})


class Prompts:
    """The rows of a dataset with the token ids of their prompts.

    Rows that the chat template cannot render are refused, or with `unrenderable="drop"` dropped with a warning that
    names them and the reason.

    Args:
        dataset: dataset with a column `prompt`, and optionally `tools` and `chat_template_kwargs`, which the chat
            template gets.
        tokenizer: tokenizer of the policy.
        args: options of the run.
        split: `train` or `eval`, for error messages.
        token_rows: number of tokens for which the policy has an embedding.
        max_positions: maximum number of tokens of a sequence that the policy supports.
        name: name of the dataset in error messages. `None` means `train_dataset` or `eval_dataset`.

    Raises:
        UserError: if a prompt is not usable; the message names dataset and row.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        args: PPOConfig,
        *,
        split: str,
        token_rows: int,
        max_positions: int,
        name: str | None = None,
    ):
        name = name or f"{split}_dataset"
        prepared = encode_prompts(dataset, tokenizer, args, name, max_positions)
        if len(prepared) < len(dataset):
            dataset = dataset.select(prepared["row"])
        self._rows = RowsWithoutFill(dataset)
        self._encoded = prepared.select_columns("prompt_ids")
        _check_tokens(prepared, name, tokenizer, token_rows)

    def __len__(self) -> int:
        return len(self._encoded)

    @property
    def first(self) -> list[int]:
        """Token ids of the first prompt."""
        return self._encoded[0]["prompt_ids"]

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each prompt, int64."""
        lengths = pc.list_value_length(self._encoded.with_format("arrow")[:]["prompt_ids"])
        return lengths.to_numpy().astype(np.int64)

    def rows(self, indices: list[int] | range) -> tuple[list[dict[str, Any]], list[list[int]]]:
        """The rows with these indices, and the token ids of their prompts."""
        examples = [self._rows.clean(self._rows.dataset[index]) for index in indices]
        prompt_ids = [self._encoded[index]["prompt_ids"] for index in indices]
        return examples, prompt_ids


def encode_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: PPOConfig, name: str, max_positions: int
) -> Dataset:
    """Checks the dataset and tokenizes its prompts; raises `UserError` with its name and the row. See `Prompts`.

    One process of each machine does it, and the others read the result, as later starts do, from the cache of
    `datasets`.

    Returns:
        The columns `row`, the number of the row, and `prompt_ids`, its token ids, without the rows that are dropped
            because the chat template cannot render them.
    """
    _check_dataset(dataset, name)
    refuse_media_columns(dataset, where=name)
    check_tokenizer(tokenizer, needs_chat_template=is_messages(dataset[0]["prompt"]))
    limit = _limit(args, max_positions)
    columns = [name for name in ("prompt", *TEMPLATE_COLUMNS) if name in dataset.column_names]
    columns = dataset.select_columns(columns)
    rows, tokens = dataset_digest(columns), tokenizer_digest(tokenizer)
    key = None
    if rows is not None and tokens is not None:
        key = digest("prompts", rows, tokens, args.unrenderable, limit, name)

    def build(file: RowsFile) -> dict[str, Any]:
        with (
            no_bars(when=args.disable_tqdm or args.local_process_index > 0),
            progress_bar("Preparing the prompts", len(dataset)) as advance,
        ):
            return _write_prompts(columns, file, tokenizer, limit, args.unrenderable, name, advance)

    with args.main_process_first(desc=name):
        prepared = kept(key, build)
    if prepared.notes["summary"]:
        logger.warning(prepared.notes["summary"])
    return prepared.rows


class _Limit(NamedTuple):
    """The most tokens of a prompt, and what they depend on."""

    tokens: int
    option: str


def _limit(args: PPOConfig, max_positions: int) -> _Limit:
    room = max_positions - args.max_completion_length
    if room < 1:
        raise UserError(
            f"max_completion_length={args.max_completion_length} leaves no room for a prompt, as the policy has "
            f"{max_positions} positions: set it to fewer than these, minus the tokens of the longest prompt."
        )
    if args.max_prompt_length is not None and args.max_prompt_length < room:
        return _Limit(args.max_prompt_length, "max_prompt_length")
    return _Limit(room, f"max_completion_length of {max_positions} positions")


def _write_prompts(
    dataset: Dataset,
    file: RowsFile,
    tokenizer: PreTrainedTokenizerBase,
    limit: _Limit,
    unrenderable: str,
    name: str,
    advance: Advance,
) -> dict[str, Any]:
    """Writes number and token ids of each prompt, in batches. Returns the summary of the dropped rows, or ""."""
    report = LoadReport(source=name, rows_in=len(dataset), kept=len(dataset))
    numbered = enumerate(RowsWithoutFill(dataset))
    batches = in_batches(numbered, BATCH)
    examples_of = lambda batch: [example for _, example in _well_formed(batch)]  # noqa: E731
    for batch, encoded in encode_prompt_batches(tokenizer, batches, examples_of):
        kept_rows: dict[int, list[int]] = {}
        well_formed = _well_formed(batch)
        for (row, _), ids in zip(well_formed, encoded, strict=True):
            if not isinstance(ids, str):
                _check_length(ids, limit, f"{name} row {row}")
                kept_rows[row] = ids
            elif unrenderable == "error":
                raise refused_row(f"{name} row {row}", ids)
            else:
                report.drop(ids, row)
                report.kept -= 1
        if len(well_formed) < len(batch):
            row, example = batch[len(well_formed)]
            prompt = example["prompt"]
            raise UserError(
                f"{name} row {row}: `prompt` is {prompt!r}, not text or a list of messages: fix or drop the row."
            )
        if kept_rows:
            columns = {"row": list(kept_rows), "prompt_ids": list_array(list(kept_rows.values()))}
            file.write(arrow_table(columns, _FEATURES))
        advance(len(batch))
    if report.kept == 0:
        raise UserError(f"{report.summary()}: no prompt is left: use a policy whose chat template renders them.")
    return {"summary": report.summary() if report.dropped else ""}


def _well_formed(batch: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    """The rows before the first one without a prompt. The first wrong row is named, whatever is wrong with it."""
    return list(takewhile(lambda item: _is_prompt(item[1]["prompt"]), batch))


def _is_prompt(prompt: Any) -> bool:
    return isinstance(prompt, str) or is_messages(prompt)


def _check_length(ids: list[int], limit: _Limit, where: str) -> None:
    if not ids:
        raise UserError(f"{where}: `prompt` has no tokens: remove the row or add a begin token.")
    if len(ids) > limit.tokens:
        raise UserError(
            f"{where}: `prompt` has {len(ids)} tokens, {len(ids) - limit.tokens} over the {limit.tokens} that "
            f"{limit.option} leaves: change that option, or shorten or drop the row."
        )


def _check_tokens(prepared: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, token_rows: int) -> None:
    """Raises `UserError` for the first prompt with a token for which the model has no row."""
    for batch in prepared.with_format("arrow").iter(BATCH):
        if (pc.max(pc.list_flatten(batch["prompt_ids"])).as_py() or 0) < token_rows:
            continue
        for row, ids in zip(batch["row"].to_pylist(), batch["prompt_ids"].to_pylist(), strict=True):
            check_token_ids(f"{name} row {row}: `prompt`", ids, tokenizer, token_rows)


def _check_dataset(dataset: Dataset, name: str) -> None:
    if "prompt" not in dataset.column_names:
        raise UserError(f"{name} has no column 'prompt', only {dataset.column_names}: rename yours to 'prompt'.")
    if len(dataset) == 0:
        raise UserError(f"{name} is empty: PPO needs at least one prompt.")


def warn_of_other_form(
    trained_on: PromptForm, tokenizer: PreTrainedTokenizerBase, datasets: Mapping[str, Sequence]
) -> None:
    """Logs one warning if prompts have another form than those that the policy was trained on.

    The prompts are not changed.

    Args:
        trained_on: the form of its training. Nothing is logged if it is not known, or mixed.
        tokenizer: tokenizer of the policy.
        datasets: rows with `prompt` by their names in messages, those of training first.
    """
    for name, dataset in datasets.items():
        form = PromptForm.of(dataset[0]["prompt"], tokenizer).prompt_form
        if (trained_on.prompt_form, form) == (MESSAGES, TEXT):
            logger.warning(
                "%s: the prompts are text, but the policy was trained on messages, and without its chat template it "
                "may go on with the text instead of answering: give messages, with as_user_turns of "
                "hf_rlhf_ext.data.prompting, or on the command line with --columns '{prompt: prompt}'.",
                name,
            )
            return
        if (trained_on.prompt_form, form) == (TEXT, MESSAGES):
            logger.warning(
                "%s: the prompts are messages, but the policy was trained on text, so that it has not seen the chat "
                "template that renders them: give the prompts as text, or train the policy on messages first.",
                name,
            )
            return
        if form == MESSAGES and trained_on.prompt_form == MESSAGES and trained_on.other_template(tokenizer):
            logger.warning(
                "processing_class has another chat template than the policy was trained with: use the tokenizer of the "
                "policy's folder."
            )
            return


def prompt_indices(rollout: int, size: int, n_prompts: int, seed: int, *, shuffled: bool = True) -> list[int]:
    """Rows of the prompts of one rollout.

    They depend only on the number of the rollout and the seed, so that a resumed run gets the same prompts. Each pass
    over the prompts has its own permutation. If the dataset has fewer prompts than a rollout, prompts repeat.

    Args:
        rollout: number of the rollout, from 0.
        size: number of prompts per rollout, over all processes.
        n_prompts: number of prompts in the dataset.
        seed: seed of the permutations.
        shuffled: whether each pass has a permutation; if not, the rows are in the order of the dataset.

    Returns:
        `size` indices of rows.
    """
    return rows_from(rollout * size, size, n_prompts, seed, shuffled=shuffled)


def rows_from(position: int, size: int, n_prompts: int, seed: int, *, shuffled: bool = True) -> list[int]:
    """Rows of `size` prompts from a position on, which counts prompts pass after pass; see `prompt_indices`."""
    rows = []
    permutations: dict[int, list[int]] = {}
    for place in range(position, position + size):
        epoch, offset = divmod(place, n_prompts)
        if not shuffled:
            rows.append(offset)
            continue
        if epoch not in permutations:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            permutations[epoch] = torch.randperm(n_prompts, generator=generator).tolist()
        rows.append(permutations[epoch][offset])
    return rows


def other_sampling(args: PPOConfig) -> list[str]:
    """The options that change the distribution of sampled tokens, each as `name=value`."""
    changed = []
    if args.top_k:
        changed.append(f"top_k={args.top_k}")
    if args.top_p < 1:
        changed.append(f"top_p={args.top_p}")
    generation_kwargs = args.generation_kwargs or {}
    for name, neutral in SAMPLING_OPTIONS.items():
        value = generation_kwargs.get(name)
        if value is not None and value != neutral:
            changed.append(f"{name}={value}")
    return changed


def warn_of_other_sampling(args: PPOConfig) -> None:
    """Logs a warning if completions are not sampled from the distribution whose log-probabilities PPO uses."""
    if args.importance_sampling_correction:
        return
    changed = other_sampling(args)
    if changed:
        logger.warning(
            "%s: tokens are sampled from another distribution than the one that is scored (the metric "
            "sampling/logprob_mismatch shows the difference): leave it out, or set importance_sampling_correction.",
            ", ".join(changed),
        )


def with_max_steps(args: PPOConfig, n_prompts: int, world_size: int) -> PPOConfig:
    """Returns a copy of `args` with `max_steps`. If it is not set, it is computed from `num_train_epochs`."""
    args = copy.copy(args)
    if args.max_steps <= 0:
        sizes = Sizes(args.rollout_size * world_size, args.steps_per_rollout, args.num_generations)
        args.max_steps = Stretch().steps_in_run(args.num_train_epochs, n_prompts, sizes)
    return args


def tick_dataloader(args: PPOConfig, world_size: int) -> DataLoader:
    """A data loader with one batch per micro-step, which contains only the number of the step.

    The prompts of a rollout depend only on its number and the seed. The data loader only counts, so that neither
    resuming nor an early stop of a rollout shifts the data.
    """
    ticks = range(args.max_steps * args.gradient_accumulation_steps * world_size)
    return DataLoader(ticks, batch_size=1, shuffle=False, collate_fn=lambda batch: {"tick": torch.tensor(batch)})
