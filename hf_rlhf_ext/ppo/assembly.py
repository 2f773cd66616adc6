"""Sets up a PPO run: checks the inputs, then builds policy, reference, reward models and critic."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..data.given import as_dataset, as_datasets
from ..data.prompt_form import PromptForm, form_of_model
from ..errors import UserError
from ..modeling.base_check import warn_of_changed_base
from ..modeling.dropout import disable_dropout
from ..modeling.embeddings import n_rows
from ..modeling.families import check_causal, check_policy, refuse_router_loss
from ..modeling.heads import ScalarHead, head_name
from ..modeling.loading import (
    adapter_base,
    load_policy,
    load_tokenizer,
    refuse_fp16_weights,
    warn_of_rounded_updates,
    warn_of_unscaled_fp16,
)
from ..modeling.logprobs import check_output_head, hidden_width
from ..modeling.ownership import (
    forget_earlier_trainer,
    independent_copy,
    mark_as_attached,
    remove_earlier_roles,
)
from ..modeling.quantization import prepare_quantized, refuse_trained_quantized
from ..modeling.stack import AdapterStack, Role
from ..modeling.takeover import remember_holder
from ..modeling.vocabulary import check_special_tokens
from ..reward.scorer import RewardScorer, local_folder
from ..reward.sharing import shareable_adapter
from ..training.activation_checkpointing import with_possible_checkpointing
from ..training.placement import move_before_probes
from .adapter_setup import check_adapter, refuse_trained_base, refuse_unrepeatable, stack_with_new_adapter
from .config import OF_CRITIC, PPOConfig
from .guards import check_setup, check_sharded_roles
from .policy_check import check_generates
from .prompts import Prompts, warn_of_other_form, warn_of_other_sampling, with_max_steps
from .ptx import PTXTexts
from .rewards import RewardFunc, RewardFunctions, named_sets
from .roles import Roles
from .value_model import prepare_value_model

logger = logging.getLogger(__name__)


@dataclass
class Inputs:
    """The arguments of `PPOTrainer`, loaded and checked.

    Attributes:
        model: the policy.
        tokenizer: its tokenizer.
        args: a copy of the options, with `max_steps` set.
        train_dataset: the rows of training.
        eval_dataset: those of evaluation; a dict if there are several sets.
        prompts: the prompts of the training data.
        ptx_texts: the texts of PPO-ptx.
        max_positions: maximum number of tokens of a sequence that the policy supports.
        prompt_form: form that the policy is trained on, by PPO and before.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    args: PPOConfig
    train_dataset: Dataset
    eval_dataset: Dataset | dict[str, Dataset] | None
    prompts: Prompts
    ptx_texts: PTXTexts
    max_positions: int
    prompt_form: PromptForm

    @property
    def datasets(self) -> dict[str, Dataset]:
        """All datasets with prompts, by their names in messages."""
        return {"train_dataset": self.train_dataset} | named_sets(self.eval_dataset)


def prepare_inputs(
    model: str | Path | PreTrainedModel | PeftModel,
    args: PPOConfig,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | dict[str, Dataset] | None,
    ptx_dataset: Dataset | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
) -> Inputs:
    """Loads models and tokenizers that are given by name, and refuses inputs that are not supported.

    The arguments are those of `PPOTrainer`; `tokenizer` is its `processing_class`.

    Raises:
        UserError: if the data are not usable, if PPO does not support the output head of the model, or if options
            contradict each other.
    """
    train_dataset = as_dataset(train_dataset, "train_dataset")
    eval_dataset = as_datasets(eval_dataset, "eval_dataset")
    ptx_dataset = as_dataset(ptx_dataset, "ptx_dataset")
    if train_dataset is None:
        raise UserError("train_dataset is required: pass a dataset with a column 'prompt'.")
    check_setup(args)
    model, tokenizer = _load(model, tokenizer, peft_config, args)
    prepare_quantized(model)
    refuse_trained_quantized(model, has_adapter=peft_config is not None or isinstance(model, PeftModel))
    check_special_tokens("processing_class", tokenizer, model, stop_ids=args.stop_token_ids or ())
    limits = {"token_rows": n_rows(model), "max_positions": config_positions(model)}
    prompts = Prompts(train_dataset, tokenizer, args, split="train", **limits)
    # An evaluation reads its prompts again. Here they are only checked, so that training does not end at a wrong one.
    for name, part in named_sets(eval_dataset).items():
        Prompts(part, tokenizer, args, split="eval", name=name, **limits)
    ptx_texts = PTXTexts(ptx_dataset, tokenizer, args, **limits)
    move_before_probes(model, args)
    check_output_head(model, prompts.first)
    check_causal(model, prompts.first)
    check_generates(model, prompts.first)
    warn_of_other_sampling(args)
    trained_on = form_of_model(model)
    warn_of_other_form(trained_on, tokenizer, {"train_dataset": train_dataset} | named_sets(eval_dataset))
    args = with_possible_checkpointing(args, model, peft_config)
    args = with_max_steps(args, len(train_dataset), args.world_size)
    if args.critic_warmup_steps > 0:
        args.check_policy_is_trained()
    return Inputs(
        model=model,
        tokenizer=tokenizer,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        prompts=prompts,
        ptx_texts=ptx_texts,
        max_positions=limits["max_positions"],
        prompt_form=PromptForm.of(train_dataset[0]["prompt"], tokenizer).after(trained_on),
    )


