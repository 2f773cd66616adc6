"""`critic="none"`: the baseline of a completion is the mean return of the other completions of its prompt (RLOO)."""

import copy
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, TrainerCallback

from hf_rlhf_ext.checkpointing import broken_file, is_complete
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.metrics.names import find_metric
from hf_rlhf_ext.modeling.loading import load_base_model
from hf_rlhf_ext.ppo.advantages import are_scores_equal, completion_mask, leave_one_out_advantages, token_rewards
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.diagnostics import diagnose
from tests.ppo import tiny_run
from tests.ppo.reference_ppo import ReferencePPO
from tests.ppo.test_distributed import run as run_processes  # noqa: F401  # a fixture
from tests.ppo.test_resume import StopAt, assert_same, everything
from tests.ppo.test_update import Recorder

NONE = {"critic": "none", "num_generations": 2}
OF_A_CRITIC = ("val/explained_variance", "loss/value_avg", "val/clipfrac_avg", "value_grad_norm", "lr_value")


# ---- The formula ----


def brute_force(rewards, lengths, per_prompt):
    """The definition, one completion at a time."""
    returns = [float(row[:length].sum()) for row, length in zip(rewards, lengths.tolist(), strict=True)]
    advantages = torch.zeros_like(rewards)
    for index, own in enumerate(returns):
        first = index - index % per_prompt
        others = [returns[other] for other in range(first, first + per_prompt) if other != index]
        advantages[index, : lengths[index]] = own - sum(others) / len(others)
    return advantages


