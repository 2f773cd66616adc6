"""Guards: bad steps are skipped, a diverging run is stopped or goes back, and each case logs one line."""

import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback, LlamaForCausalLM, TrainerCallback

from hf_rlhf_ext.errors import UserError


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(got, expected):
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def moved(got, before):
    return any(not torch.equal(got[name], before[name]) for name in before)


class Watch(TrainerCallback):
    """Keeps weights and optimizer state after each step, and makes the gradients of some steps non-finite."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights[state.global_step] = trained(model)


def spoiled(trainer, steps):
    """Makes the loss of the given optimizer steps (from 1) NaN."""
    compute = trainer.compute_loss

    def loss(*args, **kwargs):
        value = compute(*args, **kwargs)
        return value * float("nan") if trainer.state.global_step + 1 in steps else value

    trainer.compute_loss = loss


@pytest.fixture
def make_sharp(make_trainer, tiny_config):
    """`make_trainer` with a model of low entropy, as the KL of a random model hardly depends on its weights."""

    def make(**options):
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_config)
        model.lm_head.weight.data *= 30
        return make_trainer(model=model, **options)

    return make


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="hf_rlhf_ext.ppo")
    ours = ("hf_rlhf_ext.ppo.trainer", "hf_rlhf_ext.ppo.callbacks")
    return lambda: [record.getMessage() for record in caplog.records if record.name in ours]


# Gradients that are not finite


@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_a_step_without_finite_gradients_changes_nothing_and_is_counted(make_trainer, warnings, critic):
    watch = Watch()
    trainer = make_trainer(max_steps=6, callbacks=[watch], critic=critic, weight_decay=0.1)
    spoiled(trainer, {3})
    trainer.train()
    assert_same(watch.weights[3], watch.weights[2])  # not even by weight decay or momentum
    assert moved(watch.weights[2], watch.weights[1]) and moved(watch.weights[4], watch.weights[3])
    logs = {log["step"]: log for log in trainer.state.log_history if "loss" in log}
    assert [logs[step]["guards/skipped_steps"] for step in range(1, 7)] == [0, 0, 1, 0, 0, 0]
    assert trainer.state.global_step == 6 and "gradients are not finite: this step is skipped" in warnings()[0]


def test_without_gradient_clipping_the_guard_works_too(make_trainer):
    watch = Watch()
    trainer = make_trainer(max_steps=3, callbacks=[watch], max_grad_norm=0.0)
    spoiled(trainer, {2})
    trainer.train()
    assert_same(watch.weights[2], watch.weights[1])
    assert moved(watch.weights[3], watch.weights[2])


def test_too_many_skipped_steps_in_a_row_end_training(make_trainer, warnings):
    watch = Watch()
    trainer = make_trainer(max_steps=12, callbacks=[watch], max_skipped_steps=3)
    spoiled(trainer, {2, 3, 5, 6, 7, 8})
    trainer.train()
    assert trainer.state.global_step == 7  # 2 and 3 are two; 5, 6, 7 are three in a row
    assert_same(watch.weights[7], watch.weights[4])
    assert "training stops: 3 optimizer steps in a row had gradients that are not finite" in warnings()[-1]


# The limit on the KL


LONG = {"max_steps": 24, "kl_coef": 0.01, "learning_rate": 3e-3}  # rollouts before steps 1, 5, 9 …


class Jump(TrainerCallback):
    """Moves the policy far from its reference after a step, like an optimizer step that is far too large."""

    def __init__(self, step, every_time=True):
        self.step, self.times = step, 100 if every_time else 1

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step and self.times:
            self.times -= 1
            generator = torch.Generator().manual_seed(0)
            for name, parameter in model.named_parameters():
                if "lora_B.default" in name:
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def test_a_kl_above_the_ceiling_stops_training_with_the_weights_of_then(make_sharp, warnings):
    watch = Watch()
    trainer = make_sharp(callbacks=[Jump(10), watch], max_kl=5.0, **LONG)
    trainer.train()
    assert trainer.state.global_step == 13  # the step after the rollout that showed it, which changes nothing
    assert_same(watch.weights[13], watch.weights[12])
    kl = [log["objective/kl"] for log in trainer.state.log_history if "objective/kl" in log]
    assert len(kl) == 4 and kl[-1] > 5.0 > max(kl[:-1])
    line = warnings()[-1]
    assert "training stops: KL is" in line and "above max_kl = 5, and there is no checkpoint below it" in line
    assert line.endswith(f"{trainer.stop_reason}.") and "raise kl_coef, set kl_target, or lower" in line


def test_above_the_ceiling_nothing_counts_as_the_best_model(make_sharp, prompts, warnings):
    def judge(prompts, trainer_state, **kwargs):
        return [float(trainer_state.global_step)] * len(prompts)  # this reward always rises

    options = LONG | {"max_kl": 5.0, "eval_dataset": prompts, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    watch = Watch()
    trainer = make_sharp(
        callbacks=[Jump(9), watch], eval_reward_funcs=judge, metric_for_best_model="rewards/judge/mean", **options
    )
    trainer.train()
    kl = {log["step"]: log["eval_objective/kl"] for log in trainer.state.log_history if "eval_objective/kl" in log}
    assert max(kl[step] for step in (2, 4, 6, 8)) < 5.0 < min(kl[step] for step in (10, 12))
    assert trainer.state.best_global_step == 8
    assert_same(trained(trainer.model), watch.weights[8])
    assert any("not a candidate for the best model: eval_objective/kl exceeds max_kl" in line for line in warnings())


def test_the_coefficient_can_be_raised_instead(make_sharp, warnings):
    trainer = make_sharp(callbacks=[Jump(10)], max_kl=5.0, max_kl_action="raise_kl_coef", **LONG)
    trainer.train()
    kl = [log["objective/kl"] for log in trainer.state.log_history if "objective/kl" in log]
    assert trainer.state.global_step == 24 and len(kl) == 6
    above = sum(value > 5.0 for value in kl)
    assert above > 0 and trainer.kl_coef == pytest.approx(0.01 * 2**above)
    assert "kl_coef is now 0.02" in warnings()[0]


@pytest.mark.parametrize(
    "every_time, more", [(False, {}), (True, {}), (True, {"critic": "none", "num_generations": 2})]
)
def test_rolling_back_restores_the_last_checkpoint_below_the_ceiling(make_sharp, warnings, every_time, more):
    watch, jump = Watch(), Jump(10)
    options = LONG | {"max_kl": 5.0, "max_kl_action": "rollback", "save_strategy": "steps", "save_steps": 4} | more
    trainer = make_sharp(callbacks=[jump, watch], **options)
    restored, restore = [], trainer._restore

    def noted(folder):
        restore(folder)
        restored.append((folder.name, trained(trainer.model)))
        jump.step = trainer.state.global_step + 2 if every_time else 0

    trainer._restore = noted
    trainer.train()
    assert restored[0][0] == "checkpoint-8"  # 12 was saved after the jump
    assert_same(restored[0][1], watch.weights[8])
    assert "went back to checkpoint-8 (rollback 1 of 3), with kl_coef 0.02" in warnings()[0]
    assert_same(watch.weights[8], {name: watch.weights[8][name] for name in restored[0][1]})
    if every_time:
        assert len(restored) == 3 and trainer.state.global_step == 24
    else:
        assert len(restored) == 1 and trainer.kl_coef == 0.02 and trainer.state.global_step == 24


def test_rollbacks_come_to_an_end(make_sharp, warnings):
    class Always(Jump):
        def on_step_end(self, args, state, control, model, **kwargs):
            self.step = state.global_step if state.global_step % 4 == 2 and state.global_step > 8 else 0
            super().on_step_end(args, state, control, model, **kwargs)

    options = LONG | {"max_kl": 5.0, "max_kl_action": "rollback", "save_strategy": "steps", "save_steps": 4}
    trainer = make_sharp(callbacks=[Always(0)], **(options | {"max_steps": 60}))
    trainer.train()
    assert trainer.ppo.rollbacks == 3 and trainer.state.global_step == 25  # at 12, 16 and 20, and the end at 24
    assert "the weights are those of checkpoint-8" in warnings()[-1] and "training stops" in warnings()[-1]


def test_without_a_checkpoint_there_is_nothing_to_roll_back_to(make_sharp, warnings):
    trainer = make_sharp(callbacks=[Jump(2)], max_kl=5.0, max_kl_action="rollback", **LONG)
    trainer.train()
    assert trainer.state.global_step == 5
    assert "and there is no checkpoint below it to go back to: raise kl_coef" in warnings()[-1]


class Break(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 8:
            next(p for name, p in model.named_parameters() if "lora_B.default" in name).data.fill_(float("nan"))


def test_weights_that_broke_are_taken_back_and_end_the_run(make_sharp, warnings):
    watch = Watch()
    trainer = make_sharp(callbacks=[watch, Break()], max_steps=12, save_strategy="steps", save_steps=2)
    trainer.train()
    assert trainer.state.global_step == 9
    assert "those of checkpoint-4 are restored: lower learning_rate" in warnings()[-1]
    assert_same(trained(trainer.model), watch.weights[4])


def test_weights_that_broke_without_a_checkpoint_are_one_line(make_sharp):
    with pytest.raises(
        UserError, match="step 8: the weights of the policy are not finite, and there is no checkpoint"
    ) as e:
        make_sharp(callbacks=[Break()], max_steps=12).train()
    assert "\n" not in str(e.value)


# Results of a stopped run


def checkpoints(trainer):
    return {int(path.name.split("-")[1]) for path in Path(trainer.args.output_dir).glob("checkpoint-*")}


def test_a_stop_goes_back_to_the_last_good_checkpoint_which_rotation_kept_and_can_train_again(make_sharp, warnings):
    watch = Watch()
    options = LONG | {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    trainer = make_sharp(callbacks=[Jump(10, every_time=False), watch], max_kl=5.0, **options)
    trainer.train()
    assert trainer.state.global_step == 13 and "above max_kl = 5" in trainer.stop_reason
    assert "the weights are those of checkpoint-8 (to continue, resume from it)" in warnings()[-1]
    assert_same(trained(trainer.model), watch.weights[8])
    assert checkpoints(trainer) == {8, 12}  # none of step 13: it would hold the rollout that ended the run
    assert trainer.args.save_total_limit == 2
    trainer.train()
    assert trainer.stop_reason is None and trainer.state.global_step == 24
    assert "objective/kl" in next(log for log in trainer.state.log_history if "loss" in log)  # a rollout of its own
    assert moved(watch.weights[1], watch.weights[13])


def test_steps_skipped_in_an_earlier_training_do_not_count(make_trainer):
    trainer = make_trainer(max_steps=4, max_skipped_steps=2)
    spoiled(trainer, {4})
    trainer.train()
    assert trainer.ppo.skipped_in_a_row == 1
    spoiled(trainer, {1})
    trainer.train()
    assert trainer.stop_reason is None and trainer.state.global_step == 4


@pytest.mark.parametrize("limit, kept", [(1, {2}), (2, {2, 12, 16}), (4, {2, 12, 14, 16}), (None, None)])
def test_save_total_limit_keeps_the_newest_the_best_and_the_last_good_one(make_trainer, prompts, limit, kept):
    def judge(prompts, trainer_state, **kwargs):
        return [-float(trainer_state.global_step)] * len(prompts)

    options = {"max_steps": 16, "eval_dataset": prompts.select(range(1)), "eval_strategy": "steps", "eval_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 2, "eval_reward_funcs": judge, "exact_kl_rows": 0}
    trainer = make_trainer(metric_for_best_model="rewards/judge/mean", save_total_limit=limit, **options)
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert checkpoints(trainer) == (kept or set(range(2, 18, 2)))


# Half precision: the steps of a gradient scaler


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def make_fp16(request, make_sharp):
    """`make_sharp` in fp16; on a CPU, where accelerate has no gradient scaler, with a real one put in."""

    def make(**options):
        on_cpu = request.param == "cpu"
        trainer = make_sharp(use_cpu=on_cpu, fp16=True, **options)
        if on_cpu:
            trainer.accelerator.scaler, trainer.accelerator.native_amp = torch.amp.GradScaler("cpu"), True
        return trainer

    return make


@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_in_fp16_an_overflow_is_skipped_counted_and_said(make_fp16, warnings, critic):
    watch = Watch()
    trainer = make_fp16(max_steps=10, callbacks=[watch], critic=critic, weight_decay=0.1)
    spoiled(trainer, {6})
    trainer.train()
    skipped = {log["step"]: log["guards/skipped_steps"] for log in trainer.state.log_history if "loss" in log}
    assert skipped[6] == 1 and sum(skipped.values()) < 8  # the first steps may look for the scale
    for step in range(2, 11):
        assert moved(watch.weights[step], watch.weights[step - 1]) == (skipped[step] == 0), step
    lines = [line for line in warnings() if "gradients overflow at a loss scale of" in line]
    assert len(lines) == sum(skipped.values()) and trainer.stop_reason is None
    assert trainer.accelerator.scaler.get_scale() == 65536 / 2 ** len(lines)


def test_in_fp16_too_many_steps_that_no_scale_mends_end_training(make_fp16, warnings):
    watch = Watch()
    trainer = make_fp16(max_steps=40, callbacks=[watch], max_skipped_steps=3)
    spoiled(trainer, set(range(3, 41)))
    trainer.train()
    assert "3 optimizer steps in a row had gradients that are not finite" in trainer.stop_reason
    assert trainer.state.global_step < 25 and trainer.accelerator.scaler.get_scale() == 0.125
    assert_same(trained(trainer.model), watch.weights[2])


@pytest.mark.parametrize("critic", ["head", "adapter"])
@pytest.mark.parametrize("step", [0, 10])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_in_fp16_a_stop_changes_nothing(make_fp16, critic, step, max_grad_norm):
    watch, jump = Watch(), Jump(step)
    options = LONG | {"check_first_rollout": False}  # the policy moves before the first rollout
    trainer = make_fp16(callbacks=[jump, watch], max_kl=5.0, critic=critic, max_grad_norm=max_grad_norm, **options)
    before = {}
    if step == 0:  # the scaler has not been used yet
        jump.on_step_end(trainer.args, trainer.state, trainer.control, trainer.model)
        before = trained(trainer.model)
    trainer.train()
    stopped_at = 13 if step else 1
    assert trainer.state.global_step == stopped_at and "above max_kl" in trainer.stop_reason
    assert_same(watch.weights[stopped_at], watch.weights.get(stopped_at - 1, before))


def test_weights_in_fp16_are_not_trained_in_fp16(make_trainer, tiny_config):
    with pytest.raises(UserError, match="fp16=True: .* is not supported: load") as error:
        make_trainer(fp16=True, model=LlamaForCausalLM(tiny_config).half(), peft_config=None)
    assert "\n" not in str(error.value)


# Early stops


def test_inner_epochs_end_where_the_policy_has_moved_too_far(make_trainer):
    stopped, steps = [], {}
    for target in (None, 1e-9, 1e9):
        trainer = make_trainer(early_stop_kl=target, max_steps=8, num_ppo_epochs=2)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        steps[target] = [log["step"] for log in logs if "objective/kl" in log]  # a rollout was made in this step
        stopped.append([log.get("policy/stopped_early") for log in logs])
    assert steps[None] == steps[1e9] == [1, 5]
    assert steps[1e-9] == [1, 3, 5, 7]  # the first step moves nothing, the second shows what it did
    assert stopped[0] == [None] * 8 and stopped[1] == [0, 1] * 4 and stopped[2] == [0] * 8


def test_an_early_stop_resumes_exactly(make_trainer):
    options = {"early_stop_kl": 1e-9, "max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    straight = make_trainer(folder="straight", **options)
    straight.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    make_trainer(folder="parts", callbacks=[Stop()], **options).train()
    resumed = make_trainer(folder="parts", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(trained(resumed.model), trained(straight.model))


def test_early_stopping_by_an_evaluation(make_trainer, prompts):
    verdicts = iter([2.0, 1.0, 1.0, 5.0])

    def judge(prompts, **kwargs):
        return [next(verdicts)] * len(prompts)

    trainer = make_trainer(
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        max_steps=8,
        eval_dataset=prompts,
        eval_reward_funcs=judge,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        metric_for_best_model="rewards/judge/mean",
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.state.best_global_step == 2


def test_early_stopping_goes_on_counting_in_a_resumed_run(make_trainer, prompts):
    def judge(prompts, trainer_state, **kwargs):
        return [-float(trainer_state.global_step)] * len(prompts)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    options = {"max_steps": 12, "eval_dataset": prompts, "eval_reward_funcs": judge, "exact_kl_rows": 0}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"metric_for_best_model": "rewards/judge/mean", "load_best_model_at_end": True}
    patience = {"early_stopping_patience": 2}
    make_trainer(callbacks=[EarlyStoppingCallback(**patience), Stop()], **options).train()
    resumed = make_trainer(callbacks=[EarlyStoppingCallback(**patience)], **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6  # one evaluation without progress before the interruption, one after


# Warnings and signals


def test_a_warning_is_said_once_in_so_many_rollouts(make_trainer, warnings):
    def flat(completions, **kwargs):
        return [1.0] * len(completions)

    options = {"reward_funcs": flat, "reward_clip": 1.0, "max_steps": 12, "num_ppo_epochs": 1, "num_mini_batches": 1}
    for every, expected in ((100, 1), (4, 3)):
        before = len(warnings())
        make_trainer(warn_every=every, **options).train()
        assert sum("reward_clip" in line for line in warnings()[before:]) == expected


def test_sigterm_saves_at_the_end_of_the_step_and_the_run_resumes_exactly(make_trainer):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 100, "critic": "adapter"}
    straight = make_trainer(folder="straight", **options)
    straight.train()

    class Terminate(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 4:  # in the middle of step 5, which is in the middle of a rollout
                os.kill(os.getpid(), signal.SIGTERM)

    accumulate = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    before = signal.getsignal(signal.SIGTERM)
    first = make_trainer(folder="parts", callbacks=[Terminate()], **(options | accumulate))
    with pytest.raises(SystemExit) as exit:
        first.train()
    assert exit.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    folder = Path(first.args.output_dir) / "checkpoint-5"
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 5
    second = make_trainer(folder="parts", **(options | accumulate))
    second.train(resume_from_checkpoint=True)
    whole = make_trainer(folder="whole", **(options | accumulate))
    whole.train()
    assert second.state.global_step == 8
    assert_same(trained(second.model), trained(whole.model))


def test_a_failed_training_gives_sigterm_back(make_trainer):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ZeroDivisionError

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        make_trainer(callbacks=[Fail()]).train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_is_acted_on_only_where_all_processes_agreed(make_trainer):
    seen = []

    class Late(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:  # after the processes have asked each other, for the last time
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        trainer = make_trainer(callbacks=[Late()], max_steps=4, save_strategy="steps", save_steps=100)
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM] and not trainer._signal.agreed  # passed on when training had ended


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kl_target": 1.0, "kl_horizon": 1}, "kl_horizon=1 is a fifth or less of a rollout's 8 completions"),
        ({"max_kl": 0.0}, "max_kl must be positive, got 0.0: set it to None for no limit."),
        ({"max_kl_action": "pray"}, "max_kl_action must be one of stop, raise_kl_coef, rollback, got 'pray'."),
        (
            {"max_kl_action": "raise_kl_coef", "kl_coef": 0.0},
            "max_kl_action: raise_kl_coef doubles kl_coef, which is 0",
        ),
        ({"max_skipped_steps": 0}, "max_skipped_steps must be at least 1, got 0."),
        ({"kl_placement": "loss", "kl_estimator": "k1"}, "the gradient of k1 in the loss is zero in expectation"),
        ({"critic": "oracle"}, "critic must be one of adapter, head, model, none, got 'oracle'."),
        ({"critic": "adapter", "peft_config": None}, "critic='adapter' needs a policy that is an adapter"),
        ({"critic": "model"}, "critic='model' needs value_model if"),
        ({"ptx_coef": 0.1}, "PPO-ptx needs both ptx_dataset and ptx_coef above 0"),
        ({"length_target": -1}, "length_target must not be negative, got -1."),
    ],
)
def test_a_mistake_is_one_line(make_trainer, options, message):
    with pytest.raises(UserError) as error:
        make_trainer(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_updates_that_are_too_large_are_said(make_sharp, warnings, history_of):
    options = {"learning_rate": 0.02, "clip_range": 0.01, "num_ppo_epochs": 4, "num_mini_batches": 1, "max_steps": 24}
    trainer = make_sharp(**options)
    trainer.train()
    assert any("of tokens were clipped (clip_range)" in line for line in warnings())
    assert all("policy/clipfrac_avg" in row for row in history_of(trainer)[:-1])
