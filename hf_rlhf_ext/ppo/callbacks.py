"""Callbacks of PPO: health warnings and tables of completions.

They hold no reference to the trainer, as Transformers replaces callbacks when a run resumes. What they need is passed
with each event.
"""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from ..compat import print_prompt_completions_sample
from .config import PPOConfig
from .diagnostics import diagnose, due
from .evaluation import EvaluatedCompletion
from .rollout import CompletionTable

logger = logging.getLogger(__name__)

FIRST, LAST = 5, 50  # number of first and of last rollouts that the history keeps for the diagnostics


class PPOCallback(TrainerCallback):
    """A `TrainerCallback` with two more events: after a rollout, and after an evaluation has sampled completions.

    Subclass it and pass an instance in `callbacks` of `PPOTrainer`.
    """

    def on_rollout(
        self,
        args: PPOConfig,
        state: TrainerState,
        control: TrainerControl,
        *,
        metrics: dict[str, float],
        rollout_index: int,
        previous: dict[str, float],
        completions: CompletionTable | None,
        callbacks: Sequence[TrainerCallback],
        **kwargs: Any,
    ) -> None:
        """Called after each rollout, before training on it.

        Args:
            args: options of the run.
            state: state of the trainer.
            control: flags that a callback may set, such as `should_training_stop`.
            metrics: metrics of the rollout, by name.
            rollout_index: number of the rollout, from 0.
            previous: metrics of the previous rollout that are known only after training on it.
            completions: the completions of this process, as text.
            callbacks: all callbacks of the trainer, including trackers.
            kwargs: reserved for later versions.
        """

    def on_eval_completions(
        self,
        args: PPOConfig,
        state: TrainerState,
        control: TrainerControl,
        *,
        rows: list[EvaluatedCompletion],
        title: str,
        callbacks: Sequence[TrainerCallback],
        **kwargs: Any,
    ) -> None:
        """Called after an evaluation has sampled and scored completions.

        Args:
            args: options of the run.
            state: state of the trainer.
            control: flags that a callback may set.
            rows: the completions with their rewards.
            title: name of the table for trackers, such as `eval_completions`.
            callbacks: all callbacks of the trainer, including trackers.
            kwargs: reserved for later versions.
        """


class HealthWarnings(PPOCallback, ExportableState):
    """Logs a health warning, one line with cause and remedy, when the metrics of a run show a problem.

    `diagnostics` has the rules.

    Attributes:
        eval_completions: number of completions per evaluation, of the smallest set if there are several; `None` before
            the first evaluation.
        history: metrics of rollouts, oldest first: the first 5, the last 50, and those followed by an evaluation.
        last_said: for each warning, number of the rollout in which it was last logged.
    """

    def __init__(self):
        self.eval_completions: int | None = None
        self.history: list[dict[str, float]] = []
        self.last_said: dict[str, int] = {}

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint stores and Transformers restores."""
        return {
            "args": {},
            "attributes": {
                "history": self.history,
                "last_said": self.last_said,
                "eval_completions": self.eval_completions,
            },
        }

    def take_over(self, saved: dict[str, Any]) -> None:
        """Restores the state from a checkpoint of version 0.1.0, which stored it in `ppo_state.json`."""
        self.history = saved.get("history", [])
        self.last_said = saved.get("last_said", {})

    def on_rollout(self, args, state, control, *, metrics, rollout_index, previous, **kwargs):
        if self.history:
            self.history[-1].update(previous)
        self.history.append(dict(metrics))
        self.history = _kept(self.history)
        warnings = diagnose(
            self.history,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            eval_completions=self.eval_completions,
        )
        for line in due(warnings, self.last_said, rollout_index, args.warn_every):
            if state.is_world_process_zero:
                logger.warning("step %d, rollout %d: %s.", state.global_step, rollout_index, line)

    def on_eval_completions(self, args, state, control, *, rows, **kwargs):
        if self.eval_completions is None:
            self.eval_completions = len(rows)
        else:
            self.eval_completions = min(self.eval_completions, len(rows))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not self.history:
            self.history.append({})  # before the first rollout: the baseline of the over-optimization warning
        for name, value in (metrics or {}).items():
            if isinstance(value, float):
                self.history[-1][name] = value


def _kept(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The part of the history that the diagnostics may read."""
    recent = len(history) - LAST
    kept = []
    for i, row in enumerate(history):
        was_evaluated = any(name.startswith("eval_") for name in row)
        if i < FIRST or i >= recent or was_evaluated:
            kept.append(row)
    return kept


