"""Bases in GPTQ and AWQ: refused from their config alone where a package is missing, else frozen under an adapter."""

import json
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, PPOConfig, PPOTrainer
from hf_rlhf_ext.cli.options import ModelArguments
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.merge import merge_run
from hf_rlhf_ext.modeling import quantization
from hf_rlhf_ext.modeling.loading import load_base_model, load_policy
from hf_rlhf_ext.modeling.quantization import quantization_differs
from hf_rlhf_ext.reward.scorer import RewardScorer

GROUP = 64  # weights that share a scale
METHODS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}
NEEDED = {"gptq": ["gptqmodel", "optimum"], "awq": ["gptqmodel"]}
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.fixture(params=METHODS)
def method(request) -> str:
    return request.param


@pytest.fixture
def config(chat_tokenizer) -> LlamaConfig:
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(chat_tokenizer), bos_token_id=None, **size)
    config.pad_token_id, config.eos_token_id = chat_tokenizer.pad_token_id, chat_tokenizer.eos_token_id
    return config


# ---- Without the packages ----


@pytest.mark.parametrize("task", ["causal_lm", "reward"])
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_missing_package_is_named_before_weights_are_read(config, tmp_path, monkeypatch, method, task, load_in_4bit):
    config.quantization_config = METHODS[method]
    config.save_pretrained(tmp_path)  # no weights
    monkeypatch.setattr(quantization, "find_spec", lambda name: None if name in NEEDED[method] else object())
    with pytest.raises(UserError) as error:
        load_base_model(str(tmp_path), task=task, load_in_4bit=load_in_4bit)
    message = str(error.value)
    assert message.startswith(f"model_name_or_path: the weights of {tmp_path} are quantized ({method})")
    assert f"pip install {' '.join(NEEDED[method])}, or give the unquantized model" in message and "\n" not in message


def test_only_what_is_missing_is_named(config, tmp_path, monkeypatch):
    config.quantization_config = METHODS["gptq"]
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(quantization, "find_spec", lambda name: None if name == "optimum" else object())
    with pytest.raises(UserError, match="which needs optimum: pip install optimum, or"):
        load_base_model(str(tmp_path))


def test_its_weights_are_not_trained_which_is_said_before_they_are_read(config, chat_tokenizer, tmp_path, method):
    base = str(tmp_path / "base")
    config.quantization_config = METHODS[method]
    config.save_pretrained(base)  # no weights
    chat_tokenizer.save_pretrained(base)
    common = {"use_cpu": True, "bf16": False, "report_to": "none"}
    whole = ModelArguments(model_name_or_path=base, use_peft=False).base_options(PPOConfig(str(tmp_path), **common))
    prompts = [{"prompt": "a fox"}] * 2
    pairs = [{"prompt": "a fox", "chosen": " happy", "rejected": " sad"}] * 2
    args = BradleyTerryConfig(str(tmp_path / "reward"), **common)
    starts = [
        lambda: load_base_model(base, task="reward", **whole),  # as the commands do with --use_peft false
        lambda: load_policy(base, is_trainable=True, **whole),
        lambda: PPOTrainer(base, len, PPOConfig(str(tmp_path / "ppo"), **common), prompts),
        lambda: BradleyTerryTrainer(base, args, pairs),
    ]
    for start in starts:
        with pytest.raises(UserError, match=rf"\({method}\) and cannot be trained.* --use_peft false") as error:
            start()
        assert str(error.value).startswith(f"model_name_or_path: the weights of {base} ")
        assert "\n" not in str(error.value)


def test_kernels_and_defaults_are_no_difference_but_the_size_of_a_group_is(method):
    stored = METHODS[method]
    loaded = quantization.as_record(quantization.with_trainable_kernels(stored))
    assert loaded["backend"] == "auto_trainable"
    assert not quantization_differs(stored, loaded)
    assert quantization_differs(stored, loaded | {"group_size": 32})
    other = next(name for name in METHODS if name != method)
    assert quantization_differs(stored, METHODS[other])
    assert quantization.with_trainable_kernels({"quant_method": "hqq"}) is None


