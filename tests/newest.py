"""Tests on other versions of the dependencies, and what moved in them: `make test-newest`.

python tests/newest.py                                      # the newest release of every direct dependency
python tests/newest.py --with transformers==5.24.0          # these versions, beside the installed ones

The packages go into one folder, which Python looks through before the environment: the environment itself stays as it
is, and torch stays the installed one unless --with names it. What is in the folder from an earlier run is used again.
The contract tests (tests/test_compat.py) run first. They watch the seams: the names and methods of other libraries
that this one is built on. The summary at the end names each seam that moved, and the other tests that fail.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, packages_distributions, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hf_rlhf_ext.compat import ANY_TRL

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-newest"
CONTRACTS = "tests/test_compat.py"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with", dest="wanted", nargs="+", default=[], metavar="NAME==VERSION")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="the tests after the contract tests")
    parser.add_argument("--workers", default="2", help="processes of pytest")
    options = parser.parse_args(argv)
    versions = resolve(options.wanted or direct_dependencies())
    if not versions:
        print("nothing to test: the installed versions are what was asked for")
        return 0
    print("tested beside the installed packages:", *changes(versions), sep="\n  ", flush=True)
    install(versions)
    with tempfile.TemporaryDirectory() as scratch:
        contracts = run_tests(Path(scratch) / "contracts.xml", [CONTRACTS, "-n", "0"])
        usual = ["-n", options.workers, "--dist", "loadgroup", "--no-loadscope-reorder", f"--deselect={CONTRACTS}"]
        others = run_tests(
            Path(scratch) / "others.xml", [*options.tests, *usual, "-m", "not gpu and not gptq and not slow"]
        )
    print("\n".join(summary(versions, contracts, others)))
    return int(bool(contracts.failures or others.failures))


# ---- The packages ----


def direct_dependencies() -> list[str]:
    """What the library itself requires, without torch, which would be gigabytes."""
    found = [Requirement(line) for line in requires("hf-rlhf-ext") or ()]
    return [each.name for each in found if each.marker is None and each.name != "torch"]


def resolve(wanted: Iterable[str]) -> dict[str, str]:
    """The versions that pip would install for these requirements, by package: the newest ones that go together.

    Packages that are installed in this version are left out.
    """
    wanted = list(wanted)
    with tempfile.TemporaryDirectory() as scratch:
        report, limits = Path(scratch) / "report.json", Path(scratch) / "limits.txt"
        keeps_torch = "torch" not in {Requirement(each).name for each in wanted}
        limits.write_text(f"torch=={version('torch').partition('+')[0]}\n" if keeps_torch else "")
        pip("install", "--dry-run", "--upgrade", "--report", str(report), "-c", str(limits), *wanted)
        return versions_of(json.loads(report.read_text()))


def versions_of(report: dict) -> dict[str, str]:
    """The packages of pip's report on an installation, with their versions."""
    found = [each["metadata"] for each in report["install"]]
    return {canonicalize_name(each["name"]): each["version"] for each in found}


def install(versions: dict[str, str]) -> None:
    """Makes the folder with these packages and nothing else, unless it is there."""
    present = {canonicalize_name(each.name): each.version for each in distributions(path=[str(FOLDER)])}
    if present != versions:
        unfinished = FOLDER.with_name(f"{FOLDER.name}.new")  # a run that is interrupted leaves no half-filled folder
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(FOLDER, ignore_errors=True)
        pip(
            "install",
            "--no-deps",
            "--no-compile",
            "--target",
            str(unfinished),
            *(f"{name}=={n}" for name, n in versions.items()),
        )
        unfinished.rename(FOLDER)


def pip(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *words])
    if done.returncode:
        raise SystemExit(f"error: pip {words[0]} failed: the lines above say why")


def changes(versions: dict[str, str]) -> list[str]:
    """A line for each package: its version, and the installed one."""
    return [f"{name} {new} ({installed(name) or 'not'} installed)" for name, new in sorted(versions.items())]


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# ---- The tests ----


@dataclass
class Failure:
    """One test that failed.

    Attributes:
        test: its name.
        seam: what it watches in another library, as `module.name`; empty if it is no contract test.
        reason: first line of the error.
    """

    test: str
    seam: str
    reason: str


