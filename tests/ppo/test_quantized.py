"""PPO on a real NF4 base (bitsandbytes, CPU): it learns, the base stays as it was, and four roles share its bytes."""

import hashlib
import runpy
from pathlib import Path

import pytest
import torch

from hf_rlhf_ext.modeling.loading import load_base_model

MEMORY = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "ppo_memory.py"))


def digest(model):
    """Of every bit of the base: packed weights and what is not quantised."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" not in name and "_head" not in name:
            found.update(parameter.detach().contiguous().view(-1).view(dtype=torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.slow
def test_ppo_learns_on_a_4_bit_base_that_stays_as_it_was(stories_path, make_storyteller):
    model = load_base_model(str(stories_path), load_in_4bit=True)
    assert any(parameter.dtype == torch.uint8 for parameter in model.parameters())
    one_base = MEMORY["distinct_bytes"](MEMORY["state_tensors"](model))
    trainer = make_storyteller(model, bf16=True, critic="adapter", value_learning_rate=1e-2, max_steps=24)
    bits, before = digest(trainer.model), trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    explained = [log["val/explained_variance"] for log in trainer.state.log_history if "val/explained_variance" in log]
    assert digest(trainer.model) == bits
    assert after["eval_objective/scores"] > before["eval_objective/scores"] + 0.7
    assert 0.5 < after["eval_objective/kl"] < 20 and sum(explained[-5:]) / 5 > 0.3
    assert trainer.stopped_by is None
    table = MEMORY["memory_table"](trainer)
    assert MEMORY["ratio"](table, one_base) <= 1.25, table
