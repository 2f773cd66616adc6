"""Each health warning appears for a run with the problem, with its numbers, and for no healthy run."""

import json
import math
import random
import re
from dataclasses import fields

import pytest

from hf_rlhf_ext.metrics.names import find_metric
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.diagnostics import diagnose, due

NAN = math.nan


def healthy(n=20, seed=0, **changes):
    """Metrics of `n` rollouts of a run that learns; `changes` are functions of the rollout's number."""
    rng = random.Random(seed)
    history = []
    for i in range(n):
        metrics = {
            "objective/kl": 0.3 * i + rng.gauss(0, 0.3),
            "objective/entropy": 80 - i + rng.gauss(0, 2),
            "completions/mean_length": 40 + rng.gauss(0, 3),
            "completions/stopped_frac": 0.9,
            "val/explained_variance": min(0.6, -0.3 + 0.1 * i),
            "policy/clipfrac_avg": 0.15 + rng.gauss(0, 0.03),
            "objective/scores": 0.1 * i,
            "objective/scores_std": 1.0 - 0.03 * i,
            "rewards/proxy/mean": 0.1 * i,
            "rewards/proxy/std": 1.0,
            "rewards/clipped_frac": 0.2,
            "sampling/logprob_mismatch": 0.013,
        }
        if i % 4 == 3:
            metrics |= {"eval_objective/scores": 0.1 * i, "eval_rewards/proxy/mean": 0.1 * i}
            metrics["eval_rewards/gold/mean"] = 0.05 * i
        history.append(metrics | {name.replace("__", "/"): change(i) for name, change in changes.items()})
    return history


def evaluated(golds, proxies=None, std=None):
    """One rollout per evaluation."""
    history = []
    for i, gold in enumerate(golds):
        metrics = {"rewards/proxy/mean": 0.0, "eval_rewards/gold/mean": gold}
        metrics["eval_objective/scores"] = metrics["eval_rewards/proxy/mean"] = proxies[i] if proxies else float(i)
        history.append(metrics | ({} if std is None else {"eval_rewards/gold/std": std}))
    return history


@pytest.mark.parametrize("n", [0, 1, 2, 5, 9, 10, 11, 20, 200])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_healthy_run_is_left_in_peace_at_any_length(n, seed):
    gentle = {"objective__entropy": lambda i: 80 - i / 10, "objective__scores_std": lambda i: 1 - i / 400}
    assert diagnose(healthy(n, seed, **gentle), eval_completions=64) == {}


def test_the_metrics_read_are_ones_that_the_trainer_explains():
    assert all(find_metric(name) for metrics in healthy() for name in metrics)


