"""The phases of PPO: sampling, scoring by the reward model and by the roles, and the updates of policy and critic.

The trainer itself is in a sub-package that this one must not import. What runs here are the functions that it calls.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
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
    captured_hidden_states,
    chunked_logprobs,
    completion_hidden_states,
    contiguous_head_inputs,
    hidden_width,
    scatter_to_mask,
)
from ..packing import Layout
from ..prefix import model_inputs
from ..probing import evaluating
from ..stack import AdapterStack
from .fake_model import build_base, fake_mode, make_fake, new_head, shallow_config, with_adapter
from .live_bytes import state_tensors
from .setup import Setup
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
from .training import layout_of, packed_batch, padded_rows, set_layout

ROLLOUT = "rollout"
REWARD = "reward"
SCORING = "scoring"
POLICY_UPDATE = "policy update"
VALUE_UPDATE = "value update"

_NOT_COUNTED = "not counted"
"""Segment of what only prepares the next one."""

_SCORER_BATCH = 32
"""Sequences of a pass of `RewardScorer`, at most."""

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


def trace_reward_model(
    config: PretrainedConfig, setup: Setup, depth: int, *, only_gradients: bool = False
) -> DepthTrace:
    """Traces the passes of a reward model that is a model of its own. Arguments as of `trace_ppo`."""
    mode = fake_mode()
    model = build_base(shallow_config(config, depth), setup, task="reward")
    set_layout(model, setup)
    if setup.use_peft:
        model = with_adapter(model, setup, task="reward")
    make_fake(model, mode, setup)
    model.requires_grad_(False)
    with tracing(mode) as trace:
        trace.track((tensor for _, tensor in state_tensors(model)), "reward model")
        resident = resident_bytes(trace)
        if only_gradients:
            return DepthTrace.of(trace, resident, [])
        trace.begin(f"{REWARD}: pass")
        with torch.no_grad(), evaluating(model), mixed_precision(model, setup.autocast):
            _score(model, bare_model(model).score, setup)
    return DepthTrace.of(trace, resident, [])


def _score(model: nn.Module, head: nn.Module, setup: Setup) -> Tensor:
    """One pass of `RewardScorer` with a score head."""
    rows = min(_SCORER_BATCH, setup.rollout)
    layout = layout_of(model, setup)
    if layout == Layout.PLAIN or rows % setup.per_prompt:
        inputs: dict[str, Any] = padded_rows(rows, setup.length)
    else:
        inputs = model_inputs(model, packed_batch(rows, setup, layout, whole=True), layout)
    if model.get_output_embeddings() is not None:
        with captured_hidden_states(model) as captured:
            model(**inputs, use_cache=False)
        return head(captured[-1]).squeeze(-1)
    return model(**inputs, use_cache=False).logits


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
            self._trace.relabel(layer.keys, "KV cache")
            self._trace.relabel(layer.values, "KV cache")


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
            self._attach_separate("reference", "reference model", config)
        elif setup.starts_from_adapter:
            self.stack.attach("reference", self._new_adapter())
        else:
            self.stack.attach("reference")
        if setup.reward == "shared":
            self.stack.attach("reward", self._new_adapter(), head=new_head(self.width))
        if setup.critic == "adapter":
            self.stack.attach("value", self._new_adapter(), head=new_head(self.width), trainable=True)
        elif setup.critic == "model":
            model = self._attach_separate("value", "critic model", config)
            model.requires_grad_(True)
            self.stack.attach("value", model, head=new_head(self.width), trainable=True)
        elif setup.critic == "head":
            role = copy.copy(self.stack.roles["policy"])
            role.head = new_head(self.width)
            self.model.add_module("value_head", role.head)
            self.stack.roles["value"] = role

    def _new_adapter(self) -> Any:
        config = copy.deepcopy(self.model.active_peft_config)
        config.inference_mode = False
        return config

    def _attach_separate(self, role: str, use: str, config: PretrainedConfig) -> nn.Module:
        model = build_base(config, self.setup, task="causal_lm")
        set_layout(model, self.setup)
        model.requires_grad_(False)
        self.separate[use] = model
        if role == "reference":
            self.stack.attach(role, model)
        return model

    # ---- Phases ----

    def trace(self, *, only_gradients: bool) -> DepthTrace:
        """The peaks of all phases, or only of those with gradients."""
        with tracing(self.mode) as trace, _tiles_of(self.setup.device):
            self._track(trace)
            resident = resident_bytes(trace)
            trained = trained_sizes(self.model)
            trace.begin(_NOT_COUNTED)
            if not only_gradients:
                with torch.no_grad(), evaluating(self.model):
                    self._sample(trace)
                    self._score_reward(trace)
                    self._score_roles(trace)
                trace.begin(_NOT_COUNTED)
            self._update(trace)
        return DepthTrace.of(trace, resident, trained)

    def _score_reward(self, trace: Trace) -> None:
        """A pass of a reward model that is an adapter on the base."""
        if self.setup.reward != "shared":
            return
        trace.begin(f"{REWARD}: pass")
        with self.stack.activate("reward") as model, mixed_precision(self.model, self.setup.autocast):
            _score(model, self.stack.roles["reward"].head, self.setup)

    def _track(self, trace: Trace) -> None:
        for use, separate in self.separate.items():
            track_weights(trace, separate, base=use)
        track_weights(trace, self.model)
        tokens = self.setup.length * 8 + _FIELDS * self.setup.completion_tokens * 4
        self._rollout = torch.empty(self.setup.rollout * tokens, dtype=torch.uint8)
        trace.track([self._rollout], ROLLOUT)

    def _sample(self, trace: Trace) -> None:
        """The prefill of the prompts, and the step that samples the last token."""
        setup = self.setup
        batch = setup.generation_batch
        trace.begin(f"{ROLLOUT}: prefill")
        with (
            trace.using("merged copy") if setup.merges else trace.using("temporary"),
            merged_adapter(self.model, enabled=setup.merges),
        ):
            trace.begin(f"{ROLLOUT}: prefill")
            with _own_use(trace), mixed_precision(self.model, setup.autocast), contiguous_head_inputs(self.model):
                cache = self._prefill(trace, batch // setup.per_prompt, setup.prompt_tokens)
                if setup.per_prompt > 1:
                    for index, layer in enumerate(cache.layers):
                        layer.batch_select_indices(torch.zeros(batch, dtype=torch.int64))
                        cache.relabel(index)
                trace.begin(_NOT_COUNTED)
                cache = self._lengthened(trace, cache, setup.length - 2)
                trace.begin(f"{ROLLOUT}: last token")
                self._sample_token(batch, cache)
            trace.begin(_NOT_COUNTED)

    def _prefill(self, trace: Trace, rows: int, length: int) -> _CountedCache:
        cache = _CountedCache(trace, self.model)
        self.model(**padded_rows(rows, length), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

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

    def _score_roles(self, trace: Trace) -> None:
        """One chunk of `Roles.score`."""
        setup = self.setup
        roles = ["policy", "value"] if setup.critic != "none" else ["policy"]
        if setup.needs_reference:
            roles.append("reference")
        found = {(self.stack.roles[role].adapter, id(self.stack.roles[role].model)): role for role in roles}
        copies = 1
        if setup.joint_scoring and self.stack.can_score_jointly:
            copies = len(found)
        rows = setup.rows(max(1, setup.train_batch // copies))
        trace.begin(f"{SCORING}: pass")
        with mixed_precision(self.model, setup.autocast):
            hidden = []
            # With joint scoring, one pass has a copy of the rows for each adapter.
            for role in list(found.values())[: 1 if copies > 1 else None]:
                with self.stack.activate(role) as model:
                    hidden.append(self._hidden_states(model, rows * copies))
            with trace.using(LOGITS):
                states = hidden[0][: len(hidden[0]) // copies]
                self._logprobs(states, torch.zeros(len(states), dtype=torch.int64))

    def _update(self, trace: Trace) -> None:
        setup = self.setup
        self.model.train()
        if setup.checkpointing:
            for model in (bare_model(self.model), *self.separate.values()):
                model.gradient_checkpointing_enable({"use_reentrant": False})
            if setup.use_peft:
                self.model.enable_input_require_grads()
        rows = setup.rows(setup.train_batch)
        roles = ("policy", "value") if setup.critic in ("adapter", "model") else ("policy",)
        if setup.accumulates or rows < setup.train_batch:
            fill_gradients(trace, self.model)
        for role in roles:
            phase = POLICY_UPDATE if role == "policy" else VALUE_UPDATE
            with self.stack.activate(role) as model, segments_of_backward(trace, model, f"{phase}: backward"):
                trace.begin(f"{phase}: forward")
                loss = self._loss(role, model, rows)
                trace.begin(f"{phase}: backward, loss")
                loss.backward()
            del loss

    def _loss(self, role: str, model: nn.Module, rows: int) -> Tensor:
        """The loss of a role, without what is as small as its (B, T) results."""
        setup = self.setup
        mask = torch.ones(rows, setup.completion_tokens, dtype=torch.bool)
        with mixed_precision(self.model, setup.autocast):
            hidden = self._hidden_states(model, rows)
            loss = torch.zeros(())
            if role == "value" or setup.critic == "head":
                head: ScalarHead = self.stack.roles["value"].head
                loss = loss + scatter_to_mask(head(hidden).squeeze(-1), mask).square().sum()
            if role == "value":
                return loss
            targets = torch.zeros(len(hidden), dtype=torch.int64)
            logprobs, entropies = self._logprobs(hidden, targets)
            loss = loss + scatter_to_mask(logprobs, mask).exp().sum()
            if setup.entropy_bonus:
                loss = loss + scatter_to_mask(entropies, mask).sum()
        return loss

    def _hidden_states(self, model: nn.Module, rows: int) -> Tensor:
        """`completion_hidden_states` of full completions."""
        setup = self.setup
        layout = layout_of(model, setup)
        if layout == Layout.PLAIN:
            ids = torch.zeros(rows, setup.length, dtype=torch.int64)
            mask = torch.ones(rows, setup.completion_tokens, dtype=torch.bool)
            lengths = torch.full((rows,), setup.prompt_tokens)
            return completion_hidden_states(model, model, ids, lengths, mask)
        groups = packed_batch(rows, setup, layout)
        inputs = model_inputs(model, groups.batch, layout)
        with captured_hidden_states(model) as captured:
            model(**inputs, use_cache=False)
        return captured[0].flatten(0, 1)[groups.predicting]

    def _logprobs(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """`chunked_logprobs`, which does not recognize a frozen head if it has no data."""
        setup = self.setup
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


@contextmanager
def _own_use(trace: Trace) -> Iterator[None]:
    """Inside the context, new tensors are activations again."""
    with trace.using("activations"):
        yield


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
