"""Runs the stages of a pipeline in one folder. A stage that an earlier run finished is not run again."""

import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..errors import UserError
from .stopping import part_of

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
        changeable: names of settings that may have another value than before, as no stage that has begun depends on
            them. The manifest then has the new values.

    Raises:
        UserError: if the folder holds a run with other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        names: Sequence[str],
        *,
        changeable: Collection[str] = (),
    ):
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
        earlier = {name: value for name, value in self.state["settings"].items() if name not in changeable}
        differing = _difference(earlier, {name: settings[name] for name in settings if name not in changeable})
        if differing:
            raise UserError(
                f"{folder} holds a run with other settings ({differing}): pass another --output_dir, or --overwrite "
                "true to delete its finished stages and start from the beginning"
            )
        if self.state["settings"] != dict(settings):
            self.state["settings"] = dict(settings)
            self._write()

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
            self.announce(
                name, "finished earlier, kept; --overwrite true deletes all stages and starts from the beginning"
            )
            return self.state["stages"][name]["measured"]
        self.announce(name, what)
        start = time.monotonic()
        number = self.names.index(name) + 1
        with part_of(f"stage {number} of {len(self.names)} ({name})", "finished stages are kept"):
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
