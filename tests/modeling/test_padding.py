"""`reads_left_padding`: which models compute something else for a prompt that is padded on the left."""

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from hf_rlhf_ext.modeling.padding import reads_left_padding

TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1} | TOKENS
LLAMA = SMALL | {"intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA |= {"num_key_value_heads": 4}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64} | TOKENS
BART = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "is_decoder": True}
BART |= {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "max_position_embeddings": 64}
BART |= TOKENS
SSM = SMALL | {"state_size": 8}

IGNORES_PADDING = {
    "Llama": ("LlamaConfig", LLAMA),
    "Mistral": ("MistralConfig", LLAMA | {"sliding_window": 4}),
    "Gemma3Text": ("Gemma3TextConfig", LLAMA | {"head_dim": 8}),
    "Mixtral": ("MixtralConfig", LLAMA | {"num_local_experts": 2}),
    "GPT2": ("GPT2Config", GPT2),
    "GPTJ": ("GPTJConfig", GPT2 | {"rotary_dim": 4}),
    "Bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 1, "n_head": 4} | TOKENS),
    "Mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 64} | TOKENS),
    "OPT": ("OPTConfig", LLAMA | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "XGLM": (
        "XGLMConfig",
        {"d_model": 32, "ffn_dim": 48, "num_layers": 1, "attention_heads": 4, "max_position_embeddings": 64} | TOKENS,
    ),
    "Mamba": ("MambaConfig", SSM),
    "Mamba2": ("Mamba2Config", SSM | {"num_heads": 8, "head_dim": 8, "n_groups": 1}),
}
READS_PADDING = {
    "Rwkv": (
        "RwkvConfig",
        SMALL | {"num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 48, "context_length": 64},
    ),
    "RecurrentGemma": (
        "RecurrentGemmaConfig",
        LLAMA | {"lru_width": 32, "intermediate_size": 96, "num_hidden_layers": 3, "attention_window_size": 16},
    ),
    "TrOCR": (
        "TrOCRConfig",
        {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48} | TOKENS,
    ),
    "Bart": ("BartConfig", BART),
    "Blenderbot": ("BlenderbotConfig", BART),
    "Pegasus": ("PegasusConfig", BART),
}


def make(name: str) -> nn.Module:
    kind, options = (IGNORES_PADDING | READS_PADDING)[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # the small weights of a new model hardly depend on what is read
    return model


def probe(model: nn.Module, ids=(5, 9, 14, 33, 7), width=9) -> bool:
    config = GenerationConfig(do_sample=True, max_new_tokens=4, pad_token_id=0, eos_token_id=[2])
    return reads_left_padding(model, list(ids), config, width=width, dtype=next(model.parameters()).dtype)


@pytest.mark.parametrize("name", IGNORES_PADDING)
def test_models_that_ignore_padding(name):
    assert not probe(make(name))


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "GPT2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_padding_that_is_read(name, dtype):
    assert not probe(make(name).to(dtype))


@pytest.mark.parametrize("name", READS_PADDING)
def test_models_that_read_padding(name):
    assert probe(make(name))


VIRTUAL = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
}


@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_are_put_before_the_padding(name):
    model = get_peft_model(make("Llama"), VIRTUAL[name]).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_()
    assert probe(model)


def test_prefix_tuning_puts_its_states_into_the_cache_which_the_mask_covers():
    model = get_peft_model(make("Llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    assert not probe(model)


def test_lora_does_not_read_padding_and_a_prompt_of_pad_tokens_is_no_exception():
    model = get_peft_model(make("Llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    assert not probe(model) and not probe(model, ids=[0, 0])


def test_the_probe_changes_neither_the_random_state_nor_the_model():
    model = make("Llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    probe(model)
    assert torch.equal(torch.random.get_rng_state(), state) and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", [*IGNORES_PADDING, "Rwkv", "RecurrentGemma"])
def test_padding_on_the_right_changes_no_token_before_it(name):
    # Scoring and training pad on the right, also for models that read padding on the left.
    model = make(name)
    ids = torch.tensor([[5, 9, 14, 33, 7]])
    padded = torch.cat([ids, torch.full((1, 4), 21)], 1)
    mask = torch.tensor([[1] * 5 + [0] * 4])
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        beside = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, :5]
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-4)
