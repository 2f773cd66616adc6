"""The error type for a user's mistake. Recipes print its message as one line, without a traceback."""

import functools
from collections.abc import Callable, Mapping


class UserError(ValueError):
    """A mistake in an option, a file or the data that the user passed.

    The message is one line: what is wrong, where (file, row, column or option), and how to fix it. It is a subclass of
    `ValueError`.
    """


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
