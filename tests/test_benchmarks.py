"""The scripts in benchmarks/, which CI never runs: what they import is there, and so is the command that they name."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
OF_THIS_CHECKOUT = [path for path in SCRIPTS if not path.stem.startswith("golden")]
"""The golden run knows the names of earlier commits too."""


def test_there_are_scripts():
    assert {"bench_data", "label_noise", "ppo", "ppo_memory", "ppo_study", "reward_model", "reward_study"} <= {
        path.stem for path in SCRIPTS
    }


@pytest.mark.parametrize("path", OF_THIS_CHECKOUT, ids=lambda path: path.stem)
def test_what_it_imports_of_the_library_exists(path):
    """Imports inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_rlhf_ext":
            module = import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{path.name}:{node.lineno}: {node.module}.{alias.name}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_command_in_its_docstring_runs_it(path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), re.M):
        (recipe,) = re.findall(rf"^{target}: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
        assert f"benchmarks/{path.name}" in recipe


def test_pytest_collects_none_of_them_by_itself():
    assert not any(path.stem.startswith("test_") or path.stem.endswith("_test") for path in SCRIPTS)
