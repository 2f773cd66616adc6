"""The metric that chooses the best model, stops early and lowers the learning rate: its name and its direction."""

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from transformers import EarlyStoppingCallback, TrainingArguments

from ..errors import UserError

logger = logging.getLogger(__name__)

METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Values of `lr_scheduler_type` whose learning rate follows the metric of the evaluations."""

_LOWER_IS_BETTER = re.compile(r"(loss|(^|[_/])(nll|ece|brier|kl|kl_k\d|kl_exact|perplexity|error))$")


def is_lower_better(metric: str) -> bool:
    """Whether a lower value of the metric is better: losses, calibration errors and KL, also of a named set."""
    return _LOWER_IS_BETTER.search(metric) is not None


def complete_best_metric(args: TrainingArguments, *, default: str) -> None:
    """Sets `metric_for_best_model` and `greater_is_better` where they are needed and left out.

    It is called before `TrainingArguments.__post_init__`, which would take a loss, and would take any other metric for
    one of which more is better.

    Args:
        args: the options; changed in place.
        default: name of the metric if none is given.
    """
    needs_metric = (
        args.load_best_model_at_end or args.save_strategy == "best" or args.lr_scheduler_type in METRIC_SCHEDULES
    )
    if args.metric_for_best_model is None and needs_metric:
        args.metric_for_best_model = default
    if args.greater_is_better is None and args.metric_for_best_model is not None:
        args.greater_is_better = not is_lower_better(args.metric_for_best_model)


def check_metric_name(
    args: TrainingArguments, eval_dataset: Any, known: Collection[str], *, may_exist: Callable[[str], bool]
) -> None:
    """Refuses a `metric_for_best_model` that evaluations will not have, before training starts.

    Some names are known after an evaluation only, such as those that a function of the user logs. For these, a warning
    is logged.

    Args:
        args: the options.
        eval_dataset: the evaluation set; a dict if there are several.
        known: names of the metrics that evaluations have, without prefix.
        may_exist: whether there may be a metric with this name that is not in `known`.

    Raises:
        UserError: if there will be no such metric.
    """
    if args.metric_for_best_model is None or args.eval_strategy == "no":
        return
    name = args.metric_for_best_model.removeprefix("eval_")
    prefix = ""
    if isinstance(eval_dataset, Mapping) and eval_dataset:
        prefix = _set_prefix(name, eval_dataset)
        name = name.removeprefix(prefix)
    if args.greater_is_better and is_lower_better(name):
        logger.warning(
            "greater_is_better=True with metric_for_best_model=%r, of which less is better: the worst model counts as "
            "the best: leave greater_is_better out.",
            args.metric_for_best_model,
        )
    if name in known:
        return
    meant = _similar_name(name, known)
    if not may_exist(name):
        remedy = f"set it to {prefix}{meant}" if meant else f"choose one of {', '.join(sorted(known))}"
        raise UserError(f"metric_for_best_model: evaluations have no {prefix + name!r}: {remedy}.")
    logger.warning(
        "metric_for_best_model: training will stop at the first evaluation if it has no %r: %s",
        prefix + name,
        f"did you mean {prefix}{meant}?" if meant else "reward functions must log it.",
    )


def check_metric_set(args: TrainingArguments, eval_dataset: Any) -> None:
    """Refuses a `metric_for_best_model` that names none of several evaluation sets.

    Args:
        args: the options.
        eval_dataset: the evaluation set; a dict if there are several.

    Raises:
        UserError: if there are several sets and the metric begins with the name of none of them.
    """
    chosen = args.metric_for_best_model
    if chosen is not None and isinstance(eval_dataset, Mapping) and eval_dataset:
        _set_prefix(chosen.removeprefix("eval_"), eval_dataset)


def _similar_name(name: str, known: Collection[str]) -> str | None:
    """The known metric that a misspelt or shortened name probably means; `None` if there is none."""
    for candidate in known:
        if candidate.endswith(f"/{name}") or candidate == f"{name}/mean":
            return candidate
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.8)), None)


def _set_prefix(name: str, sets: Mapping[str, Any]) -> str:
    """The prefix of the longest name of a set that a metric begins with.

    Raises:
        UserError: if it begins with none of them.
    """
    prefixes = [f"{of_set}_" for of_set in sets if name.startswith(f"{of_set}_")]
    if prefixes:
        return max(prefixes, key=len)
    first = next(iter(sets))
    raise UserError(f"metric_for_best_model: eval_dataset has several sets: add the name of one, as in {first}_{name}.")


def check_evaluated_metric(args: TrainingArguments, metrics: Mapping[str, float]) -> None:
    """Raises `UserError` if an evaluation in training has no `metric_for_best_model`."""
    if args.metric_for_best_model is None:
        return
    name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    if name not in metrics:
        raise UserError(f"metric_for_best_model: evaluation has no {name!r}: choose one of {', '.join(metrics)}.")


def check_early_stopping(args: TrainingArguments, callbacks: Sequence[Any] | None) -> None:
    """Raises `UserError` if there is an `EarlyStoppingCallback` without the options that it needs."""
    for callback in callbacks or []:
        if not isinstance(callback, EarlyStoppingCallback) and callback is not EarlyStoppingCallback:
            continue
        if args.eval_strategy == "no":
            raise UserError("EarlyStoppingCallback needs evaluations: set eval_strategy='steps' and eval_steps.")
        if args.metric_for_best_model is None:
            raise UserError("EarlyStoppingCallback needs a metric: set metric_for_best_model.")