@pytest.mark.parametrize("per_prompt", [2, 3, 5])
def test_the_baseline_is_the_mean_return_of_the_others(per_prompt):
    rows, width = 4 * per_prompt, 7
    generator = torch.Generator().manual_seed(per_prompt)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    rewards = torch.randn(rows, width, generator=generator, dtype=torch.float64)  # also in the padding
    mask = completion_mask(lengths, width)
    advantages = leave_one_out_advantages(rewards, mask, per_prompt=per_prompt)
    assert advantages.dtype == torch.float64
    torch.testing.assert_close(advantages, brute_force(rewards, lengths, per_prompt), rtol=0, atol=1e-12)
    # That of TRL's RLOOTrainer (1.16), of whole completions: the score minus β times the KL of the completion.
    grouped = (rewards * mask).sum(1).view(-1, per_prompt)
    baselines = (torch.nansum(grouped, dim=1, keepdim=True) - grouped) / (per_prompt - 1)
    torch.testing.assert_close(advantages[:, 0], (grouped - baselines).flatten(), rtol=0, atol=1e-12)
    # No prompt gets more than it loses.
    torch.testing.assert_close(
        advantages[:, 0].view(-1, per_prompt).sum(1), torch.zeros(4).double(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("is_dense", [False, True])
def test_a_return_has_score_kl_and_token_rewards(is_dense):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, generator=generator, dtype=torch.float64)
    kl = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([1, 4, 2, 3, 3, 1])
    dense = torch.randn(6, 4, generator=generator, dtype=torch.float64) if is_dense else None
    mask = completion_mask(lengths, 4)
    rewards = token_rewards(scores, kl, lengths, kl_coef=0.3, dense=dense)
    returns = scores - 0.3 * (kl * mask).sum(1)
    if is_dense:
        returns = returns + (dense * mask).sum(1)
    first, second, third = returns[:3].tolist()
    advantages = leave_one_out_advantages(rewards, mask, per_prompt=3)
    assert advantages[0, 0] == pytest.approx(first - (second + third) / 2, abs=1e-12)
    assert advantages[1].tolist() == pytest.approx([second - (first + third) / 2] * 4, abs=1e-12)


def test_equal_returns_have_an_advantage_of_exactly_zero():
    mask = torch.ones(6, 3, dtype=torch.bool)
    rewards = torch.full((6, 3), 33.3)  # 3 · 99.9 / 3 is not 99.9 in fp32
    rewards[3:] += 0.1
    assert not leave_one_out_advantages(rewards, mask, per_prompt=3).any()
    scores = torch.tensor([100.3, 100.3 + 1e-5, 0.0, 1e-3, float("-5"), -5.0])
    assert are_scores_equal(scores, per_prompt=2).tolist() == [True, False, True]


# ---- The trainer ----


def trained(make_trainer, **options):
    dense = options.pop("dense", False)
    recorder = Recorder(dense=dense)
    trainer = make_trainer(reward_funcs=recorder.reward, callbacks=[recorder], **(NONE | options))
    recorder.trainer, start = trainer, copy.deepcopy(trainer.model)
    trainer.train()
    return recorder, trainer, start


BRUTE = {
    "kl_coef": 0.4,
    "max_steps": 8,
    "whiten_advantages": False,
    "reward_scale": 0.5,
    "per_device_train_batch_size": 4,
}


@pytest.mark.parametrize(
    "options", [{}, {"num_generations": 4, "reward_clip": 1.0}, {"dense": True}, {"kl_placement": "loss"}]
)
def test_advantages_of_a_run_are_those_of_brute_force(make_trainer, options):
    recorder, trainer, _ = trained(make_trainer, **(BRUTE | options))
    per_prompt = trainer.args.num_generations
    kept = recorder.kept[1]  # the second rollout, in which the policy is no longer the reference
    assert kept.values is None and kept.returns is None and (kept.old_logprobs != kept.ref_logprobs).any()
    prompts, completions, scores = recorder.rollouts[1]
    lengths = torch.tensor([len(ids) for ids in completions])
    assert prompts[0::per_prompt] == prompts[1::per_prompt] and len(set(lengths.tolist())) > 1
    rewards = torch.zeros(kept.advantages.shape, dtype=torch.float64)
    for row, score in enumerate(scores):
        n = int(lengths[row])
        if options.get("dense"):
            rewards[row, :n] = torch.tensor(score, dtype=torch.float64) * 0.5
        else:
            clip = options.get("reward_clip") or 100.0
            rewards[row, n - 1] = max(-clip, min(clip, 0.5 * score))
        if options.get("kl_placement") != "loss":
            rewards[row, :n] -= 0.4 * (kept.old_logprobs - kept.ref_logprobs)[row, :n].double()
    expected = brute_force(rewards, lengths, per_prompt)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(kept.advantages.double(), expected, rtol=0, atol=1e-5)


EXACT = {"temperature": 0.7, "kl_coef": 0.3, "clip_range": 0.03, "entropy_coef": 0.01, "missing_eos_penalty": 0.75}
EXACT |= {"max_steps": 8, "logprobs_chunk_size": 5, "max_grad_norm": 100.0, "adam_epsilon": 1e-2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_generations": 4, "max_grad_norm": 0.1, "adam_epsilon": 1e-5},  # clipping binds
        {"kl_placement": "loss", "joint_scoring": True, "max_tokens_per_batch": 30},
        {"dense": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"top_k": 6, "importance_sampling_correction": True, "importance_sampling_cap": 0.9, "normalize_rewards": True},
    ],
)
def test_every_step_equals_the_reference(make_trainer, chat_tokenizer, options):
    recorder, trainer, start = trained(make_trainer, **(EXACT | options))
    stops = trainer.tools.sampling.stop_ids
    reference = ReferencePPO(start, chat_tokenizer, recorder, stops, trainer.args, "none").run()
    assert len(reference.weights) == len(recorder.weights) == 8
    for step, (got, wanted) in enumerate(zip(recorder.weights, reference.weights, strict=True)):
        assert got.keys() == wanted.keys() and not any("value" in name for name in got)
        for name in got:
            torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-5, msg=f"step {step}: {name}")
    change = max((recorder.weights[-1][name] - weight).abs().max() for name, weight in recorder.weights[0].items())
    assert change > 5e-3
    for number, rows in enumerate(reference.rollouts):
        for row, wanted in enumerate(rows):
            assert wanted.keys() == {"old_logprobs", "ref_logprobs", "advantages"}
            for name, values in wanted.items():
                got = getattr(recorder.kept[number], name)[row]
                torch.testing.assert_close(got[: len(values)], values, rtol=0, atol=1e-5, msg=f"{number} {row} {name}")
    logs = [log for log in trainer.state.log_history if "loss/policy_avg" in log]
    for step, (log, metrics) in enumerate(zip(logs, reference.metrics, strict=True)):
        assert log["loss"] == pytest.approx(log["loss"]) and not set(OF_A_CRITIC) & log.keys()
        for name, value in metrics.items():
            assert log[name] == pytest.approx(value, abs=1e-5), (step, name)


