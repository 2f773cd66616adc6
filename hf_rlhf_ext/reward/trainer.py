"""`BradleyTerryTrainer`: reward models from pairs and K-wise comparisons."""

import copy
import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import ClassLabel, Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PredictionOutput, TrainOutput
from trl import RewardTrainer

from ..checkpointing import resolve_checkpoint
from ..data.given import as_dataset, as_datasets, as_python
from ..data.json_columns import without_arrow_fill
from ..data.origin import origins_of
from ..data.preparation import prepare_comparisons
from ..data.prompt_form import PromptForm, remember_form
from ..data.schema import LoadReport, dataset_of
from ..data.storage import token_counts
from ..data.tokenization import CATEGORY_CODE, TOKENIZED_COLUMNS, Tokenization, tokenize_comparisons
from ..data.trl_rows import warn_of_nan_margins
from ..errors import UserError
from ..modeling.adapter_start import attached_or_refused
from ..modeling.adapters import autocast_dtype, bare_model, mixed_precision, saved_as_one_adapter
from ..modeling.base_record import BaseRecord, check_same_base
from ..modeling.loading import refuse_fp16_weights, warn_of_unscaled_fp16
from ..modeling.quantization import quantization_record
from ..modeling.vocabulary import check_special_tokens
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
from ..training.arguments import check_arguments
from ..training.auto_batch import TOKENS, OptimizerStep, sizes_of_run
from ..training.bars import Advance, no_bars, progress_bar
from ..training.best_model import check_evaluated_metric, check_metric_name
from ..training.engines import check_active_engine
from ..training.loop import all_steps_are_done, end_of_training, forget_unscaled_gradients, log_last_steps
from ..training.memory_line import RunMemory, log_memory
from ..training.optimizers import (
    check_lists_of_schedule,
    check_weights,
    made_by,
    plain_optimizer,
    use_evaluation_weights,
)
from ..training.shown_table import show_table
from ..training.table import REWARD_MODEL_COLUMNS
from .asked import form_of_reward_model
from .config import BradleyTerryConfig
from .even_batches import (
    average_gradients,
    even_out,
    has_shards,
    is_counted,
    largest_counts,
    micro_batches_of,
    weight_repeated_rows_zero,
    without_reduction,
)
from .kept_rows import RowKeepingCollator, split
from .labels import LABEL_FIELDS, EvaluatedPairs, join_batches, pad_by_prompt, pair_labels, stack_padded
from .losses import bradley_terry_loss, centering_penalty, rank_prompts, smooth_targets, tie_model_loss
from .meter import TrainMeter
from .model_setup import (
    check_head_is_trained,
    check_head_moves,
    check_rows_of_tokens,
    layout_by_cost,
    length_limit,
    longest_row,
    make_collator,
    name_of_layout,
    prepare_model,
    repair_fp32,
    resolve_layout,
    single_row,
    warn_of_large_margins,
    warn_over_budget,
)
from .normalization import RewardNormalization, dtype_name, is_4bit
from .preference_metrics import METRIC_NAMES, JudgedPairs
from .resume import load_weights, refuse_other_checkpoint
from .scorer import RewardScorer
from .scores import score_batch
from .sharded_runs import check_sharded_run, keep_own_precision, require_prepared, saves_in_shards
from .trainer_options import ENGINES, check_special_token_options

__all__ = ["LABEL_FIELDS", "BradleyTerryTrainer"]

logger = logging.getLogger(__name__)


