"""The record of the form that a model was trained on, and text prompts as messages."""

import json

import pytest
from datasets import Dataset

from hf_rlhf_ext.data.prompt_form import (
    PROMPT_FORM_FILE,
    PromptForm,
    example_of,
    form_of_model,
    remember_form,
    template_digest,
)
from hf_rlhf_ext.data.prompting import as_user_turns
from hf_rlhf_ext.errors import UserError

ASKED = [{"role": "user", "content": "Why?"}]


def test_the_record_survives_saving_and_an_older_folder_has_none(tmp_path, chat_tokenizer):
    assert PromptForm.load(tmp_path) == PromptForm(None, None)
    form = PromptForm.of(ASKED, chat_tokenizer)
    form.save(tmp_path)
    assert form.prompt_form == "messages" and form.chat_template_sha256 == template_digest(chat_tokenizer)
    assert PromptForm.load(tmp_path) == form

    content = json.loads((tmp_path / PROMPT_FORM_FILE).read_text())
    (tmp_path / PROMPT_FORM_FILE).write_text(json.dumps(content | {"of_a_later_version": 1}))
    assert PromptForm.load(tmp_path) == form


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_record_is_refused_with_its_path(tmp_path, content):
    (tmp_path / PROMPT_FORM_FILE).write_text(content)
    with pytest.raises(UserError, match=f"{PROMPT_FORM_FILE}.*remove it"):
        PromptForm.load(tmp_path)


def test_a_saved_tokenizer_has_the_same_template(tmp_path, chat_tokenizer):
    from transformers import AutoTokenizer

    chat_tokenizer.save_pretrained(tmp_path)
    form = PromptForm.of(ASKED, chat_tokenizer)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert not form.other_template(saved)
    saved.chat_template += "{# another #}"
    assert form.other_template(saved)
    assert not PromptForm().other_template(saved)


def test_a_tokenizer_without_a_template_has_no_digest(chat_tokenizer):
    chat_tokenizer.chat_template = None
    assert template_digest(chat_tokenizer) is None


@pytest.mark.parametrize(
    "prompt, form",
    [("Why?", "text"), ("", "text"), (ASKED, "messages"), (None, None), ("### Question:\nWhy?", "text")],
)
def test_the_form_of_data(prompt, form, chat_tokenizer):
    assert PromptForm.of(prompt, chat_tokenizer).prompt_form == form


def test_the_form_of_rendered_text_is_not_known(chat_tokenizer):
    rendered = chat_tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert PromptForm.of(rendered, chat_tokenizer).prompt_form is None


@pytest.mark.parametrize(
    "earlier, later, joined",
    [
        (None, "text", "text"),
        ("text", "text", "text"),
        ("text", "messages", "mixed"),
        ("messages", "text", "mixed"),
        ("mixed", "text", "mixed"),
        ("messages", None, None),
    ],
)
def test_two_trainings_one_after_the_other(earlier, later, joined):
    assert PromptForm(later).after(PromptForm(earlier)).prompt_form == joined
    assert PromptForm(later).after(None).prompt_form == later


@pytest.mark.parametrize(
    "row, form",
    [
        ({"messages": [*ASKED, {"role": "assistant", "content": "So."}]}, "messages"),
        ({"prompt": ASKED, "completion": [{"role": "assistant", "content": "So."}]}, "messages"),
        ({"prompt": "Why?", "completion": " So."}, "text"),
        ({"text": "Why? So."}, "text"),
        ({"input_ids": [1, 2], "prompt": "Why?"}, None),
    ],
)
def test_the_form_of_demonstrations(row, form, chat_tokenizer):
    for rows in (Dataset.from_list([row]), Dataset.from_list([row]).to_iterable_dataset()):
        assert PromptForm.of(example_of(rows), chat_tokenizer).prompt_form == form


def test_what_is_remembered_of_a_model_goes_before_its_folder(tmp_path, tiny_llama):
    assert form_of_model(tiny_llama) == PromptForm()
    tiny_llama.config.name_or_path = str(tmp_path)
    PromptForm("text").save(tmp_path)
    assert form_of_model(tiny_llama).prompt_form == "text"
    remember_form(tiny_llama, PromptForm("messages"))
    assert form_of_model(tiny_llama).prompt_form == "messages"


def test_text_becomes_one_turn_of_the_user_and_messages_stay():
    assert as_user_turns(["Why?", "", ASKED]) == [ASKED, [{"role": "user", "content": ""}], ASKED]


@pytest.mark.parametrize(
    "text",
    [
        "\n\nHuman: Why?\n\nAssistant:",
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    ],
)
def test_text_with_marked_turns_is_not_put_into_a_turn(text):
    assert as_user_turns([text]) == [ASKED]
