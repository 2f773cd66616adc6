"""Text in messages, as a string or as a list of parts: each chat template gets the form that it reads."""

from pathlib import Path

import pytest
import trl
from datasets import Dataset
from transformers import LlamaForSequenceClassification

from hf_rlhf_ext.data.text import (
    Unrenderable,
    completion_text,
    plain_text,
    render_generation_prompt,
    text_key,
)
from hf_rlhf_ext.data.tokenization import tokenize_comparisons
from hf_rlhf_ext.data.trl_rows import read_comparisons
from hf_rlhf_ext.reward.scorer import RewardScorer

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))

FORMS = {
    "text": lambda text: text,
    "one part": lambda text: [{"type": "text", "text": text}],
    "two parts": lambda text: [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}],
    "a part without a type": lambda text: [{"text": text}],
}


def conversation(form, *turns):
    return [{"role": role, "content": FORMS[form](text)} for role, text in turns]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_every_template_renders_the_text_of_every_form(chat_tokenizer, path):
    chat_tokenizer.bos_token = "<|pad|>"
    chat_tokenizer.chat_template = path.read_text()
    first, again = ("user", "Qa"), ("user", "Qc")
    answer = ("assistant", "Qb")
    for form in FORMS:
        for turns in ([first], [first, answer, again], [first, answer]):
            rendered = render_generation_prompt(chat_tokenizer, conversation(form, *turns))
            assert rendered == render_generation_prompt(chat_tokenizer, conversation("text", *turns))
            assert all(text in rendered for _, text in turns)
            assert "'text'" not in rendered and "'type'" not in rendered
        text = completion_text(chat_tokenizer, conversation(form, first), conversation(form, answer))
        assert "Qb" in text and "Qa" not in text


@pytest.mark.parametrize("name", ["lfm2", "qwen2_5", "qwen3", "nemotron_3_nano", "llava_next", "gemma4_v2"])
def test_a_system_message_in_parts_is_rendered(chat_tokenizer, name):
    chat_tokenizer.chat_template = TEMPLATES[0].with_name(f"{name}.jinja").read_text()
    for form in FORMS:
        rendered = render_generation_prompt(chat_tokenizer, conversation(form, ("system", "Be kind"), ("user", "Qa")))
        assert "Be kind" in rendered and "Qa" in rendered


def test_forms_of_one_conversation_may_differ(chat_tokenizer):
    chat_tokenizer.chat_template = TEMPLATES[0].with_name("qwen3.jinja").read_text()
    mixed = conversation("text", ("user", "Qa")) + conversation("one part", ("assistant", "Qb"), ("user", "Qc"))
    plain = conversation("text", ("user", "Qa"), ("assistant", "Qb"), ("user", "Qc"))
    assert render_generation_prompt(chat_tokenizer, mixed) == render_generation_prompt(chat_tokenizer, plain)


@pytest.mark.parametrize("form", FORMS)
def test_a_message_that_the_template_leaves_out_is_refused(chat_tokenizer, form):
    chat_tokenizer.chat_template = TEMPLATES[0].with_name("phi3.jinja").read_text()
    turns = [("user", "Which day?"), ("tool", "Monday"), ("user", "And now?")]
    with pytest.raises(Unrenderable, match="does not render the text of a message of role 'tool'"):
        render_generation_prompt(chat_tokenizer, conversation(form, *turns))


def test_the_reason_of_a_template_that_refuses_a_role_is_kept(chat_tokenizer):
    chat_tokenizer.chat_template = TEMPLATES[0].with_name("gemma.jinja").read_text()
    for form in FORMS:
        with pytest.raises(Unrenderable, match="System role not supported"):
            render_generation_prompt(chat_tokenizer, conversation(form, ("system", "Be kind"), ("user", "Qa")))


def test_a_thought_in_parts_is_found(chat_tokenizer):
    chat_tokenizer.chat_template = TEMPLATES[0].with_name("deepseek_r1_distill.jinja").read_text()
    prompt = conversation("text", ("user", "Qa"))
    answer = "<think>\nFirst\n</think>\n\nQb"
    texts = {completion_text(chat_tokenizer, prompt, conversation(f, ("assistant", answer))) for f in FORMS}
    assert len(texts) == 1 and "First" in texts.pop()


def test_the_text_that_a_person_reads_has_no_python_lists():
    turns = [("user", "Qa"), ("assistant", "Qb")]
    for form in FORMS:
        assert plain_text(conversation(form, *turns)) == "Qa\nQb"
    keys = {text_key(conversation(form, *turns)) for form in ("text", "one part", "two parts")}
    assert len(keys) == 1


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "idefics3"])
def test_scorer_and_reward_trainer_read_parts_as_text(chat_tokenizer, tiny_config, name):
    chat_tokenizer.chat_template = TEMPLATES[0].with_name(f"{name}.jinja").read_text()
    tiny_config.num_labels = 1
    scorer = RewardScorer(LlamaForSequenceClassification(tiny_config), chat_tokenizer)
    scores = {}
    for form in FORMS:
        prompts = [conversation(form, ("user", "question"))] * 2
        answers = [conversation(form, ("assistant", text)) for text in ("good", "bad")]
        scores[form] = scorer(prompts, answers)

        row = {"prompt": prompts[0], "chosen": answers[0], "rejected": answers[1]}
        dataset, report = read_comparisons(Dataset.from_list([row]), source="train")
        (tokens,) = tokenize_comparisons(dataset, chat_tokenizer, report=report, max_length=None, overflow="error")
        sequences = [tokens["prompt_ids"] + ids for ids in tokens["completion_ids"]]
        assert scorer.score_ids(sequences) == pytest.approx(scores[form], abs=1e-6)
    assert scores["text"][0] != scores["text"][1]
    for form in FORMS:
        assert scores[form] == pytest.approx(scores["text"], abs=1e-6)
