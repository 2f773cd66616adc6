"""`plan_memory`: the memory of a run, by phase, from the config of the model and the options alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import logging as hf_logging

from ...errors import UserError, first_line
from .fake_model import build_base, has_fused_experts, shallow_config
from .optimizer_bytes import optimizer_bytes
from .plan import PART_NAMES, MemoryPlan, Part, Phase
from .ppo_models import (
    reward_sources,
    setup_of_critic,
    setup_of_reward_model,
    trace_critic,
    trace_reward_model,
    with_critic,
    with_reward_models,
)
from .ppo_phases import trace_ppo
from .setup import Setup, read_setup
from .sources import Source, find_source
from .trace import DepthTrace, at_depth, highest
from .training import trace_training

_CONTEXT = 500 * 2**20
"""Bytes that CUDA itself takes on a card, with the kernels of PyTorch. Not measured here."""

_FRAGMENTED = 0.05
"""Share of the tensors that the allocator of PyTorch cannot use, as blocks do not fit. Not measured here."""

_ORDER = ("rollout", "reward", "scoring", "policy update", "value update", "PPO-ptx", "training step", "evaluation")
"""Phases in the order in which they happen."""

_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError)


@dataclass(frozen=True)
class PlanRequest:
    """All that a plan is computed from. Two equal requests have the same plan.

    Attributes:
        source: the model.
        setup: the resolved options.
        reward_sources: reward models of their own, in PPO.
        value_source: the model that a critic of its own starts from, in PPO; `None` for the policy.
        notes: what was assumed.
    """

    source: Source
    setup: Setup
    reward_sources: tuple[Source, ...] = ()
    value_source: Source | None = None
    notes: tuple[str, ...] = ()


def plan_memory(
    model_or_config: Any,
    stage: str,
    args: Any = None,
    *,
    model_args: Any = None,
    reward_model: Any = None,
    value_model: Any = None,
    evaluates: bool | None = None,
    prompt_tokens: int | None = None,
    completion_tokens: int | None = None,
    device: str | None = None,
) -> MemoryPlan:
    """Plans the memory of a run, before anything is loaded.

    The passes of the run are traced with tensors that have no data, on models with a few layers, and continued to the
    real depth. Of a model that is given by name, only `config.json` is read.

    Args:
        model_or_config: a config, a loaded model, a folder or a Hub id; an adapter stands for its base with it.
        stage: `sft`, `reward` or `ppo`.
        args: config of the trainer, or any object with its options; `None` means the defaults.
        model_args: options of model and adapter, such as `load_in_4bit` and `lora_r`, as those of the commands.
        reward_model: the reward model of PPO: a config, a loaded model, a folder or a Hub id; `False` for functions
            only; `None` for an adapter on the base of the policy, or a copy if the policy is trained whole. A list of
            these means several, with those that only evaluation uses.
        value_model: the model that `critic="model"` starts from, in the same way; `None` for a copy of the policy.
        evaluates: whether the run evaluates; `None` if `eval_strategy` says so.
        prompt_tokens: longest prompt in tokens; `None` if it is not known, with a note in the plan.
        completion_tokens: longest completion in tokens; `None` for the most that the options allow.
        device: `cuda` or `cpu`; `None` for that of this machine.

    Returns:
        The plan.

    Raises:
        UserError: for a model that cannot be trained or planned, in one line.
    """
    request = plan_request(
        model_or_config,
        stage,
        args,
        model_args=model_args,
        reward_model=reward_model,
        value_model=value_model,
        evaluates=evaluates,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        device=device,
    )
    return plan_of(request)


def plan_request(
    model_or_config: Any,
    stage: str,
    args: Any = None,
    *,
    model_args: Any = None,
    reward_model: Any = None,
    value_model: Any = None,
    evaluates: bool | None = None,
    prompt_tokens: int | None = None,
    completion_tokens: int | None = None,
    device: str | None = None,
) -> PlanRequest:
    """What `plan_memory` computes its plan from. Arguments and errors as there."""
    trust = bool(getattr(args, "trust_remote_code", False))
    revision = getattr(model_args, "revision", None)
    source = find_source(model_or_config, stage=stage, revision=revision, trust_remote_code=trust)
    value_source = None
    if value_model is not None:
        value_source = find_source(value_model, stage=stage, option="value_model", trust_remote_code=trust)
    setup, notes = read_setup(
        stage,
        args,
        model_args,
        has_value_model=value_model is not None,
        starts_from_adapter=source.is_adapter,
        stored_quantization=source.quantization,
        evaluates=evaluates,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        device=device,
    )
    if stage != "ppo":
        return PlanRequest(source, setup, notes=tuple(notes))
    rewards = reward_model if isinstance(reward_model, list | tuple) else [reward_model]
    own, n_shared = reward_sources(rewards, source, setup, trust_remote_code=trust)
    setup = replace(setup, reward="shared" if n_shared else "model" if own else "none", reward_adapters=n_shared)
    return PlanRequest(source, setup, own, value_source, tuple(notes))


def plan_of(request: PlanRequest) -> MemoryPlan:
    """The plan of a request."""
    setup, source = request.setup, request.source
    traced = _traced(request)
    optimizer = optimizer_bytes(setup.optimizer, traced.trained, setup.device)
    phases = []
    for name in sorted(traced.phases, key=_ORDER.index):
        parts = highest(traced.phases[name])
        state = 0 if optimizer.is_paged or setup.offloads_optimizer else optimizer.state
        phases.append(_phase(name, {**parts, "optimizer": state}))
    step = {**traced.resident, "optimizer": optimizer.state, "temporary": optimizer.step}
    step["gradients"] = sum(n * size for n, size in traced.trained)
    phases.append(_phase("optimizer step", step))
    return MemoryPlan(
        model=source.name,
        stage=setup.stage,
        device=setup.device,
        options=setup.to_dict(),
        phases=tuple(phases),
        reserve=reserve_bytes(setup.device, max(phase.n_bytes for phase in phases)),
        notes=(*request.notes, *_notes(request, knows_optimizer=optimizer.is_known)),
    )


def _notes(request: PlanRequest, *, knows_optimizer: bool) -> Iterator[str]:
    """What is assumed in a plan, or may not be expected in it."""
    setup, config = request.setup, request.source.config
    if not knows_optimizer:
        yield f"optim={setup.optimizer} is not known to the planner: taken as AdamW"
    if setup.device == "cuda":
        yield "the reserve for CUDA and its allocator is an assumption, which was not measured"
    if setup.quantization != "none" and _keeps_experts_whole(config, setup):
        dtype = str(setup.dtype).removeprefix("torch.")
        yield f"the experts of {config.model_type} are not quantized: bitsandbytes leaves them in {dtype}"


def _keeps_experts_whole(config: PretrainedConfig, setup: Setup) -> bool:
    """Whether the model has experts that bitsandbytes does not quantize."""
    text = config.get_text_config()
    depth = _depths(text, text.num_hidden_layers)[0]
    task = "reward" if setup.stage == "reward" else "causal_lm"
    with _quiet():
        return has_fused_experts(build_base(shallow_config(config, depth), setup, task=task))


def reserve_bytes(device: str, n_bytes: float) -> int:
    """Bytes that a device needs beyond tensors of `n_bytes` bytes."""
    return _CONTEXT + round(_FRAGMENTED * n_bytes) if device == "cuda" else 0


def _phase(name: str, parts: dict[str, int]) -> Phase:
    ordered = sorted(parts, key=lambda part: PART_NAMES.index(part))
    return Phase(name, tuple(Part(part, parts[part]) for part in ordered if parts[part]))


def _traced(request: PlanRequest) -> DepthTrace:
    """What the run needs at the depth of its models."""
    setup = request.setup
    if setup.stage != "ppo":
        return _at_full_depth(trace_training, request.source.config, setup)
    found = _at_full_depth(trace_ppo, request.source.config, setup)
    if setup.critic == "model":
        source = request.value_source or request.source
        own = setup_of_critic(setup, request.value_source)
        found = with_critic(found, _at_full_depth(trace_critic, source.config, own), setup)
    rewards = [
        _at_full_depth(trace_reward_model, source.config, setup_of_reward_model(setup, source))
        for source in request.reward_sources
    ]
    return with_reward_models(found, rewards, setup)


def _at_full_depth(trace: Callable[..., DepthTrace], config: PretrainedConfig, setup: Setup) -> DepthTrace:
    """Traces two shallow models, and continues to the depth of the model."""
    text = config.get_text_config()
    depth = getattr(text, "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise UserError(
            f"model: the config of {config.model_type} names no number of layers, so that it cannot be planned: use "
            "another model, such as Llama, Qwen, Gemma or Mistral."
        )
    try:
        with _quiet():
            depths = _depths(text, depth)
            if len(depths) == 1:
                return trace(config, setup, depth)
            fewer = trace(config, setup, depths[0], only_gradients=True)
            return at_depth(fewer, trace(config, setup, depths[1]), depths, depth)
    except UserError:
        raise
    except _FAILURES as error:
        raise UserError(
            f"model: {config.model_type} cannot be planned ({first_line(error)}): train it with a small batch, and "
            "watch the memory."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside the context, Transformers warns of nothing: the run itself will, once."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)


def _depths(text: PretrainedConfig, depth: int) -> tuple[int, ...]:
    """The two numbers of layers that are traced; the depth alone if it is not larger.

    Layers of several types repeat with a period. Some models begin with dense layers before those with experts.
    """
    first = getattr(text, "first_k_dense_replace", None) or 0
    period = _period(list(getattr(text, "layer_types", None) or ())[first:depth])
    shallow = first + max(2, period)
    deep = shallow + period
    return (shallow, deep) if deep < depth else (depth,)


def _period(kinds: list[str]) -> int:
    """After how many layers their types repeat; 1 without types."""
    for period in range(1, len(kinds)):
        if all(kind == kinds[index % period] for index, kind in enumerate(kinds)):
            return period
    return max(1, len(kinds))