@dataclass
class Result:
    """How many tests passed, in how many seconds, and those that failed."""

    passed: int
    seconds: float
    failures: list[Failure]


def run_tests(report: Path, words: list[str]) -> Result:
    """Runs pytest with the packages of the folder. What it prints is shown."""
    # Which TRL is supported is what the tests shall tell.
    environment = os.environ | {"PYTHONPATH": str(FOLDER), ANY_TRL: "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-o", "junit_family=xunit1", *words]  # the one that has properties
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    result = read_report(report.read_text()) if report.is_file() else Result(0, 0.0, [])
    if status not in (0, 5) and not result.failures:  # 5: every test was left out
        result.failures.append(Failure("pytest", "", f"ended with status {status}: its last lines say why"))
    return result


def read_report(text: str) -> Result:
    """Reads pytest's JUnit XML."""
    passed, seconds, failures = 0, 0.0, []
    for case in ElementTree.fromstring(text).iter("testcase"):
        seconds += float(case.get("time", 0))
        problem = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        if problem is None:
            passed += case.find("skipped") is None
            continue
        seams = [each.get("value") for each in case.iter("property") if each.get("name") == "seam"]
        file, name = case.get("classname", "").replace(".", "/"), case.get("name", "")
        # A file that could not be imported is a test case without a class, named as the module.
        name = f"{file}.py::{name}" if file else f"{name.replace('.', '/')}.py"
        failures.append(Failure(name, seams[0] if seams else "", _reason(problem)))
    return Result(passed, seconds, failures)


def _reason(problem: ElementTree.Element) -> str:
    """The line with the exception, also of a file that could not be imported, whose message says only that."""
    marked = re.findall(r"^E +(\w*(?:Error|Exception|Exit)\b.*)", problem.text or "", re.MULTILINE)
    line = marked[-1] if marked else (problem.get("message") or "").splitlines()[0]
    return line if len(line) <= 200 else f"{line[:200]} …"


# ---- The summary ----


def summary(versions: dict[str, str], contracts: Result, others: Result) -> list[str]:
    """Lines that say which seam moved, in which package from which version to which, and what else fails."""
    lines = ["", "tested beside the installed packages:", *(f"  {line}" for line in changes(versions))]
    lines.append(f"contract tests: {_counted(contracts)}")
    unchecked = _kept_from_running(contracts.failures)
    moved = [failure for failure in contracts.failures if failure.reason not in unchecked]
    if moved:
        lines.append("seams that moved:")
    for seam in dict.fromkeys(failure.seam or failure.test for failure in moved):
        lines.append(f"  {seam}{_of_package(seam, versions)}")
        mine = [failure for failure in moved if (failure.seam or failure.test) == seam]
        lines += [f"      {failure.test.rpartition('::')[2]}: {failure.reason}" for failure in mine]
    if unchecked:
        lines.append("seams that cannot be checked before that is repaired:")
        lines += [f"  {number} tests: {reason}" for reason, number in unchecked.items()]
    lines.append(f"other tests: {_counted(others)}")
    return lines + [f"  {failure.test}: {failure.reason}" for failure in others.failures]


def _kept_from_running(failures: Iterable[Failure]) -> dict[str, int]:
    """Errors of imports that several seams share, with their numbers: a trainer that needs a name which moved."""
    seams: dict[str, list[str]] = {}
    for failure in failures:
        if re.match(r"(Import|ModuleNotFound)Error\b", failure.reason):
            seams.setdefault(failure.reason, []).append(failure.seam)
    return {reason: len(found) for reason, found in seams.items() if len(set(found)) > 1}


def _counted(result: Result) -> str:
    return f"{len(result.failures)} failed, {result.passed} passed in {result.seconds:.0f} s"


def _of_package(seam: str, versions: dict[str, str]) -> str:
    """The package of a seam in brackets, with the installed and the tested version."""
    module = seam.partition(".")[0]
    for package in packages_distributions().get(module, ()):
        old, new = installed(package), versions.get(canonicalize_name(package))
        return f" ({package} {old} -> {new})" if new else f" ({package} {old}, unchanged)"
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
