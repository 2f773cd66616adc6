"""What `BradleyTerryTrainer` settles before training: model and head, tokenizer, layout, limits, precision."""

import copy
import logging

import torch
from peft import PeftConfig, PeftModel, TaskType
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.collators import DataCollatorForComparisons
from ..errors import UserError
from ..modeling.adapters import bare_model
from ..modeling.heads import ScalarHead, install_fp32_score, is_encoder, position_limit, untrained_layers
from ..modeling.loading import load_base_model, load_tokenizer
from .config import BradleyTerryConfig
from .scorer import score_head, shared_prefix_problem

logger = logging.getLogger(__name__)


def check_head_is_trained(peft_config: PeftConfig | None) -> None:
    if peft_config is None or peft_config.task_type == TaskType.SEQ_CLS:
        return
    if not {"score", "classifier"} & set(getattr(peft_config, "modules_to_save", None) or ()):
        raise UserError(
            f"peft_config: task_type is {getattr(peft_config.task_type, 'value', peft_config.task_type)}, so PEFT "
            "would silently freeze the score head: pass task_type='SEQ_CLS'."
        )


def with_saved_layers(peft_config: PeftConfig, names: list[str]) -> PeftConfig:
    """A copy of the configuration whose `modules_to_save` has these layers too."""
    found = copy.deepcopy(peft_config)
    found.modules_to_save = sorted({*(found.modules_to_save or ()), *names})
    return found


def length_limit(model: nn.Module, max_length: int | None) -> int | None:
    """`max_length`, or what the model has positions for if that is less."""
    limit = min((n for n in (position_limit(model), max_length) if n), default=None)
    if max_length is not None and limit < max_length:
        logger.warning("max_length: %d instead of %d, as this model takes no more.", limit, max_length)
    return limit


def resolve_model(model, processing_class, args: BradleyTerryConfig):
    """(model with an fp32 score head, tokenizer)."""
    name = model if isinstance(model, str) else model.config._name_or_path
    if isinstance(model, str):
        options = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
        args.model_init_kwargs = None  # used up here: TRL would warn that it ignores them
        model = load_base_model(model, task="reward", **options)
    if processing_class is None:
        processing_class = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    head = score_head(model)
    if isinstance(head, ModulesToSaveWrapper):
        head.original_module = _as_scalar_head(head.original_module)
        for adapter, module in head.modules_to_save.items():
            head.modules_to_save[adapter] = _as_scalar_head(module)
    elif not isinstance(model, PeftModel):
        install_fp32_score(model)
    if isinstance(model, PeftModel) and not any(p.requires_grad for p in head.parameters()):
        raise UserError(
            "model: the score head of this PeftModel is frozen: build it with task_type='SEQ_CLS', and load a saved "
            "one with is_trainable=True."
        )
    if isinstance(model, PeftModel) and is_encoder(bare_model(model)):
        _check_layers_are_saved(model)
    return model, processing_class


def _check_layers_are_saved(model: PeftModel) -> None:
    kept = set(model.active_peft_config.modules_to_save or ())
    if lost := sorted(set(untrained_layers(bare_model(model))) - kept):
        raise UserError(
            f"model: layers {', '.join(lost)} of this encoder would be drawn anew at every load: pass peft_config= "
            f"instead, or build the PeftModel with modules_to_save={sorted(kept.union(lost))}."
        )


def _as_scalar_head(linear: nn.Module) -> nn.Module:
    if isinstance(linear, ScalarHead) or not isinstance(linear, nn.Linear):  # an encoder's head of several layers
        return linear
    head = ScalarHead.from_linear(linear)
    return head.requires_grad_(linear.weight.requires_grad)


def make_collator(
    tokenizer: PreTrainedTokenizerBase, args: BradleyTerryConfig, layout: str
) -> DataCollatorForComparisons:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return DataCollatorForComparisons(
        pad, layout=layout, pad_to_multiple_of=args.pad_to_multiple_of, max_tokens=args.max_tokens_per_batch
    )


def resolve_layout(model: nn.Module, peft_config: PeftConfig | None, asked: str, device: torch.device) -> str:
    """The layout of the batches; "auto" is the shared prefix where this model gives the same scores in it."""
    if asked == "plain":
        return asked
    config = model.active_peft_config if isinstance(model, PeftModel) else peft_config
    virtual = config is not None and config.is_prompt_learning
    problem = "virtual tokens go before every row" if virtual else shared_prefix_problem(model, device)
    if problem is None:
        return "shared_prefix"
    if asked == "shared_prefix":
        raise UserError(f"layout: 'shared_prefix' does not work with this model, {problem}: pass layout='plain'.")
    logger.info("layout: plain rows, since %s.", problem)
    return "plain"


def repair_fp32(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Puts adapters and head of a PEFT model back to fp32: bf16 master weights lose small updates."""
    if not isinstance(model, PeftModel):
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = before.get(name, parameter.data).float()
