"""A base that was changed in memory is noticed before an adapter is trained on it, as it would be loaded unchanged."""

import copy
import time

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_rlhf_ext.modeling.adapter_start import attach_new_adapter
from hf_rlhf_ext.modeling.base_check import warn_of_changed_base
from hf_rlhf_ext.modeling.loading import load_base_model
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.trainer import PPOTrainer
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer

WARNING = "which the saved adapter will name as its base"
OPTIONS = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
PAIRS = [{"prompt": "a fox", "chosen": " happy", "rejected": " sad"}]


def lora(**options):
    return LoraConfig(**({"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options))


@pytest.fixture(scope="module")
def config(chat_tokenizer_factory):
    from transformers import LlamaConfig

    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaConfig(vocab_size=len(chat_tokenizer_factory()), pad_token_id=0, max_position_embeddings=128, **size)


@pytest.fixture(scope="module")
def folders(config, chat_tokenizer_factory, tmp_path_factory):
    """The same base in one file, in several files, and in bf16."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    paths = {name: tmp_path_factory.mktemp(name) for name in ("one", "sharded", "bfloat16")}
    model.save_pretrained(paths["one"])
    model.save_pretrained(paths["sharded"], max_shard_size="20KB")
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(paths["bfloat16"])
    for path in paths.values():
        chat_tokenizer_factory().save_pretrained(path)
    return {name: str(path) for name, path in paths.items()}


def load(folder, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def said(caplog, model, peft_config=None):
    caplog.clear()
    state = torch.get_rng_state()
    warn_of_changed_base("model", model, peft_config)
    assert torch.equal(state, torch.get_rng_state())
    lines = [record.message for record in caplog.records]
    assert all(WARNING in line and line.startswith("model: ") and "save_pretrained" in line for line in lines)
    return lines


def trained(model, name):
    """The model after one step on the weights with this part of a name."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if name in key:
                parameter.add_(1e-3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("folder", ["one", "sharded", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_unchanged_base_is_silent_in_every_dtype_and_form(folders, caplog, folder, dtype):
    model = load(folders[folder], dtype)
    assert not said(caplog, model, lora())
    assert not said(caplog, model.float(), lora())
    model.resize_token_embeddings(model.config.vocab_size + 7)
    assert not said(caplog, model, lora())
    assert not said(caplog, get_peft_model(model, lora(modules_to_save=["norm"])))
    assert said(caplog, trained(model, "k_proj"), lora())


@pytest.mark.parametrize("folder", ["one", "sharded"])
@pytest.mark.parametrize(
    "part", ["q_proj", "layers.1.mlp.up_proj", "layers.2.self_attn.o_proj", "model.norm", "layernorm"]
)
def test_a_change_of_any_kind_of_weight_is_noticed(folders, caplog, folder, part):
    (line,) = said(caplog, trained(load(folders[folder]), part), lora())
    assert part.rpartition(".")[2] in line and folders[folder] in line


@pytest.mark.parametrize(
    "kind", [{}, {"use_dora": True}, {"target_modules": ["down_proj"], "layers_to_transform": [2]}]
)
def test_a_merged_adapter_is_noticed(folders, caplog, kind):
    model = trained(get_peft_model(load(folders["one"]), lora(**kind)), "lora_B")
    assert not said(caplog, model)  # the adapter, which is saved
    assert said(caplog, model.merge_and_unload(), lora())


def test_bases_that_are_not_changed_or_not_known_are_silent(folders, caplog, config):
    whole = trained(load(folders["one"]), "q_proj")
    assert not said(caplog, whole)  # the whole model is saved
    assert not said(caplog, LlamaForCausalLM(config), lora())  # no name
    whole.name_or_path = "nobody/no-such-model"
    assert not said(caplog, whole, lora())
    pissa = attach_new_adapter("peft_config", load(folders["one"]), lora(init_lora_weights="pissa")).model
    assert not said(caplog, pissa)
    quantized = load(folders["one"], quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert not said(caplog, quantized, lora())
    assert said(caplog, trained(quantized, "layernorm"), lora())


def test_other_architectures_and_heads(folders, caplog, tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50)),
        "mixtral": MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, num_local_experts=2, vocab_size=50, **size)),
        "bert": BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=1, **size)),
    }
    classes = {"bert": AutoModelForSequenceClassification}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        loaded = classes.get(name, AutoModelForCausalLM).from_pretrained(tmp_path / name, dtype=torch.float32)
        assert not said(caplog, loaded, lora())
        assert said(caplog, trained(loaded, "attn" if name != "bert" else "attention"), lora())
    reward = load_base_model(folders["one"], task="reward", dtype="float32")
    assert not said(caplog, reward, lora(task_type="SEQ_CLS"))
    assert said(caplog, trained(reward, "v_proj"), lora(task_type="SEQ_CLS"))


def test_both_trainers_say_so_and_a_saved_base_is_the_remedy(folders, caplog, chat_tokenizer, tmp_path):
    rows = Dataset.from_dict({"prompt": ["a fox"]})

    def ppo(model, **options):
        args = PPOConfig(str(tmp_path / "ppo"), **OPTIONS, max_completion_length=4)
        return PPOTrainer(
            model,
            lambda completions, **_: [0.0] * len(completions),
            args,
            rows,
            processing_class=chat_tokenizer,
            **options,
        )

    def reward(model, **options):
        args = BradleyTerryConfig(str(tmp_path / "reward"), **OPTIONS)
        return BradleyTerryTrainer(model, args, PAIRS, processing_class=chat_tokenizer, **options)

    def warned(make, model, **options):
        caplog.clear()
        make(model, **options)
        return any(WARNING in record.message for record in caplog.records)

    assert warned(ppo, trained(load(folders["one"]), "q_proj"), peft_config=lora())
    assert warned(ppo, get_peft_model(trained(load(folders["one"]), "q_proj"), lora()))
    assert not warned(ppo, load(folders["one"]), peft_config=lora())
    assert not warned(ppo, folders["one"], peft_config=lora())
    changed = trained(load(folders["one"]), "q_proj")
    changed.save_pretrained(tmp_path / "saved")
    assert not warned(ppo, load(str(tmp_path / "saved")), peft_config=lora())
    base = load_base_model(folders["one"], task="reward", dtype="float32")
    assert not warned(reward, base, peft_config=lora(task_type="SEQ_CLS"))
    base = trained(load_base_model(folders["one"], task="reward", dtype="float32"), "q_proj")
    assert warned(reward, base, peft_config=lora(task_type="SEQ_CLS"))


def test_the_check_takes_no_noticeable_time(stories_path, caplog):
    model = load(str(stories_path))
    started = time.perf_counter()
    assert not said(caplog, model, lora())
    assert time.perf_counter() - started < 2.0
