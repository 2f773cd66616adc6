"""A signal in a rollout or an evaluation: what is saved is the state before it, and a resumed run misses nothing."""

import asyncio
import os
import random
import signal

import pytest
import torch
from transformers import TrainerCallback

from hf_rlhf_ext.checkpointing import is_complete
from hf_rlhf_ext.ppo.engine import Samples, TransformersEngine
from hf_rlhf_ext.training.stopping import StopWithCheckpoint, TrainingStopped

OPTIONS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_mini_batches": 2}
OPTIONS |= {"num_ppo_epochs": 1, "max_steps": 6, "critic": "head", "lr_scheduler_type": "linear"}
OPTIONS |= {"normalize_rewards": True, "kl_target": 0.5, "kl_horizon": 100, "learning_rate": 1e-2}
OPTIONS |= {"max_completion_length": 6, "save_strategy": "steps", "save_steps": 100}
SECOND, THIRD = 2, 3  # rollouts: a new one every two steps


class Noisy:
    """A reward with random numbers of Python, which sends a signal in one of its calls."""

    def __init__(self, call=None, number=signal.SIGTERM):
        self.call, self.calls, self.number = call, 0, number
        self.after_signal = 0
        self.__name__ = "noisy"

    def __call__(self, completions, **kwargs):
        self.calls += 1
        scores = [text.count("e") - 0.2 * len(text) + random.random() for text in completions]
        if self.calls == self.call:
            os.kill(os.getpid(), self.number)
            for _ in range(1000):  # a signal is handled between two instructions
                self.after_signal += 1
        return scores


class SignalAtToken:
    """Sends a signal at the n-th forward pass of generation in the rollout with a number, and counts those after it."""

    def __init__(self, trainer, rollout, token=3, number=signal.SIGTERM):
        self.trainer, self.rollout, self.token, self.number = trainer, rollout, token, number
        self.seen = self.after = 0
        self.handle = trainer.model.get_output_embeddings().register_forward_pre_hook(self)

    def __call__(self, module, args):
        if self.trainer.model.training or self.trainer.ppo.rollout_index != self.rollout - 1:
            return
        self.seen += 1
        if self.seen == self.token:
            os.kill(os.getpid(), self.number)
        self.after += self.seen > self.token


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def outcome(trainer):
    """What must be the same to the bit."""
    state = trainer.ppo
    logs = [log["objective/scores"] for log in trainer.state.log_history if "objective/scores" in log]
    return weights(trainer), (state.kl_coef, state.moments, state.rollout_index, logs[-1])


def assert_same(first, second):
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name
    assert first[1] == second[1]


@pytest.fixture
def straight(make_trainer):
    def run(**options):
        trainer = make_trainer("straight", reward_funcs=Noisy(), **(OPTIONS | options))
        random.seed(5)
        trainer.train()
        return outcome(trainer)

    return run


def stopped(trainer, *, status=143):
    random.seed(5)
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == status
    assert not trainer.is_in_train and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def resumed(make_trainer, **options):
    trainer = make_trainer(reward_funcs=Noisy(), **(OPTIONS | options))
    random.seed(77)  # another process
    trainer.train(resume_from_checkpoint=True)
    return outcome(trainer)


@pytest.mark.parametrize("rollout", [SECOND, THIRD])
def test_in_generation_it_ends_at_the_next_token_and_resumes_to_the_bit(make_trainer, straight, tmp_path, rollout):
    trainer = make_trainer(reward_funcs=Noisy(), **OPTIONS)
    sent = SignalAtToken(trainer, rollout)
    stopped(trainer)
    steps = 2 * (rollout - 1)
    assert trainer.state.global_step == steps and sent.seen > 0 and sent.after <= 1
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{steps}"]
    assert not (tmp_path / "out" / f"checkpoint-{steps}" / "ppo_rollout.safetensors").exists()
    assert_same(resumed(make_trainer), straight())


def test_a_reward_function_is_ended_where_it_is(make_trainer, straight):
    reward = Noisy(SECOND)
    stopped(make_trainer(reward_funcs=reward, **OPTIONS))
    assert reward.after_signal < 1000
    assert_same(resumed(make_trainer), straight())


def test_an_async_function_is_not_waited_for(make_trainer, tmp_path):
    calls, finished = [], []

    async def slow(completions, **kwargs):
        calls.append(1)
        if len(calls) == SECOND:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(20)
            finished.append(1)
        return [0.1 * len(text) for text in completions]

    stopped(make_trainer(reward_funcs=slow, **OPTIONS))
    assert len(calls) == SECOND and not finished and is_complete(tmp_path / "out" / "checkpoint-2")


