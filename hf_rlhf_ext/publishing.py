"""The protocol through which a trainer pushes to the Hub.

`hub.publisher` implements the protocol, and the package's `__init__.py` connects the two. The trainers therefore import
no code for cards, scanning or pushing.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import UserError

if TYPE_CHECKING:
    from transformers import Trainer


class Publisher(Protocol):
    """What a trainer calls when `push_to_hub=True`. Each trainer has its own publisher."""

    def check_access(self, trainer: "Trainer", *, token: str | None = None, private: bool | None = None) -> str | None:
        """Checks the token and creates the repository, before training.

        Args:
            trainer: the trainer that will push.
            token: access token of the Hub; `None` uses the saved one.
            private: whether a new repository is private; `None` uses the trainer's option.

        Returns:
            The full id of the repository on the process that pushes, `None` on the others.

        Raises:
            UserError: if the token has no write access, or if an option would publish pickle files.
        """
        ...

    def push_checkpoint(self, trainer: "Trainer", folder: str | Path) -> None:
        """Pushes the model of a checkpoint in the background. Never raises, so that training continues."""
        ...

    def push_run(
        self, trainer: "Trainer", message: str | None = None, **options: Any
    ) -> "str | Future[str | None] | None":
        """Saves the run and pushes it with its card.

        Args:
            trainer: the trainer.
            message: message of the commit.
            options: the other arguments of the trainer's `push_to_hub`.

        Returns:
            The URL of the commit; `None` if the push failed, and on processes that do not push. With `blocking=False`
            a `Future` of these.
        """
        ...

    def write_report(self, trainer: "Trainer", folder: str | Path) -> None:
        """Writes what a later push of the folder needs for its card. Never raises, since the model is saved."""
        ...

    def write_card(self, trainer: "Trainer", **options: Any) -> None:
        """Writes the card into `output_dir`.

        Args:
            trainer: the trainer.
            options: the arguments of the trainer's `create_model_card`.

        Raises:
            UserError: if an option does not exist, or its value is not possible.
        """
        ...

    def finish(self) -> None:
        """Waits for a push that runs in the background."""
        ...


_factory: Callable[[], Publisher] | None = None


def set_publisher(factory: Callable[[], Publisher] | None) -> None:
    """Sets the function that makes the publisher of each new trainer; `None` turns pushing off."""
    global _factory
    _factory = factory


def new_publisher() -> Publisher | None:
    """Returns a new publisher for one trainer, or `None` if none is set."""
    return None if _factory is None else _factory()


def require_publisher(publisher: Publisher | None) -> Publisher:
    """Returns the publisher.

    Raises:
        UserError: if there is none.
    """
    if publisher is None:
        raise UserError(
            "push_to_hub: no publisher is set (publishing.set_publisher): leave push_to_hub off, and run "
            "`hf-rlhf push OUTPUT_DIR` afterward."
        )
    return publisher


def save_with_report(trainer: "Trainer", save: Callable[..., None], output_dir: str | None, is_internal: bool) -> None:
    """Saves a model as `Trainer.save_model` does. A call by the user also leaves what a later push needs for its card.

    Args:
        trainer: the trainer.
        save: `save_model` of its parent class.
        output_dir: the folder; `None` means that of the trainer's options.
        is_internal: whether the trainer called it itself, such as for a checkpoint.
    """
    if is_internal or trainer.publisher is None:
        save(output_dir, is_internal)
        return
    trainer.publisher.finish()  # a push may still read these files
    save(output_dir, is_internal)
    if trainer.args.should_save:
        trainer.publisher.write_report(trainer, output_dir or trainer.args.output_dir)


@contextmanager
def without_card(trainer: "Trainer") -> Iterator[None]:
    """Inside the context, `create_model_card` does nothing: TRL calls it for every checkpoint.

    A card states what was measured of the weights beside it, and a checkpoint's weights are in another folder.
    """
    trainer.create_model_card = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del trainer.create_model_card


# ---- Methods of the trainers ----
#
# Each trainer has TRL's class as its only base, and takes these functions into its class as they are.


def push_to_hub(
    self: "Trainer",
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **kwargs: Any,
) -> str | Future[str | None] | None:
    """Saves the model and pushes `output_dir` with its card. Text that you wrote into the card stays.

    Args:
        commit_message: message of the commit.
        blocking: whether to wait for the push. `False` returns at once after saving.
        token: access token of the Hub; `None` uses `hub_token` or the saved one.
        revision: branch to push to; `None` uses `hub_revision`, or `main`.
        private: whether a new repository is private; `None` uses `hub_private_repo`. An existing one is kept.
        kwargs: options of the card, as of `create_model_card`.

    Returns:
        The URL of the commit; `None` if the push failed, and on processes that do not push. With `blocking=False`
        a `concurrent.futures.Future` of these.

    Raises:
        UserError: if no publisher is set, or an option of the card is not possible.
    """
    publisher = require_publisher(self.publisher)
    options = {"blocking": blocking, "token": token, "revision": revision, "private": private}
    return publisher.push_run(self, commit_message, **options, **kwargs)


def create_model_card(
    self: "Trainer",
    model_name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    **kwargs: Any,
) -> None:
    """Writes the card with what was measured into `output_dir`, and remembers the options for the next push.

    Args:
        model_name: title of the card; `None` means the name of the repository.
        dataset_name: Hub id of the training data, or several.
        tags: tags in addition to those of the card.
        kwargs: `language`, `license` (with `license_name` and `license_link` if it is `other`), `finetuned_from`
            (Hub id of the base), `dataset` (names of the training data), `dataset_tags` (their Hub ids),
            `dataset_args` (their configurations) and `tasks`, as in `transformers.Trainer`.

    Raises:
        UserError: if no publisher is set, or an option is not possible.
    """
    publisher = require_publisher(self.publisher)
    publisher.write_card(self, model_name=model_name, dataset_name=dataset_name, tags=tags, **kwargs)


def push_from_checkpoint(self: "Trainer", checkpoint_folder: str) -> None:
    """Pushes the model of a checkpoint in the background."""
    require_publisher(self.publisher).push_checkpoint(self, checkpoint_folder)


def finish_current_push(self: "Trainer") -> None:
    """Waits for a push that runs in the background."""
    if self.publisher is not None:
        self.publisher.finish()
