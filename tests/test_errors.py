"""Lines of other libraries' exceptions in messages of our own."""

import pytest

from hf_rlhf_ext.errors import first_line, last_line


@pytest.mark.parametrize(
    "error, first, last",
    [
        (ValueError("One thing. "), "One thing", "One thing"),
        (ValueError("\n\n  One thing.\nAnother.\n"), "One thing", "Another"),
        (KeyError("name"), "'name'", "'name'"),
        (NotImplementedError(), "NotImplementedError", "NotImplementedError"),
        (AssertionError("\n"), "AssertionError", "AssertionError"),
    ],
)
def test_lines_of_an_exception(error, first, last):
    assert (first_line(error), last_line(error)) == (first, last)
