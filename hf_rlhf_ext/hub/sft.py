"""TRL's SFT trainer with the safe `push_to_hub` of this library."""

import copy
import os
from inspect import signature
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer, clone_chat_template

from ..data.origin import origins_of
from ..data.prompt_form import PromptForm, example_of, form_of_model, remember_form
from ..errors import UserError
from ..modeling.adapter_start import attached_or_refused, warn_of_unmatched_names
from ..modeling.adapters import autocast_dtype, bare_model, saved_as_one_adapter
from ..modeling.base_record import BaseRecord
from ..modeling.embeddings import n_rows, token_layers
from ..modeling.loading import refuse_fp16_weights, warn_of_emulated_bf16, warn_of_unscaled_fp16
from ..modeling.quantization import refuse_trained_quantized
from ..modeling.source import remember_revision
from ..modeling.vocabulary import check_token_ids
from ..publishing import (
    create_model_card,
    finish_current_push,
    new_publisher,
    push_from_checkpoint,
    push_to_hub,
    require_publisher,
    save_with_report,
    without_card,
)
from ..training.loop import all_steps_are_done
from ..training.memory_line import log_memory
from ..training.shown_table import show_table
from ..training.table import SFT_COLUMNS


class PublishingSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer` that pushes a model card, and neither pickles nor local names.

    Embeddings that were resized or trained are saved with an adapter without asking the Hub, also of a GGUF base.

    It has the arguments of `SFTTrainer`. What is pushed, and where, is set by `push_to_hub`, `hub_model_id`,
    `hub_strategy` (`end` or `every_save`) and the other options of `Trainer`.
    """

    card_kind = "sft"

    def __init__(self, *given: Any, **kwargs: Any):
        # Before `Trainer.__init__`, which creates the repository if `push_to_hub` is set.
        self.publisher = new_publisher()
        arguments = signature(SFTTrainer).bind(*given, **kwargs).arguments
        args = arguments.get("args")
        if args is not None and not isinstance(args, SFTConfig):
            raise UserError(f"args: got {type(args).__name__}: pass an SFTConfig.")
        if isinstance(arguments["model"], Path):
            arguments["model"] = str(arguments["model"])
        arguments = _with_tokens_of_template(arguments)
        peft_config = arguments.get("peft_config")
        model = arguments["model"]
        if isinstance(model, nn.Module):  # one that is given by name is loaded by TRL
            has_adapter = peft_config is not None or isinstance(model, PeftModel)
            refuse_trained_quantized(model, has_adapter=has_adapter)
        self.data_origins = origins_of(arguments.get("train_dataset"), arguments.get("eval_dataset"))
        example = _example(arguments)
        earlier_form = _earlier_form(arguments["model"])
        weights_before_cast = _trained_weights(model)
        with attached_or_refused("peft_config", arguments["model"], peft_config):
            super().__init__(**arguments)
        self._prepare_half_precision(weights_before_cast)
        log_memory(self.model, "sft", self.args)
        show_table(self, SFT_COLUMNS)
        if isinstance(arguments["model"], str):  # which was loaded inside the context
            warn_of_unmatched_names("peft_config", self.model, peft_config)
            options = self.args.model_init_kwargs or {}
            remember_revision(bare_model(self.model), arguments["model"], options.get("revision"))
        _give_wrapped_head_a_bias(self.model)
        _check_rows_of_tokens("train_dataset", self.train_dataset, self.processing_class, self.model)
        self._base_record = BaseRecord.of_model(self.model, autocast_dtype(self.args))
        self.prompt_form = PromptForm.of(example, self.processing_class).after(earlier_form)
        remember_form(self.model, self.prompt_form)

    def _prepare_half_precision(self, before: dict[str, Tensor]) -> None:
        """In fp16, puts trained weights back into fp32, which a gradient scaler needs; refuses a whole model in fp16.

        TRL casts the adapter of a quantized base to bf16, whose gradients a gradient scaler does not take.

        Args:
            before: the trained weights by name, before TRL cast them.
        """
        warn_of_emulated_bf16(self.args)
        warn_of_unscaled_fp16(self.args, self.model)
        if not self.args.fp16:
            return
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = before.get(name, parameter.data).to(parameter.device, torch.float32)
        refuse_fp16_weights(self.model)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not all_steps_are_done(self):
            super()._run_epoch(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with saved_as_one_adapter(self.model):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.prompt_form.save(output_dir or self.args.output_dir)
            if self._base_record is not None:
                self._base_record.save(output_dir or self.args.output_dir)

    # ---- The Hub, through the publisher ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Checks the token and creates the repository, before training."""
        publisher = require_publisher(self.publisher)
        self.hub_model_id = publisher.check_access(self, token=token, private=private)

    # The same for all trainers of this library.
    push_to_hub = push_to_hub
    create_model_card = create_model_card
    _push_from_checkpoint = push_from_checkpoint
    _finish_current_push = finish_current_push

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, and `report.json` with what was measured, from which `push_run` makes a card."""
        save_with_report(self, super().save_model, output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with without_card(self):
            super()._save_checkpoint(model, trial)


def _trained_weights(model: str | nn.Module) -> dict[str, Tensor]:
    """The weights of a loaded adapter that are trained, by name; none of another model, which TRL does not cast."""
    if not isinstance(model, PeftModel):
        return {}
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}


def _example(arguments: dict[str, Any]) -> str | list | None:
    """An example of the training data, from which the form that the policy is trained on is known."""
    dataset = arguments.get("train_dataset")
    is_readable = isinstance(dataset, Dataset | IterableDataset)
    if not is_readable or arguments.get("formatting_func") is not None:
        return None
    return example_of(dataset, getattr(arguments.get("args"), "dataset_text_field", "text"))


def _earlier_form(model: str | nn.Module) -> PromptForm:
    """The form that the model was trained on before, by this library."""
    return PromptForm.load(model) if isinstance(model, str) else form_of_model(model)


def _with_tokens_of_template(arguments: dict[str, Any]) -> dict[str, Any]:
    """Adds the tokens of `chat_template_path` to a model whose output head is tied to its embedding.

    For an adapter, TRL makes the new rows of the embedding and a copy of the output head trainable. On a tied model,
    PEFT 0.21 then fails in the first forward pass. There, only the rows of the embedding are made trainable, which are
    those of the head too.
    """
    model = arguments.get("model")
    args = arguments.get("args")
    peft_config = arguments.get("peft_config")
    path = getattr(args, "chat_template_path", None)
    is_base = isinstance(model, PreTrainedModel) and not isinstance(model, PeftModel)
    tokenizer = arguments.get("processing_class")
    if path is None or os.path.isfile(path) or not is_base or tokenizer is None:
        return arguments
    if not isinstance(peft_config, PeftConfig) or not model.config.get_text_config().tie_word_embeddings:
        return arguments
    if not hasattr(peft_config, "trainable_token_indices"):
        return arguments

    model, tokenizer, added_tokens = clone_chat_template(model, tokenizer, path)
    args = copy.copy(args)
    args.chat_template_path = None  # used here
    if added_tokens:
        peft_config = copy.deepcopy(peft_config)
        indices = peft_config.trainable_token_indices or {}
        embedding = token_layers(model)[0].name.rsplit(".", 1)[-1]
        if not isinstance(indices, dict):
            indices = {embedding: list(indices)}
        indices[embedding] = [*indices.get(embedding, []), *added_tokens]
        peft_config.trainable_token_indices = indices
    return arguments | {"model": model, "args": args, "processing_class": tokenizer, "peft_config": peft_config}


def _check_rows_of_tokens(name: str, dataset: Any, tokenizer: Any, model: nn.Module) -> None:
    """Raises `UserError` if a tokenized row has a token for which the model has no row."""
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    rows = n_rows(model)
    first = 0
    for batch in dataset.select_columns(["input_ids"]).with_format("arrow").iter(1000):
        largest = pc.max(pc.list_flatten(batch["input_ids"])).as_py()
        if largest is not None and largest >= rows:
            for index, ids in enumerate(batch["input_ids"].to_pylist()):
                check_token_ids(f"{name} row {first + index}", ids, tokenizer, rows)
        first += len(batch)


def _give_wrapped_head_a_bias(model: nn.Module) -> None:
    """Lets TRL 1.16 compute its loss with a tied head whose new rows are trained: it reads `bias` of the head."""
    if not isinstance(model, PeftModel):
        return
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper) and getattr(head.original_module, "bias", None) is None:
        head.bias = None  # PEFT's wrapper does not pass it on
