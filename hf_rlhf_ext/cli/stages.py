"""Runs the stages of a pipeline in one folder. A stage that an earlier run finished is not run again."""

import gc
import json
import resource
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..errors import UserError
from .stage_progress import StageProgress
from .stopping import part_of

MANIFEST = "manifest.json"
OLDER_MANIFEST = "progress.json"
"""Name of the manifest in folders of version 0.1.0."""
FAILURES = "failures"
"""Folder with the traceback of each failed stage."""


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
        progress: shows how far the whole run is, and the time left. None shows the elapsed time only.

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
        progress: StageProgress | None = None,
    ):
        self.started = time.monotonic()
        self.names = list(names)
        self.progress = progress
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
        times = f"{tqdm.format_interval(time.monotonic() - self.started)} elapsed"
        if self.progress is not None:
            times += self.progress.time_left(name)
        number = self.names.index(name) + 1
        tqdm.write(f"[{number}/{len(self.names)}] {name}: {what} ({times})", file=sys.stdout)  # above the bar
        sys.stdout.flush()

    def is_finished(self, name: str) -> bool:
        return name in self.state["stages"]

    def error_of(self, name: str) -> str | None:
        """Why a stage failed, in one line; None if it did not."""
        return self.state.get("failed", {}).get(name)

    def measured(self, name: str) -> dict[str, Any]:
        """What a finished stage measured."""
        return self.state["stages"][name]["measured"]

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
            if self.progress is not None:
                self.progress.skip(name)
            self.announce(
                name, "finished earlier, kept; --overwrite true deletes all stages and starts from the beginning"
            )
            return self.measured(name)
        self.announce(name, what)
        return self._do(name, stage)

    def run_if_changed(
        self,
        name: str,
        what: str,
        stage: Callable[[], dict[str, Any]],
        *,
        settings: Mapping[str, Any],
        needs: Sequence[str] = (),
        reset: Callable[[], None] | None = None,
        may_fail: bool = False,
    ) -> dict[str, Any] | None:
        """Runs a stage, unless it was finished with the same settings and on the same work of the stages that it needs.

        Args:
            name: one of the names of this run.
            what: the stage in a few words, for its line in the terminal.
            stage: does the work, see `run`.
            settings: what only this stage depends on, as JSON values. If they differ from those of an earlier call, the
                stage is done again, and so are those that need it.
            needs: names of the stages whose work it reads. If one of them failed, this one fails too.
            reset: deletes what an earlier call with other settings left.
            may_fail: an error of the stage is recorded, with its traceback in `failures/`, and not raised. The next
                call tries again.

        Returns:
            What the stage measured; None if it failed.
        """
        settings = json.loads(json.dumps(settings, default=str))  # as the manifest has them
        broken = [need for need in needs if not self.is_finished(need)]
        if broken:
            return self._fail(name, f"needs {', '.join(_last_parts(broken))}", None)
        made_from = {need: self.state["stages"][need].get("made") for need in needs}
        change = self._change(name, settings, made_from)
        if self.is_finished(name) and not change:
            if self.progress is not None:
                self.progress.skip(name)
            self.announce(name, "finished earlier, kept")
            return self.measured(name)
        begun = self.state.setdefault("begun", {})
        if change:
            if self.progress is not None:
                self.progress.redo(self._built_on(name))
            # Its checkpoints are of other settings.
            self.state["stages"].pop(name, None)
            begun.pop(name, None)
            self._write()
            what = f"{what}; done again, as {change}"
            if reset is not None:
                reset()
        if name not in begun:
            begun[name] = {"settings": settings, "from": made_from}
            self._write()
        self.announce(name, what)
        try:
            return self._do(name, stage)
        except Exception as error:
            if not may_fail:
                raise
            return self._fail(name, _one_line(error), traceback.format_exc())

    def _do(self, name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        start = time.monotonic()
        number = self.names.index(name) + 1
        if self.progress is not None:
            self.progress.begin(name)
        try:
            with part_of(f"stage {number} of {len(self.names)} ({name})", "finished stages are kept"):
                measured = stage()
        finally:
            gc.collect()  # trainers are in reference cycles: without it, the models of two stages are in memory at once
        seconds = round(time.monotonic() - start, 1)
        finished = {"seconds": seconds, "measured": measured}
        begun = self.state.get("begun", {}).pop(name, None)
        if begun is not None:
            self.state["count"] = self.state.get("count", 0) + 1
            finished |= begun | {"made": self.state["count"]}
        self.state["stages"][name] = finished
        if self.state.get("failed", {}).pop(name, None) is not None:
            self._trace_file(name).unlink(missing_ok=True)
        self.state["peak_memory_gb"] = max(self.state["peak_memory_gb"], peak_memory_gb())
        self._write()
        if self.progress is not None:
            self.progress.end(name, seconds)
        return measured

    def _change(self, name: str, settings: Mapping[str, Any], made_from: Mapping[str, Any]) -> str:
        """Why the earlier work of a stage is of no use, in words; empty if there is none, or if it is of use."""
        earlier = self.state["stages"].get(name) or self.state.get("begun", {}).get(name)
        if earlier is None or "settings" not in earlier:
            return ""
        differing = _difference(earlier["settings"], settings)
        if differing:
            return f"its settings differ ({differing})"
        redone = [need for need, made in made_from.items() if earlier["from"].get(need) != made]
        redone += [need for need in earlier["from"] if need not in made_from]
        return f"it builds on {', '.join(_last_parts(redone))}, which changed" if redone else ""

    def _built_on(self, name: str) -> set[str]:
        """A stage and the finished ones that build on it, directly or not."""
        found = {name}
        for other in self.names:  # in their order, so those that a stage needs come first
            if found & self.state["stages"].get(other, {}).get("from", {}).keys():
                found.add(other)
        return found

    def _trace_file(self, name: str) -> Path:
        """The file with the traceback of a failed stage."""
        return self.path.parent / FAILURES / f"{name.replace('/', '-')}.txt"

    def _fail(self, name: str, line: str, trace: str | None) -> None:
        """Records that a stage failed, and says so."""
        self.state.setdefault("failed", {})[name] = line
        self.state["stages"].pop(name, None)
        self._write()
        where = ""
        if trace is not None:
            path = self._trace_file(name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(trace, encoding="utf-8")
            where = f" (traceback: {path})"
        if self.progress is not None:
            self.progress.skip(name)
        tqdm.write(f"failed: {name}: {line}{where}; the same command tries again", file=sys.stdout)
        sys.stdout.flush()

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


def _one_line(error: Exception) -> str:
    """An error in one line, with its class unless the line is for users."""
    line = " ".join(str(error).split()) or "no message"
    return line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"


def _last_parts(names: Sequence[str]) -> list[str]:
    """Names of stages without their seed or round: `sft` for `seed-0/sft`."""
    return [name.rpartition("/")[2] for name in names]


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
