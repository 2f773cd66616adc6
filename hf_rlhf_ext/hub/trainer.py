"""`push_to_hub` for trainers: Trainer's options, without the pickles and half-written folders that it would send."""

import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..errors import UserError
from .card import FROM_PYTHON, trainer_report
from .push import create_private_repo, push_files, run_files, try_push


class HubMixin:
    """Goes before a Trainer: its pushes become `push_run`'s, each one scanned commit, private by default.

    `hub_strategy` is `end` or `every_save` (which pushes what a user needs of each checkpoint, in the background);
    the others would send optimizer states. A push that fails prints one line and never ends training.
    """

    _push_thread: threading.Thread | None = None

    @property
    def card_kind(self) -> str:
        """Which of `hub.card.KINDS` this trainer makes."""
        return {"PPO": "policy", "Reward": "reward_model"}.get(self._name, "sft")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Checks the token and makes the repository, before training."""
        args = self.args
        if HubStrategy(args.hub_strategy) in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise UserError(
                f"hub_strategy: {HubStrategy(args.hub_strategy).value} would push optimizer states, which are pickles: "
                "choose every_save or end."
            )
        if self.is_world_process_zero():
            name = args.hub_model_id or Path(args.output_dir).absolute().name
            private = args.hub_private_repo if private is None else private
            self.hub_model_id = create_private_repo(name, token=token or args.hub_token, private=private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Saves and pushes `output_dir`; returns the commit's URL, None where it failed. Always blocking."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        report = Path(self.args.output_dir) / "report.json"
        if not report.is_file() or FROM_PYTHON in report.read_text(encoding="utf-8"):  # no recipe's: of the last push
            made = trainer_report(self)
            if (judged := getattr(self, "judged", None)) is not None:  # a reward model's last evaluation
                from ..metrics.plots import plot_judged  # matplotlib: only a push needs it

                made["card"]["plot"] = plot_judged(judged, report.with_name("evaluation.png")).name
            report.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        options = push_options(self.args) | {"message": commit_message or "Upload"}
        options |= {name: value for name, value in {"token": token, "revision": revision}.items() if value is not None}
        return try_push(self.args.output_dir, self.hub_model_id, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes the model of a checkpoint in the background, unless the last such push is still under way."""
        args = self.args
        if not self.is_world_process_zero() or HubStrategy(args.hub_strategy) == HubStrategy.END:
            return
        if self._push_thread is not None and self._push_thread.is_alive():
            if not args.hub_always_push:
                return
            self._finish_current_push()
        scratch, step, options = Path(args.output_dir) / ".push", self.state.global_step, push_options(args)

        def warn(error: Exception) -> None:
            said = error if isinstance(error, UserError) else f"not pushed: {type(error).__name__}: {error}."
            print(f"warning: step {step}: {said} Training goes on.", file=sys.stderr)

        try:  # linked, not copied: the checkpoint may be rotated away before it is sent
            shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
            # Without README.md: PEFT's empty card names local folders.
            left_out = shutil.ignore_patterns("README.md", "*.pt", "*.pth", "*.bin")
            shutil.copytree(checkpoint_folder, scratch, copy_function=_link, ignore=left_out)
        except OSError as error:  # shutil.Error too
            return warn(error)

        def push() -> None:
            # The card and the report of an earlier push go with its weights: they say nothing about these.
            try:
                push_files(
                    run_files(scratch), self.hub_model_id, message=f"Training in progress, step {step}", **options
                )
            except Exception as error:
                warn(error)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

        self._push_thread = threading.Thread(target=push, name="push")
        self._push_thread.start()

    def _finish_current_push(self) -> None:
        if self._push_thread is not None:
            self._push_thread.join()


def push_options(args: TrainingArguments) -> dict[str, Any]:
    """Arguments of `push_run` from Trainer's own options; `hub_private_repo` left open means private."""
    return {"private": args.hub_private_repo is not False, "token": args.hub_token, "revision": args.hub_revision}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
