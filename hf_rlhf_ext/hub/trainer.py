"""`push_to_hub` for trainers: Trainer's options, without the pickles and half-written folders that it would send."""

import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..errors import UserError
from .push import create_private_repo, push_files, run_files, try_push


class HubMixin:
    """Goes before a Trainer: its pushes become `push_run`'s, each one scanned commit, private by default.

    `hub_strategy` is `end` or `every_save` (which pushes what a user needs of each checkpoint, in the background);
    the others would send optimizer states. A push that fails prints one line and never ends training.
    """

    _push_thread: threading.Thread | None = None

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
        # Linked, not copied: the checkpoint may be rotated away before it is sent.
        scratch = tempfile.mkdtemp(prefix=".push-", dir=args.output_dir)
        left_out = shutil.ignore_patterns(
            "README.md", "*.pt", "*.pth", "*.bin"
        )  # PEFT's empty card names local folders
        copy = Path(scratch) / Path(checkpoint_folder).name
        shutil.copytree(checkpoint_folder, copy, copy_function=_link, ignore=left_out)
        step, options = self.state.global_step, push_options(args)

        def push() -> None:
            try:
                push_files(run_files(copy), self.hub_model_id, message=f"Training in progress, step {step}", **options)
            except UserError as error:
                print(f"warning: step {step}: {error} Training goes on.", file=sys.stderr)
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
