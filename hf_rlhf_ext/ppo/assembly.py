"""Sets up a PPO run: checks the inputs, then builds policy, reference, reward models and critic."""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..compat import disable_dropout_in_model
from ..errors import UserError
from ..modeling.heads import ScalarHead, head_name
from ..modeling.loading import (
    adapter_base,
    load_base_model,
    load_policy,
    load_tokenizer,
    refuse_fp16_weights,
    warn_of_emulated_bf16,
    warn_of_rounded_updates,
)
from ..modeling.logprobs import check_output_head
from ..modeling.stack import AdapterStack, Role
from ..reward.normalization import NORMALIZATION_FILE
from ..reward.scorer import RewardScorer, local_folder
from ..reward.sharing import shareable_adapter
from .config import PPOConfig
from .guards import check_setup
from .prompts import Prompts, check_best_metric, warn_of_other_sampling, with_max_steps
from .ptx import PTXTexts
from .rewards import RewardFunc, RewardFunctions
from .roles import Roles


@dataclass
class Inputs:
    """The arguments of `PPOTrainer`, loaded and checked.

    Attributes:
        model: the policy.
        tokenizer: its tokenizer.
        args: a copy of the options, with `max_steps` set.
        prompts: the prompts of the training data.
        ptx_texts: the texts of PPO-ptx.
        max_positions: maximum number of tokens of a sequence that the policy supports.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    args: PPOConfig
    prompts: Prompts
    ptx_texts: PTXTexts
    max_positions: int


def prepare_inputs(
    model: str | PreTrainedModel | PeftModel,
    args: PPOConfig,
    *,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | dict[str, Dataset] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
    ptx_dataset: Dataset | None,
) -> Inputs:
    """Loads models and tokenizers that are given by name, and refuses inputs that are not supported.

    The arguments are those of `PPOTrainer`; `tokenizer` is its `processing_class`.

    Raises:
        UserError: if the data are not usable, if PPO does not support the output head of the model, or if options
            contradict each other.
    """
    if train_dataset is None:
        raise UserError("train_dataset is required: pass a dataset with a column 'prompt'.")
    check_setup(args)
    warn_of_emulated_bf16(args)
    model, tokenizer = _load(model, tokenizer, peft_config, args)
    max_positions = _position_limit(model)
    prompts = Prompts(train_dataset, tokenizer, args, split="train", max_positions=max_positions)
    ptx_texts = PTXTexts(ptx_dataset, tokenizer, args, max_positions=max_positions)
    check_output_head(model, prompts.first)
    warn_of_other_sampling(args)
    check_best_metric(args, eval_dataset)
    return Inputs(
        model=model,
        tokenizer=tokenizer,
        args=with_max_steps(args, len(train_dataset), args.world_size),
        prompts=prompts,
        ptx_texts=ptx_texts,
        max_positions=max_positions,
    )


def _load(
    model: str | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
    args: PPOConfig,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Returns model and tokenizer, and loads them if they are given by name or left out."""
    if isinstance(model, str):
        model, loaded = load_trainable(model, peft_config, trust_remote_code=args.trust_remote_code)
        return model, loaded if tokenizer is None else tokenizer
    if tokenizer is None:
        tokenizer = load_tokenizer(model.config.name_or_path, trust_remote_code=args.trust_remote_code)
    return model, tokenizer


def _position_limit(model: PreTrainedModel | PeftModel) -> int:
    """Maximum number of tokens of a sequence that the model supports."""
    text_config = model.config.get_text_config()
    return getattr(text_config, "max_position_embeddings", None) or sys.maxsize


