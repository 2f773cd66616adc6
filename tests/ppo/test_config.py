"""PPOConfig refuses options that do not work, and sets the defaults that Transformers would choose wrongly for PPO."""

import pytest

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.config import PPOConfig


def make(**options):
    return PPOConfig("out", **({"use_cpu": True, "bf16": False} | options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_p": 0.0}, "top_p must be positive, got 0.0."),
        ({"top_p": 1.5}, "top_p must be between 0 and 1, got 1.5."),
        ({"clip_range": 0.0}, "clip_range must be positive, got 0.0."),
        ({"value_clip_range": 0.0}, "value_clip_range must be positive, got 0.0: set it to None for no limit."),
        ({"gamma": 1.01}, "gamma must be between 0 and 1, got 1.01."),
        ({"gae_lambda": -0.1}, "gae_lambda must be between 0 and 1, got -0.1."),
        ({"vf_coef": -0.1}, "vf_coef must not be negative, got -0.1."),
        ({"top_k": -1}, "top_k must not be negative, got -1."),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty must not be negative, got -1.0."),
        ({"kl_horizon": 0}, "kl_horizon must be at least 1, got 0."),
        ({"eval_strategy": "epoch"}, "set eval_strategy='steps' and eval_steps."),
        ({"save_strategy": "epoch"}, "set save_strategy='steps' and save_steps."),
        ({"logging_strategy": "epoch"}, "set logging_strategy='steps' and logging_steps."),
        ({"metric_for_best_model": "eval_loss"}, "metric_for_best_model='eval_loss': PPO's evaluation has no loss"),
        (
            {"lr_scheduler_type": "greedy", "eval_strategy": "steps"},
            "lr_scheduler_type='greedy': its lowest learning rate is 0.001, above learning_rate=1e-05",
        ),
        (
            {"learning_rate": 0.0, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
            "learning_rate=0 with lr_scheduler_type='cosine_with_min_lr', which divides by it: set learning_rate",
        ),
        ({"vf_coef": float("inf")}, "vf_coef must not be infinite, got inf."),
    ],
)
def test_what_cannot_work_is_one_line(options, message):
    with pytest.raises(UserError) as error:
        make(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_edges_of_the_ranges_work():
    make(top_p=1.0, gamma=0.0, gae_lambda=1.0, vf_coef=0.0, top_k=0, missing_eos_penalty=0.0, value_clip_range=None)


@pytest.mark.parametrize(
    "options, metric, greater",
    [
        ({"load_best_model_at_end": True}, "objective/scores", True),
        ({"save_strategy": "best"}, "objective/scores", True),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "objective/scores", True),
        ({"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/gold/mean"}, None, True),
        ({"load_best_model_at_end": True, "metric_for_best_model": "eval_easy_objective/kl_k3"}, None, False),
        ({"metric_for_best_model": "objective/kl", "greater_is_better": True}, None, True),
        ({}, None, None),
    ],
)
def test_the_best_model_has_the_highest_score_unless_told_otherwise(options, metric, greater):
    args = make(eval_strategy="steps", eval_steps=4, save_steps=4, **options)
    assert args.metric_for_best_model == (metric or options.get("metric_for_best_model"))
    assert args.greater_is_better == greater
