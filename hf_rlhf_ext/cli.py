"""What the recipes share: options from YAML and the command line, one-line errors, and a safe output folder.

Nothing here imports torch; `parse_recipe` imports TRL's parser when it is called.
"""

import difflib
import json
import logging
import os
import shutil
import sys
import warnings
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .compat import versions
from .errors import UserError

if TYPE_CHECKING:
    from argparse import Action, ArgumentParser

MARKER = "hf_rlhf_ext.json"  # in every folder that `prepare_output_dir` made: only those are ever overwritten

# What other libraries say that nobody who runs a recipe can act on, or that our own error says again: each by its text.
# Only recipes import this module, before those libraries.
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing(_kwargs)?` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", r"Could not find a config file in embedded:", UserWarning)
_NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "datasets.packaged_modules.json.json": "Failed to load JSON from file",
    "datasets.packaged_modules.csv.csv": "Failed to read file",
    "datasets.packaged_modules.parquet.parquet": "Failed to read ",
}
for _logger, _start in _NOISE.items():
    logging.getLogger(_logger).addFilter(lambda record, start=_start: not str(record.msg).startswith(start))


def run_recipe(main: Callable[[], object]) -> None:
    """Runs `main`; a `UserError` becomes one line on stderr and exit status 2, anything else keeps its traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None  # 128 + SIGINT, as shells count


def parse_recipe(
    dataclass_types: type | Iterable[type],
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Fills the dataclasses from `--config FILE.yaml` and the command line, which wins: TRL's `TrlParser`, made strict.

    `argv` defaults to `sys.argv[1:]`; `defaults` replace those of the dataclasses. Returns one instance a dataclass, in
    order. Raises `UserError`, in one line that names the file or option and the nearest known name, for: a config file
    that is missing, unreadable, not YAML, not a mapping or names a key twice; an unknown key or option; a value of the
    wrong type; whatever a dataclass refuses with a `ValueError`. `--help` prints the options and exits.
    """
    from trl import TrlParser

    types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
    epilog = "--config FILE.yaml reads any of these options from a file; the command line wins."
    parser = TrlParser(types, description=description, epilog=epilog)
    parser.error = _raise_user_error  # argparse would print its whole usage, some 150 lines
    parser.set_defaults(**(defaults or {}))
    options, config_path = _split_config(list(sys.argv[1:] if argv is None else argv))
    if {"-h", "--help"} & set(options):
        parser.parse_args(["--help"])  # exits; a config file that is wrong must not keep anyone from the help
    _check_options(parser, options)
    if config_path is not None:
        _check_config(parser, config_path)
    args = options if config_path is None else ["--config", config_path, *options]
    try:
        *parsed, rest = parser.parse_args_and_config(args, return_remaining_strings=True)
    except UserError:
        raise
    except ValueError as error:  # what a dataclass's __post_init__ says, often in several lines
        raise UserError(" ".join(str(error).split())) from None
    if rest:
        hint = f": did you mean `--config {rest[0]}`?" if Path(rest[0]).suffix in {".yaml", ".yml"} else ": see --help"
        raise UserError(f"unexpected argument `{rest[0]}`{hint}")
    return tuple(parsed)


def _raise_user_error(message: str) -> None:
    raise UserError(f"{message} (see --help)")


def _split_config(argv: list[str]) -> tuple[list[str], str | None]:
    """Takes `--config FILE` or `--config=FILE` (which TrlParser would not know) out of `argv`."""
    options: list[str] = []
    path: str | None = None
    items = iter(argv)
    for item in items:
        name, equals, value = item.partition("=")
        if name != "--config":
            options.append(item)
            continue
        if path is not None:
            raise UserError("`--config` is given twice: put everything in one file, or use options for the rest")
        path = value if equals else next(items, "")
        if not path or path.startswith("--"):
            raise UserError("`--config` needs a file: --config path/to/recipe.yaml")
    return options, path


def _check_options(parser: "ArgumentParser", options: list[str]) -> None:
    """Refuses unknown options, and abbreviations with them: `--learning` must not quietly set learning_rate."""
    known = {name for action in parser._actions for name in action.option_strings}
    for option in options:
        name = option.partition("=")[0]
        if option.startswith("--") and name not in known:
            raise UserError(f"unknown option `{name}`{_did_you_mean(name, known)}")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f": did you mean `{near[0]}`?" if near else ": see --help for all"


def _check_config(parser: "ArgumentParser", path: str) -> None:
    """Refuses what TrlParser would take silently or report without the file: see `parse_recipe`."""
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    for key, value in _read_yaml_mapping(path).items():
        if key == "env":  # TrlParser's own: environment variables to set
            continue
        if key not in actions:
            raise UserError(f"{path}: unknown key `{key}`{_did_you_mean(str(key), actions)}")
        expected = _mismatch(actions[key], value)
        if expected:
            raise UserError(f"{path}: `{key}` needs {expected}, got {value!r}")


def _read_yaml_mapping(path: str) -> dict[Any, Any]:
    """Reads a YAML file that must be one mapping with distinct keys."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        mapping = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: cannot read the config file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the config file is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"{path}{where}: not valid YAML: {' '.join(problem.split())}") from None
    if not isinstance(mapping, dict):
        raise UserError(f"{path}: must be a mapping of options, such as `learning_rate: 1.0e-4`")
    seen: set[str] = set()
    for key, _ in root.value:  # safe_load keeps the last of two equal keys without a word
        if key.value in seen:
            raise UserError(f"{path}, line {key.start_mark.line + 1}: `{key.value}` is given twice: keep one")
        seen.add(key.value)
    return mapping


def _mismatch(action: "Action", value: Any) -> str | None:
    """What `action` needs, when a YAML `value` is not that; None when it fits.

    argparse converts only text defaults and checks no choices on defaults, so TrlParser passes the rest on as it is.
    """
    if value is None:
        return None
    if action.nargs == "+":
        if not isinstance(value, list):
            return "a list"
        bad = [item for item in value if _mismatch_one(action, item)]
        return f"a list whose items are {_mismatch_one(action, bad[0])} each" if bad else None
    return _mismatch_one(action, value)


def _mismatch_one(action: "Action", value: Any) -> str | None:
    names = {"string_to_bool": "true or false", "int": "an integer", "float": "a number"}
    expected = names.get(getattr(action.type, "__name__", ""))
    if action.choices:
        expected = "one of " + ", ".join(map(str, action.choices))
    if isinstance(value, (list, dict)):  # fields such as `gradient_checkpointing_kwargs` are text to argparse
        return expected
    try:
        converted = action.type(str(value)) if action.type else value
    except (ValueError, TypeError, ArgumentTypeError):
        return expected or "another type"
    return expected if action.choices and converted not in action.choices else None


def prepare_output_dir(output_dir: str | Path, *, resume: bool | str | None, overwrite: bool) -> None:
    """Makes `output_dir` and leaves a marker file (versions, no paths) in it, or refuses in one line.

    A folder with anything but the marker in it is refused unless `resume` (it is left as it is) or `overwrite` (it is
    emptied, but only if it carries the marker: never delete what we did not make). Call it on every process: only the
    one of rank 0 does anything.
    """
    if os.environ.get("RANK", "0") != "0":  # set by torchrun and accelerate
        return
    folder = Path(output_dir)
    resume = bool(resume) and str(resume).lower() != "false"  # the command line hands text on
    if resume and overwrite:
        raise UserError("resume and overwrite contradict each other: pass one of them")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: pass another --output_dir")
    content = [item for item in folder.iterdir() if item.name != MARKER] if folder.exists() else []
    if content and resume:
        return  # no marker: someone else may have made it
    if content and not overwrite:
        raise UserError(
            f"{folder} is not empty: pass --resume_from_checkpoint true to go on, or --overwrite true to start afresh"
        )
    if content and not (folder / MARKER).is_file():
        raise UserError(f"{folder} was not made by hf_rlhf_ext (no {MARKER}): remove it yourself, or pass another one")
    for item in content:  # the marker stays until the end, so that an interrupted removal can be repeated
        shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(json.dumps({"made_by": "hf_rlhf_ext", "versions": versions()}, indent=2) + "\n")