def assemble_roles(
    model: PreTrainedModel | PeftModel,
    args: PPOConfig,
    *,
    reward_funcs: RewardFunc | list[RewardFunc],
    reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
    eval_reward_funcs: RewardFunc | list[RewardFunc] | None = None,
    peft_config: PeftConfig | None = None,
    value_model: str | PreTrainedModel | None = None,
) -> tuple[Roles, RewardFunctions, RewardFunctions | None]:
    """Builds policy, reference, reward models and critic. The arguments are those of `PPOTrainer`.

    The order matters: the critic may start from a reward model of training, but never from one of evaluation.

    Returns:
        The roles, the reward functions of training, and those of evaluation (`None` without any).
    """
    stack = build_stack(model, peft_config)
    loading = {
        "share": lambda folder: shared_reward(stack, folder),
        "trust_remote_code": args.trust_remote_code,
    }
    rewards = RewardFunctions(reward_funcs, args.reward_weights, reward_processing_classes, **loading)

    if isinstance(value_model, str):
        value_model = load_value_model(value_model, trust_remote_code=args.trust_remote_code)
    critic = attach_critic(stack, args.critic, value_model=value_model)
    checkpoint_critic(stack, args)
    if critic == "adapter":
        scale_critic(stack, rewards, args.reward_scale)

    eval_rewards = None
    if eval_reward_funcs is not None:
        eval_rewards = RewardFunctions(eval_reward_funcs, option="eval_reward_funcs", **loading)
    if args.fp16:
        refuse_fp16_weights(stack.model)
    if args.disable_dropout:
        disable_dropout_in_model(stack.model)
    return Roles(stack, critic, args), rewards, eval_rewards


