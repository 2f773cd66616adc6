"""Reward functions with the interface of TRL's GRPOTrainer, and the error for every wrong return value."""

import asyncio
import functools
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.adapters import save_adapter
from hf_rlhf_ext.modeling.heads import install_fp32_score
from hf_rlhf_ext.ppo.rewards import RewardFunctions
from hf_rlhf_ext.reward.ensemble import RewardEnsemble
from hf_rlhf_ext.reward.scorer import RewardNormalization, RewardScorer

PROMPTS, COMPLETIONS = ["a", "b", "c"], ["x", "yy", "zzz"]


def length(completions, **kwargs):
    return [len(text) for text in completions]


async def slow_length(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


class AsyncReward:
    async def __call__(self, prompts, completions, **kwargs):
        return [1.0] * len(prompts)


def score(func, **kwargs):
    return RewardFunctions(func, **kwargs)(PROMPTS, COMPLETIONS, completion_ids=[[1], [2], [3]], target=[3, 2, 1])


def test_a_callable_gets_prompts_completions_and_columns():
    seen = {}

    def reward(prompts, completions, target, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, target=target)
        return torch.tensor([1.0, 2.0, 3.0])

    scores = score(reward)
    assert scores.tolist() == [[1.0], [2.0], [3.0]] and scores.dtype == torch.float32
    expected = {"prompts": PROMPTS, "completions": COMPLETIONS, "target": [3, 2, 1], "completion_ids": [[1], [2], [3]]}
    assert seen == expected


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3]),
        torch.tensor([1, 2, 3]),
        [np.float32(1), torch.tensor(2.0), 3],
        [Decimal(1), Fraction(2), np.int64(3)],
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([[1.0], [2.0], [3.0]]),
        np.array([[1.0, 2.0, 3.0]]),
        [torch.tensor([1.0]), np.array([2.0]), torch.tensor([[3.0]])],
        np.array([1, 2, 3], dtype=object),
        pd.Series([1, 2, 3], index=[7, 8, 9]),
        pd.DataFrame({"score": [1, 2, 3]}),
        {"reward": [1, 2, 3]},
        {"scores": torch.tensor([[1.0], [2.0], [3.0]])},
        [{"score": 1.0}, {"score": 2.0}, {"score": 3.0}],
        dict.fromkeys([1, 2, 3]).keys(),
        range(1, 4),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_every_kind_of_numbers_is_taken(answer):
    rewards = RewardFunctions(lambda **kwargs: answer)
    longer = [[1, 1], [2], [3]]  # a tensor with one element for each is no reward of tokens
    scores = rewards.score(PROMPTS, COMPLETIONS, completion_ids=longer)
    assert scores.sequence.tolist() == [1.0, 2.0, 3.0] and scores.dense is None


@pytest.mark.parametrize(
    "answer", [[True, False, True], np.array([True, False, True]), torch.tensor([True, False, True]), [np.True_, 0, 1]]
)
def test_truth_values_are_one_and_zero(answer):
    assert score(lambda **kwargs: answer).flatten().tolist() == [1.0, 0.0, 1.0]


def test_a_generator_is_taken():
    def one_by_one(completions):
        for text in completions:
            yield len(text)

    assert score(one_by_one).flatten().tolist() == [1.0, 2.0, 3.0]
    assert score(lambda completions: map(len, completions)).flatten().tolist() == [1.0, 2.0, 3.0]


def test_none_in_an_array_of_objects_is_no_score():
    rewards = RewardFunctions([lambda **kwargs: np.array([1.0, None, 3.0], dtype=object), length])
    assert rewards(PROMPTS, COMPLETIONS)[:, 0].isnan().tolist() == [False, True, False]


def test_one_completion_with_token_rewards_in_a_tensor_is_no_row_of_scores():
    rewards = RewardFunctions(lambda **kwargs: torch.tensor([[1.0, 2.0, 3.0]]))
    scores = rewards.score(["a"], ["x"], completion_ids=[[1, 2, 3]])
    assert scores.per_func.tolist() == [[6.0]] and scores.dense.tolist() == [[1.0, 2.0, 3.0]]


async def each_later(**kwargs):
    yield 1.0


