"""Bradley-Terry reward models from pairs and K-wise comparisons."""

import logging
import os
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import ClassLabel, Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl import RewardTrainer

from ..data.schema import LoadReport
from ..data.tokenization import CATEGORY_CODE, TOKENIZED_COLUMNS, tokenize_comparisons
from ..data.trl_rows import read_comparisons
from ..errors import UserError
from ..modeling.adapters import autocast_dtype, bare_model, mixed_precision
from ..modeling.loading import refuse_fp16_weights, warn_of_emulated_bf16
from ..publishing import new_publisher, require_publisher
from .config import BradleyTerryConfig
from .labels import LABEL_FIELDS, EvaluatedPairs, pad_by_prompt, pair_labels, stack_padded
from .losses import bradley_terry_loss, centering_penalty, rank_prompts, smooth_targets, tie_model_loss
from .meter import TrainMeter
from .model_setup import (
    check_head_is_trained,
    check_head_moves,
    length_limit,
    make_collator,
    prepare_model,
    repair_fp32,
    resolve_layout,
    single_row,
    warn_of_large_margins,
    warn_over_budget,
)
from .normalization import RewardNormalization, dtype_name, is_4bit
from .preference_metrics import JudgedPairs
from .scorer import RewardScorer
from .scores import score_batch

__all__ = ["LABEL_FIELDS", "BradleyTerryTrainer"]

logger = logging.getLogger(__name__)