def test_the_first_step_is_reinforce_with_the_leave_one_out_baseline(make_trainer, chat_tokenizer):
    """In a few lines: the gradient of −Σ A·log π / tokens, at a ratio of 1, with plain SGD."""
    options = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 1e4, "whiten_advantages": False, "kl_coef": 0.0}
    options |= {"num_mini_batches": 1, "num_ppo_epochs": 1, "max_steps": 1, "per_device_train_batch_size": 6}
    recorder, _, model = trained(make_trainer, **(options | {"num_generations": 3}))
    prompts, completions, scores = recorder.rollouts[0]
    total = 0.0
    for index, (prompt, ids) in enumerate(zip(prompts, completions, strict=True)):
        group = scores[index // 3 * 3 : index // 3 * 3 + 3]
        advantage = scores[index] - (sum(group) - scores[index]) / 2
        context = chat_tokenizer(prompt)["input_ids"]
        logits = model(input_ids=torch.tensor([context + ids])).logits[0, len(context) - 1 : -1]
        total = total - advantage * torch.log_softmax(logits, -1)[range(len(ids)), ids].sum()
    (total / sum(map(len, completions))).backward()
    changed = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            step = 0.5 * parameter.grad
            torch.testing.assert_close(
                recorder.weights[0][name], parameter.detach() - step, rtol=0, atol=1e-6, msg=name
            )
            changed = max(changed, float(step.abs().max()))
    assert changed > 1e-2


WHOLE_POLICY = {"peft_config": None, "learning_rate": 1e-3}


@pytest.mark.parametrize("policy", [{}, WHOLE_POLICY])
def test_there_is_no_critic_anywhere(make_trainer, policy, caplog, prompts):
    trainer = make_trainer(**NONE, **policy, eval_dataset=prompts, eval_strategy="steps", eval_steps=4)
    assert trainer.critic == "none" and trainer.value_head is None and "value" not in trainer.stack.roles
    assert not [name for name, _ in trainer.model.named_parameters() if "value" in name]
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext"):
        trainer.train()
    assert "critic" not in caplog.text
    logs = trainer.state.log_history
    for log in logs:
        assert not set(OF_A_CRITIC) & {name.removeprefix("eval_") for name in log}
    assert {"grad_norm", "loss/policy_avg", "objective/kl", "frac_reward_zero_std"} <= logs[0].keys()
    assert any("eval_objective/kl" in log for log in logs) and "eval_frac_reward_zero_std" not in logs[-2]
    of_policy = [p for p in trainer.policy.parameters() if p.requires_grad]
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in of_policy} and len(held) == len(of_policy)
    trainer.train()  # once more, with the optimizer of the first call
    assert trainer.optimizer.param_groups[-1]["params"] is not None


def test_a_given_optimizer_keeps_its_groups(make_trainer, tiny_llama, lora):
    from peft import get_peft_model

    model = get_peft_model(tiny_llama, lora)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trainer = make_trainer(**NONE, model=model, peft_config=None, optimizers=(optimizer, None))
    trainer.train()
    assert len(optimizer.param_groups) == 1
    stranger = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(UserError, match="optimizers"):
        make_trainer(**NONE, optimizers=(stranger, None))


