"""The configuration of an adapter beside a model or a saved adapter. Resuming is tested with the trainers too."""

import copy
import logging

import pytest
from peft import CPTConfig, LoraConfig, PrefixTuningConfig, get_peft_model, load_peft_weights
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM, LlamaForSequenceClassification

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.adapter_config import check_same_adapter
from hf_rlhf_ext.modeling.adapter_files import refuse_lost_weights
from hf_rlhf_ext.modeling.adapter_start import attached_or_refused, warn_of_unmatched_names
from hf_rlhf_ext.modeling.adapters import save_adapter


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"target_modules": ["q_proj", "v_pro"]}, "target_modules 'v_pro' names no module"),
        ({"target_modules": ["q_proj", "v_pro", "c_attn"]}, "target_modules 'c_attn', 'v_pro' name no module"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["scores"]}, "modules_to_save 'scores' names no module"),
    ],
)
@pytest.mark.parametrize("is_attached", [True, False])
def test_names_that_the_model_does_not_have_are_said(tiny_llama, caplog, fields, expected, is_attached):
    config = LoraConfig(task_type="CAUSAL_LM", **fields)
    model = get_peft_model(tiny_llama, LoraConfig(**fields)) if is_attached else tiny_llama
    with caplog.at_level(logging.WARNING):
        warn_of_unmatched_names("peft_config", model, config)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("hf_rlhf_ext")]
    assert line.startswith(f"peft_config: {expected}") and "\n" not in line


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "self_attn.v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.layers\.0\..*q_proj"},
        {"target_modules": ["q_proj"], "modules_to_save": ["score"]},
        {},
    ],
)
def test_names_that_the_model_has_are_not_said(tiny_config, caplog, fields):
    config = LoraConfig(task_type="SEQ_CLS", **fields)
    model = get_peft_model(LlamaForSequenceClassification(tiny_config), config)  # PEFT adds both names of heads
    with caplog.at_level(logging.WARNING):
        warn_of_unmatched_names("peft_config", model, config)
        warn_of_unmatched_names("peft_config", model, None)
    assert not caplog.records


def test_all_linear_layers_of_an_encoder_are_not_said_although_its_pooler_is_trained_as_a_whole(caplog):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["pooler"])
    model = get_peft_model(BertForSequenceClassification(BertConfig(vocab_size=32, **sizes)), config)
    with caplog.at_level(logging.WARNING):
        warn_of_unmatched_names("peft_config", model, config)
    assert not caplog.records


def test_an_adapter_that_does_not_fit_a_model_given_by_name_is_one_line(tiny_llama):
    config = LoraConfig(target_modules=["c_attn"])
    with pytest.raises(UserError, match="peft_config: .* to some/model: .*c_attn.*: change the") as refused:
        with attached_or_refused("peft_config", "some/model", config):
            get_peft_model(tiny_llama, config)
    assert "\n" not in str(refused.value)


def test_names_are_compared_after_the_adapter_is_attached(tiny_llama, caplog):
    config = LoraConfig(target_modules=["q_proj", "v_pro"])
    with attached_or_refused("peft_config", tiny_llama, config):
        get_peft_model(tiny_llama, config)
    assert "target_modules 'v_pro' names no module" in caplog.text


def test_another_adapter_with_the_name_of_a_layer_hides_no_weights(tiny_llama, tmp_path):
    """Of the adapter `default`, PEFT leaves out layer 0 where another adapter is called `0`."""
    model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"]))
    save_adapter(model, "default", tmp_path)
    model.add_adapter("0", LoraConfig(target_modules=["q_proj"]))
    check_same_adapter(model, "default", tmp_path)
    weights = load_peft_weights(str(tmp_path), device="cpu")
    refuse_lost_weights("folder", model, "default", weights)
    lost = next(name for name in weights if ".layers.0." in name)
    with pytest.raises(UserError, match=f"folder: the adapter's file lacks '{lost}'"):
        refuse_lost_weights("folder", model, "default", weights.keys() - {lost})


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)], task_type="CAUSAL_LM"),
        LoraConfig(target_modules=["q_proj"], layers_to_transform=(0,), rank_pattern={"q_proj": 2}),
        CPTConfig(cpt_token_ids=[3, 4], cpt_tokens_type_mask=[1, 1], task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ],
)
def test_the_configuration_of_the_run_is_the_same_after_a_detour_by_a_file(tiny_config, tmp_path, config):
    """Tuples become lists in a file, and PEFT fills in some fields after an adapter is attached."""
    trained = get_peft_model(LlamaForCausalLM(tiny_config), copy.deepcopy(config))
    save_adapter(trained, "default", tmp_path)
    resumed = get_peft_model(LlamaForCausalLM(tiny_config), copy.deepcopy(config))
    check_same_adapter(resumed, "default", tmp_path)


def test_another_replication_of_layers_is_refused(tiny_config, tmp_path):
    for ranges in ([(0, 2), (1, 2)], [(0, 2), (0, 1)]):
        config = LoraConfig(target_modules=["q_proj"], layer_replication=ranges, task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM(tiny_config), config)
        if not list(tmp_path.iterdir()):
            save_adapter(model, "default", tmp_path)
    with pytest.raises(UserError, match="resume_from_checkpoint: .* layer_replication=.*use the configuration of that"):
        check_same_adapter(model, "default", tmp_path)
