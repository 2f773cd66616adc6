"""Which of a trainer's evaluations are of the weights that it has now, so that a card has their numbers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...training.loop import was_trained_before

Metrics = dict[str, float]

UNNAMED = ""
"""Name of the evaluation set of a trainer that has only one."""

_CHECKPOINT_STEP = re.compile(r"checkpoint-(\d+)")
_OF_TRAINING = ("train_runtime", "train_loss")
"""Names in the log that `Trainer` writes at the end of training."""
_RUNTIME = "_runtime"
"""End of a name that the log of every evaluation has, after the prefix of the evaluation."""


@dataclass(frozen=True)
class Evaluated:
    """The evaluations of the weights that a trainer has now.

    Attributes:
        step: Optimizer steps after which the weights were as they are. None if that is not known.
        total_steps: Optimizer steps of the whole training.
        sets: Metrics of the last evaluation of these weights, by the name of the evaluation set (`UNNAMED` for one
            without a name) and the name of the metric without prefix. Empty if these weights were never evaluated.
        start: Metrics of the same sets before the first step, if they were measured.
    """

    step: int | None
    total_steps: int
    sets: dict[str, Metrics] = field(default_factory=dict)
    start: dict[str, Metrics] = field(default_factory=dict)


def evaluated_weights(trainer: Any) -> Evaluated:
    """Finds the evaluations of the weights as they are now in the log of a trainer, also of one that was resumed.

    After `load_best_model_at_end`, these are the evaluation of the best checkpoint, and what was evaluated after
    training. Where training went on after the last evaluation, there are none.
    """
    state = trainer.state
    logs = state.log_history
    end = _end_of_training(logs)
    step = _evaluated_step(trainer, ended=end is not None)
    evaluations = [_Evaluation.read(number, log) for number, log in enumerate(logs)]
    evaluations = [evaluation for evaluation in evaluations if evaluation is not None]

    chosen: dict[str, _Evaluation] = {}
    start: dict[str, Metrics] = {}
    for evaluation in evaluations:  # from oldest to newest: the last one of a set is kept
        is_after_training = end is not None and evaluation.number > end
        is_of_these_weights = is_after_training or (step is not None and evaluation.step == step)
        if is_of_these_weights and (evaluation.is_whole or evaluation.set not in chosen):
            chosen[evaluation.set] = evaluation
        if evaluation.step == 0 and not is_after_training:
            start.setdefault(evaluation.set, evaluation.metrics)
    # A guard of PPO may have restored a checkpoint before it ended training. The last evaluation came after that.
    has_start = state.global_step > 0 and not was_trained_before(trainer)
    was_stopped = getattr(trainer, "stop_reason", None) is not None
    return Evaluated(
        step=None if was_stopped and step == state.global_step else step,
        total_steps=state.global_step,
        sets={name: evaluation.metrics for name, evaluation in chosen.items()},
        start={name: metrics for name, metrics in start.items() if name in chosen and has_start},
    )


def training_seconds(trainer: Any) -> float | None:
    """Duration of training in seconds. None if it has not ended, or if a part of it is not in the log."""
    logs = trainer.state.log_history
    if _end_of_training(logs) is None or was_trained_before(trainer):
        return None
    runtimes = [log["train_runtime"] for log in logs if "train_runtime" in log]
    was_resumed = getattr(trainer, "_initial_global_step", 0) > 0
    if was_resumed and len(runtimes) < 2:  # the part before was interrupted
        return None
    return sum(runtimes)


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation in the log.

    Attributes:
        number: Its place in the log.
        step: Its step.
        set: Name of its evaluation set.
        metrics: Its metrics without prefix.
        is_whole: Whether it has a duration, as what `evaluate` logs. Others may be a metric that a callback adds.
    """

    number: int
    step: int | None
    set: str
    metrics: Metrics
    is_whole: bool

    @classmethod
    def read(cls, number: int, log: Mapping[str, Any]) -> "_Evaluation | None":
        """Reads an entry of the log; None for one of training."""
        prefixes = [name.removesuffix(_RUNTIME) for name in log if name.endswith(_RUNTIME)]
        if "train" in prefixes:
            return None
        is_whole = bool(prefixes)
        if not prefixes and any(name.startswith("eval_") for name in log):
            prefixes = ["eval"]  # a log without the usual names
        if not prefixes:
            return None
        prefix = min(prefixes, key=len)  # a metric of the user's may end like this too
        metrics = {}
        for name, value in log.items():
            # TRL gives some metrics of a set with a name only the prefix `eval`.
            for start in (f"{prefix}_", "eval_"):
                if name.startswith(start):
                    metrics[name.removeprefix(start)] = value
                    break
        name = UNNAMED if prefix == "eval" else prefix.removeprefix("eval_")
        return cls(number, log.get("step"), name, metrics, is_whole)


def _end_of_training(logs: Sequence[Mapping[str, Any]]) -> int | None:
    """Place in the log of the end of training. None if training has not ended, or went on afterward."""
    for number in reversed(range(len(logs))):
        if any(name in logs[number] for name in _OF_TRAINING):
            return number
        if "loss" in logs[number]:
            return None
    return None


def _evaluated_step(trainer: Any, *, ended: bool) -> int | None:
    """Step at which an evaluation during training was of the weights as they are now. None if that is not known."""
    state = trainer.state
    best = state.best_model_checkpoint
    if not ended or not trainer.args.load_best_model_at_end or best is None:
        return state.global_step
    found = _CHECKPOINT_STEP.search(Path(best).name)
    # Without the folder, `Trainer` kept the last weights, or the folder was removed after it was loaded.
    return int(found[1]) if found and Path(best).is_dir() else None
