"""The trainers' way to the Hub: `push_to_hub` without the pickles and incomplete folders that Trainer would send."""

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
"""Files of a checkpoint that are not even linked: pickles, and PEFT's empty card, which names local folders."""


class HubPublisher:
    """Implements `publishing.Publisher`: every push is one scanned commit, to a repository that is private by default.

    `hub_strategy` is `end` or `every_save` (which pushes what a user needs of each checkpoint, in the background);
    the other strategies would send optimizer states. A push that fails prints one line and never ends training.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None  # the push of the last checkpoint

    def check_access(self, trainer: Trainer, *, token: str | None = None, private: bool | None = None) -> str | None:
        """Checks the token and makes the repository, before training.

        Args:
            token: default is `hub_token`, else what the machine has.
            private: of a repository that is made now; default is `hub_private_repo`, which left open means private.

        Returns:
            The repository's full id on the process that pushes; None on the others.

        Raises:
            UserError: no right to write there, or a `hub_strategy` that would publish pickles.
        """
        args = trainer.args
        strategy = HubStrategy(args.hub_strategy)
        if strategy in _SENDS_PICKLES:
            raise UserError(
                f"hub_strategy: {strategy.value} would push optimizer states, which are pickles: choose every_save or "
                "end."
            )
        if not trainer.is_world_process_zero():
            return None
        if private is None:
            private = args.hub_private_repo
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        return create_private_repo(name, token=token or args.hub_token, private=private)

    def push_checkpoint(self, trainer: Trainer, folder: str | Path) -> None:
        """Pushes the model of a checkpoint in the background. Never raises: training goes on.

        Where the last such push is still under way, this one is skipped, or waits for it with `hub_always_push`.
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
        except OSError as error:  # shutil.Error is one too
            _warn(step, error)
            return
        # All that the thread needs is read now: the trainer goes on meanwhile.
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
        """Saves the model and pushes `output_dir` with a card; waits for it.

        `message`, `token` and `revision` are those of this one push; `private` that of a repository made for it.

        Returns:
            The commit's URL; None where it failed (one line says why), and on processes that do not push.
        """
        args = trainer.args
        if trainer.hub_model_id is None:
            trainer.init_hf_repo(token=token, private=private)
        trainer.save_model(_internal_call=True)  # on every process: sharded models are gathered
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
        """Waits for a push in the background."""
        if self._thread is not None:
            self._thread.join()


def push_options(args: TrainingArguments) -> dict[str, Any]:
    """Arguments of `push_run` from Trainer's own options; `hub_private_repo` left open means private."""
    return {"private": args.hub_private_repo is not False, "token": args.hub_token, "revision": args.hub_revision}


def _write_report(trainer: Trainer, folder: Path) -> None:
    """Writes `report.json`, unless a recipe wrote one: that knows more than a trainer does."""
    path = folder / REPORT_FILE
    if path.is_file() and FROM_PYTHON not in path.read_text(encoding="utf-8"):
        return
    report: RunReport = trainer_report(trainer)
    judged = getattr(trainer, "judged", None)  # a reward model's last evaluation
    if judged is not None and report.card is not None:
        from ..metrics.plots import plot_judged  # matplotlib: only such a push needs it

        report.card.plot = plot_judged(judged, folder / "evaluation.png").name
    report.save(folder)


def _link_checkpoint(checkpoint: Path, scratch: Path) -> None:
    """Hard links of a checkpoint's files in `scratch`: the checkpoint may be rotated away before they are sent."""
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    left_out = shutil.ignore_patterns(*_NOT_OF_A_CHECKPOINT)
    shutil.copytree(checkpoint, scratch, copy_function=_link_or_copy, ignore=left_out)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _push_scratch(scratch: Path, repo_id: str, step: int, options: dict[str, Any]) -> None:
    """Pushes a checkpoint's links and removes them; runs in a thread, so it must not raise."""
    try:
        # The card and the report of an earlier push go with its weights: they say nothing about these.
        files = run_files(scratch)
        push_files(files, repo_id, message=f"Training in progress, step {step}", **options)
    except Exception as error:  # whatever the Hub, its client or the disk may say
        _warn(step, error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _warn(step: int, error: Exception) -> None:
    if isinstance(error, UserError):
        reason = str(error)
    else:
        reason = f"not pushed: {type(error).__name__}: {error}."
    print(f"warning: step {step}: {reason} Training goes on.", file=sys.stderr)
