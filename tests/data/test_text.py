"""Tokens of prompts and completions: the ids that ordinary rows always had, BOS, and borders between texts."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.data.text import (
    decode_completion,
    encode_completion,
    encode_generation_prompt,
    encode_prompt,
    is_messages,
    puts_space_before_text,
    render_prompt,
    without_start,
)

CHAT_ML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The template of SmolLM2, which adds a system message.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def system(text):
    return {"role": "system", "content": text}


# --- ids of ordinary rows --------------------------------------------------------------------------------------------

words = st.lists(st.sampled_from([*"abc deE.,!\n0123é日😀<|>", "  ", "\n\n", "</s>", "day"]), max_size=20).map("".join)
turns = st.lists(words, max_size=2).map(
    lambda texts: [assistant(text) if k % 2 else user(text) for k, text in enumerate(texts)]
)


@pytest.mark.parametrize("template", [CHAT_ML, SMOLLM2])
@settings(max_examples=40, deadline=None)
@given(st.none() | words, turns, words, words)
def test_an_ordinary_answer_is_its_text_and_one_stop_token(chat_tokenizer_factory, template, before, talk, ask, answer):
    tokenizer = _cached(chat_tokenizer_factory, template)
    prompt = [user(ask)]
    if len(talk) % 2 == 0:
        prompt = [*talk, *prompt]
    if before is not None:
        prompt = [system(before), *prompt]
    # Independent of the library: the rendered prompt, then the text of the answer by itself.
    rendered = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    plain = tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else []
    assert encode_prompt(tokenizer, prompt) == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert encode_generation_prompt(tokenizer, prompt) == encode_prompt(tokenizer, prompt)
    assert encode_completion(tokenizer, prompt, [assistant(answer)]) == [*plain, tokenizer.eos_token_id]


_tokenizers = {}


def _cached(factory, template):
    if template not in _tokenizers:
        _tokenizers[template] = factory()
        _tokenizers[template].chat_template = template
    return _tokenizers[template]


SYSTEM = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
SYSTEM += [2, 198]
USER, ASSISTANT, END = [1, 4093, 198], [1, 520, 9531, 198], [2, 198]
# Written down with version 0.1.0 of the library.
RECORDED = [
    (
        [user("What is 2+2?")],
        [assistant("4")],
        [*SYSTEM, *USER, 1780, 314, 216, 34, 27, 34, 47, *END, *ASSISTANT],
        [36, 2],
    ),
    (
        [system("Be brief."), user("Name a blue thing.")],
        [assistant("The sky.")],
        [1, 9690, 198, 6077, 5453, 30, *END, *USER, 5820, 253, 4461, 2775, 30, *END, *ASSISTANT],
        [504, 6376, 30, 2],
    ),
    ([user("Spaces?")], [assistant("  two before, two after  ")], None, [216, 827, 1092, 28, 827, 990, 256, 2]),
    ([user("Stop token inside?")], [assistant("yes<|im_end|>")], None, [10407, 2]),
    ([user("Empty?")], [assistant("")], [*SYSTEM, *USER, 40661, 47, *END, *ASSISTANT], [2]),
    (
        [user("Umlaut")],
        [assistant("café naïve — \u00a0ok\n")],
        None,
        [83, 1939, 2756, 15486, 46494, 1841, 216, 15442, 2231, 198, 2],
    ),
    (
        [user("Several turns")],
        [assistant("First."), user("And then?"), assistant("Second.")],
        None,
        [5345, 30, *END, *USER, 3528, 965, 47, *END, *ASSISTANT, 12556, 30, 2],
    ),
    ("Once upon a time", " there was a fox.", [6403, 1980, 253, 655], [665, 436, 253, 16438, 30, 2]),
    ("Question: 2+2?\nAnswer:", "4", [17872, 42, 216, 34, 27, 34, 47, 198, 21350, 42], [36, 2]),
    ("Say hello\n", "hello", [36218, 33662, 198], [28120, 2]),
]


@pytest.mark.slow
def test_the_ids_of_the_quickstarts_model_are_those_of_version_0_1_0():
    from hf_rlhf_ext.modeling.loading import load_tokenizer

    tokenizer = load_tokenizer("embedded:smollm2-135m-instruct")
    for prompt, completion, prompt_ids, completion_ids in RECORDED:
        if prompt_ids is not None:
            assert encode_prompt(tokenizer, prompt) == prompt_ids
        assert encode_completion(tokenizer, prompt, completion) == completion_ids


# --- BOS -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bos_tokenizer(chat_tokenizer):
    """A tokenizer that puts BOS before every text."""
    from tokenizers.processors import TemplateProcessing

    chat_tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = [("<s>", chat_tokenizer.bos_token_id)]
    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=bos)
    chat_tokenizer.chat_template = "{{ bos_token }}" + CHAT_ML
    return chat_tokenizer


def test_text_that_begins_with_bos_gets_no_second_one(bos_tokenizer):
    rendered = bos_tokenizer.apply_chat_template([user("hi")], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<s>")
    as_text = encode_prompt(bos_tokenizer, rendered)
    assert as_text == encode_prompt(bos_tokenizer, [user("hi")])
    assert as_text.count(bos_tokenizer.bos_token_id) == 1
    assert encode_prompt(bos_tokenizer, "hi")[0] == bos_tokenizer.bos_token_id
    assert without_start(bos_tokenizer, rendered) == rendered.removeprefix("<s>")


def test_bos_that_the_tokenizer_does_not_add_is_kept(chat_tokenizer):
    chat_tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = chat_tokenizer.bos_token_id
    assert encode_prompt(chat_tokenizer, "<s><s>hi")[:2] == [bos, bos][:1] + encode_prompt(chat_tokenizer, "<s>hi")[1:2]
    assert encode_prompt(chat_tokenizer, "<s>hi")[0] == bos
    assert without_start(chat_tokenizer, "<s>hi") == "<s>hi"


# --- borders between texts -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece_tokenizer():
    """A tokenizer that puts a space before every text, as those of Llama 2 and T5 do."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = ["once upon a time there was a fox", "question answer: yes no maybe", "the quick brown fox, and there"]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no token over two words
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    learned.train_from_iterator(["▁" + text.replace(" ", "▁") for text in texts * 3], trainer)
    model = json.loads(learned.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(merge) for merge in model["merges"]]

    core = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", bos_token="<s>", pad_token="<unk>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return tokenizer


