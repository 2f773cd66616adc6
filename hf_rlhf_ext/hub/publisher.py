"""Implements `push_to_hub` of the trainers without pickles and incomplete folders, which `Trainer` would push."""

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..errors import UserError, first_line
from .asked_card import AskedCard
from .card import card_from_report
from .cards.owner_text import merge_card, save_card
from .push import create_private_repo, public_texts, push_files, try_push
from .report import FROM_PYTHON, REPORT_FILE, RunReport
from .reports.provenance import base_source
from .reports.trainer_report import kind_of, write_trainer_report
from .run_files import run_files

T = TypeVar("T")
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
        self._push: Future | None = None  # in the background, of the last checkpoint or run
        self._asked = AskedCard()

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
        if self._push is not None and not self._push.done():
            if not args.hub_always_push:
                return
            self.finish()
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        scratch = Path(args.output_dir) / ".push"
        step = trainer.state.global_step
        try:
            _link_checkpoint(Path(folder), scratch)
        except OSError as error:  # includes shutil.Error
            _warn(step, error)
            return
        # Read everything that the thread needs now, since the trainer continues meanwhile.
        self._start(partial(_push_scratch, scratch, trainer.hub_model_id, step, push_options(args)))

    def push_run(
        self,
        trainer: Trainer,
        message: str | None = None,
        *,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> str | Future[str | None] | None:
        """Saves the model and pushes `output_dir` with a card.

        Args:
            trainer: The trainer.
            message: Commit message.
            blocking: Whether to wait for the push. If not, it runs in the background once the model is saved.
            token: Access token for this push.
            revision: Branch for this push.
            private: Whether the repository is private if it is created now.
            card: What the card says, see `hub.asked_card.CARD_OPTIONS`.

        Returns:
            URL of the commit. None if the push failed (the reason is printed), and on processes that do not push. With
            `blocking=False` a `Future` of these.

        Raises:
            UserError: An option of the card does not exist, or the Hub would refuse its value.
        """
        args = trainer.args
        self._ask(trainer, card, token)
        if trainer.hub_model_id is None:
            trainer.init_hf_repo(token=token, private=private)
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        self.finish()  # it may read the files that are saved now
        trainer.save_model(_internal_call=True)  # on every process, since sharded models are gathered
        if not trainer.is_world_process_zero():
            return None
        self._write_report(trainer, Path(args.output_dir))
        options = push_options(args)
        options["message"] = message or "Upload"
        if token is not None:
            options["token"] = token
        if revision is not None:
            options["revision"] = revision
        if private is not None:
            options["private"] = private
        for name in ("base_model", "language", "license", "license_name", "license_link"):  # the rest is in the report
            options[name] = getattr(self._asked, name)
        push = partial(try_push, args.output_dir, trainer.hub_model_id, **options)
        return push() if blocking else self._start(push)

    def write_report(self, trainer: Trainer, folder: str | Path) -> None:
        """Writes `report.json`, from which a later `push_run` makes a card. Never raises, since the model is saved."""
        try:
            self._write_report(trainer, Path(folder))
        except Exception as error:
            print(f"warning: {folder}: {REPORT_FILE} was not written: {first_line(error)}.", file=sys.stderr)

    def write_card(self, trainer: Trainer, **card: Any) -> None:
        """Writes `report.json` and the card into `output_dir`, and remembers the options for the next push.

        Args:
            trainer: The trainer.
            card: What the card says, see `hub.asked_card.CARD_OPTIONS`.

        Raises:
            UserError: An option does not exist, or the Hub would refuse its value.
        """
        self._ask(trainer, card)
        if not trainer.is_world_process_zero():
            return
        folder = Path(trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._write_report(trainer, folder)
        text = card_from_report(RunReport.load(folder), repo_id=trainer.hub_model_id)
        save_card(folder / "README.md", text)

    def finish(self) -> None:
        """Waits for the push in the background."""
        if self._push is not None:
            wait([self._push])

    def _start(self, push: Callable[[], T]) -> Future[T]:
        """Runs a push in a thread of its own, and returns what it will return."""
        executor = ThreadPoolExecutor(1, thread_name_prefix="push")
        self._push = executor.submit(push)
        executor.shutdown(wait=False)  # the thread ends with the push, for which Python waits at its end
        return self._push

    def _ask(self, trainer: Trainer, card: Mapping[str, Any], token: str | None = None) -> None:
        """Remembers what the caller wants in the card, and the tags of the model, as Trainer's push has them."""
        asked = AskedCard.of_options(card, kind_of(trainer), token or trainer.args.hub_token)
        model = trainer.accelerator.unwrap_model(trainer.model)
        source = base_source(model)
        base = source["base_model"]
        if asked.base_model is not None and source["relation"] == "adapter" and base not in (None, asked.base_model):
            raise UserError(
                f"finetuned_from: the base of this adapter is {base}, not {asked.base_model}: leave it out."
            )
        self._asked = asked.after(self._asked)
        tags = getattr(model, "model_tags", None)
        if tags:
            self._asked = AskedCard(tags=tuple(tags)).after(self._asked)

    def _write_report(self, trainer: Trainer, folder: Path) -> None:
        """Writes `report.json`, with what the caller wants in the card.

        The report of a recipe has more than the trainer knows, so only what the caller asked for is changed there.
        """
        path = folder / REPORT_FILE
        if path.is_file() and FROM_PYTHON not in path.read_text(encoding="utf-8"):
            if not self._asked.names:
                return
            report = RunReport.load(folder)
        else:
            report = write_trainer_report(trainer, folder)
        self._asked.written_into(report)
        report.save(folder)


def push_options(args: TrainingArguments) -> dict[str, Any]:
    """Returns arguments of `push_run` from Trainer's options. A repository is private if `hub_private_repo` is None."""
    return {"private": args.hub_private_repo is not False, "token": args.hub_token, "revision": args.hub_revision}


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
        # What their owner wrote into the card stays.
        files = run_files(scratch)
        known = public_texts(files, options["token"])
        push_files(
            files, repo_id, message=f"Training in progress, step {step}", known=known, merge_card=merge_card, **options
        )
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
