"""Pushes by trainers through their publisher: a failure prints one line, and training continues."""

import json

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from trl import SFTConfig

from hf_rlhf_ext import load_base_model
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.publisher import HubPublisher
from hf_rlhf_ext.hub.push import push_run
from hf_rlhf_ext.hub.sft import PublishingSFTTrainer
from hf_rlhf_ext.publishing import new_publisher, require_publisher


class PublishingTrainer(Trainer):
    """A trainer with a publisher, like those of the library. `rank` 1 makes it the second of two processes."""

    rank = 0

    def __init__(self, *args, **kwargs):
        self.publisher = new_publisher()
        super().__init__(*args, **kwargs)

    def is_world_process_zero(self):
        return self.rank == 0

    def init_hf_repo(self, token=None, private=None):
        self.hub_model_id = require_publisher(self.publisher).check_access(self, token=token, private=private)

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, private=None):
        publisher = require_publisher(self.publisher)
        return publisher.push_run(self, commit_message, token=token, revision=revision, private=private)

    def _push_from_checkpoint(self, checkpoint_folder):
        require_publisher(self.publisher).push_checkpoint(self, checkpoint_folder)

    def _finish_current_push(self):
        if self.publisher is not None:
            self.publisher.finish()


class SecondProcess(PublishingTrainer):
    rank = 1


@pytest.fixture
def make_trainer(hub, tiny_llama, chat_tokenizer, tmp_path):
    """Makes trainers for an adapter that can save and push at each of two steps."""
    tiny_llama.save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    HfApi().create_repo("alice/base")
    HfApi().upload_folder(repo_id="alice/base", folder_path=tmp_path / "base")

    def make(cls=PublishingTrainer, **options):
        defaults = {"push_to_hub": True, "hub_always_push": True, "hub_model_id": "alice/run", "save_strategy": "no"}
        args = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            report_to=[],
            max_steps=2,
            save_steps=1,
            disable_tqdm=True,
            **defaults | options,
        )
        model = get_peft_model(load_base_model("alice/base", dtype="float32"), LoraConfig(target_modules=["q_proj"]))
        row = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
        rows = Dataset.from_list([row] * 8)
        return cls(model, args, train_dataset=rows, processing_class=chat_tokenizer)

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
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert warnings(capsys) == [] and not (tmp_path / "run" / ".push").exists()


def test_a_disk_that_is_full_or_anything_else_costs_a_line(hub, make_trainer, tmp_path, capsys, naps, monkeypatch):
    trainer = make_trainer(save_strategy="no")
    trainer._push_from_checkpoint(str(tmp_path / "gone"))
    (line,) = warnings(capsys)
    assert line.startswith("warning: step 0: not pushed: FileNotFoundError: ") and line.endswith("Training continues.")
    (tmp_path / "checkpoint-1").mkdir()
    torch.save({}, tmp_path / "checkpoint-1" / "optimizer.pt")
    (tmp_path / "checkpoint-1" / "adapter_config.json").write_text("{")
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    trainer._finish_current_push()
    (line,) = warnings(capsys)
    assert "adapter_config.json is not valid JSON" in line and line.endswith("Training continues.")


def test_every_trainer_has_a_publisher_of_its_own(make_trainer):
    first, second = make_trainer(push_to_hub=False), make_trainer(push_to_hub=False)
    assert isinstance(first.publisher, HubPublisher) and first.publisher is not second.publisher


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_a_strategy_that_would_push_pickles_is_refused_before_training(hub, make_trainer, strategy):
    with pytest.raises(UserError, match=f"hub_strategy: {strategy} .*every_save or end"):
        make_trainer(hub_strategy=strategy)
    assert ("models", "alice/run") not in hub.repos


def test_the_repository_is_made_before_training_and_private_unless_it_is_asked_for(hub, make_trainer):
    trainer = make_trainer(hub_model_id="run")
    assert trainer.hub_model_id == "alice/run" and hub.repo("alice/run").private
    make_trainer(hub_model_id="alice/open", hub_private_repo=False)
    assert not hub.repo("alice/open").private
    assert make_trainer(hub_model_id=None).hub_model_id == "alice/run"  # the name of the output folder
    with pytest.raises(UserError, match="bob/run is not yours"):
        make_trainer(hub_model_id="bob/run")


def test_a_finished_run_is_pushed_with_a_card_and_without_pickles(hub, make_trainer, tmp_path, capsys):
    trainer = make_trainer()
    trainer.train()
    url = trainer.push_to_hub("Done")
    assert url.startswith(f"{hub.url}/alice/run/commit/") and f"Pushed: {url}" in capsys.readouterr().out
    files = hub.files("alice/run")
    assert {"README.md", "report.json", "adapter_model.safetensors"} <= set(files)
    assert not [name for name in files if name.endswith(".bin")] and (tmp_path / "run" / "training_args.bin").exists()
    report = json.loads(files["report.json"])
    assert (
        report["card"]["kind"] == "sft" and report["card"]["base_model"] == "alice/base"
    )  # the trainer has no card_kind
    assert report["card"]["base_dtype"] == "float32" and 'dtype="float32"' in files["README.md"].decode()
    assert hub.repo("alice/run").history()[0].title == "Done"
    (tmp_path / "run" / "report.json").write_text(json.dumps({"sft": {"eval_loss": 0.5}, "card": report["card"]}))
    trainer.push_to_hub(revision="a-recipe-s")  # the report of a recipe is not rewritten
    pushed = json.loads(hub.files("alice/run", revision="a-recipe-s")["report.json"])
    assert pushed["sft"] == {"eval_loss": 0.5}


def test_a_trainer_that_did_not_ask_for_it_makes_its_repository_at_the_push(hub, make_trainer):
    trainer = make_trainer(push_to_hub=False)
    assert trainer.hub_model_id is None and ("models", "alice/run") not in hub.repos
    trainer.push_to_hub(private=False)
    assert trainer.hub_model_id == "alice/run" and not hub.repo("alice/run").private


def test_only_the_first_process_asks_the_hub(hub, make_trainer, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    trainer = make_trainer(SecondProcess)
    asked = len(hub.requests)
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    trainer._finish_current_push()
    assert trainer.push_to_hub() is None and trainer.hub_model_id is None
    assert len(hub.requests) == asked and not (tmp_path / "run" / "report.json").exists()


def test_a_trainer_without_a_publisher_is_refused_in_one_line(make_trainer):
    trainer = make_trainer(push_to_hub=False)
    trainer.publisher = None
    with pytest.raises(UserError, match="push_to_hub: .*hf-rlhf push") as error:
        trainer.push_to_hub()
    assert "\n" not in str(error.value)
    trainer._finish_current_push()


def test_the_sft_trainer_publishes(hub, tiny_llama, chat_tokenizer, tmp_path):
    args = SFTConfig(str(tmp_path / "sft"), use_cpu=True, bf16=False, report_to=[], push_to_hub=True, max_steps=1)
    rows = Dataset.from_dict({"prompt": ["Tell me"] * 2, "completion": [" a sunny day"] * 2})
    trainer = PublishingSFTTrainer(tiny_llama, args=args, train_dataset=rows, processing_class=chat_tokenizer)
    assert trainer.card_kind == "sft" and trainer.hub_model_id == "alice/sft"
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("alice/sft")
    assert "model.safetensors" in files and json.loads(files["report.json"])["card"]["relation"] == "finetune"
