"""The setup of `BradleyTerryTrainer` before training: model and head, tokenizer, layout, limits, precision."""

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
from ..data.templates import TEMPLATE_COLUMNS
from ..errors import UserError
from ..modeling.adapters import bare_model
from ..modeling.heads import ScalarHead, install_fp32_score, is_encoder, position_limit, untrained_layers
from ..modeling.loading import load_base_model, load_tokenizer, warn_of_rounded_updates
from .config import BradleyTerryConfig
from .prefix_probe import shared_prefix_problem
from .scores import score_head

logger = logging.getLogger(__name__)

LARGE_MARGIN = 3.0
"""The largest margin of Llama 2, in units of reward (arXiv:2307.09288, app. A.3.3)."""


@dataclass
class PreparedModel:
    """Result of `prepare_model`. `peft_config` and `args` are copies if they were changed."""

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
    """Loads a model that is given by name, makes its score head fp32, and lets an adapter save an encoder's new layers.

    The arguments are those of `BradleyTerryTrainer`.
    """
    options = load_options(args, trainer_options)
    if isinstance(model, str):
        args = copy.copy(args)
        args.model_init_kwargs = None  # used here; TRL would warn that it ignores them
        peft_config = with_revision(peft_config, options.get("revision"))
        if peft_config is None:
            options.setdefault("dtype", "float32")  # weights that are trained themselves
    model, tokenizer = resolve_model(model, tokenizer, options)
    if peft_config is not None and is_encoder(model):
        peft_config = with_saved_layers(peft_config, untrained_layers(model))
    return PreparedModel(model, tokenizer, peft_config, args)


def load_options(args: BradleyTerryConfig, trainer_options: dict[str, Any]) -> dict[str, Any]:
    """The options for loading a model that is given by name, from the arguments that TRL uses for them."""
    options = {"trust_remote_code": args.trust_remote_code}
    options |= args.model_init_kwargs or {}
    quantization_config = trainer_options.get("quantization_config")
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    return options


