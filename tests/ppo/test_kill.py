"""`kill -9` at random moments loses only the steps since the last checkpoint, and does not change the result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.xdist_group("processes")

SCRIPT = Path(__file__).with_name("kill_runs.py")
SAVE_STEPS = 4


@pytest.mark.slow
def test_ten_kills_cost_steps_since_the_last_checkpoint_and_no_bit(tiny_config, chat_tokenizer, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(SCRIPT), str(tmp_path), "10"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    kills = json.loads(done.stdout.splitlines()[-1])
    assert len(kills) == 10 and sum(not kill["finished"] for kill in kills) >= 8
    for before, kill in zip([{"checkpoint": 0}, *kills], kills, strict=False):
        assert kill["began"] == before["checkpoint"]  # resumed from the last whole checkpoint, never from another
        if not kill["finished"]:
            assert kill["at"] - kill["checkpoint"] <= SAVE_STEPS
    assert kills[-1]["checkpoint"] > kills[0]["checkpoint"]
    straight, resumed = (load_file(tmp_path / name / "weights-0.safetensors") for name in ("straight", "killed"))
    for name, weight in straight.items():
        assert torch.equal(resumed[name], weight), name
