"""Values of options that no run can use, in Python. tests/recipes/test_errors.py has those of the command line."""

import os
from dataclasses import fields

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.optim.lr_scheduler import StepLR
from transformers import HfArgumentParser
from transformers.optimization import Adafactor, AdafactorSchedule

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.trainer import PPOTrainer
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer
from hf_rlhf_ext.training.optimizers import check_own_optimizer, require_optimizer

MACHINE = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.mark.parametrize("config", [PPOConfig, BradleyTerryConfig])
@pytest.mark.parametrize(
    "option, value, rule",
    [
        ("per_device_train_batch_size", 0, "must be at least 1, got 0"),
        ("gradient_accumulation_steps", -2, "must be at least 1, got -2"),
        ("learning_rate", -1e-3, "must not be negative, got -0.001"),
        ("learning_rate", float("nan"), "is NaN"),
        ("weight_decay", float("inf"), "must not be infinite, got inf"),
        ("max_steps", 0, "must be at least 1, got 0"),
        ("num_train_epochs", 0, "must be positive, got 0"),
        ("seed", -1, "must be between 0 and"),
        ("adam_beta2", 1.0, "must be at least 0 and below 1, got 1"),
        ("save_total_limit", 0, "must be at least 1"),
        ("logging_steps", -3, "must be positive, got -3: to turn it off, set logging_strategy='no'"),
        ("gradient_checkpointing_kwargs", ["use_reentrant"], "must be a dict, got list"),
        ("lr_scheduler_kwargs", "min_lr=1", "must be a dict, got the text 'min_lr=1'"),
        ("report_to", "wanbd", ": 'wanbd' is not known: did you mean wandb?"),
        ("report_to", "nowhere", ": 'nowhere' is not known: choose none or azure_ml"),
        ("deepspeed", "/no/such/zero.json", ": there is no file /no/such/zero.json"),
        ("max_grad_norm", float("inf"), "must not be infinite, got inf: set it to 0 for no limit"),
        ("save_steps", float("inf"), "must not be infinite, got inf: to turn it off, set save_strategy='no'"),
        ("max_steps", 2.5, ": must be an integer, got 2.5"),
        ("seed", "seven", ": must be an integer, got 'seven'"),
        ("learning_rate", "fast", ": must be a number, got 'fast'"),
        ("learning_rate", [1e-3], ": must be a number, got [0.001]"),
        ("save_total_limit", True, ": must be an integer, got True"),
        ("weight_decay", None, ": must be a number, got None: leave it out"),
        ("output_dir", " ", " is empty: give a folder"),
        ("log_level", "loud", ": 'loud' is not known: choose one of detail, debug, info"),
        ("gradient_checkpointing_kwargs", {"reentrant": False}, ": 'reentrant' is no argument of torch.utils.check"),
        ("gradient_checkpointing_kwargs", '{"reentrant": false}', "choose from preserve_rng_state, use_reentrant"),
        ("lr_scheduler_kwargs", "{min_lr: 1}", "is not valid JSON"),
        ("accelerator_config", "/no/such/file.json", ": /no/such/file.json cannot be read (no such file"),
        ("accelerator_config", {"splits": True}, "has no field 'splits': choose from split_batches"),
    ],
)
def test_a_value_that_no_run_can_use(tmp_path, config, option, value, rule):
    with pytest.raises(UserError, match=f"^{option}(:| ).*") as refused:
        config(**(MACHINE | {"output_dir": str(tmp_path), option: value}))
    assert rule in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("config", [PPOConfig, BradleyTerryConfig])
def test_usual_values_are_not_refused(tmp_path, config):
    changes = {"max_steps": -1, "learning_rate": 1e-4, "max_grad_norm": 0.0, "logging_steps": 0.5, "warmup_steps": 0.1}
    changes |= {"save_strategy": "no", "save_steps": 0, "lr_scheduler_type": "polynomial"}
    changes |= {"lr_scheduler_kwargs": {"power": 2.0}, "report_to": ["none"], "neftune_noise_alpha": None}
    assert config(str(tmp_path), **(MACHINE | changes)).max_steps == -1


