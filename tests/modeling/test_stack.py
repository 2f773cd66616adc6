"""AdapterStack: roles on one base compute, train and are saved like separate models."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.heads import ScalarHead, install_fp32_score
from hf_rlhf_ext.modeling.logprobs import completion_hidden_states
from hf_rlhf_ext.modeling.stack import AdapterStack

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 0, 0]])
PROMPT_LENGTHS = torch.tensor([3, 2])
MASK = torch.tensor([[True] * 4, [True] * 3 + [False]])
BATCH = (IDS, PROMPT_LENGTHS, MASK)


def drawn(model, name, seed):
    """Gives adapter `name` random weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture
def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture
def stack(tiny_llama, lora):
    """policy, reference (the base), frozen (an adapter) and value (a trainable adapter with a head)."""
    stack = AdapterStack(get_peft_model(tiny_llama, lora))
    drawn(stack.model, "default", 1)
    stack.attach("reference")
    stack.attach("frozen", "policy")
    head = ScalarHead(32, bias=True)
    stack.attach("value", lora, head=head, trainable=True)
    drawn(stack.model, "value", 2)
    stack.model.eval()
    return stack


@pytest.fixture
def reward_folder(tiny_config, tmp_path):
    """A reward adapter in the form that `BradleyTerryTrainer` saves: SEQ_CLS, with the head among its weights."""
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    install_fp32_score(model)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    drawn(model, "default", 3)
    model.save_pretrained(tmp_path / "reward")
    return tmp_path


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


def test_one_joint_pass_gives_the_states_of_separate_passes(stack):
    roles = ["policy", "reference", "frozen", "value"]
    passes = []
    stack.model.get_base_model().model.register_forward_hook(lambda *_: passes.append(1))
    joint = stack.hidden_states(roles, *BATCH)
    assert stack.can_score_jointly and len(passes) == 1
    apart = stack.hidden_states(roles, *BATCH, joint=False)
    assert len(passes) == 5
    for role in roles:
        torch.testing.assert_close(joint[role], apart[role], rtol=0, atol=1e-6)
        with stack.activate(role) as model:
            torch.testing.assert_close(apart[role], completion_hidden_states(model, model, *BATCH))
    assert torch.equal(apart["frozen"], apart["policy"])
    assert (apart["value"] - apart["policy"]).abs().max() > 1e-2 < (apart["reference"] - apart["policy"]).abs().max()


def test_dora_is_computed_in_passes_of_its_own(tiny_llama):
    dora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
    stack = AdapterStack(get_peft_model(tiny_llama, dora))
    stack.attach("reference")
    drawn(stack.model, "default", 1)
    stack.model.eval()
    assert not stack.can_score_jointly
    states = stack.hidden_states(["policy", "reference"], *BATCH)
    assert (states["policy"] - states["reference"]).abs().max() > 1e-3


@pytest.mark.parametrize("role", ["policy", "reference", "frozen", "value"])
def test_activating_leaves_flags_and_the_active_adapter(stack, role):
    before = flags(stack.model)
    assert {name.split(".")[-2] for name, on in before.items() if on and "lora" in name} == {"default", "value"}
    with pytest.raises(RuntimeError), stack.activate(role):
        assert flags(stack.model) == before
        raise RuntimeError
    assert flags(stack.model) == before and stack.model.active_adapter == "default"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_backward_passes_give_the_gradients_of_two_models(stack, checkpointing):
    separate = {role: copy.deepcopy(stack) for role in ("policy", "value")}
    if checkpointing:
        for each in (stack, *separate.values()):
            each.model.activation_checkpointing_enable({"use_reentrant": False})
            each.model.enable_input_require_grads()
    for each in (stack, *separate.values()):
        each.model.train()

    def backward(stack, role):
        with stack.activate(role) as model:
            hidden = completion_hidden_states(model, model, *BATCH)
            loss = hidden.square().sum() if role == "policy" else stack.roles["value"].head(hidden).square().sum()
            loss.backward()

    for role in ("policy", "value"):
        backward(stack, role)  # policy, then value, on one base
        backward(separate[role], role)
    for role, other in (("policy", "value"), ("value", "policy")):
        got, expected = stack.parameters(role), separate[role].parameters(role)
        assert len(got) == len(expected) > 20
        for mine, wanted in zip(got, expected, strict=True):
            assert torch.equal(mine.grad, wanted.grad)
        assert all(p.grad is None for p in separate[role].parameters(other))
    assert sum(p.grad.abs().sum() for p in stack.parameters("policy")) > 0


