"""Options of a recipe from YAML and the command line, and errors in one line.

Nothing here imports torch; `parse_recipe` imports TRL's parser when it is called.
"""

import contextlib
import difflib
import logging
import os
import sys
import warnings
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .config_file import expected_instead, read_config
from .program import program_name
from .requirements import install_command
from .shipped import find_config

if TYPE_CHECKING:
    from argparse import Action, ArgumentParser


# What other libraries say that nobody who runs a recipe can act on, or that our own error says again: each by its text.
# Only recipes and the command line import this module, before those libraries.
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

LAUNCH_OPTIONS = ("num_processes", "accelerate_config")
"""Options of `hf-rlhf sft`, `reward` and `ppo` that start several processes; the recipes themselves have neither."""

EPILOG = """\
--config FILE.yaml reads any of these options from a file; the command line wins. FILE is a path, or the name of a file
that comes with the package, such as qwen2.5-1.5b/ppo.yaml."""


EPILOG_FOR_TRAINING = """
Started by `hf-rlhf`, it also takes --num_processes N, and --accelerate_config FILE or NAME (multi_gpu, …), which
start several processes through accelerate."""

VALUES = {"string_to_bool": "true|false", "int": "INTEGER", "float": "NUMBER", "str": "TEXT"}
"""What `--help` shows for the value of an option, by the name of the function that converts it."""


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the default of every option, its choices or kind of value, and the recipe's docstring as it is written."""

    def _format_action_invocation(self, action: "Action") -> str:
        if action.option_strings[:1] == ["-h"]:
            return super()._format_action_invocation(action)
        # The same name with hyphens is taken too, but would show everything twice.
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {value}"

    def _get_default_metavar_for_optional(self, action: "Action") -> str:
        return VALUES.get(getattr(action.type, "__name__", ""), "VALUE")


