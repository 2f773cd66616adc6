"""Resuming the training of a reward model: which checkpoints are passed over, and which are refused in one line."""

import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from hf_rlhf_ext.checkpointing import broken_file, last_complete_checkpoint
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.trainer import PPOTrainer
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer


@pytest.fixture(scope="module")
def workshop(chat_tokenizer_factory, tmp_path_factory):
    """Makes trainers on a tiny reward model that always has the same weights."""
    tokenizer = chat_tokenizer_factory()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    rows = [{"prompt": f"day {k}", "chosen": " happy" + "!" * (k % 3), "rejected": " sad"} for k in range(8)]
    defaults = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "seed": 3}
    defaults |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": True, "layout": "plain"}
    defaults |= {"save_strategy": "steps", "save_steps": 2, "normalize_rewards": False}
    adapter = {"r": 4, "target_modules": ["q_proj", "k_proj"], "task_type": "SEQ_CLS"}

    def make(max_steps, folder=None, *, peft=adapter, width=16, **options):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(LlamaConfig(**(sizes | {"intermediate_size": width})))
        folder = folder or tmp_path_factory.mktemp("run")
        args = BradleyTerryConfig(output_dir=str(folder), max_steps=max_steps, **(defaults | options))
        config = None if peft is None else LoraConfig(**(adapter | peft))
        return BradleyTerryTrainer(model, args, Dataset.from_list(rows), processing_class=tokenizer, peft_config=config)

    return make


@pytest.fixture(scope="module")
def finished(workshop):
    """A run of six steps, with checkpoints at 2, 4 and 6."""
    trainer = workshop(6)
    trainer.train()
    return trainer


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the folder of that run."""
    return Path(shutil.copytree(finished.args.output_dir, tmp_path / "run"))


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut_off, Path.unlink], ids=["cut off", "missing"])
@pytest.mark.parametrize("name", ["trainer_state.json", "adapter_model.safetensors", "optimizer.pt"])
def test_an_incomplete_checkpoint_is_passed_over_or_refused(workshop, finished, folder, name, damage):
    shutil.rmtree(folder / "checkpoint-6")
    damage(folder / "checkpoint-4" / name)
    again = workshop(6, folder)
    if damage is Path.unlink and name == "optimizer.pt":  # as with save_only_model=True, which is no damage
        with pytest.raises(UserError, match="checkpoint-4 has no optimizer.pt.*save_only_model") as error:
            again.train(resume_from_checkpoint=True)
        assert "\n" not in str(error.value)
        return
    with pytest.raises(UserError, match=f"checkpoint-4 is incomplete .{name} is missing or cut off") as error:
        again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert "\n" not in str(error.value)
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    expected = finished.model.state_dict()  # from step 2 as without a break
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.model.state_dict().items())


def test_a_complete_checkpoint_has_no_broken_file(folder):
    assert broken_file(folder / "checkpoint-2") is None
    cut_off(folder / "checkpoint-2" / "scheduler.pt")
    assert broken_file(folder / "checkpoint-2") == "scheduler.pt"


@pytest.mark.parametrize(
    "given, fragment",
    [(True, "no complete checkpoint in"), ("runs/nope/checkpoint-4", "no folder runs/nope/checkpoint-4")],
)
def test_nothing_to_resume_from(workshop, given, fragment):
    with pytest.raises(UserError, match=f"^resume_from_checkpoint: {fragment}") as error:
        workshop(2).train(resume_from_checkpoint=given)
    assert "\n" not in str(error.value)


def test_false_starts_from_the_beginning(workshop):
    assert workshop(2).train(resume_from_checkpoint=False).global_step == 2


@pytest.mark.parametrize(
    "changes, fragment",
    [
        ({"r": 8}, "has r=4, but peft_config has 8"),
        ({"lora_alpha": 32}, "has lora_alpha=8, but peft_config has 32"),
        ({"use_rslora": True}, "has use_rslora=False, but peft_config has True"),
        ({"target_modules": ["q_proj"]}, "checkpoint-2 has an adapter on .*k_proj, and the model has none there"),
        ({"target_modules": "all-linear"}, "the model has an adapter on .*, and .*checkpoint-2 has none there"),
    ],
)
def test_another_adapter_is_refused(workshop, folder, changes, fragment):
    with pytest.raises(UserError, match=f"^resume_from_checkpoint: .*{fragment}") as error:
        workshop(4, peft=changes).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert "\n" not in str(error.value)


def test_the_same_adapter_in_other_words_goes_on(workshop, folder):
    again = workshop(4, peft={"target_modules": r".*\.[qk]_proj", "lora_dropout": 0.1})
    assert again.train(resume_from_checkpoint=str(folder / "checkpoint-2")).global_step == 4


def test_an_adapter_and_a_whole_model_do_not_go_on_from_each_other(workshop, folder):
    whole = workshop(2, peft=None)
    whole.train()
    from_whole = str(Path(whole.args.output_dir) / "checkpoint-2")
    with pytest.raises(UserError, match="checkpoint of an adapter, but the whole model is trained"):
        whole.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    with pytest.raises(UserError, match="has no adapter, but the model has one: leave out peft_config"):
        workshop(4).train(resume_from_checkpoint=from_whole)
    with pytest.raises(UserError, match="is of another model: the weight .*mlp"):
        workshop(4, peft=None, width=24).train(resume_from_checkpoint=from_whole)
    assert workshop(4, peft=None).train(resume_from_checkpoint=from_whole).global_step == 4


def test_other_batch_sizes_go_on(workshop, folder):
    again = workshop(8, folder, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert again.train(resume_from_checkpoint=True).global_step == 8


def test_a_checkpoint_of_ppo_is_refused(workshop, tiny_config, chat_tokenizer, tmp_path):
    options = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "max_steps": 1}
    options |= {"per_device_train_batch_size": 2, "num_ppo_epochs": 1, "max_completion_length": 3, "critic": "head"}
    args = PPOConfig(str(tmp_path / "ppo"), save_strategy="steps", save_steps=1, disable_tqdm=True, **options)
    data = Dataset.from_list([{"prompt": "fox"}, {"prompt": "day"}])

    def ppo(**changes):
        torch.manual_seed(0)
        adapter = LoraConfig(**({"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | changes))
        reward = [lambda completions, **_: [1.0] * len(completions)]
        model = LlamaForCausalLM(tiny_config)
        return PPOTrainer(model, reward, args, data, processing_class=chat_tokenizer, peft_config=adapter)

    ppo().train()
    checkpoint = str(tmp_path / "ppo" / "checkpoint-1")
    with pytest.raises(UserError, match="checkpoint-1 was saved by PPOTrainer"):
        workshop(2).train(resume_from_checkpoint=checkpoint)
    # PPO compares the configurations in the same way.
    with pytest.raises(UserError, match="has lora_alpha=8, but peft_config has 16"):
        ppo(lora_alpha=16).train(resume_from_checkpoint=checkpoint)
