"""Chat templates as TRL ships them: a completion is what the template adds, and nothing is lost without a word."""

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import trl
from datasets import Dataset

from hf_rlhf_ext.data.schema import LoadReport, as_dataset
from hf_rlhf_ext.data.templates import template_columns, template_options, tools_text
from hf_rlhf_ext.data.text import (
    THOUGHT_FIELDS,
    Unrenderable,
    completion_text,
    encode_completion,
    encode_generation_prompt,
    encode_prompt,
    generation_opener,
    open_thought,
    render_generation_prompt,
    render_prompt,
)
from hf_rlhf_ext.data.tokenization import drop_unrenderable, tokenize_comparisons, tokenize_row
from hf_rlhf_ext.errors import UserError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
OF_VISION_MODELS = ("idefics3", "llava_next", "smolvlm")
"""Templates that render lists of parts, and no text."""
NAMES = sorted(
    path.stem
    for path in TEMPLATES.glob("*.jinja")
    if not path.stem.endswith("_training") and path.stem not in OF_VISION_MODELS
)
OPEN_A_THOUGHT = ("qwen3_5_think", "qwen3_6", "deepseek_r1_distill", "deepseekv3", "nemotron_3_nano")


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def system(text):
    return {"role": "system", "content": text}


def calling(value, name="look_up", **fields):
    function = {"name": name, "arguments": {"zip": value}}
    return assistant("", tool_calls=[{"type": "function", "id": "call12345", "function": function}], **fields)


TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Finds a place.",
        "parameters": {"type": "object", "properties": {"zip": {"type": "string", "description": "The code."}}},
    },
}
PROMPT = [user("2+2?")]
SEVERAL = [assistant("4"), user("Sure?"), assistant("Yes.")]
TRACE = [assistant("<think>\n2+2\n</think>\n\n4")]


@cache
def _core():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<bos>", "<think>", "</think>", "<|eot_id|>", "<end_of_turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["You are a helpful assistant. user system tools function"], trainer)
    return core


