"""What several processes say of failures, with the environment and the error files that torchrun gives them."""

import json
import logging
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hf_rlhf_ext.cli import processes
from hf_rlhf_ext.cli.launch import _status_of
from hf_rlhf_ext.cli.parsing import run_recipe
from hf_rlhf_ext.errors import UserError


@pytest.fixture
def process(monkeypatch, tmp_path):
    """process(1) makes this process the second of two that torchrun started."""
    monkeypatch.setattr(processes, "PATIENCE", 0.2)

    def be(number):
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", "2")
        path = tmp_path / str(number) / "error.json"
        path.parent.mkdir(exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))

    return be


def ended(error, capfd):
    """Exit status and stderr of a recipe that raises an error; None if the error goes on, as with a traceback."""

    def main():
        print("progress")
        print("warning", file=sys.stderr)
        raise error

    try:
        run_recipe(main)
    except SystemExit as stop:
        status = stop.code
    except type(error):
        status = None
    return status, capfd.readouterr()


def test_only_the_first_process_prints(process, capfd):
    process(0)
    status, said = ended(UserError("rows: none"), capfd)
    assert (status, said.out, said.err) == (2, "progress\n", "warning\nerror: rows: none\n")
    process(1)
    status, said = ended(UserError("rows: none"), capfd)
    assert (status, said.out, said.err) == (2, "", "")  # the first one has said it
    status, said = ended(UserError("rows: two"), capfd)
    assert (status, said.out, said.err) == (2, "", "error (process 1): rows: two\n")


def test_torchrun_reads_the_line_as_the_cause(process, tmp_path, capfd):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    process(1)
    ended(UserError("rows: none"), capfd)
    found = ProcessFailure(local_rank=1, pid=7, exitcode=2, error_file=str(tmp_path / "1" / "error.json"))
    other = ProcessFailure(local_rank=0, pid=6, exitcode=-15, error_file=str(tmp_path / "0" / "error.json"))
    error = ChildFailedError("hf_rlhf_ext", {0: other, 1: found})
    assert "rows: none" in str(error).partition("Root Cause")[2]
    assert _status_of(error.failures) == 2


def test_a_process_says_nothing_of_the_failure_of_another(process, capfd):
    process(1)
    ended(UserError("rows: none"), capfd)
    process(0)
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4321")
    for error, status in ((lost, 1), (KeyboardInterrupt(), 130)):
        assert ended(error, capfd)[0] == status
    ended(lost, capfd)
    assert ended(KeyboardInterrupt(), capfd)[1].err == "warning\n"
    assert ended(ValueError("a bug"), capfd)[0] is None  # with its traceback


def test_a_connection_is_lost_to_a_process_that_said_nothing(process, capfd):
    process(0)
    status, said = ended(RuntimeError("[gloo] Connection closed by peer\nat x.cc"), capfd)
    assert status == 1 and said.err.startswith("warning\nerror: the connection to another process is lost")
    assert said.err.count("\n") == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_no_memory_is_one_line(capfd, error):
    status, said = ended(error, capfd)
    assert status == 2 and said.err.startswith("warning\nerror: out of memory") and said.err.count("\n") == 2
    assert "per_device_train_batch_size" in said.err and "activation_checkpointing" in said.err


def test_a_process_that_the_system_killed_is_said(capfd):
    def failed(code, file="<N/A>"):
        return SimpleNamespace(exitcode=code, error_file=file)

    assert _status_of({0: failed(-signal.SIGTERM), 1: failed(-signal.SIGKILL)}) == 137
    assert capfd.readouterr().err == (
        "error: process 1 was ended by SIGKILL, often as the machine had no memory left\n"
    )
    assert _status_of({0: failed(1), 1: failed(2, "1/error.json")}) == 2  # the first one has only lost its partner
    assert _status_of({0: failed(143), 1: failed(-15)}) == 143
    assert capfd.readouterr().err == ""


def test_one_process_instead_of_several_is_said_once(monkeypatch, capfd):
    for name in (*processes.SIZES, *processes.RANKS):
        monkeypatch.delenv(name, raising=False)
    # What `accelerate launch --cpu --num_processes 2` sets.
    env = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_DYNAMO_MODE": "default"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_RLHF_EXT_SAID_ALONE", "")
    monkeypatch.delenv("HF_RLHF_EXT_SAID_ALONE")
    run_recipe(lambda: run_recipe(lambda: None))  # as the command runs a recipe
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: this is a single process") and "--num_processes N" in line
    for name in env:
        with monkeypatch.context() as patch:
            patch.delenv(name)
            assert not processes.is_started_alone()
    monkeypatch.setenv("PMI_SIZE", "2")  # with MPI, there are two
    monkeypatch.setenv("PMI_RANK", "1")
    assert not processes.is_started_alone() and processes.rank() == 1
    monkeypatch.delenv("MASTER_ADDR")  # runs of their own, that Slurm has started side by side
    assert processes.is_first() and processes.count() == 1


def test_the_other_processes_hide_warnings_of_libraries():
    code = "import hf_rlhf_ext.cli.quiet, logging, warnings, os; logging.getLogger('x').warning('one')\n"
    code += "warnings.warn('two'); logging.getLogger('x').error('three'); print(os.environ['TORCH_CPP_LOG_LEVEL'])"
    env = os.environ | {"RANK": "1", "WORLD_SIZE": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("ERROR\n", "three\n")
    assert logging.root.manager.disable < logging.WARNING  # a single process warns


def test_the_file_of_a_failure_is_json_that_nobody_reads_half(process, tmp_path):
    process(0)
    processes.record("error: x")
    assert json.loads((tmp_path / "0" / "error.json").read_text())["message"]["message"] == "error: x"
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["error.json"]
