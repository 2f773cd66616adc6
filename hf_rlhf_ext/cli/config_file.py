"""Reads and checks the file of `--config FILE.yaml`: one mapping of options to values of the right type."""

from argparse import ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import UserError

if TYPE_CHECKING:
    from argparse import Action

EXPECTED = {"string_to_bool": "true or false", "int": "an integer", "float": "a number"}
"""The type of an option in words, by the name of the function that converts its text."""


def read_config(path: str | Path) -> dict[Any, Any]:
    """Reads a YAML file, which must be one mapping.

    Raises:
        UserError: the file is missing, not text, not YAML, not a mapping, or has a key twice.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(content, Loader=yaml.SafeLoader)
        mapping = yaml.safe_load(content)
    except OSError as error:
        raise UserError(f"{path}: cannot read the config file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the config file is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_position(error)}: not valid YAML: {_problem(error)}") from None
    if not isinstance(mapping, dict):
        raise UserError(f"{path}: must be a mapping of options, such as `learning_rate: 1.0e-4`")

    # Of two equal keys, `safe_load` keeps the last one without a warning. The tree of `compose` has both.
    seen: set[str] = set()
    for key, _ in root.value:
        if key.value in seen:
            raise UserError(f"{path}, line {key.start_mark.line + 1}: `{key.value}` is given twice: keep one")
        seen.add(key.value)
    return mapping


def _position(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return ""
    return f", line {mark.line + 1}, column {mark.column + 1}"


def _problem(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or "cannot be parsed"
    return " ".join(problem.split())


def expected_instead(action: "Action", value: Any) -> str | None:
    """The type that an option needs, in words, if a YAML value has another one; None if it fits.

    This check is needed because TrlParser passes YAML values to argparse as defaults, which argparse does not check.
    """
    if value is None:  # every option accepts null, as in `max_length: null`
        return None
    if action.nargs != "+":
        return _expected_of_one(action, value)
    if not isinstance(value, list):
        return "a list"
    for item in value:
        expected = _expected_of_one(action, item)
        if expected is not None:
            return f"a list whose items are {expected} each"
    return None


def _expected_of_one(action: "Action", value: Any) -> str | None:
    expected = EXPECTED.get(getattr(action.type, "__name__", ""))
    if action.choices:
        expected = "one of " + ", ".join(map(str, action.choices))
    if isinstance(value, (list, dict)):
        return expected  # None for options such as `gradient_checkpointing_kwargs`, which argparse treats as text
    # The same conversion as for a value on the command line.
    converted = value
    if action.type is not None:
        try:
            converted = action.type(str(value))
        except (ValueError, TypeError, ArgumentTypeError):
            return expected or "another type"
    if action.choices and converted not in action.choices:
        return expected
    return None