def test_a_list_with_weights_and_async_callables():
    rewards = RewardFunctions([length, slow_length, AsyncReward(), functools.partial(length)], [1.0, 0.5, -2.0, 0.0])
    scores = rewards(PROMPTS, COMPLETIONS)
    assert scores.tolist() == [[1, 1, 1, 1], [2, 2, 1, 2], [3, 3, 1, 3]]
    assert rewards.combine(scores).tolist() == [-0.5, 1.0, 2.5]
    assert rewards.names == ["length_0", "slow_length", "AsyncReward", "length_3"]  # no two alike in the logs


def test_async_rewards_work_where_an_event_loop_is_running_already():
    async def notebook_cell():
        return RewardFunctions(slow_length)(PROMPTS, COMPLETIONS)

    assert asyncio.run(notebook_cell()).flatten().tolist() == [1.0, 2.0, 3.0]


def test_none_leaves_a_row_to_the_other_functions():
    rewards = RewardFunctions([lambda **kwargs: [1.0, None, 3.0], length], [2.0, 1.0])
    scores = rewards(PROMPTS, COMPLETIONS)
    assert scores[1, 0].isnan()
    assert rewards.combine(scores).tolist() == [3.0, 2.0, 9.0]


@pytest.mark.parametrize(
    "answer, message",
    [
        ([1.0, 2.0], "reward function 'reward' returned 2 scores for 3 completions: return one score each."),
        (None, "reward function 'reward' returned None for 3 completions: return one score each."),
        (0.5, "reward function 'reward' returned 0.5 for 3 completions: return one score each."),
        ([1.0, math.nan, 0.0], "'reward' returned nan for completion 1: return a finite number, or None where"),
        ([1.0, 0.0, -math.inf], "'reward' returned -inf for completion 2: return a finite number"),
        (torch.tensor([1.0, 2.0, math.inf]), "'reward' returned inf for completion 2: return a finite number"),
        ([1.0, "2", 0.0], "reward function 'reward' returned '2' for completion 1: return a number."),
        ("abc", "reward function 'reward' returned 'a' for completion 0: return a number."),
        ([[1.0], 2.0, 0.0], "'reward' returned 2.0 for completion 1 and a list for completion 0: return a number for"),
        ([1.0, 2.0, (3.0,)], "'reward' returned 1.0 for completion 0 and a list for completion 2: return a number"),
        (np.ones((3, 1, 1)), "return a number."),
        ([{"a": 1}, 2.0, 0.0], "returned {'a': 1} for completion 0: return a number."),
        ({"a": [1.0, 2.0, 3.0]}, "'reward' returned a dict with 'a': return a list with the score of each"),
        ({"reward": [1, 2, 3], "len": [1, 2, 3]}, "returned a dict with 'reward', 'len': return a list with the score"),
        ({}, "returned a dict with no key: return a list"),
        ({"two\nlines": 1.0}, "returned a dict with 'two\\nlines': return a list"),
        ({1.0, 2.0, 3.0}, "returned a set, which has no order and equal scores once: return a list."),
        (each_later(), "returned an async generator: return a list."),
        ([1.0, 2.0, 1j], "returned 1j for completion 2: return a number."),
        ([1.0, np.str_("2"), 0.0], "returned '2' for completion 1: return a number."),
        ([1.0, Decimal("NaN"), 0.0], "returned nan for completion 1: return a finite number"),
        ([1.0, 1e39, 0.0], "returned 1e+39 for completion 1: return a finite number"),
        ([1.0, 10**400, 0.0], "returned inf for completion 1: return a finite number"),
        (torch.tensor(1.0), "returned tensor(1.) for 3 completions: return one score each."),
        (
            [[1.0], [2.0, 3.0], None],
            "'reward' returned 2 token rewards for completion 1, which has 1 tokens: return one",
        ),
        ([[1.0], [], [1.0]], "'reward' returned 0 token rewards for completion 1, which has 1 tokens: return one for"),
        (
            np.ones((3, 2)),
            "'reward' returned 2 token rewards for completion 0, which has 1 tokens: return one for each",
        ),
        (
            [[1.0], [math.nan], [1.0]],
            "'reward' returned nan for token 0 of completion 1: return a finite number, or None",
        ),
        ([[1.0], ["2"], [1.0]], "'reward' returned '2' for token 0 of completion 1: return a number."),
        ([[1.0], [[2.0]], [1.0]], "'reward' returned [2.0] for token 0 of completion 1: return a number."),
        (
            [[1.0], [2.0], None],
            "returned None for completion 2 of 3: at least one function must score every completion.",
        ),
        ([1.0, 2.0, None], "returned None for completion 2 of 3: at least one function must score every completion."),
    ],
)
def test_wrong_answers_are_named(answer, message):
    def reward(**kwargs):
        return answer

    with pytest.raises(UserError) as error:
        score(reward)
    assert message in str(error.value) and "\n" not in str(error.value)


