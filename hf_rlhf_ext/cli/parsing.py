"""Reads the options of a recipe from YAML and the command line, and prints errors in one line.

Importing this module does not load torch: `parse_recipe` imports TRL's parser when it is called.
"""

import contextlib
import difflib
import os
import sys
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compat import RENAMED_OPTIONS
from ..errors import UserError, first_line, refuse_words
from . import (
    processes,
    quiet,  # noqa: F401  # hides messages of libraries that are imported later
)
from .config_file import expected_instead, problem_of_value, read_config, string_to_bool
from .help import HelpFormatter, help_text, wants_help
from .program import program_name
from .requirements import install_command
from .shipped import find_config
from .stopping import line_of, number_of, release_folders, sigterm_as_ctrl_c

if TYPE_CHECKING:
    from argparse import ArgumentParser

LAUNCH_OPTIONS = ("num_processes", "accelerate_config")
"""Options of `hf-rlhf sft`, `reward` and `ppo` that start several processes. The recipes' own parsers have neither."""

_DATA_SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".gz"}
_MODEL_FILES = ("config.json", "adapter_config.json", "reward_normalization.json")

EPILOG = """\
--config FILE.yaml reads these options from a file. Options on the command line override the file."""

EPILOG_FOR_TRAINING = """
FILE is a path, or the name of a file that comes with the package, such as qwen2.5-1.5b/ppo.yaml.
The command `hf-rlhf` also takes --num_processes N and --accelerate_config FILE or NAME (ddp, fsdp2, …), which start
several processes with accelerate."""


def run_recipe(main: Callable[[], object]) -> None:
    """Runs `main`. A `UserError` is printed in one line on stderr, with exit status 2.

    So is a missing package, with the command that installs it, and memory that runs out. Ctrl-C and SIGTERM end with
    exit status 130 and 143, and a line on what is kept. Other errors keep their traceback. Of several processes, those
    that end because another one has failed say nothing.
    """
    try:
        with _output_of_the_first_process(), _bars_closed_on_errors(), sigterm_as_ctrl_c():
            main()
    except UserError as error:
        processes.say(f"error: {error}")
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        command = install_command(error.name)
        if command is None:  # not a package that this library needs: a bug
            raise
        processes.say(f"error: {error.name} is not installed: {command}")
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        # The launcher sends SIGTERM to all others when one has failed.
        if processes.is_first() and not processes.has_another_failed():
            print(line_of(stop), file=sys.stderr)
        raise SystemExit(128 + number_of(stop)) from None  # as shells count
    except BrokenPipeError:  # `hf-rlhf env | head -1`: nobody reads the rest
        # Python flushes stdout when it ends, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # 128 + SIGPIPE
    except Exception as error:
        _explain_in_one_line(error)
        raise
    finally:
        release_folders()


def _explain_in_one_line(error: Exception) -> None:
    """Ends the process with a line for an error whose traceback tells a user nothing; other errors are recorded.

    Raises:
        SystemExit: in this case.
    """
    if is_out_of_memory(error):
        processes.say(
            f"error: out of memory ({first_line(error)}): lower per_device_train_batch_size and raise "
            "gradient_accumulation_steps, set activation_checkpointing, or set max_tokens_per_batch or auto_batch "
            "(reward and ppo)."
        )
        raise SystemExit(2) from None
    if processes.is_echo(error):
        if not processes.has_another_failed():
            processes.say(f"error: the connection to another process is lost, which has ended ({first_line(error)})")
        raise SystemExit(1) from None
    line = f"{type(error).__name__}: {error}"
    processes.record(line)
    if processes.is_said_by_first(line):  # with its traceback
        raise SystemExit(1) from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory of a device or of the machine has run out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch need not be loaded here
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextlib.contextmanager
def _output_of_the_first_process() -> Iterator[None]:
    """Lets only the first of several processes print: the others would print the same."""
    if processes.is_first():
        processes.say_if_alone()
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
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


