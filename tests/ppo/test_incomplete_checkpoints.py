"""A checkpoint of PPO that lacks a part is passed over, or refused in one line if it is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rlhf_ext.checkpointing import broken_file, last_complete_checkpoint
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.trainer import PPOTrainer

ADAPTER = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def make(chat_tokenizer_factory, tmp_path_factory):
    """Makes trainers of two steps with a checkpoint after each, with `critic` and `peft_config`."""
    tokenizer = chat_tokenizer_factory()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    options = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "max_steps": 2}
    options |= {"per_device_train_batch_size": 2, "num_ppo_epochs": 1, "max_completion_length": 3, "save_steps": 1}
    options |= {"disable_tqdm": True, "save_strategy": "steps"}
    data = Dataset.from_list([{"prompt": "fox"}, {"prompt": "day"}])

    def make(critic, peft_config, width=16):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(sizes | {"intermediate_size": width})))
        args = PPOConfig(str(tmp_path_factory.mktemp("run")), critic=critic, **options)
        rewards = [lambda completions, **_: [1.0] * len(completions)]
        return PPOTrainer(model, rewards, args, data, processing_class=tokenizer, peft_config=peft_config)

    return make


@pytest.fixture(scope="module")
def runs(make):
    folders = {}
    for name, critic, config in (("adapter", "adapter", ADAPTER), ("whole", "head", None), ("model", "model", None)):
        trainer = make(critic, config)
        trainer.train()
        folders[name] = Path(trainer.args.output_dir)
    return folders


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "run, lost, named",
    [
        ("adapter", "value", "value/value_head.safetensors"),
        ("adapter", "value/value_head.safetensors", "value/value_head.safetensors"),
        ("adapter", "value/adapter_config.json", "value/adapter_config.json"),
        ("adapter", "value/adapter_model.safetensors", "value/adapter_model.safetensors"),
        ("whole", "value_head.safetensors", "value_head.safetensors"),
        ("whole", "config.json", "config.json"),
        ("whole", "model.safetensors", "model.safetensors"),
        ("model", "value", "value/value_head.safetensors"),
        ("model", "value/model.safetensors", "value/model.safetensors"),
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_passed_over(runs, tmp_path, run, lost, named):
    folder = Path(shutil.copytree(runs[run], tmp_path / "run"))
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
    remove(folder / "checkpoint-2" / lost)
    assert broken_file(folder / "checkpoint-2") == named
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-1")


@pytest.mark.parametrize("name", ["ppo_state.json", "adapter_config.json", "value/adapter_config.json"])
def test_a_record_that_is_cut_off_is_no_complete_checkpoint(runs, tmp_path, name):
    checkpoint = Path(shutil.copytree(runs["adapter"] / "checkpoint-1", tmp_path / "checkpoint-1"))
    text = (checkpoint / name).read_text()
    (checkpoint / name).write_text(text[: len(text) // 2])
    assert broken_file(checkpoint) == name


def test_a_named_one_is_refused(make, runs, tmp_path):
    checkpoint = Path(shutil.copytree(runs["adapter"] / "checkpoint-1", tmp_path / "checkpoint-1"))
    shutil.rmtree(checkpoint / "value")
    with pytest.raises(UserError, match="is incomplete .value/value_head.safetensors is missing") as error:
        make("adapter", ADAPTER).train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "lost, named", [("ref", "ref/config.json"), ("ref/model.safetensors", "ref/model.safetensors")]
)
def test_an_older_checkpoint_has_the_reference_inside(runs, tmp_path, lost, named):
    checkpoint = Path(shutil.copytree(runs["whole"] / "checkpoint-1", tmp_path / "checkpoint-1"))
    (reference,) = (runs["whole"] / "ppo_reference").iterdir()
    shutil.copytree(reference, checkpoint / "ref")
    state = json.loads((checkpoint / "ppo_state.json").read_text())
    del state["reference"]
    state["files"].append("ref/config.json")
    (checkpoint / "ppo_state.json").write_text(json.dumps(state))
    assert broken_file(checkpoint) is None
    remove(checkpoint / lost)
    assert broken_file(checkpoint) == named


def test_an_older_checkpoint_does_not_list_its_files(runs, tmp_path):
    checkpoint = Path(shutil.copytree(runs["whole"] / "checkpoint-1", tmp_path / "checkpoint-1"))
    state = json.loads((checkpoint / "ppo_state.json").read_text())
    del state["files"]
    (checkpoint / "ppo_state.json").write_text(json.dumps(state))
    assert broken_file(checkpoint) is None
    remove(checkpoint / "value_head.safetensors")
    assert broken_file(checkpoint) == "value_head.safetensors"


def test_a_whole_model_of_another_width_is_refused(make, runs):
    with pytest.raises(UserError, match="is of another model: the weight .*mlp"):
        make("head", None, width=24).train(resume_from_checkpoint=str(runs["whole"] / "checkpoint-1"))