class BradleyTerryTrainer(RewardTrainer):
    """TRL's `RewardTrainer` for comparisons: K completions, soft targets, weights, and scores that survive a reload.

    Args:
        model: a decoder with one label (`load_base_model(..., task="reward")`), a `PeftModel` of one, or a name or path
            for `load_base_model`, the embedded model included.
        args: options; `max_length` and `overflow` decide about long rows.
        train_dataset, eval_dataset: TRL preference rows or comparison rows (`data.trl_rows`), whatever else through
            `load_comparisons`; evaluation also takes a dict of them.
        processing_class: tokenizer; default is the model's.
        peft_config: any PEFT config with `task_type="SEQ_CLS"`.
        normalization_dataset: what `reward_normalization.json` is measured on: demonstrations (`prompt` and
            `completion`, or `messages`) as in InstructGPT, or comparisons; default: completions of `train_dataset`.
        compute_metrics: further metrics; gets scores (B, Kmax) and labels (B, Pmax, 7), see `LABEL_FIELDS`.
        data_collator, callbacks, trainer_options (optimizers, …): as in Transformers.

    `data_reports` says per data set which rows were dropped or cut, and why. The loss is Σ w·nll / Σ w over the whole
    optimizer step, the same however it is split into micro-batches and processes.
    """

    card_kind = "reward_model"
    loss_is_scaled_for_ga = True  # by `compute_loss`: Trainer must not divide by the accumulation steps again

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
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
            raise UserError(f"args: pass a BradleyTerryConfig, got {type(args).__name__}.")
        warn_of_emulated_bf16(args)
        check_head_is_trained(peft_config)
        set_seed(args.seed)  # the head is drawn at load
        prepared = prepare_model(model, processing_class, peft_config, args, trainer_options)

        # What the hooks of the parent's constructor use already.
        self.publisher = new_publisher()
        self.layout = resolve_layout(prepared.model, prepared.peft_config, args.layout, args.device)
        self.max_length = length_limit(prepared.model, args.max_length)
        self.data_reports: dict[str, LoadReport] = {}
        self.judged: JudgedPairs | None = None  # of the last evaluation, for plots
        self._category_codes: dict[str, int] = {}
        self._user_metrics = compute_metrics
        self._meter = TrainMeter()
        # TRL casts trainable parameters of quantized models to bf16, a trained adapter's too: keep what they were.
        before = {name: p.data for name, p in prepared.model.named_parameters() if p.requires_grad}
        super().__init__(
            model=prepared.model,
            args=prepared.args,
            data_collator=data_collator or make_collator(prepared.tokenizer, args, self.layout),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=prepared.tokenizer,
            compute_metrics=self._preference_metrics,
            callbacks=callbacks,
            peft_config=prepared.peft_config,
            **trainer_options,
        )
        repair_fp32(self.model, before)

        # What only the finished model and its data show.
        if args.fp16:
            refuse_fp16_weights(self.model)
        check_head_moves(self.model)
        self.normalization = self._current_normalization()
        warn_over_budget(self.data_collator, self.train_dataset)
        warn_of_large_margins(self.train_dataset, args.margin_scale)
        self._normalization_rows = self._prepare_normalization(normalization_dataset)

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if isinstance(dataset, Dataset) and set(TOKENIZED_COLUMNS) <= set(dataset.column_names):
            # Rows of a trainer: `evaluate` of a subset of the prepared evaluation set, say.
            return self._with_own_category_codes(dataset)
        with args.main_process_first(desc=f"{dataset_name} data set"):
            dataset, report = read_comparisons(dataset, source=dataset_name)
            if "category" in dataset.column_names:
                dataset = self._with_category_codes(dataset, dataset["category"])
            return self._tokenize(dataset, report, processing_class, args)

    def _with_own_category_codes(self, dataset: Dataset) -> Dataset:
        """Tokenized rows with this trainer's codes of their categories; they may be another trainer's."""
        if CATEGORY_CODE not in dataset.column_names:
            return dataset
        names = dataset.features[CATEGORY_CODE].int2str(list(dataset[CATEGORY_CODE]))
        return self._with_category_codes(dataset.remove_columns(CATEGORY_CODE), names)

    def _with_category_codes(self, dataset: Dataset, names: list[str | None]) -> Dataset:
        """Adds the category of each row as a number, which can be gathered; new names get the next numbers."""
        codes = []
        for name in names:
            codes.append(self._category_codes.setdefault(name or "", len(self._category_codes)))
        return dataset.add_column(CATEGORY_CODE, codes, feature=ClassLabel(names=list(self._category_codes)))

    def _tokenize(self, dataset: Dataset, report: LoadReport, tokenizer, args: BradleyTerryConfig) -> Dataset:
        dataset = tokenize_comparisons(
            dataset,
            tokenizer,
            report=report,
            max_length=self.max_length,
            overflow=args.overflow,
            num_proc=args.dataset_num_proc,
        )
        level = logging.WARNING if report.dropped or report.flagged else logging.INFO
        logger.log(level, report.summary())
        self.data_reports[report.source] = report
        return dataset

    def _prepare_normalization(self, dataset: Dataset | None) -> Dataset | None:
        """Tokenized rows whose completions are scored after training, drawn with `seed`."""
        if not self.args.normalize_rewards:
            return None
        if dataset is None:
            dataset = self.train_dataset
        numbers = list(range(len(dataset)))  # kept with the rows: messages name rows of the source
        if not numbers:
            raise UserError("normalization_dataset has no rows: leave it out, or pass normalize_rewards=False.")
        limit = self.args.normalization_max_rows
        if len(numbers) > limit:
            numbers = sorted(random.Random(self.args.seed).sample(numbers, limit))
            dataset = dataset.select(numbers)

        columns = set(dataset.column_names)
        are_demonstrations = {"prompt", "completion"} <= columns or "messages" in columns
        if not are_demonstrations:
            return self._prepare_dataset(dataset, self.processing_class, self.args, "normalization")
        rows = [single_row(row, number) for number, row in zip(numbers, dataset, strict=True)]
        report = LoadReport(source="normalization", rows_in=len(rows), kept=len(rows))
        with self.args.main_process_first(desc="normalization data set"):
            return self._tokenize(Dataset.from_list(rows), report, self.processing_class, self.args)

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:  # Trainer removes all others before the collator sees a row
            self._signature_columns = [*TOKENIZED_COLUMNS, CATEGORY_CODE]

    # Loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and Σ weights of all its pairs on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        total = torch.tensor(0.0)
        for batch in batches:
            for micro_batch in _micro_batches(batch):
                total = total + micro_batch["weights"].sum()
        return batches, self.accelerator.reduce(total.to(device), reduction="sum")

    def _mixed_precision(self, model: nn.Module):
        return mixed_precision(model, self._autocast_dtype)

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        return autocast_dtype(self.args)

    def training_step(self, model, inputs, num_items_in_batch=None):
        *first, last = _micro_batches(inputs)
        losses = []
        # Gradients are reduced in the last backward only: processes differ in how many micro-batches they have.
        with self.accelerator.no_sync(model) if first else nullcontext():
            for micro_batch in first:
                losses.append(self._micro_step(model, micro_batch, num_items_in_batch))
        total = self._micro_step(model, last, num_items_in_batch)
        for loss in losses:
            total = total + loss
        return total

    def _micro_step(self, model, inputs, num_items_in_batch):
        # Around the backward too: gradient checkpointing computes the adapters again there.
        with self._mixed_precision(model):
            return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs):
        total = 0
        for micro_batch in _micro_batches(inputs):
            total += super().floating_point_ops(micro_batch)
        return total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores = score_batch(model, inputs)  # (N,)
        losses = self._pair_losses(scores, inputs)  # (P,)
        smallest = torch.finfo(losses.dtype).tiny  # where all weights are 0
        if num_items_in_batch is None:
            loss = losses.sum() / inputs["weights"].sum().clamp(min=smallest)
        else:
            # Σ weights of the whole optimizer step; DDP will divide by the number of processes.
            loss = losses.sum() * self.accelerator.num_processes / num_items_in_batch.clamp(min=smallest)
        if model.training:
            self._meter.add(scores.detach(), inputs)
        if return_outputs:
            return loss, {"scores": scores}
        return loss

    def _pair_losses(self, scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Losses (P,) of the pairs of a batch, as the options have them; scores (N,)."""
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
        if args.ranking_loss == "plackett_luce":  # in place of the pairs of prompts that are ranked in full
            losses = rank_prompts(losses, scores, batch)
        if args.center_rewards_coefficient:
            losses = losses + args.center_rewards_coefficient * centering_penalty(scores_i, scores_j, weights)
        return losses

    # Metrics

    def log(self, logs, start_time=None):
        if "loss" in logs and not self._meter.is_empty:  # a training log; evaluation's metrics are complete already
            totals = self._meter.reduce(self.accelerator)
            self._total_train_tokens += int(totals.tokens)
            logs |= totals.metrics()
            logs["num_tokens"] = self._total_train_tokens
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(None, scores (B, Kmax), labels (B, Pmax, 7)): the exact loss over the whole set comes from these."""
        all_scores, all_labels = [], []
        for micro_batch in _micro_batches(inputs):
            scores, labels = self._predict(model, micro_batch)
            all_scores.append(scores)
            all_labels.append(labels)
        scores = stack_padded(all_scores)
        labels = stack_padded(all_labels)
        if "order" in inputs:  # micro-batches are sorted by length: back to the order of the rows
            restore = np.argsort(inputs["order"]).tolist()
            scores = scores[restore]
            labels = labels[restore]
        return None, scores, labels

    def _predict(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scores (B, Kmax) and labels (B, Pmax, 7) of a batch of B prompts."""
        batch = self._prepare_inputs(batch)
        with torch.no_grad(), self._mixed_precision(model):
            scores = score_batch(model, batch)
        completion_counts = batch["completion_counts"]
        pair_counts = torch.bincount(batch["prompt_index"], minlength=len(completion_counts))
        return pad_by_prompt(scores, completion_counts), pad_by_prompt(pair_labels(batch), pair_counts)

    def _preference_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics over the whole evaluation set; accuracy and margin count pairs, loss and nll weigh them."""
        pairs = EvaluatedPairs.read(prediction.predictions, prediction.label_ids)
        losses = self._pair_losses(*pairs.as_batch())
        total_weight = max(pairs.weights.sum(), 1e-300)  # where all weights are 0
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

    # Normalization and saving

    def train(self, *args, **kwargs):
        """Trains as `Trainer.train`, then measures the normalization on the final (or best) weights."""
        # A checkpoint on the way must not carry the scale of an earlier training.
        self.normalization = self._current_normalization()
        result = super().train(*args, **kwargs)
        if self.args.normalize_rewards:
            self.normalization = self._measure_normalization()
        return result

    def _current_normalization(self, *, mean: float = 0.0, std: float = 1.0, n: int = 0) -> RewardNormalization:
        """What a reload must repeat, with the scale that was measured, if any."""
        base = bare_model(self.model)
        name = base.config._name_or_path or None
        if name is not None and (os.path.exists(name) or Path(name).is_absolute()):
            name = None  # a local path, which says nothing elsewhere
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
        )

    def _measure_normalization(self) -> RewardNormalization:
        """Mean and deviation of the scores of `_normalization_rows`, over all processes.

        A finished run is worth more than its scale: where scoring fails, that is a warning, and scores stay raw.
        """
        scores, problem = self._score_normalization_rows()
        if not problem:
            mean = float(scores.mean()) if len(scores) else 0.0
            std = float(scores.std()) if len(scores) else 0.0
            if np.isfinite(std) and std != 0.0:
                return self._current_normalization(mean=mean, std=std, n=len(scores))
            problem = f"{len(scores)} scores have deviation {std}: check the learning rate and the data"
        logger.warning("normalize_rewards: no normalization, the model gives raw scores: %s", problem)
        return self._current_normalization()

    def _score_normalization_rows(self) -> tuple[np.ndarray, str]:
        """Raw scores (n,) from all processes, and the first problem of any of them, "" without."""
        scorer = RewardScorer(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            batch_size=self.args.eval_batch_size,
            max_tokens=self.args.max_tokens_per_batch,
            autocast=self._autocast_dtype,
        )
        sequences = []
        for row in self._normalization_rows:
            for completion_ids in row["completion_ids"]:
                sequences.append(row["prompt_ids"] + completion_ids)
        own_share = sequences[self.accelerator.process_index :: self.accelerator.num_processes]
        scores, problem = [], ""
        try:
            scores = scorer.score_ids(own_share)
        except (RuntimeError, UserError) as error:  # out of memory, say
            problem = f"{type(error).__name__}: {error}".splitlines()[0]

        # Gathered whatever happened: a process that skips it would leave the others waiting.
        all_scores, first_problem = [], ""
        for process_scores, process_problem in gather_object([(scores, problem)]):
            all_scores.extend(process_scores)
            first_problem = first_problem or process_problem
        return np.array(all_scores), first_problem

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.normalization.save(output_dir or self.args.output_dir)

    def create_model_card(self, *args, **kwargs):
        """Nothing: TRL's card would overwrite ours, which the recipe writes with the measured results."""

    # The Hub: what to push and how is the publisher's

    def init_hf_repo(self, token=None, private=None):
        self.hub_model_id = require_publisher(self.publisher).check_access(self, token=token, private=private)

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """Saves and pushes `output_dir`; returns the commit's URL, None where it failed. Always blocking."""
        publisher = require_publisher(self.publisher)
        return publisher.push_run(self, commit_message, token=token, revision=revision, private=private)

    def _push_from_checkpoint(self, checkpoint_folder):
        require_publisher(self.publisher).push_checkpoint(self, checkpoint_folder)

    def _finish_current_push(self):
        if self.publisher is not None:
            self.publisher.finish()


def _micro_batches(inputs: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The micro-batches of a collated batch; a batch that was not split is one."""
    return inputs.get("micro_batches") or [inputs]
