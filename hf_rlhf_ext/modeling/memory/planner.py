"""`plan_memory`: the memory of a run, by phase, from the config of the model and the options alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import logging as hf_logging

from ...errors import UserError, first_line
from .optimizer_bytes import optimizer_bytes
from .plan import PART_NAMES, MemoryPlan, Part, Phase
from .ppo_phases import REWARD, trace_ppo, trace_reward_model
from .setup import Setup, read_setup
from .sources import Source, find_source
from .trace import DepthTrace, at_depth, highest
from .training import trace_training

_CONTEXT = 500 * 2**20
"""Bytes that CUDA itself takes on a card, with the kernels of PyTorch. Not measured here."""

_FRAGMENTED = 0.05
"""Share of the tensors that the allocator of PyTorch cannot use, as blocks do not fit. Not measured here."""

_ORDER = ("rollout", "reward", "scoring", "policy update", "value update", "training step", "evaluation")
"""Phases in the order in which they happen."""

_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError)


@dataclass(frozen=True)
class PlanRequest:
    """All that a plan is computed from. Two equal requests have the same plan.

    Attributes:
        source: the model.
        setup: the resolved options.
        reward_source: a reward model of its own, in PPO; `None` without.
        notes: what was assumed.
    """

    source: Source
    setup: Setup
    reward_source: Source | None = None
    notes: tuple[str, ...] = ()


def plan_memory(
    model_or_config: Any,
    stage: str,
    args: Any = None,
    *,
    model_args: Any = None,
    reward_model: Any = None,
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
            only; `None` for an adapter on the base of the policy, or a copy if the policy is trained whole.
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
    prompt_tokens: int | None = None,
    completion_tokens: int | None = None,
    device: str | None = None,
) -> PlanRequest:
    """What `plan_memory` computes its plan from. Arguments and errors as there."""
    trust = bool(getattr(args, "trust_remote_code", False))
    revision = getattr(model_args, "revision", None)
    source = find_source(model_or_config, stage=stage, revision=revision, trust_remote_code=trust)
    reward_source, reward = None, None
    if reward_model is False:
        reward = "none"
    elif reward_model is not None:
        reward_source = find_source(reward_model, stage=stage, option="reward_model", trust_remote_code=trust)
        if reward_source.is_adapter and _is_same_model(reward_source.config, source.config):
            reward_source = None
        else:
            reward = "model"
    setup, notes = read_setup(
        stage,
        args,
        model_args,
        reward=reward,
        starts_from_adapter=source.is_adapter,
        stored_quantization=source.quantization,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        device=device,
    )
    if reward_source is None and setup.reward == "model":
        reward_source = source
    return PlanRequest(source, setup, reward_source, tuple(notes))


def _is_same_model(one: PretrainedConfig, other: PretrainedConfig) -> bool:
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
    one, other = one.get_text_config(), other.get_text_config()
    return all(getattr(one, name, None) == getattr(other, name, None) for name in names)


def plan_of(request: PlanRequest) -> MemoryPlan:
    """The plan of a request."""
    setup, source = request.setup, request.source
    traced = _traced(request)
    optimizer = optimizer_bytes(setup.optimizer, traced.trained, setup.device)
    notes = list(request.notes)
    if not optimizer.is_known:
        notes.append(f"optim={setup.optimizer} is not known to the planner: taken as AdamW")
    if setup.device == "cuda":
        notes.append("the reserve for CUDA and its allocator is an assumption, which was not measured")

    phases = []
    for name in sorted(traced.phases, key=_ORDER.index):
        parts = highest(traced.phases[name])
        state = 0 if optimizer.is_paged and name != "optimizer step" else optimizer.state
        phases.append(_phase(name, {**parts, "optimizer": state}))
    step = {**traced.resident, "optimizer": optimizer.state, "temporary": optimizer.step}
    step["gradients"] = sum(n * size for n, size in traced.trained)
    phases.append(_phase("optimizer step", step))
    reserve = 0
    if setup.device == "cuda":
        reserve = _CONTEXT + round(_FRAGMENTED * max(phase.n_bytes for phase in phases))
    return MemoryPlan(
        model=source.name,
        stage=setup.stage,
        device=setup.device,
        options=setup.to_dict(),
        phases=tuple(phases),
        reserve=reserve,
        notes=tuple(notes),
    )


def _phase(name: str, parts: dict[str, int]) -> Phase:
    ordered = sorted(parts, key=lambda part: PART_NAMES.index(part))
    return Phase(name, tuple(Part(part, parts[part]) for part in ordered if parts[part]))


def _traced(request: PlanRequest) -> DepthTrace:
    """What the run needs at the depth of its models."""
    setup = request.setup
    trace = trace_ppo if setup.stage == "ppo" else trace_training
    found = _at_full_depth(trace, request.source.config, setup)
    if setup.stage != "ppo" or setup.reward != "model":
        return found
    reward = _at_full_depth(trace_reward_model, request.reward_source.config, _setup_of_reward_model(request))
    return _with_reward_model(found, reward)


def _setup_of_reward_model(request: PlanRequest) -> Setup:
    """The options with the quantization of the reward model, which is loaded as it was trained."""
    quantization = request.reward_source.quantization or request.setup.quantization
    return replace(request.setup, quantization=quantization)


def _with_reward_model(found: DepthTrace, reward: DepthTrace) -> DepthTrace:
    """The weights of a reward model stay in memory in all phases; its passes are a phase of their own."""
    weights = reward.resident
    phases = {}
    for phase, peaks in found.phases.items():
        phases[phase] = {segment: parts | weights for segment, parts in peaks.items()}
    phases[REWARD] = {segment: found.resident | parts for segment, parts in reward.phases[REWARD].items()}
    return DepthTrace(phases, found.resident | weights, found.trained)


def _at_full_depth(trace: Callable[..., DepthTrace], config: PretrainedConfig, setup: Setup) -> DepthTrace:
    """Traces two shallow models, and continues to the depth of the model."""
    text = config.get_text_config()
    depth = getattr(text, "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise UserError(
            f"model: the config of {config.model_type} names no number of layers, so that it cannot be planned: use "
            "another model, such as Llama, Qwen, Gemma or Mistral."
        )
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        depths = _depths(text, depth)
        if len(depths) == 1:
            return trace(config, setup, depth)
        fewer = trace(config, setup, depths[0], only_gradients=True)
        return at_depth(fewer, trace(config, setup, depths[1]), depths, depth)
    except UserError:
        raise
    except _FAILURES as error:
        raise UserError(
            f"model: {config.model_type} cannot be planned, as its passes need data ({first_line(error)}): train it "
            "with a small batch, and watch the memory."
        ) from error
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
