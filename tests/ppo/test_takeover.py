"""Two trainers alive on one model: each one trains its own roles, whichever was made or trained last."""

import gc

import pytest
import torch
from peft import get_peft_model

from hf_rlhf_ext.errors import UserError


@pytest.fixture
def short_run(make_trainer):
    def make(**options):
        run = {"max_steps": 1, "num_mini_batches": 1, "num_ppo_epochs": 1, "check_first_rollout": False}
        return make_trainer(**run | options)

    return make


def trained_by(trainer):
    """Names of the weights that one call of `train` changes."""
    trainer.args.max_steps += 1
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("adapted, critic", [(True, "adapter"), (True, "head"), (False, "head"), (False, "model")])
def test_each_trainer_trains_its_own_roles(short_run, tiny_llama, lora, adapted, critic):
    model = get_peft_model(tiny_llama, lora) if adapted else tiny_llama
    options = {"model": model, "peft_config": None, "critic": critic}
    first = short_run(folder="first", **options)
    trainable = {name for name, parameter in first.model.named_parameters() if parameter.requires_grad}
    second = short_run(folder="second", **options)
    of_second = {name for name, parameter in second.model.named_parameters() if parameter.requires_grad}
    seen = []
    for trainer, own in ((first, trainable), (second, of_second), (first, trainable)):
        head = trainer.value_head.weight.detach().clone()
        seen.append(trained_by(trainer))
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == own
        assert seen[-1] <= own | {"value_head.weight", "value_head.bias"}
        assert not torch.equal(trainer.value_head.weight, head)
        assert model.value_head is trainer.value_head
        if critic == "model":
            assert model.value_model is trainer.stack.roles["value"].model
    assert seen[0] <= seen[2]  # LoRA moves its matrices A from the second step on
    if critic == "adapter":
        assert any(".value." in name for name in seen[0]) and any(".value_2." in name for name in seen[1])
        assert not any(".value_2." in name for name in seen[0])


def test_flags_that_the_user_set_are_kept(short_run, tiny_llama, lora):
    model = get_peft_model(tiny_llama, lora)
    first = short_run(model=model, peft_config=None)
    frozen = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    frozen.requires_grad_(False)
    second = short_run(folder="second", model=model, peft_config=None)
    frozen.requires_grad_(True)
    first.train()
    assert not frozen.requires_grad
    second.train()
    assert frozen.requires_grad


def test_a_trainer_uses_its_adapter_after_another_one_switched(short_run, tiny_llama, lora):
    model = get_peft_model(tiny_llama, lora)
    model.add_adapter("other", lora)
    first = short_run(model=model, peft_config=None)
    model.set_adapter("other")
    second = short_run(folder="second", model=model, peft_config=None)
    for trainer, own in ((first, "default"), (second, "other")):
        names = trained_by(trainer)
        assert {name.split(".")[-2] for name in names if "lora" in name} == {own}
        assert model.active_adapter == own  # it samples with this one


def test_a_trainer_that_is_gone_holds_nothing(short_run, tiny_llama, lora):
    model = get_peft_model(tiny_llama, lora)
    first = short_run(model=model, peft_config=None, critic="adapter")
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    second = short_run(folder="second", model=model, peft_config=None, critic="adapter")
    del second
    gc.collect()
    first.train()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == own


def test_what_cannot_be_taken_back_is_refused(short_run, tiny_llama, lora):
    whole = short_run(model=tiny_llama, peft_config=None)
    adapted = short_run(folder="second", model=tiny_llama, peft_config=lora, critic="adapter")
    with pytest.raises(UserError, match="model: another trainer has attached adapters .*load the model again"):
        whole.train()
    again = short_run(folder="third", model=adapted.model, peft_config=None)
    adapted.model.delete_adapter("value")
    with pytest.raises(UserError, match="model: .* weights that this trainer trains were removed.*make a new trainer"):
        adapted.train()
    again.train()


@pytest.mark.parametrize("looks", ["disable_adapter", "set_adapter"])
def test_a_look_at_another_adapter_freezes_no_critic(short_run, tiny_llama, lora, looks):
    """PEFT freezes all adapters but the active one when it switches back."""
    model = get_peft_model(tiny_llama, lora)
    model.add_adapter("other", lora)
    trainer = short_run(model=model, peft_config=None, critic="adapter")
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if looks == "disable_adapter":
        with model.disable_adapter():
            pass
    else:
        model.set_adapter("other")
        model.set_adapter("default")
    assert not any(".value." in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert any(".value." in name for name in trained_by(trainer))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == own
