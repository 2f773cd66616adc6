"""What PPO keeps in the CPU's memory while no stage needs it: frozen reward models, and states of the optimizer.

Both are copied back before they are used, to the bit, so that a run computes the same numbers as without.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn

from ..errors import UserError
from ..modeling.quantization import quantization_kind, quantization_record
from ..training.optimizers import plain_optimizer
from .config import PPOConfig
from .rewards import RewardFunctions

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")


class Offload:
    """Moves what `offload_reward_model` and `offload_optimizer` name, at the borders of stages.

    On a run on the CPU, nothing is moved.

    Args:
        args: options of the run.
        device: device of the run.
    """

    def __init__(self, args: PPOConfig, device: torch.device):
        self._device = device
        self._states_are_away = args.offload_optimizer and device.type != _CPU.type
        self._states: StatesOnCall | None = None
        asked = [name for name in ("offload_reward_model", "offload_optimizer") if getattr(args, name)]
        if asked and device.type == _CPU.type:
            logger.warning("%s: nothing is moved in a run on the CPU.", " and ".join(asked))

    def take_rewards(self, rewards: Sequence[RewardFunctions], policy: nn.Module) -> None:
        """Keeps reward models with a base of their own in the CPU's memory, except while they score.

        Args:
            rewards: the reward functions of training, and those of evaluation.
            policy: the policy, whose base other reward models share.

        Raises:
            UserError: if there is no such reward model, or if one cannot be moved.
        """
        own = [model for functions in rewards for model in functions.models() if model is not policy]
        if not own:
            raise UserError(
                "offload_reward_model: no reward model has a base of its own (functions have no weights, and adapters "
                "on the policy's base are needed all the time): leave it out."
            )
        for model in own:
            _refuse_unmovable(model)
            model.to(_CPU)
        for functions in rewards:
            models = [model for model in functions.models() if model is not policy]
            if models:
                functions.placed = ModelsOnCall(models, self._device).on_device

    def take_states(self, optimizer: Any) -> None:
        """Keeps the states of an optimizer in the CPU's memory from now on, except while it takes a step.

        Nothing happens without `offload_optimizer`. It may be called again with the same optimizer, such as after its
        states were loaded, which puts them on the device.

        Args:
            optimizer: the optimizer, also inside the wrapper of Accelerate.

        Raises:
            UserError: if the optimizer needs its states outside of steps, or moves them itself.
        """
        plain = plain_optimizer(optimizer)
        if not self._states_are_away:
            return
        if self._states is None or self._states.optimizer is not plain:
            _refuse_kept_states(plain)
            self._states = StatesOnCall(plain)
        self._states.put_away()


class ModelsOnCall:
    """Frozen models that are on a device only while they compute.

    Args:
        models: the models, which are in the CPU's memory.
        device: the device on which they compute.
    """

    def __init__(self, models: Sequence[nn.Module], device: torch.device):
        self._models = models
        self._device = device

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside the context, the models are on the device."""
        try:
            for model in self._models:
                model.to(self._device)
            yield
        finally:
            for model in self._models:
                model.to(_CPU)
            # The allocator would keep their blocks, cut for sizes that the next stage does not ask for.
            if self._device.type != _CPU.type:
                clear_device_cache()


class StatesOnCall:
    """The states of an optimizer, which are on the device of their weights only while the optimizer takes a step.

    Args:
        optimizer: an optimizer of `torch.optim`, or a subclass, which has hooks for steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._away: set[tuple[nn.Parameter, str]] = set()
        optimizer.register_step_pre_hook(self._fetch)
        optimizer.register_step_post_hook(self.put_away)

    def put_away(self, *_: Any) -> None:
        """Moves states to the CPU's memory. Single numbers, such as counts of steps, stay where they are."""
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.numel() > 1 and value.device.type != _CPU.type:
                    state[name] = value.to(_CPU)
                    self._away.add((parameter, name))

    def _fetch(self, *_: Any) -> None:
        for parameter, name in self._away:
            state = self.optimizer.state.get(parameter, {})
            if name in state:  # not after other states were loaded
                state[name] = state[name].to(parameter.device)
        self._away.clear()


def _refuse_unmovable(model: nn.Module) -> None:
    """Raises `UserError` for a reward model that cannot go to the CPU's memory and back."""
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1:
        raise UserError(
            "offload_reward_model: a reward model is spread over several devices (device_map): leave the option out, "
            "or load it on one device."
        )
    kind = quantization_kind(quantization_record(model))
    if kind not in ("off", "4-bit"):
        raise UserError(
            f"offload_reward_model: a reward model is quantized ({kind}), and only 4-bit and unquantized ones are "
            "moved: leave the option out, or load it with load_in_4bit."
        )


def _refuse_kept_states(optimizer: Any) -> None:
    """Raises `UserError` for an optimizer whose states cannot leave the device between two steps."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(
            f"offload_optimizer: {name} is no subclass of torch.optim.Optimizer, which has hooks for steps: leave it "
            "out, or choose another optimizer, such as adamw_torch."
        )
    if getattr(optimizer, "is_paged", False):
        raise UserError(
            f"offload_optimizer: {name} moves its states to the CPU itself where memory is short: leave it out, or "
            "choose an optimizer that is not paged, such as adamw_8bit."
        )
    if callable(getattr(optimizer, "eval", None)):
        raise UserError(
            f"offload_optimizer: {name} reads its states at every evaluation and rollout: leave it out, or choose an "
            "optimizer that is not schedule-free, such as adamw_torch."
        )
