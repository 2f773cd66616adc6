"""What a recipe shows while it trains, and the full log that it keeps.

`show_progress` connects both to a trainer: the terminal gets a progress bar and one short line per log, the file
`log.jsonl` gets every metric of every log.
"""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length

from ..training.shown_table import has_table
from ..training.table import readable

LOG_FILE = "log.jsonl"
"""Name of the full log in a run's folder."""
MAX_WIDTH = 100
"""Longest line of the terminal, in characters."""
TRAINING_BAR = "{percentage:3.0f}%|{bar:30}| step {n_fmt}/{total_fmt}, {elapsed} elapsed, {remaining} left"
EVALUATION_BAR = "evaluation {percentage:3.0f}%|{bar:30}| {remaining} left"


class Shown(NamedTuple):
    """A metric of the short lines: its logged name, what the line calls it, and its unit."""

    metric: str
    label: str
    unit: str = ""


SHOWN = (
    Shown("objective/scores", "reward"),
    Shown("objective/kl", "KL", "nats"),
    Shown("loss", "loss"),
    Shown("accuracy", "accuracy"),
    Shown("mean_token_accuracy", "token accuracy"),
)
"""Metrics of the short lines, in their order; a log shows those that it has."""


def show_progress(trainer: Trainer, *, verbose: bool = False, eval_rewards: Sequence[str] = ()) -> None:
    """Writes the trainer's logs to `log.jsonl` in its output folder, and shows them in short lines.

    With `verbose`, the terminal keeps Transformers' own progress bar and log dictionaries. In a notebook, the trainer's
    table is enough.

    Args:
        eval_rewards: names of the rewards that only evaluation computes, for the line of an evaluation.
    """
    trainer.add_callback(LogFile(Path(trainer.args.output_dir) / LOG_FILE))
    if verbose or has_table(trainer):
        return
    for default_callback in (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(default_callback)
    trainer.add_callback(TerminalProgress(eval_rewards))


# ---- The terminal ----


class TerminalProgress(TrainerCallback):
    """One progress bar with the time left, and one short line per log.

    The bar is drawn only where stderr is a terminal. Captured output has the lines alone.
    """

    def __init__(self, eval_rewards: Sequence[str] = ()):
        self.eval_rewards = list(eval_rewards)
        self.clock = TrainingClock()
        self.first_step = 0  # of this process: not 0 in a resumed run
        self._training_bar: tqdm | None = None
        self._evaluation_bar: tqdm | None = None
        self._around_bar = contextlib.ExitStack()

    # ---- The bars ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.first_step = state.global_step
        self.clock = TrainingClock(state.global_step)
        if not state.is_world_process_zero or not _draws_bars(args):
            return
        # Warnings are printed above the bar, as the lines are.
        loggers = [logging.getLogger(), logging.getLogger("transformers")]
        self._around_bar.enter_context(logging_redirect_tqdm(loggers))
        self._training_bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            bar_format=TRAINING_BAR,
            dynamic_ncols=True,
            smoothing=0,  # the mean of all steps: in PPO, one step in several also samples completions
            leave=False,  # at the end, a line has the number of steps and the time
            disable=False,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.clock.count_step()
        if self._training_bar is not None:
            self._training_bar.update(state.global_step - self._training_bar.n)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, eval_dataloader=None, **kwargs
    ):
        if not state.is_world_process_zero or not _draws_bars(args) or not has_length(eval_dataloader):
            return
        if self._evaluation_bar is None:
            self._evaluation_bar = tqdm(
                total=len(eval_dataloader), bar_format=EVALUATION_BAR, dynamic_ncols=True, leave=False, disable=False
            )
        self._evaluation_bar.update()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.clock.resume()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.clock.resume()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._training_bar is not None:
            self._training_bar.close()
            self._training_bar = None
        self._around_bar.close()

    # ---- The lines ----

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if self._evaluation_bar is not None:
            self._evaluation_bar.close()
            self._evaluation_bar = None
        fields = self._fields(state, logs)
        if not fields:
            return
        # Not `print`, which would break the bar. What is written reaches a pipe or file at once.
        tqdm.write(short_line(fields), file=sys.stdout)
        sys.stdout.flush()

    def _fields(self, state: TrainerState, logs: dict[str, Any]) -> list[str]:
        """The parts of the line of a log; none where it has no metric to show."""
        if "train_runtime" in logs:
            return self._summary(state, logs)
        evaluated = {}
        for name, value in logs.items():
            if name.startswith("eval_"):
                evaluated[name.removeprefix("eval_")] = value
        if evaluated:
            metrics = self._evaluation(evaluated)
            prefix = "evaluation: "
        else:
            metrics = shown_metrics(logs)
            prefix = ""
        if not metrics:
            return []
        if not evaluated:
            speed = self.clock.speed(state.global_step, logs.get("num_tokens"))
            if speed:
                metrics.append(speed)
        width = len(str(state.max_steps))
        step = f"step {state.global_step:>{width}}/{state.max_steps}"
        return [step, prefix + metrics[0], *metrics[1:]]

    def _evaluation(self, metrics: dict[str, Any]) -> list[str]:
        fields = shown_metrics(metrics)
        for name in self.eval_rewards:
            mean = metrics.get(f"rewards/{name}/mean")
            if mean is not None:
                fields.append(f"{name} {readable(mean)}")
        if fields and "runtime" in metrics:
            fields.append(f"{metrics['runtime']:.1f} s")
        return fields

    def _summary(self, state: TrainerState, logs: dict[str, Any]) -> list[str]:
        """The line at the end of training."""
        steps = state.global_step - self.first_step
        if steps == 0:
            return ["nothing left to train"]
        unit = "step" if steps == 1 else "steps"
        fields = [f"trained {steps} {unit} in {logs['train_runtime']:.1f} s"]
        if "train_loss" in logs:
            fields.append(f"mean loss {readable(logs['train_loss'])}")
        return fields


