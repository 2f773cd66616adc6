"""Reward models and critics of PPO that are models of their own, beside the policy."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ..adapters import bare_model, mixed_precision
from ..logprobs import hidden_width, scatter_to_mask
from ..probing import evaluating
from .fake_model import build_base, fake_mode, make_fake, new_head, shallow_config, with_adapter
from .live_bytes import state_tensors
from .ppo_passes import (
    NOT_COUNTED,
    POLICY_UPDATE,
    REWARD,
    SCORING,
    TEXTS,
    VALUE_UPDATE,
    adds_gradients,
    hidden_states,
    score_rows,
)
from .setup import Setup
from .sources import Source, find_source
from .trace import (
    GRADIENTS,
    DepthTrace,
    Peaks,
    Trace,
    fill_gradients,
    resident_bytes,
    segments_of_backward,
    tracing,
    track_weights,
    trained_sizes,
)
from .training import EVALUATION, set_layout

_REWARD_MODEL = "reward model"
_CRITIC_MODEL = "critic model"

_RECORD = "reward_normalization.json"
"""File of a reward model that says in which precision it was trained."""

Parts = dict[str, int]
"""Bytes by use."""


def reward_sources(
    rewards: Sequence[Any], policy: Source, setup: Setup, *, trust_remote_code: bool = False
) -> tuple[tuple[Source, ...], int]:
    """Tells reward models of their own from adapters on the base of the policy.

    Args:
        rewards: for each reward what `plan_memory` takes as `reward_model`.
        policy: the policy.
        setup: options of the run.
        trust_remote_code: whether to run Python code from the repository of a reward model.

    Returns:
        The reward models of their own, and the number of those that share the base.
    """
    own: list[Source] = []
    n_shared = 0
    for reward in rewards:
        if reward is False:
            continue
        if reward is None:  # made from the same base as the policy
            source, shares = replace(policy, is_adapter=setup.use_peft), setup.use_peft
        else:
            source = find_source(reward, stage="ppo", option="reward_model", trust_remote_code=trust_remote_code)
            source = _as_trained(source, reward)
            shares = _shares_base(source, reward, policy, setup)
        if shares:
            n_shared += 1
        else:
            own.append(source)
    return tuple(own), n_shared


def _as_trained(source: Source, reward: Any) -> Source:
    """A reward model with its precision, where that is known: of a loaded one, or as written beside the weights."""
    if isinstance(reward, nn.Module):
        return replace(source, dtype=getattr(reward, "dtype", None))
    if not isinstance(reward, str | os.PathLike):
        return source
    record = Path(reward).expanduser() / _RECORD
    if not record.is_file():
        return source
    found = json.loads(record.read_text())
    dtype = getattr(torch, str(found.get("base_dtype")), None)
    kind = "4bit" if found.get("load_in_4bit") else "8bit" if found.get("quantization") else "none"
    return replace(source, quantization=source.quantization or kind, dtype=dtype)


def _shares_base(source: Source, reward: Any, policy: Source, setup: Setup) -> bool:
    """Whether a reward model is an adapter that can be put on the base of the policy."""
    if not (setup.use_peft and source.is_adapter) or isinstance(reward, nn.Module):  # a loaded one keeps its base
        return False
    if source.quantization not in (None, setup.quantization):
        return False
    is_other_dtype = setup.quantization == "none" and source.dtype not in (None, setup.dtype)
    return not is_other_dtype and _is_same_model(source.config, policy.config)


def _is_same_model(one: PretrainedConfig, other: PretrainedConfig) -> bool:
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
    one, other = one.get_text_config(), other.get_text_config()
    return all(getattr(one, name, None) == getattr(other, name, None) for name in names)


def setup_of_reward_model(setup: Setup, source: Source) -> Setup:
    """The options with the precision of a reward model: an adapter has the base of training, assumed as the policy's.

    A whole model is quantized only if its checkpoint is.
    """
    quantization = setup.quantization if source.is_adapter else "none"
    return replace(
        setup,
        quantization=source.quantization or quantization,
        dtype=source.dtype or setup.dtype,
        use_peft=source.is_adapter,
    )


def setup_of_critic(setup: Setup, source: Source | None) -> Setup:
    """The options with the precision of a critic that starts from `source`, which is loaded in fp32; or from a policy
    that is trained whole, of which it is a copy."""
    own = replace(setup, quantization="none", use_peft=False)
    return own if source is None else replace(own, dtype=torch.float32)


# ---- Their passes ----


def trace_reward_model(
    config: PretrainedConfig, setup: Setup, depth: int, *, only_gradients: bool = False
) -> DepthTrace:
    """Traces the passes of a reward model that is a model of its own. Arguments as of `trace_ppo`.

    Of `setup`, precision and adapter are those of the reward model.
    """
    mode = fake_mode()
    model = build_base(shallow_config(config, depth), setup, task="reward")
    set_layout(model, setup)
    if setup.use_peft:
        model = with_adapter(model, setup, task="reward")
    make_fake(model, mode, setup)
    model.requires_grad_(False)
    with tracing(mode) as trace:
        trace.track((tensor for _, tensor in state_tensors(model)), _REWARD_MODEL)
        resident = resident_bytes(trace)
        if only_gradients:
            return DepthTrace.of(trace, resident, [])
        with torch.no_grad(), evaluating(model), mixed_precision(model, setup.autocast):
            trace.begin(f"{REWARD}: pass")
            score_rows(model, bare_model(model).score, setup)
            if setup.evaluates:
                trace.begin(f"{EVALUATION}: reward")
                score_rows(model, bare_model(model).score, setup.of_evaluation)
    return DepthTrace.of(trace, resident, [])


def trace_critic(config: PretrainedConfig, setup: Setup, depth: int, *, only_gradients: bool = False) -> DepthTrace:
    """Traces the passes of a critic that is a model of its own, which is trained whole. Arguments as of `trace_ppo`.

    Of `setup`, precision is that of the critic.
    """
    mode = fake_mode()
    model = build_base(shallow_config(config, depth), setup, task="causal_lm")
    set_layout(model, setup)
    model.requires_grad_(True)
    output = model.get_output_embeddings()
    if output.weight is not model.get_input_embeddings().weight:
        output.requires_grad_(False)  # a critic does not use it, so that it gets no gradient and no state
    with torch.device("meta"):
        head = new_head(hidden_width(model))
    make_fake(model, mode, setup)
    make_fake(head, mode, setup)
    with tracing(mode) as trace:
        track_weights(trace, model, base=_CRITIC_MODEL)
        track_weights(trace, nn.ModuleDict({"value_head": head}))
        resident = resident_bytes(trace)
        if not only_gradients:
            with torch.no_grad(), evaluating(model), mixed_precision(model, setup.autocast):
                trace.begin(f"{SCORING}: critic")
                head(hidden_states(model, setup, min(setup.rollout, setup.rows(setup.train_batch))))
        trace.begin(NOT_COUNTED)
        model.train()
        if setup.checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if adds_gradients(setup):
            fill_gradients(trace, nn.ModuleList([model, head]))
        _pass_of_critic(trace, model, head, setup)
    return DepthTrace.of(trace, resident, trained_sizes(model) + trained_sizes(head))


def _pass_of_critic(trace: Trace, model: nn.Module, head: nn.Module, setup: Setup) -> None:
    """Forward and backward pass of a critic over a micro-batch."""
    rows = setup.rows(setup.train_batch)
    mask = torch.ones(rows, setup.completion_tokens, dtype=torch.bool)
    with segments_of_backward(trace, model, f"{VALUE_UPDATE}: backward"):
        trace.begin(f"{VALUE_UPDATE}: forward")
        with mixed_precision(model, setup.autocast):
            hidden = hidden_states(model, setup, rows)
            loss = scatter_to_mask(head(hidden).squeeze(-1), mask).square().sum()
        trace.begin(f"{VALUE_UPDATE}: backward, loss")
        loss.backward()


# ---- Beside the policy ----


def with_critic(found: DepthTrace, critic: DepthTrace, setup: Setup) -> DepthTrace:
    """Adds a critic of its own: weights in all phases, gradients where there are those of a step, and its passes.

    Args:
        found: the run without it.
        critic: its passes, see `trace_critic`.
        setup: options of the run.
    """
    gradients = {GRADIENTS: _bytes(critic.trained)}
    phases: dict[str, Peaks] = {}
    for phase, peaks in found.phases.items():
        # The critic is updated after the policy, in each micro-batch.
        has_gradients = phase == TEXTS or (phase == POLICY_UPDATE and adds_gradients(setup))
        beside = _sum(critic.resident, gradients if has_gradients else {})
        phases[phase] = {segment: _sum(parts, beside) for segment, parts in peaks.items()}
    phases[SCORING] |= _beside(critic.phases[SCORING], found.resident)
    of_policy = {GRADIENTS: _bytes(found.trained)}
    phases[VALUE_UPDATE] = _beside(critic.phases[VALUE_UPDATE], _sum(found.resident, of_policy))
    return DepthTrace(phases, _sum(found.resident, critic.resident), found.trained + critic.trained)


def with_reward_models(found: DepthTrace, rewards: Sequence[DepthTrace], setup: Setup) -> DepthTrace:
    """Adds reward models of their own, which are in memory in all phases, or with offloading only while they score.

    Args:
        found: the run without them.
        rewards: for each reward model its passes, see `trace_reward_model`.
        setup: options of the run.
    """
    if not rewards:
        return found
    weights = _sum(*(reward.resident for reward in rewards))
    between = {} if setup.offloads_rewards else weights
    phases = {}
    for phase, peaks in found.phases.items():
        phases[phase] = {
            segment: _sum(parts, weights if _scores(phase, segment) else between) for segment, parts in peaks.items()
        }
    for number, reward in enumerate(rewards):
        for phase, peaks in reward.phases.items():
            others = _sum(found.resident, *(other.resident for other in rewards if other is not reward))
            own = {f"{segment} {number}": parts for segment, parts in peaks.items()}
            phases.setdefault(phase, {}).update(_beside(own, others))
    return DepthTrace(phases, _sum(found.resident, between), found.trained)


def _scores(phase: str, segment: str) -> bool:
    """Whether reward models score in a segment: also those that are adapters on the base of the policy."""
    return phase == REWARD or (phase == EVALUATION and segment == "reward")


def _bytes(trained: Sequence[tuple[int, int]]) -> int:
    return sum(n * size for n, size in trained)


def _beside(peaks: Peaks, parts: Parts) -> Peaks:
    """Segments with something else in memory."""
    return {segment: _sum(own, parts) for segment, own in peaks.items()}


def _sum(*all_parts: Parts) -> Parts:
    """Bytes by use of several together."""
    found: Parts = {}
    for parts in all_parts:
        for use, n_bytes in parts.items():
            found[use] = found.get(use, 0) + n_bytes
    return found
