"""A resumed run gives exactly the same weights as an uninterrupted one."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, TrainerCallback

from hf_rlhf_ext.checkpointing import last_complete_checkpoint
from hf_rlhf_ext.errors import UserError

# A rollout is 4 optimizer steps: 16 steps are 4 rollouts.
WHOLE = {"max_steps": 16, "save_strategy": "steps", "lr_scheduler_type": "linear", "gradient_accumulation_steps": 2}
WHOLE |= {"per_device_train_batch_size": 2, "weight_decay": 0.01}
KINDS = {
    "lora": {},
    "adapter critic": {"critic": "adapter", "normalize_rewards": True},
    "4 completions per prompt": {"num_generations": 4, "per_device_train_batch_size": 8},
    "adaptive KL": {"kl_target": 0.05, "kl_horizon": 40, "kl_coef": 0.2},
    "full": {"peft_config": None, "learning_rate": 1e-3},
    "bf16 and checkpointing": {"bf16": True, "activation_checkpointing": True},
}


class StopAt(TrainerCallback):
    """Ends a run early, like a run that is killed."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def everything(trainer):
    """Weights, including the value head, and the state of the optimizer."""
    found = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for number, state in trainer.optimizer.state_dict()["state"].items():
        found |= {f"optimizer/{number}/{name}": value for name, value in state.items()}
    return found


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def interrupted(make_trainer, step, **options):
    """Trains to `step`, saves a checkpoint, and resumes from it in a new trainer."""
    first = make_trainer(folder="parts", save_steps=step, callbacks=[StopAt(step)], **(WHOLE | options))
    first.train()
    assert first.state.global_step == step
    torch.rand(7)  # a new process may have drawn random numbers before
    second = make_trainer(folder="parts", save_steps=step, **(WHOLE | options))
    second.train(resume_from_checkpoint=True)
    return second


@pytest.mark.parametrize(
    "kind, step",
    [
        ("lora", 8),  # after two rollouts
        ("lora", 6),  # in the middle of one: between its inner epochs
        ("lora", 5),  # and within one
        ("4 completions per prompt", 5),
        ("adaptive KL", 6),
        ("adapter critic", 6),
        ("full", 6),
        pytest.param("bf16 and checkpointing", 6, marks=pytest.mark.slow),
    ],
)
def test_resuming_is_exact(make_trainer, kind, step):
    straight = make_trainer(folder="whole", save_steps=16, **(WHOLE | KINDS[kind]))
    straight.train()
    resumed = interrupted(make_trainer, step, **KINDS[kind])
    assert resumed.state.global_step == straight.state.global_step == 16
    assert_same(everything(resumed), everything(straight))
    assert resumed.kl_coef == straight.kl_coef
    assert resumed.kl_coef != 0.2 or kind != "adaptive KL"
    logs = [[log for log in trainer.state.log_history if "loss" in log] for trainer in (straight, resumed)]
    assert logs[0] == logs[1] and len(logs[0]) == 16


def test_resuming_in_the_same_process_is_exact(make_trainer):
    straight = make_trainer(folder="whole", save_steps=16, critic="adapter", **WHOLE)
    straight.train()
    trainer = make_trainer(folder="parts", save_steps=6, critic="adapter", callbacks=[StopAt(8)], **WHOLE)
    trainer.train()
    groups = len(trainer.optimizer.param_groups)
    trainer.remove_callback(StopAt)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 16 and len(trainer.optimizer.param_groups) == groups
    assert_same(everything(trainer), everything(straight))
    logs = [[log for log in t.state.log_history if "loss" in log] for t in (straight, trainer)]
    assert logs[0] == logs[1]


def test_another_kl_coef_counts_in_a_resumed_run(make_trainer, caplog):
    options = KINDS["adaptive KL"]
    first = make_trainer(save_steps=4, callbacks=[StopAt(4)], **(WHOLE | options))
    first.train()
    assert first.kl_coef != 0.2
    second = make_trainer(save_steps=4, **(WHOLE | options | {"kl_coef": 0.5, "max_steps": 8}))
    second.train(resume_from_checkpoint=True)
    used = [log["objective/kl_coef"] for log in second.state.log_history if "objective/kl_coef" in log]
    assert used == [0.2, 0.5] and "kl_coef was 0.2 (adapted to" in caplog.text
    assert "in checkpoint-4: it is now 0.5, as set in the options" in caplog.text


def test_other_sizes_of_a_rollout_are_refused_in_its_middle_only(make_trainer):
    make_trainer(save_steps=2, callbacks=[StopAt(6)], **WHOLE).train()
    other = WHOLE | {"gradient_accumulation_steps": 1, "num_mini_batches": 4, "max_steps": 12, "save_steps": 20}
    folder = Path(make_trainer(**other).args.output_dir)
    with pytest.raises(UserError) as error:
        make_trainer(**other).train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    message = "with gradient_accumulation_steps=2, but it is now 1: set gradient_accumulation_steps=2, or resume"
    assert message in str(error.value) and "\n" not in str(error.value)
    between = make_trainer(**other)
    between.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert between.state.global_step == 12 and between.ppo.rollout_index == 1 + 0  # rollouts of 8 steps from step 5 on


