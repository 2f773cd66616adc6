"""The record of the base beside an adapter: what is in it, and what is said when the adapter gets another base."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.adapters import save_adapter
from hf_rlhf_ext.modeling.base_record import BASE_RECORD_FILE, BaseRecord, check_same_base
from hf_rlhf_ext.modeling.loading import four_bit_config, load_base_model, load_policy, load_tokenizer
from hf_rlhf_ext.modeling.quantization import refuse_trained_quantized

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
DOUBLE = NF4 | {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}


@pytest.fixture
def base(tiny_llama, chat_tokenizer, tmp_path):
    """The folder of a base in fp32."""
    tiny_llama.save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved(model, folder, **config):
    """Attaches a new adapter, and saves it with the record of its base."""
    config = {"r": 2, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"} | config
    with_adapter = get_peft_model(model, LoraConfig(**config))
    save_adapter(with_adapter, "default", folder)
    BaseRecord.of_model(with_adapter).save(folder)
    return with_adapter


def load(path, **options):
    return LlamaForCausalLM.from_pretrained(path, **({"dtype": torch.float32} | options))


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_rlhf_ext")]


@pytest.mark.parametrize(
    "trained, loaded, trained_on, remedy",
    [
        ({}, {"dtype": "float32"}, None, None),
        ({}, {"dtype": "bfloat16"}, "float32 weights, here bfloat16", "dtype='float32'"),
        ({"dtype": torch.bfloat16}, {"dtype": "float32"}, None, None),  # in which weights in bf16 are exact
        ({"dtype": torch.bfloat16}, {"dtype": "float16"}, "bfloat16 weights, here float16", "dtype='bfloat16'"),
        (NF4, {}, "4-bit NF4 .*here no quantization", "bnb_4bit_quant_type='nf4'"),
        (DOUBLE, {}, "4-bit NF4 with double .*here no quantization", "load_policy with load_in_4bit=True"),
        (DOUBLE, {"load_in_4bit": True}, None, None),
        (NF4, {"load_in_4bit": True}, "4-bit NF4 .*here 4-bit NF4 with double", "bnb_4bit_use_double_quant=False"),
        ({"load_in_8bit": True}, {}, "8-bit .*here no quantization", "load_in_8bit=True"),
        ({}, {"load_in_4bit": True}, "no quantization, here 4-bit", "an unquantized base"),
    ],
)
def test_a_policy_on_a_base_in_another_precision(base, tmp_path, caplog, trained, loaded, trained_on, remedy):
    if "dtype" not in trained and trained:
        pytest.importorskip("bitsandbytes")
        trained = {"quantization_config": BitsAndBytesConfig(**trained)}
    saved(load(base, **trained), tmp_path / "adapter")
    load_policy(tmp_path / "adapter", **loaded)
    said = [message for message in warnings_of(caplog) if "was trained on a base" in message]
    if trained_on is None:
        assert said == []
        return
    (message,) = said
    assert "\n" not in message
    assert remedy in message
    assert re.search(trained_on, message)


def test_the_remedy_of_the_warning_cures_it(base, tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    saved(load(base, quantization_config=BitsAndBytesConfig(**NF4)), tmp_path / "adapter")
    load_policy(tmp_path / "adapter")
    remedy = warnings_of(caplog)[-1].rpartition("load_policy with ")[2].rstrip(".")
    caplog.clear()
    options = eval(f"dict({remedy})", {"BitsAndBytesConfig": BitsAndBytesConfig, "dict": dict})
    load_policy(tmp_path / "adapter", **options)
    assert warnings_of(caplog) == []


def change(end):
    """Changes all weights with this end of the name, as merging an adapter does."""

    def apply(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(end):
                    parameter.mul_(1.001)

    return apply


@pytest.mark.parametrize(
    "other, fragment",
    [
        (lambda model: None, None),
        (change("embed_tokens.weight"), "embed_tokens.weight has other values"),
        (change("q_proj.weight"), "q_proj.weight has other values"),
        (change("v_proj.weight"), "v_proj.weight has other values"),
        (change("down_proj.weight"), "down_proj.weight has other values"),
        (lambda model: model.resize_token_embeddings(400), "has the shape .*there, and .400, 32. here"),
        (lambda model: model.to(torch.bfloat16), None),
    ],
    ids=["the same", "embeddings", "q_proj", "v_proj", "down_proj", "more tokens", "bf16"],
)
def test_a_run_does_not_go_on_on_another_base(base, tmp_path, caplog, other, fragment):
    saved(load(base), tmp_path / "adapter")
    model = load(base)
    other(model)
    again = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    if fragment is None:
        check_same_base(again, tmp_path / "adapter")
        rounded = model.dtype == torch.bfloat16
        assert len(warnings_of(caplog)) == rounded
        assert not rounded or "trained on float32 weights, here bfloat16" in warnings_of(caplog)[0]
        return
    with pytest.raises(UserError, match=f"^resume_from_checkpoint: .*another base .*{fragment}") as error:
        check_same_base(again, tmp_path / "adapter")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [{"modules_to_save": ["embed_tokens"]}, {"target_modules": "all-linear"}, {"init_lora_weights": "pissa"}],
    ids=["trained embeddings", "every layer", "PiSSA"],
)
def test_training_and_further_adapters_are_no_other_base(base, tmp_path, config):
    first = saved(load(base), tmp_path / "adapter", **config)
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    first.add_adapter("ref", LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    assert BaseRecord.load(tmp_path / "adapter").weights
    check_same_base(first, tmp_path / "adapter")


def test_only_frozen_weights_are_recorded(base):
    model = get_peft_model(load(base), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    record = BaseRecord.of_model(model, torch.bfloat16)
    assert (record.dtype, record.autocast, record.quantization) == ("float32", "bfloat16", None)
    assert 9 <= len(record.weights) <= 18  # every kind of matrix
    plain = dict(load(base).named_parameters())
    for name, sample in record.weights.items():
        weight = plain[name.removeprefix("base_model.model.")]
        part = weight if weight.ndim == 1 else weight[len(weight) // 2]
        assert sample == {"shape": list(weight.shape), "values": part[:4].tolist()}
    assert BaseRecord.of_model(load(base)) is None


def test_adapters_without_a_record_are_loaded_as_ever(base, tmp_path, caplog):
    saved(load(base), tmp_path / "adapter")
    (tmp_path / "adapter" / BASE_RECORD_FILE).unlink()
    model, _ = load_policy(tmp_path / "adapter", dtype="bfloat16")
    check_same_base(model, tmp_path / "adapter")
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_may_be_text_or_path_objects(base, kind):
    assert load_base_model(kind(base)).name_or_path == str(base)
    assert load_tokenizer(kind(base)).name_or_path == str(base)
    assert load_policy(kind(base))[0].name_or_path == str(base)


def test_saved_virtual_tokens_are_not_trained_further(base, tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    save_adapter(get_peft_model(load(base), config), "default", tmp_path / "adapter")
    assert isinstance(load_policy(tmp_path / "adapter")[0], PeftModel)
    with pytest.raises(UserError, match="PROMPT_TUNING cannot be trained further.*peft_config"):
        load_policy(tmp_path / "adapter", is_trainable=True)


def test_quantized_weights_are_not_trained_themselves(base):
    pytest.importorskip("bitsandbytes")
    model = load(base, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(UserError, match="^model: its weights are quantized .4-bit.*pass peft_config"):
        refuse_trained_quantized(model, has_adapter=False)
    refuse_trained_quantized(model, has_adapter=True)
    refuse_trained_quantized(load(base), has_adapter=False)


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_packed_weights_in_a_floating_point_dtype_are_not_taken_for_weights(base, tmp_path, storage):
    config = four_bit_config(storage=storage)
    model = saved(load_base_model(str(base), quantization_config=config), tmp_path / "adapter")
    recorded = BaseRecord.load(tmp_path / "adapter").weights
    assert recorded and not [name for name in recorded if name.endswith("_proj.weight")]
    check_same_base(model, tmp_path / "adapter")
    other = get_peft_model(load_base_model(str(base), load_in_4bit=True), LoraConfig(r=2, target_modules=["q_proj"]))
    check_same_base(other, tmp_path / "adapter")  # how the same bits are stored is no difference
