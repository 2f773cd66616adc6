"""The error type for a user's mistake. Recipes print its message as one line, without a traceback."""

import functools
from collections.abc import Callable, Mapping
from typing import NoReturn


class UserError(ValueError):
    """A mistake in an option, a file or the data that the user passed.

    The message is one line: what is wrong, where (file, row, column or option), and how to fix it. It is a subclass of
    `ValueError`.
    """


def first_line(error: BaseException) -> str:
    """The first line of the message of an exception, for a message of our own, without its final period.

    Args:
        error: the exception. Of one without a message, the name of its type is returned.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(". ")


def last_line(error: BaseException) -> str:
    """The last line, as `first_line`: PyTorch names there what does not fit."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip().rstrip(". ")


def refuse_words(message: str) -> NoReturn:
    """The `error` of an `argparse` parser, which reports a mistake on the command line in one line, without its usage.

    Raises:
        UserError: always.
    """
    raise UserError(f"{message} (see --help)")


def renamed_options(names: Mapping[str, str]) -> Callable[[type], type]:
    """Class decorator for a dataclass of options that refuses old option names and names the new ones.

    Args:
        names: maps each old name to the new one. The class keeps it as `renamed_options`, for the command line.

    Returns:
        The decorator. The decorated class raises `UserError` when it is built with an old name.
    """

    def decorate(cls: type) -> type:
        plain_init = cls.__init__

        @functools.wraps(plain_init)
        def checked_init(self, *args, **kwargs):
            for old, new in names.items():
                if old in kwargs:
                    raise UserError(f"{old} is called {new} now: rename the option.")
            plain_init(self, *args, **kwargs)

        cls.__init__ = checked_init
        cls.renamed_options = dict(names)
        return cls

    return decorate
