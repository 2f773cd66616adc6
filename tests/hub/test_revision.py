"""An adapter trained on a revision of its base is loaded on that revision, not on the current `main`."""

import json

import pytest
import torch
from huggingface_hub import HfApi
from peft import get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from hf_rlhf_ext import RewardScorer, load_base_model, load_policy
from hf_rlhf_ext.cli.options import ModelArguments
from hf_rlhf_ext.hub.merge import merge_run
from hf_rlhf_ext.reward.scorer import RewardNormalization

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def base(hub, tiny_config, chat_tokenizer, tmp_path):
    """A repository with two commits of different weights. The first one has the tag v1."""
    api, made = HfApi(), tmp_path / "made"
    api.create_repo("alice/base")
    for seed in range(2):
        torch.manual_seed(seed)
        LlamaForCausalLM(tiny_config).save_pretrained(made)
        chat_tokenizer.save_pretrained(made)
        api.upload_folder(repo_id="alice/base", folder_path=made)
        if seed == 0:
            api.create_tag("alice/base", tag="v1")
    return "alice/base"


def adapter(base, folder, task_type, chat_tokenizer):
    """Saves an adapter like a recipe with --model_revision v1."""
    options = ModelArguments(model_name_or_path=base, model_revision="v1", lora_r=2)
    task = "reward" if task_type == "SEQ_CLS" else "causal_lm"
    model = load_base_model(base, task=task, dtype="float32", revision=options.revision)
    config = options.peft_config(task_type)
    config.init_lora_weights = False
    get_peft_model(model, config).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["revision"] == "v1"
    return model


def test_a_policy_comes_back_on_the_revision_it_was_trained_on(base, chat_tokenizer, tmp_path):
    trained = adapter(base, tmp_path / "policy", "CAUSAL_LM", chat_tokenizer).eval()
    weights = trained.get_input_embeddings().weight
    assert not torch.equal(load_base_model(base, dtype="float32").get_input_embeddings().weight, weights)
    found = load_policy(tmp_path / "policy", dtype="float32")[0].eval()
    assert torch.equal(found(IDS).logits, trained(IDS).logits)
    merge_run(tmp_path / "policy", tmp_path / "merged", dtype="float32")
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "merged").get_input_embeddings().weight, weights)


def test_a_reward_model_comes_back_on_the_revision_it_was_trained_on(base, chat_tokenizer, tmp_path):
    trained = adapter(base, tmp_path / "reward", "SEQ_CLS", chat_tokenizer)
    RewardNormalization(base_dtype="float32").save(tmp_path / "reward")
    expected = RewardScorer(trained, chat_tokenizer).raw(["Tell me:"], ["a sunny day"])
    assert (
        RewardScorer.from_pretrained(tmp_path / "reward", device="cpu").raw(["Tell me:"], ["a sunny day"]) == expected
    )
    merge_run(tmp_path / "reward", tmp_path / "merged", dtype="float32")
    merged = LlamaForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.get_input_embeddings().weight, trained.get_input_embeddings().weight)
