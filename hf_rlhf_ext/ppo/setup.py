"""What `PPOTrainer` needs before the first step: the policy with its reference, checked prompts, and the tick data."""

import copy
import math
from dataclasses import dataclass

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.text import check_tokenizer, encode_prompt, is_messages
from ..errors import UserError
from ..modeling.adapters import copy_adapter
from ..modeling.heads import ScalarHead
from .config import PPOConfig

REFERENCE_ADAPTER = "ref"


@dataclass
class Reference:
    """Where the reference's log-probabilities come from.

    `adapter` names a frozen adapter on the policy's base; None means the bare base; `model` is a separate frozen model
    (full fine-tuning, where there is no base to share).
    """

    adapter: str | None = None
    model: nn.Module | None = None


def build_policy(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None
) -> tuple[PreTrainedModel | PeftModel, Reference]:
    """The trainable policy and its reference.

    A `PeftModel` is trained further, with a frozen copy of its active adapter as the reference (the SFT policy). A
    base model with `peft_config` gets a new adapter, and the reference is the bare base. A base model alone is trained
    whole, with a frozen copy as the reference.
    """
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise UserError("peft_config was given, but the model has an adapter already: leave one of them out.")
        active = model.active_adapter
        if REFERENCE_ADAPTER not in model.peft_config:
            copy_adapter(model, active, REFERENCE_ADAPTER)
        model.set_adapter(active)  # an adapter loaded for inference comes frozen
        return model, Reference(adapter=REFERENCE_ADAPTER)
    if peft_config is not None:
        return get_peft_model(model, peft_config), Reference()
    return model, Reference(model=copy.deepcopy(model).eval().requires_grad_(False))


def attach_value_head(model: nn.Module) -> ScalarHead:
    """Hangs a zero-initialised fp32 value head on the policy, so that the optimizer and devices see it.

    Zero is the right first guess where rewards have mean zero. PEFT must be attached already: `all-linear` would wrap
    it.
    """
    config = model.config.get_text_config()
    head = ScalarHead(config.hidden_size, bias=True)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model.add_module("value_head", head.to(next(model.parameters()).device))
    return head


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
