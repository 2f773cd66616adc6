"""The phases of PPO: sampling, scoring by the reward model and by the roles, and the updates of policy and critic.

The trainer itself is in a sub-package that this one must not import. What runs here are the functions that it calls.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PretrainedConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .. import vocabulary_tiles
from ..adapters import bare_model, merged_adapter, mixed_precision
from ..heads import ScalarHead
from ..logprobs import (
    FEW_LOGITS_BYTES,
    chunked_kl,
    chunked_logprobs,
    contiguous_head_inputs,
    hidden_width,
    scatter_to_mask,
)
from ..probing import evaluating
from ..stack import AdapterStack
from .fake_model import build_base, fake_mode, make_fake, new_head, shallow_config, with_adapter
from .ppo_passes import (
    NOT_COUNTED,
    POLICY_UPDATE,
    REWARD,
    ROLLOUT,
    SCORING,
    TEXTS,
    VALUE_UPDATE,
    adds_gradients,
    hidden_states,
    score_rows,
)
from .setup import Setup
from .trace import (
    LOGITS,
    TEMPORARY,
    DepthTrace,
    Trace,
    fill_gradients,
    resident_bytes,
    segments_of_backward,
    tracing,
    track_weights,
    trained_sizes,
)
from .training import EVALUATION, layout_of, padded_rows, set_layout

_COPY = "merged copy"
_CACHE = "KV cache"

_COMPARED = ("policy", "reference")
"""Roles between which the exact KL is."""

_FIELDS = 8
"""Tensors (B, T) in fp32 of a rollout."""


def trace_ppo(config: PretrainedConfig, setup: Setup, depth: int, *, only_gradients: bool = False) -> DepthTrace:
    """Traces the phases of PPO with the first layers of a model.

    Args:
        config: config of the policy.
        setup: options of the run.
        depth: number of layers.
        only_gradients: whether phases without gradients are left out.
    """
    return _PPO(config, setup, depth).trace(only_gradients=only_gradients)


class _CountedCache(DynamicCache):
    """A cache whose keys and values are counted as such."""

    def __init__(self, trace: Trace, model: nn.Module):
        super().__init__(config=bare_model(model).config.get_text_config())
        self._trace = trace

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Adds tokens of a layer, as in Transformers."""
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.relabel(layer_idx)
        return found

    def relabel(self, layer_idx: int) -> None:
        """Counts what a layer holds as cache."""
        layer = self.layers[layer_idx]
        if layer.is_initialized:
            self._trace.relabel(layer.keys, _CACHE)
            self._trace.relabel(layer.values, _CACHE)


