"""What happens beside the steps of a training: time is measured, snapshots and checkpoints are saved by time."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_rlhf_ext.cli.stage_progress import StageProgress
from hf_rlhf_ext.data.prompt_form import PROMPT_FORM_FILE
from hf_rlhf_ext.modeling.adapters import save_adapter
from hf_rlhf_ext.modeling.base_record import BASE_RECORD_FILE
from hf_rlhf_ext.recipes.compare_parts.records import Clock, Snapshot

TIMES_FILE = "own_time.json"
"""File in a checkpoint with the training time so far, and the snapshots."""
NEVER = 10**9
"""`save_steps` of a trainer whose checkpoints are saved by time."""


def now() -> Clock:
    """The time that is counted: wall time from an arbitrary start, and CPU time of this process."""
    return Clock(time.monotonic(), time.process_time())


def since(start: Clock) -> Clock:
    """The time since `start`."""
    end = now()
    return Clock(end.seconds - start.seconds, end.cpu_seconds - start.cpu_seconds)


class TrainingTimer(TrainerCallback):
    """Measures the time of training, saves snapshots and checkpoints by it, and ends training after `max_seconds`.

    The time is that of the optimizer steps with all that they need, such as rollouts. Evaluations, checkpoints and
    snapshots are not counted. Checkpoints hold the time, so that it goes on with a resumed run.

    Args:
        clock: by which time snapshots are taken and training ends: "wall" or "cpu".
        save_seconds: wall seconds between two checkpoints.
        snapshot_seconds: seconds of training between two snapshots; None saves none.
        folder: folder of the snapshots, each in a sub-folder with its number.
        location: `folder` relative to the folder of the seed, for the record.
        max_seconds: seconds of training after which it ends; None does not end it.
        every: checkpoints are saved at multiples of so many steps, such as those of a rollout.
        progress: the bar of the whole run.

    Attributes:
        own: time of training so far.
        snapshots: the snapshots so far.
    """

    def __init__(
        self,
        *,
        clock: str,
        save_seconds: float,
        snapshot_seconds: float | None = None,
        folder: Path | None = None,
        location: str = "",
        max_seconds: float | None = None,
        every: int = 1,
        progress: StageProgress | None = None,
    ):
        self.clock = clock
        self.save_seconds = save_seconds
        self.snapshot_seconds = snapshot_seconds
        self.folder = folder
        self.location = location
        self.max_seconds = max_seconds
        self.every = every
        self.progress = progress
        self.own = Clock(0.0, 0.0)
        self.snapshots: list[Snapshot] = []
        self.ended_early = False
        self._mark = now()
        self._saved_at = time.monotonic()
        self._processing_class: Any = None

    def _on_clock(self, measured: Clock) -> float:
        return measured.seconds if self.clock == "wall" else measured.cpu_seconds

    def _resume_counting(self) -> None:
        """Leaves out the time since the last mark."""
        self._mark = now()

    # ---- Events ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._processing_class = kwargs.get("processing_class")
        if state.global_step > 0:
            self._read(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._remove_later_snapshots()
        self._saved_at = time.monotonic()
        self._resume_counting()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.own = self.own + since(self._mark)
        self._resume_counting()
        if self.progress is not None:
            self.progress.advance(self._done(state))
        if self.max_seconds is not None and self._on_clock(self.own) >= self.max_seconds:
            self.ended_early = state.global_step < state.max_steps
            control.should_training_stop = True
        if self._is_due():
            self._save_snapshot(state, kwargs["model"])
        is_end_of_rollout = state.global_step % self.every == 0
        if time.monotonic() - self._saved_at >= self.save_seconds and is_end_of_rollout:
            control.should_save = True
        self._resume_counting()

    def _done(self, state: TrainerState) -> float:
        """How much of the training is done, from 0 to 1."""
        by_steps = state.global_step / state.max_steps if state.max_steps > 0 else 0.0
        by_time = self._on_clock(self.own) / self.max_seconds if self.max_seconds is not None else 0.0
        return max(by_steps, by_time)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._resume_counting()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._saved_at = time.monotonic()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            content = {"own": asdict(self.own), "snapshots": [asdict(snapshot) for snapshot in self.snapshots]}
            (folder / TIMES_FILE).write_text(json.dumps(content), encoding="utf-8")
        self._resume_counting()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        last = self.snapshots[-1].step if self.snapshots else 0
        if self.snapshot_seconds is not None and state.global_step > last:
            self._save_snapshot(state, kwargs["model"])

    # ---- Snapshots ----

    def _is_due(self) -> bool:
        if self.snapshot_seconds is None:
            return False
        last = self._on_clock(self.snapshots[-1].own) if self.snapshots else 0.0
        return self._on_clock(self.own) - last >= self.snapshot_seconds

    def _save_snapshot(self, state: TrainerState, model: Any) -> None:
        number = len(self.snapshots)
        folder = self.folder / str(number)
        save_adapter(model, "default", folder)
        if self._processing_class is not None:
            self._processing_class.save_pretrained(folder)
        self.snapshots.append(Snapshot(state.global_step, self.own, f"{self.location}/{number}"))

    def _read(self, checkpoint: Path) -> None:
        """Reads what a checkpoint has, if it was saved by a run with a timer."""
        path = checkpoint / TIMES_FILE
        if not path.is_file():
            return
        content = json.loads(path.read_text(encoding="utf-8"))
        self.own = Clock(**content["own"])
        for entry in content["snapshots"]:
            self.snapshots.append(Snapshot(entry["step"], Clock(**entry["own"]), entry["location"]))

    def _remove_later_snapshots(self) -> None:
        """Deletes snapshots of steps that are trained again."""
        if self.folder is None or not self.folder.is_dir():
            return
        kept = {Path(snapshot.location).name for snapshot in self.snapshots}
        for folder in self.folder.iterdir():
            if folder.name not in kept:
                shutil.rmtree(folder)


def complete_snapshots(snapshots: Sequence[Snapshot], seed_folder: Path, policy: Path) -> None:
    """Copies what the folder of the last policy says of prompts and base into the folders of the snapshots."""
    for snapshot in snapshots:
        for name in (PROMPT_FORM_FILE, BASE_RECORD_FILE):
            if (policy / name).is_file():
                shutil.copyfile(policy / name, seed_folder / snapshot.location / name)


def remove_checkpoints(folder: Path) -> None:
    """Deletes the checkpoints of a finished training, which nothing needs any more."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
