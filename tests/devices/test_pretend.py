"""Every way to train and to score gives on another device what it gives on the CPU, and does its work there.

The device is pretended (`pretend.py`), as tests have no accelerator. Renaming PyTorch's backend is for good, so that
all runs (`paths.py`) are in one process of their own, which `runs.py` starts with.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices.base import save_base
from tests.devices.watching import COPIES, FORWARD_PASSES

# The runs of this file take one process a minute: one worker starts it.
pytestmark = [pytest.mark.xdist_group("devices"), pytest.mark.slow, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
# What rounding explains: the device multiplies in another order in a few places, and optimizers group weights there.
# Autocast computes other operators in half precision than on a CPU, as on CUDA.
LARGEST_DIFFERENCE = {"fp32": 5e-5, "half": 5e-3}

REWARD_RUNS = [
    "reward: K-wise, layout plain, activation checkpointing",
    "reward: shared prefix, token budget",
    "reward: layout auto, whole model, tie model, Adafactor",
    "reward: Plackett-Luce, SGD",
    "reward: bf16",
    "reward: fp16",
    "reward: resume, best model, predict",
    "reward: scorer, ensemble, merges",
]
PPO_RUNS = [
    "ppo: head critic, nucleus sampling",
    "ppo: adapter critic, activation checkpointing, several batches, no merge",
    "ppo: KL in the loss, token budget, dense rewards, entropy bonus, joint scoring off",
    "ppo: 2 completions per prompt, no critic, token budget, evaluation",
    "ppo: 2 completions per prompt behind a mask, head critic",
    "ppo: 2 completions per prompt, reward model and adapter critic, joint scoring, resume in a rollout",
    "ppo: reference answers (PAR), cut completions masked, overlong penalty, no critic",
    "ppo: a warm-up of the head critic in fp16, lambdas of returns and lengths",
    "ppo: a warm-up of the adapter critic, activation checkpointing, token budget, cut completions masked",
    "ppo: bf16",
    "ppo: fp16",
    "ppo: an overflow in fp16 is skipped",
    "ppo: whole policy, value model, ptx, checkpoint",
    "ppo: reward models as adapter and as model, joint scoring, adapter critic, evaluation",
    "ppo: resume in the middle of a rollout, merge",
    "ppo: rollback, then the best model",
    "ppo: reward model and optimizer states on the CPU between stages, resume",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory, chat_tokenizer_factory) -> dict[str, dict]:
    """What each run gave, by name."""
    folder = tmp_path_factory.mktemp("devices")
    save_base(folder / "base", chat_tokenizer_factory())
    root = HERE.parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / "runs.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["name"]: line for line in map(json.loads, lines)}


@pytest.mark.parametrize("name", REWARD_RUNS + PPO_RUNS)
def test_a_run_is_that_of_the_cpu_and_stays_on_the_device(results, name):
    result = results[name]
    assert result["error"] is None, result["error"]
    allowed = LARGEST_DIFFERENCE["half" if "bf16" in name or "fp16" in name else "fp32"]
    assert result["compared"] > 5 and not result["missing"]
    assert result["difference"] <= allowed, result["worst"]
    # To a new place, the first question is whether the numbers have to leave the device: see tests/devices/watching.py.
    advice = "the library works on the CPU here: leave tensors on their device"
    assert not result["copies"], advice
    assert not result["forward_passes"], advice


def test_every_run_has_a_test(results):
    assert {name for name in results if name.startswith(("reward: ", "ppo: "))} == set(REWARD_RUNS + PPO_RUNS)


def test_the_device_behaves_like_a_real_one(results):
    checks = {name: line["error"] for name, line in results.items() if name.startswith("device: ")}
    assert len(checks) == 15
    wrong = [f"{name}: {error}" for name, error in checks.items() if error is not None]
    assert not wrong, "\n".join(wrong)


def test_a_tensor_left_on_the_cpu_is_an_error(results):
    error = results["mistake: a mask on the CPU"]["error"]
    assert "Expected all tensors to be on the same device, but found at least two devices, pretend:0 and cpu" in error


def test_a_mean_computed_on_the_cpu_is_found_where_it_is_called(results):
    result = results["mistake: a mean computed on the CPU"]
    assert result["error"] is None  # right, only slow
    assert set(result["copies"]) == {"ppo/experience.py:ExperienceMaker._metrics"}


def test_a_reward_model_left_on_the_cpu_is_found_where_it_computes(results):
    result = results["mistake: a reward model on the CPU"]
    assert result["error"] is None and not result["copies"]
    assert set(result["forward_passes"]) == {"reward/scores.py:_classify"}


def test_every_allowed_place_is_used(results):
    # A place that is no longer used would let through what is written there next.
    assert set(results["used"]["places"]) == {*COPIES, *FORWARD_PASSES}