class BradleyTerryTrainer(RewardTrainer):
    """TRL's `RewardTrainer` for comparisons of K completions with weights, soft targets and ties.

    The loss is Σ w·nll / Σ w over all pairs of the optimizer step, so that it does not depend on the split into
    micro-batches and processes. A saved model gives exactly the same scores when it is loaded again.

    Args:
        model: a sequence-classification model with one label (`load_base_model(..., task="reward")`), a `PeftModel` of
            one, or a name or path for `load_base_model`, such as the embedded model. The path of a reward adapter is
            loaded on its base as it was trained, and trained further.
        args: options; `None` means `BradleyTerryConfig("reward_model")`.
        train_dataset: dataset of comparison rows or of preference rows in TRL's formats. Read other formats with
            `load_comparisons`. Instead of a `Dataset`, all datasets may be lists of rows, a `pandas.DataFrame`, or a
            `torch.utils.data.Dataset` of rows.
        eval_dataset: dataset of the same kind, or a dict of several.
        processing_class: the tokenizer; loaded with the model if left out.
        peft_config: PEFT configuration of a new adapter, with `task_type="SEQ_CLS"`.
        normalization_dataset: dataset on which mean and standard deviation of the scores are measured after training:
            demonstrations (`prompt` and `completion`, or `messages`) as in InstructGPT, or comparisons. `None` means
            the completions of `train_dataset`.
        compute_metrics: function that computes further metrics from scores (B, Kmax) and labels (B, Pmax, 7), see
            `LABEL_FIELDS`.
        data_collator: `None` means `DataCollatorForComparisons` with the options in `args`.
        callbacks: as in `transformers.Trainer`.
        trainer_options: further arguments of `RewardTrainer`, such as `optimizers`.

    Attributes:
        data_reports: for each dataset, which rows were dropped or cut, and why.
        data_origins: where the rows of each dataset come from.
        normalization: mean and standard deviation of the scores, and the precision of training.
        prompt_form: whether it is trained on text or messages, and with which chat template.
        layout: layout of batches in use, `plain` or `shared_prefix`.

    Raises:
        UserError: if an argument, an option or a row is not usable; the message says how to fix it.
    """

    card_kind = "reward_model"
    # `compute_loss` scales the loss, so `Trainer` must not divide it by the number of accumulation steps.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        args: BradleyTerryConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        normalization_dataset: Dataset | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        data_collator: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **trainer_options: Any,
    ):
        args = args or BradleyTerryConfig(output_dir="reward_model")
        if not isinstance(args, BradleyTerryConfig):
            raise UserError(f"args: got {type(args).__name__}: pass a BradleyTerryConfig.")
        check_arguments(
            args,
            eval_dataset,
            callbacks,
            trainer_options.get("optimizers", (None, None)),
            trainer_options.get("optimizer_cls_and_kwargs"),
        )
        check_sharded_run(args, trainer_options.get("optimizers", (None, None)))
        if train_dataset is None:
            raise UserError("train_dataset is required: pass a dataset of comparisons.")
        train_dataset = as_dataset(train_dataset, "train_dataset")
        eval_dataset = as_datasets(eval_dataset, "eval_dataset")
        normalization_dataset = as_dataset(normalization_dataset, "normalization_dataset")
        check_head_is_trained(peft_config)
        set_seed(args.seed)  # a new head is initialized when the model is loaded
        prepared = prepare_model(model, processing_class, peft_config, args, trainer_options)
        check_special_token_options(args, prepared.tokenizer.get_vocab())
        earlier_form = form_of_reward_model(prepared.model)
        memory = log_memory(prepared.model, "reward", args, peft_config=prepared.peft_config)

        # The parent's constructor calls methods that need these.
        self.publisher = new_publisher()
        layouts = resolve_layout(prepared.model, prepared.peft_config, args.layout, args.device)
        self.layout = name_of_layout(layouts.layout)
        self.max_length = length_limit(prepared.model, args.max_length)
        self.data_reports: dict[str, LoadReport] = {}
        self.data_origins = origins_of(train_dataset, eval_dataset, normalization=normalization_dataset)
        self.judged: JudgedPairs | None = None  # of the last evaluation, for plots
        self.judged_by_best: JudgedPairs | None = None  # of the evaluation of the best checkpoint
        self._category_codes: dict[str, int] = {}
        self._first_prompt: str | list | None = None  # None if the training data are tokenized already
        self._sized_model = prepared.model  # its embedding has rows for the tokens of the data
        self._user_metrics = compute_metrics
        self._meter = TrainMeter()
        # TRL casts trainable parameters of quantized models to bf16, even those of a trained adapter. Keep the
        # originals.
        weights_before_cast = {name: p.data for name, p in prepared.model.named_parameters() if p.requires_grad}
        with attached_or_refused("peft_config", prepared.model, prepared.peft_config):
            super().__init__(
                model=prepared.model,
                args=prepared.args,
                data_collator=data_collator or make_collator(prepared.tokenizer, args, layouts.layout),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=prepared.tokenizer,
                compute_metrics=self._preference_metrics,
                callbacks=callbacks,
                peft_config=prepared.peft_config,
                **trainer_options,
            )
        if data_collator is None:
            layout = layout_by_cost(layouts, prepared.model, args, self.train_dataset)
            self.layout = name_of_layout(layout)
            self.data_collator = make_collator(prepared.tokenizer, args, layout)
        check_active_engine(args, self.accelerator, "BradleyTerryTrainer", ENGINES)
        keep_own_precision(self.args, self.accelerator)
        self._prepare_auto_batch(memory, has_own_collator=data_collator is not None)
        show_table(self, REWARD_MODEL_COLUMNS)
        repair_fp32(self.model, weights_before_cast)
        self._check_final_model()
        self._base_record = BaseRecord.of_model(self.model, self._autocast_dtype)
        self.prompt_form = PromptForm.of(self._first_prompt, prepared.tokenizer).after(earlier_form)
        remember_form(self.model, self.prompt_form)
        self.normalization = self._current_normalization()
        self._normalization_rows = self._prepare_normalization(normalization_dataset)

        self._checked_optimizer: torch.optim.Optimizer | None = None  # the one that `create_optimizer` has checked
        if self.optimizer is not None:
            self.create_optimizer()
        self._check_metric_name()

    def _prepare_auto_batch(self, memory: RunMemory | None, *, has_own_collator: bool) -> None:
        """Makes what `auto_batch` needs; without it, passes have the sizes of the options."""
        plan = None if memory is None else lambda: memory.sizes(layout=self.layout, **longest_row(self.train_dataset))
        self.sizes = sizes_of_run(self.args, self.accelerator, plan)
        self._optimizer_step = OptimizerStep(self.sizes, self.model, self.accelerator.device, self._counters)
        self._batches: list[dict[str, Any]] = []  # of the current optimizer step, with auto_batch
        self._total_weight: Tensor | None = None
        if self.sizes.enabled and has_own_collator:
            raise UserError(
                "auto_batch splits the batches of the trainer's own collator: leave data_collator or auto_batch out."
            )

    def _check_final_model(self) -> None:
        """Checks that need the model with its adapter and the tokenized data."""
        if self.args.fp16:
            refuse_fp16_weights(self.model)
        warn_of_unscaled_fp16(self.args, self.model)
        check_head_moves(self.model)
        check_special_tokens("processing_class", self.processing_class, self.model)
        warn_over_budget(self.data_collator, self.train_dataset)
        if self.sizes.enabled:
            self.data_collator = RowKeepingCollator(self.data_collator)
        warn_of_large_margins(self.train_dataset, self.args.margin_scale)

    def _check_metric_name(self) -> None:
        """Refuses a `metric_for_best_model` that no evaluation can have."""
        check_metric_name(
            self.args,
            self.eval_dataset,
            METRIC_NAMES,
            may_exist=lambda name: name.startswith("accuracy/") or self._user_metrics is not None,
        )

    # ---- Optimizer ----

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of `Trainer`, or that of the user if it holds the weights that are trained."""
        optimizer, _ = made_by(self, lambda: super(BradleyTerryTrainer, self).create_optimizer(*args, **kwargs))
        plain = plain_optimizer(optimizer)
        if plain is not self._checked_optimizer:
            trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            check_weights(plain, trained, self.model, whose="reward model")
            check_lists_of_schedule(self.args, plain)
            self._checked_optimizer = plain
        return optimizer

    # ---- Data ----

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        dataset = as_dataset(dataset, f"dataset {dataset_name!r}")
        if isinstance(dataset, Dataset):
            dataset = as_python(dataset)
        if isinstance(dataset, Dataset) and set(TOKENIZED_COLUMNS) <= set(dataset.column_names):
            # Already tokenized by a trainer, such as a subset of the evaluation set that is passed to `evaluate`.
            return self._with_own_category_codes(dataset)
        if isinstance(dataset, Dataset):
            warn_of_nan_margins(dataset, source=dataset_name)
        tokenization = self._tokenization(processing_class, args)
        # One process of each machine prepares the rows, and the others read them.
        with args.main_process_first(desc=f"{dataset_name} dataset"), self._preparation_bar(dataset, args) as advance:
            prepared = prepare_comparisons(
                dataset, tokenization, source=dataset_name, num_proc=args.dataset_num_proc, advance=advance
            )
        if dataset_name == "train":
            self._first_prompt = prepared.first_prompt
        self._report(prepared.report)
        rows = prepared.rows
        if "category" in rows.column_names:
            for name in prepared.categories:
                self._code_of(name)
            names = [name for batch in rows.select_columns("category").iter(1000) for name in batch["category"]]
            rows = self._with_category_codes(rows.remove_columns("category"), names)
        check_rows_of_tokens(rows, processing_class, self._sized_model, source=dataset_name)
        return rows

    def _tokenization(self, tokenizer: PreTrainedTokenizerBase, args: BradleyTerryConfig) -> Tokenization:
        return Tokenization(
            tokenizer, max_length=self.max_length, overflow=args.overflow, unrenderable=args.unrenderable
        )

    def _report(self, report: LoadReport) -> None:
        level = logging.WARNING if report.dropped or report.flagged else logging.INFO
        logger.log(level, report.summary())
        self.data_reports[report.source] = report

    @contextmanager
    def _preparation_bar(self, dataset: Dataset, args: BradleyTerryConfig) -> Iterator[Advance]:
        with (
            no_bars(when=args.disable_tqdm or args.local_process_index > 0),
            progress_bar("Preparing the data", len(dataset)) as advance,
        ):
            yield advance

    def _with_own_category_codes(self, dataset: Dataset) -> Dataset:
        """Tokenized rows with the category codes of this trainer, as they may come from another trainer."""
        if CATEGORY_CODE not in dataset.column_names:
            return dataset
        names = dataset.features[CATEGORY_CODE].int2str(list(dataset[CATEGORY_CODE]))
        return self._with_category_codes(dataset.remove_columns(CATEGORY_CODE), names)

    def _with_category_codes(self, dataset: Dataset, names: list[str | None]) -> Dataset:
        """Adds a code of each row's category, as only numbers can be gathered. New names get the next codes."""
        codes = list(map(self._code_of, names))
        return dataset.add_column(CATEGORY_CODE, codes, feature=ClassLabel(names=list(self._category_codes)))

    def _code_of(self, category: str | None) -> int:
        return self._category_codes.setdefault(category or "", len(self._category_codes))

    def _tokenize(self, dataset: Dataset, report: LoadReport, tokenizer, args: BradleyTerryConfig) -> Dataset:
        dataset = tokenize_comparisons(
            dataset,
            tokenizer,
            report=report,
            max_length=self.max_length,
            overflow=args.overflow,
            unrenderable=args.unrenderable,
            num_proc=args.dataset_num_proc,
        )
        self._report(report)
        check_rows_of_tokens(dataset, tokenizer, self._sized_model, source=report.source)
        return dataset

    def _prepare_normalization(self, dataset: Dataset | None) -> Dataset | None:
        """The tokenized rows whose completions are scored after training. They are drawn with `seed`."""
        if not self.args.normalize_rewards:
            return None
        if dataset is None:
            dataset = self.train_dataset
        numbers = list(range(len(dataset)))  # kept, so that messages name rows of the original dataset
        if not numbers:
            raise UserError("normalization_dataset is empty: leave it out, or pass normalize_rewards=False.")
        limit = self.args.normalization_max_rows
        if len(numbers) > limit:
            numbers = sorted(random.Random(self.args.seed).sample(numbers, limit))
            dataset = dataset.select(numbers)

        columns = set(dataset.column_names)
        are_demonstrations = {"prompt", "completion"} <= columns or "messages" in columns
        if not are_demonstrations:
            return self._prepare_dataset(dataset, self.processing_class, self.args, "normalization")
        rows = [single_row(row, number) for number, row in zip(numbers, without_arrow_fill(dataset), strict=True)]
        report = LoadReport(source="normalization", rows_in=len(rows), kept=len(rows))
        with self.args.main_process_first(desc="normalization dataset"):
            return self._tokenize(_as_columns(rows), report, self.processing_class, self.args)

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:  # `Trainer` removes all other columns before the collator gets the rows
            self._signature_columns = [*TOKENIZED_COLUMNS, CATEGORY_CODE]

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        # `Trainer` would look for a column with the lengths.
        dataset = self.train_dataset if train_dataset is None else train_dataset
        counts = token_counts(dataset)
        lengths = (counts.prompt + counts.completions).tolist()
        return LengthGroupedSampler(self.args.train_batch_size * self.args.gradient_accumulation_steps, lengths=lengths)

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        """As in `Trainer`, but `dataloader_drop_last` drops rows of training only, so that metrics count all rows."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _get_eval_sampler(self, eval_dataset):
        """The rows in their order, so that predictions belong to them, also with `group_by_length`."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    # ---- Loss ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Returns the batches of one optimizer step, and the sum of the weights of its pairs on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches = batches
        return batches, self._split_and_weigh(batches, device)

    def _split_and_weigh(self, batches: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Splits the batches of an optimizer step, in place; returns the sum of the weights on all processes."""
        for batch in batches:
            split(batch, self.args.max_tokens_per_batch)
        total = torch.tensor(0.0)
        if not self.args.dataloader_drop_last:
            weight_repeated_rows_zero(batches, self.accelerator)
        for batch in batches:
            for micro_batch in micro_batches_of(batch):
                total = total + micro_batch["weights"].sum()
        if has_shards(self.accelerator):
            even_out(batches, self.accelerator)
        self._total_weight = self.accelerator.reduce(total.to(device), reduction="sum")
        return self._total_weight

    def _mixed_precision(self, model: nn.Module):
        return mixed_precision(model, self._autocast_dtype)

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        return autocast_dtype(self.args)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not self.sizes.enabled:
            return self._add_gradients(model, inputs, num_items_in_batch)
        is_last = self.accelerator.sync_gradients
        loss = self._optimizer_step.run(partial(self._add_own_gradients, model, inputs), is_last=is_last)
        if is_last:
            average_gradients(self._trained_parameters(), self.accelerator)
        return loss

    def _trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _counters(self) -> Callable[[], None]:
        """Returns a function that sets what a micro-step changes besides gradients to what it is now.

        It also splits the batches of the step again, as the step is repeated with other sizes.
        """
        meter = copy.copy(self._meter)

        def restore() -> None:
            self._meter = copy.copy(meter)
            self._split_and_weigh(self._batches, self.accelerator.device)

        return restore

    def _add_own_gradients(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Adds the gradients of a batch. No process waits for another one, whose pass may not fit."""
        losses = []
        with without_reduction(self.accelerator, model):
            for number, micro_batch in enumerate(inputs["micro_batches"]):
                with self._bounded("training", inputs, number):
                    losses.append(self._micro_step(model, micro_batch, self._total_weight))
        # In the order of a run without auto_batch, so that the logs are the same too.
        return sum(losses[:-1], losses[-1])

    def _bounded(self, what: str, inputs: dict[str, Any], number: int) -> AbstractContextManager:
        """Around the passes of a micro-batch, which may be split if it does not fit."""
        if "rows" not in inputs:
            return nullcontext()
        rows, width = inputs["micro_batches"][number]["input_ids"].shape
        n_parts = inputs["rows"].of_micro_batch(inputs, number).n_parts
        return self.sizes.one_pass(what, TOKENS, rows=rows, width=width, n_parts=n_parts)

    def _add_gradients(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None) -> Tensor:
        *first, last = micro_batches_of(inputs)
        losses = []
        # Gradients are reduced in the last backward pass only, as under DDP processes may have different numbers of
        # micro-batches.
        with without_reduction(self.accelerator, model) if first else nullcontext():
            for micro_batch in first:
                losses.append(self._micro_step(model, micro_batch, num_items_in_batch))
        total = self._micro_step(model, last, num_items_in_batch)
        for loss in losses:
            total = total + loss
        return total

    def _micro_step(self, model, inputs, num_items_in_batch):
        # Also around the backward pass, in which gradient checkpointing computes the adapters again.
        with self._mixed_precision(model):
            return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs):
        total = 0
        for micro_batch in micro_batches_of(inputs):
            if is_counted(micro_batch):
                total += super().floating_point_ops(micro_batch)
        return total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores = score_batch(model, inputs)  # (N,)
        losses = self._pair_losses(scores, inputs)  # (P,)
        smallest = torch.finfo(losses.dtype).tiny  # avoids 0 / 0 if all weights are 0
        if num_items_in_batch is None:
            loss = losses.sum() / inputs["weights"].sum().clamp(min=smallest)
        else:
            # `num_items_in_batch` is the sum of weights of the whole optimizer step. DDP will divide by the number of
            # processes.
            loss = losses.sum() * self.accelerator.num_processes / num_items_in_batch.clamp(min=smallest)
        if model.training:
            self._meter.add(scores.detach(), inputs)
        if return_outputs:
            return loss, {"scores": scores}
        return loss

    def _pair_losses(self, scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Losses (P,) of the pairs of a batch according to the options, from scores (N,)."""
        args = self.args
        scores_i, scores_j = scores[batch["pairs"]].unbind(1)  # (P,) each
        targets = smooth_targets(batch["targets"], args.label_smoothing_factor)
        weights = batch["weights"]
        margins = batch["margins"] * args.margin_scale
        if args.tie_model == "soft":
            losses = bradley_terry_loss(scores_i, scores_j, targets, weights, margins)
        else:
            losses = tie_model_loss(
                scores_i, scores_j, targets, weights, margins, model=args.tie_model, threshold=args.tie_threshold
            )
        if args.ranking_loss == "plackett_luce":  # replaces the pair losses of fully ranked prompts
            losses = rank_prompts(losses, scores, batch)
        if args.center_rewards_coefficient:
            losses = losses + args.center_rewards_coefficient * centering_penalty(scores_i, scores_j, weights)
        return losses

    # ---- Metrics ----

    def log(self, logs, start_time=None):
        if "loss" in logs and not self._meter.is_empty:  # a training log; logs of evaluations are complete
            totals = self._meter.reduce(self.accelerator)
            self._total_train_tokens += int(totals.tokens)
            logs |= totals.metrics()
            logs["num_tokens"] = self._total_train_tokens
        super().log(logs, start_time)

    def _run_epoch(self, *args, **kwargs):
        if not all_steps_are_done(self):
            super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        log_last_steps(self.args, self.control)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self._check_is_there(eval_dataset)
        require_prepared(self, "evaluate")
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self.sizes.agree()
        if self.is_in_train and eval_dataset is None:
            check_evaluated_metric(self.args, metrics)
        return metrics

    def _determine_best_metric(self, metrics, trial):
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            self.judged_by_best = self.judged
        return is_best

    def _check_is_there(self, eval_dataset: Any) -> None:
        """Refuses an evaluation of no set, or of one by a name that the trainer does not know."""
        if eval_dataset is None and self.eval_dataset is None:
            raise UserError("evaluation needs eval_dataset: pass one to the trainer, or set eval_strategy='no'.")
        names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
        if isinstance(eval_dataset, str) and eval_dataset not in names:
            known = ", ".join(map(repr, names)) or "none"
            raise UserError(f"eval_dataset: no set is named {eval_dataset!r} (there is {known}): pass a dataset.")

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Scores the completions of a dataset, as `evaluate` does, but returns the scores too and logs nothing.

        Args:
            test_dataset: dataset of the same kind as `eval_dataset`.
            ignore_keys: not used; it is there as in `Trainer`.
            metric_key_prefix: prefix of the names of the metrics.

        Returns:
            `predictions`: raw scores (B, Kmax) of the completions, padded with -100; `label_ids`: (B, Pmax, 7), see
            `LABEL_FIELDS`; `metrics`: those of `evaluate`.

        Raises:
            UserError: if a row is not usable.
        """
        test_dataset = as_dataset(test_dataset, "test_dataset")
        if test_dataset is None:
            raise UserError("test_dataset is None: pass a dataset of comparisons.")
        require_prepared(self, "predict")
        rows = self._prepare_dataset(test_dataset, self.processing_class, self.args, metric_key_prefix)
        prediction = super().predict(rows, ignore_keys, metric_key_prefix)
        self.sizes.agree()
        return prediction

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Returns None, scores (B, Kmax) and labels (B, Pmax, 7), from which the loss of the whole set is computed."""
        scores, labels = self.sizes.until_it_fits(partial(self._predict_batch, model, inputs))
        return None, scores, labels

    def _predict_batch(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        split(inputs, self.args.max_tokens_per_batch)
        if has_shards(self.accelerator):
            even_out([inputs], self.accelerator)
        all_scores, all_labels = [], []
        for number, micro_batch in enumerate(micro_batches_of(inputs)):
            with self._bounded("evaluation", inputs, number):
                scores, labels = self._predict(model, micro_batch)
            if is_counted(micro_batch):
                all_scores.append(scores)
                all_labels.append(labels)
        scores = stack_padded(all_scores)
        labels = stack_padded(all_labels)
        if "order" in inputs:  # micro-batches are sorted by length; restore the order of the rows
            restore = np.argsort(inputs["order"]).tolist()
            scores = scores[restore]
            labels = labels[restore]
        return scores, labels

    def _predict(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scores (B, Kmax) and labels (B, Pmax, 7) of a batch of B prompts."""
        batch = self._prepare_inputs(batch)
        with torch.no_grad(), self._mixed_precision(model):
            scores = score_batch(model, batch)
        completion_counts = batch["completion_counts"]
        pair_counts = torch.bincount(batch["prompt_index"], minlength=len(completion_counts))
        return pad_by_prompt(scores, completion_counts), pad_by_prompt(pair_labels(batch), pair_counts)

    def _preference_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics over the whole evaluation set. Loss and nll weight the pairs, the other metrics do not."""
        pairs = EvaluatedPairs.read(join_batches(prediction.predictions), join_batches(prediction.label_ids))
        losses = self._pair_losses(*pairs.as_batch())
        total_weight = max(pairs.weights.sum(), 1e-300)  # avoids 0 / 0 if all weights are 0
        compared_scores = np.concatenate([pairs.scores_i, pairs.scores_j])

        self.judged = pairs.judged(list(self._category_codes))
        metrics = {"loss": losses.sum().item() / total_weight}
        metrics |= self.judged.report()
        metrics["mean_reward"] = float(compared_scores.mean())
        metrics["min_reward"] = float(compared_scores.min())
        metrics["max_reward"] = float(compared_scores.max())
        if self._user_metrics is not None:
            metrics |= self._user_metrics(prediction)
        return metrics

    # ---- Normalization and saving ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains like `Trainer.train`, and then measures the normalization of the final (or best) model.

        Args:
            resume_from_checkpoint: a checkpoint folder, or `True` for the last complete checkpoint in `output_dir`.
                `None` or `False` starts from the beginning.
            args: further arguments of `Trainer.train`.
            kwargs: further keyword arguments of `Trainer.train`.

        Returns:
            The result of `Trainer.train`.

        Raises:
            UserError: if there is no such checkpoint, or if it does not fit the model.
        """
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            refuse_other_checkpoint(self.model, Path(checkpoint))
            check_same_base(self.model, Path(checkpoint))
        # Checkpoints of this training must not contain the scale of an earlier one.
        self.normalization = self._current_normalization()
        # Nothing half done is left of an earlier call, which an error or Ctrl-C may have ended anywhere.
        self._meter = TrainMeter()
        self._optimizer_step.forget()
        self._remove_noise()
        forget_unscaled_gradients(self.accelerator)
        with end_of_training(self):
            result = super().train(checkpoint, *args, **kwargs)
        if self.args.normalize_rewards:
            self.normalization = self._measure_normalization()
        return result

    def _remove_noise(self) -> None:
        """Removes the noise of `neftune_noise_alpha` that an interrupted `train` left, as it would count twice."""
        handle = getattr(self, "neftune_hook_handle", None)
        if handle is not None:
            handle.remove()

    def _current_normalization(self, *, mean: float = 0.0, std: float = 1.0, n: int = 0) -> RewardNormalization:
        """The record of the precision of training, with a measured mean and standard deviation if there are any."""
        base = bare_model(self.model)
        name = base.config._name_or_path or None
        if name is not None and (os.path.exists(name) or Path(name).is_absolute()):
            name = None  # a local path, which has no meaning on other machines
        autocast = None
        if self._autocast_dtype is not None:
            autocast = str(self._autocast_dtype).removeprefix("torch.")
        return RewardNormalization(
            mean=mean,
            std=std,
            n=n,
            base_dtype=dtype_name(base),
            autocast=autocast,
            load_in_4bit=is_4bit(base),
            layout=self.layout,
            base_model=name,
            quantization=quantization_record(base),
        )

    def _measure_normalization(self) -> RewardNormalization:
        """Measures mean and standard deviation of the scores of `_normalization_rows`, over all processes.

        If scoring fails, a warning is logged and scores stay raw, so that the finished run is not lost.
        """
        scores, problem = self._score_normalization_rows()
        if not problem:
            mean = float(scores.mean()) if len(scores) else 0.0
            std = float(scores.std()) if len(scores) else 0.0
            if np.isfinite(std) and std != 0.0:
                return self._current_normalization(mean=mean, std=std, n=len(scores))
            problem = f"{len(scores)} scores have standard deviation {std}: check the learning rate and the data"
        logger.warning("normalize_rewards: no normalization is saved, so rewards are the raw scores: %s", problem)
        return self._current_normalization()

    def _score_normalization_rows(self) -> tuple[np.ndarray, str]:
        """Raw scores (n,) from all processes, and the first problem of any process, or ""."""
        scorer = RewardScorer(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            batch_size=self.args.eval_batch_size,
            max_tokens=self.args.max_tokens_per_batch,
            autocast=self._autocast_dtype,
        )
        scorer.sizes = self.sizes
        sequences = []
        for row in self._normalization_rows:
            for completion_ids in row["completion_ids"]:
                sequences.append(row["prompt_ids"] + completion_ids)
        own_share = sequences[self.accelerator.process_index :: self.accelerator.num_processes]
        n_passes = 0
        if has_shards(self.accelerator):
            (n_passes,) = largest_counts([scorer.n_passes(own_share)], self.accelerator)
        scores, problem = [], ""
        try:
            with no_bars(when=self.args.disable_tqdm or not self.is_world_process_zero()):
                scores = scorer.score_ids(own_share, at_least=n_passes)
        except (RuntimeError, UserError) as error:  # for example, out of memory
            problem = f"{type(error).__name__}: {error}".splitlines()[0]

        # Always gathered, even after an error, as the other processes wait for it.
        all_scores, first_problem = [], ""
        for process_scores, process_problem in gather_object([(scores, problem)]):
            all_scores.extend(process_scores)
            first_problem = first_problem or process_problem
        return np.array(all_scores), first_problem

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        use_evaluation_weights(self.optimizer)  # an optimizer of an earlier call of `train`
        if self.is_fsdp_enabled:  # its checkpoints are sharded
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model, Path(resume_from_checkpoint))
        self.sizes.load(Path(resume_from_checkpoint))

    def _load_best_model(self):
        use_evaluation_weights(self.optimizer)
        folder = Path(self.state.best_model_checkpoint)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not folder.is_dir():
            super()._load_best_model()
        else:
            load_weights(self.model, folder)

    def _save(self, output_dir=None, state_dict=None):
        use_evaluation_weights(self.optimizer)  # on every process, so that their weights stay the same
        with saved_as_one_adapter(self.model):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.normalization.save(output_dir or self.args.output_dir)
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
        require_prepared(self, "save_model")
        save = super().save_model
        if saves_in_shards(self.accelerator):  # `Trainer` would save the model in its checkpoints only, and in shards
            save = self._save_gathered
        save_with_report(self, save, output_dir, _internal_call)

    def _save_gathered(self, output_dir: str | None, is_internal: bool) -> None:
        self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        if self.args.push_to_hub and not is_internal:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_rng_state(self, output_dir: str) -> None:
        """Also saves the sizes of `auto_batch`. `Trainer` calls it for checkpoints only."""
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            self.sizes.save(Path(output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with without_card(self):
            super()._save_checkpoint(model, trial)


def _as_columns(rows: list[dict[str, Any]]) -> Dataset:
    """The rows as a dataset in which tool calls keep their types."""
    return dataset_of({name: [row[name] for row in rows] for name in rows[0]})
