"""How a recipe's training starts, stops and goes on: its folder, Ctrl-C and SIGTERM, and the same command again.

A recipe's function that trains is `stoppable`, calls `open_run` first, and gives its trainer `stopping_callback()`.
"""

import contextlib
import functools
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ..errors import UserError
from . import processes
from .output import is_empty, prepare_output_dir, remove
from .program import typed_command

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ..training.stopping import StopWithCheckpoint

P = ParamSpec("P")
T = TypeVar("T")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM has ended a recipe.

    Attributes:
        signal: number of the signal.
        what: where it stopped and what is kept, such as `after step 65: saved checkpoint-65 in runs/ppo`.
        then: what the same command does, such as `resume`; None if it would be refused.
    """

    def __init__(self, number: int, what: str, then: str | None):
        super().__init__(what)
        self.signal = number
        self.what = what
        self.then = then


@dataclass(eq=False)
class _Run:
    """A run of training in this process."""

    folder: Path | None = None
    options: dict[str, Any] | None = None
    checkpoint: str | None = None
    """From which the run goes on."""
    callback: "StopWithCheckpoint | None" = None
    keeps_checkpoints: bool = True
    """False for `save_strategy: no`: the checkpoint of a stop is deleted when the run ends."""
    locked: str | None = None
    """The folder that this run keeps other processes out of."""


_runs: list[_Run] = []
"""The runs of this process: the last one is the innermost, as a member of an ensemble is inside the ensemble."""

_locks: dict[str, contextlib.ExitStack] = {}
"""Folders that this process keeps other processes out of."""


# For recipes


def stoppable(train: Callable[P, T]) -> Callable[P, T]:
    """Decorator of a recipe's function that trains. It marks a run as finished, and explains Ctrl-C.

    Raises:
        Interrupted: instead of `KeyboardInterrupt`, with what is kept.
    """

    @functools.wraps(train)
    def stoppable_train(*args: P.args, **kwargs: P.kwargs) -> T:
        run = _Run()
        _runs.append(run)
        try:
            result = train(*args, **kwargs)
        except Interrupted:  # of a member of an ensemble
            raise
        except KeyboardInterrupt as stop:
            raise _explained(stop, run) from None
        finally:
            _runs.remove(run)
            if run.callback is not None:
                run.callback.give_back()
            if run.locked is not None:
                _locks.pop(run.locked).close()
        if run.options is not None and processes.is_first():
            from .run_record import write_record

            write_record(run.folder, run.options, finished=True)
        return result

    return stoppable_train


def open_run(
    recipe: str, args: "TrainingArguments", options: tuple[Any, ...], *, overwrite: bool, has_parts: bool = False
) -> str | None:
    """Makes the folder of a run, or finds out from which checkpoint the run in it goes on.

    Without `resume_from_checkpoint` and `overwrite`, a run in the folder that was stopped goes on if its options are
    the same, except for those that do not change what is trained. Call it on every process.

    Args:
        recipe: name of the command, such as `ppo`.
        args: options of the trainer, with the folder.
        options: all dataclasses of options.
        overwrite: start from the beginning, and delete what is in the folder.
        has_parts: the run consists of runs in sub-folders, which find their own checkpoints.

    Returns:
        The checkpoint to go on from; None to start from the beginning, and for a run with parts.

    Raises:
        UserError: the folder holds a finished run, one with other options, or files of someone else; another process
            trains there; it cannot be written; or the checkpoint cannot be used.
    """
    folder = Path(args.output_dir)
    answer: list[Any] = [None]
    if processes.is_first():
        try:
            answer = [("checkpoint", _open(recipe, folder, args, options, overwrite=overwrite, has_parts=has_parts))]
        except UserError as error:
            if processes.count() == 1:
                raise
            answer = [("refused", str(error))]
    if processes.count() > 1:
        _ = args.device  # connects the processes, as the options say
        from accelerate.utils import broadcast_object_list

        answer = broadcast_object_list(answer, from_process=0)
    kind, value = answer[0]
    if kind == "refused":
        if processes.is_first():
            raise UserError(value)
        raise SystemExit(2)  # the first process says why
    if _runs:
        _runs[-1].folder = folder
        _runs[-1].checkpoint = value
    return value


def stopping_callback() -> "StopWithCheckpoint":
    """For the `callbacks` of a trainer: at Ctrl-C or SIGTERM, a checkpoint is saved and training ends."""
    from ..training.stopping import StopWithCheckpoint

    callback = StopWithCheckpoint(say=_say if processes.is_first() else lambda line: None)
    if _runs:
        _runs[-1].callback = callback
    return callback


def forget_checkpoints_of_stops(args: "TrainingArguments") -> None:
    """Deletes the checkpoints of stops in a finished run that was asked to keep no checkpoints. All others are kept."""
    from .run_record import read_record

    folder = Path(args.output_dir)
    record = read_record(folder)
    if record is None or args.save_strategy != "no" or not processes.is_first():
        return
    for name in record.get("stops", []):
        if (folder / name).is_dir():
            remove(folder / name)


@contextlib.contextmanager
def part_of(where: str, kept: str) -> Iterator[None]:
    """Around a part of a longer run: Ctrl-C names the part, and says what is kept besides.

    Args:
        where: the part, such as `stage 3 of 6 (sft)`.
        kept: what is kept, such as `finished stages are kept`.

    Raises:
        Interrupted: instead of `KeyboardInterrupt`.
    """
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(stop.signal, f"in {where}, {stop.what}; {kept}", "resume") from None
    except KeyboardInterrupt as stop:
        what = f"in {where}, which starts again; {kept}"
        raise Interrupted(number_of(stop), what, "resume") from None


# For `run_recipe`


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Inside the context, SIGTERM raises `KeyboardInterrupt`, unless somebody handles it already."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise(number: int, frame: Any) -> None:
    stop = KeyboardInterrupt()
    stop.signal = number
    raise stop


def number_of(stop: KeyboardInterrupt) -> int:
    """The number of the signal that ended a recipe."""
    return int(getattr(stop, "signal", signal.SIGINT))


def line_of(stop: KeyboardInterrupt) -> str:
    """What a recipe says at its end after Ctrl-C or SIGTERM."""
    if not isinstance(stop, Interrupted):
        return "interrupted"
    if stop.then is None:
        return f"interrupted {stop.what}"
    command = command_to_go_on(from_start=stop.then == "start again")
    return f"interrupted {stop.what}; {stop.then} with the same command: {command}"


def command_to_go_on(*, from_start: bool = False) -> str:
    """The command as it was typed, without the options that would delete the run or go back in it.

    Args:
        from_start: the run has no checkpoint, so that it starts from the same one as before, if it was given one.
    """
    kept = []
    skips_value = False
    for word in typed_command():
        if skips_value and not word.startswith("--"):
            skips_value = False
            continue
        option, equals, _ = word.partition("=")
        goes_back = option == "--resume_from_checkpoint" and not from_start
        is_left_out = option == "--overwrite" or goes_back
        skips_value = is_left_out and not equals
        if not is_left_out:
            kept.append(word)
    # Those of the config file are overridden.
    config = _config_of(kept)
    if str(config.get("overwrite")).lower() == "true":
        kept += ["--overwrite", "false"]
    if config.get("resume_from_checkpoint") is not None and not from_start:
        kept += ["--resume_from_checkpoint", "true"]
    return shlex.join(kept)


def _config_of(words: list[str]) -> dict[Any, Any]:
    """The options in the file that a command reads; empty if it reads none."""
    from .config_file import read_config
    from .shipped import find_config

    for number, word in enumerate(words):
        option, _, value = word.partition("=")
        if option == "--config":
            with contextlib.suppress(UserError, IndexError):
                return read_config(find_config(value or words[number + 1]))
    return {}


def release_folders() -> None:
    """Lets other processes train in the folders of this process."""
    for lock in _locks.values():
        lock.close()
    _locks.clear()


# Inside


def _open(
    recipe: str,
    folder: Path,
    args: "TrainingArguments",
    options: tuple[Any, ...],
    *,
    overwrite: bool,
    has_parts: bool,
) -> str | None:
    """`open_run` in the first process."""
    from ..checkpointing import resolve_checkpoint
    from .run_record import compared_options, read_record, write_record
    from .stopped_runs import how_it_goes_on, refuse_deleting_inputs

    _lock(folder)
    if overwrite:
        refuse_deleting_inputs(folder, options)
    resume = args.resume_from_checkpoint
    is_asked = resume is not None and str(resume).lower() != "false"
    now = compared_options(recipe, options, processes.count())
    found = None
    if not (is_asked or overwrite or str(resume).lower() == "false" or is_empty(folder)):
        record = read_record(folder)
        if record is not None and record["finished"]:
            raise UserError(
                f"{folder} is not empty: pass --resume_from_checkpoint true to continue, or --overwrite true to start "
                "again (its run has finished)"
            )
        if record is not None:
            found = how_it_goes_on(folder, record, now, has_parts=has_parts)
    if found is not None:
        print(found.line, flush=True)
        resume = found.checkpoint
        for item in found.useless:
            remove(item)
    prepare_output_dir(folder, resume=resume or found is not None, overwrite=overwrite)
    checkpoint = None if has_parts else resolve_checkpoint(resume, folder)
    write_record(folder, now, finished=False)
    if _runs:
        _runs[-1].options = now
        _runs[-1].keeps_checkpoints = args.save_strategy != "no"
    return checkpoint


def _explained(stop: KeyboardInterrupt, run: _Run) -> Interrupted:
    """Where a run stopped, what is kept, and how to go on."""
    from ..checkpointing import last_complete_checkpoint
    from ..training.stopping import TrainingStopped
    from .run_record import write_record
    from .stopped_runs import has_weights

    number = number_of(stop)
    if isinstance(stop, TrainingStopped):
        if run.options is not None and not run.keeps_checkpoints:
            write_record(run.folder, run.options, finished=False, stop=stop.checkpoint.name)
        what = f"after step {stop.step}: saved {stop.checkpoint.name} in {run.folder}"
        return Interrupted(number, what, "resume")
    step = None if run.callback is None else run.callback.step
    if step is None:
        where = "before the first step"
    elif run.callback.is_over:
        where = "after the last step, before the report"
    else:
        where = f"in step {step + 1}"
    checkpoint = last_complete_checkpoint(run.folder) if run.folder is not None else None
    if checkpoint is not None:
        return Interrupted(number, f"{where}: {Path(checkpoint).name} in {run.folder} is kept", "resume")
    if step is None:
        return Interrupted(number, f"{where}: nothing is lost", "start again")
    if run.callback.is_over and has_weights(run.folder):
        return Interrupted(number, f"{where}: the weights are in {run.folder}", None)
    return Interrupted(number, f"{where}: no checkpoint is saved", "start again")


def _lock(folder: Path) -> None:
    """Keeps other processes out of a folder until `release_folders`.

    Raises:
        UserError: another process trains there, or the folder cannot be written.
    """
    from .locking import only_process

    key = str(folder.absolute())
    if key in _locks:
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_process(folder))
        _locks[key] = stack.pop_all()
    if _runs:
        _runs[-1].locked = key


def _say(line: str) -> None:
    """Prints a line from a signal handler, where `print` may be in the middle of another line."""
    if processes.has_another_failed():  # the launcher ends this process too, and no checkpoint can be saved
        raise Interrupted(signal.SIGTERM, "as another process has failed", None)
    with contextlib.suppress(OSError, ValueError):  # nobody reads it: training goes on to its checkpoint anyway
        os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, f"\n{line}\n".encode())
