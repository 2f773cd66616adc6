"""Training steps and evaluations of SFT and reward training, against closed forms and real passes."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rlhf_ext import plan_memory
from hf_rlhf_ext.compat import add_fused_lm_head
from hf_rlhf_ext.modeling.memory.live_bytes import LiveBytes, state_tensors

HIDDEN, VOCABULARY = 64, 40_000
CONFIG = LlamaConfig(
    hidden_size=HIDDEN,
    intermediate_size=128,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_hidden_layers=2,
    vocab_size=VOCABULARY,
    tie_word_embeddings=True,
)


def plan(stage, *, batch=2, prompt=300, completion=100, device="cpu", model=None, evaluates=False, **given):
    args = SimpleNamespace(per_device_train_batch_size=batch, bf16=device == "cuda", **given)
    dtype = "bfloat16" if device == "cuda" else "float32"
    found = plan_memory(
        CONFIG,
        stage,
        args,
        model_args=SimpleNamespace(dtype=dtype, **(model or {})),
        evaluates=evaluates,
        prompt_tokens=prompt,
        completion_tokens=completion,
        device=device,
    )
    return {phase.name: {part.name: part.n_bytes for part in phase.parts} for phase in found.phases}


# ---- The loss of SFT ----


@pytest.mark.parametrize("learns_prompts", [False, True])
def test_on_a_gpu_the_loss_of_sft_holds_one_tile_of_logits_in_bf16(learns_prompts):
    step = plan("sft", device="cuda", completion_only_loss=not learns_prompts)["training step"]
    n = 2 * (399 if learns_prompts else 100)  # tokens with a label
    tile = 32_768 * 2
    hidden_gradients = HIDDEN * 4  # which are added up in fp32
    # Beside them are hidden states, and a few numbers for each token: its target, sums in fp32 and results.
    assert n * (tile + hidden_gradients) <= step["logits"] <= 1.03 * n * (tile + hidden_gradients)


def test_on_a_cpu_the_loss_of_sft_holds_copies_of_the_tile_in_fp32():
    step = plan("sft")["training step"]
    assert step["logits"] > 3 * (2 * 399) * 32_768 * 4  # of all tokens but the last ones


# ---- Evaluation ----


def test_sft_has_an_evaluation_only_where_the_run_evaluates():
    assert "evaluation" not in plan("sft")
    one = plan("sft", evaluates=True, per_device_eval_batch_size=1)["evaluation"]
    two = plan("sft", evaluates=True, per_device_eval_batch_size=2)["evaluation"]
    assert "gradients" not in one and one["optimizer"] > 0
    assert two["activations"] == pytest.approx(2 * one["activations"], rel=0.02)


def test_a_reward_model_is_evaluated_in_comparisons_and_normalized_in_completions():
    sizes = {"per_device_eval_batch_size": 8, "layout": "plain"}
    normalized = plan("reward", **sizes)["evaluation"]["activations"]
    evaluated = plan("reward", **sizes, evaluates=True)["evaluation"]["activations"]
    assert evaluated == pytest.approx(2 * normalized, rel=0.02)  # a comparison has two completions


# ---- Adapters and precisions ----


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_a_step_with_another_adapter_needs_what_a_real_one_does(options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", **options))
    model.train()
    ids = torch.zeros(2, 24, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    with LiveBytes() as live:
        live.track((tensor for _, tensor in state_tensors(model)), "base weights")
        outputs = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False, fused_lm_head=True)
        (-outputs.log_probs).sum().backward()
    sizes = {"prompt": 16, "completion": 8, "activation_checkpointing": False}
    step = plan("sft", model=options, **sizes)["training step"]
    assert sum(step.values()) - step["optimizer"] == pytest.approx(live.peak, rel=0.005)


def test_weights_in_8_bits_take_a_byte_each_and_can_be_planned():
    step = plan("reward", model={"load_in_8bit": True})["training step"]
    linear = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * 128)
    scales = 2 * 4 * (4 * HIDDEN + 2 * 128 + HIDDEN)
    others = 4 * (VOCABULARY * HIDDEN + 5 * HIDDEN)  # the embedding and the norms in fp32
    expected = linear + scales + others
    assert expected <= step["base weights"] <= expected + 1024  # with the frequencies of positions


def test_a_layer_in_8_bits_has_its_products_in_int32_for_a_moment():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(64, 512, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(torch.randn(512, 64), requires_grad=False, has_fp16_weights=False).to("cpu")
    inputs = torch.randn(40, 64)
    inputs[3, 5] = 20.0  # an outlier, whose column is computed exactly
    expected = layer(inputs)
    with LiveBytes() as live:
        result = layer(inputs)
    torch.testing.assert_close(result, expected)
    assert live.peak >= 40 * 512 * (4 + 4)  # the products and the result
