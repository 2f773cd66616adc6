"""The one error type for a user's mistake: recipes print its message as one line, without a traceback."""

import functools
from collections.abc import Callable, Mapping


class UserError(ValueError):
    """A mistake in what the user passed in.

    The message is one line: what is wrong, where (file, row, column, option), and how to fix it.
    """


def renamed_options(names: Mapping[str, str]) -> Callable[[type], type]:
    """Class decorator for a dataclass of options: an option under its old name is refused with the new one.

    `names` maps old to new; the class keeps it as `renamed_options`, for the command line.
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