def test_which_tokenizers_put_a_space_before_text(sentencepiece_tokenizer, chat_tokenizer):
    assert puts_space_before_text(sentencepiece_tokenizer)
    assert not puts_space_before_text(chat_tokenizer)


@pytest.mark.parametrize(
    "prompt, completion",
    [
        ("once upon a time", " there was a fox"),
        ("question: yes?\n", "no"),
        ("answer:", " maybe, and no"),
        ("once upon a time there was a", " fox\n\nquick"),
        ([user("question")], [assistant("yes")]),
    ],
)
def test_a_completion_has_the_tokens_at_the_end_of_the_joined_text(sentencepiece_tokenizer, prompt, completion):
    tokenizer = sentencepiece_tokenizer
    prompt_ids = encode_prompt(tokenizer, prompt)
    ids = encode_completion(tokenizer, prompt, completion)
    if is_messages(prompt):
        joined = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        assert tokenizer(joined, add_special_tokens=False)["input_ids"][: len(prompt_ids)] == prompt_ids
        completion = joined.removeprefix(render_prompt(tokenizer, prompt)).removesuffix("</s>")
    joined_ids = tokenizer(render_prompt(tokenizer, prompt) + completion)["input_ids"]
    assert prompt_ids + ids == [*joined_ids, tokenizer.eos_token_id]
    if isinstance(prompt, str):
        assert decode_completion(tokenizer, ids, prompt_ids) == completion  # the space is not lost


pieces = st.text(st.sampled_from("afoxest yn ,:\n"), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(pieces, pieces)
def test_prompt_and_completion_decode_to_the_joined_text(sentencepiece_tokenizer, prompt, completion):
    tokenizer = sentencepiece_tokenizer
    prompt_ids = encode_prompt(tokenizer, prompt)
    ids = encode_completion(tokenizer, prompt, completion)
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(prompt_ids + ids[:-1]) == prompt + completion
    # What a policy wrote is scored as the tokens that it wrote.
    written = decode_completion(tokenizer, ids, prompt_ids)
    assert encode_completion(tokenizer, prompt, written) == ids
