"""`make test-newest`: what it reads of pip and pytest, and how it says which seam moved. Nothing is installed here."""

import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="2" tests="5">
<testcase classname="tests.test_compat" name="test_contract_of_use_adapter[other]" time="0.5">
  <properties><property name="seam" value="trl.trainer.utils.use_adapter"/></properties>
  <failure message="AttributeError: module has no attribute">
def test():
E   AttributeError: module 'trl.trainer.utils' has no attribute 'use_adapter'
E     a second line
tests/test_compat.py:3: AttributeError</failure></testcase>
<testcase classname="tests.test_compat" name="test_contract_of_use_adapter[None]" time="0.5">
  <properties><property name="seam" value="trl.trainer.utils.use_adapter"/></properties>
  <failure message="AssertionError: assert 1 == 2">E   AssertionError: assert 1 == 2</failure></testcase>
<testcase classname="tests.test_compat" name="test_fine" time="1.0"/>
<testcase classname="tests.ppo.test_x" name="test_left_out" time="1.0"><skipped message="no"/></testcase>
<testcase classname="" name="tests.ppo.test_y" time="0.0">
  <error message="collection failure">E   ImportError: cannot import name 'a' from 'trl'</error></testcase>
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def newest():
    spec = importlib.util.spec_from_file_location("newest", ROOT / "tests" / "newest.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["newest"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_the_direct_dependencies_are_those_of_setup_cfg_without_torch(newest):
    names = newest.direct_dependencies()
    assert {"accelerate", "bitsandbytes", "datasets", "peft", "transformers", "trl"} <= set(names)
    assert "torch" not in names and "pytest" not in names


def test_the_report_of_pip(newest):
    packages = [{"name": "Transformers", "version": "5.24.0"}, {"name": "huggingface_hub", "version": "2.5.0"}]
    report = {"install": [{"metadata": package} for package in packages]}
    assert newest.versions_of(report) == {"transformers": "5.24.0", "huggingface-hub": "2.5.0"}


def test_the_report_of_pytest(newest):
    result = newest.read_report(REPORT)
    assert (result.passed, result.seconds, len(result.failures)) == (1, 3.0, 3)
    first, _, broken = result.failures
    assert first.test == "tests/test_compat.py::test_contract_of_use_adapter[other]"
    assert first.seam == "trl.trainer.utils.use_adapter"
    assert first.reason == "AttributeError: module 'trl.trainer.utils' has no attribute 'use_adapter'"
    assert broken.test == "tests/ppo/test_y.py" and broken.reason == "ImportError: cannot import name 'a' from 'trl'"


def test_the_summary_names_a_seam_once_with_both_versions(newest):
    contracts = newest.read_report(REPORT)
    broken = contracts.failures.pop()
    others = newest.Result(7, 12.4, [broken])
    lines = newest.summary({"trl": "1.17.0"}, contracts, others)
    seam = f"  trl.trainer.utils.use_adapter (trl {version('trl')} -> 1.17.0)"
    assert lines.count(seam) == 1
    place = lines.index(seam)
    assert lines[place - 1] == "seams that moved:" and lines[place - 2] == "contract tests: 2 failed, 1 passed in 3 s"
    assert lines[place + 1].startswith("      test_contract_of_use_adapter[other]: AttributeError")
    assert lines[-2] == "other tests: 1 failed, 7 passed in 12 s"
    assert lines[-1] == "  tests/ppo/test_y.py: ImportError: cannot import name 'a' from 'trl'"


def test_a_seam_of_a_package_that_stayed_and_one_without_a_seam(newest):
    failures = [
        newest.Failure("a.py::test_a", "peft.peft_model.PeftModel", "x"),
        newest.Failure("a.py::test_b", "", "y"),
    ]
    lines = newest.summary({"transformers": "9.0"}, newest.Result(0, 0.0, failures), newest.Result(1, 0.0, []))
    assert f"  peft.peft_model.PeftModel (peft {version('peft')}, unchanged)" in lines
    assert "  a.py::test_b" in lines and "seams that moved:" in lines


def test_what_cannot_be_imported_is_said_once(newest):
    reason = "ImportError: cannot import name 'use_adapter' from 'hf_rlhf_ext.compat'"
    failures = [newest.Failure(f"a.py::test_{seam}", seam, reason) for seam in ("trl.a", "trl.b", "trl.c")]
    failures.append(newest.Failure("a.py::test_name", "trl.trainer.utils.use_adapter", "AttributeError: no"))
    lines = newest.summary({"trl": "1.17.0"}, newest.Result(0, 0.0, failures), newest.Result(1, 0.0, []))
    assert [line for line in lines if "ImportError" in line] == [f"  3 tests: {reason}"]
    assert not any("trl.a" in line for line in lines)
    assert any(line.startswith("  trl.trainer.utils.use_adapter (trl") for line in lines)


def test_the_folder_is_made_once_and_again_for_other_versions(newest, tmp_path, monkeypatch):
    calls = []

    def pip(*words):
        calls.append(words[-1])
        folder = Path(words[words.index("--target") + 1])
        name, _, number = words[-1].partition("==")
        (folder / f"{name}-{number}.dist-info").mkdir(parents=True)
        (folder / f"{name}-{number}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {number}\n")

    monkeypatch.setattr(newest, "pip", pip)
    monkeypatch.setattr(newest, "FOLDER", tmp_path / "newest")
    newest.install({"transformers": "5.24.0"})
    newest.install({"transformers": "5.24.0"})
    assert calls == ["transformers==5.24.0"]
    newest.install({"trl": "1.17.0"})
    assert calls[1:] == ["trl==1.17.0"] and [path.name for path in tmp_path.iterdir()] == ["newest"]
