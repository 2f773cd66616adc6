"""Training of a tiny model: it learns a rule, in fp32 and in 4 bits."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer


def story_comparisons(tokenizer, n, *, k, seed):
    """Completions of random story words. The completion with more words "happy" is better."""
    rng = np.random.default_rng(seed)
    words = ["dog", "cat", "park", "ball", "sad", "big", "red", "tree", "play", "run"]
    rows = []
    for _ in range(n):
        counts = rng.permutation(4)[:k]
        texts = []
        for count in counts:
            chosen = list(rng.choice(words, rng.integers(4, 9) - count)) + ["happy"] * int(count)
            texts.append(" " + " ".join(rng.permutation(chosen)))
        pairs = [[i, j] for i in range(k) for j in range(i + 1, k)]
        targets = [float(counts[i] > counts[j]) for i, j in pairs]
        rows.append({"prompt": "Once upon a time", "completions": texts, "pairs": pairs, "targets": targets})
    return Dataset.from_list(rows)


@pytest.mark.slow
@pytest.mark.parametrize("k, n, epochs", [(2, 384, 4), (4, 96, 3)])
def test_learns_a_rule_on_a_real_tiny_model(stories_path, tmp_path, k, n, epochs):
    args = BradleyTerryConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none",
        per_device_train_batch_size=16 if k == 2 else 8, num_train_epochs=epochs, learning_rate=5e-3, disable_tqdm=True,
        save_strategy="no", model_init_kwargs={"dtype": "float32"}, seed=0,
    )  # fmt: skip
    trainer = BradleyTerryTrainer(
        str(stories_path), args, story_comparisons(None, n, k=k, seed=0), story_comparisons(None, 100, k=2, seed=1),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"),
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_accuracy"] < 0.75 and after["eval_accuracy"] > 0.9
    assert after["eval_nll"] < 0.4 and after["eval_longer_wins_baseline"] < 0.75
    trainer.save_model()
    scorer = RewardScorer.from_pretrained(tmp_path)
    rewards = scorer(["Once upon a time"] * 2, [" happy happy dog ran", " sad dog ran"])
    assert rewards[0] > rewards[1] + 0.5


SCORE_IN_NEW_PROCESS = """
import json, sys
from hf_rlhf_ext.reward.scorer import RewardScorer
folder, prompts, completions = json.load(sys.stdin)
print(json.dumps(RewardScorer.from_pretrained(folder).raw(prompts, completions)))
"""


@pytest.mark.slow
def test_qlora_on_a_cpu_learns_a_rule_and_reloads_in_a_new_process(stories_path, tmp_path):
    args = BradleyTerryConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=True, activation_checkpointing=False, report_to="none",
        per_device_train_batch_size=16, num_train_epochs=3, learning_rate=1e-2, disable_tqdm=True, seed=0,
        save_strategy="no", model_init_kwargs={"load_in_4bit": True},
    )  # fmt: skip
    trainer = BradleyTerryTrainer(
        str(stories_path), args, story_comparisons(None, 128, k=4, seed=0), story_comparisons(None, 100, k=2, seed=1),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"),
    )  # fmt: skip
    assert trainer.layout == "shared_prefix" and trainer.model.get_base_model().is_loaded_in_4bit
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.9
    trainer.save_model()
    prompts, completions = ["Once upon a time"] * 3, [" happy happy dog ran", " sad dog ran", ""]
    here = RewardScorer(trainer.model, trainer.processing_class, autocast=torch.bfloat16).raw(prompts, completions)
    given = json.dumps([str(tmp_path), prompts, completions])
    command = [sys.executable, "-c", SCORE_IN_NEW_PROCESS]
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == here