IDS = [[1], [2, 3], [4, 5, 6]]


def per_token(completion_ids, **kwargs):
    return [[float(token) for token in ids] for ids in completion_ids]


def test_token_rewards_are_scores_and_dense_but_never_both():
    rewards = RewardFunctions([length, per_token], [2.0, 0.5])
    scores = rewards.score(PROMPTS, COMPLETIONS, completion_ids=IDS)
    assert scores.per_func.tolist() == [[1, 1], [2, 5], [3, 15]]  # a score of token rewards is their sum
    assert scores.sequence.tolist() == [2, 4, 6]  # of `length` alone
    assert scores.dense.tolist() == [[0.5, 0, 0], [1, 1.5, 0], [2, 2.5, 3]]
    assert {tensor.dtype for tensor in scores} == {torch.float32}
    total = scores.sequence + scores.dense.sum(1)
    assert total.tolist() == rewards.combine(scores.per_func).tolist() == [2.5, 6.5, 13.5]
    assert rewards(PROMPTS, COMPLETIONS, completion_ids=IDS).tolist() == scores.per_func.tolist()


def test_without_token_rewards_there_is_no_dense_part():
    scores = RewardFunctions([length, slow_length], [1.0, -2.0]).score(PROMPTS, COMPLETIONS)
    assert scores.dense is None and scores.to("cpu").dense is None
    assert scores.sequence.tolist() == [-1, -2, -3]


def test_token_rewards_alone_leave_the_sequence_part_at_zero_and_add_up():
    async def half(completion_ids, **kwargs):
        return [torch.full((len(ids),), 0.5) for ids in completion_ids]

    scores = RewardFunctions([per_token, half], [1.0, 2.0]).score(PROMPTS, COMPLETIONS, completion_ids=IDS)
    assert scores.sequence.tolist() == [0, 0, 0]
    assert scores.dense.tolist() == [[2, 0, 0], [3, 4, 0], [5, 6, 7]]
    assert scores.per_func[:, 1].tolist() == [0.5, 1.0, 1.5]


def test_a_row_without_token_rewards_is_left_to_the_other_functions():
    def two_of_three(completion_ids, **kwargs):
        return [None, np.array([1.0, 2.0]), (3.0, 4.0, 5.0)]

    rewards = RewardFunctions([two_of_three, lambda **kwargs: [7.0, None, 1.0]])
    scores = rewards.score(PROMPTS, COMPLETIONS, completion_ids=IDS)
    assert scores.per_func.isnan().tolist() == [[True, False], [False, True], [False, False]]
    assert scores.sequence.tolist() == [7, 0, 1]
    assert scores.dense.tolist() == [[0, 0, 0], [1, 2, 0], [3, 4, 5]]


def test_token_rewards_need_the_tokens():
    with pytest.raises(UserError, match="'<lambda>' returned token rewards, which need completion_ids"):
        RewardFunctions(lambda **kwargs: [[1.0]] * 3)(PROMPTS, COMPLETIONS)


def test_another_reward_of_evaluation_does_not_take_the_name_of_one_of_training():
    rewards = RewardFunctions([length, per_token])

    class Other:
        __name__ = "length"

        def __call__(self, completions):
            return [0.0] * len(completions)

    assert RewardFunctions([Other(), per_token, slow_length], beside=rewards).names == [
        "eval_length",
        "per_token",
        "slow_length",
    ]


def test_functions_with_their_weights():
    assert RewardFunctions([length, per_token], [2.0, -0.5]).formula == "2 × length - 0.5 × per_token"
    assert list(RewardFunctions([length, per_token], [2.0, 0.5]).weighted()) == [(length, 2.0), (per_token, 0.5)]


