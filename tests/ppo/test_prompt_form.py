"""A policy that was trained on text or messages, and prompts of the other form."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig

from hf_rlhf_ext import PPOConfig, PPOTrainer, load_policy
from hf_rlhf_ext.data.prompt_form import PromptForm, form_of_model, template_digest
from hf_rlhf_ext.hub.sft import PublishingSFTTrainer
from hf_rlhf_ext.ppo.prompts import warn_of_other_form

ASKED = [{"role": "user", "content": "a sunny day"}]
TEXT = Dataset.from_list([{"prompt": "a sunny day"}] * 4)
MESSAGES = Dataset.from_list([{"prompt": ASKED}] * 4)
TOLD = {"text": "the policy was trained on text", "messages": "the policy was trained on messages"}


def lengths(completions, **columns):
    return [float(len(str(completion))) + k for k, completion in enumerate(completions)]


@pytest.fixture
def base(tiny_llama, chat_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def lora():
    return LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def options(folder):
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "activation_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
    }


def ppo(model, folder, prompts, *, peft_config=None, tokenizer=None):
    args = PPOConfig(**options(folder), num_ppo_epochs=1, max_completion_length=4)
    return PPOTrainer(model, lengths, args, prompts, processing_class=tokenizer, peft_config=peft_config)


def told(caplog):
    return [record.getMessage() for record in caplog.records if "the policy was trained on" in record.getMessage()]


@pytest.mark.slow
def test_an_sft_policy_records_its_form_and_ppo_says_that_prompts_have_another(base, tmp_path, caplog, chat_tokenizer):
    rows = [{"prompt": ASKED, "completion": [{"role": "assistant", "content": "So it is."}]}] * 4
    args = SFTConfig(**options(tmp_path / "sft"))
    sft = PublishingSFTTrainer(str(base), args, train_dataset=Dataset.from_list(rows), peft_config=lora())
    sft.train()
    sft.save_model()
    on_messages = PromptForm("messages", template_digest(chat_tokenizer))
    assert PromptForm.load(tmp_path / "sft") == on_messages

    # From its folder, loaded, and in memory.
    ppo(str(tmp_path / "sft"), tmp_path / "ppo", MESSAGES)
    assert told(caplog) == []
    policy, tokenizer = load_policy(tmp_path / "sft", is_trainable=True, dtype="float32")
    assert form_of_model(policy) == form_of_model(sft.model) == on_messages
    for model in (str(tmp_path / "sft"), policy, sft.model):
        caplog.clear()
        trainer = ppo(model, tmp_path / "ppo", TEXT, tokenizer=chat_tokenizer)
        (line,) = told(caplog)
        assert "train_dataset" in line and "as_user_turns" in line and "--columns" in line
        assert trainer.experience.prompts.first == chat_tokenizer("a sunny day")["input_ids"]  # as it was given

    trainer.train()
    trainer.save_model()
    assert PromptForm.load(tmp_path / "ppo").prompt_form == "mixed"
    caplog.clear()
    ppo(str(tmp_path / "ppo"), tmp_path / "ppo2", TEXT)
    assert told(caplog) == []  # it was trained on both


@pytest.mark.parametrize("form, prompts, n_lines", [("text", MESSAGES, 1), ("text", TEXT, 0), (None, MESSAGES, 0)])
def test_a_whole_policy_of_text_and_a_new_adapter(base, tmp_path, caplog, form, prompts, n_lines):
    PromptForm(form).save(base)
    trainer = ppo(str(base), tmp_path / "ppo", prompts, peft_config=lora())
    assert len(told(caplog)) == n_lines
    assert trainer.prompt_form.prompt_form == {1: "mixed", 0: form or "messages"}[n_lines]


def test_one_line_for_all_data_sets(caplog, chat_tokenizer):
    sets = {"train_dataset": MESSAGES, "eval_dataset 'a'": TEXT, "eval_dataset 'b'": TEXT}
    form = PromptForm("messages", template_digest(chat_tokenizer))
    warn_of_other_form(form, chat_tokenizer, sets)
    (line,) = told(caplog)
    assert line.startswith("eval_dataset 'a'")


def test_another_template_than_that_of_the_policy_is_said(caplog, chat_tokenizer):
    form = PromptForm("messages", template_digest(chat_tokenizer))
    warn_of_other_form(form, chat_tokenizer, {"train_dataset": MESSAGES})
    assert not caplog.records
    chat_tokenizer.chat_template += " "
    warn_of_other_form(form, chat_tokenizer, {"train_dataset": MESSAGES, "eval_dataset": MESSAGES})
    assert "another chat template" in caplog.text and len(caplog.records) == 1