def test_gradients_are_clipped_and_broken_ones_skipped(make_trainer):
    trainer = make_trainer(**NONE, max_grad_norm=1e-3, optim="sgd", learning_rate=1.0, max_steps=1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = sum((dict(trainer.model.named_parameters())[name] - p).square().sum() for name, p in before.items())
    assert float(moved.sqrt().detach()) == pytest.approx(1e-3, rel=1e-2)
    trainer = make_trainer(**NONE, folder="broken", max_steps=4)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (
        compute(*args, **kwargs) * (float("nan") if trainer.state.global_step == 1 else 1.0)
    )
    trainer.train()
    assert [log["guards/skipped_steps"] for log in trainer.state.log_history[:4]] == [0.0, 1.0, 0.0, 0.0]


def test_inner_epochs_may_end_early(make_trainer):
    trainer = make_trainer(**NONE, early_stop_kl=1e-6, max_steps=6)
    trainer.train()
    assert trainer.updates > 2 and any(log.get("policy/stopped_early") for log in trainer.state.log_history)


# ---- Checkpoints ----

WHOLE = NONE | {"max_steps": 12, "save_strategy": "steps", "lr_scheduler_type": "linear", "weight_decay": 0.01}


@pytest.mark.parametrize(
    "policy, step",
    [
        ({}, 8),  # after two rollouts
        ({}, 5),  # within inner epochs
        (WHOLE_POLICY, 6),  # between them
    ],
)
def test_resuming_is_exact(make_trainer, policy, step):
    options = WHOLE | policy
    straight = make_trainer(folder="whole", save_steps=12, **options)
    straight.train()
    make_trainer(folder="parts", save_steps=step, callbacks=[StopAt(step)], **options).train()
    torch.rand(7)
    resumed = make_trainer(folder="parts", save_steps=step, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert_same(everything(resumed), everything(straight))
    logs = [[log for log in trainer.state.log_history if "loss" in log] for trainer in (straight, resumed)]
    assert logs[0] == logs[1] and len(logs[0]) == 12


@pytest.fixture
def checkpoint(make_trainer):
    """A checkpoint in the middle of a rollout."""
    trainer = make_trainer(save_steps=2, **(WHOLE | {"max_steps": 2}))
    trainer.train()
    trainer.save_model()
    return Path(trainer.args.output_dir) / "checkpoint-2"


def test_a_run_folder_has_no_files_of_a_critic(checkpoint, make_trainer, chat_tokenizer):
    for folder in (checkpoint, checkpoint.parent):
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        assert "adapter_model.safetensors" in names and not [name for name in names if name.startswith("value")]
    assert json.loads((checkpoint / "ppo_state.json").read_text())["critic"] == "none"
    tensors = load_file(checkpoint / "ppo_rollout.safetensors")
    assert "advantages" in tensors and not {"values", "returns"} & tensors.keys()
    assert is_complete(checkpoint)
    broken = checkpoint.with_name("checkpoint-1")
    shutil.copytree(checkpoint, broken)
    (broken / "ppo_rollout.safetensors").unlink()
    assert broken_file(broken) == "ppo_rollout.safetensors"


@pytest.mark.parametrize("was, now", [("none", "head"), ("head", "none")])
def test_a_run_with_another_critic_is_not_resumed(make_trainer, was, now):
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "num_generations": 2}
    first = make_trainer(**options, critic=was)
    first.train()
    second = make_trainer(**(options | {"max_steps": 2}), critic=now)
    message = f"trained with critic='{was}', but critic is now '{now}': set critic='{was}'"
    with pytest.raises(UserError, match=message):
        second.train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_restored(make_trainer, prompts):
    best = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "objective/scores", "eval_dataset": prompts}
    trainer = make_trainer(**NONE, **best)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    saved = load_file(Path(best) / "adapter_model.safetensors")
    named = dict(trainer.policy.named_parameters())
    for name, weight in saved.items():
        assert torch.equal(named[name.replace(".weight", ".default.weight")], weight)


# ---- Several trainers, several processes ----


@pytest.mark.parametrize("first, second", [("adapter", "none"), ("none", "head"), ("none", "none")])
def test_a_second_trainer_may_have_another_critic(make_trainer, tiny_llama, lora, first, second):
    from peft import get_peft_model

    model = get_peft_model(tiny_llama, lora)
    short = {"model": model, "peft_config": None, "max_steps": 2, "num_generations": 2}
    one = make_trainer(critic=first, **short)
    one.train()
    two = make_trainer(critic=second, **short)
    two.train()
    has_head = any("value_head" in name for name, _ in model.named_parameters())
    assert has_head == (second != "none") and (two.value_head is None) == (second == "none")
    held = {id(p) for group in two.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in two.policy.parameters() if p.requires_grad}
    one.train()  # takes the model back
    assert (one.value_head is None) == (first == "none")
    assert any("value_head" in name for name, _ in model.named_parameters()) == (first != "none")
    assert all("policy/clipfrac_avg" in log for log in one.state.log_history if "loss" in log)


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_two_processes_equal_one(run_processes, tmp_path):  # noqa: F811
    options = NONE | {"varied": True, "max_steps": 8, "adam_epsilon": 1e-3, "clip_range": 0.01, "kl_target": 0.5}
    options |= {"kl_horizon": 64, "normalize_rewards": True}
    alone = tiny_run.build(tmp_path, "one", options | {"per_device_train_batch_size": 4})
    alone.train()
    one = tmp_path / "one"
    tiny_run.save_result(alone, one)
    two = run_processes("two", 2, options | {"per_device_train_batch_size": 2})
    expected = load_file(one / "weights-0.safetensors")
    ranks = [load_file(two / f"weights-{rank}.safetensors") for rank in (0, 1)]
    assert expected.keys() == ranks[0].keys() and not any("value" in name for name in expected)
    for name, weight in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], weight, rtol=0, atol=5e-5, msg=name)
    logs = [json.loads((folder / "log-0.json").read_text()) for folder in (one, two)]
    for wanted, ours in zip(*([log for log in history if "loss" in log] for history in logs), strict=True):
        assert ours.keys() == wanted.keys()
        for name in wanted:
            assert name == "epoch" or ours[name] == pytest.approx(wanted[name], abs=2e-4), name
    assert any(log.get("policy/clipfrac_avg") for log in logs[0])


