"""Advantages, returns, losses, metrics and weights are equal to those of a second PPO (`reference_ppo.py`)."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, TrainerCallback

from tests.ppo.reference_ppo import ReferencePPO

OPTIONS = {
    "temperature": 0.7,
    "kl_coef": 0.3,
    "gamma": 0.97,
    "gae_lambda": 0.9,
    "vf_coef": 0.5,
    "clip_range": 0.03,  # both clips bind
    "value_clip_range": 0.05,
    "entropy_coef": 0.01,
    "reward_clip": 1.0,
    "missing_eos_penalty": 0.75,
    "value_learning_rate": 3e-2,
    "max_steps": 8,
    "logprobs_chunk_size": 5,
    "critic": "head",
}


class Recorder(TrainerCallback):
    """Records what a second PPO cannot compute: completions, and the order of the rows in each pass."""

    def __init__(self, dense=False):
        self.rollouts, self.orders, self.weights, self.dense = [], {}, [], dense
        self.kept = {}  # what PPOTrainer made of each rollout

    def reward(self, prompts, completions, completion_ids, **kwargs):
        scores = [float(sum(ids) % 7 - 3) for ids in completion_ids]
        if self.dense:
            scores = [[float(token % 3 - 1) for token in ids] for ids in completion_ids]
        self.rollouts.append((prompts, completion_ids, scores))
        return scores

    def on_step_end(self, args, state, control, model, **kwargs):
        self.orders.setdefault(len(self.rollouts) - 1, self.trainer.ppo.rollout.order)
        self.kept[len(self.rollouts) - 1] = self.trainer.ppo.rollout
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})


def run(make_trainer, **options):
    recorder = Recorder(dense=options.pop("dense", False))
    trainer = make_trainer(reward_funcs=recorder.reward, callbacks=[recorder], **(OPTIONS | options))
    recorder.trainer, start = trainer, copy.deepcopy(trainer.model)
    trainer.train()
    return recorder, trainer, start


SMALL_STEPS = {"max_grad_norm": 100.0, "adam_epsilon": 1e-2}  # an Adam that is not indifferent to the loss's scale
KINDS = {
    # Clipping binds; rounding errors of tiny gradients do not decide Adam's sign.
    "clipped": {"max_grad_norm": 0.1, "adam_epsilon": 1e-5},
    "head": SMALL_STEPS,
    "adapter": {"critic": "adapter"} | SMALL_STEPS,
    "kl in the loss": {"kl_placement": "loss", "critic": "adapter"} | SMALL_STEPS,
    "k3 in the loss": {"kl_placement": "loss", "kl_estimator": "k3"} | SMALL_STEPS,
    "shaped": {"normalize_rewards": True, "reward_scale": 0.5, "length_penalty": 0.1, "length_target": 3} | SMALL_STEPS,
    "dense": {"dense": True, "reward_scale": 0.5} | SMALL_STEPS,
    "sampler": {"top_k": 6, "importance_sampling_correction": True, "importance_sampling_cap": 0.9} | SMALL_STEPS,
    "ptx": {"ptx_coef": 0.3, "ptx_batch_size": 3, "max_tokens_per_batch": 24} | SMALL_STEPS,
    "model": {"critic": "model"} | SMALL_STEPS,
}


@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_metrics_and_weights_of_every_step_equal_the_reference(
    make_trainer, chat_tokenizer, tiny_config, kind
):
    options, texts = dict(KINDS[kind]), None
    if kind == "ptx":
        lines = ["A fox is quick and brown.", "Many words!", "The garden, on a sunny day", "happy people there"]
        options["ptx_dataset"] = Dataset.from_dict({"text": lines})
        texts = [(ids[:1], ids[1:]) for ids in chat_tokenizer(lines)["input_ids"]]
    if kind == "model":
        torch.manual_seed(1)
        options["value_model"] = LlamaForCausalLM(tiny_config)
    recorder, trainer, start = run(make_trainer, **options)
    lengths = [len(ids) for _, completions, _ in recorder.rollouts for ids in completions]
    stops = trainer.tools.sampling.stop_ids
    stopped = [ids[-1] in stops for _, completions, _ in recorder.rollouts for ids in completions]
    assert len(recorder.rollouts) == 2 and len(set(lengths)) > 3 and 0 < sum(stopped) < len(stopped)
    reference = ReferencePPO(start, chat_tokenizer, recorder, stops, trainer.args, trainer.critic, texts).run()
    expected, steps, made = reference.weights, reference.metrics, reference.rollouts
    assert len(expected) == len(recorder.weights) == 8
    for step, (got, wanted) in enumerate(zip(recorder.weights, expected, strict=True)):
        assert got.keys() == wanted.keys() and any("value_head" in name for name in got)
        for name in got:
            torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-5, msg=f"step {step}: {name}")
    change = max((recorder.weights[-1][name] - weight).abs().max() for name, weight in recorder.weights[0].items())
    assert change > 1e-2  # a thousand times the tolerance
    for number, rows in enumerate(made):
        for row, wanted in enumerate(rows):
            for name, values in wanted.items():
                got = getattr(recorder.kept[number], name)[row]
                torch.testing.assert_close(got[: len(values)], values, rtol=0, atol=1e-5, msg=f"{number} {row} {name}")
                assert name == "advantages" or not got[len(values) :].any()
    logs = [log for log in trainer.state.log_history if "loss/policy_avg" in log]
    for step, (log, metrics) in enumerate(zip(logs, steps, strict=True)):
        for name, value in metrics.items():
            assert log[name] == pytest.approx(value, abs=1e-5), (step, name)
    for number, log in enumerate(log for log in logs if "objective/kl" in log):
        kl = sum((row["old_logprobs"] - row["ref_logprobs"]).sum() for row in made[number]) / len(made[number])
        assert log["objective/kl"] == pytest.approx(float(kl), abs=1e-5)
    assert number == 1 and abs(float(kl)) > 1e-3
    assert max(metrics["policy/clipfrac_avg"] for metrics in steps) > 0.05
    assert max(metrics["val/clipfrac_avg"] for metrics in steps) > 0.05


SGD = {"max_steps": 4, "optim": "sgd", "max_grad_norm": 1e3, "learning_rate": 0.1}  # the loss's scale shows


@pytest.mark.parametrize("critic", ["head", "adapter"])
@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"max_tokens_per_batch": 30},
        {"max_tokens_per_batch": 1, "activation_checkpointing": True},
        {"joint_scoring": True},
        {"logprobs_chunk_size": 1000, "joint_scoring": True, "max_tokens_per_batch": 40},
    ],
)
def test_batching_changes_nothing(make_trainer, critic, options):
    whole, *_ = run(make_trainer, critic=critic, **SGD)
    parts, *_ = run(make_trainer, critic=critic, **(SGD | options))
    assert parts.rollouts[0] == whole.rollouts[0]
    for got, expected in zip(parts.weights, whole.weights, strict=True):
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5)


def test_the_policy_s_first_step_is_the_same_with_every_critic(make_trainer, tiny_config):
    # Values are zero at first and the critic's gradient does not reach the policy: only later steps may differ.
    steps = {}
    torch.manual_seed(1)
    value_model = LlamaForCausalLM(tiny_config)
    for critic in ("head", "adapter", "model"):
        options = SGD | {"critic": critic, "max_steps": 1} | ({"value_model": value_model} if critic == "model" else {})
        recorder, *_ = run(make_trainer, **options)
        steps[critic] = {name: weight for name, weight in recorder.weights[0].items() if ".default." in name}
    assert steps["head"].keys() == steps["adapter"].keys() == steps["model"].keys() and len(steps["head"]) > 20
    for name, weight in steps["head"].items():
        torch.testing.assert_close(steps["adapter"][name], weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(steps["model"][name], weight, rtol=0, atol=1e-6)
