"""Embeddings and output heads that were resized or trained are saved with an adapter, and come back with it."""

import copy
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.merge import merge_run
from hf_rlhf_ext.modeling.adapters import load_adapter_weights, save_adapter, saved_as_one_adapter
from hf_rlhf_ext.modeling.embeddings import embedding_mismatch, n_rows, read_embeddings, restore_embeddings
from hf_rlhf_ext.modeling.heads import install_fp32_score
from hf_rlhf_ext.modeling.loading import attach_adapter, load_base_model, load_policy
from hf_rlhf_ext.modeling.stack import AdapterStack

ROWS = 384
IDS = torch.tensor([[5, 6, 7, ROWS, 9, ROWS + 1]])  # with two new tokens


def lora(**more):
    return LoraConfig(**({"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | more))


def make_base(folder, tokenizer, *, tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory, chat_tokenizer_factory):
    """Folders of two small bases, by whether they are tied."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = chat_tokenizer_factory()
    return {tied: make_base(folder / str(tied), tokenizer, tied=tied) for tied in (False, True)}


def drawn(model, *, seed=1):
    """Gives every trainable weight random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def resized(base, rows=ROWS + 2, **options):
    """The base with more or fewer tokens, whose new rows are random."""
    model = load_base_model(base, **({"dtype": "float32"} | options))
    torch.manual_seed(5)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    model.eval()
    return model(input_ids=ids).logits.float()


KINDS = {
    "lora": lora(),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "embedding-copy": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "on-embedding": lora(target_modules=["q_proj", "embed_tokens"]),
    "on-head": lora(target_modules=["q_proj", "lm_head"]),
    "new-tokens": lora(trainable_token_indices=[ROWS, ROWS + 1]),
    "trl": lora(trainable_token_indices=[ROWS, ROWS + 1], modules_to_save=["lm_head"]),  # as TRL does
    "trainable-tokens": TrainableTokensConfig(token_indices=[ROWS + 1], target_modules=["embed_tokens"]),
}


CASES = [(kind, tied) for kind in KINDS for tied in (False, True)]
CASES.remove(("trl", True))  # PEFT 0.21 cannot compute it: hub/sft.py chooses the matrices of a tied model


@pytest.mark.parametrize("kind, tied", CASES)
def test_a_resized_base_comes_back_to_the_bit(bases, kind, tied, tmp_path):
    model = drawn(get_peft_model(resized(bases[tied]), copy.deepcopy(KINDS[kind])))
    save_adapter(model, "default", tmp_path)
    policy, tokenizer = load_policy(tmp_path, dtype="float32")
    assert torch.equal(logits(policy), logits(model))
    assert n_rows(policy) == policy.config.vocab_size == ROWS + 2 and len(tokenizer) <= ROWS
    # PEFT itself reads the folder too, on a base that was resized by hand.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_hand = load_base_model(bases[tied], dtype="float32")
        by_hand.resize_token_embeddings(ROWS + 2, mean_resizing=False)
        assert torch.equal(logits(PeftModel.from_pretrained(by_hand, tmp_path)), logits(model))


@pytest.mark.parametrize(
    "options, rows", [({"dtype": "bfloat16"}, ROWS + 2), ({"load_in_4bit": True}, ROWS + 2), ({}, ROWS - 64)]
)
def test_other_bases_come_back_too(bases, options, rows, tmp_path):
    model = drawn(get_peft_model(resized(bases[False], rows, **options), lora()))
    save_adapter(model, "default", tmp_path)
    policy, _ = load_policy(tmp_path, **({"dtype": "float32"} | options))
    ids = IDS.clamp(max=rows - 1)
    assert torch.equal(logits(policy, ids), logits(model, ids)) and n_rows(policy) == rows


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_an_embedding_that_is_trained_itself_is_saved(bases, name, tmp_path):
    model = get_peft_model(load_base_model(bases[False], dtype="float32"), lora())
    layer = model.get_input_embeddings() if name == "embed_tokens" else model.get_output_embeddings()
    layer.weight.requires_grad_(True)
    drawn(model)
    save_adapter(model, "default", tmp_path)
    saved = [key for key in load_file(tmp_path / "adapter_model.safetensors") if "lora" not in key]
    assert len(saved) == 1 and name in saved[0]
    ids = IDS.clamp(max=ROWS - 1)
    assert torch.equal(logits(load_policy(tmp_path, dtype="float32")[0], ids), logits(model, ids))
    # A base that others use is not changed by it.
    stack = AdapterStack(get_peft_model(load_base_model(bases[False], dtype="float32"), lora()))
    with pytest.raises(UserError, match="does not fit the embeddings of the shared base.*another .*" + name):
        stack.attach("other", tmp_path)


def test_a_base_as_it_was_loaded_is_not_saved(bases, tmp_path):
    model = get_peft_model(load_base_model(bases[True], dtype="float32"), lora())
    save_adapter(model, "default", tmp_path)
    assert not read_embeddings(tmp_path, model).rows
    assert embedding_mismatch(tmp_path, model) is None


def test_a_base_that_is_not_found_offline_is_saved_with_a_warning(tiny_llama, tmp_path, caplog):
    for name in ("", "somebody/never-downloaded"):
        model = get_peft_model(copy.deepcopy(tiny_llama), lora())
        model.peft_config["default"].base_model_name_or_path = name
        model.get_base_model().name_or_path = name
        save_adapter(model, "default", tmp_path / (name or "none"))
        assert bool(read_embeddings(tmp_path / (name or "none"), model).rows) == bool(name)
    assert caplog.text.count("somebody/never-downloaded is not found offline") == 1
    save_adapter(model, "default", tmp_path / "again")
    assert caplog.text.count("is not found offline") == 1


def test_a_merged_adapter_has_the_rows(bases, tmp_path, chat_tokenizer):
    for tied in (False, True):
        model = drawn(get_peft_model(resized(bases[tied]), lora()))
        folder = tmp_path / str(tied)
        save_adapter(model, "default", folder)
        chat_tokenizer.save_pretrained(folder)
        merged = merge_run(folder, tmp_path / f"merged-{tied}", dtype="float32")
        plain = LlamaForCausalLM.from_pretrained(merged, dtype="float32")
        assert plain.config.vocab_size == ROWS + 2
        torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)


def test_a_layer_without_rows_in_the_file_is_one_line(bases, tmp_path):
    model = drawn(get_peft_model(resized(bases[False]), lora()))
    save_adapter(model, "default", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = {key: value for key, value in load_file(path).items() if "lm_head" not in key}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="no rows of new tokens for lm_head") as error:
        load_policy(tmp_path, dtype="float32")
    assert "\n" not in str(error.value)


def test_resizing_at_load_draws_no_random_numbers(bases, tmp_path):
    save_adapter(get_peft_model(resized(bases[False]), lora()), "default", tmp_path)
    base = load_base_model(bases[False], dtype="float32")
    state = torch.get_rng_state()
    restore_embeddings(base, tmp_path)
    assert n_rows(base) == ROWS + 2 and torch.equal(torch.get_rng_state(), state)


def test_a_shared_base_is_not_resized(bases, tmp_path):
    save_adapter(drawn(get_peft_model(resized(bases[False]), lora())), "default", tmp_path)
    model = get_peft_model(load_base_model(bases[False], dtype="float32"), lora())
    before = model.get_input_embeddings().weight.clone()
    with pytest.raises(UserError, match=f"rows for {ROWS + 2} tokens, the base for {ROWS}"):
        AdapterStack(model).attach("other", tmp_path)
    assert torch.equal(model.get_input_embeddings().weight, before) and list(model.peft_config) == ["default"]
    # A base that has these rows, and more, is shared.
    shared = load_policy(tmp_path, dtype="float32")[0]
    AdapterStack(shared).attach("other", tmp_path)
    assert embedding_mismatch(tmp_path, shared) is None


def test_embeddings_that_an_adapter_replaced_are_not_those_of_the_base(bases, tmp_path):
    trained = get_peft_model(load_base_model(bases[False], dtype="float32"), lora())
    trained.get_input_embeddings().weight.requires_grad_(True)
    save_adapter(drawn(trained), "default", tmp_path / "trained")
    save_adapter(get_peft_model(load_base_model(bases[False], dtype="float32"), lora()), "default", tmp_path / "plain")
    policy = load_policy(tmp_path / "trained", dtype="float32")[0]
    assert "trained embeddings of" in embedding_mismatch(tmp_path / "plain", policy)


def test_resuming_restores_the_rows_in_place(bases, tmp_path):
    model = drawn(get_peft_model(resized(bases[False]), lora(modules_to_save=["embed_tokens"])))
    wanted = logits(model)
    stack = AdapterStack(model)
    stack.attach("reference", "policy")
    stack.save("reference", tmp_path / "ref")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * (parameter.shape[0] > ROWS))
    assert not torch.equal(logits(model), wanted)
    load_adapter_weights(model, "default", tmp_path / "ref")
    assert torch.equal(logits(model), wanted)
    smaller = get_peft_model(load_base_model(bases[False], dtype="float32"), lora(modules_to_save=["embed_tokens"]))
    with pytest.raises(UserError, match=rf"resize_token_embeddings\({ROWS + 2}\)"):
        load_adapter_weights(smaller, "default", tmp_path / "ref")


def test_a_second_adapter_on_a_base_object_is_one_line(bases, tmp_path):
    base = load_base_model(bases[False], dtype="float32")
    save_adapter(get_peft_model(base, lora()), "default", tmp_path)
    with pytest.raises(UserError, match="base: the layers .* have adapters already"):
        attach_adapter(base, tmp_path)


def test_a_trainer_saves_the_active_adapter_whatever_its_name(bases, tmp_path):
    config = resized(bases[False]).config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    install_fp32_score(model)
    model.name_or_path = bases[False]
    model = drawn(get_peft_model(model, lora(task_type="SEQ_CLS"), adapter_name="reward"))
    with saved_as_one_adapter(model):
        model.save_pretrained(tmp_path, state_dict=None, is_main_process=True)
    assert "save_pretrained" not in vars(model)
    assert not (tmp_path / "README.md").exists()  # PEFT's form, which is no card
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {"base_model.model.score.weight", "base_model.model.model.embed_tokens.weight"} <= weights.keys()
    assert weights["base_model.model.model.embed_tokens.weight"].shape[0] == ROWS + 2