def test_a_function_that_swallows_the_stop_is_waited_for(make_trainer, straight):
    class Stubborn(Noisy):
        def __call__(self, completions, **kwargs):
            try:
                return super().__call__(completions, **kwargs)
            except BaseException:
                return [0.0] * len(completions)

    stopped(make_trainer(reward_funcs=Stubborn(SECOND), **OPTIONS))
    assert_same(resumed(make_trainer), straight())


def test_an_engine_of_the_user_is_ended_where_it_is(make_trainer, tmp_path):
    class Slow:
        def __init__(self):
            self.own, self.calls, self.went_on = TransformersEngine(), 0, False

        def sync(self, policy):
            self.own.sync(policy)

        def generate(self, prompt_ids, sampling, n=1) -> Samples:
            self.calls += 1
            if self.calls == SECOND:
                os.kill(os.getpid(), signal.SIGTERM)
                self.went_on = bool([0 for _ in range(1000)])
            return self.own.generate(prompt_ids, sampling, n)

    engine = Slow()
    stopped(make_trainer(engine=engine, **OPTIONS))
    assert not engine.went_on and is_complete(tmp_path / "out" / "checkpoint-2")


def test_a_checkpoint_that_is_there_is_not_put_at_risk(make_trainer, straight, tmp_path):
    options = {"save_steps": 2}
    trainer = make_trainer(reward_funcs=Noisy(SECOND), **(OPTIONS | options))
    written = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            written.append((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns)

    trainer.add_callback(Look())
    stopped(trainer)
    assert written == [(tmp_path / "out" / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns]
    assert_same(resumed(make_trainer, **options), straight(**options))


def test_before_the_first_step_there_is_nothing_to_save(make_trainer, tmp_path, caplog):
    trainer = make_trainer(reward_funcs=Noisy(1), **OPTIONS)
    stopped(trainer)
    assert trainer.state.global_step == 0 and not list((tmp_path / "out").glob("checkpoint-*"))
    assert "before its first step" in caplog.text and "resume_from_checkpoint" not in caplog.text
    trainer.train()  # in the same process it goes on as if it had not begun
    assert trainer.state.global_step == 6 and trainer.ppo.updates == 3


def plain_reward(completions, **kwargs):
    return [text.count("e") - 0.2 * len(text) for text in completions]


def test_an_evaluation_is_left_and_the_step_before_it_is_saved(make_trainer, tmp_path, prompts):
    options = OPTIONS | {"eval_dataset": prompts, "eval_strategy": "steps", "eval_steps": 3, "critic": "adapter"}
    options |= {"per_device_eval_batch_size": 2, "reward_funcs": plain_reward}
    straight = make_trainer("straight", **options)
    straight.train()

    trainer = make_trainer(**options)
    evaluated = []

    def send(module, args):
        if trainer.state.global_step == 3 and not trainer.model.training:
            evaluated.append(1)
            if len(evaluated) == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.model.get_output_embeddings().register_forward_pre_hook(send)
    stopped(trainer)
    assert 3 <= len(evaluated) <= 4 and is_complete(tmp_path / "out" / "checkpoint-3")
    assert not any("eval_objective/scores" in log for log in trainer.state.log_history)
    again = make_trainer(**options)
    again.train(resume_from_checkpoint=True)
    assert_same((weights(again), None), (weights(straight), None))
    evaluations = [
        [log for log in run.state.log_history if "eval_objective/scores" in log] for run in (straight, again)
    ]
    assert [log["step"] for log in evaluations[1]] == [6]
    assert evaluations[1][0]["eval_objective/scores"] == evaluations[0][1]["eval_objective/scores"]


def test_an_evaluation_before_the_first_step_ends_training(make_trainer, prompts, tmp_path, caplog):
    options = OPTIONS | {"eval_dataset": prompts, "eval_strategy": "steps", "eval_on_start": True}
    stopped(make_trainer(reward_funcs=Noisy(1), **options))
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert "a signal has ended training in an evaluation, without a checkpoint" in caplog.text


def test_ctrl_c_of_a_recipe_says_so_and_saves(make_trainer, straight, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    said = []
    try:
        callback = StopWithCheckpoint(say=said.append)
        trainer = make_trainer(reward_funcs=Noisy(SECOND, signal.SIGINT), callbacks=[callback], **OPTIONS)
        random.seed(5)
        with pytest.raises(TrainingStopped) as ended:
            trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.signal == signal.SIGINT and ended.value.step == 2
    assert said == ["Ctrl-C: saving a checkpoint of the last step, without this rollout; Ctrl-C again ends at once"]
    assert_same(resumed(make_trainer), straight())


def test_outside_of_training_a_signal_keeps_its_meaning(make_trainer, prompts):
    trainer = make_trainer(reward_funcs=Noisy(SECOND), **OPTIONS)
    stopped(trainer)
    assert len(trainer.sample_and_score(prompts)) == len(prompts)  # the signal of before is over
