"""A prompt that ends with a turn of the assistant: a policy continues it; messages in data are turns of their own."""

import logging
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from transformers import LlamaForSequenceClassification

from hf_rlhf_ext.data.schema import LoadReport
from hf_rlhf_ext.data.text import (
    encode_generation_prompt,
    open_thought,
    prefill_of,
    render_generation_prompt,
    with_prefill,
)
from hf_rlhf_ext.data.tokenization import tokenize_comparisons
from hf_rlhf_ext.data.trl_rows import read_comparisons
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.rewards import RewardFunctions, score_completions
from hf_rlhf_ext.ppo.trainer import PPOTrainer
from hf_rlhf_ext.reward.scorer import RewardScorer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
NAMES = ["qwen3", "qwen3_5_think", "deepseek_r1_distill", "gptoss", "gemma", "llama3_1", "phi3"]
TOOLS = [
    {"type": "function", "function": {"name": "move", "description": "Goes on.", "parameters": {"type": "object"}}}
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


@pytest.fixture
def template(chat_tokenizer):
    def use(name):
        chat_tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
        return chat_tokenizer

    return use


@pytest.mark.parametrize("prefill", ["Sure, here", "Sure, ", "<think>\nLet me see", "1."])
@pytest.mark.parametrize("name", [name for name in NAMES if (TEMPLATES / f"{name}.jinja").is_file()])
def test_the_policy_continues_the_text_that_transformers_leaves_open(template, name, prefill):
    tokenizer = template(name)
    prompt = [user("Tell me"), assistant(prefill)]
    expected = tokenizer.apply_chat_template(prompt, tokenize=False, continue_final_message=True)
    assert render_generation_prompt(tokenizer, prompt) == expected
    assert expected.endswith(prefill.strip()) or expected.endswith(prefill)
    assert encode_generation_prompt(tokenizer, prompt) == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert trl.apply_chat_template({"prompt": prompt}, tokenizer)["prompt"] == expected
    assert open_thought(tokenizer, prompt) == ""


def test_tools_and_template_arguments_reach_a_prefilled_prompt(template):
    tokenizer = template("qwen3")
    options = {"tools": TOOLS, "enable_thinking": False}
    prompt = [user("Go"), assistant("I go")]
    expected = tokenizer.apply_chat_template(prompt, tokenize=False, continue_final_message=True, **options)
    assert "Goes on." in expected
    assert render_generation_prompt(tokenizer, prompt, options) == expected


def test_what_is_a_prefill():
    call = {"type": "function", "function": {"name": "move", "arguments": {}}}
    assert prefill_of([user("a"), assistant("b")]) == "b"
    assert prefill_of([user("a"), assistant([{"type": "text", "text": "b"}, {"type": "text", "text": "c"}])]) == "c"
    assert prefill_of("Assistant:") is None
    assert prefill_of([user("a")]) is None
    assert prefill_of([user("a"), assistant("b", tool_calls=[call])]) is None
    assert prefill_of([user("a"), assistant(None)]) is None


def test_reward_functions_get_the_whole_turn(chat_tokenizer):
    seen = []

    def record(prompts, completions, **columns):
        seen.append((prompts, completions))
        return [1.0] * len(prompts)

    prompts = [
        [user("a"), assistant("Sure,")],
        [user("b")],
        [assistant("Once")],
        [user("c"), assistant([part("Yes,")])],
    ]
    ids = [chat_tokenizer(" happy")["input_ids"]] * 4
    prompt_ids = [encode_generation_prompt(chat_tokenizer, prompt) for prompt in prompts]
    rows = [{"prompt": prompt} for prompt in prompts]
    score_completions(RewardFunctions(record), chat_tokenizer, rows, ids, prompt_ids)
    ((prompts_seen, completions),) = seen
    assert prompts_seen == [[user("a")], [user("b")], [assistant("Once")], [user("c")]]
    assert completions[0] == [assistant("Sure, happy")]
    assert completions[1] == [assistant(" happy")]
    assert completions[2] == [assistant(" happy")]  # nothing is before the turn, which stays in the prompt
    assert completions[3] == [assistant([part("Yes, happy")])]
    assert [row["prompt"] for row in rows] == prompts  # rows are not changed


def part(text):
    return {"type": "text", "text": text}


def test_a_template_that_trims_turns_gets_no_second_space(template):
    tokenizer = template("llama3_1")
    assert render_generation_prompt(tokenizer, [user("a"), assistant("Sure, ")]).endswith("Sure,")
    assert with_prefill(tokenizer, [user("a"), assistant("Sure, ")], " happy")[1] == [assistant("Sure, happy")]


def test_the_space_of_a_sentencepiece_tokenizer_is_kept(stories_path):
    from hf_rlhf_ext.modeling.loading import load_tokenizer

    tokenizer = load_tokenizer(str(stories_path))
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    prompt = [user("Tell"), assistant("Once upon")]
    prompt_ids = encode_generation_prompt(tokenizer, prompt)
    whole = tokenizer("[user]Tell" + tokenizer.eos_token + "[assistant]Once upon a time", add_special_tokens=False)
    generated = whole["input_ids"][len(prompt_ids) :]
    seen = []

    def record(prompts, completions, **columns):
        seen.extend(completions)
        return [1.0]

    score_completions(RewardFunctions(record), tokenizer, [{"prompt": prompt}], [generated], [prompt_ids])
    assert seen == [[assistant("Once upon a time")]]


# Whole runs


@pytest.fixture
def scorer(tiny_config, chat_tokenizer):
    tiny_config.num_labels = 1
    torch.manual_seed(0)
    return RewardScorer(LlamaForSequenceClassification(tiny_config), chat_tokenizer)


def test_a_run_on_prefilled_prompts(tiny_llama, chat_tokenizer, scorer, tmp_path):
    seen = []

    def record(prompts, completions, completion_ids, **columns):
        seen.append((prompts, completions, completion_ids))
        return [float(len(completion[0]["content"])) for completion in completions]

    prompts = [[user(text), assistant("Sure, a")] for text in ("fox", "day", "garden", "words")]
    data = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    args = PPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=4, num_ppo_epochs=1, max_steps=1, max_completion_length=4, save_strategy="no",
    )  # fmt: skip
    trainer = PPOTrainer(tiny_llama, [record, scorer], args, data, data, processing_class=chat_tokenizer)
    trainer.train()
    asked, completions, ids = seen[0]
    for prompt, completion, completion_ids in zip(asked, completions, ids, strict=True):
        generated = chat_tokenizer.decode(completion_ids, skip_special_tokens=True)
        assert completion == [assistant("Sure, a" + generated)]
        assert len(prompt) == 1 and prompt[0]["role"] == "user"
    for row in trainer.sample_and_score(data):
        text = chat_tokenizer.decode(row.prompt_ids)
        assert text.endswith("<|im_start|>assistant\nSure, a")
        assert row.prompt[-1] == assistant("Sure, a") and not row.completion.startswith("Sure, a")
        # The reward model reads one turn of the assistant.
        whole = f"{text}{row.completion}<|im_end|>"
        expected = scorer.score_ids([chat_tokenizer(whole)["input_ids"]])
        assert row.rewards["reward_model"] == pytest.approx(expected[0], abs=1e-5)


