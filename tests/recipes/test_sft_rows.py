"""Rows of the SFT recipe: tools and arguments of the template reach TRL; rows at which TRL would stop are dropped."""

import json
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.readers.formats import load_demonstrations
from recipes.sft import rows_for_trl, trained_columns

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOOLS = [{"type": "function", "function": {"name": "move", "description": "Goes on."}}]
SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Go"}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


@pytest.fixture
def demonstrations(tmp_path):
    rows = [
        {"messages": [ASK, assistant("I go.")], "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [SYSTEM, ASK, assistant("I go.")]},
        {"messages": [ASK, assistant("I go.", reasoning_content="Hm.")], "tools": []},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_demonstrations(path)[0]


def rendered_by(chat_tokenizer, name):
    chat_tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return chat_tokenizer


def test_tools_and_arguments_of_the_template_are_trained_on(demonstrations, chat_tokenizer, capsys):
    rows = trained_columns(rows_for_trl(demonstrations, rendered_by(chat_tokenizer, "qwen3"), "text", source="demos"))
    assert set(rows.column_names) == {"prompt", "completion", "tools", "chat_template_kwargs"}
    assert [json.loads(row["tools"]) if row["tools"] else None for row in rows] == [TOOLS, None, None]
    assert list(rows["chat_template_kwargs"]) == [{"enable_thinking": False}, {}, {}]
    assert capsys.readouterr().out == ""


def test_rows_that_the_template_cannot_render_are_dropped_with_a_line(demonstrations, chat_tokenizer, capsys):
    tokenizer = rendered_by(chat_tokenizer, "gemma")
    rows = rows_for_trl(demonstrations, tokenizer, "text", source="demos")
    assert len(rows) == 1
    said = capsys.readouterr().out
    assert "demos: 1 of 3 rows kept" in said and "System role not supported" in said and "reasoning_content" in said
    with pytest.raises(UserError, match="0 of 2 rows kept.*no row is left") as refused:
        rows_for_trl(demonstrations.select([1, 2]), tokenizer, "text", source="demos")
    assert "\n" not in str(refused.value)


def test_texts_get_no_second_bos(chat_tokenizer):
    chat_tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = [("<s>", chat_tokenizer.bos_token_id)]
    texts = Dataset.from_dict({"text": ["<s>one", "two"], "id": [0, 1]})
    pairs = Dataset.from_dict({"prompt": ["<s>one", "two"], "completion": ["<s>", "b"]})
    assert list(rows_for_trl(texts, chat_tokenizer, "text", source="x")["text"]) == ["<s>one", "two"]  # it adds none
    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=bos)
    assert list(rows_for_trl(texts, chat_tokenizer, "text", source="x")["text"]) == ["one", "two"]
    changed = rows_for_trl(pairs, chat_tokenizer, "text", source="x")
    assert list(changed["prompt"]) == ["one", "two"] and list(changed["completion"]) == ["<s>", "b"]
