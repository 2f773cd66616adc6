"""The warm-up of the critic, and λ of returns and of advantages: against a second PPO, brute force, and to the bit."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM, TrainerCallback

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.callbacks import PPOCallback
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.sharding import Sharded
from hf_rlhf_ext.ppo.state import PPOState
from hf_rlhf_ext.ppo.stretch import Stretch
from tests.ppo.reference_ppo import ReferencePPO
from tests.ppo.test_resume import KINDS, WHOLE, StopAt, assert_same, everything, interrupted
from tests.ppo.test_update import OPTIONS, SMALL_STEPS, Recorder
from tests.schedule_free import ScheduleFreeSGD

# A rollout is 4 optimizer steps.
ONE_ROLLOUT = {"critic_warmup_steps": 1}
TEXTS = Dataset.from_dict({"text": ["A fox is quick and brown.", "Many words!", "The garden, on a sunny day"]})
OF_POLICY = ("loss/policy_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio", "policy/entropy_avg")


class WeightsOfSteps(TrainerCallback):
    """Keeps the trained weights before training and after each optimizer step."""

    def __init__(self):
        self.steps = []

    def keep(self, model):
        self.steps.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.keep(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.keep(model)


def is_of_critic(name):
    return ".value." in name or "value_" in name


def logs_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


# ---- What a warm-up computes ----


class WarmReference(ReferencePPO):
    """A second PPO whose first rollouts train the critic on plain returns, and nothing else."""

    warm_rollouts = 1

    def make_sequence(self, prompt, ids, score, token_rewards):
        sequence = super().make_sequence(prompt, ids, score, token_rewards.clone())
        if len(self.result.rollouts) < self.warm_rollouts:
            own, self.args = self.args, copy.copy(self.args)
            self.args.gae_lambda = 1.0
            sequence.returns = super().make_sequence(prompt, ids, score, token_rewards.clone()).returns
            self.args = own
        return sequence

    def backward(self, sequence, n_tokens, metrics):
        if len(self.result.rollouts) > self.warm_rollouts:
            super().backward(sequence, n_tokens, metrics)
            return
        with torch.no_grad():
            _, hidden, _, _ = self.policy_pass(sequence.prompt, sequence.ids)
        values = self.values_of(sequence.prompt, sequence.ids, hidden)
        loss = self.critic_loss(values, sequence).sum() / n_tokens
        (self.args.vf_coef * loss).backward()
        metrics["loss/value_avg"] += loss.item()
        metrics["val/clipfrac_avg"] += self.clipped_values(values, sequence) / n_tokens


@pytest.mark.parametrize("critic", ["head", "adapter", "model"])
def test_every_step_equals_the_reference(make_trainer, chat_tokenizer, tiny_config, critic):
    options = OPTIONS | SMALL_STEPS | {"critic": critic, "critic_warmup_steps": 3, "max_tokens_per_batch": 40}
    if critic == "model":
        torch.manual_seed(1)
        options["value_model"] = LlamaForCausalLM(tiny_config)
    recorder = Recorder()
    trainer = make_trainer(reward_funcs=recorder.reward, callbacks=[recorder], **options)
    recorder.trainer, start = trainer, copy.deepcopy(trainer.model)
    trainer.train()
    stops = trainer.tools.sampling.stop_ids
    reference = WarmReference(start, chat_tokenizer, recorder, stops, trainer.args, critic).run()
    assert len(recorder.rollouts) == 2 and len(reference.weights) == len(recorder.weights) == 8
    for step, (got, wanted) in enumerate(zip(recorder.weights, reference.weights, strict=True)):
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-5, msg=f"step {step}: {name}")
    change = max((recorder.weights[3][name] - weight).abs().max() for name, weight in recorder.weights[0].items())
    assert change > 1e-2  # also in the warm-up
    for number, rows in enumerate(reference.rollouts):
        for row, wanted in enumerate(rows):
            got = recorder.kept[number].returns[row]
            torch.testing.assert_close(got[: len(wanted["returns"])], wanted["returns"], rtol=0, atol=1e-5)
    for log, metrics in zip(logs_of(trainer), reference.metrics, strict=True):
        for name in ("loss/value_avg", "val/clipfrac_avg"):
            assert log[name] == pytest.approx(metrics[name], abs=1e-5)


@pytest.mark.parametrize("kind", ["head", "adapter", "model", "whole policy", "checkpointing", "adafactor in bf16"])
def test_the_policy_stays_the_same_to_the_bit(make_trainer, tiny_config, kind):
    # Weight decay, PPO-ptx, an entropy bonus and KL in the loss must not reach it either.
    options = {"weight_decay": 0.5, "entropy_coef": 0.1, "kl_placement": "loss", "kl_coef": 0.5, "ptx_coef": 1.0}
    options |= {"ptx_dataset": TEXTS, "max_steps": 12, "critic": kind, "critic_warmup_steps": 5}  # two rollouts
    options["value_clip_range"] = None  # so that every step moves the critic
    if kind == "model":
        options["value_model"] = LlamaForCausalLM(tiny_config)
    elif kind == "whole policy":
        options |= {"critic": "head", "peft_config": None, "learning_rate": 1e-3}
    elif kind == "checkpointing":
        options |= {"critic": "head", "activation_checkpointing": True, "gradient_accumulation_steps": 2}
    elif kind == "adafactor in bf16":
        options |= {"critic": "adapter", "optim": "adafactor", "bf16": True}
    kept = WeightsOfSteps()
    trainer = make_trainer(callbacks=[kept], **options)
    trainer.train()
    start = kept.steps[0]
    policy = [name for name in start if not is_of_critic(name)]
    critic = [name for name in start if is_of_critic(name)]
    assert len(policy) > 15 and critic and len(kept.steps) == 13
    for step in range(1, 9):
        for name in policy:
            assert torch.equal(kept.steps[step][name], start[name]), (step, name)
        head = "value_head.bias"
        assert not torch.equal(kept.steps[step][head], kept.steps[step - 1][head])
    assert any(not torch.equal(kept.steps[9][name], start[name]) for name in policy)
    assert any(not torch.equal(kept.steps[1][name], start[name]) for name in critic)


def test_nothing_but_the_critic_acts_or_speaks_in_it(make_trainer, caplog):
    options = {"kl_target": 1e-3, "kl_horizon": 200, "kl_coef": 0.2, "early_stop_kl": 1e-9, "max_steps": 14}
    options |= {"ptx_coef": 0.5, "ptx_dataset": TEXTS, "logging_steps": 1}
    coefs, texts = [], []

    class Watch(PPOCallback):
        def on_step_end(self, args, state, control, **kwargs):
            coefs.append(trainer.kl_coef)
            texts.append(trainer.ppo.next_text)

        def on_rollout(self, args, state, control, *, previous, rollout_index, **kwargs):
            assert ("policy/clipfrac_avg" in previous) == (rollout_index >= 3)

    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext"):
        trainer = make_trainer(callbacks=[Watch()], critic_warmup_steps=8, **options)
        trainer.train()
    logs = logs_of(trainer)
    for log in logs[:8]:
        assert "loss/value_avg" in log and log["grad_norm"] == 0 < log["value_grad_norm"]
        assert not {*OF_POLICY, "policy/stopped_early", "loss/ptx", "policy/kl_loss"} & log.keys()
    for log in logs[8:]:
        assert {*OF_POLICY, "policy/stopped_early", "loss/ptx"} <= log.keys()
    assert set(coefs[:8]) == {0.2} and coefs[-1] != 0.2
    assert texts[7] == 0 < texts[8]
    # An early stop after one step of each rollout, but not in the warm-up: 8 steps are its 2 rollouts.
    assert trainer.updates > 2 + (14 - 8) // 4
    lines = [record.getMessage() for record in caplog.records if "warm" in record.getMessage()]
    assert len(lines) == 2, lines
    assert "step 0, rollout 0: critic_warmup_steps=8: the first 8 optimizer steps" in lines[0]
    assert "step 8, rollout 2: the warm-up of the critic ends" in lines[1]
    assert "clip_range" not in caplog.text


def test_steps_are_rounded_up_to_whole_rollouts(tmp_path):
    def rollouts(steps):
        batch = {"num_ppo_epochs": 2, "num_mini_batches": 2, "use_cpu": True, "bf16": False, "report_to": "none"}
        return PPOConfig(str(tmp_path), critic_warmup_steps=steps, **batch).critic_warmup_rollouts

    assert [rollouts(steps) for steps in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


# ---- Resuming, a second call of `train`, rollbacks ----


@pytest.mark.parametrize(
    "kind, step",
    [
        ("lora", 3),  # inside the warm-up and inside of a rollout
        ("adapter critic", 4),  # inside the warm-up, between two rollouts
        ("adaptive KL", 8),  # right after it
        ("full", 6),
    ],
)
def test_resuming_is_exact(make_trainer, kind, step):
    options = KINDS[kind] | {"critic_warmup_steps": 8, "ptx_coef": 0.3, "ptx_dataset": TEXTS}
    options["max_steps"] = 12
    straight = make_trainer(folder="whole", save_steps=12, **(WHOLE | options))
    straight.train()
    resumed = interrupted(make_trainer, step, **options)
    assert_same(everything(resumed), everything(straight))
    assert resumed.kl_coef == straight.kl_coef
    assert logs_of(resumed) == logs_of(straight) and len(logs_of(straight)) == 12


def test_a_run_that_resumes_inside_says_so(make_trainer, caplog):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "critic_warmup_steps": 4}
    make_trainer(callbacks=[StopAt(2)], **options).train()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext"):
        make_trainer(**options).train(resume_from_checkpoint=True)
    lines = [record.getMessage() for record in caplog.records if "warm" in record.getMessage()]
    assert len(lines) == 2 and "critic_warmup_steps=4" in lines[0] and "ends" in lines[1]


def test_a_second_call_of_train_goes_on_with_a_trained_critic(make_trainer):
    kept = WeightsOfSteps()
    trainer = make_trainer(critic_warmup_steps=8, max_steps=12, callbacks=[kept, StopAt(4)])
    trainer.train()  # one of two rollouts of the warm-up
    trainer.remove_callback(StopAt)
    kept.steps.clear()
    trainer.train()
    name = next(name for name in kept.steps[0] if "lora_B" in name)
    moved = [not torch.equal(weights[name], kept.steps[0][name]) for weights in kept.steps[1:]]
    assert moved == [False] * 4 + [True] * 8


@pytest.mark.parametrize(
    "stretch, expected",
    [
        (Stretch(), [0, 1]),
        # Resumed with other sizes after one rollout of 6 steps: the 8 steps end in the next rollout.
        (Stretch(rollout=1, prompt=12, step=6), [1]),
        # The same at the end: 8 steps are over, however many rollouts of now they would be.
        (Stretch(rollout=1, prompt=12, step=8), []),
        # Called again: no warm-up after two rollouts, although the steps of the call begin at 0.
        (Stretch(rollout=2, prompt=8, step=0, run=8), []),
        (Stretch(rollout=1, prompt=4, step=0, run=4), [1]),
    ],
)
def test_the_warm_up_is_over_once_its_steps_are_taken(tmp_path, stretch, expected):
    args = PPOConfig(
        str(tmp_path), critic_warmup_steps=8, num_ppo_epochs=2, num_mini_batches=2, use_cpu=True, bf16=False
    )
    state = PPOState(kl_coef=0.1, stretch=stretch)
    assert [n for n in range(stretch.rollout, 6) if state.is_warm_up(args, n)] == expected


@pytest.mark.parametrize(
    "stretch, expected",
    [
        (Stretch(), [2]),
        # Resumed with other sizes: it has ended before, with an unknown rollout.
        (Stretch(rollout=1, prompt=12, step=10), []),
        (Stretch(rollout=1, prompt=12, step=6), [2]),
        # Called again, once inside and once right after it.
        (Stretch(rollout=1, prompt=4, step=0, run=4), [2]),
        (Stretch(rollout=2, prompt=8, step=0, run=8), [2]),
        (Stretch(rollout=3, prompt=12, step=0, run=12), []),
    ],
)
def test_its_end_is_one_rollout(tmp_path, stretch, expected):
    args = PPOConfig(
        str(tmp_path), critic_warmup_steps=8, num_ppo_epochs=2, num_mini_batches=2, use_cpu=True, bf16=False
    )
    rollouts = range(stretch.rollout, 8)
    states = [PPOState(kl_coef=0.1, stretch=stretch, rollout_index=rollout) for rollout in rollouts]
    assert [state.rollout_index for state in states if state.follows_warm_up(args)] == expected


@pytest.mark.parametrize("own", [True, False])
def test_a_schedule_free_optimizer_is_refused(make_trainer, tiny_config, own):
    """Its averages would have the weights of the policy before it was trained."""
    model = LlamaForCausalLM(tiny_config)
    options = {"model": model, "peft_config": None, "critic_warmup_steps": 4, "max_steps": 8}
    if own:
        options["optimizers"] = (ScheduleFreeSGD(model.parameters()), None)
    else:
        options["optimizer_cls_and_kwargs"] = (ScheduleFreeSGD, {"lr": 0.1})
    with pytest.raises(UserError, match="critic_warmup_steps=4: ScheduleFreeSGD averages.*leave critic_warmup_steps"):
        make_trainer(**options).train()


@pytest.mark.parametrize(
    "options", [{"optim": "adafactor"}, {"optim": "sgd"}, {"optim": "rmsprop"}, {"optim": "adagrad"}]
)
def test_the_first_step_of_the_policy_is_as_large_as_without_it(make_trainer, options):
    """Momentum and mean squares of an optimizer do not count the steps of the warm-up."""
    options |= {"learning_rate": 1e-3, "kl_coef": 0.0, "critic": "adapter", "whiten_advantages": True}
    sizes = []
    for warm_up in (0, 12):
        kept = WeightsOfSteps()
        make_trainer(callbacks=[kept], critic_warmup_steps=warm_up, max_steps=warm_up + 1, **options).train()
        first, second = kept.steps[-2:]
        changes = [(second[name] - first[name]).norm() for name in first if not is_of_critic(name)]
        sizes.append(float(torch.stack(changes).norm()))
    assert sizes[0] > 0 and sizes[1] == pytest.approx(sizes[0], rel=0.5)


def test_a_rollback_inside_it_restores_the_critic_and_goes_on(make_trainer, caplog):
    class Jump(TrainerCallback):
        """After a step, the policy is far away from the reference."""

        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 6:
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if ".default." in name:
                            parameter.add_(5 * torch.randn_like(parameter))

    options = {"max_kl": 0.05, "max_kl_action": "rollback", "save_strategy": "steps", "save_steps": 4, "max_steps": 13}
    options |= {"learning_rate": 1e-4, "value_learning_rate": 1e-2}
    kept = WeightsOfSteps()
    trainer = make_trainer(callbacks=[Jump(), kept], critic="adapter", critic_warmup_steps=12, **options)
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext"):
        trainer.train()
    assert "went back to checkpoint-4" in caplog.text and trainer.ppo.rollbacks == 1
    policy = [name for name in kept.steps[0] if not is_of_critic(name)]
    # Steps 9 to 12 would be the last rollout of the warm-up. Its number was used up by the rollback.
    assert caplog.text.count("the warm-up of the critic ends") == 1
    assert any(not torch.equal(kept.steps[9][name], kept.steps[0][name]) for name in policy)
    distances = [(kept.steps[9][name] - kept.steps[0][name]).abs().max() for name in policy]
    assert max(distances) < 1e-3  # one step away from the start, not from where it had jumped to


@pytest.mark.parametrize("kind", ["adamw", "sgd with momentum"])
def test_the_state_that_shards_get_for_untrained_weights_is_that_of_a_first_step(kind):
    def run(completes):
        torch.manual_seed(0)
        critic, policy = torch.nn.Linear(3, 2), torch.nn.Linear(2, 3)
        weights = [*critic.parameters(), *policy.parameters()]
        optimizer = torch.optim.AdamW(weights) if kind == "adamw" else torch.optim.SGD(weights, lr=0.1, momentum=0.9)
        for step in range(5):
            for weight in weights:
                is_trained = step >= 2 or any(weight is other for other in critic.parameters())
                weight.grad = torch.randn_like(weight) if is_trained else None
            if step == 1 and completes:
                Sharded.complete_state(None, optimizer)
                assert all(optimizer.state.get(weight) for weight in weights)
            optimizer.step()
        return weights

    for plain, completed in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, completed)


def test_an_optimizer_whose_first_state_is_not_known_is_refused_with_shards():
    weights = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(weights)
    optimizer.state[weights[0]] = {"state1": torch.zeros(3, 2, dtype=torch.uint8), "qmap1": torch.ones(256)}
    with pytest.raises(UserError, match="critic_warmup_steps: with fsdp2.*set optim=adamw_torch"):
        Sharded.complete_state(None, optimizer)


# ---- Does the critic get better? ----


def test_the_critic_explains_the_returns_after_a_warm_up(make_trainer):
    """Of plain returns that depend on the prompt, in the first rollout that trains the policy."""

    class Keep(PPOCallback):
        def __init__(self):
            self.found = []

        def on_rollout(self, args, state, control, *, metrics, **kwargs):
            self.found.append(metrics["val/explained_variance"])

    def by_prompt(prompts, completions, **kwargs):
        return [2.0 if "fox" in prompt else -1.0 for prompt in prompts]

    options = {"critic": "adapter", "kl_coef": 0.0, "value_gae_lambda": 1.0, "per_device_train_batch_size": 8}
    options |= {"reward_funcs": by_prompt}
    cold, warm = Keep(), Keep()
    make_trainer(callbacks=[cold], max_steps=1, **options).train()
    make_trainer(callbacks=[warm], max_steps=9, critic_warmup_steps=8, **options).train()
    assert len(cold.found) == 1 and len(warm.found) == 3
    assert abs(cold.found[0]) < 0.01  # a head of zeros explains nothing
    assert warm.found[-1] > 0.8


# ---- λ of returns and of advantages ----


def recorded(make_trainer, **options):
    recorder = Recorder()
    defaults = {"whiten_advantages": False, "max_steps": 8, "kl_coef": 0.4, "gamma": 0.97, "gae_lambda": 0.9}
    trainer = make_trainer(reward_funcs=recorder.reward, callbacks=[recorder], **(defaults | options))
    recorder.trainer = trainer
    trainer.train()
    return recorder, trainer


def brute_force(recorder, number, gamma, lambdas):
    """Advantages and λ-returns of a rollout as double loops, for λ of each completion."""
    _, completions, scores = recorder.rollouts[number]
    kept = recorder.kept[number]
    for row, (ids, score) in enumerate(zip(completions, scores, strict=True)):
        n = len(ids)
        rewards = (-0.4 * (kept.old_logprobs - kept.ref_logprobs)[row, :n]).double().tolist()
        rewards[-1] += score
        values = [*kept.values[row, :n].double().tolist(), 0.0]
        deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
        decay = gamma * lambdas(n)
        yield [sum(decay ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)], values[:n]


@pytest.mark.parametrize("alpha", [0.3, 0.6])
def test_the_lambda_of_a_completion_follows_its_length(make_trainer, alpha):
    recorder, _ = recorded(make_trainer, length_adaptive_lambda=alpha)
    kept = recorder.kept[1]
    adaptive = list(brute_force(recorder, 1, 0.97, lambda n: min(1.0, max(0.0, 1 - 1 / (alpha * n)))))
    fixed = list(brute_force(recorder, 1, 0.97, lambda n: 0.9))
    assert len({len(row) for row, _ in adaptive}) > 2 and kept.values.abs().max() > 0.1
    for row, ((expected, values), (of_fixed, _)) in enumerate(zip(adaptive, fixed, strict=True)):
        n = len(expected)
        torch.testing.assert_close(
            kept.advantages[row, :n].double(), torch.tensor(expected).double(), rtol=0, atol=1e-5
        )
        # The critic still learns returns of gae_lambda.
        wanted = torch.tensor(of_fixed).double() + torch.tensor(values).double()
        torch.testing.assert_close(kept.returns[row, :n].double(), wanted, rtol=0, atol=1e-5)


def test_returns_have_a_lambda_of_their_own(make_trainer):
    recorder, _ = recorded(make_trainer, value_gae_lambda=1.0)
    plain, _ = recorded(make_trainer)
    first, other = recorder.kept[0], plain.kept[0]
    assert torch.equal(first.advantages, other.advantages)  # those of gae_lambda, to the bit
    kept = recorder.kept[1]
    for row, (advantages, values) in enumerate(brute_force(recorder, 1, 0.97, lambda n: 1.0)):
        wanted = torch.tensor(advantages).double() + torch.tensor(values).double()
        torch.testing.assert_close(kept.returns[row, : len(values)].double(), wanted, rtol=0, atol=1e-5)
    assert not torch.equal(recorder.weights[-1]["value_head.weight"], plain.weights[-1]["value_head.weight"])


def test_the_same_lambda_given_twice_changes_only_rounding(make_trainer):
    recorder, _ = recorded(make_trainer, value_gae_lambda=0.9)
    plain, _ = recorded(make_trainer)
    assert torch.equal(recorder.kept[0].advantages, plain.kept[0].advantages)
    torch.testing.assert_close(recorder.kept[0].returns, plain.kept[0].returns, rtol=0, atol=1e-5)


# ---- What is refused, and what is said ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"critic": "none", "num_generations": 2}, "critic_warmup_steps=4: with critic='none'.*another critic"),
        ({"vf_coef": 0.0}, "which vf_coef=0 does not train: set vf_coef"),
        ({"value_learning_rate": 0.0}, "which value_learning_rate=0 does not train"),
        ({"max_steps": 4}, "takes 4 optimizer steps .whole rollouts of 4.*leaves none for the policy: raise max_steps"),
        ({"critic_warmup_steps": 5, "max_steps": 8}, "takes 8 optimizer steps"),
        ({"critic_warmup_steps": -1}, "critic_warmup_steps must not be negative"),
        ({"value_gae_lambda": 1.5}, "value_gae_lambda must be between 0 and 1"),
        (
            {"length_adaptive_lambda": 0.0},
            "length_adaptive_lambda must be positive.*leave it out for a fixed gae_lambda",
        ),
        ({"critic_start": "zero"}, "critic_start must be one of reward, reward_features, policy"),
    ],
)
def test_options_that_contradict_it_are_refused_in_one_line(tmp_path, options, message):
    defaults = {"critic_warmup_steps": 4, "num_ppo_epochs": 2, "num_mini_batches": 2, "use_cpu": True, "bf16": False}
    with pytest.raises(UserError, match=message) as error:
        PPOConfig(str(tmp_path), **(defaults | options))
    assert "\n" not in str(error.value)


def test_a_run_of_epochs_needs_a_step_of_the_policy_too(make_trainer):
    # 6 prompts are a rollout of 8 completions: 4 steps.
    with pytest.raises(UserError, match="critic_warmup_steps=4 takes 4.*leaves none for the policy"):
        make_trainer(critic_warmup_steps=4, max_steps=-1, num_train_epochs=1)
    make_trainer(critic_warmup_steps=4, max_steps=-1, num_train_epochs=2)


def test_a_lambda_that_nothing_reads_is_said(make_trainer, caplog):
    both = {"length_adaptive_lambda": 0.5, "value_gae_lambda": 1.0}
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext"):
        make_trainer(**both)
        assert "not used: gae_lambda" not in caplog.text
        make_trainer(gae_lambda=0.9, **both)
    assert "not used: gae_lambda" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext"):
        make_trainer(critic="none", num_generations=2, critic_start="policy", **both)
    assert "critic_start, value_gae_lambda, length_adaptive_lambda" in caplog.text


def test_it_works_with_several_completions_per_prompt(make_trainer):
    kept = WeightsOfSteps()
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    make_trainer(callbacks=[kept], num_generations=2, max_steps=8, peft_config=lora, **ONE_ROLLOUT).train()
    for name, weight in kept.steps[0].items():
        assert is_of_critic(name) or torch.equal(kept.steps[4][name], weight)
    assert any(not torch.equal(kept.steps[5][name], weight) for name, weight in kept.steps[0].items())
