"""A reward that does not differ between completions is said once, with its cause."""

import json
import random
import statistics
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from datasets import Dataset
from transformers import TrainerState
from transformers.trainer_callback import TrainerControl

from hf_rlhf_ext.metrics.plots import plot_ppo_run
from hf_rlhf_ext.ppo.evaluation import EvaluatedCompletion
from hf_rlhf_ext.ppo.meter import Meter
from hf_rlhf_ext.ppo.ranks import Ranks
from hf_rlhf_ext.ppo.reward_spread import THE_SUM, RewardSpread, Spread, problems
from hf_rlhf_ext.ppo.rollout import CompletionTable

NAN = float("nan")


def spreads(**rollouts):
    """What is known after rollouts: for each reward a list of lists of scores, NaN for None."""
    known = {}
    for name, scores_of_rollouts in rollouts.items():
        known[name] = spread = Spread()
        for scores in scores_of_rollouts:
            scored = [score for score in scores if score == score]
            mean = sum(scored) / len(scored) if scored else None
            std = (sum((score - mean) ** 2 for score in scored) / len(scored)) ** 0.5 if scored else None
            spread.add(mean, std, len(scores))
    return known


def varied(n=10, seed=0):
    rng = random.Random(seed)
    return [[rng.random() for _ in range(8)] for _ in range(n)]


def always(value, n=10):
    return [[value] * 8] * n


def test_rewards_that_differ_are_left_in_peace():
    mostly_none = [[NAN] * 7 + [0.5], [NAN] * 7 + [1.0]] * 5
    assert problems(spreads(a=varied(), b=varied(seed=1), c=mostly_none)) == {}
    assert problems(spreads(a=[[0.1 * k] for k in range(50)])) == {}  # rollouts of one completion have no deviation
    assert problems(spreads(a=always(0.0, 3) + [[0.0] * 7 + [1.0]] + always(0.0, 20))) == {}  # rare, and alone


@pytest.mark.parametrize(
    ("rollouts", "expected", "words"),
    [
        ({"a": always(0.0)}, "constant/a", ["'a' gave every completion 0, all 80 so far", "learns nothing", "key"]),
        ({"a": always(0.3)}, "constant/a", ["every completion 0.3,"]),
        ({"a": always(1.0), "b": varied()}, "constant/a", ["adds a constant"]),
        ({"a": always(NAN), "b": varied()}, "none/a", ["returned None for all 80 completions", "column"]),
        ({"a": varied() + always(1.0, 6), "b": varied(16)}, "flat/a", ["last 6 rollouts", "differed before"]),
        ({"a": varied(), "b": varied(seed=1), THE_SUM: always(0.0)}, "sum", ["reward_weights"]),
    ],
)
def test_a_reward_that_does_not_differ_is_one_line(rollouts, expected, words):
    found = problems(spreads(**rollouts))
    assert list(found) == [expected]
    line = found[expected]
    assert "\n" not in line and line[-1] not in ".?" and all(word in line for word in words), line


