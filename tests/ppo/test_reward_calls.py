"""What may be a reward function, how it is called, and what it may log."""

import asyncio
import functools
import math

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification, pipeline

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.meter import OWN_METRICS, metric_logger
from hf_rlhf_ext.ppo.rewards import RewardFunctions, check_columns


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def check(func):
    """Makes the reward functions and checks their parameters, as the trainer does at its start."""
    rewards = RewardFunctions(func)
    check_columns(rewards, None, {"train_dataset": Dataset.from_dict({"prompt": ["a"], "level": [1]})})
    return rewards


class WithWeights(torch.nn.Module):
    def forward(self, prompts, completions, **columns):
        return [2.0] * len(completions)


class TextsOnly(torch.nn.Module):
    def forward(self, input_ids):
        return input_ids


class Scorer:
    def __call__(self, prompts, completions, **columns):
        return [1.0] * len(completions)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", [math.nan, [math.nan, 1.0], [math.inf, 1.0], 1.0, "12", ["a", 1.0], [None, 1.0], [1.0], {0: 1.0, 1: 1.0}]
)
def test_weights_that_are_not_one_finite_number_each_are_refused(weights):
    with pytest.raises(UserError, match="reward_weights"):
        RewardFunctions([length, length], weights)


@pytest.mark.parametrize("weights", [(1.0, 0.5), [1, 0.5], torch.tensor([1.0, 0.5])])
def test_weights_and_functions_may_be_a_tuple(weights):
    rewards = RewardFunctions((length, Scorer()), weights)
    assert rewards.score(["a"], ["four"]).sequence.tolist() == [4.5]


# --- what is a function ----------------------------------------------------------------------------------------------


def test_a_module_that_takes_texts_is_a_function():
    assert check(WithWeights()).score(["a"], ["b"]).sequence.tolist() == [2.0]


@pytest.mark.parametrize(
    ("func", "says"),
    [
        (TextsOnly(), "TextsOnly has no config.*wrap it in a function"),
        (torch.nn.Linear(1, 1), "Linear has no config"),
        (Scorer, r"Scorer is a class.*Scorer\(\)"),
        (object(), "is not a function, a model or a path"),
    ],
)
def test_what_is_no_function_is_refused_with_the_way_to_make_it_one(func, says):
    with pytest.raises(UserError, match=f"reward_funcs: .*{says}") as caught:
        RewardFunctions([func])
    assert "\n" not in str(caught.value)


def test_models_without_a_tokenizer_and_pipelines_are_refused(tiny_config, chat_tokenizer):
    tiny_config.num_labels = 1
    model = LlamaForSequenceClassification(tiny_config)
    with pytest.raises(UserError, match="reward_funcs: .*pass the tokenizer in reward_processing_classes"):
        RewardFunctions(model)
    with pytest.raises(UserError, match=r"eval_reward_funcs: .*RewardScorer\(model, tokenizer\)"):
        RewardFunctions(model, option="eval_reward_funcs")
    with pytest.raises(UserError, match="reward_processing_classes: 'gpt2' is not a tokenizer"):
        RewardFunctions(model, None, "gpt2")
    assert len(RewardFunctions((model,), None, (chat_tokenizer,)).models()) == 1
    pipe = pipeline("text-classification", model=model, tokenizer=chat_tokenizer, device="cpu")
    with pytest.raises(UserError, match="TextClassificationPipeline takes texts only: wrap it in a function"):
        RewardFunctions(pipe)


def by_position(prompts, completions, /, **columns):
    return [1.0] * len(completions)


def other_names(p, c):
    return [1.0] * len(c)