def load_trainable(
    name: str, peft_config: PeftConfig | None, **options
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Loads a policy for training: in fp32 if the whole model is trained, else in the dtype that suits the machine."""
    if peft_config is None and adapter_base(name) is None:
        options["dtype"] = "float32"
    return load_policy(name, is_trainable=True, **options)


def build_stack(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> AdapterStack:
    """Builds the stack with policy and reference.

    A `PeftModel` is trained further, and its reference is a frozen copy of its active adapter (the SFT policy). A base
    model with `peft_config` gets a new adapter, and its reference is the base model. A base model without `peft_config`
    is trained as a whole, and its reference is a frozen copy.

    Raises:
        UserError: if `peft_config` is given for a model that already has an adapter.
    """
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise UserError("peft_config was given, but the model already has an adapter: leave one of them out.")
        stack = AdapterStack(model)
        stack.attach("reference", "policy")
    elif peft_config is not None:
        stack = AdapterStack(get_peft_model(model, peft_config))
        stack.attach("reference")
    else:
        warn_of_rounded_updates("model", model)
        stack = AdapterStack(model)
        stack.attach("reference", copy.deepcopy(model).eval())
    return stack


def load_value_model(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Loads the model that `critic="model"` starts from: a causal LM or a reward model, in fp32."""
    task = "reward" if (Path(name) / NORMALIZATION_FILE).is_file() else "causal_lm"
    return load_base_model(name, task=task, dtype="float32", trust_remote_code=trust_remote_code)


def attach_critic(stack: AdapterStack, kind: str | None, *, value_model: nn.Module | None = None) -> str:
    """Adds the role `value`, the critic, with an fp32 head.

    If the reward model is an adapter on the same base, the critic starts from it (InstructGPT, sec. 3.5), and
    `scale_critic` then scales its head to normalized rewards. Otherwise it starts from the policy with a head of zeros,
    which is right on average if rewards have mean zero.

    Args:
        stack: stack with policy and reference, and with reward models that share the base.
        kind: kind of critic, `adapter`, `head` or `model`; `None` chooses one, see `PPOConfig.critic`.
        value_model: the model for `model`; `None` means a copy of the policy.

    Returns:
        The kind of critic.

    Raises:
        UserError: if the policy or `value_model` does not fit the kind.
    """
    has_adapter = isinstance(stack.model, PeftModel)
    if kind is None:
        kind = _default_critic(has_adapter, value_model)
    if kind == "adapter" and not has_adapter:
        raise UserError(
            "critic='adapter' needs a policy that is an adapter: pass peft_config, or choose critic='head' or 'model'."
        )
    if value_model is not None and kind != "model":
        raise UserError(f"value_model was given, but critic={kind!r}: choose critic='model', or leave it out.")
    if kind == "model":
        _attach_model_critic(stack, value_model)
    elif kind == "adapter":
        _attach_adapter_critic(stack)
    else:
        _attach_head_critic(stack)
    return kind


def _default_critic(has_adapter: bool, value_model: nn.Module | None) -> str:
    if value_model is not None:
        return "model"
    return "adapter" if has_adapter else "head"


def _attach_model_critic(stack: AdapterStack, value_model: nn.Module | None) -> None:
    if value_model is None:
        if isinstance(stack.model, PeftModel):
            raise UserError("critic='model' needs value_model if the policy is an adapter: pass value_model.")
        value_model = copy.deepcopy(stack.model)
    elif getattr(value_model, "is_quantized", False):
        raise UserError("value_model: training of a quantized value model is not supported: load it in fp32.")
    else:
        warn_of_rounded_updates("value_model", value_model)
    config = value_model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = 0  # sequence classification needs one for batches; its own pooling is not used
    # A copy of the policy also has copies of the heads and models attached to it, which do not belong to the critic.
    children = dict(value_model.named_children())
    for role in stack.roles:
        for name in (f"{role}_head", f"{role}_model"):
            if name in children:
                delattr(value_model, name)
    stack.attach("value", value_model, head=_head_for(value_model), trainable=True)


def _attach_adapter_critic(stack: AdapterStack) -> None:
    head = _head_for(stack.model)
    source = "policy"
    reward = stack.roles.get("reward")
    if reward is not None:
        source = "reward"
        # A reward head may have no bias, but a critic's head has one.
        if reward.head is not None:
            head.load_state_dict({"bias": torch.zeros(1), **reward.head.state_dict()})
    stack.attach("value", source, head=head, trainable=True)
    # The copy may include an adapter on the output embedding, which a critic does not use.
    for name, parameter in stack.model.get_output_embeddings().named_parameters():
        if ".value." in f".{name}.":
            parameter.requires_grad_(False)


def _attach_head_critic(stack: AdapterStack) -> None:
    head = _head_for(stack.model).to(next(stack.model.parameters()).device)
    stack.model.add_module("value_head", head)
    stack.roles["value"] = Role(stack.roles["policy"].adapter, head=head)


def _head_for(model: nn.Module) -> ScalarHead:
    """A value head for the hidden states of the model: with the weights of its score head if it has one, else zeros."""
    head = ScalarHead(model.config.get_text_config().hidden_size, bias=True)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    name = head_name(model)
    if name is not None:
        scores = model.get_submodule(name).state_dict()
        if len(scores["weight"]) != 1:
            raise UserError(f"value_model has {len(scores['weight'])} labels instead of 1: load it with num_labels=1.")
        head.load_state_dict({"bias": torch.zeros(1), **scores})
    return head


def scale_critic(stack: AdapterStack, rewards: RewardFunctions, reward_scale: float) -> None:
    """Scales a value head that was copied from a reward head, so that it predicts rewards as PPO uses them.

    PPO uses weight · `reward_scale` · (score − mean) / std. A critic that did not start from a reward adapter is not
    changed.
    """
    if "reward" not in stack.roles:
        return
    # The first reward with a head is the shared adapter that the critic was copied from.
    scorer, weight = next(
        (function, weight) for function, weight in rewards.weighted() if getattr(function, "head", None) is not None
    )
    scale = weight * reward_scale / scorer.std
    head = stack.roles["value"].head
    with torch.no_grad():
        head.weight.mul_(scale)
        head.bias.sub_(scorer.mean).mul_(scale)


def checkpoint_critic(stack: AdapterStack, args: TrainingArguments) -> None:
    """Turns on gradient checkpointing for a critic that is a separate model, which `Trainer` may not reach."""
    critic = stack.roles["value"].model
    if critic is None or not args.gradient_checkpointing:
        return
    options = dict(args.gradient_checkpointing_kwargs or {})
    # Transformers takes these two as separate arguments.
    which = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    enable = getattr(critic, "activation_checkpointing_enable", None) or critic.gradient_checkpointing_enable
    enable(options or None, **which)


def shared_reward(stack: AdapterStack, folder_or_repo: str | Path) -> RewardScorer | None:
    """Adds a reward adapter to the policy's base; returns `None` if it needs another base."""
    if not isinstance(stack.model, PeftModel):
        return None
    folder = local_folder(folder_or_repo, None)
    normalization = shareable_adapter(folder, stack.model, name=folder_or_repo)
    if normalization is None:
        return None
    role = "reward" if "reward" not in stack.roles else f"reward_{len(stack.roles)}"
    attached = stack.attach(role, folder)
    if attached.head is None:
        raise UserError(
            f"{folder_or_repo}: the adapter has no score head: use a reward model trained with BradleyTerryTrainer."
        )
    return RewardScorer(
        stack.model,
        load_tokenizer(str(folder)),
        mean=normalization.mean,
        std=normalization.std,
        autocast=normalization.autocast_dtype,
        adapter=attached.adapter,
        head=attached.head,
    )
