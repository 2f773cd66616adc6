"""The setup of `BradleyTerryTrainer` before training: model and head, tokenizer, layout, limits, precision."""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, LargeList, List
from peft import PeftConfig, PeftModel, PeftType, TaskType
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.collators import DataCollatorForComparisons
from ..data.storage import token_counts
from ..data.templates import TEMPLATE_COLUMNS
from ..errors import UserError
from ..modeling.adapter_kinds import (
    base_change,
    is_repeatable,
    refuse_replicated_kinds,
    task_name,
    unsupported_kind,
    warn_of_fixed_ranks,
)
from ..modeling.adapters import bare_model
from ..modeling.base_check import warn_of_changed_base
from ..modeling.cache_name import accept_old_cache_name
from ..modeling.embeddings import n_rows
from ..modeling.families import check_reward_model
from ..modeling.heads import ScalarHead, install_fp32_score, is_encoder, learned_positions, untrained_layers
from ..modeling.layout_costs import ModelSizes, cheaper_layout
from ..modeling.layouts import Layout, LayoutChoice, find_layout
from ..modeling.loading import load_base_model, load_tokenizer, refuse_quantized_encoder, warn_of_rounded_updates
from ..modeling.ownership import forget_earlier_trainer
from ..modeling.partitions import make_whole
from ..modeling.quantization import prepare_quantized, refuse_trained_quantized
from ..modeling.vocabulary import check_special_tokens, check_token_ids
from ..training.activation_checkpointing import with_possible_checkpointing
from .config import BradleyTerryConfig
from .padding_probe import check_ignores_padding
from .prefix_probe import log_plain_rows
from .saved_models import is_adapter, load_trainable_adapter
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
    model: str | Path | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
    args: BradleyTerryConfig,
    trainer_options: dict[str, Any],
) -> PreparedModel:
    """Loads a model that is given by name, makes its score head fp32, and lets an adapter save an encoder's new layers.

    The arguments are those of `BradleyTerryTrainer`.
    """
    options = load_options(args, trainer_options)
    peft_config = with_reward_task(peft_config)
    if isinstance(model, Path):
        model = str(model)
    has_adapter = is_adapter(model, options.get("revision")) if isinstance(model, str) else isinstance(model, PeftModel)
    if has_adapter and peft_config is not None:
        raise UserError("peft_config was given, but the model already has an adapter: leave one of them out.")
    if isinstance(model, str):
        trainer_options.pop("quantization_config", None)  # used here; TRL would warn that it ignores it
        args = copy.copy(args)
        args.model_init_kwargs = None  # used here; TRL would warn that it ignores them
        peft_config = with_revision(peft_config, options.get("revision"))
        if peft_config is None and not has_adapter:
            options["trains_weights"] = True
            options.setdefault("dtype", "float32")  # weights that are trained themselves
    else:
        make_whole(model)  # ZeRO-3 partitions what Transformers loads, also before the trainer is made
        forget_earlier_trainer(model)
    is_loaded = isinstance(model, str)
    model, tokenizer = resolve_model(model, tokenizer, options)
    if not is_loaded:
        warn_of_changed_base("model", model, peft_config)
    refuse_trained_quantized(model, has_adapter=has_adapter or peft_config is not None)
    check_ignores_padding(model)
    if args.chat_template_path is None:  # otherwise TRL adds the tokens of the template to tokenizer and model
        check_special_tokens("processing_class", tokenizer, model)
    if peft_config is not None:
        check_adapter_kind("peft_config", peft_config)
        refuse_replicated_kinds("peft_config", peft_config, model)
    elif isinstance(model, PeftModel):
        check_adapter_kind("model", model.active_peft_config)
    if peft_config is not None and is_encoder(model):
        peft_config = with_saved_layers(peft_config, untrained_layers(model))
    accept_old_cache_name(model, peft_config)
    args = with_possible_checkpointing(args, model, peft_config)
    return PreparedModel(model, tokenizer, peft_config, args)


def load_options(args: BradleyTerryConfig, trainer_options: dict[str, Any]) -> dict[str, Any]:
    """The options for loading a model that is given by name, from the arguments that TRL uses for them."""
    options = {"trust_remote_code": args.trust_remote_code}
    options |= args.model_init_kwargs or {}
    quantization_config = trainer_options.get("quantization_config")
    if quantization_config is not None:
        if "quantization_config" in options:
            raise UserError("quantization_config is given twice: leave it out of model_init_kwargs.")
        options["quantization_config"] = quantization_config
    return options