@pytest.mark.parametrize(
    "funcs, options, message",
    [
        ([], {}, "reward_funcs: give at least one callable, reward model or path."),
        (None, {"option": "eval_reward_funcs"}, "eval_reward_funcs: give at least one callable"),
        (7, {}, "reward_funcs: 7 is not a function, a model or a path."),
        (
            [length, length],
            {"reward_weights": [1.0]},
            "1 entries for 2 reward_funcs: give one each, in the order length, length",
        ),
        ([length], {"processing_classes": [None, None]}, "reward_processing_classes has 2 entries for 1 reward_funcs"),
        ("./no/such/folder", {}, "reward model: no folder at ./no/such/folder: check the path, or give a Hub id."),
    ],
)
def test_wrong_arguments_are_named(funcs, options, message):
    with pytest.raises(UserError) as error:
        RewardFunctions(funcs, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


# Reward models: an object, the path of a whole model, and the path of an adapter all give the scores of RewardScorer.


@pytest.fixture
def seqcls(tiny_config):
    tiny_config.num_labels = 1
    torch.manual_seed(0)
    return install_fp32_score(LlamaForSequenceClassification(tiny_config).eval())


def test_a_reward_model_object(seqcls, chat_tokenizer):
    rewards = RewardFunctions([seqcls, length], processing_classes=[chat_tokenizer, None])
    expected = RewardScorer(seqcls, chat_tokenizer)(PROMPTS, COMPLETIONS)
    assert rewards(PROMPTS, COMPLETIONS)[:, 0].tolist() == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_the_path_of_a_whole_model_with_its_normalization(seqcls, chat_tokenizer, tmp_path, as_path):
    seqcls.save_pretrained(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)
    RewardNormalization(mean=0.3, std=2.0, n=9, base_dtype="float32").save(tmp_path)
    raw = RewardScorer(seqcls, chat_tokenizer)(PROMPTS, COMPLETIONS)
    got = RewardFunctions(as_path(tmp_path))(PROMPTS, COMPLETIONS).flatten()
    torch.testing.assert_close(got, (torch.tensor(raw) - 0.3) / 2.0)


def test_the_path_of_a_reward_adapter(seqcls, chat_tokenizer, tmp_path):
    seqcls.config.name_or_path = seqcls.name_or_path = str(tmp_path / "base")
    seqcls.save_pretrained(tmp_path / "base")
    model = get_peft_model(seqcls, LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, "default", tmp_path / "adapter")
    chat_tokenizer.save_pretrained(tmp_path / "adapter")
    RewardNormalization(mean=-1.0, std=0.5, n=9, base_dtype="float32").save(tmp_path / "adapter")
    expected = RewardScorer(model.eval(), chat_tokenizer, mean=-1.0, std=0.5)(PROMPTS, COMPLETIONS)
    got = RewardFunctions(str(tmp_path / "adapter"))(PROMPTS, COMPLETIONS)
    assert got.flatten().tolist() == torch.tensor(expected).tolist()


def test_a_path_may_be_scored_by_weights_that_are_loaded_already(seqcls, chat_tokenizer, tmp_path):
    shared, asked = RewardScorer(seqcls, chat_tokenizer), []
    seqcls.save_pretrained(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)

    def share(path):
        asked.append(path)
        return shared if path == "somewhere/else" else None

    rewards = RewardFunctions(["somewhere/else", str(tmp_path), length], share=share)
    assert asked == ["somewhere/else", str(tmp_path)] and rewards.funcs[0] is shared
    assert rewards.funcs[1].model is not seqcls
    assert rewards(PROMPTS, COMPLETIONS)[:, 0].tolist() == shared(PROMPTS, COMPLETIONS)


def test_reward_models_move_to_the_device(seqcls, chat_tokenizer):
    rewards = RewardFunctions([length, seqcls, RewardEnsemble([RewardScorer(seqcls, chat_tokenizer)] * 2)],
                              processing_classes=[None, chat_tokenizer, None])  # fmt: skip
    assert rewards.to(torch.device("meta")) is rewards
    assert {parameter.device.type for parameter in seqcls.parameters()} == {"meta"}


def test_another_architecture_without_a_score_head_is_one_line(chat_tokenizer, tmp_path):
    from transformers import XLNetConfig, XLNetForSequenceClassification

    small = XLNetConfig(vocab_size=384, d_model=8, n_layer=1, n_head=1, d_inner=8, num_labels=1)
    XLNetForSequenceClassification(small).save_pretrained(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="XLNetForSequenceClassification has no linear `score` or `classifier` head"):
        RewardFunctions(str(tmp_path))
