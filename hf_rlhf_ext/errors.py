"""The one error type for a user's mistake: recipes print its message as one line, without a traceback."""


class UserError(ValueError):
    """A mistake in what the user passed in.

    The message is one line: what is wrong, where (file, row, column, option), and how to mend it.
    """
