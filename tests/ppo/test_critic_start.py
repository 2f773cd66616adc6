"""`critic_start`: the weights that a critic starts from, compared with those of their source."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.loading import load_base_model
from hf_rlhf_ext.reward.normalization import RewardNormalization


@pytest.fixture
def base(tiny_config, chat_tokenizer, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def save_adapter(base, folder, task, chat_tokenizer):
    """An adapter on the base with random weights, so that no two of them are the same."""
    kind = "reward" if task == "SEQ_CLS" else "causal_lm"
    model = load_base_model(base, task=kind, dtype="float32")
    model = get_peft_model(model, LoraConfig(r=4, task_type=task, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reward(base, chat_tokenizer, tmp_path):
    torch.manual_seed(5)
    folder = save_adapter(base, tmp_path / "reward", "SEQ_CLS", chat_tokenizer)
    RewardNormalization(mean=0.5, std=2.0, base_dtype="float32").save(folder)
    return folder


@pytest.fixture
def sft(base, chat_tokenizer, tmp_path):
    torch.manual_seed(6)
    return save_adapter(base, tmp_path / "sft", "CAUSAL_LM", chat_tokenizer)


@pytest.fixture
def make(make_trainer, base, sft, reward):
    """A trainer that trains an SFT adapter further, with a reward adapter on the same base."""

    def trainer(**options):
        model = PeftModel.from_pretrained(load_base_model(base, dtype="float32"), sft, is_trainable=True)
        defaults = {"model": model, "peft_config": None, "reward_funcs": str(reward), "critic": "adapter"}
        return make_trainer(**(defaults | options))

    return trainer


def adapter_weights(trainer, name):
    return {
        key.replace(f".{name}.", "."): weight
        for key, weight in trainer.model.named_parameters()
        if f".{name}." in key and "head" not in key
    }


def assert_value_adapter_is(trainer, source, other):
    value, expected, not_expected = (adapter_weights(trainer, name) for name in ("value", source, other))
    assert value.keys() == expected.keys() and len(value) >= 8
    for name, weight in expected.items():
        assert torch.equal(value[name], weight), name
    assert any(not torch.equal(value[name], not_expected[name]) for name in value)


def assert_zero_head(trainer):
    assert not trainer.value_head.weight.any() and not trainer.value_head.bias.any()


@pytest.mark.parametrize("start", [None, "reward"])
def test_reward_is_adapter_and_head_of_the_reward_model(make, reward, start):
    trainer = make(critic_start=start, reward_scale=3.0)
    assert_value_adapter_is(trainer, "reward", "default")
    (name,) = [name for name in load_file(reward / "adapter_model.safetensors") if name.endswith("score.weight")]
    saved = load_file(reward / "adapter_model.safetensors")[name]
    # Rewards in PPO are 3 · (score - ½) / 2.
    torch.testing.assert_close(trainer.value_head.weight, saved * 3 / 2, rtol=0, atol=1e-6)
    assert trainer.value_head.bias.item() == pytest.approx(-0.5 * 3 / 2, abs=1e-6)


def test_reward_features_are_the_reward_adapter_with_a_head_of_zeros(make):
    trainer = make(critic_start="reward_features")
    assert_value_adapter_is(trainer, "reward", "default")
    assert_zero_head(trainer)


def test_policy_is_a_copy_of_the_policy_with_a_head_of_zeros(make):
    trainer = make(critic_start="policy")
    assert_value_adapter_is(trainer, "default", "reward")
    assert_zero_head(trainer)
    start = {name: weight.detach().clone() for name, weight in adapter_weights(trainer, "value").items()}
    trainer.train()  # two adapters, not one
    assert any(not torch.equal(adapter_weights(trainer, "value")[name], weight) for name, weight in start.items())
    value, policy = adapter_weights(trainer, "value"), adapter_weights(trainer, "default")
    assert any(not torch.equal(value[name], policy[name]) for name in value)


def test_without_a_shared_reward_the_default_is_the_policy(make_trainer, sft):
    trainer = make_trainer(model=str(sft), peft_config=None, critic="adapter")
    value, policy = adapter_weights(trainer, "value"), adapter_weights(trainer, "default")
    assert value.keys() == policy.keys() and all(torch.equal(value[name], policy[name]) for name in value)
    assert_zero_head(trainer)


@pytest.mark.parametrize("start", ["reward", "reward_features"])
def test_a_reward_that_does_not_share_the_base_is_one_line(make_trainer, sft, start):
    with pytest.raises(UserError, match=f"critic_start='{start}' needs a reward model that is an adapter.*'policy'"):
        make_trainer(model=str(sft), peft_config=None, critic="adapter", critic_start=start)


def test_a_head_critic_reads_the_policy(make):
    assert_zero_head(make(critic="head", critic_start="policy"))
    for start in ("reward", "reward_features"):
        with pytest.raises(UserError, match=f"critic_start='{start}': critic='head' reads.*choose critic='adapter'"):
            make(critic="head", critic_start=start)


def single_label(config):
    config = type(config)(**config.to_dict())
    config.num_labels = 1
    return config


@pytest.mark.parametrize("start", [None, "reward", "reward_features"])
def test_a_separate_model_is_the_reward_model(make_trainer, tiny_config, start):
    torch.manual_seed(7)
    model = LlamaForSequenceClassification(single_label(tiny_config))
    expected = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    trainer = make_trainer(critic="model", value_model=model, critic_start=start)
    critic = trainer.stack.roles["value"].model.state_dict()
    for name, weight in expected.items():
        assert torch.equal(critic[name], weight), name
    if start == "reward_features":
        assert_zero_head(trainer)
    else:
        assert torch.equal(trainer.value_head.weight, expected["score.weight"])


def test_a_separate_model_is_a_copy_of_the_whole_policy(make_trainer):
    trainer = make_trainer(peft_config=None, critic="model", critic_start="policy", learning_rate=1e-3)
    critic = dict(trainer.stack.roles["value"].model.named_parameters())
    policy = {name: weight for name, weight in trainer.model.named_parameters() if not name.startswith("value_")}
    for name, weight in critic.items():
        assert torch.equal(weight, policy[name]) and weight is not policy[name], name
    assert_zero_head(trainer)


def test_a_separate_model_that_is_not_what_the_start_says_is_one_line(make_trainer, tiny_config):
    policy = LlamaForCausalLM(tiny_config)
    with pytest.raises(UserError, match="critic_start='policy'.*value_model was given: leave one out"):
        make_trainer(critic="model", value_model=policy, critic_start="policy")
    with pytest.raises(UserError, match="critic_start='reward' with critic='model' needs a reward model"):
        make_trainer(critic="model", value_model=policy, critic_start="reward")
    with pytest.raises(UserError, match="pass it as value_model, or leave critic_start out"):
        make_trainer(critic="model", peft_config=None, critic_start="reward_features")
    # A remedy that the next line would refuse is none.
    with pytest.raises(UserError, match="the policy is an adapter: choose critic='adapter', or pass value_model and"):
        make_trainer(critic="model", critic_start="policy")


@pytest.mark.parametrize("start, is_said", [(None, True), ("reward_features", False), ("policy", False)])
def test_a_reward_head_under_par_is_said(make, caplog, start, is_said):
    make(critic_start=start, reward_shaping="par", num_reference_answers=1)
    lines = [line for line in caplog.messages if "critic_start='reward_features'" in line]
    assert len(lines) == is_said
    caplog.clear()
    make(critic_start=start)
    assert "critic_start" not in caplog.text
