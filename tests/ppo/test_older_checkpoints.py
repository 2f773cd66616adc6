"""A checkpoint that version 0.1.0 saved, before `PPOTrainer` was built by composition, resumes.

`tests/fixtures/ppo_0_1_0/checkpoint-6` was written by that version after step 6 of 8, in the middle of the second
rollout: a head critic, an adaptive KL coefficient, normalized rewards and an evaluation every two steps.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_rlhf_ext import PPOConfig, PPOTrainer
from hf_rlhf_ext.errors import UserError

OLD = Path(__file__).parents[1] / "fixtures" / "ppo_0_1_0" / "checkpoint-6"


def reward(completions, **kwargs):
    return [text.count("e") - 0.2 * len(text) for text in completions]


@pytest.fixture
def make_resumable(tmp_path):
    """`make(**options)`: a trainer with the options of the old run, and the path of its checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(OLD)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    options = {
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 6,
        "seed": 3,
        "max_completion_length": 6,
        "disable_tqdm": True,
        "logging_steps": 1,
        "critic": "head",
        "kl_target": 0.05,
        "kl_horizon": 40,
        "kl_coef": 0.2,
        "normalize_rewards": True,
        "stop_token_ids": list(range(0, len(tokenizer), 5)),
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    checkpoint = tmp_path / "run" / "checkpoint-6"
    shutil.copytree(OLD, checkpoint)

    def make(**changes):
        torch.manual_seed(0)
        prompts = Dataset.from_dict({"prompt": ["Tell me", "a sunny day", "fox", "words", "many", "happy?"]})
        trainer = PPOTrainer(
            LlamaForCausalLM(config),
            reward,
            args=PPOConfig(str(tmp_path / "run"), **(options | changes)),
            train_dataset=prompts,
            eval_dataset=prompts.select(range(2)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        )
        return trainer, checkpoint

    return make


def test_an_older_checkpoint_resumes_in_the_middle_of_its_rollout(make_resumable, history_of):
    saved = json.loads((OLD / "ppo_state.json").read_text())
    trainer, checkpoint = make_resumable(max_steps=6)  # there is nothing left to train: what was loaded stays
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.kl_coef == saved["kl_coef"] != 0.2
    assert trainer.ppo.rollout_index == saved["rollouts"] and trainer.ppo.step_in_rollout == saved["step_in_rollout"]
    assert trainer.ppo.moments.to_dict() == saved["reward_moments"]
    assert torch.equal(trainer.ppo.rollout.input_ids, load_file(OLD / "ppo_rollout.safetensors")["input_ids"])
    assert torch.equal(trainer.value_head.weight, load_file(OLD / "value_head.safetensors")["weight"])
    adapter = load_file(OLD / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B"
    assert torch.equal(trainer.model.get_parameter(f"{name}.default.weight"), adapter[f"{name}.weight"])
    # Version 0.1.0 stored the history of the health warnings with the state of the guards.
    history = history_of(trainer)
    assert history == saved["guards"]["history"] and len(history) == 2


def test_an_older_checkpoint_trains_on_and_saves_in_the_form_of_today(make_resumable, history_of):
    trainer, checkpoint = make_resumable(save_steps=8)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 8 and len(history_of(trainer)) == 2
    steps = [log["step"] for log in trainer.state.log_history if "loss" in log]
    assert steps == list(range(1, 9))
    newest = Path(trainer.args.output_dir) / "checkpoint-8"
    assert "history" not in json.loads((newest / "ppo_state.json").read_text())["guards"]
    callbacks = json.loads((newest / "trainer_state.json").read_text())["stateful_callbacks"]
    assert len(callbacks["HealthWarnings"]["attributes"]["history"]) == 2


def test_an_older_checkpoint_of_another_geometry_is_refused_in_one_line(make_resumable):
    trainer, checkpoint = make_resumable(num_ppo_epochs=4)
    with pytest.raises(UserError, match="num_ppo_epochs=2.*set num_ppo_epochs=2") as error:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(error.value)
