"""Columns of a dataset and the arguments of reward functions: names that are taken, values of any kind, signatures."""

import inspect
import logging
import re

import pytest
import trl
from datasets import Dataset, Image
from transformers import LlamaForSequenceClassification

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.rewards import HOOKS, RESERVED_COLUMNS
from hf_rlhf_ext.readers.formats import load_comparisons
from hf_rlhf_ext.reward.scorer import RewardScorer


def user(text):
    return {"role": "user", "content": text}


def rows_with(**columns):
    return Dataset.from_list([{"prompt": text, **columns} for text in ("Tell me", "a sunny day", "fox", "garden")])


class Recorder:
    """A reward function that keeps the arguments it was called with."""

    __name__ = "recorder"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, **columns):
        self.calls.append({"prompts": prompts, "completions": completions, **columns})
        return [0.1 * number for number in range(len(completions))]


def run(make_trainer, data, caplog, **options):
    """The arguments of the first call, and what was logged when the trainer was made."""
    recorder = Recorder()
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            train_dataset=data, reward_funcs=recorder, max_completion_length=3, max_steps=1, num_ppo_epochs=1, **options
        )
    trainer.train()
    return recorder.calls[0], caplog.text


TAKEN = sorted(RESERVED_COLUMNS - {"prompt"})


@pytest.mark.parametrize("names", [TAKEN, ["log_metric"]], ids=["all", "one"])
def test_columns_with_the_names_of_arguments_are_not_passed_on(make_trainer, caplog, names):
    data = rows_with(**dict.fromkeys(names, "mine"))
    arguments, logged = run(make_trainer, data, caplog)
    assert not any(value == ["mine"] * len(arguments["prompts"]) for value in arguments.values())
    (line,) = [line for line in logged.splitlines() if "not passed on" in line]
    listed = [name for name in data.column_names if name != "prompt"]
    assert f"column{'s' * (len(names) > 1)} {', '.join(listed)}:" in line
    assert f"rename_column('{listed[0]}', 'my_{listed[0]}')" in line
    assert set(HOOKS) <= arguments.keys() and callable(arguments["log_metric"])
    assert all(isinstance(text, str) for text in arguments["completions"])


def test_the_names_that_are_taken_are_those_of_trl():
    source = inspect.getsource(trl.GRPOTrainer._calculate_rewards)
    given = {name for name in RESERVED_COLUMNS if f'"{name}"' in source or f"{name}=" in source}
    assert given == RESERVED_COLUMNS - {"self"}
    added = set(re.findall(r' reward_kwargs\["(\w+)"\] = ', source))
    assert added == {*HOOKS, "environments"}


def test_comparison_rows_serve_as_prompts(make_trainer, caplog):
    pairs = [{"prompt": f"day {k}", "chosen": " happy" + "!" * k, "rejected": " sad"} for k in range(4)]
    comparisons, _ = load_comparisons(Dataset.from_list(pairs))
    arguments, logged = run(make_trainer, comparisons, caplog)
    assert "column completions: not passed on" in logged
    assert arguments["targets"] == [[1.0]] * len(arguments["prompts"]) and "row" in arguments
    assert all(isinstance(text, str) for text in arguments["completions"])


def test_other_columns_arrive_as_they_are(make_trainer, caplog):
    values = {
        "none": None,
        "nested": {"a": [1, 2], "b": None},
        "numbers": [1.5, 2.0],
        "prompt_ids": [7],
        "name with spaces": "x",
        "func": True,
    }
    arguments, logged = run(make_trainer, rows_with(**values), caplog)
    size = len(arguments["prompts"])
    for name, value in values.items():
        expected = {"a": [1, 2]} if name == "nested" else value  # Arrow's None in records is left out
        assert arguments[name] == [expected] * size, name
    assert "not passed on" not in logged


def test_columns_of_mixed_types_and_of_some_rows(make_trainer, caplog):
    data = Dataset.from_list([{"prompt": "a", "answer": 3}, {"prompt": "b"}, {"prompt": "c", "answer": None}])
    arguments, _ = run(make_trainer, data, caplog)
    assert {3, None} == set(arguments["answer"])


def test_reward_models_read_no_columns_so_nothing_is_said(make_trainer, tiny_config, chat_tokenizer, caplog):
    tiny_config.num_labels = 1
    scorer = RewardScorer(LlamaForSequenceClassification(tiny_config), chat_tokenizer)
    with caplog.at_level(logging.WARNING):
        make_trainer(train_dataset=rows_with(completions="mine"), reward_funcs=scorer)
    assert "not passed on" not in caplog.text


