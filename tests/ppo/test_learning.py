"""PPO on a real small model learns a reward within a minute, on its leash, and the completions still read."""

import pytest
from datasets import Dataset
from peft import LoraConfig

from hf_rlhf_ext.modeling.loading import load_base_model, load_tokenizer
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.trainer import PPOTrainer

OPENINGS = ["Once upon a time", "One day, a little girl", "Tom and Lily", "The big dog"]


JOY = ("happy", "smile", "fun", "love", "laugh", "play")


def joy(completions, **kwargs):
    """Happy words in a story, at most four: repeating one of them for ever does not pay."""
    return [min(4.0, float(sum(text.lower().count(word) for word in JOY))) for text in completions]


@pytest.mark.slow
def test_ppo_makes_stories_happier_and_keeps_them_stories(stories_path, tmp_path):
    prompts = Dataset.from_dict({"prompt": OPENINGS * 16})
    args = PPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=32,
        num_mini_batches=2,
        num_ppo_epochs=2,
        max_steps=44,
        learning_rate=3e-3,
        value_learning_rate=2e-2,
        value_clip_range=None,
        vf_coef=0.5,
        lr_scheduler_type="constant",
        max_completion_length=40,
        kl_coef=0.12,
        per_device_eval_batch_size=64,
        logging_steps=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = PPOTrainer(
        load_base_model(str(stories_path), dtype="float32"),
        joy,
        args=args,
        train_dataset=prompts,
        eval_dataset=prompts,
        processing_class=load_tokenizer(str(stories_path)),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    before, story = trainer.evaluate(), trainer.sample_and_score(prompts)[0].completion
    trainer.train()
    after, rows = trainer.evaluate(), trainer.sample_and_score(prompts)
    explained = [log["val/explained_variance"] for log in trainer.state.log_history if "val/explained_variance" in log]
    assert before["eval_objective/scores"] < 1.0 and before["eval_objective/kl"] == 0.0
    assert after["eval_objective/scores"] > before["eval_objective/scores"] + 1.0
    assert 0.5 < after["eval_objective/kl"] < 20
    assert sum(explained[-5:]) / 5 > 0.3
    # Text that reads: many distinct words, and stories of their own rather than one for all.
    words = [row.completion.split() for row in rows]
    assert sum(len(set(text)) / len(text) for text in words) / len(words) > 0.6
    assert len({row.completion for row in rows}) > 55 and story not in {row.completion for row in rows}
    print("RES", before, after, explained[-5:], [row.completion for row in rows[:5]])
