"""Reads the options of a recipe from YAML and the command line, and prints errors in one line.

Importing this module does not load torch: `parse_recipe` imports TRL's parser when it is called.
"""

import contextlib
import difflib
import os
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, refuse_words
from . import quiet  # noqa: F401  # hides messages of libraries that are imported later
from .config_file import expected_instead, read_config
from .program import program_name
from .requirements import install_command
from .shipped import find_config

if TYPE_CHECKING:
    from argparse import Action, ArgumentParser

LAUNCH_OPTIONS = ("num_processes", "accelerate_config")
"""Options of `hf-rlhf sft`, `reward` and `ppo` that start several processes. The recipes' own parsers have neither."""

EPILOG = """\
--config FILE.yaml reads these options from a file. Options on the command line override the file. FILE is a path, or
the name of a file that comes with the package, such as qwen2.5-1.5b/ppo.yaml."""


EPILOG_FOR_TRAINING = """
The command `hf-rlhf` also takes --num_processes N and --accelerate_config FILE or NAME (multi_gpu, …), which start
several processes with accelerate."""

VALUES = {"string_to_bool": "true|false", "int": "INTEGER", "float": "NUMBER", "str": "TEXT"}
"""What `--help` shows as the value of an option, by the name of the function that converts it."""


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the default and the kind of value of every option, and keeps the line breaks of the description."""

    def _format_action_invocation(self, action: "Action") -> str:
        if action.option_strings[:1] == ["-h"]:
            return super()._format_action_invocation(action)
        # Names with hyphens work too, but would show every option twice.
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {value}"

    def _get_default_metavar_for_optional(self, action: "Action") -> str:
        return VALUES.get(getattr(action.type, "__name__", ""), "VALUE")


def run_recipe(main: Callable[[], object]) -> None:
    """Runs `main`. A `UserError` is printed in one line on stderr, with exit status 2.

    So is a missing package, with the command that installs it. Other errors keep their traceback.
    """
    try:
        with _stdout_of_the_first_process(), _bars_closed_on_errors():
            main()
    except UserError as error:
        print(f"{_error_word()}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        command = install_command(error.name)
        if command is None:  # not a package that this library needs: a bug
            raise
        print(f"{_error_word()}: {error.name} is not installed: {command}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None  # 128 + SIGINT, as shells count
    except BrokenPipeError:  # `hf-rlhf env | head -1`: nobody reads the rest
        # Python flushes stdout when it ends, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # 128 + SIGPIPE


def _rank() -> str:
    """The number of this process, as torchrun and accelerate set it."""
    return os.environ.get("RANK", "0")


@contextlib.contextmanager
def _stdout_of_the_first_process() -> Iterator[None]:
    """Lets only the first of several processes print to stdout: the others would print the same."""
    if _rank() == "0":
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def _bars_closed_on_errors() -> Iterator[None]:
    """Closes progress bars that an error leaves open, so that its message is on a line of its own."""
    try:
        yield
    except BaseException:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
        raise


def _error_word() -> str:
    """`error`, with the number of the process if it is not the first one."""
    rank = _rank()
    return "error" if rank == "0" else f"error (process {rank})"


def parse_recipe(
    dataclass_types: type | Iterable[type],
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Fills dataclasses of options from `--config FILE.yaml` and from the command line, which overrides the file.

    It uses TRL's `TrlParser` with stricter checks. `--help` prints the options and exits.

    Args:
        argv: words of the command line; default is `sys.argv[1:]`.
        description: text of `--help` above the options.
        defaults: replace the defaults of the dataclasses.

    Returns:
        One instance per dataclass, in their order.

    Raises:
        UserError: the config file is missing, not readable, not YAML, not a mapping, or has a key twice; a key or
            option is unknown or has a new name (`renamed_options` of a dataclass); a value has the wrong type; or a
            dataclass raised a `ValueError`. The line names the file or option, and the most similar known name.
    """
    from trl import TrlParser

    types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
    parser = TrlParser(
        types,
        prog=program_name(),
        usage="%(prog)s [--config FILE.yaml] [options]",  # argparse's own has about 150 lines
        description=description,
        epilog=_epilog(types),
        formatter_class=HelpFormatter,
    )
    for action in parser._actions:
        if action.option_strings[0] == f"--no_{action.dest}":
            # `--use_peft false` is enough, and the help of `--no_use_peft` shows a wrong default.
            action.help = SUPPRESS
    parser.error = refuse_words  # argparse would also print its usage
    parser.set_defaults(**(defaults or {}))

    if argv is None:
        argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        raise UserError(f"unexpected argument `{argv[0]}`{_hint_for_stray(argv[0], parser)}")
    options, config_name = _split_config(argv)
    if "-h" in options or "--help" in options:
        parser.parse_args(["--help"])  # exits; the help is shown even if the config file has a mistake

    # Checked first, because TrlParser accepts abbreviations and returns unknown keys.
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
    except (ValueError, TypeError, KeyError, ImportError, OSError, RuntimeError) as error:
        # From a dataclass's __post_init__, often in several lines.
        raise UserError(" ".join(str(error).split())) from None
    if rest:
        raise UserError(f"unexpected argument `{rest[0]}`{_hint_for_stray(rest[0], parser)}")
    return tuple(parsed)


def _epilog(types: Iterable[type]) -> str:
    trains = any(hasattr(dataclass_type, "per_device_train_batch_size") for dataclass_type in types)
    return EPILOG + EPILOG_FOR_TRAINING if trains else EPILOG


def _hint_for_stray(word: str, parser: "ArgumentParser") -> str:
    if Path(word).suffix in {".yaml", ".yml"}:
        return f": did you mean `--config {word}`?"
    reads_data = any(action.dest == "dataset_name" for action in parser._actions)
    if reads_data and (Path(word).suffix in {".json", ".jsonl", ".csv", ".parquet", ".gz"} or "/" in word):
        return f": did you mean `--dataset_name {word}`?"
    return ": see --help"


def _split_config(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Separates `--config FILE` or `--config=FILE` from the other words. TrlParser does not know the second form."""
    options: list[str] = []
    config_name: str | None = None
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            options.append(word)
            continue
        if config_name is not None:
            raise UserError("`--config` is given twice: use one file, and options for the rest")
        if not equals:
            value = next(words, "")
        if not value or value.startswith("--"):
            raise UserError("`--config` needs a file: --config path/to/recipe.yaml")
        config_name = value
    return options, config_name


def _renamed_options(types: Iterable[type]) -> dict[str, str]:
    """New names of renamed options by their old names, of all dataclasses."""
    renamed: dict[str, str] = {}
    for dataclass_type in types:
        renamed.update(getattr(dataclass_type, "renamed_options", {}))
    return renamed


def _check_options(parser: "ArgumentParser", words: list[str], renamed: Mapping[str, str]) -> None:
    """Raises for unknown options and for abbreviations: `--learning` must not set learning_rate."""
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
    """Raises for keys and values that TrlParser would accept, or report without naming the file."""
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    for key, value in read_config(path).items():
        if key == "env":  # a key of TrlParser: environment variables to set
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
    """The end of a message about an unknown name: the most similar known name."""
    nearest = difflib.get_close_matches(name, sorted(known), n=1)
    if not nearest:
        return ": see --help for all"
    return f": did you mean `{nearest[0]}`?"
