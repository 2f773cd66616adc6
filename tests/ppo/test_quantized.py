"""PPO on a real NF4 base (bitsandbytes, CPU): it learns, the base does not change, and four roles share its memory.

`python -m pytest tests/ppo/test_quantized.py -k whatever -s` prints the differences that docs/trainers/ppo.md reports.
"""

import hashlib
import runpy
from pathlib import Path

import pytest
import torch

from hf_rlhf_ext.modeling.loading import load_base_model
from hf_rlhf_ext.reward.scorer import RewardNormalization, RewardScorer

MEMORY = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "ppo_memory.py"))


def digest(model):
    """Digest of the whole base: packed weights and parameters that are not quantized."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" not in name and "_head" not in name:
            found.update(parameter.detach().contiguous().view(-1).view(dtype=torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.slow
def test_ppo_learns_on_a_4_bit_base_that_stays_as_it_was(stories_path, make_storyteller):
    model = load_base_model(str(stories_path), load_in_4bit=True)
    assert any(parameter.dtype == torch.uint8 for parameter in model.parameters())
    trainer = make_storyteller(model, bf16=True, critic="adapter", value_learning_rate=1e-2, max_steps=24)
    bits, before = digest(trainer.model), trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    explained = [log["val/explained_variance"] for log in trainer.state.log_history if "val/explained_variance" in log]
    assert digest(trainer.model) == bits
    assert after["eval_objective/scores"] > before["eval_objective/scores"] + 0.7
    assert 0.5 < after["eval_objective/kl"] < 20 and sum(explained[-5:]) / 5 > 0.3
    assert trainer.stop_reason is None


def test_four_roles_share_the_bytes_of_one_4_bit_base(stories_path, make_storyteller, tmp_path):
    MEMORY["train_reward"](str(stories_path), str(tmp_path / "reward"), max_steps=1)
    model = load_base_model(str(stories_path), load_in_4bit=True)
    one_base = MEMORY["distinct_bytes"](MEMORY["state_tensors"](model))
    options = {"bf16": True, "critic": "adapter", "max_steps": 1, "num_mini_batches": 1}
    trainer = make_storyteller(model, reward_funcs=str(tmp_path / "reward"), **options)
    assert set(trainer.stack.roles) == {"policy", "reference", "value", "reward"}
    assert trainer.rewards.funcs[0].model is trainer.model
    bits = digest(trainer.model)
    trainer.train()
    assert digest(trainer.model) == bits
    table = MEMORY["memory_table"](trainer)
    assert table["base"] == one_base and MEMORY["ratio"](table, one_base) <= 1.25, table


PROMPTS = ["Once upon a time", "One day, a little girl", "Tom and Lily", "The big dog"]
ANSWERS = [" there was a girl.", " they went to the park and played all day.", " ran.", " was happy, and so were they."]
FP32, BF16, NF4 = {"dtype": "float32"}, {"dtype": "bfloat16"}, {"load_in_4bit": True}


@pytest.mark.parametrize("precision, bound", [(FP32, 1e-4), (BF16, 0.05), (NF4, 0.05)], ids=["fp32", "bf16", "nf4"])
def test_a_reward_has_the_same_scores_whatever_it_is_used_as(
    stories_path, make_storyteller, tmp_path, precision, bound
):
    folder, bf16 = str(tmp_path / "reward"), precision is not FP32
    MEMORY["train_reward"](str(stories_path), folder, precision=precision, bf16=bf16, max_steps=20, learning_rate=1e-2)
    scorer = RewardScorer.from_pretrained(folder)
    model = load_base_model(str(stories_path), **precision)

    def as_callable(prompts, completions, **columns):
        return scorer(prompts, completions)

    as_model = RewardScorer.from_pretrained(folder)  # weights of its own
    trainer = make_storyteller(model, reward_funcs=[folder, as_model.model, as_callable], bf16=bf16)
    shared, separate, function = trainer.rewards.funcs
    assert shared.model is trainer.model and separate.model is as_model.model
    expected = torch.tensor(function(PROMPTS, ANSWERS))
    spread = float(expected.std())
    norm = RewardNormalization.load(folder)
    alone = (torch.tensor(separate(PROMPTS, ANSWERS)) - norm.mean) / norm.std  # a bare model knows no scale
    differences = {
        "adapter": float((torch.tensor(shared(PROMPTS, ANSWERS)) - expected).abs().max()),
        "model": float((alone - expected).abs().max()),
    }
    print(precision, "spread of scores", spread, differences)
    assert spread > 0.1 and max(differences.values()) <= bound * max(1.0, spread)