def run_recipe(main: Callable[[], object]) -> None:
    """Runs `main`; a `UserError` becomes one line on stderr and exit status 2.

    So does a package that is missing, with the command that installs it. Anything else keeps its traceback.
    """
    try:
        with _stdout_of_the_first_process():
            main()
    except UserError as error:
        print(f"{_error_word()}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        command = install_command(error.name)
        if command is None:  # a bug, not a package that we know of
            raise
        print(f"{_error_word()}: {error.name} is not installed: {command}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None  # 128 + SIGINT, as shells count
    except BrokenPipeError:  # `hf-rlhf env | head -1`: whoever read the output has read enough
        # Python flushes stdout once more when it ends, and would fail there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # 128 + SIGPIPE


def _rank() -> str:
    """The number of this process among several, as torchrun and accelerate set it."""
    return os.environ.get("RANK", "0")


@contextlib.contextmanager
def _stdout_of_the_first_process() -> Iterator[None]:
    """Leaves stdout to the first of several processes: the others would say the same again."""
    if _rank() == "0":
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _error_word() -> str:
    """`error`, with the number of the process where it is not the first of several."""
    rank = _rank()
    return "error" if rank == "0" else f"error (process {rank})"


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
    that is missing, unreadable, not YAML, not a mapping or names a key twice; an unknown key or option; one under its
    old name (a dataclass's `renamed_options`); a value of the wrong type; whatever a dataclass refuses with a
    `ValueError`. `--help` prints the options and exits.
    """
    from trl import TrlParser

    types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
    parser = TrlParser(
        types,
        prog=program_name(),
        usage="%(prog)s [--config FILE.yaml] [options]",  # argparse's own would be some 150 lines
        description=description,
        epilog=_epilog(types),
        formatter_class=HelpFormatter,
    )
    for action in parser._actions:
        if action.option_strings[0] == f"--no_{action.dest}":
            action.help = (
                SUPPRESS  # `--use_peft false` is enough, and what `--no_use_peft` says of its default is wrong
            )
    parser.error = _raise_user_error  # argparse would print its whole usage, some 150 lines
    parser.set_defaults(**(defaults or {}))

    if argv is None:
        argv = sys.argv[1:]
    options, config_name = _split_config(argv)
    if "-h" in options or "--help" in options:
        parser.parse_args(["--help"])  # exits; a config file that is wrong must not keep anyone from the help

    # Checked before TrlParser sees them: it would guess abbreviations and pass unknown keys on.
    renamed = _renamed_options(types)
    _check_options(parser, options, renamed)
    words = options
    if config_name is not None:
        config = str(find_config(config_name))
        _check_config(parser, config, renamed)
        words = ["--config", config, *options]
    try:
        *parsed, rest = parser.parse_args_and_config(words, return_remaining_strings=True)
    except UserError:
        raise
    except ValueError as error:  # what a dataclass's __post_init__ says, often in several lines
        raise UserError(" ".join(str(error).split())) from None
    if rest:
        raise UserError(f"unexpected argument `{rest[0]}`{_hint_for_stray(rest[0])}")
    return tuple(parsed)


def _epilog(types: Iterable[type]) -> str:
    trains = any(hasattr(dataclass_type, "per_device_train_batch_size") for dataclass_type in types)
    return EPILOG + EPILOG_FOR_TRAINING if trains else EPILOG


def _raise_user_error(message: str) -> None:
    raise UserError(f"{message} (see --help)")


def _hint_for_stray(word: str) -> str:
    if Path(word).suffix in {".yaml", ".yml"}:
        return f": did you mean `--config {word}`?"
    return ": see --help"


def _split_config(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Takes `--config FILE` or `--config=FILE` (which TrlParser would not know) out of `argv`."""
    options: list[str] = []
    config_name: str | None = None
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            options.append(word)
            continue
        if config_name is not None:
            raise UserError("`--config` is given twice: put everything in one file, or use options for the rest")
        if not equals:
            value = next(words, "")
        if not value or value.startswith("--"):
            raise UserError("`--config` needs a file: --config path/to/recipe.yaml")
        config_name = value
    return options, config_name


def _renamed_options(types: Iterable[type]) -> dict[str, str]:
    """Old name -> new name of the options of all dataclasses."""
    renamed: dict[str, str] = {}
    for dataclass_type in types:
        renamed.update(getattr(dataclass_type, "renamed_options", {}))
    return renamed


def _check_options(parser: "ArgumentParser", words: list[str], renamed: Mapping[str, str]) -> None:
    """Refuses unknown options, and abbreviations with them: `--learning` must not quietly set learning_rate."""
    known = {name for action in parser._actions for name in action.option_strings}
    for word in words:
        if not word.startswith("--"):
            continue
        option = word.partition("=")[0]
        if option in known:
            continue
        name = option.removeprefix("--").replace("-", "_")
        if name in renamed:
            raise UserError(f"`{option}` has a new name: use `--{renamed[name]}`")
        if name in LAUNCH_OPTIONS:
            raise UserError(f"`{option}` starts several processes: use it with `hf-rlhf sft`, `reward` or `ppo`")
        raise UserError(f"unknown option `{option}`{did_you_mean(option, known)}")


def _check_config(parser: "ArgumentParser", path: str, renamed: Mapping[str, str]) -> None:
    """Refuses what TrlParser would take silently or report without the file: see `parse_recipe`."""
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    for key, value in read_config(path).items():
        if key == "env":  # TrlParser's own: environment variables to set
            continue
        if key in renamed:
            raise UserError(f"{path}: `{key}` has a new name: use `{renamed[key]}`")
        if key in LAUNCH_OPTIONS:
            raise UserError(f"{path}: `{key}` belongs on the command line: hf-rlhf ppo --{key} {value} --config {path}")
        if key not in actions:
            raise UserError(f"{path}: unknown key `{key}`{did_you_mean(str(key), actions)}")
        expected = expected_instead(actions[key], value)
        if expected is not None:
            raise UserError(f"{path}: `{key}` needs {expected}, got {value!r}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a line about an unknown name: the nearest known one."""
    nearest = difflib.get_close_matches(name, sorted(known), n=1)
    if not nearest:
        return ": see --help for all"
    return f": did you mean `{nearest[0]}`?"