@cache
def tokenizer_with(template):
    """A tokenizer with a template of TRL, by its name, or with any other template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_core(), eos_token="<|im_end|>", pad_token="<|pad|>", bos_token="<bos>"
    )
    is_name = template in (*NAMES, *OF_VISION_MODELS)
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text() if is_name else template
    return tokenizer


def shown(tokenizer, prompt, completion, options=None):
    """The text of the tokens, without the stop token that every completion has."""
    ids = encode_prompt(tokenizer, prompt, options) + encode_completion(tokenizer, prompt, completion, options)
    assert ids[-1] == tokenizer.eos_token_id
    return tokenizer.decode(ids[:-1])


# --- a completion is what the template adds --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "completion",
    [[assistant("4")], [assistant(" 4 \n")], SEVERAL, [calling("02139")], [assistant("4", reasoning_content="2+2")]],
    ids=["text", "white space", "several turns", "tool call", "thought"],
)
def test_prompt_and_completion_are_the_rendered_conversation_or_the_row_is_refused(name, completion):
    tokenizer = tokenizer_with(name)
    try:
        text = shown(tokenizer, PROMPT, completion)
    except Unrenderable as error:
        assert set(completion[0]) > {"role", "content"}, error  # every template renders text
        assert "\n" not in str(error) and "chat_template" in str(error)
        return
    whole = tokenizer.apply_chat_template([*PROMPT, *completion], tokenize=False)
    assert whole.startswith(text)
    assert whole.removeprefix(text).strip() in ("", tokenizer.eos_token)
    # Nothing of the row is left out.
    for part in ("02139", "look_up") if "tool_calls" in completion[0] else ("4",):
        assert part in text.removeprefix(render_prompt(tokenizer, PROMPT))
    assert "reasoning_content" not in completion[0] or text.count("2+2") == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_of_a_completion_is_the_start_of_what_a_policy_continues(name):
    tokenizer = tokenizer_with(name)
    whole = tokenizer.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    assert render_generation_prompt(tokenizer, PROMPT) == whole
    opener = generation_opener(tokenizer, PROMPT)
    assert render_prompt(tokenizer, PROMPT) + opener == whole
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert encode_generation_prompt(tokenizer, PROMPT) == ids
    if not opener:
        assert encode_prompt(tokenizer, PROMPT) == ids


@pytest.mark.parametrize("name", OPEN_A_THOUGHT)
@pytest.mark.parametrize("completion", [TRACE, [assistant("4")], SEVERAL], ids=["trace", "text", "several turns"])
def test_a_thought_is_opened_at_most_once_and_closed(name, completion):
    tokenizer = tokenizer_with(name)
    assert render_generation_prompt(tokenizer, PROMPT).rstrip().endswith("<think>")
    text = shown(tokenizer, PROMPT, completion)
    answers = sum(message["role"] == "assistant" for message in completion)
    assert text.count("<think>") == text.count("</think>") <= answers
    assert ("2+2\n</think>" in text or "2+2</think>" in text) == (completion is TRACE)


@pytest.mark.parametrize("name", OPEN_A_THOUGHT)
def test_what_a_policy_wrote_after_an_opened_thought_is_scored_as_it_stands(name):
    tokenizer = tokenizer_with(name)
    opened = open_thought(tokenizer, PROMPT)
    assert opened.strip() == "<think>"
    answer = [assistant(opened + "2+2\n</think>\n\n4")]
    text = shown(tokenizer, PROMPT, answer)
    assert text.count("<think>") == 1 and text.count("2+2") == 2
    thoughtless = tokenizer_with("qwen2_5")
    assert open_thought(thoughtless, PROMPT) == "" and open_thought(thoughtless, "text") == ""
    assert open_thought(tokenizer_with("qwen3_5_nothink"), PROMPT) == ""  # an empty thought, which is closed


# --- thoughts and tool calls are rendered, or the row is refused -----------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("field", [*THOUGHT_FIELDS, "content"])
@pytest.mark.parametrize("later", [[], [user("Sure?"), assistant("Yes.")]], ids=["last", "earlier"])
def test_answers_that_differ_in_a_thought_are_never_the_same_tokens(name, field, later):
    tokenizer = tokenizer_with(name)

    def answer(thought):
        if field == "content":
            return [assistant(f"<think>\n{thought}\n</think>\n\n4"), *later]
        return [assistant("4", **{field: thought}), *later]

    try:
        first, second = (encode_completion(tokenizer, PROMPT, answer(thought)) for thought in ("4", "I guess"))
    except Unrenderable as error:
        assert field in str(error) or "<think>" in str(error)
    else:
        assert first != second


@pytest.mark.parametrize(
    "name, field", [("qwen3", "reasoning_content"), ("gptoss", "thinking"), ("qwen3_6", "reasoning")]
)
def test_thoughts_are_rendered_where_the_template_has_a_place_for_them(name, field):
    tokenizer = tokenizer_with(name)
    assert "two and two" in completion_text(tokenizer, PROMPT, [assistant("4", **{field: "two and two"})])


def test_a_tool_call_that_the_template_leaves_out_is_refused_also_in_the_prompt():
    tokenizer = tokenizer_with("llama3")
    for prompt, completion in ((PROMPT, [calling("1")]), ([*PROMPT, calling("1"), user("ok")], [assistant("4")])):
        with pytest.raises(Unrenderable, match="tool_calls"):
            encode_completion(tokenizer, prompt, completion)
    with pytest.raises(Unrenderable, match="tool_calls"):
        encode_prompt(tokenizer, [*PROMPT, calling("1"), user("ok")])


def test_a_template_that_renders_calls_only_without_text_gets_none():
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.content is not defined %}{{ m.tool_calls[0].function.name }}"
        "({{ m.tool_calls[0].function.arguments | tojson }}){% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    text = completion_text(tokenizer_with(template), PROMPT, [calling("02139")])
    assert text == 'look_up({"zip": "02139"})'


def test_tool_arguments_reach_the_tokens_with_their_types():
    tokenizer = tokenizer_with("qwen2_5")
    text, number = (completion_text(tokenizer, PROMPT, [calling(value)]) for value in ("02139", 2139))
    assert '"zip": "02139"' in text and '"zip": 2139' in number


# --- tools and arguments of the template -----------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [True, False])
def test_tools_and_arguments_of_a_row_reach_prompt_and_completion(as_text):
    tokenizer = tokenizer_with("qwen3")
    row = {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    if as_text:
        row = {name: json.dumps(value) for name, value in row.items()}
    options = template_options(row)
    assert options == {"tools": [TOOL], "enable_thinking": False}
    expected = tokenizer.apply_chat_template([*PROMPT, assistant("4")], tools=[TOOL], tokenize=False)
    prompt = tokenizer.apply_chat_template(
        PROMPT, tools=[TOOL], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert render_generation_prompt(tokenizer, PROMPT, options) == prompt
    assert expected.startswith(shown(tokenizer, PROMPT, [assistant("4")], options))
    row |= {"prompt": PROMPT, "completions": [[assistant("4")], [assistant("5")]]}
    ids = tokenize_row(row, tokenizer)
    assert "Finds a place." in tokenizer.decode(ids["prompt_ids"])
    assert ids["completion_ids"] == [encode_completion(tokenizer, PROMPT, [assistant(t)], options) for t in "45"]


@pytest.mark.parametrize("tools", ["[]", [], "", " ", None, "null", {}])
def test_an_empty_list_of_tools_renders_nothing(tools):
    tokenizer = tokenizer_with("llama3_1")
    options = template_options({"tools": tools})
    assert options == {} and tools_text(tools) is None
    assert "function" not in render_prompt(tokenizer, PROMPT, options)
    assert "function" in render_prompt(tokenizer, PROMPT, template_options({"tools": [TOOL]}))


def test_cells_that_are_not_usable_are_flagged():
    flags = []
    row = {"tools": "[", "chat_template_kwargs": "[1]"}
    assert template_columns(row, flags) == {} and flags == ["bad_tools", "bad_chat_template_kwargs"]
    row = {"functions": [TOOL], "kwargs": '{"a": 1}'}
    columns = template_columns(row, [], tools="functions", kwargs="kwargs")
    assert columns == {"tools": json.dumps([TOOL]), "chat_template_kwargs": {"a": 1}}
    assert json.loads(tools_text(json.dumps(TOOL))) == [TOOL]  # a single one


# --- what cannot be rendered is dropped ------------------------------------------------------------------------------


def _comparisons(*rows):
    made = []
    for number, (prompt, first, second) in enumerate(rows):
        row = {"prompt": prompt, "completions": [first, second], "pairs": [[0, 1]], "targets": [1.0], "row": number}
        made.append(row)
    dataset = as_dataset(made)
    return dataset, LoadReport(source="train", rows_in=len(made), kept=len(made))


def test_rows_that_the_template_cannot_render_are_dropped_with_its_reason():
    answers = [assistant("4")], [assistant("5")]
    dataset, report = _comparisons(
        ([system("Be brief."), *PROMPT], *answers),
        (PROMPT, *answers),
        (PROMPT, [assistant("4", reasoning_content="a")], [assistant("4", reasoning_content="b")]),
        ([user("a"), user("b")], *answers),
        (PROMPT, [assistant("yes ")], [assistant("yes")]),
    )
    tokenizer = tokenizer_with("gemma")
    tokenized = tokenize_comparisons(dataset, tokenizer, max_length=None, overflow="error", report=report)
    assert len(tokenized) == report.kept == 1
    assert report.rows_in == report.kept + sum(map(len, report.dropped.values()))
    dropped = {rows[0]: reason for reason, rows in report.dropped.items()}
    assert "System role not supported" in dropped[0] and "reasoning_content" in dropped[2]
    assert "roles must alternate" in dropped[3] and "same tokens" in dropped[4]
    (row,) = tokenized
    assert tokenizer.decode(row["completion_ids"][1]) == "5<end_of_turn>\n<|im_end|>"


def test_if_no_row_is_left_one_line_says_why():
    dataset, report = _comparisons(*[([system("x"), *PROMPT], [assistant("4")], [assistant("5")])] * 3)
    with pytest.raises(
        UserError, match=r"0 of 3 rows kept; 3 dropped.*System role not supported.*chat template"
    ) as error:
        tokenize_comparisons(dataset, tokenizer_with("gemma"), max_length=None, overflow="error", report=report)
    assert "\n" not in str(error.value)


def test_length_limits_count_rows_by_their_numbers_in_the_source():
    long = [assistant("word " * 50)]
    dataset, report = _comparisons(
        ([system("x"), *PROMPT], [assistant("4")], [assistant("5")]),
        (PROMPT, long, [assistant("5")]),
        (PROMPT, [assistant("4")], [assistant("5")]),
    )
    tokenized = tokenize_comparisons(dataset, tokenizer_with("gemma"), max_length=60, overflow="drop", report=report)
    assert len(tokenized) == report.kept == 1
    assert sorted(report.dropped.values()) == [[0], [1]] and report.dropped["over max_length=60"] == [1]


def test_demonstrations_that_lose_something_are_dropped_before_sft():
    rows = [
        {"prompt": PROMPT, "completion": [assistant("4")]},
        {"prompt": [system("x"), *PROMPT], "completion": [assistant("4")]},
        {"prompt": PROMPT, "completion": TRACE},  # this template cuts thoughts out
        {"prompt": PROMPT, "completion": [calling("1")]},
    ]
    dataset = as_dataset([row | {"row": 10 + k} for k, row in enumerate(rows)])
    kept, report = drop_unrenderable(dataset, tokenizer_with("deepseek_r1_distill"), source="demos")
    assert list(kept["row"]) == [10, 11] and (report.rows_in, report.kept) == (4, 2)
    assert sorted(report.dropped.values()) == [[12], [13]]
    kept, report = drop_unrenderable(dataset, tokenizer_with("gemma"), source="demos")
    assert list(kept["row"]) == [10, 12] and any("System role" in reason for reason in report.dropped)
    text = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    assert drop_unrenderable(text, tokenizer_with("gemma"), source="text")[0] is text


def test_templates_that_render_no_text_are_refused():
    for name in ("idefics3", "smolvlm"):  # of vision models: they take lists of parts only
        assert PROMPT[0]["content"] in render_prompt(tokenizer_with(name), PROMPT)
    roles_only = copy.deepcopy(tokenizer_with("idefics3"))
    roles_only.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(Unrenderable, match="does not render the text"):
        encode_prompt(roles_only, PROMPT)


def test_an_encoders_completion_is_a_text_of_its_own():
    from hf_rlhf_ext.modeling.loading import ENCODER_TEMPLATE

    tokenizer = copy.deepcopy(tokenizer_with(ENCODER_TEMPLATE))
    tokenizer.add_special_tokens({"sep_token": "[SEP]", "cls_token": "[CLS]"})
    tokenizer.eos_token = "[SEP]"
    text = shown(tokenizer, PROMPT, [assistant("4 ")])
    assert text == "[CLS]user: 2+2?\n[SEP]4 "
    for completion in (SEVERAL, [calling("1")], [assistant("4", thinking="2+2")]):
        with pytest.raises(Unrenderable, match="encoder"):
            encode_completion(tokenizer, PROMPT, completion)
