"""The passes of supervised fine-tuning and of reward training, as their trainers run them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ...compat import add_fused_lm_head
from ..adapters import adapters_in_autocast_dtype, bare_model, mixed_precision
from ..packing import Layout, packed_groups
from ..prefix import model_inputs
from ..probing import evaluating
from ..segments import SEGMENTS
from .fake_model import build_base, fake_mode, make_fake, shallow_config, with_adapter, without_fakes
from .setup import Setup
from .sft_loss import tiles_of
from .trace import (
    LOGITS,
    DepthTrace,
    Trace,
    fill_gradients,
    resident_bytes,
    segments_of_backward,
    tracing,
    track_weights,
    trained_sizes,
)

STEP = "training step"
EVALUATION = "evaluation"


def trace_training(config: PretrainedConfig, setup: Setup, depth: int, *, only_gradients: bool = False) -> DepthTrace:
    """Traces the passes of `sft` or `reward` with the first layers of a model.

    Args:
        config: config of the model.
        setup: options of the run.
        depth: number of layers.
        only_gradients: whether phases without gradients are left out.
    """
    passes = _SFT if setup.stage == "sft" else _Reward
    return passes(config, setup, depth).trace(only_gradients=only_gradients)


class _Training:
    """A model and the passes over it."""

    task = "causal_lm"

    def __init__(self, config: PretrainedConfig, setup: Setup, depth: int):
        self.setup = setup
        self.mode = fake_mode()
        model = build_base(shallow_config(config, depth), setup, task=self.task)
        self._before_adapter(model)
        self.model = with_adapter(model, setup, task=self.task) if setup.use_peft else model
        self._after_adapter()
        make_fake(self.model, self.mode, setup)
        if setup.use_peft and setup.checkpointing:
            self.model.enable_input_require_grads()  # as TRL does

    def _before_adapter(self, model: nn.Module) -> None:
        """What is done to the model before it gets an adapter."""

    def _after_adapter(self) -> None:
        """What is done to the model when it has its adapter."""

    def trace(self, *, only_gradients: bool) -> DepthTrace:
        """The peaks of all phases, or only of those with gradients."""
        with tracing(self.mode) as trace:
            track_weights(trace, self.model)
            resident = resident_bytes(trace)
            trained = trained_sizes(self.model)
            if self._evaluates and not only_gradients:
                trace.begin(f"{EVALUATION}: pass")
                with torch.no_grad(), evaluating(self.model), self._around_step():
                    self._evaluate(trace)
            trace.begin("between")
            self._trace_step(trace)
        return DepthTrace.of(trace, resident, trained)

    @property
    def _evaluates(self) -> bool:
        return self.setup.evaluates

    def _evaluate(self, trace: Trace) -> None:
        """A batch of evaluation. Nothing else is kept from batch to batch on the device: losses, or scores."""
        self._loss(trace, self.setup.rows(self.setup.eval_batch))

    def _trace_step(self, trace: Trace) -> None:
        setup = self.setup
        self.model.train()
        if setup.checkpointing:
            bare_model(self.model).activation_checkpointing_enable({"use_reentrant": False})
        rows = setup.rows(setup.train_batch)
        if setup.accumulates or rows < setup.train_batch:
            fill_gradients(trace, self.model)
        trace.begin(f"{STEP}: forward")
        with segments_of_backward(trace, self.model, f"{STEP}: backward"), self._around_step():
            loss = self._loss(trace, rows)
            trace.begin(f"{STEP}: backward, loss")
            loss.backward()

    def _around_step(self) -> AbstractContextManager:
        return nullcontext()

    def _loss(self, trace: Trace, rows: int) -> Tensor:
        raise NotImplementedError


def padded_rows(rows: int, length: int) -> dict[str, Tensor]:
    """Ids of a batch, and a mask if rows may be padded, as they are where there are several."""
    batch = {"input_ids": torch.zeros(rows, length, dtype=torch.int64)}
    batch["attention_mask"] = torch.ones(rows, length, dtype=torch.int64) if rows > 1 else None
    return batch


class _SFT(_Training):
    """Of TRL's `SFTTrainer`."""

    def _before_adapter(self, model: nn.Module) -> None:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))

    def _after_adapter(self) -> None:
        if self.setup.quantization == "none" or not self.setup.use_peft:
            return
        for parameter in self.model.parameters():  # TRL trains adapters of a quantized base in bf16
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)

    @contextmanager
    def _around_step(self) -> Iterator[None]:
        with (
            adapters_in_autocast_dtype(self.model, enabled=self.setup.autocast is not None),
            tiles_of(self.setup.device),
        ):
            yield

    def _loss(self, trace: Trace, rows: int) -> Tensor:
        setup = self.setup
        batch = padded_rows(rows, setup.length)
        autocast = setup.autocast
        n_targets = rows * (setup.length - 1 if setup.learns_prompts else setup.completion_tokens)
        with (
            torch.autocast("cpu", dtype=autocast, enabled=autocast is not None),
            trace.selecting(n_targets),
        ):
            outputs = self.model(**batch, labels=batch["input_ids"], use_cache=False, fused_lm_head=True)
            return (-outputs.log_probs).sum()


