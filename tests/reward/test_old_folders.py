"""Folders saved by version 0.1 can be loaded and give the scores that were recorded then."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification

from hf_rlhf_ext.reward.ensemble import RewardEnsemble, load_reward
from hf_rlhf_ext.reward.scorer import RewardScorer

SAVED = Path(__file__).parents[1] / "fixtures" / "reward_v0"
RECORDED = json.loads((SAVED / "recorded_scores.json").read_text())


@pytest.fixture
def base(tiny_config, chat_tokenizer, tmp_path):
    """The base of those adapters, with weights from a formula, so that they do not depend on random numbers."""
    tiny_config.num_labels = 1
    model = LlamaForSequenceClassification(tiny_config)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if "norm" not in name:
                steps = torch.arange(parameter.numel(), dtype=torch.float64)
                values = 0.3 * torch.sin(steps * (number + 1.7))
                parameter.copy_(values.reshape(parameter.shape))
    model.save_pretrained(tmp_path / "tiny-base")
    return tmp_path / "tiny-base"


@pytest.fixture
def saved(base, chat_tokenizer, tmp_path):
    """A copy of the saved ensemble. Its members name that base and have tokenizers."""
    folder = tmp_path / "reward_v0"
    shutil.copytree(SAVED, folder)
    for member in sorted(folder.glob("member-*")):
        config = json.loads((member / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(base)
        (member / "adapter_config.json").write_text(json.dumps(config))
        chat_tokenizer.save_pretrained(member)
    return folder


def test_an_adapter_gives_the_scores_of_then(saved):
    for number, expected in enumerate(RECORDED["raw"]):
        scorer = RewardScorer.from_pretrained(saved / f"member-{number}", device="cpu")
        scores = scorer.raw(RECORDED["prompts"], RECORDED["completions"])
        assert scores == pytest.approx(expected, abs=1e-5)


def test_an_ensemble_gives_the_rewards_of_then_on_one_base(saved):
    ensemble = load_reward(saved, device="cpu")
    assert isinstance(ensemble, RewardEnsemble)
    assert (ensemble.combine, ensemble.penalty) == ("conservative", 0.5)
    first, second = ensemble.members
    assert first.model is second.model
    rewards = ensemble.rewards(RECORDED["prompts"], RECORDED["completions"])
    for member_rewards, expected in zip(rewards.tolist(), RECORDED["rewards"], strict=True):
        assert member_rewards == pytest.approx(expected, abs=1e-3)  # a score's rounding, over a deviation of 0.07
    combined = ensemble(RECORDED["prompts"], RECORDED["completions"])
    assert combined == pytest.approx(RECORDED["combined"], abs=1e-3)
