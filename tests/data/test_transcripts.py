"""Transcripts: texts that mark their turns are read and split at turns, whatever marks they have."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.data.schema import Unusable
from hf_rlhf_ext.data.transcripts import is_marked, read_marked, split_marked, style_of

# (before a question, after it and before the answer, after the answer)
MARKS = {
    "OASST": ("<|prompter|>", "<|endoftext|><|assistant|>", "<|endoftext|>"),
    "Zephyr": ("<|user|>\n", "</s>\n<|assistant|>\n", "</s>\n"),
    "Phi 3": ("<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>\n"),
    "ChatML": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"),
    "Llama 3": (
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "Gemma": ("<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"),
    "Llama 2": ("<s>[INST] ", " [/INST] ", " </s>"),
    "Guanaco": ("### Human: ", "### Assistant: ", ""),
    "Alpaca": ("### Instruction:\n", "\n\n### Response:\n", "\n\n"),
    "Vicuna": ("USER: ", " ASSISTANT: ", "</s>"),
    "names": ("User: ", "\nAssistant: ", "\n"),
}
WORDS = st.text("ab 1.é", min_size=1, max_size=8).filter(lambda text: text == text.strip())

FEW = settings(max_examples=25, deadline=None)


def rendered(name, talk):
    question_mark, answer_mark, end = MARKS[name]
    return "".join(f"{question_mark}{question}{answer_mark}{answer}{end}" for question, answer in talk)


@pytest.mark.parametrize("name", MARKS)
@FEW
@given(talk=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_the_turns_of_a_text_with_marks_are_read(name, talk):
    text = rendered(name, talk)
    expected = []
    for question, answer in talk:
        expected += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert read_marked(text, style_of(text)) == expected


@pytest.mark.parametrize("name", MARKS)
@FEW
@given(talk=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), other=WORDS)
def test_two_texts_are_split_after_the_mark_of_the_last_answer(name, talk, other):
    chosen = rendered(name, talk)
    rejected = rendered(name, [*talk[:-1], (talk[-1][0], other)])
    prompt, first, second, flags = split_marked(chosen, rejected)
    assert (prompt + first, prompt + second) == (chosen, rejected) and flags == []
    _, answer_mark, end = MARKS[name]
    assert prompt.endswith(answer_mark.rstrip(" "))
    assert (first.strip(), second.strip()) == ((talk[-1][1] + end).strip(), (other + end).strip())


@pytest.mark.parametrize("name", MARKS)
def test_answers_that_go_on_are_flagged_and_different_questions_share_no_prompt(name):
    chosen = rendered(name, [("q", "a"), ("more", "b")])
    rejected = rendered(name, [("q", "c"), ("more", "b")])
    prompt, first, _, flags = split_marked(chosen, rejected)
    assert flags == ["histories_differ"] and "more" in first and "more" not in prompt
    assert split_marked(rendered(name, [("q", "a")]), rendered(name, [("other", "a")]))[0] is None
    assert split_marked(rendered(name, [("q", "a")]), "plain")[0] is None


@pytest.mark.parametrize(
    "text",
    [
        "", "plain text", "a ### heading\n### Another", "<|assistant|>alone", "<|user|>no answer", "User: only",
        "The AI Assistant: a story\nUser: hi", "Before. <|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na",
    ],
)  # fmt: skip
def test_other_texts_are_no_transcripts(text):
    assert not is_marked(text) and style_of(text) is None


def test_system_texts_are_found():
    for text in (
        "<|im_start|>system\ns<|im_end|>\n" + rendered("ChatML", [("q", "a")]),
        "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nq [/INST] a </s>",
        "s " + rendered("Vicuna", [("q", "a")]),
        "s\n\n" + rendered("Alpaca", [("q", "a")]),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
        + rendered("Llama 3", [("q", "a")]),
    ):
        contents = [(turn["role"], turn["content"]) for turn in read_marked(text, style_of(text))]
        assert contents == [("system", "s"), ("user", "q"), ("assistant", "a")]


def test_an_unknown_speaker_in_a_template_is_named():
    text = rendered("ChatML", [("q", "a")]) + "<|im_start|>narrator\nx<|im_end|>"
    with pytest.raises(Unusable, match="'narrator'"):
        read_marked(text, style_of(text))
