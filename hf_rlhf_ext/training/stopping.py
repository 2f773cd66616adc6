"""Ends training at a signal with a checkpoint, so that nothing is lost: for PPO in Python, and for every recipe."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from transformers import TrainerCallback, TrainerControl, TrainingArguments

from ..checkpointing import is_complete
from .leaving import leave_at_once, listens, part_to_leave

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

SAME_SIGNAL_SECONDS = 2.0
"""In processes that torchrun started, a signal this long after the first one is the same one: torchrun passes it on."""


class SignalReceived(KeyboardInterrupt):
    """Ctrl-C or another signal that asks the process to end.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.signal = number


class TrainingStopped(SignalReceived):
    """Training ended at a signal, and a checkpoint was saved.

    Attributes:
        step: the last optimizer step.
        checkpoint: folder of the checkpoint.
    """

    def __init__(self, number: int, step: int, checkpoint: Path):
        super().__init__(number, f"signal {number}: saved {checkpoint}")
        self.step = step
        self.checkpoint = checkpoint


class SaveOnSignal(TrainerCallback):
    """At SIGTERM, which batch systems send before they end a job, saves a checkpoint and stops training.

    Both happen at the end of the current optimizer step. A signal in a rollout or an evaluation ends it, see `leaving`;
    the checkpoint is that of the last step.

    Attributes:
        received: whether this process has received the signal.
        agreed: whether any process has received it. The trainer sets it at the same step on all processes.
        step: the last optimizer step of this call of `train`; None before the first one.
    """

    def __init__(self):
        self.received = False
        self.agreed = False
        self.step: int | None = None
        self._number = signal.SIGTERM
        self._process = os.getpid()

    def agree(self, agreed: bool) -> None:
        """Sets whether any process has received the signal. All processes call it with the same value."""
        self.agreed = agreed

    @property
    def status(self) -> int:
        """The exit status of a process that ends at the signal, as shells count it."""
        return 128 + self._number

    def stop(self, args: TrainingArguments, control: TrainerControl) -> None:
        """Asks for a checkpoint that a run can go on from, and for the end of training. On all processes."""
        self.agreed = True
        control.should_save = True
        control.should_training_stop = True

    def any_received(self) -> bool:
        """Whether any process has received a signal. All processes call it together, and then know which one."""
        if PartialState().num_processes == 1:
            return self.received
        counts = [float(self.received and self._number == number) for number in STOP_SIGNALS]
        total = reduce(torch.tensor(counts, device=PartialState().device), reduction="sum").tolist()
        for number, count in zip(STOP_SIGNALS, total, strict=True):
            if count:
                self._number = number
        return any(total)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles SIGTERM inside the context, in the main thread only.

        If training was stopped by the signal, the process exits with status 128 + 15 at the end of the context.
        """
        self.received = False
        self.agreed = False
        self.step = None
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread:
            before = signal.signal(signal.SIGTERM, self._receive)
        try:
            with listens(self):
                yield
        finally:
            if in_main_thread:
                signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        if self.agreed:
            raise SystemExit(self.status)
        if self.received:  # it came after the last step: the previous handler gets it now
            signal.raise_signal(signal.SIGTERM)

    def _receive(self, number, frame):
        if not self._is_forked(number):
            self.received = True
            leave_at_once()

    def _is_forked(self, number: int) -> bool:
        """Whether this is a worker of a `DataLoader`, which is a copy of this process with its handlers.

        Ctrl-C reaches it too. It goes on, as rows are still needed; any other signal ends it as usual.
        """
        if os.getpid() == self._process:
            return False
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        return True

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step
        if self.agreed:
            self.stop(args, control)

    def on_train_end(self, args, state, control, **kwargs):
        if self.agreed and self.step is None:
            logger.warning("SIGTERM: training stopped before its first step, so that there is nothing to save.")
        elif self.agreed:
            logger.warning(
                "SIGTERM: saved a checkpoint at step %d: resume with resume_from_checkpoint=True.", state.global_step
            )


class StopWithCheckpoint(SaveOnSignal):
    """At Ctrl-C or SIGTERM, saves a checkpoint as `SaveOnSignal` does, and raises `TrainingStopped`.

    A second signal ends training at once. Before the first step of this process there is nothing to save, so that the
    signals keep their handlers until then. It works with every `Trainer`, whatever its `save_strategy`.

    Args:
        say: called in the signal handler with one line for the user; only in the first process.

    Attributes:
        is_over: whether training has ended.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None):
        super().__init__()
        self.is_over = False
        self._say = say
        self._number = signal.SIGINT
        self._received_at = 0.0
        self._handlers: dict[int, object] = {}  # those before ours, by the number of the signal
        self._changed: list[tuple[TrainingArguments, str, object]] = []  # options of the user, and their values

    def agree(self, agreed: bool) -> None:
        """Nothing: this callback asks the other processes itself."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Gives the signals back at the end of the context, however training ended."""
        try:
            with listens(self):
                yield
        finally:
            self.give_back()

    def _listen(self) -> None:
        if self._handlers or threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a script
                self._handlers[number] = signal.signal(number, self._receive)

    def give_back(self) -> None:
        """Restores the handlers that the signals had before, and the options that a stop has changed."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._handlers = {}
        for args, name, value in reversed(self._changed):
            setattr(args, name, value)
        self._changed = []

    def _change(self, args: TrainingArguments, name: str, value: object) -> None:
        """Changes an option until `give_back`: in Python, the next run may use the same options."""
        self._changed.append((args, name, getattr(args, name)))
        setattr(args, name, value)

    def _receive(self, number, frame):
        if self._is_forked(number):
            return
        seconds = time.monotonic() - self._received_at
        if not self.received:
            self.received = True
            self._number = number
            self._received_at = time.monotonic()
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            part = part_to_leave()
            when = "at the end of this step" if part is None else f"of the last step, without this {part}"
            self._say(f"{name}: saving a checkpoint {when}; Ctrl-C again ends at once")
            leave_at_once()
        elif "TORCHELASTIC_RUN_ID" not in os.environ or seconds > SAME_SIGNAL_SECONDS:
            self.give_back()  # a third one is not waited for either
            raise SignalReceived(number)

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = None
        self.received = self.agreed = self.is_over = False

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step
        self._listen()
        self.agreed = self.any_received()
        if not self.agreed:
            return
        self.stop(args, control)
        if args.save_strategy == "best":
            control.should_evaluate = False  # afterward, only a better model would be saved

    def stop(self, args: TrainingArguments, control: TrainerControl) -> None:
        super().stop(args, control)
        self._change(args, "save_only_model", False)  # such a checkpoint has no optimizer
        # At a limit of 1, `Trainer` deletes all but the best checkpoint when training ends.
        self._change(args, "save_total_limit", None)

    def on_evaluate(self, args, state, control, **kwargs):
        """An evaluation may take minutes. A signal in it is acted on after it, not after one more step."""
        if self.step is None or self.is_over or args.save_strategy == "best":
            return
        self.agreed = self.agreed or self.any_received()
        if self.agreed:
            self.stop(args, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        """`Trainer` calls it also when training stops in the middle of an epoch, after the checkpoint is saved."""
        if not self.agreed:
            return
        self._change(args, "load_best_model_at_end", False)  # nothing is done with it
        if state.epoch is not None and state.epoch != int(state.epoch):
            control.should_evaluate = False
            control.should_save = False

    def on_train_end(self, args, state, control, **kwargs):
        self.give_back()
        self.is_over = True
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.agreed and _is_saved(checkpoint):
            raise TrainingStopped(self._number, state.global_step, checkpoint)
        if self.received:  # it came after the last step, or a guard of PPO has stopped the run
            signal.raise_signal(self._number)


def _is_saved(checkpoint: Path) -> bool:
    """Whether the first process has saved the checkpoint. All processes call it together, and get the same answer."""
    answer = [is_complete(checkpoint)]
    if PartialState().num_processes > 1:
        # The others arrive while the first one is still writing, and may be on another machine.
        broadcast_object_list(answer, from_process=0)
    return answer[0]
