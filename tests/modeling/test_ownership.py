"""What on a model belongs to which adapter, whatever it is called."""

import copy

import pytest
import torch
from peft import (
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import nn

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.adapters import copy_adapter, save_adapter
from hf_rlhf_ext.modeling.ownership import (
    adapter_parameters,
    adapter_state,
    free_adapter_name,
    freeze_other_adapters,
    mark_as_attached,
    refuse_adapted_base,
    remove_earlier_roles,
)

TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
KINDS = {
    "lora": LoraConfig(**TARGETS),
    "dora": LoraConfig(use_dora=True, **TARGETS),
    "embedding": LoraConfig(target_modules=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"),
    "modules": LoraConfig(modules_to_save=["lm_head"], **TARGETS),
    "tokens": LoraConfig(trainable_token_indices=[3, 4], **TARGETS),
    "ia3": IA3Config(feedforward_modules=[], **TARGETS),
    "loha": LoHaConfig(**TARGETS),
    "oft": OFTConfig(oft_block_size=8, **TARGETS),
    "vera": VeraConfig(r=4, **TARGETS),
    "vblora": VBLoRAConfig(r=2, vector_length=8, num_vectors=16, topk=2, **TARGETS),
    "fourier": FourierFTConfig(n_frequency=8, **TARGETS),
    "layer-norms": LNTuningConfig(task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", ["default", "layers", "0"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_parameters_of_an_adapter_are_those_that_peft_trains(tiny_llama, kind, name):
    model = get_peft_model(tiny_llama, copy.deepcopy(KINDS[kind]), adapter_name=name)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert list(adapter_parameters(model, name)) == trained and trained
    assert adapter_parameters(model, "another") == {}
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    assert adapter_state(model, name).keys() == expected.keys()


@pytest.mark.parametrize("other", ["layers", "0", "weight", "lora_A", "self_attn", "default2"])
def test_an_adapter_is_saved_and_copied_whole_beside_one_with_any_name(tiny_llama, other, tmp_path):
    base = copy.deepcopy(tiny_llama)
    model = get_peft_model(tiny_llama, LoraConfig(init_lora_weights=False, **TARGETS))
    alone = {key: value.clone() for key, value in adapter_state(model, "default").items()}
    model.add_adapter(other, LoraConfig(init_lora_weights=False, **TARGETS))
    configs = list(model.peft_config)
    together = adapter_state(model, "default")
    assert together.keys() == alone.keys() and list(model.peft_config) == configs
    assert all(torch.equal(together[key], value) for key, value in alone.items())
    copy_adapter(model, "default", "copy")
    for name, parameter in adapter_parameters(model, "copy").items():
        assert torch.equal(parameter, model.get_parameter(name.replace(".copy", ".default")))
    save_adapter(model, other, tmp_path)
    reloaded = PeftModel.from_pretrained(base, tmp_path)
    model.set_adapter(other)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(reloaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_other_adapters_are_frozen_and_earlier_roles_removed(tiny_llama):
    model = get_peft_model(tiny_llama, LoraConfig(**TARGETS))
    model.add_adapter("value", LoraConfig(**TARGETS))
    model.requires_grad_(True)
    freeze_other_adapters(model, "default")
    assert not any(p.requires_grad for p in adapter_parameters(model, "value").values())
    assert all(p.requires_grad for p in adapter_parameters(model, "default").values())
    model.get_base_model().value_head = mark_as_attached(nn.Linear(2, 1))
    model.value_model = mark_as_attached(nn.Linear(2, 1))
    model.mine = nn.Linear(2, 1)
    remove_earlier_roles(model)
    assert not hasattr(model, "value_head") and not hasattr(model, "value_model") and hasattr(model, "mine")
    assert free_adapter_name(model, "value") == "value_2" and free_adapter_name(model, "ref") == "ref"
    refuse_adapted_base("model", model)
    with pytest.raises(UserError, match="model: the layers of this LlamaForCausalLM have adapters already"):
        refuse_adapted_base("model", model.get_base_model())
