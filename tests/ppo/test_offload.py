"""`offload_reward_model` and `offload_optimizer`: what is refused, and what is on a device when.

Whole runs with a device are in `tests/devices`: equal to the bit to those without the options, also after a resume.
"""

import pytest
import torch
from bitsandbytes.optim import PagedAdamW8bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, LlamaForSequenceClassification

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, PPOConfig, RewardScorer, load_base_model
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.offload import ModelsOnCall, Offload, StatesOnCall
from tests.schedule_free import ScheduleFreeSGD

NAMES = ["offload_reward_model", "offload_optimizer"]
CARD = torch.device("cuda", 0)  # named only: nothing is moved to it


@pytest.fixture
def reward_model(tiny_config, chat_tokenizer):
    tiny_config.num_labels, tiny_config.pad_token_id = 1, chat_tokenizer.pad_token_id
    return LlamaForSequenceClassification(tiny_config)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# ---- What is refused ----


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_that_places_weights_is_refused(monkeypatch, tmp_path, name):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` does
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError) as error:
        PPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: True})
    message = str(error.value)
    assert message.startswith(f"{name}: ") and message.endswith("leave it out.") and "\n" not in message


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "schedule_free_adamw"])
def test_an_optimizer_that_moves_or_reads_its_states_is_refused_by_name(tmp_path, optim):
    with pytest.raises(UserError, match=f"offload_optimizer with optim='{optim}': .* leave it out") as error:
        PPOConfig(str(tmp_path), use_cpu=True, bf16=False, optim=optim, offload_optimizer=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [PagedAdamW8bit, ScheduleFreeSGD])
def test_such_an_optimizer_of_the_user_is_refused_too(tmp_path, make):
    offload = Offload(PPOConfig(str(tmp_path), use_cpu=True, bf16=False, offload_optimizer=True), CARD)
    optimizer = make([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(UserError, match=f"offload_optimizer: {make.__name__} .*leave it out, or choose") as error:
        offload.take_states(optimizer)
    assert "\n" not in str(error.value)


def test_without_a_reward_model_there_is_nothing_to_move(make_trainer):
    with pytest.raises(UserError, match="offload_reward_model: no reward model has a base of its own") as error:
        make_trainer(offload_reward_model=True)
    assert "\n" not in str(error.value)


def test_an_adapter_on_the_base_of_the_policy_is_not_moved(make_trainer, chat_tokenizer, tiny_config, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "activation_checkpointing": False}
    rows = [{"prompt": "Tell me", "chosen": " a day", "rejected": " sad"}] * 2
    base = load_base_model(str(tmp_path / "base"), task="reward", dtype="float32")
    args = BradleyTerryConfig(str(tmp_path / "reward"), **options)
    rewards = BradleyTerryTrainer(base, args, rows, processing_class=chat_tokenizer, peft_config=config)
    rewards.save_model()
    policy = load_base_model(str(tmp_path / "base"), dtype="float32")
    with pytest.raises(UserError, match="adapters on the policy's base are needed all the time"):
        make_trainer(model=policy, reward_funcs=str(tmp_path / "reward"), offload_reward_model=True)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"hf_device_map": {"model": 0, "score": "cpu"}}, "is spread over several devices"),
        ({"is_quantized": True}, r"is quantized \(8-bit\), and only 4-bit and unquantized ones are moved"),
    ],
)
def test_a_model_that_cannot_be_moved_is_refused(make_trainer, reward_model, change, says):
    for name, value in change.items():
        setattr(reward_model, name, value)
    if "is_quantized" in change:
        reward_model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    trainer = make_trainer(reward_funcs=lambda completions, **columns: [0.0] * len(completions))
    trainer.rewards.models = lambda: [reward_model]
    with pytest.raises(UserError, match=f"offload_reward_model: a reward model {says}") as error:
        Offload(trainer.args, CARD).take_rewards([trainer.rewards], trainer.policy)
    assert "\n" not in str(error.value)


# ---- What moves when ----


class Moves(nn.Linear):
    """A layer that notes where it is sent, and stays."""

    def __init__(self):
        super().__init__(1, 1)
        self.sent: list[str] = []

    def to(self, device):
        self.sent.append(torch.device(device).type)
        return self


def test_models_go_back_also_after_an_error():
    models = [Moves(), Moves()]
    placed = ModelsOnCall(models, CARD)
    with pytest.raises(KeyError), placed.on_device():
        assert [model.sent for model in models] == [["cuda"], ["cuda"]]
        raise KeyError
    assert [model.sent for model in models] == [["cuda", "cpu"], ["cuda", "cpu"]]


def test_on_a_cpu_the_options_change_nothing_and_say_so(make_trainer, reward_model, chat_tokenizer, caplog):
    weights = []
    for on in (False, True):
        scorer = RewardScorer(reward_model, chat_tokenizer)
        options = {"offload_optimizer": on, "offload_reward_model": on}
        trainer = make_trainer(reward_funcs=scorer, critic="adapter", **options)
        trainer.train()
        weights.append(trained(trainer.model))
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    said = "offload_reward_model and offload_optimizer: nothing is moved in a run on the CPU"
    assert caplog.text.count(said) == 1


def test_states_that_are_on_the_cpu_anyway_stay(tiny_config, lora):
    model = get_peft_model(LlamaForCausalLM(tiny_config), lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    states = StatesOnCall(optimizer)
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    optimizer.step()
    kept = {id(value) for values in optimizer.state.values() for value in values.values()}
    states.put_away()
    assert {id(value) for values in optimizer.state.values() for value in values.values()} == kept
