"""Plans against closed forms, against whole models and against real runs."""

import time
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3MoeConfig, Qwen3MoeForCausalLM, T5Config

from hf_rlhf_ext import UserError, load_base_model, plan_memory
from hf_rlhf_ext.modeling.memory import planner
from hf_rlhf_ext.modeling.memory.live_bytes import LiveBytes, state_tensors

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=7, tie_word_embeddings=True)
SHALLOW = LlamaConfig(**SIZES, num_hidden_layers=2, tie_word_embeddings=True)  # where the depth does not matter


def options(**given):
    defaults = {"per_device_train_batch_size": 4, "bf16": False, "per_device_eval_batch_size": 2}
    return SimpleNamespace(**(defaults | given))


def plan(stage="reward", config=CONFIG, *, model=None, reward_model=False, prompt=24, completion=16, **given):
    return plan_memory(
        config,
        stage,
        options(**given),
        model_args=SimpleNamespace(**({"dtype": "float32"} | (model or {}))),
        reward_model=reward_model,
        prompt_tokens=prompt,
        completion_tokens=completion,
        device="cpu",
    )


def parts(phase):
    return {part.name: part.n_bytes for part in phase.parts}


def phase(found, name):
    (one,) = [phase for phase in found.phases if phase.name == name]
    return parts(one)


@pytest.fixture(scope="module")
def ppo_plan():
    return plan("ppo", model={"load_in_4bit": True})


RUNS = {
    "sft": ("sft", {"gradient_accumulation_steps": 2}, {}),
    "sft of all weights": ("sft", {"activation_checkpointing": False}, {"use_peft": False}),
    "reward in 4 bits": ("reward", {"activation_checkpointing": False}, {"load_in_4bit": True}),
    "ppo": ("ppo", {"critic": "head"}, {}),
    "ppo of all weights": ("ppo", {"critic": "model", "activation_checkpointing": False}, {"use_peft": False}),
    "ppo with shared prompts": ("ppo", {"num_generations": 2, "critic": "none"}, {"load_in_4bit": True}),
}


@pytest.mark.parametrize("run", RUNS)
def test_shallow_models_say_what_the_whole_model_needs(run, monkeypatch):
    stage, args, model = RUNS[run]
    config = LlamaConfig(**SIZES, num_hidden_layers=5, tie_word_embeddings=True)
    shallow = plan(stage, config, model=model, **args)
    monkeypatch.setattr(planner, "_depths", lambda text, depth: (depth,))
    whole = plan(stage, config, model=model, **args)
    assert [one.name for one in shallow.phases] == [one.name for one in whole.phases]
    for one, other in zip(shallow.phases, whole.phases, strict=True):
        assert one.n_bytes == pytest.approx(other.n_bytes, rel=0, abs=64)


def test_layers_of_two_kinds_repeat_with_their_period():
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    assert planner._period(kinds) == 3
    assert planner._period(["full_attention"] * 9) == 1
    assert planner._depths(Qwen2Config(num_hidden_layers=9, layer_types=kinds), 9) == (3, 6)


