"""PPO's optimizer steps: parameter groups of the critic, and skipped steps."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..errors import UserError, first_line
from ..training.optimizers import add_group, check_weights
from .roles import Roles

_OF_ONE_GROUP = ("params", "param_names", "lr", "initial_lr")
"""What a new group does not copy from another one."""


def give_critic_its_groups(
    optimizer: torch.optim.Optimizer, roles: Roles, learning_rate: float | None, scheduler: Any = None
) -> None:
    """Moves the weights of the critic to parameter groups with their own learning rate. The value head comes last.

    Without a critic, the groups stay as they are.

    An optimizer that was made before the trainer cannot have all weights of the critic. They are added to it, with the
    options that all of its groups have.

    Args:
        optimizer: the optimizer of `Trainer` or of the user.
        roles: policy and critic.
        learning_rate: initial learning rate of the critic; `None` means that of the group that its weights were in, or
            of the first group of the policy if they were in none.
        scheduler: scheduler that was made before; `None` for none.

    Raises:
        UserError: if the optimizer holds no weight of the policy, or does not take the weights of the critic.
    """
    names = {parameter: name for name, parameter in roles.policy.named_parameters()}
    critic = set(roles.parameters_of_critic())
    policy = {name: p for p, name in names.items() if p.requires_grad and p not in critic}
    check_weights(optimizer, policy, roles.policy, whose="policy")
    if not roles.has_critic:
        return
    in_order = list(roles.value_head.parameters())
    head = set(in_order)

    # The group whose options and schedule new groups have.
    template = next((group for group in optimizer.param_groups if set(group["params"]) - critic), None)
    if template is None:  # every weight of the policy is frozen
        template = optimizer.param_groups[0]
    if learning_rate is not None and template.get("relative_step"):
        raise UserError(
            "value_learning_rate has no effect with relative_step=True, as Adafactor computes its learning rate: leave "
            "it out."
        )
    shared = _shared_options(optimizer, template)
    of_head = next((group for group in optimizer.param_groups if head & set(group["params"])), template)
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}

    def add(weights: dict[str, nn.Parameter], options: Mapping[str, Any], like: Mapping[str, Any]) -> None:
        try:
            add_group(optimizer, weights, options, like=like, learning_rate=learning_rate, scheduler=scheduler)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"optimizers: {type(optimizer).__name__} does not take the weights of the critic "
                f"({first_line(error)}): choose another optimizer, such as AdamW."
            ) from None

    # Trainer made one group with weight decay and one without: the critic's weights keep their weight decay.
    for group in list(optimizer.param_groups):
        of_critic = {names[p]: p for p in group["params"] if p in critic and p not in head}
        _remove(group, critic)
        if of_critic:
            options = {name: value for name, value in group.items() if name not in _OF_ONE_GROUP}
            add(of_critic, options, group)
    missing = {names[p]: p for p in roles.parameters_of_critic() if p not in head and p not in held}
    if missing:
        add(missing, shared, template)
    # Last, so that logs find the learning rate of every kind of critic in the same place.
    options = {name: value for name, value in shared.items() if name not in optimizer.defaults}
    if "weight_decay" in shared:
        options["weight_decay"] = 0.0
    add({names.get(p, f"value_head.{number}"): p for number, p in enumerate(in_order)}, options, of_head)


def _shared_options(optimizer: torch.optim.Optimizer, template: Mapping[str, Any]) -> dict[str, Any]:
    """The options that all groups have, with the values of `template`, besides the learning rate."""
    options = {}
    for name, value in template.items():
        if name not in _OF_ONE_GROUP and all(name in group for group in optimizer.param_groups):
            options[name] = value
    return options


def _remove(group: dict[str, Any], parameters: set[nn.Parameter]) -> None:
    """Removes parameters from a group, and their names if it has names."""
    if "param_names" in group:
        pairs = zip(group["param_names"], group["params"], strict=True)
        group["param_names"] = [name for name, parameter in pairs if parameter not in parameters]
    group["params"] = [parameter for parameter in group["params"] if parameter not in parameters]


def has_critic_groups(optimizer: torch.optim.Optimizer, roles: Roles) -> bool:
    """Whether `give_critic_its_groups` was called with this optimizer before: its last group is the value head.

    `False` without a critic.
    """
    if not roles.has_critic:
        return False
    last = {id(parameter) for parameter in optimizer.param_groups[-1]["params"]}
    return last == {id(parameter) for parameter in roles.value_head.parameters()}


def critic_learning_rate(optimizer: torch.optim.Optimizer, roles: Roles) -> float | None:
    """The learning rate of the value head in the current step; `None` without a critic."""
    if not roles.has_critic:
        return None
    return float(optimizer.param_groups[-1]["lr"])


def check_warm_up(optimizer: torch.optim.Optimizer, critic_warmup_steps: int) -> None:
    """Refuses an optimizer in which the weights of the policy would not begin after a warm-up as at a first step.

    Schedule-free optimizers count the steps of a group, and not those of a weight, in their averages.

    Raises:
        UserError: if there is a warm-up, and the optimizer is such a one.
    """
    if critic_warmup_steps > 0 and callable(getattr(optimizer, "eval", None)):
        raise UserError(
            f"critic_warmup_steps={critic_warmup_steps}: {type(optimizer).__name__} averages the weights of the policy "
            "over the steps of the warm-up too, in which they do not move: choose an optimizer that is not "
            "schedule-free, such as adamw_torch, or leave critic_warmup_steps out."
        )


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters that the optimizer trains."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.requires_grad]


def skip_step(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Makes the next optimizer step change nothing, not even through momentum or weight decay."""
    for parameter in parameters:
        parameter.grad = None
    scaler = accelerator.scaler
    if scaler is not None:
        # A gradient scaler refuses a step without gradients, but skips a step with non-finite gradients.
        scaler.scale(torch.zeros((), device=accelerator.device))  # initializes the scaler if this is its first use
        parameters[-1].grad = torch.full_like(parameters[-1], torch.inf)
