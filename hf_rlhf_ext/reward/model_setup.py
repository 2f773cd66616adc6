"""What `BradleyTerryTrainer` settles before training: model and head, tokenizer, layout, limits, precision."""

import copy
import logging
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftConfig, PeftModel, TaskType
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.collators import DataCollatorForComparisons
from ..errors import UserError
from ..modeling.adapters import bare_model
from ..modeling.heads import ScalarHead, install_fp32_score, is_encoder, position_limit, untrained_layers
from ..modeling.loading import load_base_model, load_tokenizer, warn_of_rounded_updates
from .config import BradleyTerryConfig
from .prefix_probe import shared_prefix_problem
from .scores import score_head

logger = logging.getLogger(__name__)

LARGE_MARGIN = 3.0
"""In units of reward; the largest that Llama 2 took (arXiv:2307.09288, app. A.3.3)."""


@dataclass
class PreparedModel:
    """What `prepare_model` made of the trainer's arguments; `peft_config` and `args` are copies where they changed."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    peft_config: PeftConfig | None
    args: BradleyTerryConfig


def prepare_model(
    model: str | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
    args: BradleyTerryConfig,
    trainer_options: dict[str, Any],
) -> PreparedModel:
    """Loads a model that is given by its name; gives it an fp32 score head, and an encoder's new layers to save."""
    options = load_options(args, trainer_options)
    if isinstance(model, str):
        args = copy.copy(args)
        args.model_init_kwargs = None  # used up here: TRL would warn that it ignores them
        peft_config = with_revision(peft_config, options.get("revision"))
        if peft_config is None:
            options.setdefault("dtype", "float32")  # weights that are trained themselves
    model, tokenizer = resolve_model(model, tokenizer, options)
    if peft_config is not None and is_encoder(model):
        peft_config = with_saved_layers(peft_config, untrained_layers(model))
    return PreparedModel(model, tokenizer, peft_config, args)


def load_options(args: BradleyTerryConfig, trainer_options: dict[str, Any]) -> dict[str, Any]:
    """What loads a model that is given by its name, from where TRL's users put it."""
    options = {"trust_remote_code": args.trust_remote_code}
    options |= args.model_init_kwargs or {}
    quantization_config = trainer_options.get("quantization_config")
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    return options