FAULTS = {
    "entropy_collapse": {"objective__entropy": lambda i: 80.0 if i < 15 else 8.0},
    "length_drift": {"completions__mean_length": lambda i: 20.0 + 5 * i, "objective__entropy": lambda i: 40.0 + 10 * i},
    "value": {"val__explained_variance": lambda i: -0.2},
    "clip_fraction": {"policy__clipfrac_avg": lambda i: 0.1 if i < 17 else 0.5},
    "reward_saturation": {"objective__scores_std": lambda i: 1.0 if i < 15 else 0.05},
    "reward_clip": {"rewards__clipped_frac": lambda i: 0.95},
    "overoptimization": {"eval_rewards__gold__mean": lambda i: 1 - 0.05 * i},
    "negative_kl": {"objective__kl": lambda i: -1.0 + 0.1 * (i % 2)},
}
WORDS = {
    "entropy_collapse": ["from 2 to 0.2 nats per token", "kl_coef", "entropy_coef", "learning_rate"],
    "length_drift": ["from 30 to 105 tokens (90% of them", "length_penalty", "length_target", "missing_eos_penalty"],
    "value": ["-0.20 over the last 5", "value_learning_rate", "vf_coef", "normalize_rewards"],
    "clip_fraction": ["50% of tokens", "clip_range", "learning_rate", "num_ppo_epochs", "early_stop_kl"],
    "reward_saturation": ["deviation 0.05, 1 at the start", "kl_coef"],
    "reward_clip": ["95% of scores", "Raise reward_clip", "normalize_rewards"],
    "overoptimization": ["gold fell from its best 1 to 0.05", "rose from 0 to 1.9", "kl_coef", "kl_target", "max_kl"],
    "negative_kl": [
        "is -0.94 nats",
        "differ by 0.013 nats per token) because of rounding",
        "importance_sampling_correction",
    ],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_said_in_one_line_with_its_numbers_and_options(fault):
    changes = {"completions__mean_length": lambda i: 40.0, "eval_objective__scores": lambda i: 0.1 * i}
    found = diagnose(healthy(**(changes | FAULTS[fault])))
    assert list(found) == [fault]
    assert "\n" not in found[fault] and len(found[fault]) < 320 and found[fault][-1] not in ".:,"
    for words in WORDS[fault]:
        assert words in found[fault], found[fault]


def test_every_option_that_a_remedy_names_exists():
    lines = [line for fault in FAULTS.values() for line in diagnose(healthy(**fault), top_k=50).values()]
    lines += diagnose([{"completions/mean_length": 40.0 / k} for k in [1] * 5 + [10] * 5]).values()
    lines += diagnose([{"objective/kl": -0.5}] * 3).values()
    words = {word for line in lines for word in re.findall(r"(?<![/\w])[a-z]+(?:_[a-z]+)+", line)}
    assert len(words) > 12
    assert words <= {option.name for option in fields(PPOConfig)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_is_over_is_not_said(fault):
    # The same metrics followed by twenty good rollouts: only the current state counts.
    changes = {"completions__mean_length": lambda i: 40.0, "eval_objective__scores": lambda i: 0.1 * i}
    good = healthy(n=20, completions__mean_length=lambda i: 40.0, eval_rewards__gold__mean=lambda i: 5.0 + i)
    start = healthy(n=5, completions__mean_length=lambda i: 40.0)
    assert diagnose(start + healthy(**(changes | FAULTS[fault])) + good) == {}


@pytest.mark.parametrize(
    "name, ratio, fires",
    [
        ("objective/entropy", 0.21, False),
        ("objective/entropy", 0.19, True),
        ("completions/mean_length", 0.51, False),
        ("completions/mean_length", 0.49, True),
        ("completions/mean_length", 1.99, False),
        ("completions/mean_length", 2.01, True),
        ("objective/scores_std", 0.11, False),
        ("objective/scores_std", 0.09, True),
    ],
)
def test_thresholds_relative_to_the_start(name, ratio, fires):
    history = [{name: 10.0, "completions/mean_length": 10.0} for _ in range(5)]
    history += [history[0] | {name: 10.0 * ratio} for _ in range(5)]
    assert bool(diagnose(history)) == fires


@pytest.mark.parametrize("name, bad, good", [("policy/clipfrac_avg", 0.41, 0.39), ("rewards/clipped_frac", 0.91, 0.89)])
def test_thresholds_of_what_harms_at_once(name, bad, good):
    assert len(diagnose([{name: bad}] * 3)) == 1
    assert diagnose([{name: bad}] * 2) == {} and diagnose([{name: good}] * 3) == {}


def test_a_rollout_that_is_not_trained_on_yet_has_no_clip_fraction():
    assert list(diagnose([{"policy/clipfrac_avg": 0.5}] * 3 + [{}])) == ["clip_fraction"]
    assert diagnose([{"policy/clipfrac_avg": 0.5}] * 3 + [{}, {}]) == {}
    assert diagnose([{"policy/clipfrac_avg": x} for x in (0.9, 0.39, 0.39, 0.39)]) == {}  # the last three count


def test_the_critic_has_a_warm_up():
    blind = {"val/explained_variance": -0.01}
    assert diagnose([blind] * 9) == {} and list(diagnose([blind] * 10)) == ["value"]
    assert diagnose([blind] * 9 + [{"val/explained_variance": 0.05}]) == {}  # the mean of five is above zero


def test_shorter_completions_are_no_collapse_of_entropy():
    # A tenth of the entropy in a tenth of the tokens: the same entropy per token.
    history = [{"objective/entropy": 80.0 / k, "completions/mean_length": 40.0 / k} for k in [1] * 5 + [10] * 5]
    assert list(diagnose(history)) == ["length_drift"]
    assert "favor short completions" in diagnose(history)["length_drift"]


@pytest.mark.parametrize(
    "golds, proxies, fires",
    [
        ([1.0, 0.8, 0.6], [0.0, 1.0, 2.0], True),
        ([1.0, 0.8], [0.0, 1.0], False),  # two evaluations are not enough
        ([0.5, 1.0, 0.6], [0.0, 1.0, 2.0], False),  # one low evaluation is not enough
        ([0.5, 1.0, 0.9, 0.8], [0.0, 1.0, 2.0, 3.0], True),
        ([0.5, 1.0, 0.4, 1.1], [0.0, 1.0, 2.0, 3.0], False),  # it recovered
        ([1.0, 0.8, 0.6], [2.0, 1.0, 0.0], False),  # both fall: something else is wrong
        ([1.0, 0.8, NAN, 0.6], [0.0, 1.0, 1.5, 2.0], True),
        ([1.0, NAN, NAN, 0.6], [0.0, 1.0, 1.5, 2.0], False),
    ],
)
def test_proxy_up_and_gold_down(golds, proxies, fires):
    assert list(diagnose(evaluated(golds, proxies))) == ["overoptimization"] * fires


def test_a_fall_within_the_noise_of_the_evaluation_is_not_said():
    history = evaluated([1.0, 0.8, 0.7], std=0.5)  # two standard errors of a difference: 2·0.5·√(2/n)
    assert diagnose(history, eval_completions=49) == {}  # 0.202 > 0.2
    assert list(diagnose(history, eval_completions=51)) == ["overoptimization"]  # 0.198


def test_a_reward_that_is_trained_on_is_no_gold_reward():
    history = [h | {"rewards/gold/mean": 0.0} for h in evaluated([1.0, 0.8, 0.6])]
    assert diagnose(history) == {}


def test_negative_kl_names_the_sampling_options_that_cause_it():
    history = [{"objective/kl": -0.5}] * 3
    truncated = diagnose(history, temperature=0.7, top_k=50, top_p=0.9)["negative_kl"]
    assert "(temperature=0.7, top_k=50, top_p=0.9). Set top_k=0 and top_p=1.0" in truncated
    assert "bf16 to false" in diagnose(history)["negative_kl"]


@pytest.mark.parametrize(
    "kl",
    [
        [-0.09] * 5,  # within the tolerance
        [-0.5, -0.5],  # too few
        [-2.0, 1.5, -1.8, 1.0, -0.4],  # k1 estimates scatter: -0.34 ± 0.7
        [-5.0, -5.0, 0.5, 0.4, 0.5, 0.6, 0.5],  # long ago
    ],
)
def test_a_k1_estimate_may_be_a_little_negative(kl):
    assert diagnose([{"objective/kl": x} for x in kl]) == {}


@pytest.mark.parametrize("nonsense", [NAN, math.inf, -math.inf])
def test_metrics_that_are_not_finite_are_left_out(nonsense):
    history = healthy()
    assert diagnose([dict.fromkeys(metrics, nonsense) for metrics in history]) == {}
    history[2] = history[-2] = dict.fromkeys(history[0], nonsense)
    assert diagnose(history) == {}
    clipped = [{"policy/clipfrac_avg": 0.5}] * 2 + [{"policy/clipfrac_avg": nonsense}]
    assert diagnose(clipped) == {}  # two of three say nothing


def test_lines_are_said_again_only_after_some_rollouts_and_the_state_is_json():
    said, spoken = {}, []
    for rollout in range(12):
        said = json.loads(json.dumps(said))
        warnings = {"a": "line a"} | ({"b": "line b"} if rollout in (3, 4, 9) else {})
        spoken.append(due(warnings, said, rollout, 5))
    expected = {0: ["line a"], 3: ["line b"], 5: ["line a"], 9: ["line b"], 10: ["line a"]}
    assert spoken == [expected.get(rollout, []) for rollout in range(12)]
    assert said == {"a": 10, "b": 9}
