"""Optimizers and learning-rate schedules of both trainers: options that cannot work, and optimizers made by the user.

A *schedule-free* optimizer (arXiv:2405.15682) has two versions of the weights: gradients are taken at the one, and the
other, an average, is evaluated and saved. Its methods `train` and `eval` put the one or the other into the model.
"""

import copy
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from ..errors import UserError, first_line
from .best_model import METRIC_SCHEDULES
from .optim_args import check_optim_args

logger = logging.getLogger(__name__)

_WITH_TARGETS = ("galore", "apollo")
_WITHOUT_WARMUP = ("constant", *METRIC_SCHEDULES)
_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")

# Lists of a scheduler with one entry for each group of the optimizer.
_LEARNING_RATES = ("base_lrs", "_last_lr", "_init_lrs")
_OTHER_LISTS = ("lr_lambdas", "min_lrs", "base_momentums", "max_momentums")


# ---- Options ----


def check_optimizer_names(args: TrainingArguments) -> None:
    """Refuses values of `optim`, `lr_scheduler_type` and `max_grad_norm`, before `TrainingArguments` reads them.

    Raises:
        UserError: if a value is unknown, or if a schedule needs evaluations and there are none.
    """
    for option, names in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        value = getattr(args, option)
        allowed = [name.value for name in names]
        if value not in allowed:
            raise UserError(f"{option}: {value!r} is not known: choose one of {', '.join(allowed)}.")
    name = SchedulerType(args.lr_scheduler_type).value
    if name in METRIC_SCHEDULES and args.eval_strategy == "no":
        raise UserError(
            f"lr_scheduler_type={name!r} needs evaluations: set eval_strategy='steps' and eval_steps, and pass "
            "eval_dataset."
        )
    if args.max_grad_norm is None:
        raise UserError("max_grad_norm: must be a number, got None: set it to 0 for no limit.")


def check_optimizer_options(args: TrainingArguments) -> None:
    """Refuses optimizers and schedules that cannot work with these trainers, or with the other options.

    Args:
        args: the options, after `TrainingArguments.__post_init__`.

    Raises:
        UserError: if an optimizer or a schedule cannot work.
    """
    name = args.optim.value
    if name in ("lomo", "adalomo") or name.endswith("_layerwise"):
        raise UserError(
            f"optim={name!r} is not supported, as it updates the weights inside the backward pass, when gradients are "
            "not complete: choose another, such as adamw_8bit."
        )
    if name.startswith(_WITH_TARGETS) and args.optim_target_modules is None:
        raise UserError(f"optim={name!r} needs optim_target_modules: set it to a list of names, or to 'all-linear'.")
    if args.optim_target_modules and not name.startswith(_WITH_TARGETS):
        raise UserError(
            f"optim_target_modules={args.optim_target_modules!r}: it has an effect with the optimizers galore_* and "
            "apollo_* only: leave it out, or set optim."
        )
    _check_schedule(args)


def _check_schedule(args: TrainingArguments) -> None:
    name = args.lr_scheduler_type.value
    options = dict(args.lr_scheduler_kwargs or {})
    if name in METRIC_SCHEDULES:
        # The default of both schedules is a metric of which less is better.
        options.setdefault("mode", "max" if args.greater_is_better else "min")
        args.lr_scheduler_kwargs = options
    if name in _WITHOUT_OPTIONS and options:
        raise UserError(f"lr_scheduler_kwargs has no effect with lr_scheduler_type={name!r}: leave it out.")
    lowest = options.get("min_lr", 1e-3)  # the default of `GreedyLR`, which would raise a smaller learning rate to it
    if name == "greedy" and isinstance(lowest, int | float) and lowest > args.learning_rate:
        raise UserError(
            f"lr_scheduler_type='greedy': its lowest learning rate is {lowest:g}, above learning_rate="
            f"{args.learning_rate:g}: set lr_scheduler_kwargs={{'min_lr': ...}}."
        )
    if any(isinstance(value, list | tuple) for value in options.values()):
        return  # one value for each group of an optimizer, which does not exist yet: see `check_lists_of_schedule`
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        get_scheduler(
            name,
            stand_in,
            num_warmup_steps=0,
            num_training_steps=args.max_steps if args.max_steps > 0 else 1_000_000,
            scheduler_specific_kwargs=dict(options),
        )
    except ZeroDivisionError:
        raise UserError(
            f"learning_rate=0 with lr_scheduler_type={name!r}, which divides by it: set learning_rate, or choose "
            "constant."
        ) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"lr_scheduler_kwargs with lr_scheduler_type={name!r}: {first_line(error)}.") from None


