"""What a reward model resumes with is all that was trained, on the base that it was trained on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
)

from hf_rlhf_ext.checkpointing import broken_file, last_complete_checkpoint
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer

ADAPTER = LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
TEXTS = (["day 1", "day 2"], [" happy", " sad!"])


@pytest.fixture(scope="module")
def tokenizer(chat_tokenizer_factory):
    return chat_tokenizer_factory()


@pytest.fixture(scope="module")
def sizes(tokenizer):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return sizes | {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": tokenizer.pad_token_id}


@pytest.fixture(scope="module")
def base(sizes, tokenizer, tmp_path_factory):
    """The folder of a base, a reward model whose head is not trained yet."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make(sizes, tokenizer, tmp_path_factory):
    """Makes trainers of four steps with a checkpoint after two; every model starts with the same weights."""
    rows = [{"prompt": f"day {k}", "chosen": " happy" + "!" * (k % 3), "rejected": " sad"} for k in range(8)]
    defaults = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "seed": 3}
    defaults |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": True, "layout": "plain"}
    defaults |= {"save_strategy": "steps", "save_steps": 2, "normalize_rewards": False, "max_steps": 4}

    def make(model=None, peft=None, folder=None, **options):
        torch.manual_seed(0)
        if model is None:
            model = LlamaForSequenceClassification(LlamaConfig(**sizes))
        folder = folder or tmp_path_factory.mktemp("run")
        args = BradleyTerryConfig(output_dir=str(folder), **(defaults | options))
        data = Dataset.from_list(rows)
        return BradleyTerryTrainer(model, args, data, processing_class=tokenizer, peft_config=peft)

    return make


def mixtral(sizes):
    torch.manual_seed(0)
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2, output_router_logits=False)
    return MixtralForSequenceClassification(config)


@pytest.fixture(scope="module")
def whole(make):
    """A run that trains the whole model."""
    trainer = make()
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def with_adapter(make):
    """A run that trains an adapter."""
    trainer = make(peft=ADAPTER)
    trainer.train()
    return trainer


def copied(trainer, tmp_path):
    """A copy of the checkpoint at step 2, beside a folder of the run."""
    return Path(shutil.copytree(Path(trainer.args.output_dir) / "checkpoint-2", tmp_path / "checkpoint-2"))


def drop(checkpoint, part, name="model.safetensors"):
    weights = load_file(checkpoint / name)
    kept = {key: value for key, value in weights.items() if part not in key}
    assert len(kept) < len(weights)
    save_file(kept, checkpoint / name, metadata={"format": "pt"})


def split(checkpoint):
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="8KB")
    assert (checkpoint / "model.safetensors.index.json").is_file()


def split_without_layer(checkpoint):
    split(checkpoint)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    for key in [key for key in index["weight_map"] if "layers.1.mlp" in key]:
        file = index["weight_map"].pop(key)
        drop(checkpoint, key, file)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


def as_pickle(checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()


def same_weights(one, other):
    expected = one.model.state_dict()
    return all(torch.equal(value, expected[name]) for name, value in other.model.state_dict().items())


@pytest.mark.parametrize(
    "damage, fragment",
    [
        (lambda checkpoint: drop(checkpoint, "score"), "is incomplete .the score head is missing"),
        (lambda checkpoint: drop(checkpoint, "layers.1.mlp"), "lacks 'model.layers.1.mlp.*the folder is not complete"),
        (split_without_layer, "lacks 'model.layers.1.mlp.*the folder is not complete"),
        (lambda checkpoint: (checkpoint / "config.json").unlink(), "is incomplete .config.json is missing"),
        (lambda checkpoint: (checkpoint / "model.safetensors").unlink(), "is incomplete .model.safetensors is missing"),
    ],
    ids=["no head", "no layer", "no layer in several files", "no config", "no weights"],
)
def test_a_whole_model_does_not_go_on_without_some_of_its_weights(make, whole, tmp_path, damage, fragment):
    checkpoint = copied(whole, tmp_path)
    damage(checkpoint)
    with pytest.raises(UserError, match=fragment) as error:
        make().train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rewrite", [lambda checkpoint: None, split, as_pickle], ids=["one file", "several", ".bin"])
def test_a_whole_model_goes_on_from_any_kind_of_file(make, whole, tmp_path, rewrite):
    checkpoint = copied(whole, tmp_path)
    rewrite(checkpoint)
    again = make()
    again.train(resume_from_checkpoint=str(checkpoint))
    assert same_weights(whole, again)


def test_a_model_whose_weights_are_saved_under_other_names_goes_on(make, sizes):
    """Mixtral: the experts of a layer are one weight in memory and several in the file."""
    straight = make(mixtral(sizes))
    straight.train()
    again = make(mixtral(sizes))
    again.train(resume_from_checkpoint=straight.args.output_dir + "/checkpoint-2")
    assert same_weights(straight, again)


@pytest.mark.parametrize(
    "config",
    [
        ADAPTER,
        LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3], task_type="SEQ_CLS"),
        PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
        PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="SEQ_CLS"),
    ],
    ids=["LoRA", "LoRA with tokens", "prompt tuning", "P-tuning"],
)
def test_every_weight_of_an_adapter_goes_on(make, config):
    straight = make(peft=config)
    straight.train()
    again = make(peft=config)
    again.train(resume_from_checkpoint=straight.args.output_dir + "/checkpoint-2")
    assert same_weights(straight, again)


