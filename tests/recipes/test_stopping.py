"""Ctrl-C, SIGTERM and the same command again, in every recipe that trains."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_callback import DefaultFlowCallback

from hf_rlhf_ext.checkpointing import is_complete
from hf_rlhf_ext.cli.output import MARKER
from tests.recipes.conftest import command

SIZES = {
    "sft": {"max_steps": 5, "per_device_train_batch_size": 4},
    "reward": {"max_steps": 5, "per_device_train_batch_size": 4, "eval_rows": 4},
    "ppo": {"max_steps": 6, "num_ppo_epochs": 2, "num_mini_batches": 2, "reward_funcs": "my_rewards.length"},
}
"""None of the numbers of steps is a whole number of epochs, and PPO stops in the middle of a rollout."""


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def at(monkeypatch):
    """at(3, signal.SIGINT) sends signals in the step after step 3; at(None, …) before the first one."""

    def send(step, *signals, error=None):
        def act(self, args, state, control, **kwargs):
            if state.global_step == (step or 0) and not sent:
                sent.append(step)
                for number in signals:
                    os.kill(os.getpid(), number)
                if error is not None:
                    raise error

        sent = []
        event = "on_train_begin" if step is None else "on_step_begin"
        monkeypatch.setattr(DefaultFlowCallback, event, act)

    return send


@pytest.fixture
def run(call, tmp_path):
    def run(recipe, output_dir="run", **changes):
        options = SIZES[recipe] | {"save_strategy": "no", "seed": 3, "output_dir": tmp_path / output_dir}
        return call(recipe, **(options | changes))

    return run


def said(finished):
    """The last line of stderr."""
    return finished.said[-1]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("recipe, number", [("sft", signal.SIGINT), ("reward", signal.SIGTERM), ("ppo", signal.SIGINT)])
def test_a_stop_saves_and_the_same_command_goes_on_exactly(run, at, tmp_path, recipe, number):
    straight = {"save_strategy": "steps", "save_steps": SIZES[recipe]["max_steps"]}
    assert run(recipe, "straight", **straight).code == 0
    at(2, number)
    stopped = run(recipe)
    assert stopped.code == 128 + number
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
    assert f"{name}: saving a checkpoint at the end of this step; Ctrl-C again ends at once" in stopped.said
    assert said(stopped).startswith(f"interrupted after step 3: saved checkpoint-3 in {tmp_path / 'run'}; resume with ")
    assert f"{recipe}.py --config" in said(stopped) and "Traceback" not in stopped.err
    done = run(recipe)
    assert done.code == 0, done.err
    assert f"Going on from checkpoint-3 of the stopped run in {tmp_path / 'run'}." in done.out
    assert_same(tmp_path / "straight", tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint-*"))  # save_strategy no
    refused = run(recipe)
    assert refused.code == 2
    assert "is not empty" in said(refused) and "finished" in said(refused) and "--overwrite true" in said(refused)
    if recipe != "ppo":  # whose resumed runs are tested with the trainer
        assert_takes_no_step_more(run, recipe, tmp_path / "straight", straight)


def assert_takes_no_step_more(run, recipe, folder, options):
    before = weights(folder)
    again = run(recipe, folder.name, **options, resume_from_checkpoint="true")
    assert again.code == 0, again.err
    after = weights(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{options['save_steps']}"]


def test_sigterm_is_said_by_ppo_too(run, at):
    at(1, signal.SIGTERM)
    stopped = run("ppo")
    assert stopped.code == 143
    assert "SIGTERM: saving a checkpoint" in stopped.err and "after step 2: saved checkpoint-2" in said(stopped)


@pytest.mark.parametrize("recipe", ["sft", pytest.param("ppo", marks=pytest.mark.slow)])
def test_a_second_ctrl_c_ends_at_once(run, at, tmp_path, recipe):
    at(3, signal.SIGINT, signal.SIGINT)
    stopped = run(recipe, save_strategy="steps", save_steps=2)
    assert stopped.code == 130
    assert said(stopped).startswith(f"interrupted in step 4: checkpoint-2 in {tmp_path / 'run'} is kept; resume with ")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run(recipe, save_strategy="steps", save_steps=2).code == 0


def test_before_the_first_step_nothing_is_lost(run, at):
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        at(None, number)
        stopped = run("reward", overwrite="true")
        assert stopped.code == code
        assert said(stopped).startswith("interrupted before the first step: nothing is lost; start again with ")
        assert "overwrite" not in said(stopped)


def test_other_options_are_named_unless_they_do_not_matter(run, at, workspace, tmp_path, write_jsonl):
    rows = [json.loads(line) for line in (workspace / "pairs.jsonl").read_text().splitlines()]
    data = write_jsonl(tmp_path / "mine.jsonl", rows)
    at(2, signal.SIGINT)
    assert run("reward", dataset_name=data).code == 130
    other = run("reward", dataset_name=data, learning_rate=0.5, lora_r=2)
    assert other.code == 2
    assert "learning_rate: " in said(other) and "0.5 now" in said(other) and "lora_r: " in said(other)
    assert "--overwrite true" in said(other) and "--resume_from_checkpoint true" in said(other)
    write_jsonl(data, rows[:-1])
    assert "dataset_name: mine.jsonl (content " in said(run("reward", dataset_name=data))
    write_jsonl(data, rows)
    assert str(tmp_path) not in (tmp_path / "run" / MARKER).read_text()
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    done = run("reward", "moved", dataset_name=data, logging_steps=1, save_total_limit=3, verbose="true")
    assert done.code == 0, done.err
    assert "Going on from checkpoint-3" in done.out


def test_explicit_options_keep_their_meaning(run, at, tmp_path):
    at(2, signal.SIGINT)
    assert run("sft").code == 130
    refused = run("sft", resume_from_checkpoint="false")
    assert refused.code == 2 and "is not empty: pass --resume_from_checkpoint true" in said(refused)
    at(4, signal.SIGINT)
    stopped = run("sft", learning_rate=0.5, resume_from_checkpoint="true", max_steps=7)
    assert "after step 5" in said(stopped) and "resume_from_checkpoint" not in said(stopped)
    done = run("sft", learning_rate=0.5, max_steps=7)  # the options of the last one count
    assert done.code == 0 and "Going on from checkpoint-5" in done.out
    again = run("sft", overwrite="true")
    assert again.code == 0 and "Going on" not in again.out


@pytest.mark.slow
def test_a_run_that_died_before_its_first_checkpoint_starts_again(run, at, tmp_path):
    at(2, error=ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        run("ppo")
    (tmp_path / "run" / "log.jsonl").touch()
    again = run("ppo")
    assert again.code == 0, again.err
    assert "was stopped before its first checkpoint: it starts from the beginning" in again.out


@pytest.mark.slow
def test_a_stop_in_the_middle_of_an_epoch_keeps_both_checkpoints(run, at, tmp_path):
    """Nothing is evaluated at the stop, and the limit of one checkpoint does not delete what was saved at it."""
    changes = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 6, "per_device_train_batch_size": 2}
    changes |= {"load_best_model_at_end": "true", "save_total_limit": 1, "eval_rows": 4}  # four steps in an epoch
    at(4, signal.SIGINT)
    assert "after step 5: saved checkpoint-5" in said(run("reward", **changes))
    saved = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert saved == ["checkpoint-4", "checkpoint-5"]
    state = json.loads((tmp_path / "run" / "checkpoint-5" / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "eval_loss" in log] == [4]
    done = run("reward", **changes)
    assert done.code == 0, done.err


@pytest.mark.slow
def test_an_ensemble_names_its_member(run, at, tmp_path):
    chosen = {"members": 2, "max_steps": 3}
    at(2, signal.SIGINT)  # in the first member
    first = run("reward", **chosen)
    assert said(first).startswith("interrupted in member 1 of 2, after step 3: saved checkpoint-3 in ")
    assert "finished members are kept; resume with the same command" in said(first)
    done = run("reward", **chosen)
    assert done.code == 0, done.err
    assert "Going on with the stopped run" in done.out
    assert "its run has finished" in said(run("reward", **chosen))


def test_ctrl_c_during_the_imports_is_one_line(tmp_path, recipes_path):
    (tmp_path / "datasets.py").write_text("raise KeyboardInterrupt")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, recipes_path / "sft.py"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted\n")


def test_two_processes_do_not_train_in_one_folder(run, tmp_path):
    (tmp_path / "run").mkdir()
    holder = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(1, flush=True)"
    )
    holder += "; sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "run")], **pipes) as other:
        other.stdout.readline()
        refused = run("sft")
        other.stdin.close()
    assert refused.code == 2 and "output_dir: another process runs in" in said(refused)


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_several_processes_stop_together(workspace, tmp_path, number):
    recipe = {signal.SIGINT: "sft", signal.SIGTERM: "ppo"}[number]
    options = SIZES[recipe] | {"max_steps": 4000, "output_dir": tmp_path / "run", "save_steps": 2}
    if recipe == "ppo":  # in the middle of a rollout, which takes longer than torchrun waits by default
        options |= {"reward_funcs": "my_rewards.slow", "save_steps": 100}
    words = command(workspace, recipe, options | {"save_strategy": "steps"})
    # In a session of its own, whose processes get Ctrl-C together, as in a terminal.
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    start += "from hf_rlhf_ext.cli.main import main; main(sys.argv[1:])"
    launched = [sys.executable, "-c", start, recipe, "--num_processes", "2", *words]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    calls = tmp_path / "calls"
    calls.mkdir()
    env |= {"CALLS": str(calls), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(launched, cwd=workspace, env=env, start_new_session=True, **pipes) as group:
        until = time.monotonic() + 240
        while time.monotonic() < until and not list((tmp_path / "run").glob("checkpoint-*")):
            if len(list(calls.iterdir())) == 2:
                break
            time.sleep(0.2)
        if number == signal.SIGINT:
            os.killpg(group.pid, number)
        else:  # a batch system may only know the process that it started
            group.send_signal(number)
        text = group.communicate(timeout=60)[0]
    assert group.returncode == 128 + number, text
    lines = [line for line in text.replace("\r", "\n").splitlines() if "interrupted" in line]
    assert len(lines) == 1 and "interrupted after step" in lines[0], text
    assert f"hf-rlhf {recipe} --num_processes 2 --config" in lines[0]
    assert "Traceback" not in text and "signal" not in text
    if recipe == "ppo":
        assert "SIGTERM: saving a checkpoint of the last step, without this rollout; Ctrl-C again ends at once" in text
        assert "interrupted after step 4: saved checkpoint-4" in lines[0]
        assert is_complete(tmp_path / "run" / "checkpoint-4")