@pytest.mark.parametrize("config", [PPOConfig, BradleyTerryConfig])
def test_options_may_still_be_none_after_a_parser_was_made(tmp_path, config):
    HfArgumentParser(config)  # it changes the types in `dataclasses.fields`
    assert config(str(tmp_path), **MACHINE).neftune_noise_alpha is None


@pytest.mark.parametrize("config", [PPOConfig, BradleyTerryConfig])
def test_numbers_in_another_form_are_read(tmp_path, config):
    given = {"learning_rate": "1e-3", "per_device_train_batch_size": "4", "max_steps": 3.0, "seed": np.int64(5)}
    given |= {"weight_decay": np.float32(0.5), "logging_steps": "2", "warmup_steps": torch.tensor(0.25)}
    args = config(str(tmp_path), **(MACHINE | given))
    read = {name: getattr(args, name) for name in given}
    assert read == {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "seed": 5,
        "weight_decay": 0.5,
        "logging_steps": 2,
        "warmup_steps": 0.25,
    }
    assert {name: type(value) for name, value in read.items() if type(value) is not float} == dict.fromkeys(
        ("per_device_train_batch_size", "max_steps", "seed", "logging_steps"), int
    )


@pytest.mark.parametrize("config", [PPOConfig, BradleyTerryConfig])
def test_what_is_the_same_as_a_usual_value(tmp_path, config):
    changes = {"report_to": None, "average_tokens_across_devices": False}
    changes |= {"gradient_checkpointing_kwargs": {"use_reentrant": True, "preserve_rng_state": False}}
    args = config(str(tmp_path), **(MACHINE | changes))
    assert args.report_to == []


class OneOfTwo(PPOConfig):
    """The options of one of two processes."""

    world_size = 2


def test_separate_counts_are_refused_with_several_processes(tmp_path):
    with pytest.raises(UserError, match="average_tokens_across_devices=False .* several processes.* leave it true"):
        OneOfTwo(str(tmp_path), **MACHINE, average_tokens_across_devices=False)


@pytest.mark.parametrize("option", [field.name for field in fields(PPOConfig) if field.type in (float, float | None)])
def test_no_option_is_infinite(tmp_path, option):
    with pytest.raises(UserError, match=f"^{option} must not be infinite, got inf"):
        PPOConfig(str(tmp_path), **(MACHINE | {option: float("inf")}))


def test_where_there_is_a_value_for_no_limit_it_is_said(tmp_path):
    for option in ("max_kl", "early_stop_kl", "reward_clip", "value_clip_range"):
        with pytest.raises(UserError, match=f"^{option} .* set it to None for no limit"):
            PPOConfig(str(tmp_path), **(MACHINE | {option: float("inf")}))


def test_one_stop_token_is_a_list_and_text_is_none(tmp_path):
    assert PPOConfig(str(tmp_path), **MACHINE, stop_token_ids=2).stop_token_ids == [2]
    assert PPOConfig(str(tmp_path), **MACHINE, stop_token_ids=(2, np.int64(3))).stop_token_ids == [2, 3]
    for given in (["<|im_end|>"], "<|im_end|>", [2.5]):
        with pytest.raises(UserError, match="^stop_token_ids must be a list of token ids.*convert_tokens_to_ids"):
            PPOConfig(str(tmp_path), **MACHINE, stop_token_ids=given)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluations_need_a_dataset(tmp_path, strategy, tiny_llama):
    given = MACHINE | {"eval_strategy": strategy, "eval_steps": 1}
    pairs = Dataset.from_list([{"prompt": "fox", "chosen": " happy", "rejected": " sad"}])
    with pytest.raises(UserError, match=f"^eval_strategy='{strategy}' needs eval_dataset"):
        BradleyTerryTrainer("./nope", BradleyTerryConfig(str(tmp_path), **given), pairs)
    if strategy == "steps":
        with pytest.raises(UserError, match="^eval_strategy='steps' needs eval_dataset"):
            PPOTrainer(tiny_llama, len, PPOConfig(str(tmp_path), **given), pairs)