def test_an_adapter_without_its_head_is_passed_over_and_refused(make, with_adapter, tmp_path):
    run = Path(shutil.copytree(with_adapter.args.output_dir, tmp_path / "run"))
    drop(run / "checkpoint-4", "score", "adapter_model.safetensors")
    assert broken_file(run / "checkpoint-4") == "the score head"
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")
    with pytest.raises(UserError, match="is incomplete .the score head is missing"):
        make(peft=ADAPTER).train(resume_from_checkpoint=str(run / "checkpoint-4"))


# ---- The base ----


def test_an_adapter_does_not_go_on_on_another_base(make, sizes, with_adapter):
    checkpoint = with_adapter.args.output_dir + "/checkpoint-2"
    torch.manual_seed(1)
    other = LlamaForSequenceClassification(LlamaConfig(**sizes))
    with pytest.raises(UserError, match="trained on another base .*has other values.*start without") as error:
        make(other, ADAPTER).train(resume_from_checkpoint=checkpoint)
    assert "\n" not in str(error.value)


def test_an_adapter_does_not_go_on_on_a_base_that_is_quantized_otherwise(make, base, with_adapter):
    pytest.importorskip("bitsandbytes")
    quantized = AutoModelForSequenceClassification.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["score"])
    )
    again = make(quantized, ADAPTER)
    with pytest.raises(UserError, match="base with no quantization, here 4-bit FP4.*load the model as in that run"):
        again.train(resume_from_checkpoint=with_adapter.args.output_dir + "/checkpoint-2")


def test_a_quantized_model_is_not_trained_as_a_whole(make, base):
    pytest.importorskip("bitsandbytes")
    quantized = AutoModelForSequenceClassification.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["score"])
    )
    with pytest.raises(UserError, match="^model: its weights are quantized .8-bit.*pass peft_config"):
        make(quantized)


# ---- A saved adapter is trained further ----


@pytest.mark.parametrize("kind", [str, Path])
def test_the_path_of_a_reward_adapter_is_trained_further(make, base, tokenizer, tmp_path, kind):
    first = make(kind(base), ADAPTER)
    first.train()
    first.save_model(tmp_path / "first")
    saved = RewardScorer.from_pretrained(tmp_path / "first").raw(*TEXTS)

    again = make(kind(tmp_path / "first"))
    assert RewardScorer(again.model, tokenizer).raw(*TEXTS) == saved
    trained = [name for name, parameter in first.model.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in again.model.named_parameters() if parameter.requires_grad] == trained
    again.train()
    again.save_model(tmp_path / "second")
    scores = RewardScorer.from_pretrained(tmp_path / "second").raw(*TEXTS)
    assert scores == RewardScorer(again.model, tokenizer).raw(*TEXTS)
    assert scores != saved

    with pytest.raises(UserError, match="peft_config was given, but the model already has an adapter"):
        make(kind(tmp_path / "first"), ADAPTER)


def test_the_adapter_of_a_policy_is_no_reward_model(make, base, tmp_path):
    LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=str(base)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="^model: .* is the adapter of a policy.*peft_config, or merge it"):
        make(str(tmp_path))