class _PPO:
    """Policy, reference, critic and a reward adapter on one base, and their passes."""

    def __init__(self, config: PretrainedConfig, setup: Setup, depth: int):
        self.setup = setup
        self.mode = fake_mode()
        config = shallow_config(config, depth)
        model = build_base(config, setup, task="causal_lm")
        set_layout(model, setup)
        if setup.use_peft:
            model = with_adapter(model, setup, task="causal_lm")
        self.stack = AdapterStack(model)
        self.width = hidden_width(model)
        self.separate: dict[str, nn.Module] = {}
        with torch.device("meta"):
            self._attach_roles(config)
        for role in self.stack.roles.values():
            role.layout = layout_of(model, setup)
        make_fake(model, self.mode, setup)
        for separate in self.separate.values():
            make_fake(separate, self.mode, setup)

    @property
    def model(self) -> nn.Module:
        """The policy."""
        return self.stack.model

    def _attach_roles(self, config: PretrainedConfig) -> None:
        setup = self.setup
        if not setup.use_peft:
            self._attach_reference(config)
        elif setup.starts_from_adapter:
            self.stack.attach("reference", self._new_adapter())
        else:
            self.stack.attach("reference")
        for number in range(setup.reward_adapters):
            role = "reward" if number == 0 else f"reward_{number}"
            self.stack.attach(role, self._new_adapter(), head=new_head(self.width))
        if setup.critic == "adapter":
            self.stack.attach("value", self._new_adapter(), head=new_head(self.width), trainable=True)
        elif setup.critic == "head":
            role = copy.copy(self.stack.roles["policy"])
            role.head = new_head(self.width)
            self.model.add_module("value_head", role.head)
            self.stack.roles["value"] = role

    def _new_adapter(self) -> Any:
        config = copy.deepcopy(self.model.active_peft_config)
        config.inference_mode = False
        return config

    def _attach_reference(self, config: PretrainedConfig) -> None:
        """The frozen copy of a policy that is trained whole."""
        model = build_base(config, self.setup, task="causal_lm")
        set_layout(model, self.setup)
        self.separate["reference model"] = model
        self.stack.attach("reference", model)

    # ---- Phases ----

    def trace(self, *, only_gradients: bool) -> DepthTrace:
        """The peaks of all phases, or only of those with gradients."""
        with tracing(self.mode) as trace, _tiles_of(self.setup.device):
            self._track(trace)
            resident = resident_bytes(trace)
            trained = trained_sizes(self.model)
            trace.begin(NOT_COUNTED)
            if not only_gradients:
                with torch.no_grad(), evaluating(self.model):
                    self._sample(trace, ROLLOUT, self.setup)
                    self._score_reward(trace, f"{REWARD}: pass", self.setup)
                    self._score_roles(trace, f"{SCORING}: pass", self.setup)
                    if self.setup.evaluates:
                        self._evaluate(trace, self.setup.of_evaluation)
                trace.begin(NOT_COUNTED)
            self._update(trace)
        return DepthTrace.of(trace, resident, trained)

    def _evaluate(self, trace: Trace, setup: Setup) -> None:
        """A batch of an evaluation: its own rollout, and the exact KL of single completions."""
        self._sample(trace, EVALUATION, setup)
        self._score_reward(trace, f"{EVALUATION}: reward", setup)
        self._score_roles(trace, f"{EVALUATION}: scoring", setup)
        if setup.exact_kl:
            self._exact_kl(trace, setup)
        trace.begin(NOT_COUNTED)

    def _score_reward(self, trace: Trace, segment: str, setup: Setup) -> None:
        """A pass of a reward model that is an adapter on the base."""
        if not setup.reward_adapters:
            return
        trace.begin(segment)
        with self.stack.activate("reward") as model, mixed_precision(self.model, setup.autocast):
            score_rows(model, self.stack.roles["reward"].head, setup)

    def _track(self, trace: Trace) -> None:
        for use, separate in self.separate.items():
            track_weights(trace, separate, base=use)
        track_weights(trace, self.model)
        tokens = self.setup.length * 8 + _FIELDS * self.setup.completion_tokens * 4
        self._rollout = torch.empty(self.setup.rollout * tokens, dtype=torch.uint8)
        trace.track([self._rollout], ROLLOUT)

    def _sample(self, trace: Trace, phase: str, setup: Setup) -> None:
        """The merge of the adapter, the prefill of the prompts, and the step that samples the last token."""
        batch = setup.generation_batch
        with ExitStack() as while_sampling:
            trace.begin(f"{phase}: merge")
            with trace.using(_COPY):
                while_sampling.enter_context(merged_adapter(self.model, enabled=setup.merges))
            _only_kept(trace, f"{phase}: merge", _COPY)
            while_sampling.enter_context(mixed_precision(self.model, setup.autocast))
            while_sampling.enter_context(contiguous_head_inputs(self.model))
            trace.begin(f"{phase}: prefill")
            cache = self._prefill(trace, batch // setup.per_prompt, setup.prompt_tokens)
            if setup.per_prompt > 1:
                trace.begin(f"{phase}: shared prompts")
                with trace.using(_CACHE):
                    self._repeat(cache, batch)
                _only_kept(trace, f"{phase}: shared prompts", _CACHE)
            trace.begin(NOT_COUNTED)
            cache = self._lengthened(trace, cache, setup.length - 2)
            trace.begin(f"{phase}: last token")
            self._sample_token(batch, cache)
            trace.begin(NOT_COUNTED)

    def _prefill(self, trace: Trace, rows: int, length: int) -> _CountedCache:
        cache = _CountedCache(trace, self.model)
        self.model(**padded_rows(rows, length), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    @staticmethod
    def _repeat(cache: _CountedCache, rows: int) -> None:
        """Repeats the keys and values of the prompts for their completions."""
        for index, layer in enumerate(cache.layers):
            if layer.is_initialized:
                layer.batch_select_indices(torch.zeros(rows, dtype=torch.int64))
                cache.relabel(index)

    def _lengthened(self, trace: Trace, cache: DynamicCache, length: int) -> DynamicCache:
        """A cache of more tokens for the same rows."""
        longer = _CountedCache(trace, self.model)
        for index, layer in enumerate(cache.layers):
            if layer.is_initialized:
                keys, values = ((*x.shape[:2], length, x.shape[3]) for x in (layer.keys, layer.values))
                dtype = layer.keys.dtype
                longer.update(torch.empty(keys, dtype=dtype), torch.empty(values, dtype=dtype), index)
        return longer

    def _sample_token(self, rows: int, cache: DynamicCache) -> Tensor:
        mask = torch.ones(rows, self.setup.length - 1, dtype=torch.int64)
        ids = torch.zeros(rows, 1, dtype=torch.int64)
        width = bare_model(self.model).config.get_text_config().vocab_size
        # Of the token before: its logits, the scores that were sampled from, and their probabilities.
        logits, before, probabilities = (torch.empty(rows, width, dtype=torch.float32) for _ in range(3))
        outputs = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits = outputs.logits[:, -1, :].to(copy=True, dtype=torch.float32)
        scores = self._processors()(ids, logits)
        probabilities = torch.softmax(scores, dim=-1)
        tokens = torch.multinomial(probabilities, num_samples=1)
        return tokens + before.gather(1, ids) - before.logsumexp(1, keepdim=True)

    def _processors(self) -> LogitsProcessorList:
        """What `generate` does to logits, in its order."""
        setup = self.setup
        processors = LogitsProcessorList()
        if setup.min_new_tokens:
            device = torch.device("cpu")
            processors.append(MinLengthLogitsProcessor(setup.length, [0], device=device))
            processors.append(MinNewTokensLengthLogitsProcessor(0, setup.min_new_tokens, [0], device=device))
        if setup.temperature != 1:
            processors.append(TemperatureLogitsWarper(setup.temperature))
        if setup.top_k:
            processors.append(TopKLogitsWarper(setup.top_k))
        if setup.top_p < 1:
            processors.append(TopPLogitsWarper(setup.top_p))
        return processors

    def _score_roles(self, trace: Trace, segment: str, setup: Setup) -> None:
        """One chunk of `Roles.score`."""
        roles = ["policy"]
        if "value" in self.stack.roles:
            roles.append("value")
        if setup.needs_reference:
            roles.append("reference")
        found = {(self.stack.roles[role].adapter, id(self.stack.roles[role].model)): role for role in roles}
        copies = 1
        if setup.joint_scoring and self.stack.can_score_jointly:
            copies = len(found)
        rows = min(setup.rollout, setup.rows(max(1, setup.train_batch // copies), copies))
        trace.begin(segment)
        with mixed_precision(self.model, setup.autocast):
            hidden = []
            # With joint scoring, one pass has a copy of the rows for each adapter.
            for role in list(found.values())[: 1 if copies > 1 else None]:
                with self.stack.activate(role) as model:
                    hidden.append(hidden_states(model, setup, rows * copies))
            with trace.using(LOGITS):
                states = hidden[0][: len(hidden[0]) // copies]
                self._logprobs(states, torch.zeros(len(states), dtype=torch.int64), setup)

    def _exact_kl(self, trace: Trace, setup: Setup) -> None:
        """The KL of one completion over the whole vocabulary, as `Roles.exact_kl` computes it."""
        trace.begin(f"{EVALUATION}: exact KL")
        copies = 2 if setup.joint_scoring and self.stack.can_score_jointly else 1
        with mixed_precision(self.model, setup.autocast):
            hidden = []
            for role in _COMPARED[: 1 if copies == 2 else None]:
                with self.stack.activate(role) as model:
                    hidden += hidden_states(model, setup, copies).chunk(copies)
            heads = [(self.stack.roles[role].model or self.model).get_output_embeddings() for role in _COMPARED]
            with trace.using(LOGITS):
                chunked_kl(*hidden, *heads, temperature=setup.temperature, chunk_size=setup.logprobs_chunk)

    def _update(self, trace: Trace) -> None:
        setup = self.setup
        self.model.train()
        if setup.checkpointing:
            bare_model(self.model).activation_checkpointing_enable({"use_reentrant": False})
            if setup.use_peft:
                self.model.enable_input_require_grads()
        if adds_gradients(setup):
            fill_gradients(trace, self.model)
        for role in ("policy", "value") if setup.critic == "adapter" else ("policy",):
            phase = POLICY_UPDATE if role == "policy" else VALUE_UPDATE
            self._pass(trace, role, phase, lambda model, role=role: self._loss(role, model, setup))
        if setup.ptx_batch:
            # Gradients of all roles are there, as the texts come after the last micro-batch of a step.
            self._pass(trace, "policy", TEXTS, lambda model: self._loss_of_texts(model, setup.of_texts))

    def _pass(self, trace: Trace, role: str, phase: str, loss_of: Callable[[nn.Module], Tensor]) -> None:
        """Forward and backward pass of a role."""
        with self.stack.activate(role) as model, segments_of_backward(trace, model, f"{phase}: backward"):
            trace.begin(f"{phase}: forward")
            loss = loss_of(model)
            trace.begin(f"{phase}: backward, loss")
            loss.backward()

    def _loss_of_texts(self, model: nn.Module, setup: Setup) -> Tensor:
        with mixed_precision(self.model, setup.autocast):
            hidden = hidden_states(model, setup, setup.rows(setup.train_batch))
            logprobs, _ = self._logprobs(hidden, torch.zeros(len(hidden), dtype=torch.int64), setup)
            return -logprobs.sum()

    def _loss(self, role: str, model: nn.Module, setup: Setup) -> Tensor:
        """The loss of a role, without what is as small as its (B, T) results."""
        rows = setup.rows(setup.train_batch)
        mask = torch.ones(rows, setup.completion_tokens, dtype=torch.bool)
        with mixed_precision(self.model, setup.autocast):
            hidden = hidden_states(model, setup, rows)
            loss = torch.zeros(())
            if role == "value" or setup.critic == "head":
                head: ScalarHead = self.stack.roles["value"].head
                loss = loss + scatter_to_mask(head(hidden).squeeze(-1), mask).square().sum()
            if role == "value":
                return loss
            targets = torch.zeros(len(hidden), dtype=torch.int64)
            logprobs, entropies = self._logprobs(hidden, targets, setup)
            loss = loss + scatter_to_mask(logprobs, mask).exp().sum()
            if setup.entropy_bonus:
                loss = loss + scatter_to_mask(entropies, mask).sum()
        return loss

    def _logprobs(self, hidden: Tensor, targets: Tensor, setup: Setup) -> tuple[Tensor, Tensor]:
        """`chunked_logprobs`, which does not recognize a frozen head if it has no data."""
        layer = self.model.get_output_embeddings()
        is_frozen = type(layer) is nn.Linear and not layer.weight.requires_grad
        if is_frozen and setup.logprobs_chunk is None and len(targets) * layer.out_features * 4 > FEW_LOGITS_BYTES:
            return vocabulary_tiles.tiled_logprobs(
                hidden,
                layer,
                targets,
                scale=1.0,
                softcap=None,
                temperature=setup.temperature,
                entropy_requires_grad=setup.entropy_bonus,
            )
        return chunked_logprobs(
            hidden,
            layer,
            targets,
            temperature=setup.temperature,
            chunk_size=setup.logprobs_chunk,
            entropy_requires_grad=setup.entropy_bonus,
        )


def _only_kept(trace: Trace, segment: str, use: str) -> None:
    """Counts what a use had at the peak of a segment, beyond what is left of it now, as temporary.

    What is left grows with the number of layers, what was temporary does not.
    """
    peak = trace.peaks[segment]
    kept = min(peak.get(use, 0), trace.by_use.get(use, 0))
    peak[TEMPORARY] = peak.get(TEMPORARY, 0) + peak.get(use, 0) - kept
    peak[use] = kept


@contextmanager
def _tiles_of(device: str) -> Iterator[None]:
    """Inside the context, tiles of logits have the size that they have on a device, though tensors are on the CPU."""
    sizes = vocabulary_tiles._TILE_BYTES
    before = sizes["cpu"]
    if device != "cpu":
        sizes["cpu"] = vocabulary_tiles._OTHER_TILE_BYTES
    try:
        yield
    finally:
        sizes["cpu"] = before
