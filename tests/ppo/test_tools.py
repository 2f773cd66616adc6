"""PPO on prompts with tools, on templates that open a thought, and on prompts that a template refuses."""

import json
import logging
from pathlib import Path

import pytest
import trl
from datasets import Dataset

from hf_rlhf_ext.data.text import encode_generation_prompt, encode_prompt
from hf_rlhf_ext.errors import UserError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOOLS = [
    {"type": "function", "function": {"name": "move", "description": "Goes on.", "parameters": {"type": "object"}}}
]


def user(text):
    return {"role": "user", "content": text}


class Recorder:
    """A reward function that keeps what it was called with."""

    __name__ = "recorder"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, **columns):
        self.calls.append((prompts, completions, columns))
        return [float(len(completion[0]["content"])) for completion in completions]


@pytest.fixture
def template(chat_tokenizer):
    def use(name):
        chat_tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
        return chat_tokenizer

    return use


def test_tools_and_arguments_reach_the_prompt_and_the_reward_functions(make_trainer, template):
    tokenizer = template("qwen3")
    rows = [{"prompt": [user(f"Go {k}")], "tools": json.dumps(TOOLS)} for k in range(4)]
    rows += [{"prompt": [user("Stay")], "tools": None}]
    rows = [row | {"chat_template_kwargs": json.dumps({"enable_thinking": k % 2 == 0})} for k, row in enumerate(rows)]
    recorder = Recorder()
    trainer = make_trainer(train_dataset=Dataset.from_list(rows), reward_funcs=recorder, max_completion_length=4)
    texts = [tokenizer.decode(ids) for ids in trainer.experience.prompts.rows(range(5))[1]]
    assert ["Goes on." in text for text in texts] == [True] * 4 + [False]
    assert [text.endswith("<think>\n\n</think>\n\n") for text in texts] == [False, True, False, True, False]
    expected = tokenizer.apply_chat_template(
        rows[1]["prompt"], tools=TOOLS, enable_thinking=False, tokenize=False, add_generation_prompt=True
    )
    assert texts[1] == expected
    trainer.train()
    prompts, completions, columns = recorder.calls[0]
    assert len(columns["tools"]) == len(prompts) == len(completions)
    assert {"tools", "chat_template_kwargs"} <= set(columns)


def test_comparisons_serve_as_prompts(make_trainer):
    answers = [[{"role": "assistant", "content": text}] for text in ("a", "b")]
    row = {"prompt": [user("fox")], "completions": answers, "pairs": [[0, 1]], "targets": [1.0]}
    recorder = Recorder()
    make_trainer(train_dataset=Dataset.from_list([row] * 4), reward_funcs=recorder, max_completion_length=4).train()
    _, completions, columns = recorder.calls[0]
    assert len(completions[0]) == 1 and columns["targets"] == [[1.0]] * len(completions)


@pytest.mark.parametrize("name", ["qwen3_5_think", "deepseek_r1_distill"])
def test_a_policy_continues_the_opened_thought_and_its_answer_begins_with_it(make_trainer, template, name):
    tokenizer = template(name)
    data = Dataset.from_list([{"prompt": [user(text)]} for text in ("fox", "day", "garden")])
    recorder = Recorder()
    trainer = make_trainer(train_dataset=data, eval_dataset=data, reward_funcs=recorder, max_completion_length=4)
    _, prompt_ids = trainer.experience.prompts.rows([0])
    assert tokenizer.decode(prompt_ids[0]).endswith("<think>\n")
    assert prompt_ids[0] == encode_generation_prompt(tokenizer, data[0]["prompt"])
    assert len(prompt_ids[0]) > len(encode_prompt(tokenizer, data[0]["prompt"]))
    (row, *_) = trainer.sample_and_score(data)
    _, completions, columns = recorder.calls[0]
    assert completions[0][0]["content"] == "<think>\n" + row.completion
    assert not row.completion.startswith("<think>")  # the table shows what was generated


def test_prompts_that_the_template_refuses_are_dropped_with_a_warning(make_trainer, template, caplog):
    template("gemma")
    refused = [{"role": "system", "content": "Be brief."}, user("fox")]
    data = Dataset.from_list([{"prompt": [user("day")]}, {"prompt": refused}, {"prompt": [user("garden")]}])
    with caplog.at_level(logging.WARNING):
        options = {"reward_funcs": Recorder(), "max_completion_length": 4, "max_steps": 1}
        trainer = make_trainer(train_dataset=data, unrenderable="drop", **options)
    prompts = trainer.experience.prompts
    assert len(prompts) == 2
    assert [row["prompt"][0]["content"] for row in prompts.rows([0, 1])[0]] == ["day", "garden"]
    assert "train_dataset: 2 of 3 rows kept" in caplog.text and "System role not supported" in caplog.text
    trainer.train()
    with pytest.raises(UserError, match="no prompt is left.*chat template") as error:
        only = Dataset.from_list([{"prompt": refused}])
        make_trainer(train_dataset=only, reward_funcs=Recorder(), unrenderable="drop")
    assert "\n" not in str(error.value)


def test_a_row_that_the_template_refuses_is_named(make_trainer, template):
    template("gemma")
    refused = [{"role": "system", "content": "Be brief."}, user("fox")]
    fine = Dataset.from_list([{"prompt": [user("day")]}] * 4)
    data = Dataset.from_list([{"prompt": [user("day")]}, {"prompt": refused}])
    texts = Dataset.from_list([{"messages": [*refused, {"role": "assistant", "content": "I go."}]}])
    mistakes = {
        "train_dataset row 1": {"train_dataset": data},
        "eval_dataset row 1": {"train_dataset": fine, "eval_dataset": data},
        "eval_dataset 'hard' row 1": {"train_dataset": fine, "eval_dataset": {"easy": fine, "hard": data}},
        "ptx_dataset row 0": {"train_dataset": fine, "ptx_dataset": texts, "ptx_coef": 1.0},
    }
    for where, arguments in mistakes.items():
        with pytest.raises(UserError, match=f"^{where}: .*System role not supported.*unrenderable='drop'") as error:
            make_trainer(reward_funcs=Recorder(), **arguments)
        assert "\n" not in str(error.value)


def test_ptx_texts_with_tools_and_without_a_second_bos(make_trainer, template, caplog):
    tokenizer = template("qwen3")
    messages = [user("Go"), {"role": "assistant", "content": "I go."}]
    data = Dataset.from_list([{"messages": messages, "tools": json.dumps(TOOLS)}])
    from hf_rlhf_ext.ppo.ptx import encode_texts

    ((context, targets),) = encode_texts(data, tokenizer, 1000)
    whole = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    assert tokenizer.decode(context + targets) == whole.removesuffix("\n")
    template("gemma")
    system = [{"role": "system", "content": "x"}, *messages]
    with caplog.at_level(logging.WARNING):
        texts = encode_texts(Dataset.from_list([{"messages": system}, {"messages": messages}]), tokenizer, 1000)
    assert len(texts) == 1 and "System role not supported" in caplog.text
    with pytest.raises(UserError, match="no text is left"):
        encode_texts(Dataset.from_list([{"messages": system}]), tokenizer, 1000)