class TrainingClock:
    """Seconds and tokens of training between two logs, without the time of evaluations and saves."""

    def __init__(self, first_step: int = 0):
        self._step = first_step  # of the last log
        self._seconds = 0.0  # since the last log
        self._tokens = 0  # trainers count from 0 in every process, also in a resumed run
        self._since = time.monotonic()

    def resume(self) -> None:
        """Leaves out the time since the last step."""
        self._since = time.monotonic()

    def count_step(self) -> None:
        """Adds the time of a step that has just ended."""
        now = time.monotonic()
        self._seconds += now - self._since
        self._since = now

    def speed(self, step: int, tokens: int | None) -> str:
        """Tokens per second since the last log, or seconds per step where the log does not count tokens."""
        steps = step - self._step
        seconds = self._seconds
        self._step = step
        self._seconds = 0.0
        if steps <= 0 or seconds <= 0:
            return ""
        if tokens is None:
            return f"{readable(seconds / steps)} s/step"
        new_tokens = tokens - self._tokens
        self._tokens = tokens
        return f"{readable(new_tokens / seconds)} tokens/s"


def _draws_bars(args: TrainingArguments) -> bool:
    return sys.stderr.isatty() and not args.disable_tqdm


def shown_metrics(logs: dict[str, Any]) -> list[str]:
    """The metrics of `SHOWN` that a log has."""
    fields = []
    for shown in SHOWN:
        value = logs.get(shown.metric)
        if value is None:
            continue
        field = f"{shown.label} {readable(value)}"
        if shown.unit:
            field += f" {shown.unit}"
        fields.append(field)
    return fields


def short_line(fields: Sequence[str]) -> str:
    """The fields side by side; those that would make the line longer than `MAX_WIDTH` are left out."""
    line = ""
    for field in fields:
        longer = f"{line}  {field}" if line else field
        if len(longer) > MAX_WIDTH:
            break
        line = longer
    return line


# ---- The file ----


class LogFile(TrainerCallback):
    """Writes every log as one JSON object per line, with `step` and `time` (UTC), as training goes on.

    A resumed run starts from the logs that its checkpoint holds. The file is set back to these logs, so the steps that
    are trained again are in it once. Where the file lacks some of them, they are written without a time.

    JSON has no numbers that are not finite: they are written as the texts "NaN", "Infinity" and "-Infinity", which
    `float()` reads.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if not state.is_world_process_zero:
            return
        old_records = list(read_log(self.path))
        lines = []
        for index, log in enumerate(state.log_history):
            written_at = None
            if index < len(old_records) and old_records[index].get("step") == log.get("step"):
                written_at = old_records[index].get("time")
            lines.append(_line(log, written_at))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The old file stays complete until the new one is.
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, self.path)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if not state.is_world_process_zero or not state.log_history:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self.path.open("a", encoding="utf-8") as file:  # closed at once: the line is on the disk
            file.write(_line(state.log_history[-1], now))


def read_log(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a `log.jsonl`, without a last line that was cut off; none where there is no file."""
    path = Path(path)
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the process was killed while it wrote the line
            return


def _line(log: dict[str, Any], written_at: str | None) -> str:
    record: dict[str, Any] = {"step": log.get("step"), "time": written_at}
    for name, value in log.items():
        record[name] = _json_value(value)
    return json.dumps(record, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _json_value(value: Any) -> Any:
    if hasattr(value, "item"):  # a number of NumPy or torch
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return "NaN"
        return "Infinity" if value > 0 else "-Infinity"
    return value
