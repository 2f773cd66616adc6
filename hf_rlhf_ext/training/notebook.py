"""The table that a trainer shows in a notebook, in place of Transformers' table of losses.

Importing this module imports IPython. `show_table` imports it where a notebook is running.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

from IPython.display import HTML, display
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils.notebook import NotebookProgressCallback

from .bars import REFRESH, NotebookBar, OwnOutput, bar_html, clock, draw_bars_in
from .table import Column, Table, evaluation_prefix, table_html, table_of


class NotebookTable(NotebookProgressCallback):
    """A table of the metrics that matter, one row per log, with a bar of the steps above it.

    It shows `state.log_history`: a resumed run has the rows of its earlier part, too. Replaces Transformers' callback,
    of which it is a subclass so that `trainer.remove_callback(NotebookProgressCallback)` removes it.

    Args:
        columns: the columns of the table.
    """

    def __init__(self, columns: Sequence[Column]):
        super().__init__()
        self.columns = columns
        self._training: _TrainingOutput | None = None
        self._evaluation_bar: NotebookBar | None = None

    # ---- Training ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._close_evaluation_bar()
        self._training = None
        if not state.is_world_process_zero:
            return
        self._training = _TrainingOutput(state, self.columns)
        draw_bars_in(self._training)
        self._training.show(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._training is not None:
            self._training.count_step(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if self._is_training():
            self._training.add_log(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._training is not None:
            self._training.finish(state)
            self._training = None
        draw_bars_in(None)

    def _is_training(self) -> bool:
        """Whether the table of a training can be updated. After Ctrl-C, which has no event, it is of an older cell."""
        return self._training is not None and self._training.is_shown()

    # ---- Evaluation ----

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, eval_dataloader=None, **kwargs
    ):
        if not state.is_world_process_zero or args.disable_tqdm or not has_length(eval_dataloader):
            return
        if self._evaluation_bar is None:
            place = self._training if self._is_training() else OwnOutput()
            self._evaluation_bar = NotebookBar("evaluation", len(eval_dataloader), place)
        self._evaluation_bar.update(1)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics=None, **kwargs
    ):
        self._close_evaluation_bar()
        if self._is_training() or not metrics or not state.is_world_process_zero:
            return
        evaluated = table_of([{"step": state.global_step} | _of_one_evaluation(metrics)], self.columns)
        if evaluated.rows:
            display(HTML(table_html(evaluated)))

    def on_predict(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._close_evaluation_bar()

    def _close_evaluation_bar(self) -> None:
        if self._evaluation_bar is not None:
            self._evaluation_bar.close()
            self._evaluation_bar = None


def _of_one_evaluation(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics with the name of the time that `table_of` looks for, which a callback before may have removed."""
    if evaluation_prefix(metrics):
        return metrics
    return metrics | {"eval_runtime": 0.0}


class _TrainingOutput:
    """The output of one training: bar of the steps, table, and the bar of the part that is running.

    Args:
        state: state of the trainer at the start.
        columns: the columns of the table.
    """

    def __init__(self, state: TrainerState, columns: Sequence[Column]):
        self.columns = columns
        self.first_step = state.global_step  # of this process: not 0 in a resumed run
        self.seconds: dict[int, float] = {}  # from the start to each log, by step
        self._started = time.monotonic()
        self._cell = current_cell()
        self._bar = ""  # of the part that is running
        self._steps = ""
        self._table = ""
        self._drawn = 0.0  # time of the last update
        self._handle = None

    def is_shown(self) -> bool:
        """Whether the current cell is the one that trains."""
        return current_cell() == self._cell

    def show(self, state: TrainerState) -> None:
        """Shows the run as it is now."""
        self._set_steps(state)
        self._set_table(table_of(state.log_history, self.columns, self.seconds))
        self._draw()

    def count_step(self, state: TrainerState) -> None:
        """Moves the bar of the steps; not after each of many fast steps."""
        if time.monotonic() - self._drawn < REFRESH:
            return
        self._set_steps(state)
        self._draw()

    def add_log(self, state: TrainerState) -> None:
        """Adds the newest log to the table."""
        self.seconds.setdefault(state.global_step, time.monotonic() - self._started)
        self.show(state)

    def show_bar(self, bar: str) -> None:
        """Shows the bar of a part below the table."""
        self._bar = bar
        self._draw()

    def finish(self, state: TrainerState) -> None:
        """Shows the whole run at its end."""
        self._bar = ""
        self.show(state)
        seconds = time.monotonic() - self._started
        label = f"step {state.global_step}/{state.max_steps} in {clock(seconds)}"
        self._steps = bar_html(state.global_step, state.max_steps, label)
        self._draw()

    def _set_steps(self, state: TrainerState) -> None:
        seconds = time.monotonic() - self._started
        label = f"step {state.global_step}/{state.max_steps}, {clock(seconds)} elapsed"
        n_done = state.global_step - self.first_step
        n_left = state.max_steps - state.global_step
        if n_done > 0 and n_left > 0:
            label += f", {clock(seconds / n_done * n_left)} left"
        self._steps = bar_html(state.global_step, state.max_steps, label)

    def _set_table(self, table: Table) -> None:
        self._table = table_html(table) if table.rows else ""

    def _draw(self) -> None:
        if not self.is_shown():
            return
        self._drawn = time.monotonic()
        output = HTML(self._steps + self._table + self._bar)
        if self._handle is None:
            self._handle = display(output, display_id=True)
        else:
            self._handle.update(output)


def current_cell() -> Any:
    """The number of the cell that is running; `None` outside of IPython."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get_ipython() if get_ipython is not None else None
    return getattr(shell, "execution_count", None)