@pytest.mark.parametrize(
    ("func", "says"),
    [
        (by_position, "remove the slash"),
        (other_names, r"needs 'p'.*does not take 'completions'.*\(prompts, completions, \*\*kwargs\)"),
        (lambda: [], r"does not take 'completions'.*\(prompts, completions, \*\*kwargs\)"),
        (len, r"\(prompts, completions, \*\*kwargs\)"),
        (lambda completions, answer, **columns: [], r"needs 'answer', but train_dataset has no such.*\(it has level\)"),
        (lambda completions, levels: [], r"needs 'levels'.*did you mean 'level'\?"),
        (lambda completions, completion: [], r"needs 'completion'.*did you mean 'completions'\?"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_at_the_start(func, says):
    with pytest.raises(UserError, match=says):
        check(func)


def test_a_module_may_take_the_completions_alone():
    class Lengths(torch.nn.Module):
        def forward(self, completions):
            return torch.tensor([[float(len(text))] for text in completions])

    assert check(Lengths()).score(["a"], ["four"]).sequence.tolist() == [4.0]


def test_functions_get_the_arguments_that_they_name():
    class Judge:
        def method(self, completions, level):
            return [float(value) for value in level]

        def __call__(self, completions):
            return [2.0] * len(completions)

    class Module(torch.nn.Module):
        def forward(self, prompts, completions):
            return torch.ones(len(completions))

    async def in_parallel(completions):
        return [3.0] * len(completions)

    def decorated(prompts, completions):
        return [4.0] * len(completions)

    def scaled(completions, factor):
        return [factor] * len(completions)

    funcs = [
        Judge().method,
        Judge(),
        Module(),
        in_parallel,
        hidden(decorated),
        functools.partial(scaled, factor=5.0),
        lambda completions, *, level: [6.0] * len(completions),
        lambda prompts, completions, missing=7.0: [missing] * len(completions),
        lambda completions, **columns: [float(len(columns))] * len(completions),
    ]
    rewards = check(funcs)
    scores = rewards.score(["a"], ["b"], completion_ids=[[1]], level=[1], trainer_state=None)
    assert scores.per_func.tolist() == [[1, 2, 1, 3, 4, 5, 6, 7, 4]]
    assert len(set(rewards.names)) == len(funcs) and rewards.names[:4] == ["method", "Judge", "Module", "in_parallel"]


def test_names_stay_distinct_whatever_functions_are_called():
    def f(completions):
        return [1.0]

    def f_0(completions):
        return [1.0]

    assert len(set(RewardFunctions([f, f, f_0]).names)) == 3


# --- mistakes inside a function --------------------------------------------------------------------------------------


MESSAGES = [[{"role": "assistant", "content": "Yes"}]]


def shouts(completions):
    return [float(text.isupper()) for text in completions]


async def shouts_later(completions):
    return shouts(completions)


def shouts_each(completions):
    yield from (float(text.isupper()) for text in completions)


def takes_messages(completions):
    return [float(len(completion[0]["content"])) for completion in completions]


class FailingModule(torch.nn.Module):
    def forward(self, completions):
        return {}["answer"]


@pytest.mark.parametrize(
    ("func", "completions", "says"),
    [
        (
            shouts,
            MESSAGES,
            r"'shouts' failed: AttributeError: .*\(test_reward_calls.py, line \d+\).*\['content'\]",
        ),
        (shouts_later, MESSAGES, r"'shouts_later' failed: AttributeError.*test_reward_calls.py, line \d+"),
        (shouts_each, MESSAGES, r"'shouts_each' failed: AttributeError.*test_reward_calls.py, line \d+"),
        (takes_messages, ["Yes"], "TypeError: string indices.*a completion is text"),
        (lambda completions, **columns: [columns["answer"]], ["a"], "KeyError: 'answer'.*correct the function"),
        (lambda completions, answer: [1.0], ["a"], "failed: TypeError: .*'answer'"),
        (lambda completions: completions[5], MESSAGES, r"IndexError: list index.*line \d+\): correct the function"),
        (FailingModule(), ["a"], r"KeyError: 'answer' \(test_reward_calls.py, line \d+"),
        (functools.partial(shouts), [3], r"AttributeError.*\(test_reward_calls.py, line \d+"),
        (lambda completions: [shouts_later([3])], ["a"], r"AttributeError.*\(test_reward_calls.py, line \d+"),
    ],
)
def test_a_mistake_inside_a_function_is_one_line_with_file_and_line(func, completions, says):
    with pytest.raises(UserError, match=f"^reward function .*{says}") as caught:
        RewardFunctions(func).score(["a"], completions)
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


@pytest.mark.parametrize("kind", [ConnectionError, KeyboardInterrupt, torch.OutOfMemoryError, UserError])
def test_other_errors_keep_their_type(kind):
    def fails(completions):
        raise kind("as it is")

    with pytest.raises(kind, match="^as it is$"):
        RewardFunctions(fails).score(["a"], ["b"])


# --- coroutines ------------------------------------------------------------------------------------------------------


async def later(prompts, completions, **columns):
    return [3.0] * len(completions)


def hidden(func):
    @functools.wraps(func)
    def call(**arguments):
        return func(**arguments)

    return call


async def one(value):
    return value


def one_each(prompts, completions, **columns):
    return [one(float(k)) for k in range(len(completions))]


def test_coroutines_that_come_back_are_awaited():
    funcs = [later, hidden(later), functools.partial(later), one_each, length]
    scores = RewardFunctions(funcs).score(["a", "b"], ["x", "yy"]).per_func
    assert scores.tolist() == [[3.0, 3.0, 3.0, 0.0, 1.0], [3.0, 3.0, 3.0, 1.0, 2.0]]


def test_what_an_async_function_keeps_can_be_used_in_the_next_call():
    limit = asyncio.Semaphore(1)

    async def graded(text):
        async with limit:  # bound to the event loop in which somebody waits for it first
            await asyncio.sleep(0)
            return float(len(text))

    async def judge(completions):
        return await asyncio.gather(*map(graded, completions))

    rewards = RewardFunctions([judge, lambda completions: [graded(text) for text in completions]])
    for _ in range(2):
        assert rewards.score(["a", "b"], ["x", "yy"]).per_func.tolist() == [[1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize("error", [SystemExit, ConnectionError])
def test_an_error_in_an_async_function_ends_the_call_and_not_the_next_one(error):
    canceled = []

    async def fails(completions):
        raise error("as it is")

    async def waits(completions):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            canceled.append(True)
            raise

    with pytest.raises((RuntimeError, ConnectionError), match="SystemExit|as it is"):
        RewardFunctions([fails, waits]).score(["a"], ["b"])
    assert RewardFunctions(later).score(["a"], ["b"]).sequence.tolist() == [3.0]
    assert canceled == [True]


# --- metrics of functions --------------------------------------------------------------------------------------------


def test_a_function_logs_numbers_under_names_of_its_own():
    logged = []
    log_metric = metric_logger(lambda name, value: logged.append((name, float(value))), ["length"])
    for value in (1, 2.0, True, torch.tensor(4.0), torch.tensor([5.0]), torch.tensor(6.0).numpy()):
        log_metric("rewards/mine", value)
    assert [value for _, value in logged] == [1.0, 2.0, 1.0, 4.0, 5.0, 6.0]
    for value in ("abc", None, [1.0], torch.ones(2)):
        with pytest.raises(UserError, match=r"log_metric\('mine'\): the value is .*: give one number"):
            log_metric("mine", value)
    for name in ("objective/scores", "loss", "rewards/length/mean"):
        with pytest.raises(UserError, match="the trainer logs a metric of this name: give yours another"):
            log_metric(name, 1.0)
    with pytest.raises(UserError, match="give a string"):
        log_metric(3, 1.0)


def test_every_metric_of_the_trainer_is_taken(make_trainer, prompts):
    seen = []

    def first(prompts, completions, log_metric, **columns):
        log_metric("mine", 1.0)
        seen.append(log_metric)
        return [1.0] * len(completions)

    trainer = make_trainer(
        reward_funcs=first, eval_dataset=prompts, max_steps=2, num_ppo_epochs=1, early_stop_kl=0.5, exact_kl_rows=1
    )
    trainer.train()
    metrics = trainer.evaluate()
    names = {name for row in trainer.state.log_history for name in row if "loss" in row}
    names |= {name.removeprefix("eval_") for name in metrics}
    others = {"mine", "rewards/first/mean", "rewards/first/std"}
    assert others <= names
    assert {name for name in names - others if not name.startswith("eval_")} <= OWN_METRICS
    for log_metric in (seen[0], seen[-1]):  # of a rollout, and of an evaluation
        for name in (*OWN_METRICS, "rewards/first/mean"):
            with pytest.raises(UserError, match="the trainer logs a metric of this name"):
                log_metric(name, 99.0)


# --- sets that come later --------------------------------------------------------------------------------------------


def test_a_set_without_a_column_that_a_function_needs_is_refused(make_trainer, prompts):
    def needs_answer(completions, answer, **columns):
        return [1.0] * len(completions)

    data = prompts.add_column("answer", ["a"] * len(prompts))
    trainer = make_trainer(reward_funcs=needs_answer, train_dataset=data, eval_dataset={"kept": data})
    for call in (trainer.predict, trainer.evaluate, lambda data: trainer.evaluate({"one": data})):
        with pytest.raises(UserError, match="needs 'answer', but the dataset has no such column"):
            call(prompts)
    with pytest.raises(UserError, match="the dataset is None"):
        trainer.predict(None)
    # As in `Trainer`, a set of the trainer may be named.
    assert "eval_objective/scores" in trainer.evaluate("kept")
    for dataset in (
        data.with_format("pandas"),
        data.with_format("arrow"),
        data.with_format("numpy", columns=["answer"]),
    ):
        assert len(trainer.predict(dataset).predictions) == len(prompts)
