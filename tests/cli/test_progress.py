"""The lines and the bar that recipes show, and the full log that they keep, on real trainers."""

import ast
import json
import logging
import math
import os
import pty
import re
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hf_rlhf_ext.cli.progress import (
    LOG_FILE,
    MAX_WIDTH,
    LogFile,
    TerminalProgress,
    TrainingClock,
    read_log,
    readable,
    show_progress,
    shown_metrics,
)

PPO_LOG = {
    "loss": -0.012345,
    "grad_norm": 0.42,
    "learning_rate": 1e-5,
    "objective/kl": 1.2345,
    "objective/kl_coef": 0.05,
    "objective/scores": 0.98765,
    "policy/approxkl_avg": 0.01,
    "rewards/proxy/mean": 0.98765,
    "epoch": 0.5,
}
PPO_EVALUATION = {
    "eval_objective/scores": 0.4253,
    "eval_objective/kl": 0.1634,
    "eval_rewards/proxy/mean": 0.4253,
    "eval_rewards/gold/mean": 0.032,
    "eval_runtime": 50.66,
    "epoch": 0.5,
}
REWARD_MODEL_EVALUATION = {"eval_loss": 0.693147, "eval_accuracy": 0.5588, "eval_nll": 0.69, "eval_runtime": 0.25}
SUMMARY = {"train_runtime": 122.4, "train_samples_per_second": 0.262, "train_loss": 2.924, "epoch": 1.0}


class OneWeight(torch.nn.Module):
    """The smallest model that Trainer trains."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, labels=None):
        loss = (self.weight * x - 1).square().mean()
        return {"loss": loss, "logits": x}


@pytest.fixture
def arguments(tmp_path):
    """TrainingArguments for a run of a few steps in `tmp_path`."""

    def make(**changes) -> TrainingArguments:
        options = {"max_steps": 4, "logging_steps": 1, "save_steps": 2, "per_device_train_batch_size": 1}
        options |= {"use_cpu": True, "report_to": "none", "output_dir": str(tmp_path)}
        return TrainingArguments(**(options | changes))

    return make


@pytest.fixture
def trainer(arguments):
    """Makes a real trainer that shows its progress as the recipes' trainers do."""

    def make(verbose: bool = False, **changes) -> Trainer:
        rows = [{"x": float(i), "labels": 0.0} for i in range(4)]
        made = Trainer(OneWeight(), arguments(**changes), train_dataset=rows, eval_dataset=rows[:2])
        show_progress(made, verbose=verbose)
        return made

    return make


@pytest.fixture
def shown(arguments, capsys):
    """What `TerminalProgress` prints for one log after `step` of `max_steps` steps."""

    def show(logs: dict, step: int = 8, max_steps: int = 32, rewards: tuple[str, ...] = (), rank: int = 0) -> str:
        callback = TerminalProgress(rewards)
        state = TrainerState(max_steps=max_steps, is_world_process_zero=rank == 0)
        args = arguments()
        callback.on_train_begin(args, state, TrainerControl())
        state.global_step = step
        callback.on_log(args, state, TrainerControl(), logs=logs)
        return capsys.readouterr().out

    return show


