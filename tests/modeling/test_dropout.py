"""`disable_dropout`: after it, two forward passes in training mode are equal, whatever kind of dropout a model has."""

import pytest
import torch
import transformers
from peft import BOFTConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_rlhf_ext.modeling.dropout import disable_dropout, has_dropout

IDS = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(0))

TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 4, "max_position_embeddings": 64, "attention_dropout": 0.5} | TOKENS
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
GPT2 |= {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5} | TOKENS
BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
BART |= {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "max_position_embeddings": 64}
BART |= {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5, "decoder_layerdrop": 0.5} | TOKENS
XGLM = {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64}
XGLM |= {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5, "layerdrop": 0.5} | TOKENS
SMALL = {"hidden_size": 32, "num_attention_heads": 4} | TOKENS

# Every probability of dropout is 0.5. The value says whether it is in modules (`module`), in attributes (`attribute`),
# or is read from the config in the forward pass (`config`).
CONFIGS = {
    "Llama": ("LlamaConfig", LLAMA, {}),
    "Qwen2": ("Qwen2Config", LLAMA, {}),
    "Gemma3Text": ("Gemma3TextConfig", LLAMA, {"head_dim": 8}),
    "Mixtral": ("MixtralConfig", LLAMA, {"router_jitter_noise": 0.5, "num_local_experts": 2}),
    "Phi": ("PhiConfig", LLAMA, {"resid_pdrop": 0.5, "embd_pdrop": 0.5}),
    "StableLm": ("StableLmConfig", LLAMA, {"hidden_dropout": 0.5}),
    "Persimmon": ("PersimmonConfig", LLAMA, {"hidden_dropout": 0.5}),
    "Starcoder2": ("Starcoder2Config", LLAMA, {"residual_dropout": 0.5, "embedding_dropout": 0.5}),
    "GPTNeoX": ("GPTNeoXConfig", LLAMA, {"hidden_dropout": 0.5}),
    "GPT2": ("GPT2Config", GPT2, {}),
    "GPTBigCode": ("GPTBigCodeConfig", GPT2, {}),
    "GPTJ": ("GPTJConfig", GPT2, {"rotary_dim": 4}),
    "CodeGen": ("CodeGenConfig", GPT2, {"rotary_dim": 4}),
    "GPTNeo": (
        "GPTNeoConfig",
        SMALL | {"hidden_size": 32},
        {"num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]], "max_position_embeddings": 64}
        | {"resid_dropout": 0.5, "embed_dropout": 0.5, "attention_dropout": 0.5},
    ),
    "Bloom": ("BloomConfig", SMALL, {"n_layer": 1, "n_head": 4, "hidden_dropout": 0.5, "attention_dropout": 0.5}),
    "Falcon": ("FalconConfig", SMALL, {"num_hidden_layers": 1, "hidden_dropout": 0.5, "attention_dropout": 0.5}),
    "OPT": (
        "OPTConfig",
        SMALL,
        {"ffn_dim": 48, "num_hidden_layers": 2, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
        | {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    ),
    "XGLM": ("XGLMConfig", XGLM, {}),
    "BioGpt": (
        "BioGptConfig",
        SMALL,
        {"intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64, "layerdrop": 0.5}
        | {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "activation_dropout": 0.5},
    ),
    "Bart": ("BartConfig", BART, {"is_decoder": True}),
    "ProphetNet": (
        "ProphetNetConfig",
        SMALL | {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5},
        {"decoder_ffn_dim": 48, "num_decoder_layers": 1, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 48}
        | {"num_encoder_layers": 1, "num_encoder_attention_heads": 4, "is_decoder": True, "add_cross_attention": False},
    ),
    "RecurrentGemma": (
        "RecurrentGemmaConfig",
        SMALL,
        {"lru_width": 32, "intermediate_size": 96, "num_hidden_layers": 3, "attention_window_size": 16}
        | {"attention_dropout": 0.5},
    ),
}


def make(name: str, **more) -> nn.Module:
    kind, common, own = CONFIGS[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, kind)(**(common | own | more)))


def change_by_chance(model: nn.Module) -> float:
    """The largest difference between two forward passes in training mode with other random numbers."""
    model.train()
    logits = []
    for seed in range(2):
        torch.manual_seed(seed)
        logits.append(model(input_ids=IDS, use_cache=False).logits)
    return float((logits[0] - logits[1]).detach().abs().max())


def probabilities(config) -> dict[str, float]:
    return {name: value for name, value in vars(config).items() if "drop" in name or "jitter" in name}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_computes_the_same_twice_and_its_config_keeps_its_probabilities(name, tmp_path):
    model = make(name)
    assert has_dropout(model) and change_by_chance(model) > 1e-3
    before = probabilities(model.config)
    assert any(value == 0.5 for value in before.values())

    disable_dropout(model)
    assert change_by_chance(model) == 0.0 and not has_dropout(model)
    assert probabilities(model.config) == before
    model.config.save_pretrained(tmp_path)
    saved = type(model.config).from_pretrained(tmp_path)
    assert probabilities(saved) == before

    with torch.no_grad():
        trained = model(input_ids=IDS, use_cache=False).logits
        evaluated = model.eval()(input_ids=IDS, use_cache=False).logits
    assert torch.equal(trained, evaluated)


ATTENTION = [("Llama", "eager"), ("Llama", "sdpa"), ("Falcon", "eager"), ("Falcon", "sdpa"), ("GPTJ", "eager")]
ATTENTION += [("GPTNeo", "eager")]  # GPT-J and GPT-Neo have no "sdpa"


@pytest.mark.parametrize("name, attention", ATTENTION)
def test_with_every_kind_of_attention(name, attention):
    model = make(name, attn_implementation=attention)
    disable_dropout(model)
    assert change_by_chance(model) == 0.0


ADAPTERS = {
    "LoRA": LoraConfig(lora_dropout=0.5, target_modules=["q_proj"]),
    "LoHa": LoHaConfig(rank_dropout=0.5, module_dropout=0.5, target_modules=["q_proj"], init_weights=False),
    "LoKr": LoKrConfig(rank_dropout=0.5, module_dropout=0.5, target_modules=["q_proj"], init_weights=False),
    "BOFT": BOFTConfig(boft_dropout=0.5, target_modules=["q_proj"], boft_block_size=4, init_weights=False),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_dropout_of_adapters(name):
    model = get_peft_model(make("Llama", attention_dropout=0.0), ADAPTERS[name])
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter)
    assert has_dropout(model) and change_by_chance(model) > 0
    disable_dropout(model)
    assert change_by_chance(model) == 0.0 and not has_dropout(model)


def test_only_probabilities_change():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop_mask = True
            self.n_dropped = 3
            self.dropout_scale = 4.0
            self.eps = 0.5

    layer = Layer()
    disable_dropout(layer)
    assert (layer.drop_mask, layer.n_dropped, layer.dropout_scale, layer.eps) == (True, 3, 4.0, 0.5)


def test_models_that_share_a_config_keep_it_and_are_not_changed_by_each_other():
    first, second = make("Falcon"), make("Falcon")
    second.config = first.config
    disable_dropout(first)
    assert has_dropout(second) and change_by_chance(second) > 1e-3
