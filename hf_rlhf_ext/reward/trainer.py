"""Bradley-Terry reward models from pairs and K-wise comparisons."""

import copy
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
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl import RewardTrainer

from ..data.formats import to_comparisons
from ..data.schema import LoadReport
from ..data.tokenization import CATEGORY_CODE, TOKENISED_COLUMNS, tokenise_comparisons
from ..errors import UserError
from ..hub.trainer import HubMixin
from ..metrics import preference
from ..modeling.adapters import autocast_dtype, bare_model, mixed_precision
from ..modeling.heads import is_encoder, untrained_layers
from ..modeling.loading import refuse_fp16_weights, warn_of_emulated_bf16
from .config import BradleyTerryConfig
from .losses import bradley_terry_loss, centering_penalty, rank_prompts, smooth_targets, tie_model_loss
from .scorer import RewardNormalization, RewardScorer, dtype_name, is_4bit, score_batch
from .setup import (
    check_head_is_trained,
    check_head_moves,
    length_limit,
    load_options,
    make_collator,
    repair_fp32,
    resolve_layout,
    resolve_model,
    single_row,
    warn_of_large_margins,
    warn_over_budget,
    with_revision,
    with_saved_layers,
)

logger = logging.getLogger(__name__)

LABEL_FIELDS = ("i", "j", "target", "weight", "margin", "length_delta", "category")
"""Last axis of the labels that evaluation gathers (B, Pmax, 7); a padded pair is -100 throughout."""


