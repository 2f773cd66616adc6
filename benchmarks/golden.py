"""The golden run: checks that two trees of this library give exactly the same numbers in training.

    python benchmarks/golden.py against COMMIT            trains that commit and this tree, and compares (make golden)
    python benchmarks/golden.py run OUT.json [NAME ...]   trains the tree in PYTHONPATH, or the installed one
    python benchmarks/golden.py compare A.json B.json     prints a table; exit status 1 if anything differs

The runs are in golden_runs.py. Numbers depend on the machine and on the versions of PyTorch and Transformers. Both
trees are therefore trained on the same machine each time, and no result is kept in the repository.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
WORKER_TIMEOUT = 900  # seconds, for a run in several processes
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")


# ---- Training ----


def run(out: Path, names: list[str]) -> int:
    """Trains the named runs (all by default) and writes `out` after each of them; returns 1 if one failed."""
    from golden_runs import RUNS, api, package_file, prepare_torch

    unknown = [name for name in names if name not in RUNS]
    if unknown:
        print(f"error: no run {unknown[0]!r}: choose from {', '.join(RUNS)}", file=sys.stderr)
        return 2
    prepare_torch()
    print(f"golden run of {package_file()} ({api()} names)", flush=True)
    result = {
        "package": package_file(),
        "api": api(),
        "versions": {library: version(library) for library in LIBRARIES},
        "runs": {},
    }
    failed = 0
    for name in names or list(RUNS):
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="golden-") as folder:
            try:
                record = one_run(name, Path(folder))
            except Exception as error:  # continue with the other runs
                traceback.print_exc()
                record = {"error": f"{type(error).__name__}: {error}"}
                failed += 1
        record["seconds"] = round(time.monotonic() - start, 1)
        result["runs"][name] = record
        out.write_text(json.dumps(result, indent=1) + "\n")
        problem = record.get("error", "").partition("\n")[0]
        print(f"{name:26} {record['seconds']:6.1f} s  {problem}".rstrip(), flush=True)
    return int(failed > 0)


def one_run(name: str, folder: Path) -> dict[str, Any]:
    """The outcome of each process of a run, and digests of the files that it wrote."""
    from golden_runs import RUNS

    golden = RUNS[name]
    if golden.processes == 1:
        processes = [golden.train(folder)]
    else:
        processes = run_in_processes(name, folder, golden.processes)
    return {"processes": processes, "files": file_digests(folder)}


def run_in_processes(name: str, folder: Path, n: int) -> list[dict[str, Any]]:
    """Trains the same run in several processes (gloo), started by torchrun; returns the outcome of each process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    command += [str(HERE), "worker", name, str(folder)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WORKER_TIMEOUT)
    if done.returncode != 0:
        raise RuntimeError(f"{n} processes ended with {done.returncode}:\n{done.stderr[-6000:]}")
    return [json.loads(outcome_file(folder, rank).read_text()) for rank in range(n)]


def worker(name: str, folder: Path) -> int:
    """Trains a run in one of several processes."""
    from golden_runs import RUNS, prepare_torch

    prepare_torch()
    outcome = RUNS[name].train(folder)
    outcome_file(folder, int(os.environ["RANK"])).write_text(json.dumps(outcome))
    return 0


