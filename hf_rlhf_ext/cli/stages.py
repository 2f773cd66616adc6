"""Runs the stages of a pipeline in one folder. A stage that an earlier run finished is not run again."""

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..checkpointing import require_writable
from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
OLDER_MANIFEST = "progress.json"
"""Name of the manifest in folders of version 0.1.0."""


class StageRunner:
    """The stages of one run: their order, the finished ones, their duration and their results.

    `manifest.json` in the folder is written after each stage, so that a run can be stopped and continued: the settings,
    what each finished stage measured and how long it took, and the peak memory.

    Args:
        folder: folder of the run, which must exist.
        settings: what finished stages depend on, as JSON values. A folder with other settings is refused, as it would
            hold parts of two runs.
        names: all stages in their order, for the numbers in the terminal.

    Raises:
        UserError: if the folder holds a run with other settings.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], names: Sequence[str]):
        self.started = time.monotonic()
        self.names = list(names)
        self.path = Path(folder) / MANIFEST
        self.state: dict[str, Any] = {"settings": dict(settings), "stages": {}, "peak_memory_gb": 0.0}
        older = self.path.with_name(OLDER_MANIFEST)
        if older.is_file() and not self.path.is_file():
            older.replace(self.path)
        if not self.path.is_file():
            # Written now, so that a run that is stopped in its first stage can be continued too.
            self._write()
            return
        self.state = json.loads(self.path.read_text(encoding="utf-8"))
        differing = _difference(self.state["settings"], dict(settings))
        if differing:
            raise UserError(
                f"{folder} holds a run with other settings ({differing}): pass another --output_dir, or --overwrite "
                "true to start from the beginning"
            )

    def announce(self, name: str, what: str) -> None:
        """Prints the line of a stage: its number and name, what it does, and how long the run has taken so far."""
        elapsed = tqdm.format_interval(time.monotonic() - self.started)
        number = self.names.index(name) + 1
        print(f"[{number}/{len(self.names)}] {name}: {what} ({elapsed} elapsed)", flush=True)

    def is_finished(self, name: str) -> bool:
        return name in self.state["stages"]

    def run(self, name: str, what: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Runs a stage, unless an earlier run finished it.

        Args:
            name: one of the names of this run.
            what: the stage in a few words, for its line in the terminal.
            stage: does the work. It may be called again after a stop, so it must continue or start again by itself.

        Returns:
            What the stage measured, as JSON values.
        """
        if self.is_finished(name):
            self.announce(name, "finished earlier, kept; --overwrite true starts from the beginning")
            return self.state["stages"][name]["measured"]
        self.announce(name, what)
        start = time.monotonic()
        measured = stage()
        gc.collect()  # trainers are in reference cycles: without it, the models of two stages are in memory at once
        seconds = round(time.monotonic() - start, 1)
        self.state["stages"][name] = {"seconds": seconds, "measured": measured}
        self.state["peak_memory_gb"] = max(self.state["peak_memory_gb"], peak_memory_gb())
        self._write()
        return measured

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each finished stage."""
        return {name: stage["seconds"] for name, stage in self.state["stages"].items()}

    @property
    def peak_memory_gb(self) -> float:
        """Peak memory of this process and of the ones before it in this folder, in GB (10^9 bytes)."""
        return max(self.state["peak_memory_gb"], peak_memory_gb())

    def _write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.path)  # never half a file


def has_manifest(folder: str | Path) -> bool:
    """Whether the folder has a run that a `StageRunner` can continue."""
    folder = Path(folder)
    return (folder / MANIFEST).is_file() or (folder / OLDER_MANIFEST).is_file()


@contextmanager
def only_process(folder: str | Path) -> Iterator[None]:
    """Makes the folder of a run, and keeps other processes out of it until the block ends.

    The operating system ends the lock with the process, also if it is killed. Where the system or the file system has
    no locks, nothing is kept out.

    Raises:
        UserError: another process is in such a block with this folder, or the folder cannot be written.
    """
    require_writable(folder)
    if fcntl is None:
        yield
        return
    # The folder itself is locked, as every file in it may be replaced.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"output_dir: another process runs in {folder}: wait for its end, or pass another --output_dir."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _difference(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, as `seed: 0 then, 1 now`; empty if none does."""
    changed = []
    for name in sorted({*earlier, *now}):
        before, after = earlier.get(name), now.get(name)
        if before != after:
            changed.append(f"{name}: {before} then, {after} now")
    return "; ".join(changed)


def peak_memory_gb() -> float:
    """Peak memory (resident size) of this process or of one of its finished children, in GB (10^9 bytes).

    It is the maximum over processes, not their sum. The value is `ru_maxrss` of getrusage(2), which is in kilobytes on
    Linux and in bytes on macOS.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(own, children) * unit / 1e9
