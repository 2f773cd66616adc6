"""Models, checkpoints and options of loading that do not fit are refused in one line, from every entry."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import is_flash_attn_2_available

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, PPOConfig, PPOTrainer, RewardScorer, load_base_model
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.families import check_policy, reads_later_tokens
from hf_rlhf_ext.modeling.loading import load_policy, load_tokenizer

SMALL_BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SMALL_BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, chat_tokenizer_factory):
    """Folders of tiny checkpoints by name."""
    tokenizer = chat_tokenizer_factory()
    size = {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    models = {
        "T5": T5ForConditionalGeneration(T5Config(**size, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
        "BART": BartForConditionalGeneration(BartConfig(**size, **SMALL_BART)),
        "BART's decoder": BartForCausalLM(BartConfig(**size, **SMALL_BART)),
        "BERT": BertForMaskedLM(BertConfig(**size, **SMALL_BERT)),
        "Granite": GraniteForCausalLM(GraniteConfig(**size, **SMALL_BERT, num_key_value_heads=2)),
    }
    paths = {}
    for name, model in models.items():
        paths[name] = str(tmp_path_factory.mktemp("models"))
        model.save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    return paths


def refused(call, *fragments: str) -> None:
    """Asserts that a call raises `UserError` with one line that contains these fragments."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message


@pytest.mark.parametrize(
    "name, task, fragments",
    [
        ("T5", "causal_lm", ["encoder-decoder (t5)", "decoder-only"]),
        ("T5", "reward", ["encoder-decoder (t5)", "give a decoder or an encoder"]),
        ("BART", "causal_lm", ["encoder-decoder (bart)", "decoder-only"]),
        ("BART", "reward", ["encoder-decoder (bart)", "reward model"]),
        ("BERT", "causal_lm", ["is an encoder (BertForMaskedLM)", "causal language model"]),
        ("Granite", "reward", ["GraniteConfig", "no class for sequence classification", "another base"]),
    ],
)
def test_a_checkpoint_of_another_family_is_refused_before_it_is_loaded(folders, name, task, fragments):
    refused(lambda: load_base_model(folders[name], task=task), folders[name], *fragments)


def test_every_entry_refuses_it(folders, chat_tokenizer, tmp_path):
    rows = Dataset.from_dict({"prompt": ["day"], "chosen": ["good"], "rejected": ["bad"]})

    def ppo(**given):
        args = PPOConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=1)
        options = {"reward_funcs": lambda completions, **columns: [0.0], "processing_class": chat_tokenizer} | given
        return PPOTrainer(args=args, train_dataset=Dataset.from_dict({"prompt": ["day"]}), **options)

    def bradley_terry(model):
        args = BradleyTerryConfig(str(tmp_path), use_cpu=True, bf16=False)
        return BradleyTerryTrainer(model, args=args, train_dataset=rows, processing_class=chat_tokenizer)

    refused(lambda: load_policy(folders["T5"]), "encoder-decoder")
    refused(lambda: ppo(model=folders["T5"]), "encoder-decoder")
    refused(lambda: ppo(model=nn.Linear(2, 2)), "Linear is not a language model")
    refused(lambda: bradley_terry(folders["Granite"]), "no class for sequence classification")
    refused(lambda: bradley_terry(nn.Linear(2, 2)), "Linear is not a model of Transformers")
    refused(lambda: RewardScorer.from_pretrained(folders["T5"]), "encoder-decoder")


def test_the_decoder_of_an_encoder_decoder_that_was_saved_alone_is_loaded(folders):
    assert isinstance(load_base_model(folders["BART's decoder"], dtype="float32"), BartForCausalLM)


def test_a_policy_of_another_kind_is_refused(tiny_llama, tiny_config):
    classifier = LlamaForSequenceClassification(tiny_config)
    refused(lambda: check_policy(classifier), "is a classifier or reward model", "load_base_model")
    refused(lambda: check_policy(tiny_llama.model), "no language-model head", "AutoModelForCausalLM")
    wrapped = nn.Module()
    wrapped.pretrained_model = tiny_llama  # as TRL's models with a value head have it
    refused(lambda: check_policy(wrapped), "pass its `pretrained_model`")
    for task_type in ("SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS"):
        config = LoraConfig(target_modules=["q_proj"], task_type=task_type)
        refused(lambda config=config: check_policy(tiny_llama, config), f"task_type is {task_type}", "CAUSAL_LM")
    check_policy(tiny_llama, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    check_policy(get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"])))


def test_later_tokens_are_noticed_and_nothing_else_changes(tiny_llama):
    config = BertConfig(vocab_size=300, **SMALL_BERT)
    assert reads_later_tokens(BertLMHeadModel(config), [5, 6, 7])
    assert not reads_later_tokens(BertLMHeadModel(BertConfig(**(config.to_dict() | {"is_decoder": True}))), [5, 6, 7])
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama.to(dtype).train()
        state = torch.get_rng_state()
        assert not reads_later_tokens(model, [5])
        assert not reads_later_tokens(model, list(range(40)))
        assert model.training and torch.equal(state, torch.get_rng_state()) and not model.lm_head._forward_pre_hooks


# Options and errors of `from_pretrained`


@pytest.mark.parametrize(
    "option, remedy",
    [
        ("torch_dtype", "dtype='float32'"),
        ("use_flash_attention_2", "attn_implementation='flash_attention_2'"),
        ("load_in_8bit", "quantization_config="),
        ("use_auth_token", "HF_TOKEN"),
        ("no_such_option", "pass the loaded model"),
    ],
)
def test_an_unknown_option_names_the_right_one(folders, tmp_path, option, remedy):
    refused(lambda: load_base_model(folders["Granite"], **{option: True}), f"{option}: ", remedy)
    refused(lambda: load_policy(folders["Granite"], **{option: True}), f"{option}: ", remedy)
    args = BradleyTerryConfig(str(tmp_path), use_cpu=True, bf16=False, model_init_kwargs={option: True})
    rows = Dataset.from_dict({"prompt": ["day"], "chosen": ["good"], "rejected": ["bad"]})
    refused(lambda: BradleyTerryTrainer(folders["Granite"], args=args, train_dataset=rows), f"{option}: ", remedy)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attention is installed")
def test_a_missing_package_for_attention_names_sdpa(folders):
    for name in ("flash_attention_2", "no_such_attention"):
        refused(
            lambda name=name: load_base_model(folders["Granite"], attn_implementation=name),
            "attn_implementation='sdpa'",
        )


@pytest.mark.parametrize(
    "changes, fragments",
    [
        ({"model_type": "newer"}, ["newer", "does not know", "upgrade Transformers"]),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, ["Python code", "trust_remote_code=True"]),
        ({"hidden_size": "wide"}, ["cannot be loaded", "'hidden_size'"]),
    ],
)
def test_a_config_that_cannot_be_used_is_one_line(folders, tmp_path, changes, fragments):
    with open(f"{folders['Granite']}/config.json") as file:
        config = json.load(file)
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    refused(lambda: load_base_model(str(tmp_path)), str(tmp_path), *fragments)


def test_a_tokenizer_that_cannot_be_loaded_is_one_line(folders, tmp_path):
    with open(f"{folders['Granite']}/config.json") as file:
        (tmp_path / "config.json").write_text(file.read())
    refused(lambda: load_tokenizer(str(tmp_path)), "tokenizer: ", "cannot be loaded")
