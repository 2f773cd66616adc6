"""Ctrl-C anywhere, and `train()` again: as if the run had been stopped at the end of its last optimizer step."""

import pytest
import torch
from transformers import TrainerCallback

OPTIONS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_mini_batches": 2}
OPTIONS |= {"num_ppo_epochs": 2, "max_steps": 6, "critic": "head", "lr_scheduler_type": "linear"}
OPTIONS |= {"normalize_rewards": True, "kl_target": 0.5, "kl_horizon": 100, "early_stop_kl": 1e9, "learning_rate": 1e-2}
OPTIONS |= {"logging_steps": 4}  # metrics are summed over several steps


class StopAt(TrainerCallback):
    """Ends training after an optimizer step, as a guard would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class CtrlC(TrainerCallback):
    """Ctrl-C after the first micro-step of an optimizer step, in the middle of a gradient accumulation."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise KeyboardInterrupt


class CtrlCInReward:
    """Ctrl-C in the reward function of a rollout."""

    def __init__(self, call):
        self.call, self.calls = call, 0
        self.__name__ = "letters"

    def __call__(self, completions, **kwargs):
        self.calls += 1
        if self.calls == self.call:
            raise KeyboardInterrupt
        return [text.count("e") - 0.2 * len(text) for text in completions]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def again(trainer):
    """The weights and logs of `train` from the same random state."""
    torch.manual_seed(11)
    trainer.train()
    logs = [
        {k: v for k, v in log.items() if "runtime" not in k and "_per_second" not in k}
        for log in trainer.state.log_history
    ]
    return weights(trainer), logs


def stopped_after(make_trainer, step, **options):
    trainer = make_trainer(callbacks=[StopAt(step)], reward_funcs=CtrlCInReward(None), **(OPTIONS | options))
    trainer.train()
    trainer.callback_handler.pop_callback(StopAt)
    assert trainer.state.global_step == step
    return trainer


def interrupted(trainer):
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not trainer.is_in_train
    return trainer


@pytest.mark.parametrize("step", [0, 3])
def test_in_the_middle_of_an_accumulation(make_trainer, step):
    trainer = make_trainer(callbacks=[CtrlC(step)], reward_funcs=CtrlCInReward(None), **OPTIONS)
    interrupted(trainer)
    assert any(p.grad is not None and p.grad.any() for p in trainer.model.parameters())  # something to clear
    if step == 0:
        # No step was taken: only the half-used rollout is gone.
        fresh = make_trainer(reward_funcs=CtrlCInReward(None), **OPTIONS)
        assert_equal(weights(trainer), weights(fresh))
        assert trainer.ppo.rollout_index == 0
        found, logs = again(trainer)
        assert trainer.ppo.rollout_index == 2  # the rollouts 1 and 2
        assert trainer.state.global_step == 6 and all("loss/policy_avg" in log for log in logs[:-1])
        return
    expected = stopped_after(make_trainer, step)
    assert_equal(weights(trainer), weights(expected))
    found, logs = again(trainer)
    wanted, wanted_logs = again(expected)
    assert_equal(found, wanted)
    assert logs == wanted_logs


def test_in_a_reward_function(make_trainer):
    reward = CtrlCInReward(2)  # the second rollout, after four steps
    trainer = interrupted(make_trainer(reward_funcs=reward, **OPTIONS))
    expected = stopped_after(make_trainer, 4)
    assert_equal(weights(trainer), weights(expected))
    assert trainer.ppo.kl_coef == expected.ppo.kl_coef and trainer.ppo.moments == expected.ppo.moments
    found, logs = again(trainer)
    wanted, wanted_logs = again(expected)
    assert_equal(found, wanted)
    assert logs == wanted_logs


def test_in_generation_the_base_is_restored(make_trainer):
    trainer = make_trainer(reward_funcs=CtrlCInReward(None), **OPTIONS)
    seen = []

    def ctrl_c(module, args):
        if not trainer.model.training:
            seen.append(trainer.ppo.updates)
            if trainer.ppo.rollout_index == 1 and len([n for n in seen if n == seen[-1]]) == 3:
                raise KeyboardInterrupt

    handle = trainer.model.get_output_embeddings().register_forward_pre_hook(ctrl_c)
    interrupted(trainer)
    handle.remove()
    expected = stopped_after(make_trainer, 4)
    assert_equal(weights(trainer), weights(expected))


def test_evaluation_after_ctrl_c_changes_nothing_and_training_goes_on(make_trainer, prompts):
    trainer = interrupted(make_trainer(callbacks=[CtrlC(3)], eval_dataset=prompts, **OPTIONS))
    before = weights(trainer)
    metrics = trainer.evaluate()
    assert metrics["eval_objective/kl"] == pytest.approx(metrics["eval_objective/kl_exact"], abs=1.0)
    assert_equal(weights(trainer), before)
    trainer.train()
    assert trainer.state.global_step == 6


class CtrlCBeforeTheStep(TrainerCallback):
    """Ctrl-C between the clipping of the gradients, for which they are unscaled, and the optimizer's step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3:
            control.interrupted = getattr(control, "interrupted", 0) + 1
            if control.interrupted == 1:
                raise KeyboardInterrupt


def test_in_fp16_unscaled_gradients_are_forgotten(make_trainer):
    trainer = make_trainer(callbacks=[CtrlCBeforeTheStep()], fp16=True, **OPTIONS)
    # On a CPU, accelerate has no gradient scaler.
    trainer.accelerator.scaler, trainer.accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=4.0), True
    interrupted(trainer)
    before = trainer.accelerator.scaler.get_scale()
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.accelerator.scaler.get_scale() == before == 4.0


def test_a_second_call_starts_with_a_new_rollout(make_trainer):
    seen = []

    def reward(completions, **kwargs):
        seen.append(completions)
        return [float(len(text)) for text in completions]

    trainer = make_trainer(reward_funcs=reward, **(OPTIONS | {"max_steps": 2}))  # half of a rollout
    trainer.train()
    assert len(seen) == 1
    trainer.train()
    assert len(seen) == 2 and trainer.ppo.rollout_index == 1
