"""Starts several processes for one command with accelerate, as `trl sft` does: `hf-rlhf ppo --num_processes 2`."""

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compat import accelerate_configs
from ..errors import UserError
from .config_file import read_config
from .parsing import LAUNCH_OPTIONS
from .program import LAUNCHED_WITH
from .shipped import shipped_accelerate_configs

SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Environment variable of torchrun: seconds from SIGTERM, which it passes on, to SIGKILL. Its default is 30."""
SECONDS_TO_SAVE = "600"
"""Enough for the end of a step and a checkpoint. Processes that have saved end at once."""


@dataclass(frozen=True)
class LaunchOptions:
    """The number of processes, and an accelerate configuration: a file, or the name of a shipped one."""

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
    os.environ.setdefault(SHUTDOWN_TIMEOUT, SECONDS_TO_SAVE)
    # It tells of each signal that it passes on and of each process that fails, and these say more.
    for part in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{part}").setLevel(logging.CRITICAL)
    try:
        with _signals_left_to_the_processes():
            launch_command(launch_command_parser().parse_args(words))
    except SignalException as stop:  # several processes: torchrun has passed it on, and waited for them
        raise SystemExit(128 + stop.sigval) from None
    except ChildFailedError as error:  # several processes
        raise SystemExit(_status_of(error.failures)) from None
    except subprocess.CalledProcessError as error:  # one process
        raise SystemExit(shell_status(error.returncode)) from None
    except (ImportError, ValueError) as error:  # a wrong configuration, or DeepSpeed is missing
        if options.accelerate_config is not None:
            check_engine(command[0], read_config(find_accelerate_config(options.accelerate_config)))
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


def _status_of(failures: dict[int, Any]) -> int:
    """The exit status of several processes of which some have failed. Says which ones the system has killed.

    Args:
        failures: torchrun's `ProcessFailure` of each of them, by the number of the process.
    """
    ended = {number: failure.exitcode for number, failure in failures.items()}
    # The launcher sends SIGTERM to the others when one has failed.
    causes = {number: code for number, code in ended.items() if shell_status(code) != 128 + signal.SIGTERM}
    for number, code in causes.items():
        if code < 0:
            memory = ", often as the machine had no memory left" if code == -signal.SIGKILL else ""
            print(f"error: process {number} was ended by {signal.Signals(-code).name}{memory}", file=sys.stderr)
    # A process that has said what is wrong has recorded it; one that has lost its partner has not.
    recorded = [failures[number].exitcode for number in causes if failures[number].error_file != "<N/A>"]
    codes = recorded or list(causes.values()) or list(ended.values())
    return shell_status(codes[0])


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
        if n_processes is None and n_devices and path in shipped_accelerate_configs().values():
            n_processes = n_devices
            words += ["--num_processes", str(n_processes)]
        _check_processes(options, config, n_processes, n_devices)
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


def _check_processes(options: LaunchOptions, config: dict[str, Any], n_processes: int | None, n_devices: int) -> None:
    """Refuses a configuration that starts another number of processes than the options or the machine allow."""
    # For one process: accelerate would use it without a warning.
    distributed = str(config.get("distributed_type", "NO"))  # YAML reads a bare NO as False
    if distributed in ("NO", "False") and (options.num_processes or 1) > 1:
        raise UserError(
            f"--accelerate_config {options.accelerate_config} runs one process, but --num_processes is "
            f"{options.num_processes}: use one of the two options"
        )
    expected = int(n_processes or config.get("num_processes", 1))
    if n_devices and expected > n_devices and config.get("num_machines", 1) == 1 and not config.get("use_cpu"):
        raise UserError(
            f"--accelerate_config {options.accelerate_config} starts {expected} processes, and this machine has "
            f"{n_devices} accelerator(s): add --num_processes {n_devices}"
        )


def check_engine(command: str, config: Mapping[str, Any]) -> None:
    """Refuses an engine that a command does not support.

    The processes do it too. It is for an engine whose package is missing, so that nobody installs it in vain.

    Args:
        command: name of the command.
        config: the configuration of accelerate.

    Raises:
        UserError: with the engines that are supported.
    """
    # Imported here, because they load transformers.
    from ..ppo.trainer_options import ENGINES as OF_PPO
    from ..reward.trainer_options import ENGINES as OF_REWARD
    from ..training.engines import engine_of_config, require_engine

    trainers = {"ppo": ("PPOTrainer", OF_PPO), "reward": ("BradleyTerryTrainer", OF_REWARD)}
    if command in trainers:
        trainer, supported = trainers[command]
        require_engine(trainer, engine_of_config(config), supported)


def find_accelerate_config(name: str) -> Path:
    """The file for `--accelerate_config NAME`: an existing path, otherwise a file of the recipes, otherwise of TRL."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    ours = shipped_accelerate_configs()
    of_trl = {known: file for known, file in accelerate_configs().items() if known not in ours}
    if name not in ours | of_trl:
        raise UserError(
            f"--accelerate_config: no file {name}: give a path, or one of the names {', '.join(ours)} (TRL has others: "
            f"{', '.join(of_trl)})"
        )
    return (ours | of_trl)[name]