def test_weights_in_4_bits_are_those_of_the_closed_form():
    found = phase(plan(model={"load_in_4bit": True}), "training step")
    h, inner, kv = 128, 344, 64
    linear = 2 * h * h + 2 * h * kv + 3 * h * inner  # weights of a layer in 4 bits
    expected = 2048 * h * 4 + h * 4  # embedding and last norm in fp32
    for size in [h * h, h * kv, h * kv, h * h, h * inner, h * inner, inner * h]:
        blocks = -(-size // 64)
        # Packed, one byte a scale, a scale of scales every 256 of them, their offset, and two tables.
        expected += 7 * (size // 2 + blocks + 4 * -(-blocks // 256) + 4 + 4 * (16 + 256))
    expected += 7 * 2 * h * 4  # norms
    assert linear * 7 // 2 < found["base weights"]
    buffers = found["base weights"] - expected
    assert 0 <= buffers < 1024  # frequencies of the positions


def test_adapters_gradients_and_optimizer_are_counted_by_weight():
    r, h, inner, kv = 8, 128, 344, 64
    adapter = r * (2 * (h + h) + 2 * (h + kv) + 3 * (h + inner)) * 7  # weights of A and B
    found = phase(plan("sft", model={"lora_r": r}), "optimizer step")
    assert found["adapters and heads"] == found["gradients"] == 4 * adapter
    assert found["optimizer"] == 8 * adapter
    small = phase(plan("sft", model={"lora_r": r}, optim="adafactor"), "optimizer step")
    assert small["optimizer"] < found["optimizer"] / 10
    quarter = phase(plan("sft", model={"use_peft": False}, optim="adamw_8bit"), "optimizer step")
    assert quarter["optimizer"] < 0.27 * 2 * quarter["gradients"]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_of_sft_needs_what_a_real_one_does(checkpointing):
    from trl.trainer.utils import add_fused_lm_head

    model = LlamaForCausalLM(CONFIG)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    if checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros(4, 40, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    with LiveBytes() as live:
        live.track((tensor for _, tensor in state_tensors(model)), "base weights")
        outputs = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False, fused_lm_head=True)
        (-outputs.log_probs).sum().backward()
    step = phase(plan("sft", activation_checkpointing=checkpointing), "training step")
    assert sum(step.values()) - step["optimizer"] == pytest.approx(live.peak, rel=0.005)


def test_a_run_of_ppo_needs_what_was_planned(chat_tokenizer, tmp_path):
    from datasets import Dataset

    from hf_rlhf_ext import PPOConfig, PPOTrainer

    torch.manual_seed(0)
    config = LlamaConfig(**(SIZES | {"vocab_size": max(2048, len(chat_tokenizer))}), num_hidden_layers=3)
    prompt = "abc " * 6
    n_prompt = len(chat_tokenizer(prompt)["input_ids"])
    args = PPOConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=2,
        num_ppo_epochs=1,
        max_completion_length=12,
        generation_kwargs={"min_new_tokens": 12},
        use_cpu=True,
        bf16=False,
        critic="adapter",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    policy = LlamaForCausalLM(config)
    with LiveBytes() as live:
        live.track((tensor for _, tensor in state_tensors(policy)), "base weights")
        PPOTrainer(
            policy,
            lambda completions, **columns: [float(len(text)) for text in completions],
            args,
            Dataset.from_list([{"prompt": prompt}] * 8),
            processing_class=chat_tokenizer,
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        ).train()
    found = plan_memory(
        config,
        "ppo",
        args,
        model_args=SimpleNamespace(dtype="float32"),
        reward_model=False,
        prompt_tokens=n_prompt,
        device="cpu",
    )
    assert found.n_bytes == pytest.approx(live.peak, rel=0.05)


def test_the_plan_says_which_phase_is_the_peak_and_what_is_in_it():
    found = plan("ppo", reward_model=None, model={"load_in_4bit": True})
    assert [one.name for one in found.phases] == [
        "rollout",
        "reward",
        "scoring",
        "policy update",
        "value update",
        "optimizer step",
    ]
    assert found.n_bytes == max(one.n_bytes for one in found.phases) == found.peak.n_bytes
    assert found.fits(found.n_bytes) and not found.fits(found.n_bytes - 1)
    written = found.to_dict()
    assert written["bytes"] == found.n_bytes and written["peak"] == found.peak.name
    assert sum(written["phases"][0]["parts"].values()) == written["phases"][0]["bytes"]
    # Its peak is where the prompts pass through the last layer: keys and values of 24 tokens, 4 rows, 2 heads of 32.
    assert phase(found, "rollout")["KV cache"] == 7 * 2 * 4 * 2 * 32 * 24 * 4


def test_a_reward_model_of_its_own_is_in_memory_in_all_phases(ppo_plan):
    other = LlamaConfig(**(SIZES | {"hidden_size": 64, "intermediate_size": 128}), num_hidden_layers=2)
    alone, beside = ppo_plan, plan("ppo", reward_model=other, model={"load_in_4bit": True})
    weights = phase(beside, "rollout")["reward model"]
    assert weights > 2048 * 64 * 4
    differences = {one.name: sum(phase(beside, one.name).values()) - one.n_bytes for one in alone.phases}
    assert set(differences.values()) == {weights}
    assert "reward" in [one.name for one in beside.phases]


def test_what_is_not_given_is_assumed_and_said():
    found = plan_memory(SHALLOW, "ppo", options(critic="none"), device="cpu", reward_model=False)
    assert "length of prompts not given: 512 tokens assumed" in found.notes
    found = plan_memory(SHALLOW, "sft", options(optim="galore_adamwish"), device="cuda")
    assert any("max_length=1024" in note for note in found.notes)
    assert any("which was not measured" in note for note in found.notes)
    assert found.reserve > 2**28


def test_an_adapter_is_planned_on_its_base(tmp_path, ppo_plan):
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    found = plan("ppo", str(tmp_path / "adapter"), model={"load_in_4bit": True})
    assert found.model == "adapter"
    # The reference is a frozen copy of the adapter.
    adapter = phase(found, "optimizer step")["gradients"] // 2  # as is the critic
    added = phase(found, "scoring")["adapters and heads"] - phase(ppo_plan, "scoring")["adapters and heads"]
    assert added == pytest.approx(adapter, rel=0.01)


@pytest.mark.parametrize(
    "model, stage, given, message",
    [
        (T5Config(), "sft", {}, "encoder-decoder.*use a decoder-only model"),
        (CONFIG, "dpo", {}, "stage: 'dpo' is not known: choose one of sft, reward, ppo"),
        (CONFIG, "sft", {"device": "tpu"}, "device: 'tpu' cannot be planned: choose cuda or cpu"),
        (7, "sft", {}, "model: got int: pass a config"),
        ("./nowhere", "sft", {}, "no folder at ./nowhere"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(model, stage, given, message):
    with pytest.raises(UserError, match=message) as refused:
        plan_memory(model, stage, options(), **given)
    assert "\n" not in str(refused.value)


def test_an_unknown_architecture_is_refused_in_one_line():
    from transformers import PretrainedConfig

    class Unheard(PretrainedConfig):
        model_type = "unheard"

    with pytest.raises(UserError, match="unheard.*give a causal language model, such as Llama") as refused:
        plan_memory(Unheard(num_hidden_layers=2), "sft", options(), device="cpu")
    assert "\n" not in str(refused.value)


def test_experts_in_one_parameter_are_not_quantized_and_a_note_says_so(tmp_path):
    sizes = SIZES | {"hidden_size": 64, "head_dim": 16, "vocab_size": 256}
    config = Qwen3MoeConfig(
        **sizes, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    base = load_base_model(str(tmp_path), load_in_4bit=True, dtype=torch.bfloat16)
    experts = sum(p.nbytes for name, p in base.named_parameters() if ".experts." in name)
    assert experts == 2 * 4 * 3 * 64 * 48 * 2  # layers, experts, matrices and two bytes for each weight
    found = plan("sft", config, model={"dtype": "bfloat16", "load_in_4bit": True})
    assert "the experts of qwen3_moe are not quantized: bitsandbytes leaves them in bfloat16" in found.notes
    real = sum({tensor.data_ptr(): tensor.nbytes for _, tensor in state_tensors(base)}.values())
    assert phase(found, "training step")["base weights"] == pytest.approx(real, rel=0.01)
    assert not any("experts" in note for note in plan("sft", config, model={"dtype": "bfloat16"}).notes)


def test_a_model_without_experts_has_no_note_of_them(ppo_plan):
    assert not any("experts" in note for note in ppo_plan.notes)


def test_70b_is_planned_at_once():
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    args = SimpleNamespace(per_device_train_batch_size=1)
    start = time.process_time()
    found = plan_memory(config, "sft", args, model_args=SimpleNamespace(load_in_4bit=True), device="cuda")
    assert time.process_time() - start < 3
    assert 36e9 < phase(found, "training step")["base weights"] < 40e9