class _Reward(_Training):
    """Of `BradleyTerryTrainer`."""

    task = "reward"

    def _before_adapter(self, model: nn.Module) -> None:
        set_layout(model, self.setup)

    @property
    def _evaluates(self) -> bool:
        return True  # the scores are normalized after training, in batches of evaluation

    def _evaluate(self, trace: Trace) -> None:
        if self.setup.evaluates:
            super()._evaluate(trace)
            return
        # For the normalization, each completion is a row of its own.
        setup = replace(self.setup, per_prompt=1, layout="plain")
        self._scores(trace, padded_rows(setup.rows(setup.eval_batch), setup.length))

    def _around_step(self) -> AbstractContextManager:
        return mixed_precision(self.model, self.setup.autocast)

    def _loss(self, trace: Trace, rows: int) -> Tensor:
        setup = self.setup
        n = rows * setup.per_prompt
        if setup.layout == "plain":
            inputs: dict[str, Any] = padded_rows(n, setup.length)
        else:
            inputs = model_inputs(self.model, self._packed_rows(rows))
        return self._scores(trace, inputs)

    def _scores(self, trace: Trace, inputs: dict[str, Any]) -> Tensor:
        """A pass, and the sum of the scores of the last tokens of rows."""
        outputs = []
        head = bare_model(self.model).score
        hook = head.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            self.model(**inputs, use_cache=False)
        finally:
            hook.remove()
        with trace.using(LOGITS):
            return outputs[-1].float().squeeze(-1)[:, -1].sum()

    def _packed_rows(self, rows: int) -> dict[str, Any]:
        """The batch of the collator in the shared-prefix layout: all segments in one row, or each prompt in one."""
        setup = self.setup
        return packed_batch(rows * setup.per_prompt, setup, layout_of(self.model, setup), whole=True)


def set_layout(model: nn.Module, setup: Setup) -> None:
    """Sets attention by segments, where completions share prompts and the model can."""
    if setup.layout == "shared_prefix" and model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(SEGMENTS)


def layout_of(model: nn.Module, setup: Setup) -> Layout:
    """The layout of batches for a model, also inside PEFT, that `set_layout` has seen."""
    if setup.layout == "plain":
        return Layout.PLAIN
    attention = bare_model(model).config.get_text_config()._attn_implementation
    return Layout.SEGMENTS if attention == SEGMENTS else Layout.MASK


def packed_batch(rows: int, setup: Setup, layout: Layout, *, whole: bool = False) -> Any:
    """Rows in a layout that shares prompts, as real tensors, whose sizes depend on numbers.

    Args:
        rows: number of completions.
        setup: options of the run.
        layout: the layout.
        whole: whether completions keep their last token, from which nothing is predicted.
    """
    with without_fakes():
        completion = setup.completion_tokens + (1 if whole else 0)
        mask = torch.ones(rows, completion, dtype=torch.bool)
        ids = torch.zeros(rows, setup.prompt_tokens + completion, dtype=torch.int64)
        lengths = torch.full((rows,), setup.prompt_tokens)
        groups = packed_groups(ids, lengths, mask, setup.per_prompt, layout)
    return groups.batch if whole else groups
