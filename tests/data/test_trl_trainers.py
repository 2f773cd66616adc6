"""TRL's own trainers accept what the readers give, with tools, system messages and arguments of the template."""

import json
from pathlib import Path

import pytest
import torch
import trl
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from hf_rlhf_ext.readers.formats import load_comparisons, load_demonstrations

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOOLS = [
    {"type": "function", "function": {"name": "move", "description": "Goes on.", "parameters": {"type": "object"}}}
]
OPTIONS = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "save_strategy": "no"}
OPTIONS |= {"per_device_train_batch_size": 2, "activation_checkpointing": False, "disable_tqdm": True}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def move(steps):
    return assistant("", tool_calls=[{"type": "function", "function": {"name": "move", "arguments": {"steps": steps}}}])


@pytest.fixture
def qwen3(chat_tokenizer):
    chat_tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text()
    return chat_tokenizer


@pytest.fixture
def write(tmp_path):
    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return path

    return write


SYSTEM = {"role": "system", "content": "Be brief."}
PLAIN = {"prompt": [SYSTEM, user("Hi")], "chosen": [assistant("Hello.")], "rejected": [assistant("What do you want?")]}
CALLED = {"prompt": [user("Go")], "chosen": [move("1")], "rejected": [move(1)], "tools": TOOLS}
QUIET = PLAIN | {"prompt": [user("Think")], "chat_template_kwargs": {"enable_thinking": False}}
THOUGHT = PLAIN | {"prompt": [user("Why?")], "chosen": [assistant("So.", reasoning_content="Hm.")]}
ROWS = [PLAIN, CALLED, QUIET, THOUGHT]


def pairs(dataset):
    """Comparisons of two answers in TRL's columns."""
    names = [name for name in ("prompt", "tools", "chat_template_kwargs") if name in dataset.column_names]

    def pair(row):
        better, worse = row["pairs"][0]
        return {"chosen": row["completions"][better], "rejected": row["completions"][worse]}

    return dataset.map(pair).select_columns([*names, "chosen", "rejected"])


def test_sft_trains_on_demonstrations(write, qwen3, tiny_config, tmp_path):
    rows = []
    for row in ROWS:
        rows.append({"messages": [*row["prompt"], *row["chosen"]], **{k: v for k, v in row.items() if k not in PLAIN}})
    dataset, report = load_demonstrations(write(rows))
    assert report.kept == 4 and not report.flagged
    columns = ["prompt", "completion", "tools", "chat_template_kwargs"]
    trainer = SFTTrainer(
        LlamaForCausalLM(tiny_config),
        SFTConfig(str(tmp_path / "sft"), **OPTIONS),
        train_dataset=dataset.select_columns(columns),
        processing_class=qwen3,
    )
    texts = [qwen3.decode(ids) for ids in trainer.train_dataset["input_ids"]]
    for text, row in zip(texts, ROWS, strict=True):
        expected = qwen3.apply_chat_template([*row["prompt"], *row["chosen"]], tools=row.get("tools"), tokenize=False)
        assert text == expected
    assert trainer.train().training_loss > 0


@pytest.mark.parametrize("trainer_class", [RewardTrainer, DPOTrainer])
def test_pairs_of_comparisons(write, qwen3, tiny_config, tmp_path, trainer_class):
    dataset, report = load_comparisons(write(ROWS))
    assert report.kept == 4 and not report.flagged
    torch.manual_seed(0)
    arguments = {"train_dataset": pairs(dataset), "processing_class": qwen3}
    if trainer_class is RewardTrainer:
        tiny_config.num_labels = 1
        args = RewardConfig(str(tmp_path / "out"), **OPTIONS)
        trainer = RewardTrainer(LlamaForSequenceClassification(tiny_config), args=args, **arguments)
    else:
        args = DPOConfig(str(tmp_path / "out"), **OPTIONS)
        reference = LlamaForCausalLM(tiny_config)
        trainer = DPOTrainer(LlamaForCausalLM(tiny_config), reference, args=args, **arguments)
    column = "chosen_ids" if trainer_class is RewardTrainer else "prompt_ids"
    texts = [qwen3.decode(ids) for ids in trainer.train_dataset[column]]
    assert ["Goes on." in text for text in texts] == [False, True, False, False]
    assert "Be brief." in texts[0]
    chosen = [qwen3.decode(ids) for ids in trainer.train_dataset["chosen_ids"]]
    rejected = [qwen3.decode(ids) for ids in trainer.train_dataset["rejected_ids"]]
    assert '"steps": "1"' in chosen[1] and '"steps": 1' in rejected[1]
    assert "Hm." in chosen[3]
    assert trainer.train().training_loss > 0


def test_grpo_on_the_prompts(write, qwen3, tiny_config, tmp_path):
    dataset, _ = load_comparisons(write(ROWS))
    dataset = dataset.select_columns(["prompt", "tools"])  # TRL passes other columns to the reward function
    seen = []

    def length(prompts, completions, tools, **columns):
        seen.extend(tools)
        return [float(len(completion[0]["content"])) for completion in completions]

    args = GRPOConfig(
        str(tmp_path / "grpo"), **(OPTIONS | {"per_device_train_batch_size": 4}), num_generations=2,
        max_completion_length=4,
    )  # fmt: skip
    trainer = GRPOTrainer(
        LlamaForCausalLM(tiny_config), length, args=args, train_dataset=dataset, processing_class=qwen3
    )
    trainer.train()
    assert set(seen) <= {None, json.dumps(TOOLS)} and len(seen) == 4
