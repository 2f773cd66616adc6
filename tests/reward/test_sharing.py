"""Whether an adapter can share a loaded base: name, PEFT type, dtype, quantization, autocast."""

import json
from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from hf_rlhf_ext.modeling.loading import load_base_model
from hf_rlhf_ext.reward.normalization import RewardNormalization
from hf_rlhf_ext.reward.sharing import Precision, base_mismatch, precision_mismatch, same_base, shareable_adapter

RECORD = RewardNormalization(mean=0.5, std=2.0, n=8, base_dtype="float32")
LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")


@pytest.fixture
def base(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def save_adapter(tiny_config, base, tmp_path):
    """Saves an untrained reward adapter of that base with the record of a training."""
    tiny_config.num_labels = 1

    def save(name, *, config=LORA, record=RECORD, base_name=None, revision=None):
        folder = tmp_path / name
        get_peft_model(LlamaForSequenceClassification(tiny_config), config).save_pretrained(folder)
        saved = json.loads((folder / "adapter_config.json").read_text())
        saved |= {"base_model_name_or_path": base_name or str(base), "revision": revision}
        (folder / "adapter_config.json").write_text(json.dumps(saved))
        if record is not None:
            record.save(folder)
        return folder

    return save


@pytest.fixture
def policy(base):
    """Loads a policy with a new LoRA adapter on that base."""

    def load(**options):
        model = load_base_model(str(base), **({"dtype": "float32"} | options))
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))

    return load


def test_an_adapter_of_the_policys_base_is_shareable_with_what_it_recorded(save_adapter, policy, base, caplog):
    assert shareable_adapter(save_adapter("reward"), policy()) == RECORD
    assert shareable_adapter(save_adapter("unrecorded", record=None), policy()) == RewardNormalization()
    detour = f"{base.parent}/other/../base"
    (base.parent / "other").mkdir()
    assert shareable_adapter(save_adapter("detour", base_name=detour), policy()) == RECORD
    assert not caplog.text


@pytest.mark.parametrize("kind", ["whole model", "other base", "other type", "policy adapter", "plain policy"])
def test_what_needs_a_base_of_its_own_is_not_shareable(save_adapter, policy, tiny_config, base, kind, caplog):
    if kind == "whole model":
        assert shareable_adapter(base, policy()) is None
    elif kind == "other base":
        assert shareable_adapter(save_adapter("reward", base_name="someone/else"), policy()) is None
    elif kind == "other type":
        config = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="SEQ_CLS")
        assert shareable_adapter(save_adapter("reward", config=config), policy()) is None
    elif kind == "policy adapter":
        folder = base.parent / "policy"
        policy().save_pretrained(folder)
        assert shareable_adapter(folder, policy()) is None
    else:
        assert shareable_adapter(save_adapter("reward"), LlamaForCausalLM(tiny_config)) is None
    assert not caplog.text


@pytest.mark.parametrize("dtype, load_in_4bit", [("bfloat16", False), ("float32", True)])
def test_another_precision_is_not_shareable_and_said(save_adapter, policy, caplog, dtype, load_in_4bit):
    if load_in_4bit:
        pytest.importorskip("bitsandbytes")
    folder = save_adapter("reward")
    assert shareable_adapter(folder, policy(dtype=dtype, load_in_4bit=load_in_4bit), name="my/reward") is None
    shown = "4-bit" if load_in_4bit else dtype
    assert f"my/reward was trained on float32 weights, but the policy has {shown}: it is loaded on a" in caplog.text


def test_on_4_bit_weights_the_dtype_of_the_other_layers_is_not_worth_a_second_base(save_adapter, policy):
    pytest.importorskip("bitsandbytes")
    record = replace(RECORD, load_in_4bit=True, base_dtype="float16")
    folder = save_adapter("reward", record=record)
    assert shareable_adapter(folder, policy(dtype="float32", load_in_4bit=True)) == record


@pytest.mark.parametrize(
    "change, mismatch",
    [
        ({"base_dtype": "bfloat16"}, "bfloat16 weights, here float32"),
        ({"load_in_4bit": True}, "4-bit weights, here float32"),
        ({"autocast": "bfloat16"}, "autocast bfloat16, here off"),
        ({"base_dtype": "auto"}, None),  # not recorded
        ({"mean": 3.0, "std": 7.0, "n": 5, "layout": "shared_prefix"}, None),
    ],
)
def test_members_of_an_ensemble_share_a_base_where_base_and_precision_are_the_same(save_adapter, change, mismatch):
    first = save_adapter("first")
    member = save_adapter("member", record=replace(RECORD, **change))
    assert base_mismatch(member, first) == mismatch
    unrecorded = save_adapter("unrecorded", record=None)
    assert base_mismatch(member, unrecorded) is None


def test_another_base_or_revision_is_named(save_adapter):
    first = save_adapter("first", base_name="org/base")
    assert base_mismatch(save_adapter("same", base_name="org/base"), first) is None
    other = save_adapter("other", base_name="org/base", revision="v1")
    assert base_mismatch(other, first) == "base org/base at v1, here org/base"


def test_precision_of_a_loaded_model_is_compared_as_far_as_it_is_known(tiny_llama):
    trained = Precision.recorded(replace(RECORD, autocast="bfloat16"))
    assert precision_mismatch(trained, Precision.of_model(tiny_llama)) is None  # autocast is the caller's
    changed = Precision.of_model(tiny_llama.to(torch.bfloat16))
    assert precision_mismatch(trained, changed) == "float32 weights, here bfloat16"
    both = [Precision(dtype, "4-bit") for dtype in ("float32", "bfloat16")]
    assert precision_mismatch(*both) == "4-bit weights with other layers in float32, here bfloat16"
    assert precision_mismatch(Precision.recorded(None), changed) is None


def test_two_names_of_one_base(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert same_base("org/base", "org/base") and same_base("base", str(tmp_path / "base"))
    assert not same_base("org/base", "org/other")
    assert not same_base(None, "org/base") and not same_base("org/base", None)