def require_optimizer(args: TrainingArguments, *, warn: bool = True) -> None:
    """Checks that `optim` and `optim_args` give an optimizer, before models are loaded.

    Args:
        args: the options.
        warn: whether to log a warning if `warmup_steps` has no effect.

    Raises:
        UserError: if a package is missing, or if `optim_args` is not usable.
    """
    if args.optim == "galore_adamw_8bit" and args.device.type == "cpu":
        raise UserError("optim='galore_adamw_8bit' needs a GPU: choose galore_adamw.")
    if args.optim.value.startswith("paged_ademamix") and args.device.type == "cpu":
        # The other paged optimizers are not paged on a CPU. These two fail there, from 100,000 weights in a layer on.
        name = args.optim.value
        without_pages = name.removeprefix("paged_").removesuffix("_32bit")
        raise UserError(f"optim={name!r} needs a GPU for its pages: choose {without_pages}.")
    args_of_stand_in = copy.copy(args)
    if args.optim_target_modules is not None:
        args_of_stand_in.optim_target_modules = "all-linear"
    args_of_stand_in.optim_args = None
    stand_in = nn.Sequential(nn.Linear(1, 1))
    try:
        Trainer.get_optimizer_cls_and_kwargs(args_of_stand_in, stand_in)
    except (ImportError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise optimizer_error(args, error) from None
    args_of_stand_in.optim_args = args.optim_args
    check_optim_args(args_of_stand_in, stand_in)
    name = args.lr_scheduler_type.value
    schedules_itself = args.optim.value.startswith("schedule_free")
    if warn and args.warmup_steps and name in _WITHOUT_WARMUP and not schedules_itself:
        remedy = "choose constant_with_warmup" if name == "constant" else "leave it out"
        logger.warning("warmup_steps has no effect with lr_scheduler_type=%r: %s.", name, remedy)


def optimizer_error(args: TrainingArguments, error: Exception, option: str | None = None) -> UserError:
    """The error for an optimizer that could not be made.

    Args:
        args: the options.
        error: what was raised.
        option: the option or argument that named the optimizer; `None` means `optim`.
    """
    where = option or f"optim={args.optim.value!r}"
    return UserError(f"{where}: the optimizer cannot be made: {first_line(error)}. Choose another optimizer.")


# ---- Optimizers made by the user ----


def check_own_optimizer(optimizers: Any, optimizer_cls_and_kwargs: Any) -> None:
    """Refuses values of the arguments `optimizers` and `optimizer_cls_and_kwargs` that cannot work.

    Raises:
        UserError: if one of them has another form, if both are given, or if a scheduler comes without its optimizer.
    """
    if not isinstance(optimizers, tuple | list) or len(optimizers) != 2:
        raise UserError("optimizers: pass a pair (optimizer, scheduler); each may be None.")
    optimizer, scheduler = optimizers
    _check_kind(optimizer, scheduler)
    if isinstance(scheduler, type):
        raise UserError(f"optimizers: {scheduler.__name__} is a class: pass a scheduler, {scheduler.__name__}(...).")
    if optimizer is None and scheduler is not None:
        raise UserError(
            "optimizers: a scheduler without its optimizer changes no learning rate: pass both, or set "
            "lr_scheduler_type and lr_scheduler_kwargs."
        )
    if optimizer_cls_and_kwargs is None:
        return
    if optimizer is not None:
        raise UserError("optimizers and optimizer_cls_and_kwargs were both given: leave one of them out.")
    if not isinstance(optimizer_cls_and_kwargs, tuple | list) or len(optimizer_cls_and_kwargs) != 2:
        raise UserError("optimizer_cls_and_kwargs: pass a pair of an optimizer class and a dict of its arguments.")
    optimizer_class, kwargs = optimizer_cls_and_kwargs
    if not callable(optimizer_class) or not isinstance(kwargs, Mapping):
        raise UserError("optimizer_cls_and_kwargs: pass a pair of an optimizer class and a dict of its arguments.")
    _check_step(optimizer_class, "optimizer_cls_and_kwargs")


def _check_kind(optimizer: Any, scheduler: Any) -> None:
    """Refuses an optimizer of the user that is none, or that `Trainer` cannot use."""
    if optimizer is None:
        return
    if isinstance(optimizer, type):
        name = optimizer.__name__
        raise UserError(
            f"optimizers: {name} is a class: pass an optimizer, {name}(...), or "
            f"optimizer_cls_and_kwargs=({name}, {{'lr': ...}})."
        )
    if not hasattr(optimizer, "param_groups") or not callable(getattr(optimizer, "step", None)):
        raise UserError(f"optimizers: {type(optimizer).__name__} is no optimizer: pass one of torch.optim, or None.")
    plain = plain_optimizer(optimizer)
    _check_step(type(plain), "optimizers")
    if scheduler is None and any(group.get("lr", 0.0) is None for group in plain.param_groups):
        # The scheduler of `Trainer` multiplies the learning rate of the optimizer.
        raise UserError(
            f"optimizers: {type(plain).__name__} has no learning rate (lr=None): set it (for Adafactor with "
            "relative_step=False), or pass a scheduler such as AdafactorSchedule."
        )


def _check_step(optimizer_class: Any, option: str) -> None:
    """Refuses a class whose steps `Trainer` cannot take: it passes no closure, and its gradients are dense."""
    if not isinstance(optimizer_class, type):
        return
    name = optimizer_class.__name__
    if issubclass(optimizer_class, torch.optim.SparseAdam):
        raise UserError(f"{option}: SparseAdam takes sparse gradients only: choose another optimizer, such as AdamW.")
    closure = inspect.signature(optimizer_class.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(
            f"{option}: {name} computes the loss several times in a step, which Trainer does once: choose another "
            "optimizer, such as AdamW."
        )


def check_lists_of_schedule(args: TrainingArguments, optimizer: Any) -> None:
    """Refuses a list in `lr_scheduler_kwargs` with another number of values than the optimizer has groups.

    Args:
        args: the options.
        optimizer: the optimizer, with all of its groups.

    Raises:
        UserError: for the first such list.
    """
    n_groups = len(optimizer.param_groups)
    for name, value in (args.lr_scheduler_kwargs or {}).items():
        if isinstance(value, list | tuple) and len(value) != n_groups:
            raise UserError(
                f"lr_scheduler_kwargs: {name} has {len(value)} values for the {n_groups} groups of the optimizer: give "
                "one number."
            )


def plain_optimizer(optimizer: Any) -> Any:
    """The optimizer inside the wrapper of Accelerate."""
    from accelerate.optimizer import AcceleratedOptimizer

    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def check_scheduler(optimizer: Any, scheduler: Any) -> None:
    """Raises `UserError` if the scheduler was made for another optimizer, whose learning rate it would change."""
    own = getattr(scheduler, "optimizer", None)
    if own is not None and plain_optimizer(own) is not plain_optimizer(optimizer):
        raise UserError(
            "optimizers: the scheduler was made for another optimizer: make it from the one that you pass with it."
        )


def made_by(trainer: Trainer, make: Callable[[], Any]) -> tuple[Any, Any]:
    """The optimizer of a trainer, and the scheduler that the user made for it (`None` for none).

    Args:
        trainer: the trainer.
        make: makes the optimizer, or returns that of the user.

    Raises:
        UserError: if the optimizer cannot be made, or if the scheduler was made for another one.
    """
    try:
        optimizer = make()
    except (ImportError, ValueError, TypeError) as error:
        option = None if trainer.optimizer_cls_and_kwargs is None else "optimizer_cls_and_kwargs"
        raise optimizer_error(trainer.args, error, option) from None
    scheduler = None if trainer._created_lr_scheduler else trainer.lr_scheduler
    check_scheduler(optimizer, scheduler)
    return optimizer, scheduler


def check_weights(optimizer: Any, trained: Mapping[str, nn.Parameter], model: nn.Module, *, whose: str) -> None:
    """Checks that an optimizer holds the weights that are to be trained.

    A warning is logged if it holds only a part of them, or weights that are not in the model.

    Args:
        optimizer: the optimizer.
        trained: the weights that it should hold, by name.
        model: the model of the trainer.
        whose: what the weights belong to, such as `policy`, for messages.

    Raises:
        UserError: if it holds none of them.
    """
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in trained.items() if parameter not in held]
    if not trained:
        return
    if len(missing) == len(trained):
        raise UserError(
            f"optimizers: the optimizer holds no trained weight of the {whose}, such as {missing[0]}: make it from the "
            "model that you pass to the trainer, after get_peft_model, or pass optimizer_cls_and_kwargs."
        )
    if missing:
        logger.warning(
            "optimizers: %d of %d trained weights of the %s are not in the optimizer and keep their values, such as "
            "%s: add them, or freeze them.",
            len(missing),
            len(trained),
            whose,
            missing[0],
        )
    foreign = held - set(model.parameters())
    if foreign:
        logger.warning(
            "optimizers: %d weights of the optimizer are not in the model of the trainer and are not trained: make it "
            "from the model that you pass.",
            len(foreign),
        )


# ---- Further groups in an optimizer, also one with a scheduler ----


def base_rate(group: Mapping[str, Any]) -> Any:
    """The learning rate of a group before any schedule."""
    return group.get("initial_lr", group["lr"])


def add_group(
    optimizer: Any,
    parameters: Mapping[str, nn.Parameter],
    options: Mapping[str, Any],
    *,
    like: Mapping[str, Any],
    learning_rate: float | None,
    scheduler: Any = None,
) -> None:
    """Adds a group to an optimizer, and to its scheduler if it has one already.

    Args:
        optimizer: the optimizer.
        parameters: the weights, by name.
        options: options of the group besides the learning rate.
        like: the group whose schedule the new one follows.
        learning_rate: learning rate before the schedule, or the highest one of a schedule of cycles; `None` means that
            of `like`.
        scheduler: scheduler that was made before; `None` for none.
    """
    position = next(number for number, group in enumerate(optimizer.param_groups) if group is like)
    rate = base_rate(like) if learning_rate is None else learning_rate
    if isinstance(rate, torch.Tensor):
        rate = rate.clone()  # schedulers change such a learning rate in place
    group = {**options, "lr": rate, "params": list(parameters.values())}
    if any("param_names" in existing for existing in optimizer.param_groups):
        group["params"] = list(parameters.items())  # all groups have names, or none
    factor = 1.0
    if scheduler is not None:
        usual = base_rate(like)
        peak = _peak_rate(scheduler, like, position)
        if peak is not None and learning_rate is not None:
            factor = learning_rate / peak
            rate = usual * factor
        elif usual:
            factor = float(rate) / float(usual)
        for name, value in like.items():
            if name.endswith("_lr") and isinstance(value, float | int):  # such as the `max_lr` of a schedule
                group[name] = value * factor
        if usual:
            group["lr"] = like["lr"] * factor
        group["initial_lr"] = rate
        _extend_scheduler(scheduler, len(optimizer.param_groups), position, factor)
    if isinstance(optimizer, torch.optim.Muon) and any(parameter.ndim != 2 for parameter in parameters.values()):
        raise ValueError("it trains matrices only")  # its constructor checks this, its `add_param_group` does not
    optimizer.add_param_group(group)


def _peak_rate(scheduler: Any, like: Mapping[str, Any], position: int) -> float | None:
    """The highest learning rate that a schedule of cycles gives to a group; `None` for other schedules.

    Such a schedule begins at a small fraction of it.
    """
    for part in getattr(scheduler, "_schedulers", []):  # of a scheduler that is made of several
        peak = _peak_rate(part, like, position)
        if peak is not None:
            return peak
    if isinstance(scheduler, OneCycleLR):
        return float(like["max_lr"])
    if isinstance(scheduler, CyclicLR):
        return float(scheduler.max_lrs[position])
    return None


def _extend_scheduler(scheduler: Any, n_groups: int, position: int, factor: float) -> None:
    """Adds an entry for a new group, which follows the group at `position` at `factor` times its learning rate."""
    for part in getattr(scheduler, "_schedulers", []):  # of a scheduler that is made of several
        _extend_scheduler(part, n_groups, position, factor)
    rates = _LEARNING_RATES + (("max_lrs",) if isinstance(scheduler, CyclicLR) else ())
    others = _OTHER_LISTS if isinstance(scheduler, CyclicLR) else (*_OTHER_LISTS, "max_lrs")
    for name in (*rates, *others):
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and len(values) == n_groups:
            values.append(values[position] * factor if name in rates else values[position])


# ---- Schedule-free optimizers ----


def use_training_weights(optimizer: Any) -> None:
    """Puts the weights at which gradients are taken into the model. Other optimizers are not changed."""
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()


def use_evaluation_weights(optimizer: Any) -> None:
    """Puts the weights that are evaluated and saved into the model. Other optimizers are not changed."""
    if callable(getattr(optimizer, "eval", None)):
        optimizer.eval()
