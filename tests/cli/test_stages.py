"""Stages in one folder: what is kept, what is run again, and what is refused."""

import json
import shlex
import subprocess
import sys

import pytest

from hf_rlhf_ext.cli.stages import StageRunner, has_manifest, peak_memory_gb
from hf_rlhf_ext.cli.stopping import line_of
from hf_rlhf_ext.errors import UserError

SETTINGS = {"seed": 0, "size": "small", "noise": 0.1}


@pytest.fixture
def runner(tmp_path):
    return lambda **changes: StageRunner(tmp_path, SETTINGS | changes, ["data", "sft", "report"])


def test_a_finished_stage_is_not_run_again(runner, capsys):
    first = runner()
    assert first.run("data", "a few rows", lambda: {"train": 7}) == {"train": 7}
    assert capsys.readouterr().out == "[1/3] data: a few rows (00:00 elapsed)\n"  # one line per stage
    second = runner()
    assert second.is_finished("data") and not second.is_finished("sft")
    assert second.run("data", "a few rows", lambda: pytest.fail("it ran again")) == {"train": 7}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("[1/3] data: finished earlier, kept") and "--overwrite true" in line
    assert second.run("sft", "a few rows", lambda: {}) == {} and second.seconds.keys() == {"data", "sft"}


def test_a_stage_that_fails_is_run_again(runner):
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        runner().run("data", "a few rows", stopped)  # the very first stage: nothing is finished yet
    line = line_of(caught.value)
    assert line.startswith("interrupted in stage 1 of 3 (data), which starts again; finished stages are kept; resume")
    assert runner().seconds == {}
    assert runner().run("data", "a few rows", lambda: {"train": 7}) == {"train": 7}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"size": "full", "noise": 0.0}, "noise: 0.1 then, 0.0 now; size: small then, full now"),
        ({"model": "other"}, "model: None then, other now"),
    ],
)
def test_other_settings_are_refused_before_anything_is_done(runner, tmp_path, changes, named):
    runner().run("data", "a few rows", lambda: {})
    before = (tmp_path / "manifest.json").read_text()
    with pytest.raises(UserError, match="other settings .*--overwrite true to delete its finished stages") as caught:
        runner(**changes)
    assert f"({named})" in str(caught.value) and "--overwrite true" in str(caught.value)
    assert (tmp_path / "manifest.json").read_text() == before


def test_settings_that_nothing_depends_on_yet_may_change(tmp_path):
    names = ["data", "sft"]
    StageRunner(tmp_path, SETTINGS, names).run("data", "a few rows", lambda: {})
    changed = {**SETTINGS, "noise": 0.2, "steps": 3}
    changed.pop("size")
    StageRunner(tmp_path, changed, names, changeable=["noise", "steps", "size"])
    assert json.loads((tmp_path / "manifest.json").read_text())["settings"] == changed
    with pytest.raises(UserError, match="noise: 0.2 then, 0.1 now"):
        StageRunner(tmp_path, {**changed, "noise": 0.1}, names, changeable=["steps"])
    assert StageRunner(tmp_path, changed, names).is_finished("data")


def test_the_manifest_is_written_whole_or_not_at_all(runner, tmp_path):
    runner().run("data", "a few rows", lambda: {"train": 7})
    before = (tmp_path / "manifest.json").read_text()
    with pytest.raises(TypeError):
        runner().run("sft", "a few rows", lambda: {"not": object()})  # JSON has no such thing
    assert (tmp_path / "manifest.json").read_text() == before
    (tmp_path / "manifest.tmp").mkdir()  # stands for a disk that fails while the new state is written
    with pytest.raises(OSError):
        runner().run("sft", "a few rows", dict)
    assert (tmp_path / "manifest.json").read_text() == before


def test_seconds_and_memory_are_those_of_all_runs(runner, tmp_path):
    runner().run("data", "a few rows", dict)
    state = json.loads((tmp_path / "manifest.json").read_text())
    assert 0.01 < state["peak_memory_gb"] < 100 and 0 <= state["stages"]["data"]["seconds"] < 5
    state["peak_memory_gb"], state["stages"]["data"]["seconds"] = 1e6, 123.0
    (tmp_path / "manifest.json").write_text(json.dumps(state))
    resumed = runner()
    resumed.run("sft", "a few rows", dict)
    assert resumed.peak_memory_gb == 1e6 and resumed.seconds["data"] == 123.0


def test_a_folder_of_an_earlier_version_is_continued(runner, tmp_path):
    assert not has_manifest(tmp_path)
    stages = {"data": {"seconds": 2.0, "measured": {"train": 7}}}
    state = {"settings": SETTINGS, "stages": stages, "peak_memory_gb": 1.5}
    (tmp_path / "progress.json").write_text(json.dumps(state))
    assert has_manifest(tmp_path)
    resumed = runner()
    assert resumed.run("data", "a few rows", lambda: pytest.fail("it ran again")) == {"train": 7}
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_peak_memory_counts_this_process_and_its_children():
    code = (
        "import subprocess, sys\n"
        "from hf_rlhf_ext.cli.stages import peak_memory_gb\n"
        "before = peak_memory_gb()\n"
        "subprocess.run([sys.executable, '-c', 'x = bytearray(b\"x\" * 400_000_000)'], check=True)\n"
        "print(before, peak_memory_gb())"
    )
    # Through a shell: Linux counts what the forking process held, here all of pytest, as the child's own maximum.
    command = f"{shlex.join([sys.executable, '-c', code])}; exit $?"
    out = subprocess.run(["sh", "-c", command], check=True, capture_output=True, text=True).stdout
    before, after = map(float, out.split())
    assert 0.01 < before < 0.39 and 0.4 < after < 1.0
    assert peak_memory_gb() > 0.01
