"""Every optimizer that `optim` names, and those that a user makes, in both trainers: works or is refused."""

import re
from collections.abc import Callable
from importlib.util import find_spec

import bitsandbytes
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.training_args import OptimizerNames

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.trainer import PPOTrainer
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer
from tests.schedule_free import ScheduleFreeSGD
from tests.support.rows import Row, each


def named(name: str, package: str = "", says: str | None = None, **options) -> Row:
    """The row of a value of `optim`. Without the Python package that it needs, it is refused."""
    if package and find_spec(package) is None:
        says = f"optim='{name}'"
    return Row(f"`optim='{name}'`", says=says, value={"optim": name, **options}, needs=package)


def own(name: str, arguments: Callable, note: str = "", says: str | None = None) -> Row:
    """The row of an optimizer that the user makes."""
    return Row(name, says=says, value={"optim": "adamw_torch", "arguments": arguments}, note=note)


def trained(model) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model):
    return torch.optim.AdamW(trained(model), lr=1e-2)


def adamw_8bit(model):
    return bitsandbytes.optim.AdamW8bit(trained(model), lr=1e-2)


def schedule_free(model):
    return ScheduleFreeSGD(trained(model), lr=0.1)


def loraplus(model):
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4)


def halved(optimizer):
    return optimizer, LambdaLR(optimizer, lambda step: 0.5**step)


ADDED = "with PPO, the weights of the critic are added"
IN_BACKWARD = "updates the weights inside the backward pass"
TARGETS = {"optim_target_modules": ["q_proj", "v_proj"], "optim_args": "rank=2"}

OPTIMIZERS = [
    named("adamw_torch"),
    named("adamw_torch_fused"),
    named("adamw_torch_xla", package="torch_xla"),
    named("adamw_torch_npu_fused", package="torch_npu"),
    named("adamw_torch_4bit", package="torchao"),
    named("adamw_torch_8bit", package="torchao"),
    named("adamw_anyprecision", package="torchdistx"),
    named("adafactor"),
    named("sgd"),
    named("adagrad"),
    named("rmsprop"),
    named("adamw_8bit"),
    named("adamw_bnb_8bit"),
    named("paged_adamw_32bit"),
    named("paged_adamw_8bit"),
    named("ademamix"),
    named("ademamix_8bit"),
    named("paged_ademamix_32bit", says="needs a GPU for its pages"),
    named("paged_ademamix_8bit", says="needs a GPU for its pages"),
    named("lion_32bit"),
    named("lion_8bit"),
    named("paged_lion_32bit"),
    named("paged_lion_8bit"),
    named("rmsprop_bnb"),
    named("rmsprop_bnb_8bit"),
    named("rmsprop_bnb_32bit"),
    named("grokadamw", package="grokadamw"),
    named("stable_adamw", package="optimi"),
    named("schedule_free_adamw", package="schedulefree"),
    named("schedule_free_radam", package="schedulefree", max_steps=8),  # its first five steps change nothing
    named("schedule_free_sgd", package="schedulefree"),
    named("galore_adamw", package="galore_torch", **TARGETS),
    named("galore_adamw_8bit", says="needs a GPU", **TARGETS),
    named("galore_adafactor", package="galore_torch", **TARGETS),
    named("apollo_adamw", package="apollo_torch", **TARGETS),
    named("galore_adamw_layerwise", says=IN_BACKWARD, **TARGETS),
    named("galore_adamw_8bit_layerwise", says=IN_BACKWARD, **TARGETS),
    named("galore_adafactor_layerwise", says=IN_BACKWARD, **TARGETS),
    named("apollo_adamw_layerwise", says=IN_BACKWARD, **TARGETS),
    named("lomo", says=IN_BACKWARD),
    named("adalomo", says=IN_BACKWARD),
    Row(
        "`optim='galore_adamw'` without `optim_target_modules`", "needs optim_target_modules", {"optim": "galore_adamw"}
    ),
    Row("an unknown `optim`", "optim: 'adam' is not known: choose one of", {"optim": "adam"}),
    Row("unusable `optim_args`", "optim_args='momentum'", {"optim": "sgd", "optim_args": "momentum"}),
    Row("`optim_args` that are not read", "does not read amsgrad", {"optim": "sgd", "optim_args": "amsgrad=true"}),
    own("`optimizers=(AdamW(...), None)`", lambda model: {"optimizers": (adamw(model), None)}, ADDED),
    own("`optimizers=` with a `LambdaLR`", lambda model: {"optimizers": halved(adamw(model))}, ADDED),
    own("`optimizers=` with LoRA+", lambda model: {"optimizers": (loraplus(model), None)}, ADDED),
    own("`optimizers=` with 8-bit AdamW", lambda model: {"optimizers": (adamw_8bit(model), None)}, ADDED),
    own("`optimizers=`, schedule-free", lambda model: {"optimizers": (schedule_free(model), None)}, ADDED),
    own("`optimizer_cls_and_kwargs=(SGD, {...})`", lambda model: {"optimizer_cls_and_kwargs": (SGD, {"lr": 0.1})}),
    own(
        "`optimizers=` with the weights of another model",
        lambda model: {"optimizers": (SGD([nn.Parameter(torch.zeros(1))], lr=0.1), None)},
        says="holds no trained weight of the",
    ),
    own(
        "`optimizers=(LBFGS(...), None)`",
        lambda model: {"optimizers": (torch.optim.LBFGS(trained(model)), None)},
        says="several times in a step",
    ),
    own(
        "`optimizers=(AdamW, None)`, the class",
        lambda model: {"optimizers": (torch.optim.AdamW, None)},
        says="is a class",
    ),
    own(
        "`optimizers=(None, scheduler)`",
        lambda model: {"optimizers": (None, halved(adamw(model))[1])},
        says="a scheduler without its optimizer",
    ),
]
"""Rows of the table. The value is the options that are set, and a function from the model to the arguments."""


