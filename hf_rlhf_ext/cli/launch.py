"""Starts several processes for one command with accelerate, as `trl sft` does: `hf-rlhf ppo --num_processes 2`."""

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compat import accelerate_configs
from ..errors import UserError
from .config_file import read_config
from .parsing import LAUNCH_OPTIONS
from .program import LAUNCHED_WITH


@dataclass(frozen=True)
class LaunchOptions:
    """The number of processes, and an accelerate configuration: a file, or the name of one that TRL ships."""

    num_processes: int | None = None
    accelerate_config: str | None = None

    @property
    def asked_for(self) -> bool:
        return self.num_processes is not None or self.accelerate_config is not None

    def words(self) -> list[str]:
        """The options as words of a command line."""
        words = []
        for name in LAUNCH_OPTIONS:
            value = getattr(self, name)
            if value is not None:
                words += [f"--{name}", str(value)]
        return words


def take_launch_options(argv: Sequence[str]) -> tuple[LaunchOptions, list[str]]:
    """Separates the launch options from the other words, which are the recipe's."""
    values: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name not in LAUNCH_OPTIONS:
            rest.append(word)
            continue
        if not equals:
            value = next(words, "")
        if not value or value.startswith("--"):
            raise UserError(f"`{option}` needs a value")
        values[name] = value

    num_processes = None
    if "num_processes" in values:
        num_processes = _positive_integer(values["num_processes"])
    return LaunchOptions(num_processes, values.get("accelerate_config")), rest


def _positive_integer(value: str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"--num_processes needs a number of at least 1, got {value!r}")
    return number


def launch(options: LaunchOptions, command: Sequence[str]) -> None:
    """Runs `python -m hf_rlhf_ext COMMAND …` in every process. If one fails, exits with its exit status."""
    # Imported here, because accelerate loads torch.
    import torch
    import torch.distributed.run  # sets the levels of its loggers, which are set again below
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    n_devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    words = [*accelerate_words(options, n_devices), "--module", "hf_rlhf_ext", *command]
    os.environ[LAUNCHED_WITH] = shlex.join(options.words())
    # It warns of each signal that it passes on, and the first process says what is kept.
    for part in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{part}").setLevel(logging.ERROR)
    try:
        with _signals_left_to_the_processes():
            launch_command(launch_command_parser().parse_args(words))
    except SignalException as stop:  # several processes: torchrun has passed it on, and waited for them
        raise SystemExit(128 + stop.sigval) from None
    except ChildFailedError as error:  # several processes: torchrun has printed which ones failed
        _, failure = error.get_first_failure()
        raise SystemExit(shell_status(failure.exitcode)) from None
    except subprocess.CalledProcessError as error:  # one process
        raise SystemExit(shell_status(error.returncode)) from None
    except (ImportError, ValueError) as error:  # a wrong configuration, or DeepSpeed is missing
        raise UserError(" ".join(str(error).split())) from None
    finally:
        del os.environ[LAUNCHED_WITH]


@contextlib.contextmanager
def _signals_left_to_the_processes() -> Iterator[None]:
    """Lets the started process end by itself at Ctrl-C, which the terminal sends to it too, and at SIGTERM.

    For several processes, torchrun replaces these handlers by its own, which do the same.
    """
    import psutil

    def pass_on(number: int, frame: Any) -> None:
        for child in psutil.Process().children():
            child.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on)}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a script
        # Not SIG_IGN, which the process would inherit.
        before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shell_status(code: int) -> int:
    """The exit status as shells count it: 128 + N for a process that was ended by signal N."""
    return 128 - code if code < 0 else code


def accelerate_words(options: LaunchOptions, n_devices: int) -> list[str]:
    """Arguments of `accelerate launch` for a machine with `n_devices` accelerators; with 0, its CPU is used.

    Raises:
        UserError: the configuration is unknown, there are more processes than accelerators, or the options contradict
            each other.
    """
    n_processes = options.num_processes
    if n_devices and n_processes is not None and n_processes > n_devices:
        raise UserError(
            f"--num_processes {n_processes}: this machine has {n_devices} accelerator(s): use fewer processes, or "
            "train on the CPU with CUDA_VISIBLE_DEVICES= in front of the command."
        )

    # The recipe's options --bf16 and --fp16 choose the dtypes.
    words = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if n_processes is not None:
        words += ["--num_processes", str(n_processes)]
    if options.accelerate_config is not None:
        path = find_accelerate_config(options.accelerate_config)
        config = read_config(path)
        _check_processes(options, config)
        words += ["--config_file", str(path)]
        has_port = "main_process_port" in config or config.get("num_machines", 1) != 1
        expected_processes = n_processes or config.get("num_processes", 1)
    else:
        words += ["--num_machines", "1"]
        if n_processes is not None and n_processes > 1:
            # Without it, accelerate starts one process on a machine with one accelerator or none.
            words += ["--multi_gpu"]
        has_port = False
        expected_processes = n_processes

    if not has_port:
        words += ["--main_process_port", "0"]  # a free port, so that two runs on one machine do not use the same one
    if not n_devices and "OMP_NUM_THREADS" not in os.environ:
        # accelerate's default is one thread per process, which leaves other cores idle.
        threads = max(1, (os.cpu_count() or 1) // int(expected_processes))
        words += ["--num_cpu_threads_per_process", str(threads)]
    return words


def _check_processes(options: LaunchOptions, config: dict[str, Any]) -> None:
    """Raises for several processes with a configuration for one, which accelerate would use without a warning."""
    distributed = str(config.get("distributed_type", "NO"))  # YAML reads a bare NO as False
    if distributed in ("NO", "False") and (options.num_processes or 1) > 1:
        raise UserError(
            f"--accelerate_config {options.accelerate_config} runs one process, but --num_processes is "
            f"{options.num_processes}: use one of the two options"
        )


def find_accelerate_config(name: str) -> Path:
    """The file for `--accelerate_config NAME`: an existing path, otherwise a file that TRL ships."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = accelerate_configs()
    if name not in shipped:
        raise UserError(
            f"--accelerate_config: no file {name}: give a path, or a name that TRL ships ({', '.join(shipped)})"
        )
    return shipped[name]
