"""Checkpoints that go to the Hub while a model trains: whatever fails there is one line, and training goes on."""

import json

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_rlhf_ext import load_base_model
from hf_rlhf_ext.hub.push import push_run
from hf_rlhf_ext.hub.trainer import HubMixin


class PushingTrainer(HubMixin, Trainer):
    pass


@pytest.fixture
def make_trainer(hub, tiny_llama, tmp_path):
    """A trainer of an adapter that saves and pushes at each of two steps."""
    tiny_llama.save_pretrained(tmp_path / "base")
    HfApi().create_repo("alice/base")
    HfApi().upload_folder(repo_id="alice/base", folder_path=tmp_path / "base")

    def make(**options):
        args = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            report_to=[],
            max_steps=2,
            save_steps=1,
            push_to_hub=True,
            hub_always_push=True,
            hub_model_id="alice/run",
            **options,
        )
        model = get_peft_model(load_base_model("alice/base", dtype="float32"), LoraConfig(target_modules=["q_proj"]))
        row = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
        return PushingTrainer(model, args, train_dataset=Dataset.from_list([row] * 8))

    return make


def warnings(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]


def test_weights_of_a_checkpoint_come_without_the_last_run_s_card(hub, make_trainer, tmp_path, capsys):
    folder = tmp_path / "last"
    get_peft_model(load_base_model("alice/base"), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    card = {"kind": "policy", "base_model": "alice/base"}
    (folder / "report.json").write_text(json.dumps({"ppo": {"kl": 3.0}, "versions": {}, "card": card}))
    push_run(folder, "alice/run")
    assert {"README.md", "report.json"} <= set(hub.files("alice/run"))
    trainer = make_trainer(save_strategy="steps")
    trainer.train()
    trainer._finish_current_push()
    titles = [commit.title for commit in hub.repo("alice/run").history()]
    assert titles[:2] == ["Training in progress, step 2", "Training in progress, step 1"]
    assert set(hub.files("alice/run")) == {
        ".gitattributes",
        ".hf_rlhf_ext.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert warnings(capsys) == [] and not (tmp_path / "run" / ".push").exists()


def test_a_disk_that_is_full_or_anything_else_costs_a_line(hub, make_trainer, tmp_path, capsys, naps, monkeypatch):
    trainer = make_trainer(save_strategy="no")
    trainer._push_from_checkpoint(str(tmp_path / "gone"))
    (line,) = warnings(capsys)
    assert line.startswith("warning: step 0: not pushed: FileNotFoundError: ") and line.endswith("Training goes on.")
    (tmp_path / "checkpoint-1").mkdir()
    torch.save({}, tmp_path / "checkpoint-1" / "optimizer.pt")
    (tmp_path / "checkpoint-1" / "adapter_config.json").write_text("{")
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    trainer._finish_current_push()
    (line,) = warnings(capsys)
    assert "adapter_config.json is no JSON" in line and line.endswith("Training goes on.")