def _load(
    model: str | Path | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
    args: PPOConfig,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Returns model and tokenizer, and loads them if they are given by name or left out."""
    is_loaded = isinstance(model, str | Path)
    if is_loaded:
        options = {"trust_remote_code": args.trust_remote_code, "tokenizer": tokenizer}
        model, tokenizer = load_trainable(model, peft_config, **options)
    check_policy(model, peft_config)
    if isinstance(model, PeftModel):
        check_adapter("model", model.active_peft_config)
    if peft_config is not None:
        check_adapter("peft_config", peft_config)
    if not is_loaded:
        warn_of_changed_base("model", model, peft_config)
    if tokenizer is None:
        tokenizer = load_tokenizer(model.config.name_or_path, trust_remote_code=args.trust_remote_code)
    return model, tokenizer


def config_positions(model: PreTrainedModel | PeftModel) -> int:
    """Maximum number of tokens of a sequence that the model supports."""
    text_config = model.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    if limit is None or limit <= 0:  # -1 in XLNet, which has no limit
        return sys.maxsize
    return limit


def assemble_roles(
    model: PreTrainedModel | PeftModel,
    args: PPOConfig,
    *,
    reward_funcs: RewardFunc | list[RewardFunc],
    reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
    eval_reward_funcs: RewardFunc | list[RewardFunc] | None = None,
    peft_config: PeftConfig | None = None,
    value_model: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Roles, RewardFunctions, RewardFunctions | None]:
    """Builds policy, reference, reward models and critic. The arguments are those of `PPOTrainer`, and its tokenizer.

    The order matters: the critic may start from a reward model of training, but never from one of evaluation.

    Returns:
        The roles, the reward functions of training, and those of evaluation (`None` without any).
    """
    has_adapter = peft_config is not None or isinstance(model, PeftModel)
    check_sharded_roles(args, has_adapter=has_adapter, has_value_model=value_model is not None)
    stack = build_stack(model, peft_config)
    loading = {
        "share": lambda folder: shared_reward(stack, folder),
        "trust_remote_code": args.trust_remote_code,
    }
    rewards = RewardFunctions(reward_funcs, args.reward_weights, reward_processing_classes, **loading)

    if value_model is not None:
        value_model = prepare_value_model(
            value_model,
            stack.model,
            reward_models=rewards.models(),
            tokenizer=tokenizer,
            trust_remote_code=args.trust_remote_code,
        )
        refuse_router_loss(value_model, "value_model")
    critic = attach_critic(stack, args.critic, value_model=value_model, start=args.critic_start)
    say_unused_options(args, critic)
    checkpoint_critic(stack, args)
    if critic == "adapter" and args.critic_start in (None, "reward"):
        scale_critic(stack, rewards, args.reward_scale)
    say_start_of_critic(stack, args)

    eval_rewards = None
    if eval_reward_funcs is not None:
        eval_rewards = RewardFunctions(eval_reward_funcs, option="eval_reward_funcs", beside=rewards, **loading)
    if args.fp16:
        refuse_fp16_weights(stack.model)
    warn_of_unscaled_fp16(args, stack.model)
    if args.disable_dropout:
        disable_dropout(stack.model)
        for role in stack.roles.values():
            if role.model is not None:
                disable_dropout(role.model)
    return Roles(stack, critic, args), rewards, eval_rewards


def load_trainable(
    name: str | Path, peft_config: PeftConfig | None, **options
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Loads a policy for training: in fp32 if the whole model is trained, else in the dtype that suits the machine."""
    if peft_config is None and adapter_base(str(name)) is None:
        options |= {"dtype": "float32", "trains_weights": True}
    return load_policy(name, is_trainable=True, **options)


def build_stack(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> AdapterStack:
    """Builds the stack with policy and reference.

    A `PeftModel` is trained further, and its reference is a frozen copy of its active adapter (the SFT policy). A base
    model with `peft_config` gets a new adapter, and its reference is the base model, or a frozen copy of the new
    adapter if that computes something already. A base model without `peft_config` is trained as a whole, and its
    reference is a frozen copy.

    Raises:
        UserError: if `peft_config` is given for a model that already has an adapter, or if the adapter is of a kind
            that cannot share its base.
    """
    remember_holder(model)
    forget_earlier_trainer(model)
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise UserError("peft_config was given, but the model already has an adapter: leave one of them out.")
        refuse_trained_base("model", model)
        refuse_unrepeatable("model", model.active_peft_config)
        stack = AdapterStack(model)
        stack.attach("reference", "policy")
    elif peft_config is not None:
        stack = stack_with_new_adapter(model, peft_config)
    else:
        warn_of_rounded_updates("model", model)
        stack = AdapterStack(model)
        stack.attach("reference", independent_copy(model).eval())
    return stack


def attach_critic(
    stack: AdapterStack, kind: str | None, *, value_model: nn.Module | None = None, start: str | None = None
) -> str:
    """Adds the role `value`, the critic, with an fp32 head. With the kind `none`, adds nothing.

    Unless `start` says something else: if the reward model is an adapter on the same base, the critic starts from it
    (InstructGPT, sec. 3.5), and `scale_critic` then scales its head to normalized rewards. Otherwise it starts from the
    policy with a head of zeros, which is right on average if rewards have mean zero.

    Args:
        stack: stack with policy and reference, and with reward models that share the base.
        kind: kind of critic, `adapter`, `head`, `model` or `none`; `None` chooses one, see `PPOConfig.critic`.
        value_model: the model for `model`; `None` means a copy of the policy.
        start: weights that the critic starts from, see `PPOConfig.critic_start`.

    Returns:
        The kind of critic.

    Raises:
        UserError: if the policy, `value_model` or `start` does not fit the kind.
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
        _attach_model_critic(stack, value_model, start)
    elif kind == "adapter":
        _attach_adapter_critic(stack, start)
    elif kind == "head":
        if start not in (None, "policy"):
            raise UserError(
                f"critic_start={start!r}: critic='head' reads the hidden states of the policy, and starts with a head "
                "of zeros: leave critic_start out, or choose critic='adapter'."
            )
        _attach_head_critic(stack)
    return kind


def say_unused_options(args: PPOConfig, critic: str) -> None:
    """Logs which options were set and have no effect, as there is no critic, or as other options stand in for them.

    They are not refused, as a config file may have them for another critic than that of the command line.
    """
    unused = args.not_defaults(OF_CRITIC) if critic == "none" else []
    if unused:
        logger.warning("not used with critic='none', which has no values: %s.", ", ".join(unused))
        return
    replaces_lambda = args.length_adaptive_lambda is not None and args.value_gae_lambda is not None
    if replaces_lambda and args.not_defaults(["gae_lambda"]):
        logger.warning(
            "not used: gae_lambda, as length_adaptive_lambda sets the λ of advantages, and value_gae_lambda that of "
            "returns."
        )


def say_start_of_critic(stack: AdapterStack, args: PPOConfig) -> None:
    """Logs where a critic starts with predictions of something else than the rewards of the run."""
    head = stack.roles["value"].head if "value" in stack.roles else None
    if args.reward_shaping == "par" and head is not None and bool(head.weight.any()):
        logger.warning(
            "the critic starts from a reward head, which predicts scores, but reward_shaping='par' makes probabilities "
            "of them, from 0 to 1: critic_start='reward_features' starts with a head of zeros, which is closer."
        )


def _default_critic(has_adapter: bool, value_model: nn.Module | None) -> str:
    if value_model is not None:
        return "model"
    return "adapter" if has_adapter else "head"


def _attach_model_critic(stack: AdapterStack, value_model: nn.Module | None, start: str | None) -> None:
    if start == "policy" and value_model is not None:
        raise UserError("critic_start='policy' is a copy of the policy, but value_model was given: leave one out.")
    has_adapter = isinstance(stack.model, PeftModel)
    if start == "policy" and has_adapter:
        raise UserError(
            "critic_start='policy' with critic='model' copies a policy that is trained whole, but the policy is an "
            "adapter: choose critic='adapter', or pass value_model and leave critic_start out."
        )
    if start in ("reward", "reward_features") and (value_model is None or head_name(value_model) is None):
        raise UserError(
            f"critic_start={start!r} with critic='model' needs a reward model with a score head: pass it as "
            "value_model, or leave critic_start out."
        )
    if value_model is None:
        if has_adapter:
            raise UserError("critic='model' needs value_model if the policy is an adapter: pass value_model.")
        value_model = independent_copy(stack.model)
    else:
        warn_of_rounded_updates("value_model", value_model)
    config = value_model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = 0  # sequence classification needs one for batches; its own pooling is not used
    # A copy of the policy also has copies of the heads and models attached to it, which do not belong to the critic.
    remove_earlier_roles(value_model)
    head = _head_for(value_model)
    if start == "reward_features":
        _set_to_zero(head)
    stack.attach("value", value_model, head=head, trainable=True)


def _attach_adapter_critic(stack: AdapterStack, start: str | None) -> None:
    head = _head_for(stack.model).to(next(stack.model.parameters()).device)
    reward = stack.roles.get("reward")
    if start is None:
        start = "policy" if reward is None else "reward"
    if start != "policy" and reward is None:
        raise UserError(
            f"critic_start={start!r} needs a reward model that is an adapter on the policy's base model, and there is "
            "none in reward_funcs: train one with LoRA on this base, or choose critic_start='policy'."
        )
    source = "policy" if start == "policy" else "reward"
    # A reward head may have no bias, but a critic's head has one.
    if start == "reward" and reward.head is not None:
        head.load_state_dict({"bias": torch.zeros(1), **reward.head.state_dict()})
    stack.attach("value", source, head=head, trainable=True)
    # The copy may include an adapter on the output embedding, which a critic does not use.
    of_critic = {id(parameter) for parameter in stack.parameters("value")}
    for parameter in stack.model.get_output_embeddings().parameters():
        if id(parameter) in of_critic:
            parameter.requires_grad_(False)


def _attach_head_critic(stack: AdapterStack) -> None:
    head = _head_for(stack.model).to(next(stack.model.parameters()).device)
    stack.model.add_module("value_head", mark_as_attached(head))
    stack.roles["value"] = Role(stack.roles["policy"].adapter, head=head)


def _head_for(model: nn.Module) -> ScalarHead:
    """A value head for the hidden states of the model: with the weights of its score head if it has one, else zeros."""
    head = ScalarHead(hidden_width(model), bias=True)
    _set_to_zero(head)
    name = head_name(model)
    if name is not None:
        scores = model.get_submodule(name).state_dict()
        if len(scores["weight"]) != 1:
            raise UserError(f"value_model has {len(scores['weight'])} labels instead of 1: load it with num_labels=1.")
        head.load_state_dict({"bias": torch.zeros(1), **scores})
    return head


def _set_to_zero(head: ScalarHead) -> None:
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)


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
    """Turns on activation checkpointing for a critic that is a separate model, which `Trainer` may not reach."""
    critic = stack.roles["value"].model if "value" in stack.roles else None
    if critic is None or not with_possible_checkpointing(args, critic, None).activation_checkpointing:
        return
    options = dict(args.activation_checkpointing_kwargs or {})
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
    scorer = RewardScorer(
        stack.model,
        load_tokenizer(str(folder)),
        mean=normalization.mean,
        std=normalization.std,
        autocast=normalization.autocast_dtype,
        adapter=attached.adapter,
        head=attached.head,
        trained_on=PromptForm.load(folder),
    )
    scorer.set_source(folder_or_repo)
    return scorer
