"""Two processes (gloo, `accelerate launch`) train the same weights as one process with twice the batch size."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.xdist_group("processes")

SCRIPT = Path(__file__).with_name("tiny_run.py")
ONE = {"per_device_train_batch_size": 4, "max_steps": 8, "top_k": 1, "adam_epsilon": 1e-3}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def run(tiny_config, chat_tokenizer, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)

    def start(name, processes, options, script=SCRIPT):
        launch = [sys.executable]
        if processes > 1:
            # With --cpu, accelerate starts one process unless there is MPI; --multi_gpu is its way to start several.
            launch += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
            launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            launch += ["--main_process_port", str(free_port())]
        command = [*launch, str(script), str(tmp_path), name, json.dumps(options)]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(SCRIPT.parents[2]),
            "ACCELERATE_USE_CPU": "true",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return tmp_path / name

    return start


VARIED = {"num_generations": 2, "per_device_train_batch_size": 8, "varied": True, "max_tokens_per_batch": 60}
# Greedy reference answers, which are the same whichever process samples them.
SHAPED = VARIED | {"reward_shaping": "par", "num_reference_answers": 2, "mask_truncated_completions": True}
SHAPED |= {"soft_overlong_tokens": 6, "clip_range_high": 0.02}


@pytest.mark.slow
@pytest.mark.parametrize("critic, more", [("head", {}), ("adapter", SHAPED)])
def test_two_processes_equal_one_with_the_doubled_batch(run, critic, more):
    options = {"critic": critic, "save_strategy": "steps", "save_steps": 6, "save_total_limit": 1}
    options |= {"kl_target": 0.5, "kl_horizon": 16, "clip_range": 0.01} | more
    batch = (ONE | options)["per_device_train_batch_size"]
    half = {"per_device_train_batch_size": batch // 2}
    one, two = run("one", 1, ONE | options), run("two", 2, ONE | options | half)
    saved = {path.name for path in (two / "checkpoint-8").iterdir()}
    assert saved >= {"rng_state_0.pth", "rng_state_1.pth", "ppo_state.json", "trainer_state.json"}
    assert not (two / "checkpoint-6").exists()
    expected = load_file(one / "weights-0.safetensors")
    ranks = [load_file(two / f"weights-{rank}.safetensors") for rank in (0, 1)]
    assert expected.keys() == ranks[0].keys()
    for name, weight in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], weight, rtol=0, atol=5e-5, msg=name)
    logs = [json.loads((folder / "log-0.json").read_text()) for folder in (one, two)]
    rollouts = [[log for log in history if "objective/scores" in log] for history in logs]
    assert len(rollouts[0]) == 2 and len({log["completions/mean_length"] for log in rollouts[0]}) == 2
    for ours, wanted in zip(rollouts[1], rollouts[0], strict=True):
        assert ours.keys() == wanted.keys()
        for name in wanted:
            if name != "epoch":
                assert ours[name] == pytest.approx(wanted[name], abs=2e-4), name
    histories = [json.loads((folder / "health-0.json").read_text()) for folder in (one, two)]
    wanted, clipped = ([row.get("policy/clipfrac_avg") for row in history] for history in histories)
    assert wanted[0] > 0 and clipped == pytest.approx(wanted, abs=1e-6)
    evaluations = [json.loads((folder / "evaluation-0.json").read_text()) for folder in (one, two)]
    for name in ("eval_objective/scores", "eval_objective/kl", "eval_completions/mean_length"):
        assert evaluations[1][name] == pytest.approx(evaluations[0][name], abs=1e-3), name


@pytest.mark.slow
def test_a_signal_to_one_process_leaves_the_rollout_in_all_and_resumes_to_the_bit(run, tmp_path):
    run("left", 2, {}, script=SCRIPT.with_name("left_runs.py"))
    first, second = json.loads((tmp_path / "found.json").read_text())
    assert first["ends"] == second["ends"] == [[2, 143], [3, 143], [6, 0]]
    for found in (first, second):
        assert found["same"] and found["same_state"] and found["moved"]
