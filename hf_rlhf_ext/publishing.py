"""How a trainer reaches the Hub without knowing it: the protocol, and who implements it.

`hub.publisher` implements it; the package's root wires the two, as every user imports the trainers from there. The core
imports nothing of the Hub's cards, scanner or pushes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import UserError

if TYPE_CHECKING:
    from transformers import Trainer


class Publisher(Protocol):
    """What a trainer asks for when `push_to_hub=True`. One publisher belongs to one trainer."""

    def check_access(self, trainer: "Trainer", *, token: str | None = None, private: bool | None = None) -> str | None:
        """Checks the token and makes the repository, before training.

        Returns:
            The repository's full id, on the process that pushes; None on the others.

        Raises:
            UserError: no right to write there, or an option that would publish pickles.
        """
        ...

    def push_checkpoint(self, trainer: "Trainer", folder: str | Path) -> None:
        """Pushes the model of a checkpoint, in the background. Never raises: training goes on."""
        ...

    def push_run(self, trainer: "Trainer", message: str | None = None, **options: Any) -> str | None:
        """Pushes the saved run with its card; returns the commit's URL, None where it failed or on another process."""
        ...

    def finish(self) -> None:
        """Waits for a push in the background."""
        ...


_factory: Callable[[], Publisher] | None = None


def set_publisher(factory: Callable[[], Publisher] | None) -> None:
    """Sets what makes the publisher of every trainer that is built from now on; None: there is none."""
    global _factory
    _factory = factory


def new_publisher() -> Publisher | None:
    """A publisher for one trainer, None where none is set."""
    return None if _factory is None else _factory()


def require_publisher(publisher: Publisher | None) -> Publisher:
    """The publisher; raises `UserError` where a trainer that has none is asked to push."""
    if publisher is None:
        raise UserError(
            "push_to_hub: no publisher is set (publishing.set_publisher): leave push_to_hub off, and run "
            "`hf-rlhf push OUTPUT_DIR` afterwards."
        )
    return publisher
