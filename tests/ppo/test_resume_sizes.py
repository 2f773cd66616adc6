"""A run that resumes with other batch sizes goes on after its last prompt, and uses all as often as asked."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_rlhf_ext.ppo import ptx
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.prompts import rows_from
from hf_rlhf_ext.ppo.stretch import Sizes, Stretch
from hf_rlhf_ext.ppo.trainer import PPOTrainer

N_PROMPTS = 12
LETTERS = "abcdefghijkl"
# A rollout has 4 completions for 2 optimizer steps: 3 passes over 12 prompts are 9 rollouts in 18 steps.
OPTIONS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "num_mini_batches": 2}
OPTIONS |= {"num_ppo_epochs": 1, "num_train_epochs": 3, "max_steps": -1, "max_completion_length": 2}
OPTIONS |= {"lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
OPTIONS |= {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "critic": "head"}
OPTIONS |= {"disable_tqdm": True, "logging_steps": 1, "seed": 3}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class Prompted:
    """A reward function that notes the prompts of each rollout, as rows of the dataset."""

    __name__ = "prompted"

    def __init__(self):
        self.rollouts = []

    def __call__(self, prompts, completions, **kwargs):
        self.rollouts.append([LETTERS.index(prompt) for prompt in prompts])
        return [text.count("e") - 0.2 * len(text) for text in completions]

    @property
    def rows(self):
        return [row for rows in self.rollouts for row in rows]


@pytest.fixture(scope="module")
def make_in(chat_tokenizer_factory):
    """`make_in(folder, **options)`: a trainer of a tiny model, and its reward function."""
    tokenizer = chat_tokenizer_factory()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    data = Dataset.from_dict({"prompt": list(LETTERS)})

    def make_in(folder, callbacks=None, texts=None, **options):
        torch.manual_seed(0)
        args = PPOConfig(str(folder), **(OPTIONS | options))
        reward = Prompted()
        model = LlamaForCausalLM(config)
        given = {"processing_class": tokenizer, "callbacks": callbacks, "ptx_dataset": texts}
        return PPOTrainer(model, reward, args, data, **given), reward

    return make_in


@pytest.fixture
def make(make_in, tmp_path):
    return lambda **options: make_in(tmp_path, **options)


def checkpoint(trainer, step):
    return Path(trainer.args.output_dir) / f"checkpoint-{step}"


def edit(folder, change):
    state = json.loads((folder / "ppo_state.json").read_text())
    change(state)
    (folder / "ppo_state.json").write_text(json.dumps(state))


def stream(n):
    return rows_from(0, n, N_PROMPTS, 3)


@pytest.fixture(scope="module")
def first_run(make_in, tmp_path_factory):
    trainer, reward = make_in(tmp_path_factory.mktemp("first"), callbacks=[StopAt(6)])
    trainer.train()
    assert reward.rows == stream(12) and trainer.state.max_steps == 18
    return checkpoint(trainer, 6)


@pytest.fixture
def begun(first_run, tmp_path):
    """Checkpoint of a run that stopped after 6 steps: 3 rollouts, which are 12 prompts, one of three passes."""
    return Path(shutil.copytree(first_run, tmp_path / "checkpoint-6"))


@pytest.mark.parametrize(
    "other, completions, last_step",
    [
        ({"per_device_train_batch_size": 4}, 8, 6 + 3 * 2),
        ({"gradient_accumulation_steps": 2}, 8, 6 + 3 * 2),
        ({"num_mini_batches": 1}, 2, 6 + 12),
        ({"num_mini_batches": 1, "per_device_train_batch_size": 4}, 4, 6 + 6),  # fewer steps for as many completions
        ({"num_ppo_epochs": 2}, 4, 6 + 6 * 4),
        # The old run had more steps than the new one would have in all, and the last rollout goes beyond the end.
        ({"per_device_train_batch_size": 16, "num_mini_batches": 1}, 16, 6 + 2),
    ],
)
def test_the_prompts_go_on_and_all_are_used_as_often_as_asked(make, begun, caplog, other, completions, last_step):
    trainer, reward = make(**other)
    given = trainer.args.max_steps
    trainer.train(resume_from_checkpoint=str(begun))
    assert {len(rows) for rows in reward.rollouts} == {completions}
    assert stream(12) + reward.rows == stream(12 + len(reward.rows))
    assert 36 <= 12 + len(reward.rows) < 36 + completions  # three passes, up to whole rollouts
    assert trainer.state.global_step == trainer.state.max_steps == last_step
    (line,) = (record.getMessage() for record in caplog.records if "a rollout now has" in record.getMessage())
    assert (
        f"a rollout now has {completions} completions" in line
        and "had 4 for 2: the prompts go on after the first 12" in line
    )
    assert f"training ends at step {last_step}, when num_train_epochs=3 are complete" in line and "\n" not in line
    logs = [log for log in trainer.state.log_history if "loss" in log and log["step"] > 6]
    rates = [log["learning_rate"] for log in logs]
    # The first step has the rate that the checkpoint saved. From then on, they follow the schedule of all new steps.
    assert len(rates) == last_step - 6 and rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3 / last_step)  # the schedule ends with training
    episodes = [log["episode"] for log in logs if "episode" in log]
    assert episodes[0] == 12 + completions and episodes[-1] == 12 + len(reward.rows)
    assert trainer.args.max_steps == given  # of a new run again


def test_equal_sizes_say_nothing_and_end_at_the_same_step(make, begun, caplog):
    trainer, reward = make()
    trainer.train(resume_from_checkpoint=str(begun))
    assert stream(12) + reward.rows == stream(36) and trainer.state.global_step == 18
    assert "a rollout now has" not in caplog.text


def test_another_number_of_processes_counts_too(make, begun):
    edit(begun, lambda state: state["geometry"].update(num_processes=2))  # as if two had made the rollouts
    trainer, reward = make()
    trainer.train(resume_from_checkpoint=str(begun))
    assert stream(24) + reward.rows == stream(36) and trainer.state.global_step == 6 + 3 * 2


def test_an_earlier_version_saved_no_position(make, begun):
    edit(begun, lambda state: state.pop("stretch"))
    trainer, reward = make(per_device_train_batch_size=4)
    trainer.train(resume_from_checkpoint=str(begun))
    assert stream(12) + reward.rows == stream(36) and trainer.state.global_step == 12


def test_max_steps_that_was_set_stays(make, begun, caplog):
    trainer, reward = make(per_device_train_batch_size=4, max_steps=8)
    trainer.train(resume_from_checkpoint=str(begun))
    assert stream(12) + reward.rows == stream(20) and trainer.state.global_step == 8
    assert "training ends at max_steps=8, which counts steps of both sizes" in caplog.text


def test_a_run_with_other_sizes_resumes_exactly(make, begun):
    other = {"per_device_train_batch_size": 4}
    whole, seen = make(**other)
    whole.train(resume_from_checkpoint=str(begun))
    again, rest = make(**other)
    again.train(resume_from_checkpoint=str(checkpoint(whole, 8)))
    assert again.state.global_step == whole.state.global_step == 12
    assert seen.rollouts[1:] == rest.rollouts
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    # And once more with the first sizes, of which there are 24 - 8 = 16 prompts left.
    third, rest = make()
    third.train(resume_from_checkpoint=str(checkpoint(whole, 8)))
    assert stream(20) + rest.rows == stream(36) and third.state.global_step == 8 + 4 * 2


def test_a_new_call_of_train_counts_its_own_epochs(make, begun):
    trainer, reward = make(per_device_train_batch_size=4)
    trainer.train(resume_from_checkpoint=str(begun))
    first = len(reward.rows)
    trainer.train()  # 3 passes in 5 rollouts of 8, after the prompts of the first call
    assert trainer.state.global_step == trainer.state.max_steps == 10
    assert stream(12) + reward.rows == stream(12 + first + 40)
    other, rest = make(num_mini_batches=1)
    other.train(resume_from_checkpoint=str(checkpoint(trainer, 6)))  # 3 of 5 rollouts: 12 of 36 prompts are left
    assert stream(36 + 24) + rest.rows == stream(36 + 24 + 12) and other.state.global_step == 6 + 6


def test_a_finished_run_is_finished_with_other_sizes_too(make, begun):
    trainer, _ = make()
    trainer.train(resume_from_checkpoint=str(begun))
    other, reward = make(per_device_train_batch_size=4)
    other.train(resume_from_checkpoint=str(checkpoint(trainer, 18)))
    assert reward.rows == [] and other.state.global_step == 18


@pytest.mark.parametrize("is_earlier", [False, True], ids=["", "earlier version"])
@pytest.mark.parametrize("of_texts", [{}, {"ptx_batch_size": 3}], ids=["as completions", "own size"])
def test_the_texts_of_ptx_go_on_like_the_prompts(make, monkeypatch, is_earlier, of_texts):
    drawn = []

    def noted(*args, **kwargs):
        drawn.extend(rows := rows_from(*args, **kwargs))
        return rows

    monkeypatch.setattr(ptx, "rows_from", noted)
    options = {"texts": Dataset.from_dict({"text": [f"a {letter}" for letter in LETTERS]}), "ptx_coef": 0.1} | of_texts
    first, _ = make(callbacks=[StopAt(6)], **options)
    first.train()
    assert len(drawn) == 6 * of_texts.get("ptx_batch_size", 2)
    if is_earlier:
        edit(checkpoint(first, 6), lambda state: state.pop("next_text"))
    other, _ = make(per_device_train_batch_size=4, **options)
    other.train(resume_from_checkpoint=str(checkpoint(first, 6)))
    assert other.state.global_step == 12
    assert len(drawn) == 6 * of_texts.get("ptx_batch_size", 2) + 6 * of_texts.get("ptx_batch_size", 4)
    assert drawn == stream(len(drawn))


@pytest.mark.parametrize("epochs, n_prompts, steps", [(1.1, 200, 55), (1.1, 201, 56), (0.0001, 10, 1)])
def test_a_fraction_of_an_epoch_is_rounded_up_to_whole_rollouts_and_no_further(epochs, n_prompts, steps):
    assert Stretch().steps_in_run(epochs, n_prompts, Sizes(4, 1)) == steps


@settings(max_examples=50, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4),
    n_prompts=st.integers(1, 30),
    epochs=st.floats(0.1, 4),
)
def test_stretches_join_and_end_with_the_epochs(parts, n_prompts, epochs):
    stretch, rollout, step, used = Stretch(), 0, 0, 0
    for completions, steps, n_rollouts in parts:
        sizes = Sizes(completions, steps)
        for _ in range(n_rollouts):
            assert stretch.position(rollout, completions) == used
            rollout, step, used = rollout + 1, step + steps, used + completions
        end = stretch.steps_in_run(epochs, n_prompts, sizes)
        missing = (end - step) / steps * completions  # below 0 if more were used than asked for
        assert end == stretch.step or -1e-6 <= used + missing - epochs * n_prompts < completions + 1e-6
        stretch = Stretch(rollout, used, step)
