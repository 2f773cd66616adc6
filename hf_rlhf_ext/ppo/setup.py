"""What `PPOTrainer` needs before the first step: checked prompts, and data that count the steps."""

import copy
import logging
import math

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ..data.text import check_tokenizer, encode_prompt, is_messages
from ..errors import UserError
from .config import PPOConfig

logger = logging.getLogger(__name__)

SAMPLING_OPTIONS = {"repetition_penalty": 1, "typical_p": 1, "guidance_scale": 1, "min_p": 0, "top_h": None}
SAMPLING_OPTIONS |= {"epsilon_cutoff": 0, "eta_cutoff": 0, "no_repeat_ngram_size": 0, "min_length": 0}
SAMPLING_OPTIONS |= {"min_new_tokens": 0, "sequence_bias": None, "bad_words_ids": None, "suppress_tokens": None}
SAMPLING_OPTIONS |= {"begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None}
SAMPLING_OPTIONS |= {"exponential_decay_length_penalty": None, "watermarking_config": None}
"""Fields of `GenerationConfig` that change the distribution of tokens, and the value at which each does nothing."""


def encode_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: PPOConfig, split: str, max_positions: int
) -> list[list[int]]:
    """Token ids of every prompt, after checking the data set; raises `UserError` with split and row."""
    room = max_positions - args.max_completion_length
    limit = room if args.max_prompt_length is None else min(room, args.max_prompt_length)
    if isinstance(dataset, IterableDataset):
        raise UserError(f"{split}_dataset is streamed: PPO needs to draw prompts by row, pass a `datasets.Dataset`.")
    if "prompt" not in dataset.column_names:
        raise UserError(
            f"{split}_dataset has no column 'prompt', only {dataset.column_names}: rename yours to 'prompt'."
        )
    if len(dataset) == 0:
        raise UserError(f"{split}_dataset is empty: PPO needs at least one prompt.")
    check_tokenizer(tokenizer, needs_chat_template=is_messages(dataset[0]["prompt"]))
    encoded = []
    for row, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str) and not is_messages(prompt):
            raise UserError(f"{split}_dataset row {row}: `prompt` is {prompt!r}, not text or a list of messages.")
        ids = encode_prompt(tokenizer, prompt)
        if not ids:
            raise UserError(f"{split}_dataset row {row}: `prompt` has no tokens: remove the row or add a begin token.")
        if len(ids) > limit:
            option = "max_prompt_length" if limit < room else f"max_completion_length of {max_positions} positions"
            raise UserError(
                f"{split}_dataset row {row}: `prompt` has {len(ids)} tokens, {len(ids) - limit} over the {limit} that "
                f"{option} leaves: change that option, or shorten or drop the row."
            )
        encoded.append(ids)
    return encoded


def warn_of_other_sampling(args: PPOConfig) -> None:
    """One line where completions are drawn from a distribution other than the one whose probabilities PPO uses."""
    given = {"top_k": args.top_k or None, "top_p": args.top_p if args.top_p < 1 else None}
    for name, neutral in SAMPLING_OPTIONS.items():
        value = (args.generation_kwargs or {}).get(name)
        given[name] = None if value == neutral else value
    given = [f"{name}={value}" for name, value in given.items() if value is not None]
    if given and not args.importance_sampling_correction:
        logger.warning(
            "%s: tokens are drawn from another distribution than the one that is scored (sampling/logprob_mismatch "
            "shows by how much): leave it out, or set importance_sampling_correction.",
            ", ".join(given),
        )


def check_best_metric(args: PPOConfig, eval_dataset: Dataset | dict[str, Dataset] | None) -> None:
    """Refuses a `metric_for_best_model` that names none of several evaluation sets, before anything is sampled."""
    chosen = (args.metric_for_best_model or "").removeprefix("eval_")
    if chosen and isinstance(eval_dataset, dict) and not chosen.startswith(tuple(f"{name}_" for name in eval_dataset)):
        name = next(iter(eval_dataset))
        raise UserError(f"metric_for_best_model: eval_dataset has several sets: say which, as in {name}_{chosen}.")


def with_max_steps(args: PPOConfig, n_prompts: int, world_size: int) -> PPOConfig:
    """A copy of `args` whose `max_steps` is set: `num_train_epochs` passes over the prompts, in whole rollouts."""
    args = copy.copy(args)
    if args.max_steps <= 0:
        rollouts = max(1, math.ceil(args.num_train_epochs * n_prompts / (args.rollout_size * world_size)))
        args.max_steps = rollouts * args.steps_per_rollout
    return args


def tick_dataloader(args: PPOConfig, world_size: int) -> DataLoader:
    """One batch a micro-step that holds nothing but its number.

    The prompts of a rollout are a function of its number and the seed, so the data loader only has to count: resuming
    and inner epochs that stop early cannot shift any data.
    """
    ticks = range(args.max_steps * args.gradient_accumulation_steps * world_size)
    return DataLoader(ticks, batch_size=1, shuffle=False, collate_fn=lambda batch: {"tick": torch.tensor(batch)})