def test_resuming_keeps_the_reference_of_the_first_start(make_trainer, tiny_config, lora):
    step = 6

    def sft(seed):
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(tiny_config), lora)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    straight = make_trainer(folder="whole", model=sft(1), save_steps=16, **(WHOLE | {"peft_config": None}))
    straight.train()
    options = WHOLE | {"peft_config": None, "save_steps": step}
    make_trainer(folder="parts", model=sft(1), callbacks=[StopAt(step)], **options).train()
    second = make_trainer(folder="parts", model=sft(2), **options)  # other weights: the checkpoint's must count
    second.train(resume_from_checkpoint=str(Path(second.args.output_dir) / f"checkpoint-{step}"))
    assert_same(everything(second), everything(straight))


def test_evaluation_does_not_disturb_a_resume(make_trainer, prompts):
    straight = make_trainer(folder="whole", save_steps=16, **WHOLE)
    straight.train()
    resumed = interrupted(make_trainer, 6, eval_dataset=prompts, eval_strategy="steps", eval_steps=2)
    assert_same(everything(resumed), everything(straight))


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_half_written_checkpoint_is_passed_over(make_trainer, damage):
    trainer = make_trainer(save_steps=4, **(WHOLE | {"max_steps": 8}))
    trainer.train()
    folder = Path(trainer.args.output_dir)
    newest = folder / "checkpoint-8" / "trainer_state.json"
    if damage == "truncated":
        newest.write_text(newest.read_text()[:100])
    else:
        newest.unlink()
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    again = make_trainer(save_steps=4, **(WHOLE | {"max_steps": 8}))
    again.train(resume_from_checkpoint=True)
    assert_same(everything(again), everything(trainer))


def test_a_checkpoint_that_is_written_again_does_not_count_meanwhile(make_trainer):
    make_trainer(save_steps=4, **(WHOLE | {"max_steps": 4})).train()

    class Killed(BaseException):
        pass

    def die(folder):
        raise Killed

    again = make_trainer(save_steps=4, **(WHOLE | {"max_steps": 4}))
    again._save_optimizer_and_scheduler = die
    with pytest.raises(Killed):
        again.train()
    folder = Path(again.args.output_dir)
    assert (folder / "checkpoint-4" / "optimizer.pt").is_file() and last_complete_checkpoint(folder) is None
    with pytest.raises(UserError, match="checkpoint-4 is incomplete") as error:
        again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert "\n" not in str(error.value)


def test_what_a_checkpoint_and_a_finished_run_hold(make_trainer, tiny_config, tmp_path):
    trainer = make_trainer(save_steps=6, critic="head", **(WHOLE | {"max_steps": 12}))
    trainer.train()
    names = [{path.name for path in Path(trainer.args.output_dir, f"checkpoint-{n}").iterdir()} for n in (6, 12)]
    assert names[0] - names[1] == {"ppo_rollout.safetensors"}  # only where a rollout is in use
    assert names[1] >= {"adapter_model.safetensors", "value_head.safetensors", "ppo_state.json", "trainer_state.json"}
    trainer.save_model(str(tmp_path / "final"))
    final = {path.name for path in (tmp_path / "final").iterdir()}
    assert final >= {"adapter_config.json", "adapter_model.safetensors", "value_head.safetensors", "tokenizer.json"}
    assert not {name for name in final if name.endswith((".bin", ".pt", ".pth", ".pkl"))} and "ref" not in final
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM(tiny_config), tmp_path / "final")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
    head = load_file(tmp_path / "final" / "value_head.safetensors")
    assert_same(head, dict(trainer.value_head.state_dict()))


@pytest.mark.parametrize(
    "resume, message",
    [
        (True, "resume_from_checkpoint: no complete checkpoint in"),
        (
            "no/such/checkpoint-4",
            "resume_from_checkpoint: no folder no/such/checkpoint-4: give the folder of a checkpoint, or true",
        ),
    ],
)
def test_nothing_to_resume_from_is_one_line(make_trainer, resume, message):
    with pytest.raises(UserError) as error:
        make_trainer().train(resume_from_checkpoint=resume)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_without_state_is_one_line(make_trainer):
    trainer = make_trainer(save_steps=4, save_only_model=True, **(WHOLE | {"max_steps": 4}))
    trainer.train()
    assert json.loads((Path(trainer.args.output_dir) / "checkpoint-4" / "trainer_state.json").read_text())
    with pytest.raises(UserError, match="has no ppo_state.json.*save_only_model=True.*without resume_from_checkpoint"):
        make_trainer(save_steps=4, **WHOLE).train(resume_from_checkpoint=True)
