"""TRL's SFT trainer with the safe `push_to_hub` of this library."""

from typing import Any

from trl import SFTTrainer

from ..publishing import new_publisher, require_publisher


class PublishingSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer` that pushes a model card, and neither pickles nor local names.

    It has the arguments of `SFTTrainer`. What is pushed, and where, is set by `push_to_hub`, `hub_model_id`,
    `hub_strategy` (`end` or `every_save`) and the other options of `Trainer`.
    """

    card_kind = "sft"

    def __init__(self, *args: Any, **kwargs: Any):
        # Before `Trainer.__init__`, which creates the repository if `push_to_hub` is set.
        self.publisher = new_publisher()
        super().__init__(*args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        self.hub_model_id = require_publisher(self.publisher).check_access(self, token=token, private=private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | None:
        publisher = require_publisher(self.publisher)
        return publisher.push_run(self, commit_message, token=token, revision=revision, private=private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        require_publisher(self.publisher).push_checkpoint(self, checkpoint_folder)

    def _finish_current_push(self) -> None:
        if self.publisher is not None:
            self.publisher.finish()