@pytest.mark.parametrize(
    "optim, optim_args, says",
    [
        ("adamw_torch", "bogus=1", "does not read bogus: leave it out"),
        ("adamw_torch", "betas=0.5", "does not read betas"),
        ("sgd", "momentum=0.9,alpha=1", "does not read alpha"),
        ("adafactor", "scale_parameter=True", "does not read scale_parameter"),
        ("adamw_8bit", "block_wise=False", "does not read block_wise"),
        ("sgd", "momentum=x", "could not convert"),
        ("sgd", "nesterov=true", "requires a momentum"),
        ("sgd", "junk", "'junk' is not of the form name=value"),
        ("rmsprop_bnb", "alpha=0.5", "passes it on as text"),
        ("sgd", {"momentum": 0.9}, "must be text such as"),
        ("sgd", "momentum=0.9, nesterov=false", None),
        ("adagrad", "lr_decay=0", None),  # its default
        ("rmsprop", "centered=no", None),
        ("ademamix", "alpha=5.0,t_alpha=3", None),
    ],
)
def test_every_entry_of_optim_args_is_read(tmp_path, optim, optim_args, says):
    args = BradleyTerryConfig(str(tmp_path), **MACHINE, optim=optim, optim_args=optim_args)
    if says is None:
        require_optimizer(args)
        return
    with pytest.raises(UserError, match="^optim_args") as refused:
        require_optimizer(args)
    assert says in str(refused.value) and "another optimizer" not in str(refused.value)


def without_rate(parameters):
    return Adafactor(parameters, lr=None, relative_step=True, scale_parameter=True, warmup_init=True)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda weights: torch.optim.AdamW, "AdamW is a class: pass an optimizer, AdamW"),
        (lambda weights: 3, "int is no optimizer"),
        (lambda weights: {"lr": 1e-3}, "dict is no optimizer"),
        (torch.optim.LBFGS, "LBFGS computes the loss several times in a step"),
        (torch.optim.SparseAdam, "SparseAdam takes sparse gradients only"),
        (without_rate, "Adafactor has no learning rate (lr=None): set it"),
    ],
)
def test_optimizers_that_the_trainers_cannot_use(make, says):
    with pytest.raises(UserError, match="^optimizers: ") as refused:
        check_own_optimizer((make([nn.Parameter(torch.zeros(2, 2))]), None), None)
    assert says in str(refused.value)


def test_other_forms_of_optimizers():
    optimizer = without_rate([nn.Parameter(torch.zeros(2, 2))])
    check_own_optimizer((optimizer, AdafactorSchedule(optimizer)), None)
    with pytest.raises(UserError, match="optimizers: StepLR is a class: pass a scheduler"):
        check_own_optimizer((torch.optim.SGD(optimizer.param_groups, lr=0.1), StepLR), None)
    with pytest.raises(UserError, match="optimizer_cls_and_kwargs: LBFGS computes the loss several times"):
        check_own_optimizer((None, None), (torch.optim.LBFGS, {}))
    with pytest.raises(UserError, match="optimizer_cls_and_kwargs: pass a pair"):
        check_own_optimizer((None, None), (torch.optim.SGD, 0.1))


def test_folders_that_cannot_be_written(tmp_path, tiny_llama, chat_tokenizer):
    (tmp_path / "file").write_text("")
    folders = [tmp_path / "file" / "run", tmp_path / "file"]
    if os.path.isdir("/proc"):
        folders.append("/proc/run")
    prompts = Dataset.from_list([{"prompt": "fox"}])
    pairs = Dataset.from_list([{"prompt": "fox", "chosen": " happy", "rejected": " sad"}])
    for folder in folders:
        for make in (
            lambda: PPOTrainer(tiny_llama, len, PPOConfig(str(folder), **MACHINE), prompts),  # noqa: B023
            lambda: BradleyTerryTrainer("./nope", BradleyTerryConfig(str(folder), **MACHINE), pairs),  # noqa: B023
        ):
            with pytest.raises(UserError, match=f"^output_dir: {folder} cannot be written") as refused:
                make()
            assert "\n" not in str(refused.value)
