"""PPO's optimizer steps: groups of their own for the critic, gradients over processes, steps that change nothing."""

import torch
from accelerate import Accelerator
from torch import nn

from .ranks import Ranks
from .roles import Roles


def give_critic_its_groups(optimizer: torch.optim.Optimizer, roles: Roles, learning_rate: float) -> None:
    """Moves the critic's weights to groups with their own learning rate; the value head comes last.

    An optimizer of an earlier training has them already, and is left as it is.
    """
    head = set(roles.value_head.parameters())
    if set(optimizer.param_groups[-1]["params"]) == head:
        return
    critic = set(roles.parameters_of_critic())
    # Trainer made a group with weight decay and one without: the critic's weights keep their kind.
    for group in list(optimizer.param_groups):
        of_critic = [parameter for parameter in group["params"] if parameter in critic - head]
        group["params"] = [parameter for parameter in group["params"] if parameter not in critic]
        if of_critic:
            options = {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
            optimizer.add_param_group(options | {"params": of_critic, "lr": learning_rate})
    # Last, so that a log finds the critic's learning rate there, whatever the critic is.
    in_order = list(roles.value_head.parameters())
    optimizer.add_param_group({"params": in_order, "lr": learning_rate, "weight_decay": 0.0})


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters that the optimizer moves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.requires_grad]


def sum_gradients(parameters: list[nn.Parameter], ranks: Ranks) -> None:
    """Sums gradients over processes, in place; one that a process lacks counts as zeros."""
    if ranks.alone:
        return
    # All processes must send tensors of the same shapes, or they would wait for each other for ever.
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ranks.sum_([parameter.grad for parameter in parameters])


def skip_step(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Makes the optimizer step to come change nothing, not even by momentum or weight decay."""
    for parameter in parameters:
        parameter.grad = None
    scaler = accelerator.scaler
    if scaler is not None:
        # A gradient scaler refuses a step without gradients, and skips one where they are not finite.
        scaler.scale(torch.zeros((), device=accelerator.device))  # its first use may be this one
        parameters[-1].grad = torch.full_like(parameters[-1], torch.inf)


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Loads a saved state, but keeps the learning rates: the schedule goes on from where it is."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
