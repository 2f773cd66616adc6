"""Ctrl-C in a gradient accumulation and `train()` again; the noise of NEFTune, which is on in training only."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from hf_rlhf_ext.reward.scorer import RewardScorer

OPTIONS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 3}
OPTIONS |= {"lr_scheduler_type": "linear", "normalize_rewards": False, "max_tokens_per_batch": 40}


@pytest.fixture
def pairs():
    rows = [{"prompt": f"day {k}", "chosen": " happy people" + "!" * (k % 3), "rejected": " sad"} for k in range(8)]
    return Dataset.from_list(rows)


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


class CtrlC(TrainerCallback):
    def __init__(self):
        self.done = False

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and not self.done:
            self.done = True
            raise KeyboardInterrupt


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def logs_of(trainer):
    logs = []
    for log in trainer.state.log_history:
        timed = ("runtime", "per_second", "num_tokens", "flos")
        logs.append({name: value for name, value in log.items() if not any(part in name for part in timed)})
    return logs


def test_ctrl_c_in_an_accumulation_and_train_again(make_trainer, seqcls, pairs):
    options = {"neftune_noise_alpha": 5.0}  # its hook is removed at the regular end of training only
    interrupted = make_trainer(pairs, model=copy.deepcopy(seqcls), callbacks=[CtrlC()], **(OPTIONS | options))
    stopped = make_trainer(pairs, model=copy.deepcopy(seqcls), callbacks=[StopAt()], **(OPTIONS | options))
    torch.manual_seed(5)  # of the noise and of the order of the rows
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert not interrupted.is_in_train
    assert any(p.grad is not None and p.grad.any() for p in interrupted.model.parameters())
    torch.manual_seed(5)
    stopped.train()
    stopped.callback_handler.pop_callback(StopAt)
    assert_equal(weights(interrupted), weights(stopped))
    for trainer in (interrupted, stopped):
        torch.manual_seed(11)
        trainer.train()
    assert_equal(weights(interrupted), weights(stopped))
    assert logs_of(interrupted) == logs_of(stopped)


def test_neftune_acts_in_training_and_nowhere_else(make_trainer, seqcls, pairs, chat_tokenizer):
    trained = {}
    for alpha in (None, 5.0):
        options = {"neftune_noise_alpha": alpha, "normalize_rewards": True, "eval_dataset": pairs, "max_steps": 2}
        trainer = make_trainer(pairs, model=copy.deepcopy(seqcls), **(OPTIONS | options))
        trainer.train()
        trained[alpha] = weights(trainer)
        # Evaluation and normalization are those of the model without noise.
        scorer = RewardScorer(trainer.model, chat_tokenizer)
        chosen = scorer(prompts=pairs["prompt"], completions=pairs["chosen"])
        rejected = scorer(prompts=pairs["prompt"], completions=pairs["rejected"])
        assert trainer.normalization.mean == pytest.approx(sum(chosen + rejected) / 16, abs=1e-5)
        metrics = trainer.evaluate()
        assert metrics["eval_mean_reward"] == pytest.approx(sum(chosen + rejected) / 16, abs=1e-5)
        assert trainer.evaluate()["eval_loss"] == metrics["eval_loss"]
    assert any(not torch.equal(trained[None][name], trained[5.0][name]) for name in trained[None])
