"""`auto_batch` on two processes (gloo): memory runs out on one of them, and both go on with the smaller sizes."""

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.engines.launch import ROOT, launch

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.slow]


def test_both_processes_train_as_with_the_sizes_set_by_hand(tiny_config, chat_tokenizer, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)
    done = launch("ddp", ROOT / "tests" / "training" / "auto_batch_run.py", tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in (0, 1))
    for run in ("reward_run", "ppo_run"):
        sizes = first[run]["sizes"]
        assert sizes == second[run]["sizes"] and None not in sizes.values()
        for name, weight in first[run]["by_hand"].items():
            assert torch.equal(first[run]["automatic"][name], weight), (run, name)
            assert torch.equal(second[run]["automatic"][name], weight), (run, name)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "is now" in line]
    assert len(lines) >= 3 and all("on process 1" in line for line in lines)