def parse_recipe(
    dataclass_types: type | Iterable[type],
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    main_options: Mapping[str, Mapping[str, str]] | Sequence[str] = (),
    usage: str = "[--config FILE.yaml] [options]",
) -> tuple[Any, ...]:
    """Fills dataclasses of options from `--config FILE.yaml` and from the command line, which overrides the file.

    It uses TRL's `TrlParser` with stricter checks. `--help` and `--help-all` print the options and exit.

    A dataclass may have `unused_options`, which maps names of options without effect to the reasons, and
    `refused_options`, whose values the dataclass refuses itself. Neither is listed in the help.

    Args:
        argv: words of the command line; default is `sys.argv[1:]`.
        description: text of `--help` above the options.
        defaults: replace the defaults of the dataclasses.
        main_options: the options that `--help` shows, in groups with texts of their own (see
            `hf_rlhf_ext.cli.main_options`), or names alone; `--help-all` shows the rest. Default is all of them.
        usage: first line of the help, after the name of the command.

    Returns:
        One instance per dataclass, in their order.

    Raises:
        UserError: the config file is missing, not readable, not YAML, not a mapping, or has a key twice; a key or
            option is unknown, has a new name (`renamed_options` of a dataclass) or has no effect; a value is missing or
            has the wrong type; or a dataclass raised a `ValueError`. The line names the file or option, and the most
            similar known name.
    """
    types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
    parser = _parser_of(types, description, usage)
    parser.set_defaults(**(defaults or {}))

    if argv is None:
        argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        raise UserError(f"unexpected argument `{argv[0]}`{_hint_for_stray(argv[0], parser)}")
    options, config_name = _split_config(argv)
    options = _with_new_names(options, parser)
    if wants_help(options):  # the help is shown even if the config file has a mistake
        print(help_text(parser, options, main_options), end="")
        raise SystemExit(0)

    # Checked first, because TrlParser accepts abbreviations and returns unknown keys.
    renamed, unused = _names_of(types, "renamed_options"), _names_of(types, "unused_options")
    _check_options(parser, options, renamed, unused)
    words = options
    if config_name is not None:
        config = str(find_config(config_name))
        _check_config(parser, config, renamed, unused)
        words = ["--config", config, *options]
    try:
        *parsed, rest = parser.parse_args_and_config(words, return_remaining_strings=True)
    except UserError:
        raise
    except ArgumentError as error:
        raise UserError(problem_of_value(error, parser)) from None
    except (ValueError, TypeError, KeyError, ImportError, OSError, RuntimeError) as error:
        # From a dataclass's __post_init__, often in several lines.
        raise UserError(" ".join(str(error).split())) from None
    if rest:
        raise UserError(f"unexpected argument `{rest[0]}`{_hint_for_stray(rest[0], parser)}")
    return tuple(parsed)


def _parser_of(types: list[type], description: str | None, usage: str) -> "ArgumentParser":
    """The parser of the dataclasses. What its help should not list is hidden."""
    from trl import TrlParser

    parser = TrlParser(
        types,
        prog=program_name(),
        usage=f"%(prog)s {usage}",  # argparse's own has about 150 lines
        description=description,
        epilog=_epilog(types),
        formatter_class=HelpFormatter,
    )
    hidden = [*_names_of(types, "unused_options"), *_names_of(types, "refused_options"), *RENAMED_OPTIONS]
    for action in parser._actions:
        # `--use_peft false` is enough, and the help of `--no_use_peft` shows a wrong default.
        if action.dest in hidden or action.option_strings[0] == f"--no_{action.dest}":
            action.help = SUPPRESS
        if getattr(action.type, "__name__", "") == "string_to_bool":
            action.type = string_to_bool  # which takes `on` and `off` too, as YAML does
    parser.error = refuse_words  # argparse would also print its usage
    parser.exit_on_error = False  # a wrong value is an `ArgumentError`, see `parse_recipe`
    return parser


