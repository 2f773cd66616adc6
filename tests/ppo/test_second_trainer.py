"""A second trainer on a model that a first one trained, and adapters with any name."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from trl import SFTConfig, SFTTrainer

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, RewardScorer
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.heads import install_fp32_score
from hf_rlhf_ext.modeling.ownership import adapter_parameters
from hf_rlhf_ext.reward.model_setup import prepare_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
TINY = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}


@torch.no_grad()
def logits(model):
    was_training = model.training
    model.eval()
    result = model(input_ids=IDS).logits
    model.train(was_training)
    return result


def reference_is_off(trainer):
    """Largest difference between the logits of reference and policy."""
    with trainer.stack.activate("reference") as reference:
        off = logits(reference)
    return float((off - logits(trainer.policy)).abs().max())


def trained_names(trainer):
    trainer.create_optimizer()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    return {name for name, parameter in trainer.model.named_parameters() if id(parameter) in held}


@pytest.fixture
def short_run(make_trainer):
    def make(**options):
        return make_trainer(
            **{"max_steps": 1, "num_mini_batches": 1, "num_ppo_epochs": 1, "learning_rate": 0.05} | options
        )

    return make


@pytest.mark.parametrize(
    "name, critic", [("default", "head"), ("default", "adapter"), ("value", "adapter"), ("ref", "head")]
)
def test_a_second_trainer_starts_from_the_policy_as_it_is_now(short_run, tiny_llama, lora, name, critic):
    model = get_peft_model(tiny_llama, lora, adapter_name=name)
    first = short_run(model=model, peft_config=None, critic=critic)
    first.train()
    second = short_run(model=model, peft_config=None, critic=critic, learning_rate=0.0)
    assert reference_is_off(second) == 0 and reference_is_off(first) > 1e-3
    assert not torch.equal(first.value_head.weight, second.value_head.weight)
    assert torch.count_nonzero(second.value_head.weight) == 0  # as in a fresh run
    second.train()
    assert second.state.log_history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    # What the first trainer left is neither trained nor a part of the second one.
    own = {second.stack.roles[role].adapter for role in ("policy", "value")}
    names = trained_names(second)
    for other in model.peft_config.keys() - own:
        assert not any(f".{other}." in parameter for parameter in names if "head" not in parameter), other
    assert {parameter for parameter in names if "head" in parameter} == {"value_head.weight", "value_head.bias"}


def test_full_fine_tuning_twice_leaves_no_head_behind(short_run, tiny_llama, tmp_path):
    for critic, leftover in (("head", "value_head"), ("model", "value_model"), ("head", "value_model")):
        trainer = short_run(model=tiny_llama, peft_config=None, critic=critic)
        assert reference_is_off(trainer) == 0
        assert not hasattr(trainer.stack.roles["reference"].model, "value_head")
        assert hasattr(trainer.model, "value_model") == (critic == "model"), leftover
        trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert not any("value" in key for key in load_file(tmp_path / "out" / "model.safetensors"))


def test_a_base_that_was_given_to_a_trainer_is_refused(short_run, tiny_llama, lora):
    first = short_run(model=tiny_llama)
    first.train()
    for config in (lora, None):
        with pytest.raises(UserError, match="model: the layers .* have adapters already.*load the model again"):
            short_run(model=tiny_llama, peft_config=config)
    assert reference_is_off(short_run(model=first.policy, peft_config=None)) == 0


def test_a_reward_trainer_trains_no_adapter_but_the_active_one(tiny_config, chat_tokenizer, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    tiny_config.num_labels = 1
    model = get_peft_model(install_fp32_score(LlamaForSequenceClassification(tiny_config)), config)
    model.add_adapter("other", config)
    for parameter in adapter_parameters(model, "other").values():
        parameter.requires_grad_(True)
    prepare_model(model, chat_tokenizer, None, BradleyTerryConfig(str(tmp_path), **TINY), {})
    assert not any(parameter.requires_grad for parameter in adapter_parameters(model, "other").values())
    assert all(parameter.requires_grad for parameter in adapter_parameters(model, "default").values())


def test_ppo_after_sft_in_memory(short_run, tiny_llama, lora, chat_tokenizer, tmp_path):
    rows = Dataset.from_list([{"prompt": "Tell me", "completion": " a sunny day"}] * 4)
    sft = SFTTrainer(
        tiny_llama, args=SFTConfig(str(tmp_path / "sft"), max_steps=2, learning_rate=1e-2, **TINY), train_dataset=rows,
        processing_class=chat_tokenizer, peft_config=lora,
    )  # fmt: skip
    sft.train()
    before = logits(sft.model)
    trainer = short_run(model=sft.model, peft_config=None, critic="adapter")
    assert torch.equal(logits(trainer.policy), before) and reference_is_off(trainer) == 0
    trainer.train()
    assert trainer.state.log_history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)


def test_a_reward_adapter_is_attached_again(short_run, tiny_config, chat_tokenizer, lora, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    classifier = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    rows = Dataset.from_list([{"prompt": "Tell", "chosen": " me" * k, "rejected": " fox"} for k in range(1, 5)])
    args = BradleyTerryConfig(str(tmp_path / "reward"), max_steps=2, learning_rate=1e-2, **TINY)
    reward = BradleyTerryTrainer(classifier, args, rows, processing_class=chat_tokenizer, peft_config=config)
    reward.train()
    reward.save_model()
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), lora)
    expected = RewardScorer.from_pretrained(tmp_path / "reward")(["Tell"], [" me"])
    for _ in range(2):
        trainer = short_run(model=model, peft_config=None, critic="adapter", reward_funcs=str(tmp_path / "reward"))
        assert trainer.rewards.funcs[0].model is model
        assert trainer.rewards.funcs[0](["Tell"], [" me"]) == pytest.approx(expected, abs=1e-5)
        trainer.train()

    # A second reward trainer goes on with the adapter and the head.
    before = RewardScorer(reward.model, chat_tokenizer).raw(["Tell"], [" me"])
    args = BradleyTerryConfig(str(tmp_path / "again"), max_steps=1, learning_rate=1e-2, **TINY)
    second = BradleyTerryTrainer(reward.model, args, rows, processing_class=chat_tokenizer)
    assert RewardScorer(second.model, chat_tokenizer).raw(["Tell"], [" me"]) == before
    second.train()
    second.save_model()
    after = RewardScorer(second.model, chat_tokenizer).raw(["Tell"], [" me"])
    assert after != before
    assert RewardScorer.from_pretrained(tmp_path / "again").raw(["Tell"], [" me"]) == pytest.approx(after, abs=1e-6)
    with pytest.raises(UserError, match="model: the layers .* have adapters already"):
        BradleyTerryTrainer(classifier, args, rows, processing_class=chat_tokenizer, peft_config=config)


@pytest.mark.parametrize("bystander", ["ref", "value", "layers", "0", "weight", "lora_A"])
def test_an_adapter_of_the_user_is_left_alone(short_run, tiny_llama, lora, bystander, tmp_path):
    model = get_peft_model(copy.deepcopy(tiny_llama), lora)
    model.add_adapter(bystander, copy.deepcopy(lora))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.shape[0] == 4 or parameter.shape[-1] == 4:  # the rank: of adapters only
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.set_adapter(bystander)
    before = logits(model)
    model.set_adapter("default")
    trainer = short_run(model=model, peft_config=None, critic="adapter")
    assert reference_is_off(trainer) == 0
    n_weights = len(trainer.stack.parameters("policy"))
    assert n_weights == len(trainer.stack.parameters("value")) - 2 == 2 * 7 * tiny_llama.config.num_hidden_layers
    trainer.train()
    assert reference_is_off(trainer) > 1e-3
    trainer.save_model(str(tmp_path / "out"))
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == n_weights
    reloaded = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path / "out")
    assert torch.equal(logits(reloaded), logits(trainer.policy))
    model.set_adapter(bystander)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["value", "0"])
def test_a_run_of_an_adapter_with_any_name_resumes(short_run, tiny_llama, lora, name, tmp_path):
    def make(folder):
        model = get_peft_model(copy.deepcopy(tiny_llama), lora, adapter_name=name)
        options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "critic": "adapter"}
        return short_run(folder=folder, model=model, peft_config=None, **options)

    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert torch.equal(logits(resumed.policy), logits(whole.policy))
    for role in ("policy", "value"):
        for mine, wanted in zip(resumed.stack.parameters(role), whole.stack.parameters(role), strict=True):
            assert torch.equal(mine, wanted)


@pytest.mark.parametrize("critic", ["head", "model"])
def test_a_model_that_sft_has_trained_whole_in_memory_is_the_start(
    make_trainer, tiny_llama, chat_tokenizer, tmp_path, critic
):
    # TRL leaves a `forward` on the model that calls the original model, in a copy too.
    texts = Dataset.from_list([{"prompt": "Tell me", "completion": " a story"}] * 4)
    sft = SFTTrainer(
        tiny_llama,
        args=SFTConfig(str(tmp_path / "sft"), max_steps=1, **TINY),
        train_dataset=texts,
        processing_class=chat_tokenizer,
    )
    sft.train()
    trainer = make_trainer(model=sft.model, peft_config=None, critic=critic, learning_rate=1e-3, max_steps=4)
    assert reference_is_off(trainer) == 0
    start = logits(trainer.policy)
    trainer.train()
    with trainer.stack.activate("reference") as reference:
        assert torch.equal(logits(reference), start)  # its own weights, which stay
    assert reference_is_off(trainer) > 0


def test_an_adapter_that_sft_has_trained_in_memory_can_be_the_value_model(
    make_trainer, tiny_llama, lora, chat_tokenizer, tmp_path
):
    texts = Dataset.from_list([{"prompt": "Tell me", "completion": " a story"}] * 4)
    sft = SFTTrainer(
        copy.deepcopy(tiny_llama),
        args=SFTConfig(str(tmp_path / "sft"), max_steps=1, **TINY),
        train_dataset=texts,
        processing_class=chat_tokenizer,
        peft_config=copy.deepcopy(lora),
    )
    sft.train()
    trainer = make_trainer(model=tiny_llama, value_model=sft.model, critic="model", max_steps=1)
    assert torch.allclose(logits(trainer.stack.roles["value"].model), logits(sft.model), atol=1e-5)
    trainer.train()