def test_a_few_completions_are_no_sign():
    assert problems(spreads(a=always(0.0, 3))) == {}
    assert list(problems(spreads(a=always(0.0, 4)))) == ["constant/a"]
    assert problems(spreads(a=varied() + always(1.0, 4), b=varied(14))) == {}
    assert list(problems(spreads(a=always(0.0, 1)), enough=4)) == ["constant/a"]
    assert problems(spreads(a=[[0.0] * 4])) == {}
    saturated = spreads(a=[[0.0, 1.0]] + [[1.0] * 2] * 6, b=varied(7))
    assert problems(saturated, enough=4) == {}  # also at the end of a run


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (lambda prompt, text: float(len(prompt)), ["prompts/a"]),
        (lambda prompt, text: float(len(prompt) + len(text)), []),
    ],
)
def test_a_reward_that_reads_the_prompt_alone_is_said(score, expected):
    spread = Spread()
    for k in range(6):
        prompts = ["a", "a", "bb", "bb", "ccc", "ccc", [{"role": "user"}], "dddd", "dddd", "eeeee"]
        texts = ["x", "xx" * k, "y", "yy" * k, "z", "zz" * k, "z", "same", "same", "z"]
        scores = [score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        spread.add(sum(scores) / 10, 1.0, 10)
        spread.add_prompts(prompts, texts, scores)
    assert spread.of_prompts == 36  # completions that are alike tell nothing
    assert list(problems({"a": spread})) == expected


@pytest.mark.parametrize(("n_groups", "expected"), [(2, []), (20, []), (80, ["prompts/a"])])
def test_right_or_wrong_is_often_the_same_for_a_prompt(n_groups, expected):
    spread = Spread()
    for k in range(n_groups):
        spread.add(0.5, 0.5, 4)
        spread.add_prompts([f"a{k}"] * 2 + [f"b{k}"] * 2, list("wxyz"), [0.0, 0.0, 1.0, 1.0])
    for enough in (4, 32):  # at the end of a run, and during it
        assert list(problems({"a": spread}, enough=enough)) == expected


def test_success_that_comes_later_takes_the_warning_back(caplog):
    callback = RewardSpread()
    for index in range(6):
        rollout(callback, index, [0.0] * 8)
    (line,) = callback.lines_that_hold()
    assert "all 48 so far" in line and "all 32 so far" in caplog.text
    rollout(callback, 6, [0.0] * 7 + [1.0])
    assert callback.lines_that_hold() == []
    rollout(callback, 7, [0.0] * 8)
    callback.on_train_end(None, TrainerState(), TrainerControl())
    assert callback.lines_that_hold() == [] and len(caplog.records) == 1


SIZES = SimpleNamespace(rollout_size=4, world_size=2)


def rollout(callback, index, scores):
    state = TrainerState()
    table = CompletionTable(["p"] * 8, [str(k) for k in range(8)], {"f": scores, "g": list(range(8))}, {})
    mean = sum(scores) / 8
    metrics = {"episode": 8 * (index + 1), "objective/scores": mean, "objective/scores_std": 1.0}
    std = statistics.pstdev(scores)
    metrics |= {"rewards/f/mean": mean, "rewards/f/std": std, "rewards/g/mean": 3.5, "rewards/g/std": 2.0}
    callback.on_rollout(SIZES, state, TrainerControl(), metrics=metrics, rollout_index=index, completions=table)


def test_it_is_said_once_also_in_a_resumed_run(caplog):
    callback = RewardSpread()
    for index in range(30):
        if index % 5 == 0:  # from a checkpoint
            callback = RewardSpread.from_state(json.loads(json.dumps(callback.state())))
        rollout(callback, index, [0.0] * 8)
    callback.on_train_end(None, TrainerState(), TrainerControl())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and said[0].startswith("step 0, rollout 3: reward 'f' gave every completion 0, all 32")
    assert list(callback.lines) == ["constant/f"]


def test_a_reward_of_evaluation_alone_that_is_constant_is_said(caplog):
    callback = RewardSpread()
    rollout(callback, 0, [0.0] * 8)
    rows = [EvaluatedCompletion("p", "c", 1.0, {"f": 1.0, "gold": 2.0}, 0.0, 0.0, 1, True) for _ in range(40)]
    for _ in range(2):
        callback.on_eval_completions(None, TrainerState(), TrainerControl(), rows=rows)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "evaluation: reward 'gold' gave every completion 2, all 40" in said[0]
    assert "learns nothing" not in said[0]
    assert len(callback.lines_that_hold()) == 1


def test_the_state_is_json():
    assert Spread(**json.loads(json.dumps(asdict(Spread(1, 1, 0.5, True))))) == Spread(1, 1, 0.5, True)


def test_a_mean_is_over_the_rollouts_that_have_a_value():
    meter = Meter(Ranks(Accelerator(cpu=True)))
    meter.leave_open("a")
    meter.observe("a", 2.0)
    meter.leave_open("b")
    means = meter.means()
    assert means["a"] == 2.0 and means["b"] != means["b"]
    assert meter.means() == {}


@pytest.mark.slow
def test_a_run_says_that_a_reward_teaches_nothing(make_trainer, caplog, tmp_path):
    def never(completions, **columns):
        return [float("please" in text) for text in completions]

    trainer = make_trainer(reward_funcs=never, max_steps=6, num_ppo_epochs=1, logging_steps=1)
    trainer.train()
    (line,) = trainer.reward_warnings
    assert "'never' gave every completion 0" in line
    said = [record.getMessage() for record in caplog.records if "'never'" in record.getMessage()]
    assert len(said) == 1
    # The returns are all 0 in the first rollout, when the policy is the reference.
    first = trainer.state.log_history[0]["val/explained_variance"]
    assert first != first
    plot_ppo_run(trainer.state.log_history, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def _pairs(completions, answers):
    return zip(completions, answers, strict=True)


def test_a_short_run_says_so_at_its_end(make_trainer, caplog):
    rows = Dataset.from_dict({"prompt": ["a sunny day"] * 8, "answer": [None] * 8})

    def graded(completions, answer):
        return [None if expected is None else float(text == expected) for text, expected in _pairs(completions, answer)]

    def short(completions):
        return [-float(len(text)) for text in completions]

    trainer = make_trainer(
        reward_funcs=[graded, short], train_dataset=rows, max_steps=1, num_ppo_epochs=1, reward_weights=[1.0, 0.5]
    )
    trainer.train()
    assert trainer.rewards.formula == "1 × graded + 0.5 × short"
    (line,) = trainer.reward_warnings
    assert "'graded' returned None for all" in line and line in caplog.text
