"""Implements `push_to_hub` of the trainers without pickles and incomplete folders, which `Trainer` would push."""

import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..errors import UserError
from .push import create_private_repo, push_files, try_push
from .report import FROM_PYTHON, REPORT_FILE, RunReport, trainer_report
from .run_files import run_files

_SENDS_PICKLES = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
_NOT_OF_A_CHECKPOINT = ("README.md", "*.pt", "*.pth", "*.bin")
"""Files of a checkpoint that are not pushed: pickles, and PEFT's default card, which names local folders."""


class HubPublisher:
    """Implements `publishing.Publisher`. Every push is one scanned commit to a repository that is private by default.

    `hub_strategy` must be `end` or `every_save`, which pushes the model of each checkpoint in the background. The other
    strategies are not supported, since they would push optimizer states. A failed push prints one line and does not
    stop training.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None  # pushes the last checkpoint

    def check_access(self, trainer: Trainer, *, token: str | None = None, private: bool | None = None) -> str | None:
        """Checks the token and creates the repository, before training.

        Args:
            trainer: The trainer, whose `args` name the repository.
            token: Access token; the default is `hub_token`, `HF_TOKEN` or the stored token.
            private: Whether a new repository is private; the default is `hub_private_repo`, or private if that is None.

        Returns:
            The full id of the repository on the process that pushes, and None on other processes.

        Raises:
            UserError: The token has no write access, or `hub_strategy` would push pickles.
        """
        args = trainer.args
        strategy = HubStrategy(args.hub_strategy)
        if strategy in _SENDS_PICKLES:
            raise UserError(
                f"hub_strategy: {strategy.value} is not supported, since it would push optimizer states, which are "
                "pickles: choose every_save or end."
            )
        if not trainer.is_world_process_zero():
            return None
        if private is None:
            private = args.hub_private_repo
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        return create_private_repo(name, token=token or args.hub_token, private=private)

    def push_checkpoint(self, trainer: Trainer, folder: str | Path) -> None:
        """Pushes the model of a checkpoint in the background. Never raises, so that training continues.

        If the previous push is still running, this one is skipped, or waits for it with `hub_always_push`.
        """
        args = trainer.args
        if not trainer.is_world_process_zero() or HubStrategy(args.hub_strategy) == HubStrategy.END:
            return
        if self._thread is not None and self._thread.is_alive():
            if not args.hub_always_push:
                return
            self.finish()
        scratch = Path(args.output_dir) / ".push"
        step = trainer.state.global_step
        try:
            _link_checkpoint(Path(folder), scratch)
        except OSError as error:  # includes shutil.Error
            _warn(step, error)
            return
        # Read everything that the thread needs now, since the trainer continues meanwhile.
        target = (scratch, trainer.hub_model_id, step, push_options(args))
        self._thread = threading.Thread(target=_push_scratch, args=target, name="push")
        self._thread.start()

    def push_run(
        self,
        trainer: Trainer,
        message: str | None = None,
        *,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> str | None:
        """Saves the model and pushes `output_dir` with a card. Waits until the push is complete.

        Args:
            trainer: The trainer.
            message: Commit message.
            token: Access token for this push.
            revision: Branch for this push.
            private: Whether the repository is private if it is created now.

        Returns:
            URL of the commit. None if the push failed (the reason is printed), and on processes that do not push.
        """
        args = trainer.args
        if trainer.hub_model_id is None:
            trainer.init_hf_repo(token=token, private=private)
        trainer.save_model(_internal_call=True)  # on every process, since sharded models are gathered
        if not trainer.is_world_process_zero():
            return None
        self.finish()
        _write_report(trainer, Path(args.output_dir))
        options = push_options(args)
        options["message"] = message or "Upload"
        if token is not None:
            options["token"] = token
        if revision is not None:
            options["revision"] = revision
        return try_push(args.output_dir, trainer.hub_model_id, **options)

    def finish(self) -> None:
        """Waits for the push in the background."""
        if self._thread is not None:
            self._thread.join()


def push_options(args: TrainingArguments) -> dict[str, Any]:
    """Returns arguments of `push_run` from Trainer's options. A repository is private if `hub_private_repo` is None."""
    return {"private": args.hub_private_repo is not False, "token": args.hub_token, "revision": args.hub_revision}


def _write_report(trainer: Trainer, folder: Path) -> None:
    """Writes `report.json`, unless a recipe wrote it: its report has more than the trainer knows."""
    path = folder / REPORT_FILE
    if path.is_file() and FROM_PYTHON not in path.read_text(encoding="utf-8"):
        return
    report: RunReport = trainer_report(trainer)
    judged = getattr(trainer, "judged", None)  # last evaluation of a reward model
    if judged is not None and report.card is not None:
        from ..metrics.plots import plot_judged  # imports matplotlib, which other pushes do not need

        report.card.plot = plot_judged(judged, folder / "evaluation.png").name
    report.save(folder)


def _link_checkpoint(checkpoint: Path, scratch: Path) -> None:
    """Hard-links the files of a checkpoint in `scratch`, since it may be deleted (rotated) before they are sent."""
    shutil.rmtree(scratch, ignore_errors=True)  # left by a run that was killed
    left_out = shutil.ignore_patterns(*_NOT_OF_A_CHECKPOINT)
    shutil.copytree(checkpoint, scratch, copy_function=_link_or_copy, ignore=left_out)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _push_scratch(scratch: Path, repo_id: str, step: int, options: dict[str, Any]) -> None:
    """Pushes the linked files of a checkpoint and removes them. Runs in a thread, so it must not raise."""
    try:
        # Without a card and report: those of an earlier push describe other weights, so this push deletes them.
        files = run_files(scratch)
        push_files(files, repo_id, message=f"Training in progress, step {step}", **options)
    except Exception as error:  # any error of the Hub, its client or the disk
        _warn(step, error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _warn(step: int, error: Exception) -> None:
    if isinstance(error, UserError):
        reason = str(error)
    else:
        reason = f"not pushed: {type(error).__name__}: {error}."
    print(f"warning: step {step}: {reason} Training continues.", file=sys.stderr)
