"""What `BradleyTerryTrainer` settles before training: model and head, tokenizer, layout, limits, precision."""

import copy
import logging
from inspect import signature
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftConfig, PeftModel, TaskType
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.collators import DataCollatorForComparisons
from ..errors import UserError
from ..modeling.adapters import bare_model
from ..modeling.heads import ScalarHead, install_fp32_score, is_encoder, position_limit, untrained_layers
from ..modeling.loading import load_base_model, load_tokenizer, warn_of_rounded_updates
from .config import BradleyTerryConfig
from .scorer import score_head, shared_prefix_problem

logger = logging.getLogger(__name__)

LARGE_MARGIN = 3.0
"""In units of reward; the largest that Llama 2 took (arXiv:2307.09288, app. A.3.3)."""


def check_head_is_trained(peft_config: PeftConfig | None) -> None:
    if peft_config is None or peft_config.task_type == TaskType.SEQ_CLS:
        return
    if not {"score", "classifier"} & set(getattr(peft_config, "modules_to_save", None) or ()):
        raise UserError(
            f"peft_config: task_type is {getattr(peft_config.task_type, 'value', peft_config.task_type)}, so PEFT "
            "would silently freeze the score head: pass task_type='SEQ_CLS'."
        )


def check_head_moves(model: nn.Module) -> None:
    if not any(p.requires_grad for p in score_head(model).parameters()):
        name = "classifier" if is_encoder(bare_model(model)) else "score"
        raise UserError(
            f"model: the score head of this {type(model).__name__} is frozen: build it with task_type='SEQ_CLS' (or "
            f"{name!r} among modules_to_save), and load a saved one with is_trainable=True."
        )


def with_saved_layers(peft_config: PeftConfig, names: list[str]) -> PeftConfig:
    """A copy of the configuration whose `modules_to_save` has these layers too."""
    found = copy.deepcopy(peft_config)
    found.modules_to_save = sorted({*(found.modules_to_save or ()), *names})
    return found


def with_revision(peft_config: PeftConfig | None, revision: str | None) -> PeftConfig | None:
    """A copy of the configuration that names this revision of the base, for whoever loads the adapter."""
    if peft_config is None or revision is None:
        return peft_config
    found = copy.copy(peft_config)
    found.revision = revision
    return found


def single_row(row: dict[str, Any], number: int) -> dict[str, Any]:
    """A demonstration (`prompt` and `completion`, or `messages`) as a comparison row of one completion, unjudged."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if "messages" in row:
        prompt, completion = row["messages"][:-1], row["messages"][-1:]
    judged = {"pairs": [], "targets": [], "weights": [], "margins": None}
    return {"prompt": prompt, "completions": [completion], "row": number} | judged


def warn_over_budget(collator: Any, rows: Dataset | None) -> None:
    """Says how many prompts `max_tokens_per_batch` does not bound, as each is at least one forward pass."""
    if rows is None or getattr(collator, "max_tokens", None) is None:
        return
    sizes = [collator.size(row) for row in rows]
    if over := [size for size in sizes if size > collator.max_tokens]:
        logger.warning(
            "max_tokens_per_batch=%d does not bound %d of %d prompts, which take up to %d tokens in one pass: raise it "
            "to what fits into memory, or judge fewer completions a prompt.",
            collator.max_tokens,
            len(over),
            len(sizes),
            max(over),
        )


def warn_of_large_margins(rows: Dataset | None, scale: float) -> None:
    """Says where the loss asks for gaps that rewards seldom have: such margins are ratings, more often than not."""
    if not isinstance(rows, Dataset) or "margins" not in rows.column_names:
        return
    largest = max((abs(margin) * scale for margins in rows["margins"] for margin in margins or ()), default=0.0)
    if largest > LARGE_MARGIN:
        logger.warning(
            "margin_scale: the loss asks for gaps of up to %.3g units of reward (σ of 3 is 0.95 already). If these are "
            "ratings, pass margin_scale=%.1g, or 0 for plain Bradley-Terry.",
            largest,
            scale / largest,
        )


def length_limit(model: nn.Module, max_length: int | None) -> int | None:
    """`max_length`, or what the model has positions for if that is less."""
    limit = min((n for n in (position_limit(model), max_length) if n), default=None)
    if max_length is not None and limit < max_length:
        logger.warning("max_length: %d instead of %d, as this model takes no more.", limit, max_length)
    return limit


def load_options(args: BradleyTerryConfig, trainer_options: dict[str, Any]) -> dict[str, Any]:
    """What loads a model that is given by its name, from where TRL's users put it."""
    quantised = trainer_options.get("quantization_config")
    given = {"quantization_config": quantised} if quantised is not None else {}
    return {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {}) | given


def resolve_model(model, processing_class, options: dict[str, Any]):
    """(model with an fp32 score head, tokenizer); `options` are those of `load_base_model`."""
    name = model
    if isinstance(model, str):
        if unknown := sorted(options.keys() - signature(load_base_model).parameters):
            raise UserError(
                f"{', '.join(unknown)}: not an option of a model given by its name: for 4 bits (NF4) pass "
                "model_init_kwargs={'load_in_4bit': True}, for all else a loaded model."
            )
        model = load_base_model(model, task="reward", **options)
    else:
        name = model.config._name_or_path
    if processing_class is None:
        known = {key: options[key] for key in ("trust_remote_code", "revision") if key in options}
        processing_class = load_tokenizer(name, **known)
    head = score_head(model)
    if isinstance(head, ModulesToSaveWrapper):
        head.original_module = _as_scalar_head(head.original_module)
        for adapter, module in head.modules_to_save.items():
            head.modules_to_save[adapter] = _as_scalar_head(module)
    elif not isinstance(model, PeftModel):
        install_fp32_score(model)
    if isinstance(model, PeftModel):
        check_head_moves(model)  # early, and again when an adapter is on
        if is_encoder(bare_model(model)):
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
    expected = virtual or is_encoder(bare_model(model)) or not PartialState().is_main_process
    logger.log(logging.INFO if expected else logging.WARNING, "layout: plain rows, since %s.", problem)
    return "plain"


def repair_fp32(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Puts adapters and head of a PEFT model back to fp32: bf16 master weights lose small updates.

    A model that is trained whole stays as it was given, with a warning.
    """
    if not isinstance(model, PeftModel):
        warn_of_rounded_updates("model", model)
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = before.get(name, parameter.data).float()
