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