def resolve_model(
    model: str | PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None, options: dict[str, Any]
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Returns the model with an fp32 score head, and its tokenizer. `options` are those of `load_base_model`."""
    if isinstance(model, str):
        name = model
        if is_adapter(name, options.get("revision")):
            model = load_trainable_adapter(name, **options)
            if Path(name).is_dir() and not (Path(name) / "tokenizer_config.json").is_file():
                name = bare_model(model).name_or_path  # it was saved without a tokenizer
        else:
            model = load_base_model(name, task="reward", **options)
        check_reward_model(bare_model(model))
    else:
        check_reward_model(bare_model(model))
        name = model.config._name_or_path
        prepare_quantized(model)
        refuse_quantized_encoder(bare_model(model), "model")
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
        _check_task_type(model)
        check_head_moves(model)  # early, before the data are tokenized; checked again after the adapter is attached
        if is_encoder(bare_model(model)):
            _check_layers_are_saved(model)
    return model, tokenizer


def _as_scalar_head(linear: nn.Module) -> nn.Module:
    if isinstance(linear, ScalarHead) or not isinstance(linear, nn.Linear):  # an encoder's head of several layers
        return linear
    is_trained = linear.weight.requires_grad
    return ScalarHead.from_linear(linear).requires_grad_(is_trained)


def check_head_is_trained(peft_config: PeftConfig | None) -> None:
    """Raises `UserError` if PEFT would freeze the score head with this adapter configuration."""
    if peft_config is None or peft_config.task_type == TaskType.SEQ_CLS:
        return  # for sequence classification, PEFT trains and saves the head
    saved_modules = getattr(peft_config, "modules_to_save", None) or ()
    if "score" in saved_modules or "classifier" in saved_modules:
        return
    raise UserError(
        f"peft_config: task_type is {task_name(peft_config)}, so PEFT would silently freeze the score head: pass "
        "task_type='SEQ_CLS'."
    )


def check_adapter_kind(option: str, config: PeftConfig) -> None:
    """Raises `UserError` if an adapter of this kind would not be loaded as it was trained.

    Args:
        option: name of the argument that the adapter comes from, for the message.
        config: its configuration.
    """
    problem = unsupported_kind(config, shares_base=False)
    if problem is not None:
        raise UserError(f"{option}: {problem}: use LoRA.")
    if not config.is_prompt_learning and not hasattr(config, "modules_to_save"):
        raise UserError(
            f"{option}: PEFT trains no score head beside adapters of type {config.peft_type.value}: use another kind, "
            "such as LoRA (with trainable_token_indices for single tokens)."
        )
    warn_of_fixed_ranks(option, config)
    if not is_repeatable(config):
        raise UserError(
            f"{option}: {base_change(config)} changes the base in a way that is not repeated when the saved adapter is "
            "loaded: use init_lora_weights='pissa' or 'olora'."
        )


def with_reward_task(peft_config: PeftConfig | None) -> PeftConfig | None:
    """Returns the configuration, or a copy for sequence classification if it is for another task.

    With the score head in `modules_to_save`, PEFT trains the head, but wraps the model for that other task, such as for
    generation. A configuration without a task type needs no change.
    """
    if peft_config is None or peft_config.task_type in (None, TaskType.SEQ_CLS):
        return peft_config
    logger.warning(
        "peft_config: task_type is %s, and a reward model needs SEQ_CLS, which is used.", task_name(peft_config)
    )
    changed = copy.deepcopy(peft_config)
    changed.task_type = TaskType.SEQ_CLS
    return changed


def _check_task_type(model: PeftModel) -> None:
    """Raises `UserError` if the adapter of a model is made for another kind of output, such as answers to questions."""
    config = model.active_peft_config
    if config.task_type in (TaskType.QUESTION_ANS, TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM):
        raise UserError(
            f"model: the task_type of its adapter is {task_name(config)}: build it with task_type='SEQ_CLS'."
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
    positions = learned_positions(model)
    if not max_length or not positions:
        return max_length or positions
    if positions < max_length:
        logger.warning("max_length: reduced from %d to %d tokens, the maximum of this model.", max_length, positions)
    return min(positions, max_length)


def resolve_layout(
    model: nn.Module, peft_config: PeftConfig | None, requested: str, device: torch.device
) -> LayoutChoice:
    """Returns the best layout of batches that is requested and that this model computes.

    A model that can is set to attention by segments. What is used is logged, except where `layout_by_cost` decides.

    Args:
        model: the reward model.
        peft_config: configuration of an adapter that will be added; `None` without one.
        requested: the option `layout`.
        device: device of training.

    Raises:
        UserError: if `"shared_prefix"` is requested and not supported.
    """
    if requested == "plain":
        return LayoutChoice(Layout.PLAIN)
    has_virtual_tokens = False
    if peft_config is not None:  # an adapter that the model has already is tested with it
        has_virtual_tokens = peft_config.is_prompt_learning
    elif isinstance(model, PeftModel):
        has_virtual_tokens = model.active_peft_config.is_prompt_learning
    if has_virtual_tokens:
        choice = LayoutChoice(Layout.PLAIN, "its adapter puts virtual tokens before every row")
    else:
        # It hands its second model the mask, but not the plan, and is not there yet when the layout is tested.
        is_shadow = peft_config is not None and peft_config.peft_type == PeftType.SHADOW
        choice = find_layout(model, device, may_segment=not is_shadow)
        if is_shadow and choice.layout == Layout.MASK:
            choice = LayoutChoice(Layout.MASK, "ShadowPEFT computes with a second model")

    if choice.layout == Layout.PLAIN and requested == "shared_prefix":
        raise UserError(
            f"layout: 'shared_prefix' is not supported by this model, as {choice.reason}: pass layout='plain'."
        )
    if choice.layout == Layout.PLAIN:
        message = f"layout: plain rows are used, since {choice.reason}."
        log_plain_rows(model, message, is_expected=has_virtual_tokens)
    elif choice.layout == Layout.SEGMENTS:
        logger.info("layout: the completions of a prompt share it, with attention by segments.")
    elif requested == "shared_prefix":
        logger.info("layout: the completions of a prompt share it, with a mask, since %s.", choice.reason)
    return choice


def layout_by_cost(choice: LayoutChoice, model: nn.Module, args: BradleyTerryConfig, rows: Dataset) -> Layout:
    """Returns the layout of `resolve_layout`, or plain rows where the layout with a mask would take longer.

    Attention by segments is not slower than plain rows, and `"shared_prefix"` is what the user wants.

    Args:
        choice: the result of `resolve_layout`.
        model: the reward model.
        args: options of the trainer.
        rows: the tokenized training set.
    """
    if choice.layout != Layout.MASK or args.layout != "auto":
        return choice.layout
    # With a budget of tokens, prompts of similar length are together, so that little is padded.
    together = args.per_device_train_batch_size if args.max_tokens_per_batch is None else 1
    cheaper, ratio = cheaper_layout(choice.layout, ModelSizes.of(model), token_counts(rows), together)
    logger.info(
        "layout: %s, as a mask is needed to share prompts (%s), which takes an estimated %.2g times as long as plain "
        "rows.",
        "plain rows are used" if cheaper == Layout.PLAIN else "the completions of a prompt share it",
        choice.reason,
        ratio,
    )
    return cheaper


def longest_row(rows: Dataset) -> dict[str, int]:
    """The lengths of the longest row, and the most completions of a prompt, by the names in the planner's `Setup`."""
    counts = token_counts(rows)
    longest = int((counts.prompt + counts.longest).argmax())
    return {
        "prompt_tokens": int(counts.prompt[longest]),
        "completion_tokens": int(counts.longest[longest]),
        "per_prompt": int(counts.n_completions.max()),
    }


def make_collator(
    tokenizer: PreTrainedTokenizerBase, args: BradleyTerryConfig, layout: Layout
) -> DataCollatorForComparisons:
    """The collator for the options of the trainer. It pads with eos if the tokenizer has no pad token."""
    pad_token_id = tokenizer.pad_token_id
    if pad_token_id is None:
        pad_token_id = tokenizer.eos_token_id
    return DataCollatorForComparisons(
        pad_token_id,
        layout=name_of_layout(layout),
        pad_to_multiple_of=args.pad_to_multiple_of,
        max_tokens=args.max_tokens_per_batch,
        one_row=layout == Layout.SEGMENTS,
    )


def name_of_layout(layout: Layout) -> str:
    """The name that a layout has in the option `layout` and in saved files."""
    return "plain" if layout == Layout.PLAIN else "shared_prefix"


def check_rows_of_tokens(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel, *, source: str
) -> None:
    """Raises `UserError` if tokenized comparisons have a token for which the model has no row.

    Args:
        dataset: the tokenized comparisons.
        tokenizer: the tokenizer.
        model: the reward model.
        source: name of the dataset, for the message.
    """
    rows = n_rows(model)
    numbers = dataset["row"] if "row" in dataset.column_names else range(len(dataset))  # those of the given dataset
    first = 0
    for batch in dataset.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow").iter(1000):
        prompts = pc.list_flatten(batch["prompt_ids"])
        completions = pc.list_flatten(pc.list_flatten(batch["completion_ids"]))
        largest = max(pc.max(ids).as_py() or 0 for ids in (prompts, completions))
        if largest >= rows:
            pairs = zip(batch["prompt_ids"].to_pylist(), batch["completion_ids"].to_pylist(), strict=True)
            for index, (prompt, of_row) in enumerate(pairs):
                ids = prompt + [token for completion in of_row for token in completion]
                check_token_ids(f"dataset {source!r} row {numbers[first + index]}", ids, tokenizer, rows)
        first += len(batch)


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
    sizes = collator.sizes(rows)
    too_large = sizes[sizes > collator.max_tokens]
    if len(too_large):
        logger.warning(
            "max_tokens_per_batch=%d is exceeded by %d of %d prompts, which need up to %d tokens in one forward pass: "
            "raise it if memory allows, or use fewer completions per prompt.",
            collator.max_tokens,
            len(too_large),
            len(sizes),
            too_large.max(),
        )


def warn_of_large_margins(rows: Dataset | None, scale: float) -> None:
    """Logs a warning if margins are larger than differences of rewards usually are, as they may be ratings."""
    if not isinstance(rows, Dataset) or not isinstance(rows.features.get("margins"), List | LargeList):
        return
    largest = 0.0
    for batch in rows.select_columns("margins").with_format("arrow").iter(1000):
        margins = pc.abs(pc.list_flatten(batch["margins"]))
        largest = max(largest, (pc.max(margins).as_py() or 0.0) * scale)
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
