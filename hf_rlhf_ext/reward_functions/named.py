"""The reward functions of this package by short names with arguments, as options and YAML files give them.

A name is written as a call, `exact_match(column=answer, ignore_case=true)`, or in YAML also as a mapping,
`{exact_match: {column: answer}}`. Values are those of YAML: text needs quotes only around `,`, `(` and the like.
"""

import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import yaml

from ..errors import UserError, first_line

FACTORIES: Mapping[str, str] = {
    "regex": "verifiable",
    "exact_match": "verifiable",
    "multiple_choice": "verifiable",
    "number": "verifiable",
    "think_format": "verifiable",
    "repetition_penalty": "trl_rewards",
    "math": "math_answers",
    "code": "code_tests",
    "judge": "model_judge",
}
"""Short name of each function, and the module of this package with the factory of that name."""
NOT_PUBLIC = ("base_url", "cache", "api_key_env")
"""Arguments that say something of a user's machines."""
CALL = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", re.DOTALL)
OPENING, CLOSING = "([{", ")]}"


def is_call(text: str) -> bool:
    """Whether a text is written as a call, such as `exact_match(column=answer)`. Neither paths nor modules are."""
    found = CALL.fullmatch(text)
    return found is not None and found[2] is not None


def built_in(text: str, option: str) -> Callable | None:
    """The function of this package that a text names; `None` if it names none and is no call.

    Args:
        text: a short name, alone or with arguments.
        option: name of the option, for messages.

    Raises:
        UserError: there is no such function, or an argument is unknown, missing or wrong.
    """
    found = CALL.fullmatch(text)
    if found is None or (found[2] is None and found[1] not in FACTORIES):
        return None
    name, inside = found[1], found[2] or ""
    if name not in FACTORIES:
        raise UserError(
            f"{option}: no built-in reward function {name!r}{similar(name)}: there are {', '.join(FACTORIES)}. A "
            "function of your own takes no arguments here: give path/to/file.py:function."
        )
    factory = getattr(import_module(f".{FACTORIES[name]}", __package__), name)
    try:
        function = factory(**_arguments(name, inside, factory))
    except UserError as error:
        raise UserError(f"{option}: {error}") from error
    function.call_text = " ".join(text.split())
    return function


def public_text(call_text: str) -> str:
    """A call as a model card may show it: without addresses of servers."""
    found = CALL.fullmatch(call_text)
    if found is None or found[2] is None:
        return call_text
    shown = [part for part in split(found[2]) if part.partition("=")[0].strip() not in NOT_PUBLIC]
    return f"{found[1]}({', '.join(shown)})"


def similar(name: str) -> str:
    """`, did you mean …?` for a name that is nearly one of the short names; else empty."""
    nearest = difflib.get_close_matches(name, FACTORIES, n=1)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


def texts_of(given: Any, option: str) -> list[str]:
    """The names of reward functions that a YAML file or an option has, mappings written as calls.

    Args:
        given: a text, a mapping, or a list of these. A text with commas has several names: `a.py:f,number(column=x)`.
        option: name of the option, for messages.

    Raises:
        UserError: an entry is neither a text nor a mapping with one name.
    """
    if given is None:
        return []
    if isinstance(given, str):
        return split(given)
    entries = given if isinstance(given, list | tuple) else [given]
    return [entry if isinstance(entry, str) else _text_of_mapping(entry, option) for entry in entries]


def split(text: str) -> list[str]:
    """The parts of a text between commas, without those in brackets and quotes. Empty parts are left out.

    Raises:
        UserError: a bracket or a quote is not closed.
    """
    parts = [""]
    depth = 0
    quote = ""
    is_escaped = False
    for character in text:
        if quote:
            if character == quote and not is_escaped:
                quote = ""
            is_escaped = quote == '"' and character == "\\" and not is_escaped
        elif character in "\"'" and not parts[-1][-1:].isalnum():  # the apostrophe of `don't` opens nothing
            quote = character
        elif character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth -= 1
        elif character == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += character
    if quote or depth:
        raise UserError(f"{text!r}: brackets or quotes do not match: put text with such signs into quotes.")
    return [part.strip() for part in parts if part.strip()]


# --- arguments -------------------------------------------------------------------------------------------------------


def _text_of_mapping(entry: Any, option: str) -> str:
    if not isinstance(entry, Mapping) or len(entry) != 1 or not isinstance(next(iter(entry)), str):
        raise UserError(
            f"{option}: {entry!r} names no reward function: write `exact_match(column=answer)` or "
            "`exact_match: {column: answer}`."
        )
    ((name, arguments),) = entry.items()
    if arguments is None:
        return name
    if not isinstance(arguments, Mapping):
        raise UserError(f"{option}: {name} has {arguments!r}: give its arguments by name, as in {{column: answer}}.")
    written = [f"{key}={_written(value)}" for key, value in arguments.items()]
    return f"{name}({', '.join(written)})"


def _written(value: Any) -> str:
    """A value as YAML on one line. Text that has more than letters is in quotes, which keep commas and line ends."""
    options = {"default_flow_style": True, "width": float("inf"), "allow_unicode": True}
    if isinstance(value, str) and not value.isidentifier():
        options["default_style"] = '"'
    return yaml.safe_dump(value, **options).removesuffix("...\n").strip()


def _arguments(name: str, inside: str, factory: Callable) -> dict[str, Any]:
    """The arguments of a call, converted to the types of the factory's parameters."""
    parameters = inspect.signature(factory).parameters
    annotations = typing.get_type_hints(factory)
    arguments: dict[str, Any] = {}
    for part in split(inside):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            first = next(iter(parameters), None)
            example = f", as in {name}({first}={part})" if first else ", as it takes none"
            raise UserError(f"{name}: {part!r} has no name: write name=value{example}.")
        if key not in parameters:
            nearest = difflib.get_close_matches(key, parameters, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"it takes {', '.join(parameters) or 'none'}."
            raise UserError(f"{name}: unknown argument {key!r}: {hint}")
        if key in arguments:
            raise UserError(f"{name}: {key} is given twice: give it once.")
        arguments[key] = _converted(value.strip(), annotations.get(key, str), f"{name}: {key}")
    missing = [key for key, value in parameters.items() if value.default is value.empty and key not in arguments]
    if missing:
        raise UserError(f"{name}: {missing[0]} is missing: write {name}({missing[0]}=…).")
    return arguments


def _converted(text: str, annotation: Any, where: str) -> Any:
    """The value of an argument."""
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    is_quoted = text[:1] in ("'", '"')
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        value = text
        if is_quoted:
            hint = "use single quotes, in which a backslash stands for itself" if "\\" in text else "correct the quotes"
            raise UserError(f"{where}={text}: {first_line(error)}: {hint}.") from None
    if text in ("null", "none", "None") and type(None) in kinds:
        return None
    if str in kinds:
        # Without quotes a text is as it stands: `no`, `[0-9]+` and `#### 7` are texts, whatever YAML reads there.
        return value if is_quoted else text
    if bool in kinds and isinstance(value, bool):
        return value
    if isinstance(value, str):  # as YAML reads 1e-3
        try:
            value = float(value)
        except ValueError:
            pass
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and float in kinds:
        return float(value)
    if is_number and int in kinds and value == int(value):
        return int(value)
    needed = "true or false" if bool in kinds else "a whole number" if int in kinds else "a number"
    raise UserError(f"{where}={text}: needs {needed}.")