def outcome_file(folder: Path, rank: int) -> Path:
    return folder / f"outcome-{rank}.json"


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 of every safetensors file under the folder, including checkpoints and saved rollouts."""
    from hashlib import sha256

    digests = {}
    for path in sorted(folder.rglob("*.safetensors")):
        digests[path.relative_to(folder).as_posix()] = sha256(path.read_bytes()).hexdigest()
    return digests


# ---- Comparing ----


@dataclass
class Comparison:
    """The comparison of one run of two trees. `first_difference` is empty if everything is equal."""

    name: str
    weights: bool = True
    optimizer: bool = True
    files: bool = True
    n_metrics: int = 0
    largest: float = 0.0
    first_difference: str = ""
    differences: int = field(default=0, repr=False)

    @property
    def equal(self) -> bool:
        return self.differences == 0

    def differs(self, where: str, before: Any, after: Any) -> None:
        """Counts a difference, and keeps the first one for the table."""
        self.differences += 1
        if not self.first_difference:
            self.first_difference = f"{where}: {shortened(before)} → {shortened(after)}"


MISSING = "(missing)"


def compare_run(name: str, before: dict[str, Any], after: dict[str, Any], *, all_logs: bool = True) -> Comparison:
    """Compares the records of a run in two trees. Metrics come first, as the first different metric helps most.

    Without `all_logs`, only the log of process 0 is compared.
    """
    result = Comparison(name)
    for side, record in (("before", before), ("after", after)):
        if "error" in record:
            result.weights = result.optimizer = result.files = False
            result.differs(f"failed {side}", record["error"].splitlines()[0], "")
    if not result.equal:
        return result
    n_processes = [len(record["processes"]) for record in (before, after)]
    if n_processes[0] != n_processes[1]:
        result.differs("number of processes", *n_processes)
    for rank, (old, new) in enumerate(zip(before["processes"], after["processes"], strict=False)):
        prefix = f"process {rank} " if n_processes[0] > 1 else ""
        compare_process(result, prefix, old, new, with_log=all_logs or rank == 0)
    result.files = compare_digests(result, "file ", before["files"], after["files"])
    return result


def compare_process(
    result: Comparison, prefix: str, before: dict[str, Any], after: dict[str, Any], *, with_log: bool
) -> None:
    if with_log:
        compare_numbers(result, prefix, dict(logged_values(before["log"])), dict(logged_values(after["log"])))
    compare_numbers(result, prefix, dict(leaves(before["values"], "")), dict(leaves(after["values"], "")))
    same_trained = compare_digests(result, prefix, {"trained": before["trained"]}, {"trained": after["trained"]})
    same_weights = compare_digests(result, f"{prefix}weight ", before["weights"], after["weights"])
    result.weights &= same_trained and same_weights
    result.optimizer &= compare_digests(result, f"{prefix}optimizer ", before["optimizer"], after["optimizer"])


def logged_values(log: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Every logged value, in the order of the log, with a name that contains metric and step."""
    seen: dict[str, int] = {}
    for entry in log:
        for metric in sorted(entry):
            where = f"{metric} at step {entry.get('step')}"
            seen[where] = seen.get(where, 0) + 1
            if seen[where] > 1:  # the step is logged by training and by evaluation
                where = f"{where} (log no. {seen[where]})"
            yield where, entry[metric]


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The numbers and texts in nested dicts and lists with their paths, in alphabetical order of the keys."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from leaves(value[key], f"{path}/{key}")
    elif isinstance(value, list):
        yield f"{path} length", len(value)
        for number, item in enumerate(value):
            yield from leaves(item, f"{path}[{number}]")
    else:
        yield path, value


