"""The protocol through which a trainer pushes to the Hub.

`hub.publisher` implements the protocol, and the package's `__init__.py` connects the two. The trainers therefore import
no code for cards, scanning or pushing.
"""

from collections.abc import Callable
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

    def push_run(self, trainer: "Trainer", message: str | None = None, **options: Any) -> str | None:
        """Pushes the saved run with its card.

        Returns:
            The URL of the commit; `None` if the push failed, and on processes that do not push.
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
