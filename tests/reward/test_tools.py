"""Reward models on rows with tools, thoughts and arguments of the chat template."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from transformers import LlamaForSequenceClassification

from hf_rlhf_ext.data.text import encode_completion, encode_prompt
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.reward.ensemble import RewardEnsemble
from hf_rlhf_ext.reward.scorer import RewardScorer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOOLS = [
    {"type": "function", "function": {"name": "move", "description": "Goes on.", "parameters": {"type": "object"}}}
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def move(steps):
    call = {"type": "function", "function": {"name": "move", "arguments": {"steps": steps}}}
    return assistant("", tool_calls=[call])


@pytest.fixture
def rows():
    rows = []
    for k in range(8):
        row = {"prompt": [user(f"Go {k} steps.")], "chosen": [move(str(k))], "rejected": [move(k)]}
        rows.append(row | {"tools": json.dumps(TOOLS if k % 2 else [])})
    return rows


@pytest.fixture
def qwen3(chat_tokenizer):
    chat_tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text()
    return chat_tokenizer


def test_tools_reach_training_and_scores_are_those_of_training(make_trainer, qwen3, rows):
    data = Dataset.from_list(rows)
    trainer = make_trainer(data, eval_dataset=data, max_steps=1)
    assert trainer.data_reports["train"].kept == 8
    prompts = [qwen3.decode(ids) for ids in trainer.train_dataset["prompt_ids"]]
    assert ["Goes on." in prompt for prompt in prompts] == [bool(k % 2) for k in range(8)]
    answers = [qwen3.decode(ids) for ids in trainer.train_dataset[3]["completion_ids"]]
    assert '"steps": "3"' in answers[0] and '"steps": 3' in answers[1]

    trainer.train()
    trainer.evaluate()
    scorer = RewardScorer(trainer.model, qwen3)
    tools = [row["tools"] for row in rows]
    chosen = scorer.raw(data["prompt"], [row["chosen"] for row in rows], tools=tools)
    rejected = scorer.raw(data["prompt"], [row["rejected"] for row in rows], tools=[json.loads(t) for t in tools])
    assert trainer.judged.deltas.tolist() == pytest.approx(
        [a - b for a, b in zip(chosen, rejected, strict=True)], abs=1e-5
    )
    # As a reward function, with further columns of the data set. Without tools, the score is another one.
    prompts, answers = list(data["prompt"]), list(data["chosen"])
    assert scorer(prompts, answers, tools=tools, category=["x"] * 8) == pytest.approx(chosen)
    without = scorer.raw(prompts, answers)
    assert [a == pytest.approx(b, abs=1e-6) for a, b in zip(without, chosen, strict=True)] == [
        k % 2 == 0 for k in range(8)
    ]
    ensemble = RewardEnsemble([scorer, scorer])
    assert ensemble(prompts, answers, tools=tools) == pytest.approx(chosen)
    assert ensemble.raw(prompts, answers, tools=tools) == pytest.approx(chosen)
    assert "Goes on." in scorer.text(prompts[1], answers[1], tools=tools[1])


def test_arguments_of_the_template_reach_the_scorer(seqcls, qwen3):
    qwen3.chat_template = (
        "{% for m in messages %}[{{ m.role }}{% if mood is defined %} {{ mood }}{% endif %}]{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}[assistant{% if mood is defined %} {{ mood }}{% endif %}]{% endif %}"
    )
    scorer = RewardScorer(seqcls, qwen3)
    prompt, answer = [user("a")], [assistant("b")]
    kwargs = [{"mood": "happy"}, '{"mood": "happy"}', None, {"mood": None}]
    happy, as_text, plain, empty = scorer.raw([prompt] * 4, [answer] * 4, chat_template_kwargs=kwargs)
    assert happy == as_text != plain == empty
    ids = qwen3("[user happy]a<|im_end|>[assistant happy]b<|im_end|>")["input_ids"]
    assert scorer.score_ids([ids]) == pytest.approx([happy], abs=1e-6)
    with pytest.raises(UserError, match="tools: 1 entries for 2"):
        scorer.raw([prompt] * 2, [answer] * 2, tools=[None])


def test_rows_that_the_template_cannot_render_are_dropped_and_reported(make_trainer, seqcls, chat_tokenizer, caplog):
    chat_tokenizer.chat_template = (TEMPLATES / "gemma.jinja").read_text()
    good = {"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]}
    system = good | {"prompt": [{"role": "system", "content": "Be brief."}, user("2+2?")]}
    thought = good | {"chosen": [assistant("4", thinking="a")], "rejected": [assistant("4", thinking="b")]}
    with caplog.at_level(logging.WARNING):
        rows = Dataset.from_list([good, system, thought, good])
        trainer = make_trainer(rows, model=copy.deepcopy(seqcls), unrenderable="drop")
    report = trainer.data_reports["train"]
    assert (report.rows_in, report.kept) == (4, 2) and len(trainer.train_dataset) == 2
    reasons = {rows[0]: reason for reason, rows in report.dropped.items()}
    assert "System role not supported" in reasons[1] and "thinking" in reasons[2]
    assert "System role not supported" in caplog.text
    with pytest.raises(UserError, match="no row is left") as refused:
        make_trainer(Dataset.from_list([system, thought]), model=copy.deepcopy(seqcls), unrenderable="drop")
    assert "\n" not in str(refused.value)


def test_a_row_that_the_template_cannot_render_is_refused_with_its_number(make_trainer, seqcls, chat_tokenizer):
    chat_tokenizer.chat_template = (TEMPLATES / "gemma.jinja").read_text()
    good = {"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]}
    system = good | {"prompt": [{"role": "system", "content": "Be brief."}, user("2+2?")]}
    thought = good | {"chosen": [assistant("4", thinking="a")], "rejected": [assistant("4", thinking="b")]}
    fine = Dataset.from_list([good] * 4)
    for broken, reason in ((system, "System role not supported"), (thought, "thinking")):
        rows = Dataset.from_list([good, broken])
        sets = {"train": {"train": rows}, "eval": {"train": fine, "eval_dataset": rows}}
        sets["normalization"] = {"train": fine, "normalization_dataset": rows}
        for name, arguments in sets.items():
            with pytest.raises(UserError, match=f"^{name} row 1: .*{reason}.*unrenderable='drop'") as refused:
                make_trainer(model=copy.deepcopy(seqcls), **arguments)
            assert "\n" not in str(refused.value)


def test_normalization_demonstrations_keep_their_tools(make_trainer, qwen3, rows):
    demonstrations = [{"messages": [*row["prompt"], *row["chosen"]], "tools": row["tools"]} for row in rows]
    trainer = make_trainer(
        Dataset.from_list(rows), normalization_dataset=Dataset.from_list(demonstrations), max_steps=1
    )
    decoded = [qwen3.decode(row["prompt_ids"] + row["completion_ids"][0]) for row in trainer._normalization_rows]
    assert ["Goes on." in text for text in decoded] == [bool(k % 2) for k in range(8)]
    assert all(f'"steps": "{k}"' in text for k, text in enumerate(decoded))


def test_what_cannot_be_rendered_is_named_when_it_is_scored(seqcls, qwen3):
    scorer = RewardScorer(seqcls, qwen3)
    qwen3.chat_template = (TEMPLATES / "gemma.jinja").read_text()
    prompts = [[user("a")], [{"role": "system", "content": "x"}, user("a")]]
    with pytest.raises(UserError, match=r"^completions\[1\]: .*System role not supported") as refused:
        scorer(prompts, [[assistant("b")]] * 2)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["qwen3_5_think", "deepseek_r1_distill", "qwen3", "gptoss", "gemma", "llama3_1"])
def test_a_scored_conversation_has_the_tokens_of_the_template(tiny_config, chat_tokenizer, name):
    chat_tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    tiny_config.num_labels = 1
    torch.manual_seed(0)
    scorer = RewardScorer(LlamaForSequenceClassification(tiny_config), chat_tokenizer)
    prompt, answer = [user("2+2?")], [assistant(" 4 ")]
    whole = chat_tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
    assert (
        whole.rstrip()
        .removesuffix("<|im_end|>")
        .startswith(scorer.text(prompt, answer).removesuffix("<|im_end|>").rstrip())
    )
    ids = encode_prompt(chat_tokenizer, prompt) + encode_completion(chat_tokenizer, prompt, answer)
    assert chat_tokenizer.decode(ids) == scorer.text(prompt, answer)
