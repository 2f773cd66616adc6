"""All runs of `paths.py` on the CPU and on the pretend device: `python runs.py FOLDER [NAME …]`.

FOLDER holds a model and its tokenizer, in `base`. Writes one JSON line for each run into `FOLDER/results.jsonl`: its
error, if there is one, the largest difference of weights and metrics between the two devices, and where the library
worked on the CPU, see `watching.py`. PYTHONPATH has to name the folder above `tests`.
"""

import json
import math
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.devices import pretend
from tests.devices.checks import CHECKS
from tests.devices.mistakes import MISTAKES, run_for_mistakes
from tests.devices.paths import RUNS
from tests.devices.placement import trainers_use
from tests.devices.watching import Watch

Result = dict[str, Any]


def on_cpu(value: Any) -> Any:
    """The value with tensors of the CPU, copied past the watch."""
    if isinstance(value, torch.Tensor):
        return getattr(value, "raw", value).detach().clone().double()
    if isinstance(value, dict):
        return {key: on_cpu(part) for key, part in value.items()}
    return value


def difference(a: Any, b: Any) -> float:
    """Largest absolute difference of two results; infinite where they differ in anything but numbers."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape:
        return float((a - b).abs().max()) if a.numel() else 0.0
    if isinstance(a, float | int) and isinstance(b, float | int):
        both_are_nan = a != a and b != b  # the explained variance of equal returns
        return 0.0 if a == b or both_are_nan else abs(a - b)
    return 0.0 if not isinstance(a, torch.Tensor) and a == b else math.inf


class Runs:
    """Runs functions on the CPU and on the device, and writes down what happened."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.device = pretend.install()
        self.watch = Watch()
        pretend.watch_copies(self.watch.note_copy)

    def on(self, device: torch.device, name: str, function: Callable[[Path, torch.device], Result]) -> Result:
        """What a run returns, as tensors of the CPU."""
        home = self.folder / "runs" / re.sub(r"\W+", "-", name) / device.type
        home.mkdir(parents=True)
        torch.manual_seed(0)
        try:
            # The device has no fused attention, so that the CPU must not use its own: that rounds in another way.
            with trainers_use(device), sdpa_kernel(SDPBackend.MATH):
                if device == self.device:
                    self.watch.start()
                return on_cpu(function(home, device))
        finally:
            self.watch.on = False
            shutil.rmtree(home)

    def compared(self, name: str, function: Callable[[Path, torch.device], Result]) -> dict[str, Any]:
        """One line of the results."""
        start = time.perf_counter()
        line: dict[str, Any] = {"name": name, "error": None}
        try:
            expected = self.on(torch.device("cpu"), name, function)
            got = self.on(self.device, name, function)
        except Exception:
            line["error"] = traceback.format_exc()
        else:
            differences = {key: difference(value, got.get(key)) for key, value in expected.items()}
            worst = max(differences, key=differences.get)
            line |= {"compared": len(differences), "worst": worst, "difference": differences[worst]}
            line["missing"] = sorted(got.keys() ^ expected.keys())
        return line | self._seen() | {"seconds": round(time.perf_counter() - start, 1)}

    def checked(self, name: str, check: Callable[[torch.device], None]) -> dict[str, Any]:
        """A line of the results for a check of the device itself."""
        try:
            check(self.device)
        except Exception:
            return {"name": f"device: {name}", "error": traceback.format_exc()}
        return {"name": f"device: {name}", "error": None}

    def with_mistake(self, name: str, mistake) -> dict[str, Any]:
        """A line of the results for a run with a mistake in the library, on the device only."""
        line: dict[str, Any] = {"name": name, "error": None}
        try:
            with mistake():
                self.on(self.device, name, run_for_mistakes)
        except Exception:
            line["error"] = traceback.format_exc()
        return line | self._seen()

    def _seen(self) -> dict[str, Any]:
        return {"copies": dict(self.watch.copies), "forward_passes": dict(self.watch.forward_passes)}


def main() -> None:
    torch.set_num_threads(1)
    folder, wanted = Path(sys.argv[1]), sys.argv[2:]
    runs = Runs(folder)
    with (folder / "results.jsonl").open("w") as results:
        for name, check in CHECKS.items():
            print(json.dumps(runs.checked(name, check)), file=results, flush=True)
        for name, function in RUNS.items():
            if not wanted or name in wanted:
                print(json.dumps(runs.compared(name, function)), file=results, flush=True)
        for name, mistake in MISTAKES.items():
            if not wanted or name in wanted:
                print(json.dumps(runs.with_mistake(name, mistake)), file=results, flush=True)
        print(json.dumps({"name": "used", "places": sorted(runs.watch.used)}), file=results)


if __name__ == "__main__":
    main()
