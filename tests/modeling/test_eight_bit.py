"""8-bit bases with outliers are not mistaken for other models; adapters on 8-bit and FP4 bases get right gradients."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaForCausalLM,
)

from hf_rlhf_ext.modeling.families import reads_later_tokens
from hf_rlhf_ext.modeling.padding import reads_left_padding
from hf_rlhf_ext.modeling.quantization import each_token_alone, keep_nf4_gradients_right

IDS = [5, 9, 14, 33, 7]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def with_outliers(request, tiny_config, tmp_path):
    """A Llama in 8 bits whose inputs of each layer have three large columns."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:3] *= 12
            layer.post_attention_layernorm.weight[:3] *= 12
    model.save_pretrained(tmp_path)
    return load(tmp_path, request.param)


def load(folder, dtype):
    config = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config).eval()


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits


def test_a_causal_model_with_outliers_reads_neither_later_tokens_nor_padding(with_outliers):
    before = logits_of(with_outliers)
    assert not reads_later_tokens(with_outliers, IDS)
    config = GenerationConfig(do_sample=True, max_new_tokens=4, pad_token_id=0, eos_token_id=[2])
    dtype = next(with_outliers.parameters()).dtype
    assert not reads_left_padding(with_outliers, IDS, config, width=9, dtype=dtype)
    assert torch.equal(logits_of(with_outliers), before)  # the checks change nothing
    with each_token_alone(with_outliers):
        assert not torch.equal(logits_of(with_outliers), before)  # there are outliers


def test_an_encoder_in_8_bits_still_reads_later_tokens(tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    BertLMHeadModel(BertConfig(vocab_size=300, **small)).save_pretrained(tmp_path)
    model = BertLMHeadModel.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert reads_later_tokens(model, IDS)


FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}


@pytest.mark.parametrize(
    "quantized",
    [
        {"load_in_8bit": True},
        FOUR_BITS,
        FOUR_BITS | {"bnb_4bit_use_double_quant": True},
        FOUR_BITS | {"bnb_4bit_quant_type": "nf4"},
    ],
    ids=["int8", "fp4", "fp4-double", "nf4"],
)
def test_gradients_of_an_adapter_are_those_of_the_unquantized_base_up_to_rounding(tiny_config, tmp_path, quantized):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**quantized)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=config)
    keep_nf4_gradients_right(model)
    unquantized = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for name, module in model.named_modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if state is not None:  # the rounding of the weights themselves is not what is tested
                unquantized.get_submodule(name).weight.copy_(dequantize_4bit(module.weight.data, state))
    exact = adapter_gradients(unquantized)
    before = adapter_gradients(model)
    # 8 bits round the activations too; 4-bit kernels of CPUs with bf16 instructions round to bf16.
    assert torch.cosine_similarity(before, exact, dim=0) > (0.9 if "load_in_8bit" in quantized else 0.99)
    # bitsandbytes may repack weights at the first pass without gradients.
    with torch.no_grad():
        model.generate(input_ids=torch.tensor([IDS]), max_new_tokens=2, do_sample=False)
    assert torch.allclose(adapter_gradients(model), before, atol=1e-6)


def adapter_gradients(model):
    """The gradients of a new adapter with weights of its own, as one vector."""
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with_adapter = get_peft_model(model, lora)
    with_adapter(input_ids=torch.tensor([IDS]), labels=torch.tensor([IDS])).loss.backward()
    gradients = [p.grad.flatten().clone() for p in with_adapter.parameters() if p.requires_grad]
    with_adapter.unload()
    return torch.cat(gradients)
