"""PPO with a KL penalty learns a reward on a real small model in a minute, and completions are still readable."""

import logging
from pathlib import Path

import pytest
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from hf_rlhf_ext.modeling.loading import load_base_model


def gold(completions, **kwargs):
    """Sentiment of a text by VADER, -1 to 1, from thousands of words; the training reward uses six of them."""
    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in completions]


@pytest.mark.slow
def test_ppo_makes_stories_happier_and_keeps_them_stories(stories_path, make_storyteller, caplog):
    caplog.set_level(logging.WARNING, logger="hf_rlhf_ext.ppo")
    trainer = make_storyteller(load_base_model(str(stories_path), dtype="float32"), eval_reward_funcs=gold)
    prompts = trainer.eval_dataset
    before, story = trainer.evaluate(), trainer.sample_and_score(prompts)[0].completion
    trainer.train()
    after, rows = trainer.evaluate(), trainer.sample_and_score(prompts)
    explained = [log["val/explained_variance"] for log in trainer.state.log_history if "val/explained_variance" in log]
    assert before["eval_objective/scores"] < 1.0 and before["eval_objective/kl"] == 0.0
    assert after["eval_objective/scores"] > before["eval_objective/scores"] + 1.0
    assert after["eval_rewards/gold/mean"] > before["eval_rewards/gold/mean"] + 0.2
    assert 0.5 < after["eval_objective/kl"] < 20
    # The first few completions, over the whole vocabulary: an estimate of the same, with less noise.
    assert 0.3 < after["eval_objective/kl_exact"] / (sum(row.kl_k3 for row in rows[:4]) / 4) < 3.0
    assert sum(explained[-5:]) / 5 > 0.3
    # Readable text: many distinct words, and different stories for different prompts.
    words = [row.completion.split() for row in rows]
    assert sum(len(set(text)) / len(text) for text in words) / len(words) > 0.6
    assert len({row.completion for row in rows}) > 55 and story not in {row.completion for row in rows}
    assert trainer.stop_reason is None and not any(log.get("guards/skipped_steps") for log in trainer.state.log_history)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("hf_rlhf_ext.ppo")] == []


@pytest.mark.slow
def test_a_wrong_setting_is_stopped_before_it_writes_a_broken_best_checkpoint(stories_path, make_storyteller, caplog):
    def spaces(completions, **kwargs):  # a reward that a policy without a KL penalty can increase without limit
        return [float(text.count("e")) for text in completions]

    options = {"kl_coef": 0.0, "learning_rate": 9e-2, "max_kl": 40.0, "reward_funcs": spaces}  # 30 times the right one
    options |= {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    options |= {"metric_for_best_model": "objective/scores", "load_best_model_at_end": True}
    trainer = make_storyteller(load_base_model(str(stories_path), dtype="float32"), **options)
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext.ppo"):
        trainer.train()
    evaluated = {
        log["step"]: log["eval_objective/kl"] for log in trainer.state.log_history if "eval_objective/kl" in log
    }
    assert trainer.state.global_step < 44 and "training stops: KL is" in caplog.text
    assert max(evaluated.values()) > 40.0
    best = trainer.state.best_global_step
    assert best is None or evaluated[best] <= 40.0
    if best is not None:
        assert Path(trainer.state.best_model_checkpoint).is_dir()
        assert trainer.evaluate()["eval_objective/kl"] == pytest.approx(evaluated[best], abs=1e-4)
