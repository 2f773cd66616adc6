"""Several processes of one command: which one this is, and that a failure is said once.

Only the first process prints. A mistake that all processes make is said by the first one; a failure of another process
is said by that process, and the others end without a word. They know of each other's failures through the error files
of torchrun, which accelerate and `hf-rlhf` start too: a process writes what it says into its file, in torchrun's form,
so that torchrun's own summary shows it as the cause. Without torchrun (MPI), every process says what it knows.

Importing this module does not load torch.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Environment variables with the number of this process: of torchrun, and of MPI, in accelerate's order."""
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

OWN_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable with the error file of this process: `.../<number on this machine>/error.json`."""

SAID_ALONE = "HF_RLHF_EXT_SAID_ALONE"
"""Environment variable that is set once a process without company has been told of it."""

PATIENCE = 3.0
"""Seconds that a process waits for the first one to make the same mistake."""

_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "gloo", "nccl", "socket", "store")
"""Words in errors of a process whose partner has ended."""


def rank() -> int:
    """The number of this process, from 0."""
    return _number(RANKS, 0)


def is_first() -> bool:
    """Whether this is the first process, which prints and writes."""
    return rank() == 0


def count() -> int:
    """Number of processes of the command."""
    return _number(SIZES, 1)


def _number(names: tuple[str, ...], default: int) -> int:
    if "MASTER_ADDR" not in os.environ:  # MPI, or Slurm, has started processes that have nothing to do with each other
        names = names[:1]
    for name in names:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return default


def say(line: str) -> None:
    """Prints a failure of this process to stderr, unless another process has said it or is about to."""
    record(line)
    if is_said_by_first(line):
        return
    stderr = sys.stderr
    if not is_first():
        line = line.replace("error:", f"error (process {rank()}):", 1)
        stderr = sys.__stderr__  # `hf-rlhf` has redirected the other one, and a recipe in it says what is wrong
    print(line, file=stderr, flush=True)


def record(line: str) -> None:
    """Writes a failure into the error file of this process, where torchrun looks for the cause."""
    path = os.environ.get(OWN_FILE)
    if not path or count() == 1:
        return
    # torchrun takes the first failure for the cause and counts whole seconds: it must not be one that came of this.
    details = {"py_callstack": line, "timestamp": str(int(time.time()) - 1)}
    content = json.dumps({"message": {"message": line, "extraInfo": details}})
    with contextlib.suppress(OSError):
        new = Path(f"{path}.new")  # so that nobody reads half of it
        new.write_text(content, encoding="utf-8")
        new.replace(path)


def has_another_failed() -> bool:
    """Whether another process on this machine has said a failure."""
    own = os.environ.get(OWN_FILE)
    if not own:
        return False
    return any(path != Path(own) for path in Path(own).parents[1].glob(f"*/{Path(own).name}"))


def is_echo(error: BaseException) -> bool:
    """Whether an error is only that another process has ended, as a connection breaks then."""
    if count() == 1:
        return False
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, RuntimeError | OSError) and any(word in text for word in _LOST)


def is_said_by_first(line: str) -> bool:
    """Whether the first process has recorded the same failure, or does so in the next seconds; False in itself."""
    own = os.environ.get(OWN_FILE)
    if not own or is_first():
        return False
    until = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError, ValueError, LookupError):
            path = Path(own).parents[1] / "0" / Path(own).name
            return json.loads(path.read_text(encoding="utf-8"))["message"]["message"] == line
        if time.monotonic() > until:
            return False
        time.sleep(0.05)


def say_if_alone() -> None:
    """Says it once if `accelerate launch --cpu --num_processes N` has started a single process."""
    if is_started_alone() and SAID_ALONE not in os.environ:
        os.environ[SAID_ALONE] = "1"  # for the recipe that this command runs, also in another process
        print(
            "warning: this is a single process: `accelerate launch --cpu --num_processes N` starts several only with "
            "MPI. For several, use `hf-rlhf COMMAND --num_processes N`, or put ACCELERATE_USE_CPU=true in front of "
            "`accelerate launch --multi_gpu --num_processes N`.",
            file=sys.stderr,
        )


def is_started_alone() -> bool:
    """Whether accelerate was asked for several processes and has started one, as it needs MPI for several on a CPU.

    What shows it is the address of a meeting place without a number of processes that meet.
    """
    # Set by accelerate only, and the second one only where it was asked for several processes.
    is_of_accelerate = "ACCELERATE_DYNAMO_MODE" in os.environ and "MASTER_ADDR" in os.environ
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    return is_of_accelerate and on_cpu and not any(name in os.environ for name in SIZES)