def _epilog(types: Iterable[type]) -> str:
    trains = any(hasattr(dataclass_type, "per_device_train_batch_size") for dataclass_type in types)
    return EPILOG + EPILOG_FOR_TRAINING if trains else EPILOG


def _hint_for_stray(word: str, parser: "ArgumentParser") -> str:
    path = Path(word)
    if path.suffix in {".yaml", ".yml"}:
        return f": did you mean `--config {word}`?"
    known = [action.dest for action in parser._actions]
    models = [name for name in ("reward_model", "model_name_or_path") if name in known]
    is_data = path.suffix in _DATA_SUFFIXES
    # `check-reward` has no other model than the reward model, and its first thought is the model.
    is_model = any((path / file).is_file() for file in _MODEL_FILES) or ("/" in word and models == ["reward_model"])
    if models and is_model and not is_data:
        return f": did you mean `--{models[-1]} {word}`?"
    if "dataset_name" in known and (is_data or "/" in word):
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


def _with_new_names(words: Iterable[str], parser: "ArgumentParser") -> list[str]:
    """The words of the command line with the new names of Transformers' renamed options, of which both are known.

    Where the new name is set, the old one counts for nothing: without this, a config file with the new name would
    override a command line with the old one.
    """
    known = {action.dest for action in parser._actions}
    renamed: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        old = name.removeprefix("no_")
        if not word.startswith("--") or RENAMED_OPTIONS.get(old) not in known:
            renamed.append(word)
        elif name == old:
            renamed.append(f"--{RENAMED_OPTIONS[old]}{equals}{value}")
        else:
            renamed += [f"--{RENAMED_OPTIONS[old]}", "false"]
    return renamed


def _names_of(types: Iterable[type], attribute: str) -> dict[str, str]:
    """The entries of an attribute such as `renamed_options`, of all dataclasses."""
    names: dict[str, str] = {}
    for dataclass_type in types:
        names.update(getattr(dataclass_type, attribute, {}))
    return names


def _check_options(
    parser: "ArgumentParser", words: list[str], renamed: Mapping[str, str], unused: Mapping[str, str]
) -> None:
    """Raises for options without effect, unknown ones and abbreviations: `--learning` must not set learning_rate."""
    known = {name for action in parser._actions for name in action.option_strings}
    for word in words:
        if not word.startswith("--"):
            continue
        option = word.partition("=")[0]
        name = option.removeprefix("--").replace("-", "_")
        if name.removeprefix("no_") in unused:
            raise UserError(_no_effect(option, unused[name.removeprefix("no_")]))
        if option in known:
            continue
        if name in renamed:
            raise UserError(f"`{option}` has a new name: use `--{renamed[name]}`")
        if name in LAUNCH_OPTIONS:
            raise UserError(f"`{option}` starts several processes: use it with `hf-rlhf sft`, `reward` or `ppo`")
        raise UserError(f"unknown option `{option}`{did_you_mean(option, known)}")


def _no_effect(option: str, reason: str) -> str:
    return f"`{option}` has no effect in {program_name()} ({reason}): leave it out"


def _check_config(parser: "ArgumentParser", path: str, renamed: Mapping[str, str], unused: Mapping[str, str]) -> None:
    """Raises for keys and values that TrlParser would accept, or report without naming the file."""
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    config = read_config(path)
    for key, value in config.items():
        if key == "env":  # a key of TrlParser: environment variables to set
            continue
        if key in renamed:
            raise UserError(f"{path}: `{key}` has a new name: use `{renamed[key]}`")
        if key in LAUNCH_OPTIONS:
            raise UserError(f"{path}: `{key}` belongs on the command line: hf-rlhf ppo --{key} {value} --config {path}")
        if key in unused:
            raise UserError(f"{path}: {_no_effect(key, unused[key])}")
        if RENAMED_OPTIONS.get(key) in config:
            raise UserError(f"{path}: `{key}` is the old name of `{RENAMED_OPTIONS[key]}`: keep one of them")
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
