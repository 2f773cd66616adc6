"""Adapters: the behavior of PEFT that the library relies on, and switching, copying, saving and merging."""

import copy
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.adapters import (
    active_adapter,
    copy_adapter,
    load_adapter_weights,
    merged_adapter,
    mixed_precision,
    save_adapter,
)
from hf_rlhf_ext.modeling.heads import ScalarHead
from hf_rlhf_ext.modeling.probing import evaluating

ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
KINDS = {
    "lora": LoraConfig(r=4, **ALL),
    "dora": LoraConfig(r=4, use_dora=True, **ALL),
    "rslora": LoraConfig(r=4, use_rslora=True, lora_alpha=8, **ALL),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"],
                     feedforward_modules=["down_proj"]),
    "modules_to_save": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
}  # fmt: skip


def config_of(kind):
    return copy.deepcopy(KINDS[kind])  # PEFT writes the modules it found into the config


IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture
def with_adapter(tiny_llama):
    """Makes a PeftModel of some kind with random adapter weights, so that the adapter does something."""

    def make(kind="lora", base=tiny_llama):
        model = get_peft_model(base, config_of(kind))
        randomize(model)
        return model.eval()

    return make


def randomize(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_((0.1 * noise).to(parameter.dtype))


@torch.no_grad()
def logprobs(model):
    return torch.log_softmax(model(input_ids=IDS).logits.float(), -1)


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# Facts about PEFT that decided the design (DESIGN.md, "One base, many roles"). When one of these fails, PEFT changed.


def test_peft_fact_switching_freezes_all_other_adapters(with_adapter):
    model = with_adapter()
    model.add_adapter("value", config_of("lora"))
    loss = model(input_ids=IDS).logits.square().mean()
    model.set_adapter("value")  # before backward: every gradient of the policy is dropped without an error
    loss.backward()
    assert all(p.grad is None for name, p in model.named_parameters() if ".default." in name)


def test_peft_fact_leaving_disable_adapter_resets_the_flags(with_adapter):
    model = with_adapter()
    model.add_adapter("value", config_of("lora"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with model.disable_adapter():
        pass
    assert not any(flag for name, flag in flags(model).items() if ".value." in name)


def test_peft_fact_all_linear_wraps_a_head_that_hangs_on_the_model_already(tiny_llama):
    tiny_llama.add_module("value_head", ScalarHead(32))
    model = get_peft_model(tiny_llama, config_of("lora"))
    assert any("value_head.lora_A" in name for name, _ in model.named_parameters())


def test_peft_fact_a_reward_adapter_attaches_to_a_causal_base(tiny_config, tiny_llama, tmp_path):
    tiny_config.num_labels = 1
    reward = LlamaForSequenceClassification(tiny_config)
    reward.model.load_state_dict(tiny_llama.model.state_dict())
    reward = get_peft_model(reward, LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    randomize(reward)
    save_adapter(reward, "default", tmp_path)
    expected = reward.eval().base_model.model.model(input_ids=IDS).last_hidden_state
    policy = get_peft_model(tiny_llama, config_of("lora"))
    result = policy.load_adapter(str(tmp_path), adapter_name="reward")
    assert [key.split(".")[-2:] for key in result.unexpected_keys] == [["score", "weight"]]
    with active_adapter(policy.eval(), "reward"):
        assert torch.equal(policy.base_model.model.model(input_ids=IDS).last_hidden_state, expected)


# Switching


@pytest.mark.parametrize("name", ["ref", None])
@pytest.mark.parametrize("fails", [False, True])
def test_active_adapter_restores_what_was_active_and_every_flag(with_adapter, name, fails):
    model = with_adapter()
    copy_adapter(model, "default", "ref")
    model.add_adapter("value", config_of("lora"))
    for key, parameter in model.named_parameters():  # two roles trainable at once, which PEFT would not keep
        parameter.requires_grad_(".default." in key or ".value." in key)
    before, expected = flags(model), logprobs(model)
    try:
        with active_adapter(model, name):
            assert not torch.equal(logprobs(model), expected) or name == "ref"
            if fails:
                raise RuntimeError("stop")
    except RuntimeError:
        assert fails
    assert model.active_adapter == "default" and flags(model) == before
    assert torch.equal(logprobs(model), expected)


def test_active_adapter_none_is_the_bare_base(with_adapter, tiny_llama):
    expected = logprobs(tiny_llama.eval())
    model = with_adapter()
    with active_adapter(model, None):
        assert torch.equal(logprobs(model), expected)
    assert not torch.equal(logprobs(model), expected)


# Copying


@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_adapter_is_the_same_policy_frozen(with_adapter, kind):
    model = with_adapter(kind)
    before, expected = flags(model), logprobs(model)
    copy_adapter(model, "default", "ref")
    assert model.active_adapter == "default"
    after = flags(model)
    assert {key: after[key] for key in before} == before
    assert not any(after[key] for key in after.keys() - before.keys())
    randomize(model, seed=2)  # training moves the policy on
    assert not torch.equal(logprobs(model), expected)
    with active_adapter(model, "ref"):
        assert torch.equal(logprobs(model), expected)


def test_copying_a_copy_made_for_inference(with_adapter, tiny_config, tmp_path):
    model = with_adapter()
    save_adapter(model, "default", tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM(tiny_config), tmp_path)  # frozen, not trainable
    copy_adapter(loaded, "default", "ref")
    with active_adapter(loaded, "ref"):
        assert torch.equal(logprobs(loaded), logprobs(model))


# Saving and loading


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_loads_with_plain_peft_to_the_bit(with_adapter, tiny_config, tmp_path, kind):
    model = with_adapter(kind)
    copy_adapter(model, "default", "ref")
    model.peft_config["default"].inference_mode = False
    save_adapter(model, "default", tmp_path)
    assert model.peft_config["default"].inference_mode is False
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM(tiny_config), tmp_path)
    assert torch.equal(logprobs(loaded.eval()), logprobs(model))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert all("ref" not in key for key in load_file(tmp_path / "adapter_model.safetensors"))


def test_a_saved_adapter_names_its_base_and_no_place(with_adapter, tiny_llama, tmp_path):
    model = with_adapter()
    tiny_llama.name_or_path = "someone/a-base"
    save_adapter(model, "default", tmp_path / "new" / "folder")
    text = (tmp_path / "new" / "folder" / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == "someone/a-base"
    assert json.loads(text)["inference_mode"] is True
    assert str(tmp_path) not in text and str(Path(__file__).parents[2]) not in text


@pytest.mark.parametrize("kind", KINDS)
def test_weights_load_into_the_adapter_that_is_there(with_adapter, tmp_path, kind):
    model = with_adapter(kind)
    expected, parameters = logprobs(model), {name: id(p) for name, p in model.named_parameters()}
    save_adapter(model, "default", tmp_path)
    randomize(model, seed=2)
    load_adapter_weights(model, "default", tmp_path)
    assert torch.equal(logprobs(model), expected)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters  # the optimizer's own


def test_an_adapter_that_does_not_fit_is_one_line(with_adapter, tiny_config, tmp_path):
    model = with_adapter()
    save_adapter(model, "default", tmp_path)
    wide = get_peft_model(LlamaForCausalLM(tiny_config), LoraConfig(r=8, **ALL))
    few = get_peft_model(LlamaForCausalLM(tiny_config), LoraConfig(r=4, target_modules=["q_proj"]))
    for other, text in ((wide, "does not fit"), (few, "weights that the model lacks")):
        with pytest.raises(UserError, match=text) as error:
            load_adapter_weights(other, "default", tmp_path)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_an_adapter_with_missing_weights_is_one_line(with_adapter, tmp_path):
    model = with_adapter()
    save_adapter(model, "default", tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    dropped = sorted(state)[0]
    del state[dropped]
    save_file(state, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="adapter's file lacks.*" + dropped.rsplit(".", 2)[-2]):
        load_adapter_weights(model, "default", tmp_path)


# Modes


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_restores_the_mode(tiny_llama, training):
    tiny_llama.train(training)
    with pytest.raises(RuntimeError), evaluating(tiny_llama):
        assert not tiny_llama.training
        raise RuntimeError
    assert tiny_llama.training is training


# Merging


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_gives_the_same_policy_and_restores_the_base_to_the_bit(with_adapter, tiny_llama, kind, dtype):
    model = with_adapter(kind, tiny_llama.to(dtype))
    expected, before = logprobs(model), weights(model)
    with merged_adapter(model, enabled=True):
        merged = weights(model)
        torch.testing.assert_close(logprobs(model), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)
    assert any(not torch.equal(merged[name], before[name]) for name in before)  # it did merge
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert torch.equal(logprobs(model), expected)


def test_an_exception_inside_restores_the_base_too(with_adapter):
    model = with_adapter()
    before = weights(model)
    with pytest.raises(RuntimeError), merged_adapter(model, enabled=True):
        raise RuntimeError
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any(getattr(module, "merged", False) for module in model.modules())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_base_is_restored_if_memory_runs_out_again_as_it_is_unmerged(with_adapter, kind):
    model = with_adapter(kind)
    expected, before = logprobs(model), weights(model)

    def unmerge(layer):  # PEFT counts the adapter as unmerged, and then computes its update
        layer.merged_adapters.pop()
        raise torch.OutOfMemoryError("CUDA out of memory.")

    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.unmerge = partial(unmerge, layer)
    with pytest.raises(KeyError), merged_adapter(model, enabled=True):
        assert layers[0].merged
        raise KeyError
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any(layer.merged for layer in layers)
    assert torch.equal(logprobs(model), expected)


def test_nothing_is_merged_where_it_would_be_wrong(with_adapter, tiny_llama, tiny_config):
    model = with_adapter()
    before = weights(model)

    def unchanged(model, before, **options):
        with merged_adapter(model, **options):
            return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    assert unchanged(model, before, enabled=False)
    tiny_llama.is_quantized = True  # re-quantising would lose the update for good
    assert unchanged(model, before, enabled=True)
    plain = LlamaForCausalLM(tiny_config)
    assert unchanged(plain, weights(plain), enabled=True)
    prompt = get_peft_model(plain, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert unchanged(prompt, weights(prompt), enabled=True)


# fp32 master adapters computed in bf16


def test_mixed_precision_keeps_fp32_gradients_near_those_of_the_plain_path(with_adapter, tiny_llama):
    model = with_adapter(base=tiny_llama.bfloat16())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in trained)

    def run(enabled):
        dtypes = SimpleNamespace(seen=set())
        hooks = [
            module.register_forward_pre_hook(lambda module, args: dtypes.seen.add(args[0].dtype))
            for name, module in model.named_modules()
            if name.endswith("lora_A.default")
        ]
        with mixed_precision(model, torch.bfloat16) if enabled else torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=IDS, labels=IDS).loss
            gradients = torch.autograd.grad(loss, trained)
        for hook in hooks:
            hook.remove()
        return gradients, dtypes.seen

    fast, fast_inputs = run(True)
    plain, plain_inputs = run(False)
    assert plain_inputs == {torch.float32} and fast_inputs == {torch.bfloat16}  # no fp32 copies of activations
    assert all(gradient.dtype == torch.float32 for gradient in fast)
    flat = [torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (fast, plain)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.999
    assert flat[0].norm() / flat[1].norm() == pytest.approx(1.0, abs=0.02)