def test_a_reward_adapter_attaches_with_its_head(reward_folder, lora):
    base = LlamaForCausalLM.from_pretrained(reward_folder / "base")
    expected_model = LlamaForSequenceClassification.from_pretrained(reward_folder / "base", num_labels=1)
    install_fp32_score(expected_model)
    expected_model = PeftModel.from_pretrained(expected_model, reward_folder / "reward").eval()
    scores = []
    expected_model.base_model.model.score.register_forward_hook(lambda module, args, out: scores.append(out))
    expected_model.config.pad_token_id = 0
    expected_model(input_ids=IDS[:1])
    stack = AdapterStack(get_peft_model(base, lora))
    before = flags(stack.model)
    role = stack.attach("reward", reward_folder / "reward")
    stack.model.eval()
    assert {name: on for name, on in flags(stack.model).items() if name in before} == before
    with stack.activate("reward") as model:
        hidden = completion_hidden_states(model, model, IDS[:1], torch.tensor([1]), torch.ones(1, 7).bool()[:, :6])
    torch.testing.assert_close(role.head(hidden), scores[0][0, :6])  # states before each of the last six tokens
    assert not any(p.requires_grad for p in stack.parameters("reward")) and stack.can_score_jointly


def test_a_saved_role_is_an_ordinary_adapter_folder(stack, tiny_config, tmp_path):
    stack.save("value", tmp_path / "value")
    assert {path.suffix for path in (tmp_path / "value").iterdir()} <= {".json", ".safetensors", ".md"}
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM(tiny_config), tmp_path / "value").eval()
    with stack.activate("value") as model:
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    held, expected = stack.parameters("value"), [p.detach().clone() for p in stack.parameters("value")]
    with torch.no_grad():
        for parameter in held:
            parameter.add_(1.0)
    stack.load("value", tmp_path / "value")
    assert all(mine is now for mine, now in zip(held, stack.parameters("value"), strict=True))
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(held, expected, strict=True))


def test_a_model_of_its_own_is_a_role_too(stack, tiny_config, tmp_path):
    torch.manual_seed(5)
    own = LlamaForCausalLM(tiny_config).eval()
    stack.attach("critic", own, head=ScalarHead(32), trainable=True)
    assert torch.equal(stack.hidden_states(["policy", "critic"], *BATCH)["critic"],
                       completion_hidden_states(own, own, *BATCH))  # fmt: skip
    assert len(stack.parameters("critic")) == len(list(own.parameters())) + 1
    assert not {id(p) for p in stack.parameters("critic")} & {id(p) for p in stack.parameters("policy")}
    stack.save("critic", tmp_path)
    expected = own.lm_head.weight.detach().clone()
    own.lm_head.weight.data.add_(1.0)
    stack.load("critic", tmp_path)
    assert torch.equal(own.lm_head.weight, expected)


def test_a_trained_model_of_its_own_goes_where_the_base_is(tiny_llama, tiny_config, lora):
    stack = AdapterStack(get_peft_model(tiny_llama.to("meta"), lora))  # as a 4-bit base that is on its card already
    stack.attach("critic", LlamaForCausalLM(tiny_config), head=ScalarHead(32), trainable=True)
    assert {p.device.type for p in stack.parameters("critic")} == {"meta"}


def test_mistakes_are_one_line(stack, tiny_config, reward_folder):
    with pytest.raises(UserError, match="'reference' has no adapter to copy"):
        stack.attach("copy", "reference")
    plain = AdapterStack(LlamaForCausalLM(tiny_config))
    with pytest.raises(UserError, match="'reward': a model without adapters"):
        plain.attach("reward", reward_folder / "reward")
    tiny_config.hidden_size = 16
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    other = AdapterStack(get_peft_model(LlamaForCausalLM(tiny_config), lora))
    with pytest.raises(UserError, match="does not fit the base") as error:
        other.attach("reward", reward_folder / "reward")
    assert str(reward_folder / "reward") in str(error.value) and "\n" not in str(error.value)