def test_merging_into_it_is_refused_from_its_config(config, tmp_path, method):
    config.quantization_config = METHODS[method]
    config.save_pretrained(tmp_path / "base")  # no weights
    LoraConfig(base_model_name_or_path=str(tmp_path / "base"), task_type="CAUSAL_LM").save_pretrained(tmp_path / "run")
    save_file({"x": torch.zeros(1)}, tmp_path / "run" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is itself quantized: give the unquantized model as base_model") as error:
        merge_run(tmp_path / "run", tmp_path / "merged")
    assert "\n" not in str(error.value)


# ---- With the packages ----


def packed(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Eight numbers from 0 to 15 along a dimension in each int32, the first one in the lowest bits."""
    values = values.to(torch.int64).movedim(dim, 0)
    eights = values.reshape(-1, 8, *values.shape[1:])
    sums = sum(eights[:, k] << (4 * k) for k in range(8))
    return torch.where(sums >= 2**31, sums - 2**32, sums).to(torch.int32).movedim(0, dim).contiguous()


def quantized(weight: torch.Tensor, method: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a quantized layer, and the weights that they stand for, (q − 8) · scale."""
    columns = weight.float().t()  # (inputs, outputs)
    n_inputs, n_outputs = columns.shape
    groups = columns.reshape(-1, GROUP, n_outputs)
    scales = (groups.abs().amax(1) / 7).half()
    levels = (groups / scales.float()[:, None]).round().clamp(-7, 7) + 8
    dense = ((levels - 8) * scales.float()[:, None]).reshape(n_inputs, n_outputs).t()
    levels = levels.reshape(n_inputs, n_outputs)
    if method == "gptq":
        zeros = torch.full((n_inputs // GROUP, n_outputs), 7)  # the format stores them less 1
        groups_of = torch.arange(n_inputs, dtype=torch.int32) // GROUP
        return {"qweight": packed(levels, 0), "qzeros": packed(zeros, 1), "scales": scales, "g_idx": groups_of}, dense

    def ordered(numbers: torch.Tensor) -> torch.Tensor:
        return packed(numbers.reshape(len(numbers), -1, 8)[:, :, _AWQ_ORDER].reshape(numbers.shape), 1)

    zeros = torch.full((n_inputs // GROUP, n_outputs), 8)
    return {"qweight": ordered(levels), "qzeros": ordered(zeros), "scales": scales}, dense


@pytest.fixture
def base(config, chat_tokenizer, tmp_path, method) -> tuple[str, LlamaForCausalLM]:
    """The folder of a base that was quantized by hand, and the same weights unquantized."""
    folder = tmp_path / "base"
    torch.manual_seed(0)
    LlamaForCausalLM(config).half().save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    weights, plain = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        weights[name] = plain[name] = value
        if ".layers." in name and name.endswith("proj.weight"):
            tensors, plain[name] = quantized(weights.pop(name), method)
            weights |= {name.removesuffix("weight") + key: tensor for key, tensor in tensors.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": METHODS[method]}))
    reference = LlamaForCausalLM(config)
    reference.load_state_dict({name: value.float() for name, value in plain.items()})
    return str(folder), reference


COMMON = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "activation_checkpointing": False, "max_steps": 2}
COMMON |= {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "bf16": False}


def lora(task: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type=task)


@pytest.mark.gptq
def test_it_computes_what_its_numbers_stand_for(base):
    folder, reference = base
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        logits, expected = load_base_model(folder, dtype="float32")(ids).logits, reference(ids).logits
    assert (logits - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.gptq
def test_reward_model_and_policy_share_it_and_leave_it_as_it_is(base, chat_tokenizer, tmp_path, caplog):
    folder, _ = base
    pairs = {"prompt": ["Tell me", "fox"], "chosen": [" a day", " happy"], "rejected": [" sad", " no"]}
    rewards = BradleyTerryTrainer(
        load_base_model(folder, task="reward", dtype="float32"),
        BradleyTerryConfig(str(tmp_path / "reward"), **COMMON),
        Dataset.from_dict(pairs),
        processing_class=chat_tokenizer,
        peft_config=lora("SEQ_CLS"),
    )
    rewards.train()
    rewards.save_model()
    in_memory = RewardScorer(rewards.model, chat_tokenizer).raw(["Tell me"], [" a day"])
    assert RewardScorer.from_pretrained(tmp_path / "reward").raw(["Tell me"], [" a day"]) == in_memory

    ppo = PPOTrainer(
        load_base_model(folder, dtype="float32"),
        str(tmp_path / "reward"),
        PPOConfig(str(tmp_path / "ppo"), max_completion_length=4, num_mini_batches=1, critic="adapter", **COMMON),
        Dataset.from_dict({"prompt": ["Tell me", "a sunny day"]}),
        processing_class=chat_tokenizer,
        peft_config=lora("CAUSAL_LM"),
    )
    assert "reward" in ppo.stack.roles
    before = {name: buffer.clone() for name, buffer in ppo.model.named_buffers()}
    weights = {name: p.detach().clone() for name, p in ppo.model.named_parameters() if p.requires_grad}
    assert sum("lora_A.default" in name for name in weights) == 7  # every linear layer, and not the output head
    ppo.train()
    assert all(torch.equal(buffer, before[name]) for name, buffer in ppo.model.named_buffers())
    moved = {name for name, p in ppo.model.named_parameters() if name in weights and not torch.equal(p, weights[name])}
    assert all(any(role in name for name in moved) for role in (".default.", ".value."))
    assert ppo.state.log_history[0]["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert not [record for record in caplog.records if "quantized" in record.getMessage()]


@pytest.mark.gptq
def test_its_weights_are_not_trained(base, chat_tokenizer, tmp_path, caplog, method):
    folder, _ = base
    caplog.set_level(logging.WARNING)
    model = load_base_model(folder, load_in_4bit=True)
    assert f"is quantized already ({method}) and is loaded like this, instead of 4-bit" in caplog.text
    with pytest.raises(UserError, match=rf"its weights are quantized \({method}\) and cannot be trained") as error:
        PPOTrainer(
            model,
            lambda completions, **columns: [0.0] * len(completions),
            PPOConfig(str(tmp_path / "ppo"), **COMMON),
            Dataset.from_dict({"prompt": ["Tell me"]}),
            processing_class=chat_tokenizer,
        )
    assert "\n" not in str(error.value)