def test_every_name_of_transformers_has_a_row():
    assert {name.value for name in OptimizerNames} <= {row.value["optim"] for row in OPTIMIZERS}


@pytest.fixture(scope="module")
def tokenizer(chat_tokenizer_factory):
    return chat_tokenizer_factory()


@pytest.fixture(scope="module")
def tiny(tokenizer):
    """`tiny(model_class)`: a random model with one layer, always with the same weights."""

    def make(model_class):
        torch.manual_seed(0)
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, num_labels=1, **size)
        config.pad_token_id = tokenizer.pad_token_id
        config.eos_token_id = tokenizer.eos_token_id
        return model_class(config)

    return make


COMMON = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "disable_tqdm": True}
COMMON |= {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "max_steps": 2, "save_strategy": "no"}
COMMON |= {"lr_scheduler_type": "constant", "logging_steps": 1}


def adapted(model, task_type):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task_type))


@pytest.fixture(scope="module")
def make_ppo(tokenizer, tiny, tmp_path_factory):
    def make(arguments=lambda model: {}, **options):
        model = adapted(tiny(LlamaForCausalLM), "CAUSAL_LM")
        args = PPOConfig(
            str(tmp_path_factory.mktemp("ppo")),
            critic="adapter",
            max_completion_length=3,
            num_ppo_epochs=2,
            value_clip_range=None,  # the critic's adapter has a gradient in every step
            check_first_rollout=False,
            **(COMMON | options),
        )
        return PPOTrainer(
            model,
            lambda completions, **columns: [float(len(text)) for text in completions],
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["Tell me", "a sunny day"]}),
            processing_class=tokenizer,
            **arguments(model),
        )

    return make


@pytest.fixture(scope="module")
def make_reward(tokenizer, tiny, tmp_path_factory):
    def make(arguments=lambda model: {}, **options):
        model = adapted(tiny(LlamaForSequenceClassification), "SEQ_CLS")
        args = BradleyTerryConfig(
            str(tmp_path_factory.mktemp("reward")), normalize_rewards=False, layout="plain", **(COMMON | options)
        )
        pairs = {"prompt": ["Tell me", "fox"], "chosen": [" a day", " happy"], "rejected": [" sad", " no"]}
        return BradleyTerryTrainer(
            model,
            args,
            Dataset.from_dict(pairs),
            processing_class=tokenizer,
            **arguments(model),
        )

    return make


PPO_PARTS = (".default.", ".value.", "value_head.")
"""A part of the names of the policy's adapter, of the critic's adapter and of the value head."""

REWARD_PARTS = ("lora_", ".score.")


def moved_parts(trainer, parts) -> list[str]:
    """Trains, and returns the parts of which any weight has changed."""
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in weights.items()}
    trainer.train()
    changed = [name for name, p in weights.items() if not torch.equal(p, before[name])]
    assert all(torch.isfinite(p).all() for p in weights.values())
    return [part for part in parts if any(part in name for name in changed)]


@each(OPTIMIZERS)
def test_an_optimizer_trains_every_part_or_is_refused(row, make_ppo, make_reward):
    if row.says is not None:
        for make in (make_ppo, make_reward):
            with pytest.raises(UserError, match=re.escape(row.says)) as error:
                make(**row.value)
            assert "\n" not in str(error.value)
        return
    ppo = make_ppo(**row.value)
    assert moved_parts(ppo, PPO_PARTS) == list(PPO_PARTS)
    assert isinstance(ppo.state.log_history[0]["lr_value"], float)
    assert moved_parts(make_reward(**row.value), REWARD_PARTS) == list(REWARD_PARTS)