def no_extras(prompts, completions):
    return [1.0] * len(completions)


def needs_answer(completions, answer, **columns):
    return [1.0] * len(completions)


def knows_all(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, answer=None):
    return [float(number) for number in range(len(completions))]


async def in_parallel(completions, answer, **columns):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    "func, fragment",
    [
        (lambda columns: [], r"does not take 'completions': write its parameters as"),
        (needs_answer, "'needs_answer' needs 'answer', but train_dataset has no such column"),
        (in_parallel, "'in_parallel' needs 'answer', but train_dataset has no such column"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_training(make_trainer, func, fragment):
    with pytest.raises(UserError, match=fragment) as refused:
        make_trainer(reward_funcs=func)
    assert "\n" not in str(refused.value)


def test_functions_are_checked_against_every_dataset(make_trainer, prompts):
    with_answer = rows_with(answer="x")
    make_trainer(reward_funcs=[needs_answer, knows_all, no_extras], train_dataset=with_answer)
    mistake = "'needs_answer' needs 'answer', but eval_dataset 'plain' has no such column"
    with pytest.raises(UserError, match=mistake):
        sets = {"full": with_answer, "plain": prompts}
        make_trainer(reward_funcs=needs_answer, train_dataset=with_answer, eval_dataset=sets)
    # A function of evaluation needs its columns only there.
    make_trainer(eval_reward_funcs=needs_answer, eval_dataset=with_answer)
    with pytest.raises(UserError, match="'needs_answer' needs 'answer', but eval_dataset has no such column"):
        make_trainer(eval_reward_funcs=needs_answer, eval_dataset=prompts)


# Pictures


def picture(kind):
    part = {
        "image": {"type": "image", "image": "cat.png"},
        "image_url": {"type": "image_url", "image_url": {"url": "x"}},
    }
    part["placeholder"] = {"type": "image"}
    part["audio"] = {"type": "input_audio", "input_audio": {"data": "x"}}
    part["video"] = {"type": "video", "video": "cat.mp4"}
    return [{"role": "user", "content": [part[kind], {"type": "text", "text": "What is this?"}]}]


@pytest.mark.parametrize("kind", ["image", "image_url", "placeholder", "audio", "video"])
@pytest.mark.parametrize("takes_parts", [True, False])
def test_a_prompt_with_a_picture_is_refused_with_its_row(make_trainer, chat_tokenizer, kind, takes_parts):
    if takes_parts:
        content = "{% for p in m['content'] %}{{ p['text'] if p['type'] == 'text' else '<|image|>' }}{% endfor %}"
        chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("{{ m['content'] }}", content)
    text = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    data = Dataset.from_list([{"prompt": text}, {"prompt": picture(kind)}])
    with pytest.raises(UserError, match="train_dataset row 1: images, audio and video are not supported") as refused:
        make_trainer(train_dataset=data)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["image", "images", "audio", "audios", "video", "videos"])
def test_a_column_of_pictures_is_refused(make_trainer, name):
    message = (
        f"train_dataset: images, audio and video are not supported, but there is a column '{name}'.*remove_columns"
    )
    with pytest.raises(UserError, match=message):
        make_trainer(train_dataset=rows_with(**{name: ["cat.png"]}))
    make_trainer(train_dataset=rows_with(**{name: None}))  # of a mixture with such data


def test_a_column_of_pictures_is_refused_without_reading_them(make_trainer):
    data = rows_with(images=["/no/such/cat.png"]).cast_column("images", [Image()])
    with pytest.raises(UserError, match="column 'images'"):
        make_trainer(train_dataset=data)


def test_text_parts_are_no_pictures_whatever_the_template_takes(make_trainer, chat_tokenizer):
    parts = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "a story"}]
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": parts}]}] * 4)
    expected = "<|im_start|>user\nTell me a story<|im_end|>\n<|im_start|>assistant\n"
    trainer = make_trainer(train_dataset=data)
    assert chat_tokenizer.decode(trainer.experience.prompts.first) == expected
    content = "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("{{ m['content'] }}", content)
    trainer = make_trainer(train_dataset=data)
    assert chat_tokenizer.decode(trainer.experience.prompts.first) == expected