class CompletionTables(PPOCallback):
    """Prints some completions if `log_completions` is set, and sends all as tables to the trackers in `report_to`."""

    def __init__(self):
        self._latest: CompletionTable | None = None
        # From the latest rollout, as `on_log` does not get the callbacks.
        self._trackers: Sequence[TrainerCallback] = ()

    def on_rollout(self, args, state, control, *, completions, callbacks, **kwargs):
        self._latest = completions
        self._trackers = callbacks

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Shows the completions of the latest rollout once, at the first training log after it."""
        is_training_log = logs is not None and "loss" in logs
        if not (is_training_log and args.log_completions and state.is_world_process_zero and self._latest is not None):
            return
        table = self._latest
        self._latest = None
        print_prompt_completions_sample(
            table.prompts,
            table.completions,
            table.rewards,
            None,
            state.global_step,
            args.num_completions_to_print,
            table.further,
        )
        columns = _columns(state.global_step, table.prompts, table.completions) | table.rewards | table.further
        send_table("completions", columns, state.global_step, self._trackers, args.report_to)

    def on_eval_completions(self, args, state, control, *, rows, title, callbacks, **kwargs):
        """Prints the first completions (the prompts are the same each time) and sends all of them as a table."""
        if not state.is_world_process_zero:
            return
        prompts = [row.prompt for row in rows]
        completions = [row.completion for row in rows]
        metrics = {name: [row.rewards[name] for row in rows] for name in rows[0].rewards}
        metrics["kl"] = [row.kl for row in rows]
        further = {}
        for name in dict.fromkeys(name for row in rows for name in row.extra):
            further[name] = [row.extra.get(name) for row in rows]
        if args.log_completions:
            n = args.num_completions_to_print
            print_prompt_completions_sample(
                prompts[:n],
                completions[:n],
                {name: values[:n] for name, values in metrics.items()},
                None,
                state.global_step,
                None,
                {name: values[:n] for name, values in further.items()},
            )
        columns = _columns(state.global_step, prompts, completions) | metrics | further
        send_table(title, columns, state.global_step, callbacks, args.report_to)


def _columns(step: int, prompts: list[str | list], completions: list[str]) -> dict[str, list[Any]]:
    return {
        "step": [step] * len(prompts),
        "prompt": [str(prompt) for prompt in prompts],
        "completion": completions,
    }


def send_table(
    title: str,
    columns: dict[str, list[Any]],
    step: int,
    callbacks: Sequence[TrainerCallback],
    report_to: Sequence[str],
) -> None:
    """Sends a table to the trackers in use: as a table to Weights & Biases and trackio, as text to TensorBoard.

    Args:
        title: name of the table.
        columns: columns by name, all of the same length.
        step: optimizer step.
        callbacks: all callbacks of the trainer; the TensorBoard callback among them has the writer.
        report_to: names of the trackers, as in `TrainingArguments`.
    """
    import pandas as pd

    table = pd.DataFrame(columns)
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            with pd.option_context("display.max_colwidth", None):
                callback.tb_writer.add_text(title, table.to_html(index=False), step)
            callback.tb_writer.flush()
    for name in {"wandb", "trackio"} & set(report_to):
        tracker = __import__(name)
        if name == "trackio" or tracker.run is not None:
            tracker.log({title: tracker.Table(dataframe=table)})
