"""LoRA with `layer_replication`: copies of a layer share weights, but merging gives each its part of the adapter."""

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForSequenceClassification

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.merge import merge_run
from hf_rlhf_ext.modeling.loading import load_base_model
from hf_rlhf_ext.reward.scorer import RewardScorer

PAIRS = [{"prompt": "a fox", "chosen": " happy", "rejected": " sad"}, {"prompt": "x", "chosen": " a", "rejected": " b"}]
TEXTS = (["a fox", "Tell me"], [" is happy", " many words"])


def replicated(task_type="SEQ_CLS", **options):
    return LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], task_type=task_type, layer_replication=[(0, 2), (1, 2)], **options
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_reward_adapter_scores_the_same(make_trainer, tiny_config, chat_tokenizer, tmp_path, tied):
    tiny_config.tie_word_embeddings = tied
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    model = load_base_model(str(tmp_path / "base"), task="reward", dtype="float32")
    options = {"max_steps": 2, "learning_rate": 0.1, "save_strategy": "no"}
    trainer = make_trainer(PAIRS, model=model, peft=replicated(), **options)
    trainer.train()
    with torch.no_grad():  # the two copies of a layer get very different adapters
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    trainer.save_model(str(tmp_path / "adapter"))
    adapter = RewardScorer.from_pretrained(str(tmp_path / "adapter"), dtype="float32")
    scores = adapter.raw(*TEXTS)
    with adapter.model.disable_adapter():
        assert adapter.raw(*TEXTS) != pytest.approx(scores, abs=1e-4)
    merge_run(tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    merged = RewardScorer.from_pretrained(str(tmp_path / "merged"), dtype="float32")
    assert len(merged.model.model.layers) == 3
    assert merged.raw(*TEXTS) == pytest.approx(scores, abs=1e-5)


def test_a_model_that_lists_the_kinds_of_its_layers_is_refused(make_trainer, tiny_config, chat_tokenizer):
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": tiny_config.vocab_size, "pad_token_id": chat_tokenizer.pad_token_id}
    model = Qwen2ForSequenceClassification(Qwen2Config(num_labels=1, num_key_value_heads=4, **size, **tokens))
    with pytest.raises(UserError, match=r"layer_replication .* Qwen2ForSequenceClassification.* leave it out"):
        make_trainer(PAIRS, model=model, peft=replicated())
