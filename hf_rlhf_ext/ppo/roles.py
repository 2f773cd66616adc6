"""Who computes what in PPO: policy, reference, critic and reward, on one base wherever they can share it."""

import copy
import logging
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..errors import UserError
from ..modeling.heads import ScalarHead, head_name
from ..modeling.loading import adapter_base, load_policy, load_tokenizer, warn_of_rounded_updates
from ..modeling.stack import AdapterStack, Role
from ..reward.scorer import RewardNormalization, RewardScorer, local_folder

logger = logging.getLogger(__name__)


def load_trainable(
    name: str, peft_config: PeftConfig | None, **options
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """`load_policy` for training: fp32 where the whole model is trained, the machine's dtype under an adapter."""
    whole = peft_config is None and adapter_base(name) is None
    return load_policy(name, is_trainable=True, **options, **({"dtype": "float32"} if whole else {}))


def build_stack(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> AdapterStack:
    """The policy, ready to be trained, and its reference.

    A `PeftModel` is trained further, with a frozen copy of its active adapter as the reference (the SFT policy). A
    base model with `peft_config` gets a new adapter, and the reference is the bare base. A base model alone is trained
    whole, with a frozen copy as the reference.
    """
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise UserError("peft_config was given, but the model has an adapter already: leave one of them out.")
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


def attach_critic(stack: AdapterStack, kind: str | None, *, value_model: nn.Module | None = None) -> str:
    """Adds the role "value" with an fp32 head and returns the kind of critic: adapter, head or model.

    The critic starts as the reward model where that is an adapter on the same base (InstructGPT, sec. 3.5), its head
    scaled to normalised rewards; else from the policy, with a head of zeros: the right first guess where rewards have
    mean zero.
    """
    has_adapter = isinstance(stack.model, PeftModel)
    kind = kind or ("model" if value_model is not None else "adapter" if has_adapter else "head")
    if kind == "adapter" and not has_adapter:
        raise UserError(
            "critic='adapter' needs a policy that is an adapter: pass peft_config, or choose head or model."
        )
    if value_model is not None and kind != "model":
        raise UserError(f"value_model was given, but critic={kind!r}: choose critic='model', or leave it out.")
    if kind == "model":
        if value_model is None and has_adapter:
            raise UserError("critic='model' needs value_model=: with an adapter as the policy there is none to copy.")
        if value_model is None:
            value_model = copy.deepcopy(stack.model)
        elif getattr(value_model, "is_quantized", False):
            raise UserError("value_model is trained whole, which quantised weights cannot be: load it in fp32.")
        else:
            warn_of_rounded_updates("value_model", value_model)
        config = value_model.config.get_text_config()
        if config.pad_token_id is None:
            config.pad_token_id = 0  # sequence classification refuses batches without; its own pooling is not read
        attached = {name for role in stack.roles for name in (f"{role}_head", f"{role}_model")}
        for name in attached & dict(value_model.named_children()).keys():
            delattr(value_model, name)
        stack.attach("value", value_model, head=_head_for(value_model), trainable=True)
    elif kind == "adapter":
        reward = stack.roles.get("reward")
        head = _head_for(stack.model)
        if reward is not None and reward.head is not None:
            head.load_state_dict({"bias": torch.zeros(1), **reward.head.state_dict()})
        stack.attach("value", "policy" if reward is None else "reward", head=head, trainable=True)
        for name, parameter in stack.model.get_output_embeddings().named_parameters():
            parameter.requires_grad_(parameter.requires_grad and ".value." not in f".{name}.")  # a critic has no use
    else:
        head = _head_for(stack.model).to(next(stack.model.parameters()).device)
        stack.model.add_module("value_head", head)
        stack.roles["value"] = Role(stack.roles["policy"].adapter, head=head)
    return kind


def checkpoint_critic(stack: AdapterStack, args: TrainingArguments) -> None:
    """Turns gradient checkpointing on in a critic of its own: beside an adapter, Trainer reaches the base only."""
    critic = stack.roles["value"].model
    if critic is None or not args.gradient_checkpointing:
        return
    options = dict(args.gradient_checkpointing_kwargs or {})
    which = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    enable = getattr(critic, "activation_checkpointing_enable", None) or critic.gradient_checkpointing_enable
    enable(options or None, **which)


def _head_for(model: nn.Module) -> ScalarHead:
    """A head of zeros for the model's hidden states; of the score head's weights where the model has one."""
    head = ScalarHead(model.config.get_text_config().hidden_size, bias=True)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    name = head_name(model)
    if name is not None:
        scores = model.get_submodule(name).state_dict()
        if len(scores["weight"]) != 1:
            raise UserError(f"value_model has {len(scores['weight'])} labels: load it with num_labels=1.")
        head.load_state_dict({"bias": torch.zeros(1), **scores})
    return head


def shared_reward(stack: AdapterStack, folder_or_repo: str | Path) -> RewardScorer | None:
    """The reward adapter in that folder as a role on the policy's base; None where it needs a base of its own.

    That is a whole model, an ensemble, an adapter of another base, or one that was trained on weights of another
    precision, whose scores would differ.
    """
    if not isinstance(stack.model, PeftModel):
        return None
    folder = local_folder(folder_or_repo, None)
    if not (folder / "adapter_config.json").is_file():
        return None
    base = stack.model.get_base_model()
    config, recorded = PeftConfig.from_pretrained(str(folder)), RewardNormalization.load(folder)
    if config.task_type == TaskType.CAUSAL_LM or not _same(adapter_base(str(folder)), base.config.name_or_path):
        return None
    if config.peft_type != stack.model.active_peft_config.peft_type:
        return None
    recorded = recorded or RewardNormalization()
    quantized = bool(getattr(base, "is_quantized", False))
    dtype = str(base.dtype).removeprefix("torch.")
    if recorded.load_in_4bit != quantized or (not quantized and recorded.base_dtype not in ("auto", dtype)):
        logger.warning(
            "%s was trained on %s weights, the policy has %s: loaded beside it, on a base of its own.",
            folder_or_repo,
            "4-bit" if recorded.load_in_4bit else recorded.base_dtype,
            "4-bit" if quantized else dtype,
        )
        return None
    role = "reward" if "reward" not in stack.roles else f"reward_{len(stack.roles)}"
    attached = stack.attach(role, folder)
    if attached.head is None:
        raise UserError(f"{folder_or_repo}: the adapter has no score head: train it with BradleyTerryTrainer.")
    autocast = getattr(torch, recorded.autocast) if recorded.autocast else None
    options = {"mean": recorded.mean, "std": recorded.std, "autocast": autocast, "head": attached.head}
    return RewardScorer(stack.model, load_tokenizer(str(folder)), adapter=attached.adapter, **options)


def scale_critic(stack: AdapterStack, mean: float, std: float, weight: float) -> None:
    """Scales a value head that was copied from a reward head to what PPO sees: weight·(score − mean)/std."""
    head = stack.roles["value"].head
    with torch.no_grad():
        head.weight.mul_(weight / std)
        head.bias.sub_(mean).mul_(weight / std)


def _same(first: str | None, second: str) -> bool:
    """Whether two names of base models are one: equal, or two paths of the same folder."""
    if first is None or first == second:
        return first == second
    paths = [Path(name).expanduser() for name in (first, second)]
    return all(path.is_dir() for path in paths) and paths[0].resolve() == paths[1].resolve()
