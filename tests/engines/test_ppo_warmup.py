"""A warm-up of the critic in two processes: whole weights (DDP) and shards (FSDP2) train the same, and the critic only.

One launch of two CPU processes for each engine runs all cases, see `ppo_run.py`.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engines.launch import launch_cases
from tests.engines.test_ppo import BUDGET, SCRIPT, models, numbers  # noqa: F401  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]

# A rollout is 4 optimizer steps.
ADAPTER = {"critic": "adapter", "critic_warmup_steps": 8, "max_steps": 12, "weight_decay": 0.1}
ADAPTER |= {"save_strategy": "steps", "save_steps": 2}
HEAD = {"critic": "head", "critic_warmup_steps": 4, "max_steps": 8, "weight_decay": 0.1, "early_stop_kl": 1e-9}
HEAD |= {"save_strategy": "steps", "save_steps": 4, "ptx_coef": 0.5, "ptx_batch_size": 4} | BUDGET
CASES = [
    {"name": "adapter", "policy": "sft", "options": ADAPTER},
    {"name": "inside", "policy": "sft", "resumes": "adapter/checkpoint-6", "options": ADAPTER},
    {"name": "after", "policy": "sft", "resumes": "adapter/checkpoint-8", "options": ADAPTER},
    {"name": "head", "policy": "sft", "ptx": True, "options": HEAD},
]


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):  # noqa: F811
    """The folders of all cases, by engine."""
    found = {}
    for engine in ("ddp", "fsdp2"):
        found[engine] = launch_cases(engine, SCRIPT, tmp_path_factory.mktemp(engine), models, CASES)
    return found


@pytest.mark.parametrize("case", [case["name"] for case in CASES])
def test_shards_train_the_weights_of_whole_models(folders, case):
    whole, sharded = folders["ddp"] / case, folders["fsdp2"] / case
    expected = load_file(whole / "weights-0.safetensors")
    for rank in (0, 1):
        weights = load_file(sharded / f"weights-{rank}.safetensors")
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6, msg=name)
    logs = [json.loads((folder / "log-0.json").read_text()) for folder in (whole, sharded)]
    assert len(logs[0]) == len(logs[1])
    for wanted, found in zip(*logs, strict=True):
        assert numbers(found) == pytest.approx(numbers(wanted), rel=1e-6, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case, last_of_warm_up", [("adapter", 8), ("head", 4)])
def test_the_policy_stays_the_same_to_the_bit(folders, engine, case, last_of_warm_up):
    folder: Path = folders[engine]
    start = load_file(folder / "sft" / "adapter_model.safetensors")
    after = load_file(folder / case / f"checkpoint-{last_of_warm_up}" / "adapter_model.safetensors")
    assert start.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in start.items())
    end = load_file(folder / case / f"checkpoint-{last_of_warm_up + 4}" / "adapter_model.safetensors")
    assert any(not torch.equal(end[name], value) for name, value in start.items())
    values = next(path for path in (folder / case / "checkpoint-4").rglob("value_head.safetensors"))
    assert load_file(values)["weight"].any()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("resumed", ["inside", "after"])
def test_a_resumed_run_is_the_same_to_the_bit(folders, engine, resumed):
    expected = load_file(folders[engine] / "adapter" / "weights-0.safetensors")
    found = load_file(folders[engine] / resumed / "weights-0.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
