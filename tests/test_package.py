"""What a user installs: the wheel's content, and an import from outside the checkout that is light and checks TRL."""

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def run(*args: str, cwd: Path, path: list[Path] | None = None) -> subprocess.CompletedProcess:
    """Runs this Python outside the checkout, with `path` before everything else on its sys.path."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV"))}
    if path:
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if name.startswith("hf_rlhf_ext-0.1.0.dist-info/")}
    assert "hf_rlhf_ext-0.1.0.dist-info/licenses/LICENSE" in info
    assert {name for name in names - info if not name.startswith("hf_rlhf_ext/")} == set()
    package = ROOT / "hf_rlhf_ext"
    wanted = [*package.rglob("*.py"), package / "py.typed", *package.glob("*/templates/*")]
    assert names - info == {str(path.relative_to(ROOT)) for path in wanted if path.is_file()}


def test_the_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    meta = Parser().parsestr(archive.read("hf_rlhf_ext-0.1.0.dist-info/METADATA").decode())
    assert (meta["Name"], meta["Version"], meta["Requires-Python"]) == ("hf-rlhf-ext", "0.1.0", ">=3.11")
    assert meta["License-Expression"] == "Apache-2.0"
    assert set(meta.get_all("Provides-Extra")) >= {"quickstart", "quant", "data", "test", "dev"}


def test_the_tested_versions_are_within_the_ranges(wheel):
    from hf_rlhf_ext.compat import TRL_SUPPORTED

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    archive = zipfile.ZipFile(wheel)
    meta = Parser().parsestr(archive.read("hf_rlhf_ext-0.1.0.dist-info/METADATA").decode())
    for requirement in map(Requirement, meta.get_all("Requires-Dist")):
        name = requirement.name.lower()
        pin = pins.get(name) or pins[name.replace("-", "_")]
        assert requirement.specifier.contains(pin), requirement
        if name == "trl":
            assert requirement.specifier == TRL_SUPPORTED


LIGHT_IMPORT = """
import sys, time
start = time.perf_counter()
import hf_rlhf_ext
seconds = time.perf_counter() - start
heavy = {"torch", "trl", "transformers", "numpy", "datasets"} & set(sys.modules)
print(seconds, hf_rlhf_ext.__version__, hf_rlhf_ext.__file__, *sorted(heavy))
"""


def test_the_import_is_light_and_comes_from_the_installed_copy(installed, tmp_path):
    runs = [run("-c", LIGHT_IMPORT, cwd=tmp_path, path=[installed]) for _ in range(3)]
    assert [done.returncode for done in runs] == [0, 0, 0], runs[0].stderr
    outputs = [done.stdout.split() for done in runs]
    assert {tuple(output[1:]) for output in outputs} == {("0.1.0", str(installed / "hf_rlhf_ext" / "__init__.py"))}
    assert min(float(output[0]) for output in outputs) < 0.5


@pytest.mark.parametrize("found", ["1.12.0", "1.17.0"])
def test_a_trl_outside_the_range_is_one_line(installed, tmp_path, found):
    info = tmp_path / f"trl-{found}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trl\nVersion: {found}\n")
    done = run("-c", "import hf_rlhf_ext", cwd=tmp_path, path=[tmp_path, installed])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: hf_rlhf_ext needs trl<1.17,>=1.16, found {found}: pip install 'trl<1.17,>=1.16'"
    )


def test_no_trl_at_all_is_one_line(installed, tmp_path):
    import packaging

    (tmp_path / "packaging").symlink_to(
        Path(packaging.__file__).parent
    )  # all that compat.py needs; -S leaves out the rest
    done = run("-S", "-c", "import hf_rlhf_ext", cwd=tmp_path, path=[installed, tmp_path])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: hf_rlhf_ext needs trl<1.17,>=1.16, found none: pip ")


@pytest.mark.slow  # loads torch and TRL
def test_every_public_name_resolves(installed, tmp_path):
    code = """
import hf_rlhf_ext
assert set(hf_rlhf_ext._HOMES) | {"UserError"} == set(hf_rlhf_ext.__all__)
for name in hf_rlhf_ext.__all__:
    assert name in dir(hf_rlhf_ext)
    assert getattr(hf_rlhf_ext, name).__name__ == name
from hf_rlhf_ext import *
try:
    hf_rlhf_ext.nonsense
except AttributeError as error:
    print(error)
"""
    done = run("-c", code, cwd=tmp_path, path=[installed])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "module 'hf_rlhf_ext' has no attribute 'nonsense'"
