"""Reads and checks the file of `--config FILE.yaml`, and says what value an option needs, in the file and as typed."""

import difflib
import re
from argparse import ArgumentError, ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import UserError

if TYPE_CHECKING:
    from argparse import Action, ArgumentParser

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
        return expected  # None for options such as `activation_checkpointing_kwargs`, which argparse treats as text
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


def string_to_bool(text: str | bool) -> bool:
    """The value of a switch. As in TRL's parser it may be yes, true, t, y, 1 and their opposites; on and off too.

    Raises:
        ArgumentTypeError: it is none of them.
    """
    if isinstance(text, bool):
        return text
    if text.lower() in ("yes", "true", "t", "y", "1", "on"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0", "off"):
        return False
    raise ArgumentTypeError(f"invalid value: {text!r}")


def problem_of_value(error: ArgumentError, parser: "ArgumentParser") -> str:
    """What argparse found wrong with the value of an option, as one line that names the values it takes."""
    action = next((one for one in parser._actions if "/".join(one.option_strings) == error.argument_name), None)
    if action is None:
        return f"{error} (see --help)"
    needed = EXPECTED.get(getattr(action.type, "__name__", ""), "a value")
    if action.choices:
        needed = "one of " + ", ".join(map(str, action.choices))
    line = f"`{action.option_strings[0]}` needs {needed}"
    given = re.search(r"(?:value|choice): (.*?)(?: \(choose from .*\))?$", error.message)
    if given is None:  # there is no value
        return f"{line}, and has none"
    nearest = difflib.get_close_matches(given[1].strip("'"), [str(choice) for choice in action.choices or ()], n=1)
    return f"{line}, got {given[1]}" + "".join(f": did you mean {name}?" for name in nearest)
