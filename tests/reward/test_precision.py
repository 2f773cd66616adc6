"""Scores are read at the right token, and precision is kept: fp32 master weights, bf16 compute, 4-bit bases."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaForSequenceClassification

from hf_rlhf_ext.modeling.heads import ScalarHead
from hf_rlhf_ext.modeling.loading import load_base_model
from hf_rlhf_ext.reward.scorer import RewardScorer, score_sequences
from tests.reward.examples import comparisons, independent_scores, trainable


def test_scores_are_read_by_length_when_pad_is_eos(seqcls, chat_tokenizer, make_trainer):
    chat_tokenizer.pad_token = chat_tokenizer.eos_token
    row = comparisons(1, k=4).to_list()[0]
    trainer = make_trainer(Dataset.from_list([row]), peft=None, layout="plain")
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        scores = score_sequences(trainer.model, batch["input_ids"], batch["attention_mask"])
        pooled = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    expected = torch.tensor(independent_scores(trainer.model, chat_tokenizer, row))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    assert (pooled - expected).abs().max() > 1e-3  # Transformers' own pooling reads another token


def test_prompt_tuning_reads_the_right_position(make_trainer, chat_tokenizer):
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    trainer = make_trainer(comparisons(4), peft=config)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        scores = score_sequences(trainer.model, batch["input_ids"], batch["attention_mask"])
        for row, score in enumerate(scores):
            ids = batch["input_ids"][row, : batch["attention_mask"][row].sum()][None]
            alone = trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]
            torch.testing.assert_close(score, alone, rtol=0, atol=1e-5)


def test_peft_model_and_prompt_tuning_work(make_trainer, seqcls):
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"])
    trainer = make_trainer(comparisons(4), model=get_peft_model(seqcls.bfloat16(), config), peft=None, max_steps=1)
    assert isinstance(trainer.model.get_base_model().score.modules_to_save["default"], ScalarHead)
    assert {p.dtype for p in trainable(trainer.model).values()} == {torch.float32}
    trainer.train()


def test_head_and_adapters_are_fp32_on_a_bf16_base_and_computed_in_bf16(make_trainer, seqcls):
    trainer = make_trainer(comparisons(4), model=seqcls.bfloat16(), bf16=True, max_steps=2, learning_rate=1e-5)
    assert {p.dtype for p in trainable(trainer.model).values()} == {torch.float32}
    assert isinstance(trainer.model.get_base_model().score.modules_to_save["default"], ScalarHead)
    lora = trainer.model.get_base_model().model.layers[0].self_attn.q_proj
    seen = []
    lora.lora_A["default"].register_forward_hook(lambda _, args, output: seen.append((args[0].dtype, output.dtype)))
    before = trainable(trainer.model)
    trainer.train()
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}  # no fp32 activations
    moved = {name: (p - before[name]).abs().max() for name, p in trainable(trainer.model).items()}
    assert all(change > 0 for name, change in moved.items() if "lora_B" in name or "score" in name)
    assert lora.cast_input_dtype_enabled  # as it was


def test_bf16_gradients_are_close_to_fp32_ones_with_checkpointing(make_trainer, tiny_config):
    gradients = {}
    for bf16 in (False, True):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(tiny_config)
        trainer = make_trainer(comparisons(4), model=model, bf16=bf16, activation_checkpointing=True)
        torch.manual_seed(1)
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(0, 0.05)
        trainer.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.create_optimizer()
        trainer.training_step(trainer.model, batch)
        grads = [p.grad for p in trainer.model.parameters() if p.requires_grad]
        assert {g.dtype for g in grads} == {torch.float32}
        gradients[bf16] = torch.cat([g.flatten() for g in grads])
    cosine = torch.nn.functional.cosine_similarity(gradients[False], gradients[True], dim=0)
    assert cosine > 0.99


def test_4bit_base_keeps_fp32_adapters_and_reloads_to_the_bit(make_trainer, seqcls, tmp_path):
    pytest.importorskip("bitsandbytes")
    seqcls.save_pretrained(tmp_path / "base")

    def base():
        return load_base_model(str(tmp_path / "base"), task="reward", dtype="bfloat16", load_in_4bit=True)

    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    adapted = get_peft_model(base(), config)
    before = trainable(adapted)
    trainer = make_trainer(comparisons(4), model=adapted, peft=None, bf16=True, max_steps=2)
    for name, value in trainable(trainer.model).items():  # TRL has cast them to bf16 and lost bits on the way
        assert value.dtype == torch.float32 and torch.equal(value, before[name])
    assert {p.dtype for p in trainable(make_trainer(comparisons(4), model=base()).model).values()} == {torch.float32}
    trainer.train()
    trainer.save_model()
    prompts, completions = ["Tell me:", "Tell a story:"], ["a sunny day", "happy"]
    scorer = RewardScorer(trainer.model, trainer.processing_class, autocast=torch.bfloat16)
    assert RewardScorer.from_pretrained(trainer.args.output_dir).raw(prompts, completions) == scorer.raw(
        prompts, completions
    )