def resolve_model(
    model: str | PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None, options: dict[str, Any]
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """(model with an fp32 score head, tokenizer); `options` are those of `load_base_model`."""
    if isinstance(model, str):
        name = model
        model = _load_by_name(name, options)
    else:
        name = model.config._name_or_path
    if tokenizer is None:
        location = {}
        for option in ("trust_remote_code", "revision"):
            if option in options:
                location[option] = options[option]
        tokenizer = load_tokenizer(name, **location)

    head = score_head(model)
    if isinstance(head, ModulesToSaveWrapper):
        # PEFT is on already, and has one copy of the head per adapter beside the base's own.
        head.original_module = _as_scalar_head(head.original_module)
        for adapter, module in head.modules_to_save.items():
            head.modules_to_save[adapter] = _as_scalar_head(module)
    elif not isinstance(model, PeftModel):
        install_fp32_score(model)
    if isinstance(model, PeftModel):
        check_head_moves(model)  # before the data are tokenized; again when an adapter is on
        if is_encoder(bare_model(model)):
            _check_layers_are_saved(model)
    return model, tokenizer


def _load_by_name(name: str, options: dict[str, Any]) -> PreTrainedModel:
    unknown = sorted(options.keys() - signature(load_base_model).parameters)
    if unknown:
        raise UserError(
            f"{', '.join(unknown)}: not an option of a model given by its name: for 4 bits (NF4) pass "
            "model_init_kwargs={'load_in_4bit': True}, for all else a loaded model."
        )
    return load_base_model(name, task="reward", **options)


def _as_scalar_head(linear: nn.Module) -> nn.Module:
    if isinstance(linear, ScalarHead) or not isinstance(linear, nn.Linear):  # an encoder's head of several layers
        return linear
    head = ScalarHead.from_linear(linear)
    return head.requires_grad_(linear.weight.requires_grad)


def check_head_is_trained(peft_config: PeftConfig | None) -> None:
    """Raises `UserError` for an adapter configuration under which PEFT would freeze the score head."""
    if peft_config is None or peft_config.task_type == TaskType.SEQ_CLS:
        return  # for sequence classification PEFT trains and saves the head by itself
    saved_modules = getattr(peft_config, "modules_to_save", None) or ()
    if "score" in saved_modules or "classifier" in saved_modules:
        return
    task_type = getattr(peft_config.task_type, "value", peft_config.task_type)
    raise UserError(
        f"peft_config: task_type is {task_type}, so PEFT would silently freeze the score head: pass "
        "task_type='SEQ_CLS'."
    )


def check_head_moves(model: nn.Module) -> None:
    """Raises `UserError` where the model that is to be trained has a frozen score head."""
    if any(p.requires_grad for p in score_head(model).parameters()):
        return
    name = "classifier" if is_encoder(bare_model(model)) else "score"
    raise UserError(
        f"model: the score head of this {type(model).__name__} is frozen: build it with task_type='SEQ_CLS' (or "
        f"{name!r} among modules_to_save), and load a saved one with is_trainable=True."
    )


def _check_layers_are_saved(model: PeftModel) -> None:
    # A published encoder has no head: its layers are random, so that the adapter's folder must hold them.
    saved = set(model.active_peft_config.modules_to_save or ())
    lost = sorted(set(untrained_layers(bare_model(model))) - saved)
    if lost:
        raise UserError(
            f"model: layers {', '.join(lost)} of this encoder would be drawn anew at every load: pass peft_config= "
            f"instead, or build the PeftModel with modules_to_save={sorted(saved.union(lost))}."
        )


def with_saved_layers(peft_config: PeftConfig, names: list[str]) -> PeftConfig:
    """A copy of the configuration whose `modules_to_save` has these layers too."""
    changed = copy.deepcopy(peft_config)
    changed.modules_to_save = sorted({*(changed.modules_to_save or ()), *names})
    return changed


def with_revision(peft_config: PeftConfig | None, revision: str | None) -> PeftConfig | None:
    """A copy of the configuration that names this revision of the base, for whoever loads the adapter."""
    if peft_config is None or revision is None:
        return peft_config
    changed = copy.copy(peft_config)
    changed.revision = revision
    return changed


def length_limit(model: nn.Module, max_length: int | None) -> int | None:
    """`max_length`, or what the model has positions for if that is less."""
    positions = position_limit(model)
    if not max_length or not positions:
        return max_length or positions
    if positions < max_length:
        logger.warning("max_length: %d instead of %d, as this model takes no more.", positions, max_length)
    return min(positions, max_length)


def resolve_layout(model: nn.Module, peft_config: PeftConfig | None, requested: str, device: torch.device) -> str:
    """The layout of the batches; "auto" is the shared prefix where this model gives the same scores in it."""
    if requested == "plain":
        return "plain"
    config = peft_config
    if isinstance(model, PeftModel):
        config = model.active_peft_config
    has_virtual_tokens = config is not None and config.is_prompt_learning
    if has_virtual_tokens:
        problem = "virtual tokens go before every row"
    else:
        problem = shared_prefix_problem(model, device)
    if problem is None:
        return "shared_prefix"

    if requested == "shared_prefix":
        raise UserError(f"layout: 'shared_prefix' does not work with this model, {problem}: pass layout='plain'.")
    # A decoder that loses the layout is slower than its user may expect: that is a warning, once for all processes.
    expected = has_virtual_tokens or is_encoder(bare_model(model))
    level = logging.INFO if expected or not PartialState().is_main_process else logging.WARNING
    logger.log(level, "layout: plain rows, since %s.", problem)
    return "plain"


def make_collator(
    tokenizer: PreTrainedTokenizerBase, args: BradleyTerryConfig, layout: str
) -> DataCollatorForComparisons:
    """The collator of the trainer's options; pads with eos where the tokenizer has no pad token."""
    pad_token_id = tokenizer.pad_token_id
    if pad_token_id is None:
        pad_token_id = tokenizer.eos_token_id
    return DataCollatorForComparisons(
        pad_token_id, layout=layout, pad_to_multiple_of=args.pad_to_multiple_of, max_tokens=args.max_tokens_per_batch
    )


def single_row(row: dict[str, Any], number: int) -> dict[str, Any]:
    """A demonstration (`prompt` and `completion`, or `messages`) as a comparison row of one completion, unjudged."""
    if "messages" in row:
        prompt = row["messages"][:-1]
        completion = row["messages"][-1:]
    else:
        prompt = row.get("prompt")
        completion = row.get("completion")
    comparison = {"prompt": prompt, "completions": [completion], "row": number}
    return comparison | {"pairs": [], "targets": [], "weights": [], "margins": None}


def warn_over_budget(collator: Any, rows: Dataset | None) -> None:
    """Says how many prompts `max_tokens_per_batch` does not bound, as each is at least one forward pass."""
    if rows is None or getattr(collator, "max_tokens", None) is None:
        return
    sizes = [collator.size(row) for row in rows]
    too_large = [size for size in sizes if size > collator.max_tokens]
    if too_large:
        logger.warning(
            "max_tokens_per_batch=%d does not bound %d of %d prompts, which take up to %d tokens in one pass: raise it "
            "to what fits into memory, or judge fewer completions per prompt.",
            collator.max_tokens,
            len(too_large),
            len(sizes),
            max(too_large),
        )


def warn_of_large_margins(rows: Dataset | None, scale: float) -> None:
    """Says where the loss asks for gaps that rewards seldom have: such margins are ratings, more often than not."""
    if not isinstance(rows, Dataset) or "margins" not in rows.column_names:
        return
    largest = 0.0
    for margins in rows["margins"]:
        for margin in margins or ():
            largest = max(largest, abs(margin) * scale)
    if largest > LARGE_MARGIN:
        logger.warning(
            "margin_scale: the loss asks for gaps of up to %.3g units of reward (σ of 3 is 0.95 already). If these are "
            "ratings, pass margin_scale=%.1g, or 0 for plain Bradley-Terry.",
            largest,
            scale / largest,
        )


def repair_fp32(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Puts adapters and head of a PEFT model back to fp32: bf16 master weights lose small updates.

    `before` holds the trainable parameters as they were before TRL cast them. A model that is trained whole stays as it
    was given, with a warning.
    """
    if not isinstance(model, PeftModel):
        warn_of_rounded_updates("model", model)
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = before.get(name, parameter.data).float()
