"""Kinds of adapters that do something to a base that others use: found, kept apart, merged and saved right."""

import copy
import logging

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    LilyConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    get_peft_model,
)
from peft.tuners import lora
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.adapter_kinds import (
    base_change,
    can_mix,
    config_without_start,
    is_repeatable,
    sharing_problem,
    split_start,
    trained_base_weights,
    without_start,
)
from hf_rlhf_ext.modeling.adapter_start import attach_copy, attach_new_adapter
from hf_rlhf_ext.modeling.adapters import active_adapter, load_adapter_weights, merged_adapter, save_adapter
from hf_rlhf_ext.modeling.loading import attach_adapter
from hf_rlhf_ext.modeling.merging import merge_into_base, untie_adapted_embeddings
from hf_rlhf_ext.modeling.probing import probe_logprobs
from hf_rlhf_ext.modeling.stack import AdapterStack

LINEAR = ["q_proj", "v_proj", "down_proj"]
VIRTUAL = {"num_virtual_tokens": 3, "encoder_hidden_size": 8, "task_type": "CAUSAL_LM"}
ENCODED = [PromptEncoderConfig(**VIRTUAL), PrefixTuningConfig(**VIRTUAL, prefix_projection=True)]


def config_with(**options):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | options))


def move(model, *, seed=1):
    """Changes the trainable weights, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def distance(first, second):
    return float((first - second).abs().max())


def contents(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture
def tied_llama(tiny_config):
    tiny_config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config)


@pytest.fixture
def mixtral(tiny_config):
    sizes = {name: getattr(tiny_config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, bos_token_id=None))


# How an adapter starts

NO_CHANGE = [True, False, "gaussian", "orthogonal", "eva", "mica"]
CHANGES = ["pissa", "pissa_niter_4", "olora"]


@pytest.mark.parametrize("start", [*NO_CHANGE, *CHANGES])
def test_what_the_configuration_says_of_the_base_is_what_peft_does(tiny_llama, start):
    config = config_with(init_lora_weights=start)
    before = probe_logprobs(tiny_llama)
    model = get_peft_model(tiny_llama, config)
    with model.disable_adapter():
        changed = distance(probe_logprobs(model), before) > 1e-4
    assert changed == (start in CHANGES)
    assert (base_change(config) is not None) == changed
    assert (sharing_problem(config) is not None) == changed


@pytest.mark.parametrize("start", CHANGES)
def test_repeatable_means_that_a_reload_is_the_trained_model(tiny_llama, tmp_path, start):
    base = copy.deepcopy(tiny_llama)
    config = config_with(init_lora_weights=start)
    model = get_peft_model(tiny_llama, config)
    move(model)
    save_adapter(model, "default", tmp_path)
    torch.manual_seed(7)  # another process has other random numbers
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert (distance(probe_logprobs(loaded), probe_logprobs(model)) < 1e-4) == is_repeatable(config)
    if not is_repeatable(config):
        with pytest.raises(UserError, match="path_initial_model_for_weight_conversion"):
            attach_adapter(base, tmp_path)


def test_a_new_adapter_is_measured_without_random_numbers_or_a_change_of_mode(tiny_llama):
    config = config_with(init_lora_weights="orthogonal", lora_dropout=0.5)
    tiny_llama.train()
    torch.manual_seed(3)
    expected = get_peft_model(copy.deepcopy(tiny_llama), copy.deepcopy(config))
    state = torch.get_rng_state()
    torch.manual_seed(3)
    new = attach_new_adapter("peft_config", tiny_llama, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert new.model.training and new.is_neutral and not new.base_was_changed and new.keeps_function
    weights = dict(expected.named_parameters())
    for name, parameter in new.model.named_parameters():
        assert torch.equal(parameter, weights[name]) and parameter.requires_grad == weights[name].requires_grad


def test_trained_weights_of_the_base_are_found(tiny_config):
    tiny_config.attention_bias = True
    model = get_peft_model(LlamaForCausalLM(tiny_config), config_with(modules_to_save=["lm_head"]))
    assert trained_base_weights(model) == []
    model = get_peft_model(LlamaForCausalLM(tiny_config), config_with(bias="all"))
    assert len(trained_base_weights(model)) == 8  # four in each of two layers
    model = get_peft_model(LlamaForCausalLM(tiny_config), config_with())
    model.get_input_embeddings().requires_grad_(True)
    assert trained_base_weights(model) == ["model.embed_tokens.weight"]


# Copies


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_copy_does_not_change_the_base_again(tiny_llama, start):
    model = get_peft_model(tiny_llama, config_with(init_lora_weights=start))
    move(model)
    before, weights = probe_logprobs(model), contents(model)
    attach_copy(model, "default", "ref")
    assert torch.equal(probe_logprobs(model), before)
    with active_adapter(model, "ref"):
        assert torch.equal(probe_logprobs(model), before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_a_copy_that_computes_something_else_is_refused(tiny_llama):
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama, config)
    move(model)
    with pytest.raises(UserError, match="cannot hold a copy of an adapter of type ADAPTION_PROMPT"):
        attach_copy(model, "default", "ref")


@pytest.mark.parametrize("config", ENCODED, ids=["p_tuning", "prefix_projection"])
def test_an_encoder_of_virtual_tokens_is_copied_whole(tiny_llama, config):
    model = get_peft_model(tiny_llama, copy.deepcopy(config))
    move(model)
    attach_copy(model, "default", "ref")
    encoders = model.prompt_encoder
    for name, value in encoders["default"].state_dict().items():
        assert torch.equal(encoders["ref"].state_dict()[name], value)


# Saving an adapter that was taken out of its base


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}]
)
def test_an_adapter_on_a_changed_base_is_saved_as_one_for_the_original_base(tiny_llama, tmp_path, options):
    base = copy.deepcopy(tiny_llama)
    new = attach_new_adapter("peft_config", tiny_llama, config_with(init_lora_weights="pissa_niter_4", **options))
    assert new.base_was_changed and new.keeps_function
    attach_copy(new.model, "default", "ref")
    move(new.model)
    save_adapter(new.model, "default", tmp_path, start="ref")
    loaded = PeftModel.from_pretrained(base, tmp_path)  # PEFT alone
    assert loaded.peft_config["default"].init_lora_weights is True
    assert distance(probe_logprobs(loaded), probe_logprobs(new.model)) < 1e-5


def test_both_halves_of_a_saved_adapter_come_back():
    state = {
        "q.lora_A.weight": torch.randn(2, 5),
        "q.lora_B.weight": torch.randn(3, 2),
        "lm_head.weight": torch.ones(1),
    }
    start = {name: torch.randn_like(value) for name, value in state.items()}
    saved = without_start(state, start)
    # BA - B₀A₀ in double precision
    product = saved["q.lora_B.weight"].double() @ saved["q.lora_A.weight"].double()
    for sign, part in ((-1, state), (1, start)):
        product += sign * part["q.lora_B.weight"].double() @ part["q.lora_A.weight"].double()
    assert product.abs().max() < 1e-6
    own, subtracted = split_start(saved)
    assert all(torch.equal(own[name], value) for name, value in state.items())
    assert all(torch.equal(subtracted[name], start[name]) for name in subtracted) and len(subtracted) == 2
    config = config_without_start(config_with(init_lora_weights="pissa"))
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (8, 16, True)


# Sharing a base


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"bias": "lora_only"}])
def test_a_folder_whose_adapter_changes_the_base_is_not_attached_to_a_shared_one(tiny_llama, tmp_path, options):
    trained = get_peft_model(copy.deepcopy(tiny_llama), config_with(**options))
    save_adapter(trained, "default", tmp_path)
    stack = AdapterStack(get_peft_model(tiny_llama, config_with()))
    before = contents(stack.model)
    with pytest.raises(UserError, match="load it as a model of its own"):
        stack.attach("reward", tmp_path)
    assert all(torch.equal(stack.model.state_dict()[name], value) for name, value in before.items())


# Merging


def refuses_merge(caplog, model):
    """Generates merged twice; returns whether the one warning came, and checks that nothing has changed."""
    move(model)
    before, expected = contents(model), probe_logprobs(model)
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext"):
        for _ in range(2):
            with merged_adapter(model, enabled=True):
                assert distance(probe_logprobs(model), expected) < 1e-5
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    warnings = [record for record in caplog.records if "cannot be merged into its base" in record.getMessage()]
    assert len(warnings) <= 1
    return len(warnings) == 1


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_embeddings_are_not_merged(caplog, tied_llama, tiny_config, target):
    assert refuses_merge(caplog, get_peft_model(tied_llama, config_with(target_modules=["q_proj", target])))
    tiny_config.tie_word_embeddings = False
    untied = get_peft_model(LlamaForCausalLM(tiny_config), config_with(target_modules=["q_proj", target]))
    caplog.clear()
    assert not refuses_merge(caplog, untied)


def test_tied_embeddings_that_the_adapter_leaves_alone_are_merged(caplog, tied_llama):
    assert not refuses_merge(caplog, get_peft_model(tied_llama, config_with()))


@pytest.mark.parametrize(
    "config", [config_with(lora_bias=True), LilyConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM")]
)
def test_adapters_that_peft_cannot_merge_are_sampled_unmerged(caplog, tiny_llama, config):
    assert refuses_merge(caplog, get_peft_model(tiny_llama, copy.deepcopy(config)))


def test_fused_experts_are_restored_after_a_merge(caplog, mixtral):
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(mixtral, config_with(target_modules=["q_proj"], target_parameters=targets))
    assert not refuses_merge(caplog, model)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [5, 40, 96]},
        {},
    ],
)
def test_a_merge_into_tied_embeddings_is_the_adapter(tied_llama, tmp_path, options):
    model = get_peft_model(tied_llama, config_with(**options))
    move(model)
    expected = probe_logprobs(model)
    assert untie_adapted_embeddings(model) == bool(options)
    assert torch.equal(probe_logprobs(model), expected)
    merge_into_base(model, "merge", "load it").save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert distance(probe_logprobs(plain), expected) < 1e-4


# Batches with several adapters


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"lora_bias": True}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}],
)
def test_a_mixed_batch_is_one_pass_after_the_other(tiny_llama, options):
    stack = AdapterStack(get_peft_model(tiny_llama, config_with(**options)))
    move(stack.model)
    stack.attach("reference", "policy")
    move(stack.model, seed=2)
    assert stack.can_score_jointly
    stack.model.eval()
    inputs = (torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]]), torch.tensor([2, 1]), torch.ones(2, 2, dtype=torch.bool))
    joint = stack.hidden_states(["policy", "reference"], *inputs)
    alone = stack.hidden_states(["policy", "reference"], *inputs, joint=False)
    for role in ("policy", "reference"):
        torch.testing.assert_close(joint[role], alone[role])
    assert distance(joint["policy"], joint["reference"]) > 1e-3


@pytest.mark.parametrize(
    "config",
    [
        config_with(use_dora=True),
        config_with(alora_invocation_tokens=[5]),
        config_with(kasa_config=lora.KasaConfig()),
        config_with(modules_to_save=["lm_head"]),
        config_with(trainable_token_indices=[5]),
        AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=LINEAR, task_type="CAUSAL_LM"),
        LilyConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM"),
    ],
    ids=["dora", "alora", "kasa", "modules_to_save", "tokens", "adalora", "lily"],
)
def test_other_adapters_are_not_mixed(tiny_llama, config):
    assert not can_mix(get_peft_model(tiny_llama, copy.deepcopy(config)))


def test_fused_experts_are_not_mixed(mixtral):
    targets = ["mlp.experts.gate_up_proj"]
    assert not can_mix(get_peft_model(mixtral, config_with(target_modules=["q_proj"], target_parameters=targets)))


@pytest.mark.parametrize("config", ENCODED, ids=["p_tuning", "prefix_projection"])
def test_virtual_tokens_without_their_encoder_are_not_trained_further(tiny_llama, tmp_path, config):
    model = get_peft_model(copy.deepcopy(tiny_llama), copy.deepcopy(config))
    move(model)
    save_adapter(model, "default", tmp_path)
    loaded = attach_adapter(copy.deepcopy(tiny_llama), tmp_path)
    assert distance(probe_logprobs(loaded), probe_logprobs(model)) < 1e-5
    with pytest.raises(UserError, match="cannot be trained further"):
        attach_adapter(tiny_llama, tmp_path, is_trainable=True)


@pytest.mark.parametrize("config", ENCODED, ids=["p_tuning", "prefix_projection"])
def test_a_checkpoint_has_the_encoder_of_virtual_tokens(tiny_llama, tmp_path, config):
    model = get_peft_model(tiny_llama, copy.deepcopy(config))
    move(model)
    expected = probe_logprobs(model)
    save_adapter(model, "default", tmp_path)
    move(model, seed=2)
    load_adapter_weights(model, "default", tmp_path)
    assert torch.equal(probe_logprobs(model), expected)
