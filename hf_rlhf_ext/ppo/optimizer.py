"""PPO's optimizer steps: parameter groups of the critic, sums of gradients over processes, and skipped steps."""

import torch
from accelerate import Accelerator
from torch import nn

from .ranks import Ranks
from .roles import Roles


def give_critic_its_groups(optimizer: torch.optim.Optimizer, roles: Roles, learning_rate: float) -> None:
    """Moves the weights of the critic to parameter groups with their own learning rate. The value head comes last.

    An optimizer that already has these groups, from an earlier call of `train`, is not changed.

    Args:
        optimizer: the optimizer that `Trainer` created.
        roles: policy and critic.
        learning_rate: initial learning rate of the critic.
    """
    head = set(roles.value_head.parameters())
    if set(optimizer.param_groups[-1]["params"]) == head:
        return
    critic = set(roles.parameters_of_critic())
    # Trainer made one group with weight decay and one without: the critic's weights keep their weight decay.
    for group in list(optimizer.param_groups):
        of_critic = [parameter for parameter in group["params"] if parameter in critic - head]
        group["params"] = [parameter for parameter in group["params"] if parameter not in critic]
        if of_critic:
            options = {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
            optimizer.add_param_group(options | {"params": of_critic, "lr": learning_rate})
    # Last, so that logs find the learning rate of every kind of critic in the same place.
    in_order = list(roles.value_head.parameters())
    optimizer.add_param_group({"params": in_order, "lr": learning_rate, "weight_decay": 0.0})


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters that the optimizer trains."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.requires_grad]


def sum_gradients(parameters: list[nn.Parameter], ranks: Ranks) -> None:
    """Sums gradients over processes, in place. A missing gradient counts as zeros."""
    if ranks.alone:
        return
    # All processes must send tensors of the same shapes. Otherwise they would wait for each other forever.
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ranks.sum_([parameter.grad for parameter in parameters])


def skip_step(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Makes the next optimizer step change nothing, not even through momentum or weight decay."""
    for parameter in parameters:
        parameter.grad = None
    scaler = accelerator.scaler
    if scaler is not None:
        # A gradient scaler refuses a step without gradients, but skips a step with non-finite gradients.
        scaler.scale(torch.zeros((), device=accelerator.device))  # initializes the scaler if this is its first use
        parameters[-1].grad = torch.full_like(parameters[-1], torch.inf)


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Loads a saved optimizer state but keeps the current learning rates, so that the schedule continues."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