def test_a_text_after_a_prefill_is_scored_as_the_same_turn(scorer, chat_tokenizer):
    prompt = [user("fox"), assistant("Sure,")]
    ids = chat_tokenizer("<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\nSure, happy<|im_end|>")["input_ids"]
    expected = scorer.score_ids([ids])
    assert scorer.raw([prompt], [" happy"]) == pytest.approx(expected, abs=1e-6)
    assert scorer.raw([[user("fox")]], [[assistant("Sure, happy")]]) == pytest.approx(expected, abs=1e-6)
    assert scorer.text(prompt, " happy") == chat_tokenizer.decode(ids)


def test_messages_in_data_are_turns_of_their_own_as_in_trl(scorer, chat_tokenizer, caplog):
    prompt = [user("fox"), assistant("Sure.")]
    row = {"prompt": prompt, "chosen": [assistant("A fox")], "rejected": [assistant("No")]}
    comparisons, report = read_comparisons(Dataset.from_list([row]), source="train")
    tokenized = tokenize_comparisons(comparisons, chat_tokenizer, max_length=None, overflow="error", report=report)
    theirs = chat_tokenizer.apply_chat_template([*prompt, *row["chosen"]], tokenize=False)
    ids = tokenized[0]["prompt_ids"] + tokenized[0]["completion_ids"][0]
    assert chat_tokenizer.decode(ids) == theirs.removesuffix("\n")
    # It is said, as a policy would continue the turn.
    assert report.flagged == {"prompt_ends_with_assistant": [0]}
    # The scorer reads them as in training.
    assert scorer.raw([prompt], [row["chosen"]]) == pytest.approx(scorer.score_ids([ids]), abs=1e-6)


def test_other_prompts_are_not_flagged(chat_tokenizer):
    rows = [{"prompt": [user("fox")], "chosen": [assistant("A fox")], "rejected": [assistant("No")]}]
    comparisons, report = read_comparisons(Dataset.from_list(rows), source="train")
    tokenize_comparisons(comparisons, chat_tokenizer, max_length=None, overflow="error", report=report)
    assert report.flagged == {} and isinstance(report, LoadReport)


def test_a_prefill_that_the_template_drops_is_refused_with_its_row(tiny_llama, chat_tokenizer, tmp_path, caplog):
    chat_tokenizer.chat_template = (
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    data = Dataset.from_list([{"prompt": [user("a")]}, {"prompt": [user("a"), assistant("Sure")]}])
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "activation_checkpointing": False}
    options |= {"max_completion_length": 4}
    with pytest.raises(UserError, match="train_dataset row 1: .*unrenderable='drop'") as refused:
        PPOTrainer(
            tiny_llama, lambda **_: [], PPOConfig(str(tmp_path), **options), data, processing_class=chat_tokenizer
        )
    assert "\n" not in str(refused.value)
    with caplog.at_level(logging.WARNING):
        args = PPOConfig(str(tmp_path), unrenderable="drop", **options)
        trainer = PPOTrainer(tiny_llama, lambda **_: [], args, data, processing_class=chat_tokenizer)
    assert len(trainer.experience.prompts) == 1 and "train_dataset: 1 of 2 rows kept" in caplog.text