# ---- Learning ----


@pytest.mark.slow
def test_it_learns_without_a_critic(stories_path, make_storyteller):
    def has_e(completions, **kwargs):
        return [min(6.0, float(text.count("e"))) - 0.2 * abs(len(text.split()) - 8) for text in completions]

    options = {"critic": "none", "num_generations": 4, "reward_funcs": has_e, "max_completion_length": 16}
    options |= {"max_steps": 24, "per_device_train_batch_size": 16, "learning_rate": 5e-3, "kl_coef": 0.05}
    for name in ("value_learning_rate", "value_clip_range", "vf_coef"):
        options[name] = PPOConfig.__dataclass_fields__[name].default
    trainer = make_storyteller(load_base_model(str(stories_path), dtype="float32"), **options)
    before = trainer.evaluate()["eval_objective/scores"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_objective/scores"] > before + 1.0
    assert trainer.stop_reason is None and 0 < after["eval_objective/kl"] < 40


# ---- What is said and refused ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_generations": 1}, "critic='none' .*num_generations=1: set num_generations to 2 or more, or .*critic"),
        ({"gamma": 0.9}, "gamma: with critic='none', .* plain sum .*: leave it out, or choose another critic"),
        ({"gamma": 0.9, "gae_lambda": 0.9}, "gamma and gae_lambda: with critic='none'"),
    ],
)
def test_options_that_contradict_it_are_refused_in_one_line(tmp_path, options, message):
    with pytest.raises(UserError, match=message) as error:
        PPOConfig(str(tmp_path), use_cpu=True, bf16=False, **(NONE | options))
    assert "\n" not in str(error.value)


def test_a_plain_sum_may_be_asked_for(tmp_path):
    assert PPOConfig(str(tmp_path), use_cpu=True, bf16=False, gamma=1.0, gae_lambda=1.0, **NONE).gae_lambda == 1


def test_a_value_model_is_refused(make_trainer, tiny_config):
    with pytest.raises(UserError, match="value_model was given, but critic='none': choose critic='model', or leave"):
        make_trainer(**NONE, value_model=LlamaForCausalLM(tiny_config))


def test_options_of_a_critic_are_said_to_be_unused(make_trainer, caplog):
    make_trainer(**NONE, vf_coef=0.5, value_learning_rate=1e-3)
    lines = [record.getMessage() for record in caplog.records if "critic" in record.getMessage()]
    assert lines == ["not used with critic='none', which has no values: value_learning_rate, vf_coef."]
    caplog.clear()
    make_trainer(critic="head", vf_coef=0.5, value_learning_rate=1e-3)
    assert "not used" not in caplog.text


class Logged(TrainerCallback):
    def __init__(self):
        self.fractions = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "frac_reward_zero_std" in logs:
            self.fractions.append(logs["frac_reward_zero_std"])


@pytest.mark.parametrize("critic", ["none", "head"])
def test_prompts_that_teach_nothing_are_counted_and_said(make_trainer, critic, caplog):
    def of_prompt(prompts, completions, **kwargs):  # right or wrong, the same for all completions of a prompt
        return [float(len(prompt) > 8) for prompt in prompts]

    logged = Logged()
    options = {"critic": critic, "num_generations": 2, "num_ppo_epochs": 1, "num_mini_batches": 1, "max_steps": 5}
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext.ppo"):
        make_trainer(**options, reward_funcs=of_prompt, callbacks=[logged], per_device_train_batch_size=6).train()
    assert logged.fractions == [1.0] * 5
    said = [record.getMessage() for record in caplog.records if "frac_reward_zero_std" in record.getMessage()]
    assert len(said) == 1 and "100% of the prompts" in said[0] and "num_generations or temperature" in said[0]
    assert find_metric("frac_reward_zero_std").unit == "fraction"


@pytest.mark.parametrize(
    "fractions, spread, is_said",
    [
        ([1.0] * 3, 1.0, True),
        ([0.95] * 5, 1.0, True),
        ([0.5] * 5, 1.0, False),
        ([1.0] * 2, 1.0, False),
        ([1.0] * 5, 0.0, False),
    ],
)
def test_the_warning_is_of_nearly_all_prompts(fractions, spread, is_said):
    history = [{"frac_reward_zero_std": value, "objective/scores_std": spread} for value in fractions]
    assert ("equal_groups" in diagnose(history)) == is_said


def test_one_completion_per_prompt_has_no_such_metric(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert "frac_reward_zero_std" not in trainer.state.log_history[0]
