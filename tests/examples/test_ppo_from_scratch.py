"""The one-page PPO of `examples/` and `PPOTrainer` train the same weights."""

import importlib.util
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from hf_rlhf_ext import PPOConfig, PPOTrainer
from hf_rlhf_ext.ppo.engine import TransformersEngine

SCRIPT = Path(__file__).parents[2] / "examples" / "ppo_from_scratch.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("ppo_from_scratch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class SeededEngine(TransformersEngine):
    """Seeds the random numbers of every rollout, for its tokens and for the permutations that are drawn next."""

    def __init__(self):
        super().__init__()
        self.rollouts = 0

    def generate(self, *args, **kwargs):
        torch.manual_seed(self.rollouts)
        self.rollouts += 1
        return super().generate(*args, **kwargs)


@pytest.mark.parametrize("changes", [{}, {"kl_coef": 1.0, "gamma": 0.9, "num_ppo_epochs": 3, "max_grad_norm": 0.05}])
def test_the_page_and_the_trainer_train_the_same_weights(example, tmp_path, changes):
    options = example.Options(updates=4, rollout_size=8, minibatch_size=4, **changes)
    tokenizer = example.letter_tokenizer()

    torch.manual_seed(0)
    page = example.tiny_policy(tokenizer)
    start = {name: p.detach().clone() for name, p in page.named_parameters()}
    value_head = example.train(page, tokenizer, example.count_e, example.PROMPTS, options, SeededEngine())

    torch.manual_seed(0)
    trainer = PPOTrainer(
        example.tiny_policy(tokenizer),
        lambda completions, **columns: example.count_e(completions),
        args=PPOConfig(
            str(tmp_path),
            per_device_train_batch_size=options.minibatch_size,
            num_mini_batches=options.rollout_size // options.minibatch_size,
            num_ppo_epochs=options.num_ppo_epochs,
            max_steps=options.updates * options.num_ppo_epochs * options.rollout_size // options.minibatch_size,
            max_completion_length=options.max_completion_length,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            kl_coef=options.kl_coef,
            clip_range=options.clip_range,
            value_clip_range=options.value_clip_range,
            vf_coef=options.vf_coef,
            gamma=options.gamma,
            gae_lambda=options.gae_lambda,
            max_grad_norm=options.max_grad_norm,
            critic="head",
            seed=options.seed,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": example.PROMPTS}),
        processing_class=tokenizer,
        engine=SeededEngine(),
    )
    trainer.train()

    assert trainer.updates == 4
    trained = dict(trainer.model.named_parameters())
    for name, weight in page.named_parameters():
        assert not torch.equal(weight, start[name]), name
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=2e-5, msg=name)
    for name, weight in value_head.named_parameters():
        torch.testing.assert_close(trainer.value_head.get_parameter(name), weight, rtol=0, atol=2e-5, msg=name)


def test_the_docstring_names_files_that_exist(example):
    import re

    names = re.findall(r"`([a-z_]+/[a-z_]+\.py)`", example.__doc__)
    package = SCRIPT.parents[1] / "hf_rlhf_ext"
    assert len(names) >= 8
    for name in names:
        assert (package / name).is_file(), name


def test_the_tiny_task_is_as_small_as_it_says(example):
    policy = example.tiny_policy(example.letter_tokenizer())
    assert round(sum(p.numel() for p in policy.parameters()), -3) == 22_000
    assert example.count_e(["tree", "sky"]) == [2.0, 0.0]