# Lines


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0"),
        (0.5, "0.500"),
        (-0.012345, "-0.0123"),
        (1.2345, "1.23"),
        (99.96, "100"),
        (122.4, "122"),
        (999.7, "1,000"),
        (12345.6, "12,346"),
        (1.5e-5, "1.50e-05"),
        (7, "7.00"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert readable(value) == text


@pytest.mark.parametrize(
    "logs, line",
    [
        (PPO_LOG, "step  8/32  reward 0.988  KL 1.23 nats  loss -0.0123"),
        (PPO_EVALUATION, "step  8/32  evaluation: reward 0.425  KL 0.163 nats  gold 0.0320  50.7 s"),
        (REWARD_MODEL_EVALUATION, "step  8/32  evaluation: loss 0.693  accuracy 0.559  0.2 s"),
        ({"loss": 2.924, "mean_token_accuracy": 0.4183}, "step  8/32  loss 2.92  token accuracy 0.418"),
        ({"loss": math.nan, "accuracy": 0.5}, "step  8/32  loss nan  accuracy 0.500"),
        (SUMMARY, "trained 8 steps in 122.4 s  mean loss 2.92"),
    ],
    ids=["ppo", "ppo evaluation", "reward model evaluation", "sft", "not finite", "end"],
)
def test_a_log_is_one_short_line(shown, logs, line):
    assert shown(logs, rewards=("gold",)) == line + "\n"


def test_a_log_without_a_metric_to_show_has_no_line(shown):
    assert shown({"grad_norm": 1.0, "epoch": 1.0}) == ""


def test_nothing_left_to_train_is_said(shown):
    assert shown(SUMMARY, step=0) == "nothing left to train\n"


def test_only_the_main_process_prints(shown):
    assert shown(PPO_LOG, rank=1) == ""


def test_no_line_is_wider_than_the_limit(shown):
    rewards = tuple(f"a_reward_with_a_long_name_{i}" for i in range(9))
    logs = PPO_EVALUATION | {f"eval_rewards/{name}/mean": 0.5 for name in rewards}
    line = shown(logs, rewards=rewards).rstrip("\n")
    assert 80 < len(line) <= MAX_WIDTH and line.endswith("_0 0.500")  # whole fields are left out


def test_shown_metrics_are_logged_names():
    """A renamed metric must not disappear from the lines."""
    from hf_rlhf_ext.cli.progress import SHOWN
    from hf_rlhf_ext.metrics.names import METRICS

    of_trl = {"mean_token_accuracy"}
    assert {shown.metric for shown in SHOWN} - of_trl <= set(METRICS)
    assert len(shown_metrics({shown.metric: 1.0 for shown in SHOWN})) == len(SHOWN)


def test_the_clock_counts_training_alone(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = TrainingClock(first_step=2)
    for _ in range(2):
        now[0] += 3
        clock.count_step()
    now[0] += 50  # an evaluation
    clock.resume()
    assert clock.speed(4, tokens=1200) == "200 tokens/s"  # 1200 tokens in 6 s
    now[0] += 2
    clock.count_step()
    assert clock.speed(5, tokens=1500) == "150 tokens/s"
    now[0] += 2
    clock.count_step()
    assert clock.speed(6, None) == "2.00 s/step"
    assert clock.speed(6, None) == ""  # no step since the last log


# The terminal


def test_a_real_run_that_is_captured_has_lines_alone(trainer, capsys):
    training = trainer(eval_strategy="steps", eval_steps=4)
    training.train()
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == [f"step {step}/4" for step in range(1, 5)]
    assert "evaluation: loss" in lines[4] and lines[5].startswith("trained 4 steps in")
    assert len(lines) == 6 and all(len(line) <= MAX_WIDTH for line in lines)
    assert "\r" not in captured.out and captured.err == ""


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn on stderr, a real terminal, while a function runs."""

    def run(function: Callable[[], object]) -> str:
        controller, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (24, 100))
        with os.fdopen(terminal, "w") as stderr:
            monkeypatch.setattr(sys, "stderr", stderr)
            function()
            print("end", file=stderr, flush=True)  # so that there is something to read
            text = os.read(controller, 1 << 16).decode()
        os.close(controller)
        return text

    return run


def test_a_terminal_has_a_bar_with_the_time_left(trainer, drawn, capsys):
    text = drawn(trainer().train)
    assert "| step 4/4, " in text and " left" in text
    assert len(capsys.readouterr().out.splitlines()) == 5  # the lines are not in the bar's stream


def test_a_warning_does_not_break_the_bar(trainer, drawn):
    class Warn(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            logging.getLogger("hf_rlhf_ext.ppo.trainer").warning("KL is high: raise kl_coef.")

    training = trainer()
    training.add_callback(Warn())
    lines = re.split(r"[\r\n]+", drawn(training.train))
    assert lines.count("KL is high: raise kl_coef.") == 4  # each alone on its line


def test_disable_tqdm_draws_no_bar(trainer, drawn):
    assert drawn(trainer(disable_tqdm=True).train).strip() == "end"


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_verbose_keeps_the_callbacks_of_transformers(trainer, disable_tqdm):
    def classes(made: Trainer) -> set[type]:
        return {type(callback) for callback in made.callback_handler.callbacks}

    theirs = {PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK}
    quiet = classes(trainer(disable_tqdm=disable_tqdm))
    assert TerminalProgress in quiet and not quiet & theirs
    verbose = classes(trainer(verbose=True, disable_tqdm=disable_tqdm))
    assert TerminalProgress not in verbose and len(verbose & theirs) == 1
    assert LogFile in quiet & verbose  # the file is kept either way


def test_verbose_shows_the_dictionaries_of_transformers(trainer, capsys):
    trainer(verbose=True, disable_tqdm=True).train()
    assert "{'loss': '" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_every_recipe_that_builds_a_trainer_shows_its_progress(recipes_path, recipe):
    tree = ast.parse((recipes_path / f"{recipe}.py").read_text(encoding="utf-8"))
    called = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    trainers = {"sft": "PublishingSFTTrainer", "reward": "BradleyTerryTrainer", "ppo": "PPOTrainer"}
    assert called.count("show_progress") == called.count(trainers[recipe]) == 1
    assert "library_output" in called


# The file


def strictly(path: Path) -> list[dict]:
    """The lines of a file as JSON, which knows no NaN."""

    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_the_file_has_every_log_with_step_and_time(trainer, tmp_path):
    training = trainer(eval_strategy="steps", eval_steps=2)
    training.train()
    training.evaluate()
    records = strictly(tmp_path / LOG_FILE)
    without_time = [{name: value for name, value in record.items() if name != "time"} for record in records]
    assert without_time == training.state.log_history
    assert all(record["time"].endswith("+00:00") for record in records)


def test_a_log_is_on_the_disk_when_it_is_made(arguments, tmp_path):
    callback = LogFile(tmp_path / LOG_FILE)
    state = TrainerState()
    callback.on_train_begin(arguments(), state, TrainerControl())
    assert strictly(tmp_path / LOG_FILE) == []
    state.log_history.append({"loss": 1.0, "step": 1})
    callback.on_log(arguments(), state, TrainerControl(), logs={"loss": 1.0})
    assert strictly(tmp_path / LOG_FILE)[0]["loss"] == 1.0


def test_numbers_that_are_not_finite_are_json_and_can_be_read_back(arguments, tmp_path):
    callback = LogFile(tmp_path / LOG_FILE)
    state = TrainerState()
    callback.on_train_begin(arguments(), state, TrainerControl())
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": torch.tensor(0.5), "step": 1}
    state.log_history.append(values)
    callback.on_log(arguments(), state, TrainerControl(), logs=values)
    (record,) = strictly(tmp_path / LOG_FILE)
    assert math.isnan(float(record["a"])) and float(record["b"]) == math.inf and float(record["c"]) == -math.inf
    assert record["d"] == 0.5


@pytest.mark.parametrize("spoil", ["", "cut off", "gone"])
def test_a_resumed_run_has_every_step_once(trainer, tmp_path, spoil):
    path = tmp_path / LOG_FILE
    trainer(max_steps=5).train()  # step 5 comes after the last checkpoint, and so does the summary at the end
    first = strictly(path)
    assert [record["step"] for record in first] == [1, 2, 3, 4, 5, 5]
    if spoil == "cut off":
        path.write_text(path.read_text()[:-9])
    elif spoil == "gone":
        path.unlink()

    trainer(max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    records = strictly(path)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 6]
    if spoil == "gone":  # the checkpoint has the metrics, but not the times
        assert [record["time"] is None for record in records] == [True] * 4 + [False] * 3
    else:
        assert records[:4] == first[:4]
    assert not path.with_suffix(".tmp").exists()


def test_a_new_run_in_the_same_folder_starts_a_new_file(trainer, tmp_path):
    trainer(max_steps=2).train()
    trainer(max_steps=1).train()
    assert [record["step"] for record in strictly(tmp_path / LOG_FILE)] == [1, 1]


def test_only_the_main_process_writes(arguments, tmp_path):
    callback = LogFile(tmp_path / LOG_FILE)
    state = TrainerState(is_world_process_zero=False, log_history=[{"loss": 1.0, "step": 1}])
    callback.on_train_begin(arguments(), state, TrainerControl())
    callback.on_log(arguments(), state, TrainerControl(), logs={"loss": 1.0})
    assert not (tmp_path / LOG_FILE).exists()


def test_the_reader_stops_at_a_line_that_was_cut_off(tmp_path):
    (tmp_path / LOG_FILE).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert list(read_log(tmp_path / LOG_FILE)) == [{"step": 1, "loss": 2.0}]
    assert list(read_log(tmp_path / "none.jsonl")) == []
