"""The prompts of PPO: checks and tokenizes them once, and selects the prompts of each rollout."""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ..data.json_columns import RowsWithoutFill
from ..data.media import refuse_media_columns
from ..data.prompt_form import MESSAGES, TEXT, PromptForm
from ..data.schema import LoadReport
from ..data.templates import TEMPLATE_COLUMNS, template_options
from ..data.text import Unrenderable, check_tokenizer, encode_generation_prompt, is_messages, refused_row
from ..errors import UserError
from ..modeling.vocabulary import check_token_ids
from .config import PPOConfig
from .generation_options import SAMPLING_OPTIONS

logger = logging.getLogger(__name__)


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
        encoded = encode_prompts(dataset, tokenizer, args, name, max_positions)
        kept = [row for row, ids in enumerate(encoded) if ids is not None]
        if len(kept) < len(encoded):
            dataset = dataset.select(kept)
        self._rows = RowsWithoutFill(dataset)
        self._encoded = [encoded[row] for row in kept]
        for row in kept:
            check_token_ids(f"{name} row {row}: `prompt`", encoded[row], tokenizer, token_rows)

    def __len__(self) -> int:
        return len(self._encoded)

    @property
    def first(self) -> list[int]:
        """Token ids of the first prompt."""
        return self._encoded[0]

    def rows(self, indices: list[int] | range) -> tuple[list[dict[str, Any]], list[list[int]]]:
        """The rows with these indices, and the token ids of their prompts."""
        examples = [self._rows.clean(self._rows.dataset[index]) for index in indices]
        prompt_ids = [self._encoded[index] for index in indices]
        return examples, prompt_ids


def encode_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: PPOConfig, name: str, max_positions: int
) -> list[list[int] | None]:
    """Checks the dataset and tokenizes its prompts; raises `UserError` with its name and the row. See `Prompts`.

    Returns:
        The token ids of each prompt, or `None` for a prompt that the chat template cannot render and that is dropped.
    """
    _check_dataset(dataset, name)
    refuse_media_columns(dataset, where=name)
    check_tokenizer(tokenizer, needs_chat_template=is_messages(dataset[0]["prompt"]))
    room = max_positions - args.max_completion_length
    if room < 1:
        raise UserError(
            f"max_completion_length={args.max_completion_length} leaves no room for a prompt, as the policy has "
            f"{max_positions} positions: set it to fewer than these, minus the tokens of the longest prompt."
        )
    limit = room
    if args.max_prompt_length is not None:
        limit = min(room, args.max_prompt_length)
    encoded: list[list[int] | None] = []
    report = LoadReport(source=name, rows_in=len(dataset), kept=len(dataset))
    columns = [name for name in ("prompt", *TEMPLATE_COLUMNS) if name in dataset.column_names]
    for row, example in enumerate(RowsWithoutFill(dataset.select_columns(columns))):
        prompt = example["prompt"]
        where = f"{name} row {row}"
        if not isinstance(prompt, str) and not is_messages(prompt):
            raise UserError(f"{where}: `prompt` is {prompt!r}, not text or a list of messages: fix or drop the row.")
        try:
            ids = encode_generation_prompt(tokenizer, prompt, template_options(example))
        except Unrenderable as error:
            if args.unrenderable == "error":
                raise refused_row(where, error.reason) from error
            report.drop(error.reason, row)
            report.kept -= 1
            encoded.append(None)
            continue
        if not ids:
            raise UserError(f"{where}: `prompt` has no tokens: remove the row or add a begin token.")
        if len(ids) > limit:
            option = f"max_completion_length of {max_positions} positions"
            if limit < room:
                option = "max_prompt_length"
            raise UserError(
                f"{where}: `prompt` has {len(ids)} tokens, {len(ids) - limit} over the {limit} that {option} leaves: "
                "change that option, or shorten or drop the row."
            )
        encoded.append(ids)
    if report.dropped:
        if report.kept == 0:
            raise UserError(f"{report.summary()}: no prompt is left: use a policy whose chat template renders them.")
        logger.warning(report.summary())
    return encoded


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
    over the prompts has its own permutation. If there are fewer prompts than completions in a rollout, prompts repeat.

    Args:
        rollout: number of the rollout, from 0.
        size: number of completions per rollout, over all processes.
        n_prompts: number of prompts in the dataset.
        seed: seed of the permutations.
        shuffled: whether each pass has a permutation; if not, the rows are in the order of the dataset.

    Returns:
        `size` indices of rows.
    """
    rows = []
    permutations: dict[int, list[int]] = {}
    for position in range(rollout * size, (rollout + 1) * size):
        epoch, offset = divmod(position, n_prompts)
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
        rollouts = max(1, math.ceil(args.num_train_epochs * n_prompts / (args.rollout_size * world_size)))
        args.max_steps = rollouts * args.steps_per_rollout
    return args


def tick_dataloader(args: PPOConfig, world_size: int) -> DataLoader:
    """A data loader with one batch per micro-step, which contains only the number of the step.

    The prompts of a rollout depend only on its number and the seed. The data loader only counts, so that neither
    resuming nor an early stop of a rollout shifts the data.
    """
    ticks = range(args.max_steps * args.gradient_accumulation_steps * world_size)
    return DataLoader(ticks, batch_size=1, shuffle=False, collate_fn=lambda batch: {"tick": torch.tensor(batch)})
