"""Runs one program in a process with limits. These keep a machine usable; they are no sandbox against hostile code."""

import contextlib
import functools
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNNER = Path(__file__).with_name("code_runner.py")
NAMESPACES = ("unshare", "--user", "--map-current-user", "--net", "--pid", "--fork", "--kill-child")
"""A process without network, and in which no child outlives the first process (util-linux)."""
FIRST_PROCESS = ("sh", "-c", '"$@"; exit $?', "sh")
"""Runs the rest as a child: limits do not end the first process of a namespace, as that ignores their signals."""


@dataclass(frozen=True)
class Limits:
    """Limits of one program.

    Attributes:
        seconds: CPU seconds of a program with its test.
        memory_mb: address space, in MB (2**20 bytes).
        output_kb: size of what it prints and of each file that it writes, in KB (1024 bytes).
    """

    seconds: float
    memory_mb: int
    output_kb: int

    @property
    def wall_seconds(self) -> float:
        """Wall-clock limit: a program that sleeps uses no CPU seconds, and one on a busy machine gets fewer."""
        return 3 * self.seconds + 2

    def of_runner(self) -> dict[str, int]:
        """The limits as the runner sets them."""
        return {
            "cpu_seconds": max(1, math.ceil(self.seconds)),
            "memory": self.memory_mb * 2**20,
            "file_size": self.output_kb * 2**10,
        }


class Programs:
    """The processes that run now, of all threads, so that all can be ended at once."""

    def __init__(self):
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def passes(self, program: str, test: Any, limits: Limits, *, network: bool) -> bool:
        """Whether a program passes one test.

        Args:
            program: Python text.
            test: Python text that is run after the program in its names, such as `assert add(1, 2) == 3`; or a mapping
                with `input`, which the program reads from its standard input, and `output`, which it must print.
            limits: limits of the process.
            network: whether it may use the network. Without, it runs in namespaces of its own, see
                `can_cut_network`.
        """
        with _temporary_folder() as folder:
            if isinstance(test, str):
                return self._passes_statements(program, test, limits, folder, network)
            ended_well, output = self._run(program, None, str(test["input"]), limits, folder, network)
            return ended_well and _lines(output) == _lines(str(test["output"]))

    def stop(self) -> None:
        """Ends all processes, and lets no other start."""
        self._stopped = True
        for process in list(self._running):
            _end_group(process)

    def _passes_statements(self, program: str, test: str, limits: Limits, folder: str, network: bool) -> bool:
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        token = secrets.token_hex(16)
        try:
            ended_well, _ = self._run(program, test, "", limits, folder, network, report=write_end, token=token)
            # The process has ended, and with it all that could still write.
            with contextlib.suppress(BlockingIOError):
                return ended_well and os.read(read_end, 1024).decode(errors="replace") == token
            return False
        finally:
            os.close(read_end)
            os.close(write_end)

    def _run(
        self,
        program: str,
        test: str | None,
        given_input: str,
        limits: Limits,
        folder: str,
        network: bool,
        *,
        report: int | None = None,
        token: str = "",
    ) -> tuple[bool, str]:
        """Whether the process ended with status 0, and what it printed."""
        asked = {"program": program, "test": test, "limits": limits.of_runner(), "report": report, "token": token}
        work = Path(folder, "work")
        work.mkdir()
        files = {name: Path(folder, name) for name in ("asked", "input", "printed")}
        files["asked"].write_text(json.dumps(asked), encoding="utf-8")
        files["input"].write_text(given_input, encoding="utf-8", errors="replace")
        command = [sys.executable, "-I", str(RUNNER)]
        if not network:
            command = [*NAMESPACES, *FIRST_PROCESS, *command]
        with (
            files["asked"].open("rb") as request,
            files["input"].open("rb") as stdin,
            files["printed"].open("wb") as stdout,
        ):
            files["asked"].unlink()  # it is open still; the program cannot read the token from its folder
            passed_on = [request.fileno()]
            if report is not None:
                passed_on.append(report)
            process = subprocess.Popen(
                [*command, str(request.fileno())],
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                cwd=work,
                env=_environment(work),
                pass_fds=passed_on,
                start_new_session=True,
            )
            with self._known(process):
                try:
                    status = process.wait(limits.wall_seconds)
                except subprocess.TimeoutExpired:
                    status = None
        return status == 0, files["printed"].read_text(encoding="utf-8", errors="replace")

    @contextlib.contextmanager
    def _known(self, process: subprocess.Popen) -> Iterator[None]:
        """Keeps a process among those that `stop` ends. Its whole group is ended at the end."""
        self._running.add(process)
        try:
            if self._stopped:
                _end_group(process)
            yield
        finally:
            _end_group(process)  # children too that it has left behind
            self._running.discard(process)
            process.wait()


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """A folder that is removed with all that a program has left in it."""
    folder = tempfile.mkdtemp(prefix="reward-code-")
    try:
        yield folder
    finally:
        # Not `shutil.rmtree`, which fails on folders in folders that are deeper than Python's stack.
        for command in (["rm", "-rf"], ["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            if os.path.exists(folder):
                subprocess.run([*command, folder], stdin=subprocess.DEVNULL, capture_output=True, check=False)


def _end_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment(work: Path) -> dict[str, str]:
    """The environment of a program: none of the parent's, which may have tokens and keys."""
    return {"PATH": os.defpath, "HOME": str(work), "TMPDIR": str(work), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}


@functools.cache
def can_cut_network() -> bool:
    """Whether this machine can run a process without network: it needs user namespaces, which containers often lack."""
    if shutil.which("unshare") is None:
        return False
    try:
        done = subprocess.run([*NAMESPACES, "true"], capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _lines(text: str) -> list[str]:
    """Lines without spaces at their ends and without empty lines at the end: what judges of programs compare."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