class BradleyTerryTrainer(HubMixin, RewardTrainer):
    """TRL's `RewardTrainer` for comparisons: K completions, soft targets, weights, and scores that survive a reload.

    Args:
        model: a decoder with one label (`load_base_model(..., task="reward")`), a `PeftModel` of one, or a name or path
            for `load_base_model`, the embedded model included.
        args: options; `max_length` and `overflow` decide about long rows.
        train_dataset, eval_dataset: TRL preference rows or comparison rows (`data.formats.to_comparisons`); evaluation
            also takes a dict of them.
        processing_class: tokenizer; default is the model's.
        peft_config: any PEFT config with `task_type="SEQ_CLS"`.
        normalization_dataset: what `reward_normalization.json` is measured on: demonstrations (`prompt` and
            `completion`, or `messages`) as in InstructGPT, or comparisons; default: completions of `train_dataset`.
        compute_metrics: further metrics; gets scores (B, Kmax) and labels (B, Pmax, 7), see `LABEL_FIELDS`.
        data_collator, callbacks, trainer_options (optimizers, …): as in Transformers.

    `data_reports` says per data set which rows were dropped or cut, and why. The loss is Σ w·nll / Σ w over the whole
    optimizer step, the same however it is split into micro-batches and processes.
    """

    loss_is_scaled_for_ga = True

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
        given = load_options(args, trainer_options)
        if isinstance(model, str):
            args = copy.copy(args)
            args.model_init_kwargs = None  # used up here: TRL would warn that it ignores them
            peft_config = with_revision(peft_config, given.get("revision"))
            given = ({"dtype": "float32"} if peft_config is None else {}) | given  # weights that are trained themselves
        model, processing_class = resolve_model(model, processing_class, given)
        if peft_config is not None and is_encoder(model):
            peft_config = with_saved_layers(peft_config, untrained_layers(model))
        self.layout = resolve_layout(model, peft_config, args.layout, args.device)
        self.max_length = length_limit(model, args.max_length)
        self.data_reports: dict[str, LoadReport] = {}
        self.judged: preference.JudgedPairs | None = None  # of the last evaluation, for plots
        self._category_codes: dict[str, int] = {}
        self._user_metrics = compute_metrics
        self._sums: dict[str, Tensor] = {}
        # TRL casts trainable parameters of quantised models to bf16, a trained adapter's too: keep what they were.
        before = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or make_collator(processing_class, args, self.layout),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=self._preference_metrics,
            callbacks=callbacks,
            peft_config=peft_config,
            **trainer_options,
        )
        repair_fp32(self.model, before)
        if args.fp16:
            refuse_fp16_weights(self.model)
        check_head_moves(self.model)
        self.normalization = self._recorded()
        warn_over_budget(self.data_collator, self.train_dataset)
        warn_of_large_margins(self.train_dataset, args.margin_scale)
        self._normalization_rows = self._prepare_normalization(normalization_dataset)

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if isinstance(dataset, Dataset) and set(TOKENISED_COLUMNS) <= set(dataset.column_names):
            if CATEGORY_CODE not in dataset.column_names:
                return dataset
            names = dataset.features[CATEGORY_CODE].int2str(list(dataset[CATEGORY_CODE]))  # another trainer's, maybe
            return self._with_category_codes(dataset.remove_columns(CATEGORY_CODE), names)
        with args.main_process_first(desc=f"{dataset_name} data set"):
            dataset, report = to_comparisons(dataset, source=dataset_name)
            if "category" in dataset.column_names:
                dataset = self._with_category_codes(dataset, dataset["category"])
            return self._tokenise(dataset, report, processing_class, args)

    def _with_category_codes(self, dataset: Dataset, names: list[str | None]) -> Dataset:
        codes = [self._category_codes.setdefault(name or "", len(self._category_codes)) for name in names]
        return dataset.add_column(CATEGORY_CODE, codes, feature=ClassLabel(names=list(self._category_codes)))

    def _tokenise(self, dataset: Dataset, report: LoadReport, tokenizer, args: BradleyTerryConfig) -> Dataset:
        options = {"max_length": self.max_length, "overflow": args.overflow, "num_proc": args.dataset_num_proc}
        dataset = tokenise_comparisons(dataset, tokenizer, report=report, **options)
        logger.log(logging.WARNING if report.dropped or report.flagged else logging.INFO, report.summary())
        self.data_reports[report.source] = report
        return dataset

    def _prepare_normalization(self, dataset: Dataset | None) -> Dataset | None:
        """Tokenised rows whose completions are scored after training, drawn with `seed`."""
        if not self.args.normalize_rewards:
            return None
        if dataset is None:
            dataset = self.train_dataset
        numbers, limit = list(range(len(dataset))), self.args.normalization_max_rows
        if not numbers:
            raise UserError("normalization_dataset has no rows: leave it out, or pass normalize_rewards=False.")
        if len(numbers) > limit:
            numbers = sorted(random.Random(self.args.seed).sample(numbers, limit))
            dataset = dataset.select(numbers)
        columns = set(dataset.column_names)
        if {"prompt", "completion"} <= columns or "messages" in columns:
            rows = Dataset.from_list([single_row(row, k) for k, row in zip(numbers, dataset, strict=True)])
            report = LoadReport(source="normalization", rows_in=len(rows), kept=len(rows))
            with self.args.main_process_first(desc="normalization data set"):
                return self._tokenise(rows, report, self.processing_class, self.args)
        return self._prepare_dataset(dataset, self.processing_class, self.args, "normalization")

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [*TOKENISED_COLUMNS, CATEGORY_CODE]

    # Loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and Σ weights of all its pairs on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        parts = [part for batch in batches for part in _micro_batches(batch)]
        total = sum((part["weights"].sum() for part in parts), torch.tensor(0.0)).to(device)
        return batches, self.accelerator.reduce(total, reduction="sum")

    def _mixed_precision(self, model: nn.Module):
        return mixed_precision(model, self._autocast_dtype)

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        return autocast_dtype(self.args)

    def training_step(self, model, inputs, num_items_in_batch=None):
        *first, last = _micro_batches(inputs)
        with self.accelerator.no_sync(model) if first else nullcontext():  # processes differ in how many they have
            losses = [self._micro_step(model, part, num_items_in_batch) for part in first]
        return sum(losses, self._micro_step(model, last, num_items_in_batch))

    def _micro_step(self, model, inputs, num_items_in_batch):
        # Around the backward too: gradient checkpointing computes the adapters again there.
        with self._mixed_precision(model):
            return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs):
        return sum(super(BradleyTerryTrainer, self).floating_point_ops(part) for part in _micro_batches(inputs))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores = score_batch(model, inputs)  # (N,)
        losses = self._pair_losses(scores, inputs)  # (P,)
        if num_items_in_batch is None:
            loss = losses.sum() / inputs["weights"].sum().clamp(min=torch.finfo(losses.dtype).tiny)
        else:  # the optimizer step's Σ weights; DDP will divide by the number of processes
            total = num_items_in_batch.clamp(min=torch.finfo(losses.dtype).tiny)
            loss = losses.sum() * self.accelerator.num_processes / total
        if model.training:
            self._count(scores.detach(), inputs)
        return (loss, {"scores": scores}) if return_outputs else loss

    def _pair_losses(self, scores: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        scores_i, scores_j = scores[inputs["pairs"]].unbind(1)
        args, targets = self.args, smooth_targets(inputs["targets"], self.args.label_smoothing_factor)
        given = (scores_i, scores_j, targets, inputs["weights"], inputs["margins"] * args.margin_scale)
        if args.tie_model == "soft":
            losses = bradley_terry_loss(*given)
        else:
            losses = tie_model_loss(*given, model=args.tie_model, threshold=args.tie_threshold)
        if args.ranking_loss == "plackett_luce":
            losses = rank_prompts(losses, scores, inputs)
        if self.args.center_rewards_coefficient:
            losses = losses + self.args.center_rewards_coefficient * centering_penalty(
                scores_i, scores_j, inputs["weights"]
            )
        return losses

    # Metrics: sums on each process, one collective per log

    def _count(self, scores: Tensor, inputs: dict[str, Tensor]) -> None:
        scores_i, scores_j = scores[inputs["pairs"]].unbind(1)
        side = torch.sign(inputs["targets"] - 0.5)  # 0 for ties
        agreement = side * (scores_i - scores_j)
        new = {
            "decided": side.abs().sum(),
            "right": (agreement > 0).sum(),
            "margin": agreement.sum(),
            "score": scores.sum(),
            "scores": torch.tensor(float(len(scores)), device=scores.device),
            "tokens": (inputs["segments"] >= 0 if "segments" in inputs else inputs["attention_mask"]).sum(),
        }
        for name, value in new.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.float()
        self._sums["max"] = torch.maximum(self._sums.get("max", scores.max()), scores.max())
        self._sums["min"] = torch.minimum(self._sums.get("min", scores.min()), scores.min())

    def _train_metrics(self) -> dict[str, float]:
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])  # (8,)
        gathered = self.accelerator.gather(sums[None]).double().cpu()  # (processes, 8)
        self._sums = {}
        columns = dict(zip(names, gathered.unbind(1), strict=True))
        total = {name: values.sum().item() for name, values in columns.items()}
        self._total_train_tokens += int(total["tokens"])
        decided = max(total["decided"], 1.0)
        return {
            "accuracy": total["right"] / decided,
            "margin": total["margin"] / decided,
            "mean_reward": total["score"] / total["scores"],
            "min_reward": columns["min"].min().item(),
            "max_reward": columns["max"].max().item(),
            "num_tokens": self._total_train_tokens,
        }

    def log(self, logs, start_time=None):
        if "loss" in logs and self._sums:  # a training log; evaluation's metrics are complete already
            logs |= self._train_metrics()
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(None, scores (B, Kmax), labels (B, Pmax, 7)): the exact loss over the whole set comes from these."""
        if "micro_batches" in inputs:
            parts, order = inputs["micro_batches"], inputs["order"]
            found = [self.prediction_step(model, part, prediction_loss_only, ignore_keys) for part in parts]
            _, scores, labels = zip(*found, strict=True)
            back = np.argsort(order).tolist()
            return None, _stacked(scores)[back], _stacked(labels)[back]
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self._mixed_precision(model):
            scores = score_batch(model, inputs)
        counts = inputs["completion_counts"]  # (B,)
        first_rows = (counts.cumsum(0) - counts)[inputs["prompt_index"]]  # (P,)
        lengths = inputs["completion_lengths"][inputs["pairs"]]  # (P, 2)
        fields = [*(inputs["pairs"] - first_rows[:, None]).unbind(1), inputs["targets"], inputs["weights"]]
        fields += [inputs["margins"], lengths[:, 0] - lengths[:, 1], inputs["categories"][inputs["prompt_index"]]]
        labels = torch.stack([field.float() for field in fields], dim=1)  # (P, 7)
        pair_counts = torch.bincount(inputs["prompt_index"], minlength=len(counts))
        return None, _pad_by_prompt(scores, counts), _pad_by_prompt(labels, pair_counts)

    def _preference_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics over the whole evaluation set; accuracy and margin count pairs, loss and nll weigh them."""
        scores, labels = np.asarray(prediction.predictions, np.float64), np.asarray(prediction.label_ids, np.float64)
        prompts, _ = rows = np.nonzero(labels[..., 0] >= 0)  # where a pair is, not padding
        i, j, targets, weights, margins, length_deltas, codes = labels[rows].T
        scores_i, scores_j = scores[prompts, i.astype(int)], scores[prompts, j.astype(int)]
        both = np.concatenate([scores_i, scores_j])
        pairs = {"targets": targets, "weights": weights, "margins": margins, "prompt_index": prompts}
        pairs["pairs"] = prompts[:, None] * scores.shape[1] + np.stack([i, j], 1).astype(int)
        given = {name: torch.from_numpy(value) for name, value in pairs.items()}
        losses = self._pair_losses(torch.from_numpy(scores.ravel()), given)
        names = np.array([*self._category_codes, ""])[codes.astype(int)]  # -1: no category
        self.judged = preference.JudgedPairs(
            scores_i, scores_j, targets, weights, margins, length_deltas, prompts, names
        )
        metrics = {
            "loss": losses.sum().item() / max(weights.sum(), 1e-300),
            **self.judged.report(),
            "mean_reward": float(both.mean()),
            "min_reward": float(both.min()),
            "max_reward": float(both.max()),
        }
        return metrics | (self._user_metrics(prediction) if self._user_metrics else {})

    # Normalisation and saving

    def train(self, *args, **kwargs):
        """Trains as `Trainer.train`, then measures the normalisation on the final (or best) weights."""
        self.normalization = self._recorded()  # a checkpoint on the way must not carry an old one
        result = super().train(*args, **kwargs)
        if self.args.normalize_rewards:
            self.normalization = self._measure_normalization()
        return result

    def _recorded(self, **measured: Any) -> RewardNormalization:
        """What a reload must repeat, with what was `measured`."""
        base, autocast = bare_model(self.model), self._autocast_dtype
        name = base.config._name_or_path or None
        return RewardNormalization(
            base_dtype=dtype_name(base),
            autocast=str(autocast).removeprefix("torch.") if autocast else None,
            load_in_4bit=is_4bit(base),
            layout=self.layout,
            base_model=None if name is None or os.path.exists(name) or Path(name).is_absolute() else name,
            **measured,
        )

    def _measure_normalization(self) -> RewardNormalization:
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        limits = {"batch_size": args.eval_batch_size, "max_tokens": args.max_tokens_per_batch}
        scorer = RewardScorer(model, self.processing_class, **limits, autocast=self._autocast_dtype)
        sequences = [row["prompt_ids"] + ids for row in self._normalization_rows for ids in row["completion_ids"]]
        rank, n_ranks = self.accelerator.process_index, self.accelerator.num_processes
        try:
            found = scorer.score_ids(sequences[rank::n_ranks]), ""
        except (RuntimeError, UserError) as error:  # out of memory, say
            found = [], f"{type(error).__name__}: {error}".splitlines()[0]
        parts = gather_object([found])
        problem = next((text for _, text in parts if text), "")
        scores = np.array([score for part, _ in parts for score in part])
        mean, std = (float(scores.mean()), float(scores.std())) if len(scores) else (0.0, 0.0)
        if problem or not np.isfinite(std) or std == 0.0:  # a finished run is worth more than its scale
            problem = problem or f"{len(scores)} scores have deviation {std}: check the learning rate and the data"
            logger.warning("normalize_rewards: no normalisation, the model gives raw scores: %s", problem)
            return self._recorded()
        return self._recorded(mean=mean, std=std, n=len(scores))

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.normalization.save(output_dir or self.args.output_dir)

    def create_model_card(self, *args, **kwargs):
        """Nothing: TRL's card would overwrite ours, which the recipe writes with the measured results."""


def _micro_batches(inputs: dict[str, Any]) -> list[dict[str, Tensor]]:
    return inputs.get("micro_batches") or [inputs]


def _stacked(values: tuple[Tensor, ...]) -> Tensor:
    """Tensors (b, K, …) of different K as one (B, Kmax, …), padded with -100."""
    rows = [row for value in values for row in value]
    return pad_sequence(rows, batch_first=True, padding_value=-100.0)


def _pad_by_prompt(values: Tensor, counts: Tensor) -> Tensor:
    """(N, …) values in runs of `counts` (B,) as (B, max count, …), padded with -100."""
    return pad_sequence(values.split(counts.tolist()), batch_first=True, padding_value=-100.0)