def resolve_model(
    model: str | PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None, options: dict[str, Any]
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Returns the model with an fp32 score head, and its tokenizer. `options` are those of `load_base_model`."""
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
        # PEFT is attached already. It has one copy of the head per adapter, besides that of the base.
        head.original_module = _as_scalar_head(head.original_module)
        for adapter, module in head.modules_to_save.items():
            head.modules_to_save[adapter] = _as_scalar_head(module)
    elif not isinstance(model, PeftModel):
        install_fp32_score(model)
    if isinstance(model, PeftModel):
        check_head_moves(model)  # early, before the data are tokenized; checked again after the adapter is attached
        if is_encoder(bare_model(model)):
            _check_layers_are_saved(model)
    return model, tokenizer


def _load_by_name(name: str, options: dict[str, Any]) -> PreTrainedModel:
    unknown = sorted(options.keys() - signature(load_base_model).parameters)
    if unknown:
        raise UserError(
            f"{', '.join(unknown)}: not supported for a model given by name: for 4 bits (NF4) pass "
            "model_init_kwargs={'load_in_4bit': True}, for other options pass a loaded model."
        )
    return load_base_model(name, task="reward", **options)


def _as_scalar_head(linear: nn.Module) -> nn.Module:
    if isinstance(linear, ScalarHead) or not isinstance(linear, nn.Linear):  # an encoder's head of several layers
        return linear
    head = ScalarHead.from_linear(linear)
    return head.requires_grad_(linear.weight.requires_grad)


def check_head_is_trained(peft_config: PeftConfig | None) -> None:
    """Raises `UserError` if PEFT would freeze the score head with this adapter configuration."""
    if peft_config is None or peft_config.task_type == TaskType.SEQ_CLS:
        return  # for sequence classification, PEFT trains and saves the head
    saved_modules = getattr(peft_config, "modules_to_save", None) or ()
    if "score" in saved_modules or "classifier" in saved_modules:
        return
    task_type = getattr(peft_config.task_type, "value", peft_config.task_type)
    raise UserError(
        f"peft_config: task_type is {task_type}, so PEFT would silently freeze the score head: pass "
        "task_type='SEQ_CLS'."
    )


def check_head_moves(model: nn.Module) -> None:
    """Raises `UserError` if the score head of the model is frozen."""
    if any(p.requires_grad for p in score_head(model).parameters()):
        return
    name = "classifier" if is_encoder(bare_model(model)) else "score"
    raise UserError(
        f"model: the score head of this {type(model).__name__} is frozen: build it with task_type='SEQ_CLS' (or "
        f"{name!r} among modules_to_save), and load a saved one with is_trainable=True."
    )


def _check_layers_are_saved(model: PeftModel) -> None:
    # A published encoder has no head. Its new layers are random, so the adapter's folder must contain them.
    saved = set(model.active_peft_config.modules_to_save or ())
    lost = sorted(set(untrained_layers(bare_model(model))) - saved)
    if lost:
        raise UserError(
            f"model: layers {', '.join(lost)} of this encoder would be initialized randomly at every load: pass "
            f"peft_config= instead, or build the PeftModel with modules_to_save={sorted(saved.union(lost))}."
        )


def with_saved_layers(peft_config: PeftConfig, names: list[str]) -> PeftConfig:
    """Returns a copy of the configuration with these layers in `modules_to_save`."""
    changed = copy.deepcopy(peft_config)
    changed.modules_to_save = sorted({*(changed.modules_to_save or ()), *names})
    return changed


def with_revision(peft_config: PeftConfig | None, revision: str | None) -> PeftConfig | None:
    """Returns a copy of the configuration with this revision of the base, which is used when the adapter is loaded."""
    if peft_config is None or revision is None:
        return peft_config
    changed = copy.copy(peft_config)
    changed.revision = revision
    return changed


def length_limit(model: nn.Module, max_length: int | None) -> int | None:
    """Returns `max_length`, or the number of positions of the model if that is smaller."""
    positions = position_limit(model)
    if not max_length or not positions:
        return max_length or positions
    if positions < max_length:
        logger.warning("max_length: reduced from %d to %d tokens, the maximum of this model.", max_length, positions)
    return min(positions, max_length)


def resolve_layout(model: nn.Module, peft_config: PeftConfig | None, requested: str, device: torch.device) -> str:
    """Returns the layout of batches; `"auto"` is the shared prefix if this model gives the same scores in it."""
    if requested == "plain":
        return "plain"
    config = peft_config
    if isinstance(model, PeftModel):
        config = model.active_peft_config
    has_virtual_tokens = config is not None and config.is_prompt_learning
    if has_virtual_tokens:
        problem = "its adapter puts virtual tokens before every row"
    else:
        problem = shared_prefix_problem(model, device)
    if problem is None:
        return "shared_prefix"

    if requested == "shared_prefix":
        raise UserError(f"layout: 'shared_prefix' is not supported by this model, as {problem}: pass layout='plain'.")
    # A decoder without the shared prefix is slower than a user may expect, so this is a warning, on one process.
    expected = has_virtual_tokens or is_encoder(bare_model(model))
    level = logging.INFO if expected or not PartialState().is_main_process else logging.WARNING
    logger.log(level, "layout: plain rows are used, since %s.", problem)
    return "plain"


def make_collator(
    tokenizer: PreTrainedTokenizerBase, args: BradleyTerryConfig, layout: str
) -> DataCollatorForComparisons:
    """The collator for the options of the trainer. It pads with eos if the tokenizer has no pad token."""
    pad_token_id = tokenizer.pad_token_id
    if pad_token_id is None:
        pad_token_id = tokenizer.eos_token_id
    return DataCollatorForComparisons(
        pad_token_id, layout=layout, pad_to_multiple_of=args.pad_to_multiple_of, max_tokens=args.max_tokens_per_batch
    )


def single_row(row: dict[str, Any], number: int) -> dict[str, Any]:
    """A demonstration (`prompt` and `completion`, or `messages`) as a comparison row with one completion, no pairs."""
    if "messages" in row:
        prompt = row["messages"][:-1]
        completion = row["messages"][-1:]
    else:
        prompt = row.get("prompt")
        completion = row.get("completion")
    comparison = {"prompt": prompt, "completions": [completion], "row": number}
    for name in TEMPLATE_COLUMNS:
        comparison[name] = row.get(name)
    return comparison | {"pairs": [], "targets": [], "weights": [], "margins": None}


def warn_over_budget(collator: Any, rows: Dataset | None) -> None:
    """Logs a warning if single prompts exceed `max_tokens_per_batch`, as each prompt is at least one forward pass."""
    if rows is None or getattr(collator, "max_tokens", None) is None:
        return
    sizes = [collator.size(row) for row in rows]
    too_large = [size for size in sizes if size > collator.max_tokens]
    if too_large:
        logger.warning(
            "max_tokens_per_batch=%d is exceeded by %d of %d prompts, which need up to %d tokens in one forward pass: "
            "raise it if memory allows, or use fewer completions per prompt.",
            collator.max_tokens,
            len(too_large),
            len(sizes),
            max(too_large),
        )


def warn_of_large_margins(rows: Dataset | None, scale: float) -> None:
    """Logs a warning if margins are larger than differences of rewards usually are, as they may be ratings."""
    if not isinstance(rows, Dataset) or "margins" not in rows.column_names:
        return
    largest = 0.0
    for margins in rows["margins"]:
        for margin in margins or ():
            largest = max(largest, abs(margin) * scale)
    if largest > LARGE_MARGIN:
        logger.warning(
            "margin_scale: the margins are up to %.3g units of reward, which is more than reward models usually reach. "
            "If they are differences of ratings, pass margin_scale=%.1g, or 0 for plain Bradley-Terry.",
            largest,
            scale / largest,
        )


def repair_fp32(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Restores adapters and head of a PEFT model to fp32, as weights in bf16 lose small updates.

    A model without adapters is not changed; if its weights are not fp32, a warning is logged.

    Args:
        model: the model of the trainer.
        before: the trainable parameters by name, before TRL cast them.
    """
    if not isinstance(model, PeftModel):
        warn_of_rounded_updates("model", model)
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = before.get(name, parameter.data).float()