def compare_numbers(result: Comparison, prefix: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    for where in in_order(before, after):
        old = before.get(where, MISSING)
        new = after.get(where, MISSING)
        result.n_metrics += 1
        if same(old, new):
            continue
        result.largest = max(result.largest, distance(old, new))
        result.differs(prefix + where, old, new)


def compare_digests(result: Comparison, prefix: str, before: dict[str, str], after: dict[str, str]) -> bool:
    """Whether all digests are equal and exist on both sides."""
    differences = result.differences
    for where in in_order(before, after):
        old = before.get(where, MISSING)
        new = after.get(where, MISSING)
        if old != new:
            result.differs(prefix + where, old, new)
    return result.differences == differences


def in_order(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The keys of both dicts, each once."""
    return list(before) + [key for key in after if key not in before]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def same(old: Any, new: Any) -> bool:
    if is_number(old) and is_number(new) and math.isnan(old) and math.isnan(new):
        return True
    return old == new


def distance(old: Any, new: Any) -> float:
    """|old - new|; infinite if one of them is missing, not a number, or NaN."""
    if not (is_number(old) and is_number(new)):
        return math.inf
    difference = abs(old - new)
    return math.inf if math.isnan(difference) else difference


def shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def compare(first: Path, second: Path) -> int:
    """Prints the comparison of two files; returns 1 if anything differs."""
    before = json.loads(first.read_text())
    after = json.loads(second.read_text())
    for side, record in (("before", before), ("after", after)):
        print(f"{side:6} {record['package']} ({record['api']} names)")
    for library in LIBRARIES:
        versions = [record["versions"].get(library) for record in (before, after)]
        if versions[0] != versions[1]:
            print(f"note: {library} is {versions[0]} before and {versions[1]} after: it may cause differences")
    all_logs = before["api"] == after["api"]
    if not all_logs:
        # In 0.1.0, `PPOTrainer.log` was right on process 0 only, whose log is the one that is saved and shown.
        print("note: in runs with several processes only the log of process 0 is compared (0.1.0 logged wrong values)")
    empty = {"error": "no such run"}
    comparisons = []
    for name in in_order(before["runs"], after["runs"]):
        old = before["runs"].get(name, empty)
        new = after["runs"].get(name, empty)
        comparisons.append(compare_run(name, old, new, all_logs=all_logs))
    print_table(comparisons)
    different = [comparison.name for comparison in comparisons if not comparison.equal]
    summary = {
        "runs": len(comparisons),
        "equal": len(comparisons) - len(different),
        "different": different,
        "metrics": sum(comparison.n_metrics for comparison in comparisons),
    }
    print(json.dumps(summary))
    return int(bool(different) or not comparisons)


def print_table(comparisons: list[Comparison]) -> None:
    print(f"{'run':26} {'weights':9} {'optimizer':9} {'files':9} {'metrics':>8} {'largest difference':>18}")
    for item in comparisons:
        equal = [("equal" if value else "different") for value in (item.weights, item.optimizer, item.files)]
        columns = f"{equal[0]:9} {equal[1]:9} {equal[2]:9} {item.n_metrics:8} {item.largest:18.3g}"
        print(f"{item.name:26} {columns}")
        if not item.equal:
            print(f"    first of {item.differences} differences: {item.first_difference}")


# ---- Another commit ----


def against(commit: str, names: list[str], keep: Path | None) -> int:
    """Trains with the library of `commit` and with that of this tree, and compares them.

    Both use the runs of this tree, so that runs added after `commit` are compared too.
    """
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        before = Path(temporary) / "before"
        extract(commit, before)
        results = keep or Path(temporary)
        results.mkdir(parents=True, exist_ok=True)
        trees = {results / "before.json": before, results / "after.json": ROOT}
        status = train_trees(trees, names, side_by_side=(os.cpu_count() or 1) > 1)
        for out, tree in trees.items():
            if not out.is_file():
                print(f"error: the golden run of {tree} wrote no result", file=sys.stderr)
                return 1
            package = json.loads(out.read_text())["package"]
            if not Path(package).is_relative_to(tree.resolve()):  # otherwise a tree could be compared with itself
                print(f"error: {package} was imported instead of the library in {tree}", file=sys.stderr)
                return 1
        return max(status, compare(*trees))


def extract(commit: str, folder: Path) -> None:
    """Extracts the library of a commit. Unlike a worktree, this leaves nothing in the repository."""
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", commit, "hf_rlhf_ext"]
    done = subprocess.run(command, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"error: {commit}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


def train_trees(trees: dict[Path, Path], names: list[str], *, side_by_side: bool) -> int:
    """Trains each tree in a separate process with one thread; returns 1 if one failed."""
    processes = []
    for out, tree in trees.items():
        out.unlink(missing_ok=True)
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE), "run", str(out.resolve()), *names]
        process = subprocess.Popen(command, env=environment)
        processes.append(process)
        if not side_by_side:
            process.wait()
    codes = [process.wait() for process in processes]
    return int(any(codes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("against", help="train a commit and this tree, and compare")
    command.add_argument("commit")
    command.add_argument("names", nargs="*", metavar="NAME", help="only these runs")
    command.add_argument("--keep", type=Path, metavar="FOLDER", help="write before.json and after.json there")
    command = commands.add_parser("run", help="train with the tree that is imported")
    command.add_argument("out", type=Path)
    command.add_argument("names", nargs="*", metavar="NAME", help="only these runs")
    command = commands.add_parser("compare", help="compare two files that `run` wrote")
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)
    command = commands.add_parser("worker", help="one of several processes of a run; started by `run`")
    command.add_argument("name")
    command.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "against":
        return against(args.commit, args.names, args.keep)
    if args.command == "run":
        return run(args.out, args.names)
    if args.command == "compare":
        return compare(args.before, args.after)
    return worker(args.name, args.folder)


if __name__ == "__main__":
    sys.exit(main())
