"""Architectures of Transformers as the policy and as a reward model: each works, or is refused in one line."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, PPOConfig, PPOTrainer
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.heads import install_fp32_score
from hf_rlhf_ext.modeling.logprobs import (
    check_output_head,
    chunked_logprobs,
    completion_hidden_states,
    hidden_width,
    logit_transform,
)
from hf_rlhf_ext.reward.scores import score_sequences
from tests.support.rows import Row, each

VOCABULARY = 384

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "embedding_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "is_decoder": True,
    # Older names
    "d_model": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_layers": 2,
    "n_head": 4,
    "n_heads": 4,
    "n_positions": 128,
    "rotary_dim": 4,
    "d_ff": 32,
    "ffn_dim": 32,
    "dff": 32,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 32,
    "encoder_ffn_dim": 32,
}
"""Sizes of the models, under every name that configs have for them."""


def tiny(class_name: str, **changes: Any) -> Callable[[], nn.Module]:
    """Returns a function that builds a random model of a class. `changes` are further options of its config."""

    def build() -> nn.Module:
        model_class = getattr(transformers, class_name)
        config_class = model_class.config_class
        names = set(config_class().to_dict()) | set(config_class.attribute_map)
        sizes = {name: size for name, size in SIZES.items() if name in names}
        for alias, name in config_class.attribute_map.items():
            if name in sizes:
                sizes.pop(alias, None)
        torch.manual_seed(0)
        return loud(model_class(config_class(**(sizes | changes))))

    return build


@torch.no_grad()
def loud(model: nn.Module) -> nn.Module:
    """The model in fp32 with larger weights: those of a new model make all tokens about equally likely."""
    model.float()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.mul_(6)
    return model


def reward(class_name: str, **changes: Any) -> Callable[[], nn.Module]:
    """The same for a model with one label."""
    return tiny(class_name, num_labels=1, **({"is_decoder": False} | changes))


def policy(name: str, class_name: str | None = None, *, note: str = "", says: str | None = None, **changes: Any) -> Row:
    """A row about a policy. Without `class_name`, its class is `<name>ForCausalLM`."""
    return Row(name, says=says, value=tiny(class_name or f"{name}ForCausalLM", **changes), note=note, trainer="ppo")


def reward_model(
    name: str, class_name: str | None = None, *, note: str = "", says: str | None = None, **changes
) -> Row:
    """A row about a reward model. Without `class_name`, its class is `<name>ForSequenceClassification`."""
    value = reward(class_name or f"{name}ForSequenceClassification", **changes)
    return Row(name, says=says, value=value, note=note, trainer="reward")


def with_vision(
    class_name: str, text_class: str, *, vision: dict | None = None, text: dict | None = None, **options: Any
) -> Callable:
    """The same for a vision-language model, with the config of a language model of the class `text_class`."""

    def build() -> nn.Module:
        model_class = getattr(transformers, class_name)
        text_config = tiny(text_class)().config.to_dict() | (text or {})
        sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16}
        sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2} | (vision or {})
        torch.manual_seed(0)
        return loud(model_class(model_class.config_class(text_config=text_config, vision_config=sizes, **options)))

    return build


ROTARY = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_VISION = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4}
QWEN_TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}

MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2}
LATENT = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8}
SCALED = "scaled logits"
CAPPED = "capped logits"
GEMMA_VISION = with_vision("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM", mm_tokens_per_image=4)
QWEN_VL = with_vision(
    "Qwen2VLForConditionalGeneration",
    "Qwen2ForCausalLM",
    text={"rope_parameters": ROTARY, "model_type": "qwen2_vl_text"},
    vision=QWEN_VISION,
    **QWEN_TOKENS,
)
TEXT = "with prompts of text"
NOT_CAUSAL = "reads later tokens"
POSITIONS = "it counts positions in another way in `generate`"

POLICIES = [
    policy("Llama"),
    policy("Mistral"),
    policy("Ministral"),
    policy("Mixtral"),
    policy("Qwen2"),
    policy("Qwen3"),
    policy("Qwen3Moe"),
    policy("Qwen3Next", layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=16),
    policy("Gemma"),
    policy("Gemma 2", "Gemma2ForCausalLM", note=CAPPED, final_logit_softcapping=2.0),
    policy("Gemma 3", "Gemma3ForCausalLM"),
    policy("Phi"),
    policy("Phi3"),
    policy("OLMo 2", "Olmo2ForCausalLM"),
    policy("OLMoE", "OlmoeForCausalLM"),
    policy("SmolLM3"),
    policy("StableLM", "StableLmForCausalLM"),
    policy("Starcoder2"),
    policy("Falcon"),
    policy("GLM 4", "Glm4ForCausalLM"),
    policy("gpt-oss", "GptOssForCausalLM"),
    policy("DeepSeek V3", "DeepseekV3ForCausalLM", **LATENT, num_key_value_heads=4, n_group=1, topk_group=1),
    policy("MiniCPM3", **LATENT, num_key_value_heads=4, dim_model_base=16),
    policy("Cohere", note=SCALED),
    policy("Cohere2", note=SCALED),
    policy("Granite", note=SCALED, logits_scaling=4.0),
    policy("GraniteMoe", note=SCALED, logits_scaling=4.0),
    policy("GraniteMoeHybrid", note=SCALED, logits_scaling=4.0, layer_types=["mamba", "attention"], **MAMBA),
    policy("HyperCLOVAX", note=SCALED, logits_scaling=0.25),
    policy(
        "FalconH1",
        note=SCALED,
        lm_head_multiplier=0.5,
        mamba_d_ssm=32,
        mamba_d_state=8,
        mamba_n_heads=4,
        mamba_d_head=8,
    ),
    policy("NanoChat", note=CAPPED, final_logit_softcapping=2.0),
    policy("RecurrentGemma", note=CAPPED, num_hidden_layers=3, logits_soft_cap=2.0, attention_window_size=64),
    policy("Jamba", mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2),
    policy("LFM2", "Lfm2ForCausalLM", layer_types=["conv", "full_attention"]),
    policy("Mamba", state_size=4),
    policy("GPT-2", "GPT2LMHeadModel"),
    policy("GPT-J", "GPTJForCausalLM", note="head with a bias"),
    policy("GPT-NeoX", "GPTNeoXForCausalLM"),
    policy("BLOOM", "BloomForCausalLM"),
    policy("MPT", "MptForCausalLM"),
    policy("CTRL", "CTRLLMHeadModel"),
    policy("OPT"),
    policy("OPT-350m", "OPTForCausalLM", note="projected states", word_embed_proj_dim=16, do_layer_norm_before=False),
    policy("XGLM"),
    policy("BioGPT", "BioGptForCausalLM"),
    policy("BART, decoder", "BartForCausalLM"),
    policy("mBART, decoder", "MBartForCausalLM"),
    policy("Pegasus, decoder", "PegasusForCausalLM"),
    policy("Blenderbot, decoder", "BlenderbotForCausalLM"),
    policy("Marian, decoder", "MarianForCausalLM"),
    policy("TrOCR, decoder", "TrOCRForCausalLM"),
    policy("BERT, `is_decoder=True`", "BertLMHeadModel"),
    policy("ELECTRA, `is_decoder=True`", "ElectraForCausalLM", note="projected states", embedding_size=16),
    Row("LLaVA", value=with_vision("LlavaForConditionalGeneration", "LlamaForCausalLM"), note=TEXT, trainer="ppo"),
    Row("Gemma 3, vision-language", value=GEMMA_VISION, note=TEXT, trainer="ppo"),
    Row("Qwen2-VL", value=QWEN_VL, note=TEXT, trainer="ppo"),
    policy(
        "RWKV",
        "RwkvForCausalLM",
        says="generation_batch_size=1",
        note="in Transformers 5.23, `generate` is wrong for batches of RWKV; works with that option",
        attention_hidden_size=32,
    ),
    policy("RoBERTa, `is_decoder=True`", "RobertaForCausalLM", says="check_first_rollout", note=POSITIONS),
    policy("BERT, encoder", "BertLMHeadModel", says=NOT_CAUSAL, is_decoder=False),
    policy("XLNet", "XLNetLMHeadModel", says=NOT_CAUSAL),
    policy("XLM", "XLMWithLMHeadModel", says=NOT_CAUSAL, emb_dim=32, n_words=VOCABULARY),
    policy("ProphetNet, decoder", "ProphetNetForCausalLM", says="not the output of one linear layer"),
    policy(
        "Reformer",
        "ReformerModelWithLMHead",
        says="chunk length",
        axial_pos_embds_dim=[16, 16],
        axial_pos_shape=[8, 16],
        attn_layers=["local"],
        attention_head_size=8,
    ),
    policy("BERT, masked", "BertForMaskedLM", says="does not generate text", is_decoder=False),
    policy("T5", "T5ForConditionalGeneration", says="encoder-decoder", d_kv=8, is_decoder=False),
    policy("BART", "BartForConditionalGeneration", says="encoder-decoder", is_decoder=False),
    policy("a sequence classifier", "LlamaForSequenceClassification", says="classifier or reward model"),
    policy("a model without a head", "LlamaModel", says="no language-model head"),
]

REWARD_MODELS = [
    reward_model("Llama"),
    reward_model("Mistral"),
    reward_model("Mixtral"),
    reward_model("Qwen2"),
    reward_model("Qwen3"),
    reward_model("Qwen3Moe"),
    reward_model("Gemma"),
    reward_model("Gemma 2", "Gemma2ForSequenceClassification"),
    reward_model("Gemma 3", "Gemma3TextForSequenceClassification"),
    reward_model("Phi3"),
    reward_model("OLMo 2", "Olmo2ForSequenceClassification"),
    reward_model("SmolLM3"),
    reward_model("GLM 4", "Glm4ForSequenceClassification"),
    reward_model("gpt-oss", "GptOssForSequenceClassification"),
    reward_model("Falcon"),
    reward_model("GPT-2", "GPT2ForSequenceClassification"),
    reward_model("GPT-NeoX", "GPTNeoXForSequenceClassification"),
    reward_model("BLOOM", "BloomForSequenceClassification"),
    reward_model("OPT"),
    reward_model(
        "OPT-350m",
        "OPTForSequenceClassification",
        note="projected states",
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
    ),
    reward_model("BioGPT", "BioGptForSequenceClassification"),
    reward_model("Jamba", mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2),
    reward_model("CTRL"),
    reward_model("ModernBERT, decoder", "ModernBertDecoderForSequenceClassification", cls_token_id=1, sep_token_id=2),
    reward_model("BERT", "BertForSequenceClassification"),
    reward_model("RoBERTa", "RobertaForSequenceClassification"),
    reward_model("XLM-RoBERTa", "XLMRobertaForSequenceClassification"),
    reward_model("DeBERTa v2, v3", "DebertaV2ForSequenceClassification"),
    reward_model("ELECTRA", "ElectraForSequenceClassification"),
    reward_model("ALBERT", "AlbertForSequenceClassification"),
    reward_model("DistilBERT", "DistilBertForSequenceClassification"),
    reward_model("MPNet"),
    reward_model("ModernBERT", "ModernBertForSequenceClassification"),
    reward_model("FNet", says="depend on the padding"),
    reward_model("ConvBERT", "ConvBertForSequenceClassification", says="depend on the padding"),
    reward_model("XLNet", says="has no `score` or `classifier` head"),
    reward_model("T5", says="encoder-decoder", d_kv=8),
    reward_model("BART", "BartForSequenceClassification", says="encoder-decoder"),
    reward_model("a token classifier", "LlamaForTokenClassification", says="another task"),
    reward_model("a language model", "LlamaForCausalLM", says="task='reward'"),
]


@pytest.fixture(scope="module")
def tokenizer(chat_tokenizer_factory):
    return chat_tokenizer_factory()


def length_reward(completions, **columns):
    return [-float(len(text)) for text in completions]


def train_policy(model: nn.Module, tokenizer, folder, **options: Any) -> dict[str, float]:
    """One rollout of prompts of different lengths, and one update. Returns all metrics."""
    options = {"max_completion_length": 5, "num_ppo_epochs": 1, "max_steps": 1} | options
    args = PPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        activation_checkpointing=False,
        **options,
    )
    prompts = Dataset.from_dict({"prompt": ["Tell me", "a sunny day in the garden", "fox"]})
    trainer = PPOTrainer(model, length_reward, args=args, train_dataset=prompts, processing_class=tokenizer)
    trainer.train()
    return {name: value for row in trainer.state.log_history for name, value in row.items()}


@each(POLICIES)
def test_policy(row, tokenizer, tmp_path):
    model = row.value()
    if row.says is not None:
        with pytest.raises(UserError, match=re.escape(row.says)) as refused:
            train_policy(model, tokenizer, tmp_path)
        assert "\n" not in str(refused.value)
        return

    check_log_probabilities(model.eval())
    metrics = train_policy(model.train(), tokenizer, tmp_path)
    # Sampling, scoring and training compute the same, and the critic fits the states.
    assert abs(metrics["sampling/logprob_mismatch"]) < 1e-4
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-4)
    assert metrics["objective/entropy"] > 0 and metrics["grad_norm"] > 0


@torch.no_grad()
def check_log_probabilities(model: nn.Module) -> None:
    """Compares log-probabilities of two padded rows with log_softmax of the logits of each row alone."""
    input_ids = torch.randint(3, VOCABULARY, (2, 9))
    prompt_lengths = torch.tensor([5, 2])
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    check_output_head(model, input_ids[0].tolist())
    hidden = completion_hidden_states(model, model, input_ids, prompt_lengths, mask)
    targets = torch.cat([input_ids[0, 5:9], input_ids[1, 2:4]])
    logprobs, _ = chunked_logprobs(hidden, model.get_output_embeddings(), targets, transform=logit_transform(model))
    assert hidden.shape == (6, hidden_width(model))

    first = model(input_ids=input_ids[:1]).logits[0, 4:8]
    second = model(input_ids=input_ids[1:, :4]).logits[0, 1:3]
    expected = torch.log_softmax(torch.cat([first, second]).float(), -1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.01  # not all tokens are about equally likely


@each(REWARD_MODELS)
def test_reward_model(row, tokenizer, tmp_path):
    model = row.value()
    if row.says is not None:
        with pytest.raises(UserError, match=re.escape(row.says)) as refused:
            train_reward_model(model, tokenizer, tmp_path)
        assert "\n" not in str(refused.value)
        return

    check_scores(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train_reward_model(model, tokenizer, tmp_path)
    assert any(not torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True))


def train_reward_model(model: nn.Module, tokenizer, folder) -> None:
    """One optimizer step on pairs of different lengths."""
    args = BradleyTerryConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        activation_checkpointing=False,
        normalize_rewards=False,
    )
    pairs = [{"prompt": "a day", "chosen": " happy people in the garden", "rejected": " sad"}] * 2
    BradleyTerryTrainer(model, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer).train()


@torch.no_grad()
def check_scores(model: nn.Module) -> None:
    """Compares scores of padded rows with what Transformers computes for each row alone."""
    install_fp32_score(model)
    model.eval()
    input_ids = torch.randint(3, VOCABULARY, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    scores = score_sequences(model, input_ids, mask)
    first = model(input_ids=input_ids[:1]).logits
    second = model(input_ids=input_ids[1:, :5]).logits
    torch.testing.assert_close(scores, torch.cat([first, second]).float().squeeze(1), rtol=1e-5, atol=1e-4)
    assert scores.std() > 1e-3
    model.train()


def test_rwkv_works_with_the_option_that_the_message_names(tokenizer, tmp_path):
    rwkv = next(row for row in POLICIES if row.name == "RWKV").value()
    metrics = train_policy(rwkv, tokenizer, tmp_path, generation_batch_size=1)
    assert abs(metrics["sampling/logprob_mismatch"]) < 1e-4
