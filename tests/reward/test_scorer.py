"""RewardScorer: loading, in this process or in another one, gives exactly the same scores."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.scorer import NORMALIZATION_FILE, RewardScorer
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer

PROMPTS = ["Tell a story:", "Tell me:", "", "garden?"] * 3
COMPLETIONS = ["a sunny day", "", "the lazy dog " * 7, "happy", "fox", "words, many words!"] * 2

SCORE_IN_NEW_PROCESS = """
import json, sys
from hf_rlhf_ext.reward.scorer import RewardScorer
folder, prompts, completions = json.load(sys.stdin)
print(json.dumps(RewardScorer.from_pretrained(folder, batch_size=5, device="cpu").raw(prompts, completions)))
"""


@pytest.fixture
def train(tiny_config, chat_tokenizer, tmp_path):
    """Trains a few steps from a base on disk, saves the result, and returns the trainer."""
    tiny_config.num_labels = 1

    def run(*, peft=True, dtype=torch.float32, bf16=False, normalization=None):
        torch.manual_seed(0)
        LlamaForSequenceClassification(tiny_config).to(dtype).save_pretrained(tmp_path / "base")
        # Not the model itself: `.to(bfloat16)` rounds the rotary frequencies too, a load does not.
        model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", dtype=dtype)
        rows = [{"prompt": p, "chosen": c + " happy", "rejected": c} for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        args = BradleyTerryConfig(
            output_dir=str(tmp_path / "reward"), use_cpu=True, bf16=bf16, report_to="none", learning_rate=1e-2,
            max_steps=6, disable_tqdm=True, save_strategy="no", per_device_eval_batch_size=5,
        )  # fmt: skip
        config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS") if peft else None
        trainer = BradleyTerryTrainer(
            model, args, Dataset.from_list(rows), processing_class=chat_tokenizer, peft_config=config,
            normalization_dataset=normalization,
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        return trainer

    return run


def in_process_scorer(trainer):
    autocast = torch.bfloat16 if trainer.args.bf16 else None
    return RewardScorer(trainer.model, trainer.processing_class, batch_size=5, autocast=autocast)


@pytest.mark.parametrize("dtype, bf16", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("peft", [True, False])
def test_reload_gives_the_same_scores_to_the_bit(train, peft, dtype, bf16):
    trainer = train(peft=peft, dtype=dtype, bf16=bf16)
    before = in_process_scorer(trainer).raw(PROMPTS, COMPLETIONS)
    assert len({round(score, 6) for score in before}) > 6
    scorer = RewardScorer.from_pretrained(trainer.args.output_dir, batch_size=5, device="cpu")
    assert scorer.raw(PROMPTS, COMPLETIONS) == before
    head = next(p for name, p in scorer.model.named_parameters() if "score" in name and "original" not in name)
    trained = next(p for name, p in trainer.model.named_parameters() if "score" in name and "original" not in name)
    assert head.dtype == torch.float32 and torch.equal(head, trained)


def test_saved_head_is_fp32_in_the_file(train):
    trainer = train(dtype=torch.bfloat16, bf16=True)
    weights = load_file(trainer.args.output_dir + "/adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(name.endswith("score.weight") for name in weights)


@pytest.mark.slow
def test_reload_in_a_new_process_gives_the_same_scores_to_the_bit(train):
    trainer = train()
    before = in_process_scorer(trainer).raw(PROMPTS, COMPLETIONS)
    result = subprocess.run(
        [sys.executable, "-c", SCORE_IN_NEW_PROCESS],
        input=json.dumps([trainer.args.output_dir, PROMPTS, COMPLETIONS]),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert json.loads(result.stdout.splitlines()[-1]) == before


@pytest.mark.parametrize("kind", ["demonstrations", "messages", "comparisons", "default"])
def test_rewards_have_mean_zero_and_deviation_one_on_the_normalization_set(train, kind):
    demonstrations = [{"prompt": p, "completion": c} for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    pairs = [row | {"chosen": row.pop("completion"), "rejected": "no"} for row in map(dict, demonstrations)]
    messages = [
        {"messages": [{"role": "user", "content": p or "?"}, {"role": "assistant", "content": c}]}
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    data = {"demonstrations": demonstrations, "messages": messages, "comparisons": pairs, "default": None}[kind]
    trainer = train(normalization=Dataset.from_list(data) if data else None)
    scorer = RewardScorer.from_pretrained(trainer.args.output_dir, device="cpu")
    if kind == "messages":
        prompts = [row["messages"][:1] for row in messages]
        rewards = scorer(prompts, [row["messages"][1:] for row in messages])
    elif kind == "demonstrations":
        rewards = scorer(PROMPTS, COMPLETIONS)
    else:
        other = ["no"] * len(PROMPTS) if kind == "comparisons" else [c + " happy" for c in COMPLETIONS]
        rewards = scorer(PROMPTS * 2, COMPLETIONS + other)
    assert np.mean(rewards) == pytest.approx(0, abs=1e-5) and np.std(rewards) == pytest.approx(1, abs=1e-5)
    assert trainer.normalization.n == len(rewards)


def test_scores_do_not_depend_on_the_batch_or_on_pad_being_eos(train):
    trainer = train()
    scorer = in_process_scorer(trainer)
    together = scorer.raw(PROMPTS, COMPLETIONS)
    alone = [scorer.raw([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    trainer.processing_class.pad_token = trainer.processing_class.eos_token
    trainer.model.config.pad_token_id = trainer.processing_class.eos_token_id
    np.testing.assert_allclose(in_process_scorer(trainer).raw(PROMPTS, COMPLETIONS), together, atol=1e-6)


def test_scorer_is_a_trl_reward_function(train):
    scorer = RewardScorer.from_pretrained(train().args.output_dir, device="cpu")
    assert scorer.__name__ == "reward_model"
    message = [{"role": "user", "content": "hi"}]
    rewards = scorer(
        prompts=[message, "hi"],
        completions=[[{"role": "assistant", "content": "a sunny day"}], "a sunny day"],
        completion_ids=[[1], [2]],
        category=["chat", "qa"],
    )
    assert all(isinstance(reward, float) for reward in rewards) and len(rewards) == 2


def test_without_the_file_scores_are_raw_and_it_is_said(train, caplog):
    trainer = train()
    os.remove(trainer.args.output_dir + f"/{NORMALIZATION_FILE}")
    scorer = RewardScorer.from_pretrained(trainer.args.output_dir, dtype="float32", device="cpu")
    assert scorer(["p"], ["c"]) == scorer.raw(["p"], ["c"])
    assert "has no reward_normalization.json: rewards are the raw scores" in caplog.text


def test_a_loaded_base_can_be_passed(train):
    trainer = train(dtype=torch.bfloat16)
    path = trainer.model.get_base_model().config._name_or_path
    base = LlamaForSequenceClassification.from_pretrained(path, dtype=torch.bfloat16)
    scorer = RewardScorer.from_pretrained(trainer.args.output_dir, base=base, batch_size=5, device="cpu")
    assert scorer.raw(PROMPTS, COMPLETIONS) == in_process_scorer(trainer).raw(PROMPTS, COMPLETIONS)


def test_refusals_are_one_line(train, tiny_llama, chat_tokenizer, tmp_path):
    scorer = in_process_scorer(train())
    with pytest.raises(UserError, match="^completions: 1 for 2 prompts"):
        scorer(["a", "b"], ["c"])
    with pytest.raises(UserError, match=r"^completions\[1\] .*string or a list of messages"):
        scorer(["a", "b"], ["c", None])
    with pytest.raises(UserError, match="^model: .*load_base_model.*task='reward'"):
        RewardScorer(tiny_llama, chat_tokenizer)
    with pytest.raises(UserError, match="^std: .*positive"):
        RewardScorer(scorer.model, chat_tokenizer, std=0.0)
    with pytest.raises(UserError, match="^reward model: .*missing: check the path"):
        RewardScorer.from_pretrained(tmp_path / "missing")
