"""Options that come from Transformers and TRL, in both trainers: they do what they say, or are refused in one line."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate.utils import ParallelismConfig
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
)

import hf_rlhf_ext.ppo.trainer
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.prompts import prompt_indices
from hf_rlhf_ext.ppo.trainer import PPOTrainer
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer
from tests.support.rows import Row, each

PROMPTS = ["Tell me", "a sunny day", "fox", "The quick brown fox jumps over", "words, many", "happy or sad?"]
PAIRS = [(prompt, " happy people" + "!" * (3 * k), " sad") for k, prompt in enumerate(PROMPTS)]


@dataclass
class Run:
    """A trained trainer, and what its reward function got: prompts, completions and the column `number`."""

    trainer: Any
    batches: list[tuple[list, list, list]] = field(default_factory=list)
    output: Any = None

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        named = self.trainer.model.named_parameters()
        return {name: parameter.detach().clone() for name, parameter in named if parameter.requires_grad}

    @property
    def losses(self) -> list[dict]:
        return [row for row in self.trainer.state.log_history if "loss" in row]

    @property
    def evaluations(self) -> list[int]:
        """Steps at which evaluations were logged."""
        rows = self.trainer.state.log_history
        return [row["step"] for row in rows if any(name.startswith("eval_") for name in row)]

    @property
    def numbers(self) -> list[int]:
        """The column `number` of the prompts of training, in order."""
        return [number for _, _, numbers in self.batches for number in numbers]


@dataclass
class Option:
    """What a row sets, and how to see that it does what it says.

    Attributes:
        options: options of the config.
        check: called with the run and the run without these options; asserts.
        arguments: arguments of the trainer.
    """

    options: dict[str, Any] = field(default_factory=dict)
    check: Callable[[Run, Run], None] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


# ---- What an option does ----


def same_weights(run: Run, plain: Run) -> None:
    for name, weight in plain.weights.items():
        assert torch.equal(run.weights[name], weight), name


def close_weights(run: Run, plain: Run) -> None:
    for name, weight in plain.weights.items():
        torch.testing.assert_close(run.weights[name], weight, atol=2e-4, rtol=0)


def other_weights(run: Run, plain: Run) -> None:
    assert any(not torch.equal(run.weights[name], weight) for name, weight in plain.weights.items())


def evaluated_at(*steps: int) -> Callable[[Run, Run], None]:
    def check(run: Run, plain: Run) -> None:
        assert run.evaluations == list(steps)

    return check


def logged_losses(*steps: int) -> Callable[[Run, Run], None]:
    def check(run: Run, plain: Run) -> None:
        assert [row["step"] for row in run.losses] == list(steps)

    return check


def in_optimizer(name: str, value: Any) -> Callable[[Run, Run], None]:
    def check(run: Run, plain: Run) -> None:
        assert any(group[name] == value for group in run.trainer.optimizer.param_groups)

    return check


def rate_warms_up(run: Run, plain: Run) -> None:
    rates = [row["learning_rate"] for row in run.losses]
    assert rates[0] < rates[1] == plain.losses[1]["learning_rate"]


def stops_after(steps: int) -> Callable[[Run, Run], None]:
    def check(run: Run, plain: Run) -> None:
        assert run.trainer.state.global_step == steps

    return check


def small_change(run: Run, plain: Run) -> None:
    before = dict(plain.trainer.initial)
    for name, weight in run.weights.items():
        assert (weight - before[name]).abs().max() < 1e-7, name


def checkpoints_are(*names: str, missing: str = "") -> Callable[[Run, Run], None]:
    def check(run: Run, plain: Run) -> None:
        folder = Path(run.trainer.args.output_dir)
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == sorted(names)
        files = {path.name for path in (folder / names[-1]).iterdir()}
        assert "adapter_model.safetensors" in files and missing not in files

    return check


def memory_is_measured(run: Run, plain: Run) -> None:
    assert "train_mem_cpu_alloc_delta" in run.output.metrics
    same_weights(run, plain)


def finite(run: Run, plain: Run) -> None:
    assert all(math.isfinite(row["loss"]) for row in run.losses) and len(run.losses) == 2


# PPO


def ends_at_strings(run: Run, plain: Run) -> None:
    stopped = 0
    for _, completions, _ in run.batches:
        for text in completions:
            assert not any(letter in text[:-3] for letter in "etn")  # a token has at most a few letters here
            stopped += any(letter in text for letter in "etn")
    assert stopped > 0


def other_completions(run: Run, plain: Run) -> None:
    assert run.batches[0][1] != plain.batches[0][1] and run.batches[0][2] == plain.batches[0][2]


def prompts_are(*numbers: int) -> Callable[[Run, Run], None]:
    def check(run: Run, plain: Run) -> None:
        assert run.numbers == list(numbers)

    return check


def evaluates_in_batches_of_2(run: Run, plain: Run) -> None:
    before = len(run.batches)
    run.trainer.evaluate()
    assert [len(numbers) for _, _, numbers in run.batches[before:]] == [2, 2, 2]


def empties_the_cache(run: Run, plain: Run) -> None:
    calls = []
    original = hf_rlhf_ext.ppo.trainer.clear_device_cache
    hf_rlhf_ext.ppo.trainer.clear_device_cache = lambda: calls.append(original())
    try:
        run.trainer.args.max_steps = 4
        run.trainer.train()
    finally:
        hf_rlhf_ext.ppo.trainer.clear_device_cache = original
    assert len(calls) == 2  # of the steps 0 to 3, every second


# Reward models


def rows_in_order(run: Run, plain: Run) -> None:
    lengths = [len(row["prompt_ids"]) for row in run.trainer.train_dataset]
    loader = run.trainer.get_train_dataloader()
    assert list(loader.batch_sampler.sampler) == list(range(len(lengths)))


def rows_of_similar_length(run: Run, plain: Run) -> None:
    rows = run.trainer.train_dataset
    lengths = [len(row["prompt_ids"]) + sum(map(len, row["completion_ids"])) for row in rows]
    order = [lengths[k] for k in run.trainer._get_train_sampler()]
    assert order == sorted(lengths, reverse=True)  # one group of all rows, the longest first


def all_rows_are_evaluated(run: Run, plain: Run) -> None:
    trainer = run.trainer
    assert len(trainer.get_train_dataloader()) == 1 and len(trainer.get_eval_dataloader()) == 2
    loss = trainer.evaluate()["eval_loss"]
    trainer.args.dataloader_drop_last = False
    assert loss == trainer.evaluate()["eval_loss"]


def completions_end_with(token: str) -> Callable[[Run, Run], None]:
    def check(run: Run, plain: Run) -> None:
        tokenizer = run.trainer.processing_class
        for row in run.trainer.train_dataset:
            assert {ids[-1] for ids in row["completion_ids"]} == {tokenizer.convert_tokens_to_ids(token)}

    return check


def padded_to_8(run: Run, plain: Run) -> None:
    batch = next(iter(run.trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] % 8 == 0
    close_weights(run, plain)


# ---- The rows ----


def runs(name: str, check: Callable[[Run, Run], None], note: str = "", arguments: dict | None = None, **options) -> Row:
    return Row(name, value=Option(options, check, arguments or {}), note=note)


def refused(name: str, says: str, arguments: dict | None = None, **options) -> Row:
    return Row(name, says, value=Option(options, None, arguments or {}))


def option(check_or_says: Callable | str, note: str = "", **options) -> Row:
    """A row about one option, with the name `option=value`."""
    (name, value) = next(iter(options.items()))
    shown = f"`{name}={value!r}`"
    if isinstance(check_or_says, str):
        return refused(shown, check_or_says, **options)
    return runs(shown, check_or_says, note, **options)


class TorchRows(torch.utils.data.Dataset):
    """A dataset of PyTorch."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def prompt_rows() -> list[dict]:
    return [{"prompt": prompt, "number": number} for number, prompt in enumerate(PROMPTS)]


def pair_rows() -> list[dict]:
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]


def data_rows(rows: Callable[[], list[dict]]) -> list[Row]:
    """Rows about the kinds of data."""
    made = {"train": Dataset.from_list(rows())}
    streamed = made["train"].to_iterable_dataset()
    in_torch = TorchRows(rows())
    return [
        runs("`train_dataset`: a list of rows", same_weights, arguments={"train_dataset": rows()}),
        runs("`train_dataset`: a `pandas.DataFrame`", same_weights, arguments={"train_dataset": pd.DataFrame(rows())}),
        runs("`train_dataset`: a `torch` dataset of rows", same_weights, arguments={"train_dataset": in_torch}),
        refused(
            "`train_dataset`: a `DatasetDict`",
            "must be one dataset: pass one split, as in train_dataset=dataset['train']",
            arguments={"train_dataset": DatasetDict(made)},
        ),
        refused("`train_dataset`: a dict of sets", "has the splits 'train'", arguments={"train_dataset": dict(made)}),
        refused("`train_dataset`: streamed", "train_dataset is streamed", arguments={"train_dataset": streamed}),
        runs(
            "`eval_dataset`: a `DatasetDict`",
            evaluated_at(2, 2),
            arguments={"eval_dataset": DatasetDict(a=made["train"], b=made["train"])},
            eval_strategy="steps",
            eval_steps=2,
        ),
        runs(
            "`eval_dataset`: a list of rows",
            evaluated_at(2),
            arguments={"eval_dataset": rows()},
            eval_strategy="steps",
            eval_steps=2,
        ),
        refused("`eval_dataset`: streamed", "eval_dataset is streamed", arguments={"eval_dataset": streamed}),
    ]


BOTH = [
    option(same_weights, dataloader_pin_memory=False),
    option(same_weights, ddp_find_unused_parameters=False),
    option(same_weights, do_train=True),
    option(same_weights, debug="underflow_overflow"),
    option(same_weights, full_determinism=True),
    option(memory_is_measured, skip_memory_metrics=False),
    option(other_weights, seed=4),
    option(finite, bf16=True),
    option(close_weights, gradient_checkpointing=True),
    option(close_weights, activation_checkpointing=True),
    option(small_change, max_grad_norm=1e-8, optim="sgd"),
    option(in_optimizer("weight_decay", 0.5), weight_decay=0.5),
    option(in_optimizer("betas", (0.5, 0.999)), adam_beta1=0.5),
    option(rate_warms_up, warmup_steps=1),
    option(evaluated_at(1, 2), eval_strategy="steps", eval_steps=1),
    option(evaluated_at(0, 2), eval_on_start=True, eval_strategy="steps", eval_steps=2),
    option(evaluated_at(2), eval_delay=2, eval_strategy="steps", eval_steps=1),
    option(logged_losses(2), logging_steps=2),
    option(logged_losses(1, 2), logging_first_step=True, logging_steps=2),
    option(logged_losses(), logging_strategy="no"),
    option(logged_losses(2), "the last steps are logged at the end", logging_steps=50),
    option(finite, max_grad_norm=0.0),
    option("max_grad_norm: must be a number", max_grad_norm=None),
    option("lr_scheduler_type='reduce_lr_on_plateau' needs evaluations", lr_scheduler_type="reduce_lr_on_plateau"),
    option("num_decay_steps", lr_scheduler_type="warmup_stable_decay"),
    option("dataloader_prefetch_factor can only be set when", dataloader_prefetch_factor=2),
    option("auto_find_batch_size=True is not supported", auto_find_batch_size=True),
    option("batch_rebalance", train_sampling_strategy="batch_rebalance"),
    option("length_column_name='n' is not supported", length_column_name="n"),
    option("prediction_loss_only=True is not supported", prediction_loss_only=True),
    option("batch_eval_metrics=True is not supported", batch_eval_metrics=True),
    option("bf16_full_eval=True is not supported", bf16_full_eval=True),
    option("include_num_input_tokens_seen='all' is not supported", include_num_input_tokens_seen="all"),
    option(same_weights, "with one process", average_tokens_across_devices=False),
    option("label_names=['x'] is not supported", label_names=["x"]),
    option("torch_compile=True is not supported", torch_compile=True),
    option("optim_target_modules='all-linear': it has an effect", optim_target_modules="all-linear"),
    option("dispatch_batches=True is not supported", accelerator_config={"dispatch_batches": True}),
    refused("`parallelism_config`", "is not supported by", parallelism_config=ParallelismConfig()),
]

PPO_OPTIONS = [
    *BOTH,
    option(
        checkpoints_are("checkpoint-3", "checkpoint-4"),
        "the last one whose rollout was below `max_kl` is kept too",
        save_total_limit=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
    ),
    option(
        checkpoints_are("checkpoint-2", missing="ppo_state.json"),
        "such a checkpoint cannot be resumed",
        save_only_model=True,
        save_strategy="steps",
        save_steps=2,
    ),
    option(stops_after(3), "passes over the prompts", num_train_epochs=2, max_steps=-1),
    option(close_weights, gradient_accumulation_steps=2, per_device_train_batch_size=2),
    option(same_weights, "prompts are tokenized once at the start", dataloader_num_workers=2),
    option(same_weights, "every rollout is full", dataloader_drop_last=True),
    option(same_weights, "reward functions get all columns in both cases", remove_unused_columns=False),
    option(same_weights, accelerator_config={"even_batches": False}),
    option(prompts_are(*prompt_indices(0, 8, 6, 5)), data_seed=5),
    option(prompts_are(0, 1, 2, 3, 4, 5, 0, 1), train_sampling_strategy="sequential"),
    option(evaluates_in_batches_of_2, per_device_eval_batch_size=2),
    option(empties_the_cache, torch_empty_cache_steps=2),
    option(ends_at_strings, generation_kwargs={"stop_strings": ["e", "t", "n"]}),
    option(other_completions, generation_kwargs={"min_p": 0.5}, importance_sampling_correction=True),
    option("num_beams=4 is not supported", generation_kwargs={"num_beams": 4}),
    option("return_dict_in_generate=True is not supported", generation_kwargs={"return_dict_in_generate": True}),
    option("did you mean min_new_tokens", generation_kwargs={"min_new_token": 4}),
    option("max_completion_length=600 leaves no room for a prompt", max_completion_length=600),
    option("choose random or sequential", train_sampling_strategy="group_by_length"),
    option("label_smoothing_factor=0.1 is not supported", label_smoothing_factor=0.1),
    option("neftune_noise_alpha", neftune_noise_alpha=5.0),
    option("eval_do_concat_batches=False is not supported", eval_do_concat_batches=False),
    option("eval_accumulation_steps=2 is not supported", eval_accumulation_steps=2),
    option("include_for_metrics=['inputs'] is not supported", include_for_metrics=["inputs"]),
    option("ignore_data_skip=True is not supported", ignore_data_skip=True),
    option("use_liger_kernel=True is not supported", use_liger_kernel=True),
    option("enable_jit_checkpoint=True is not supported", enable_jit_checkpoint=True),
    option("eval_strategy='epoch' is not supported", eval_strategy="epoch"),
    option("split_batches=True is not supported", accelerator_config={"split_batches": True}),
    option(
        "gradient_accumulation_kwargs is not supported",
        accelerator_config={"gradient_accumulation_kwargs": {"num_steps": 2}},
    ),
    refused("`output_router_logits` in the config of a model", "output_router_logits", arguments={"model": "router"}),
    *data_rows(prompt_rows),
]
"""Rows of the table of `PPOConfig`."""

REWARD_OPTIONS = [
    *BOTH,
    option(checkpoints_are("checkpoint-2"), save_total_limit=1, save_strategy="steps", save_steps=1),
    option(
        checkpoints_are("checkpoint-2", missing="optimizer.pt"),
        save_only_model=True,
        save_strategy="steps",
        save_steps=2,
    ),
    option(stops_after(4), num_train_epochs=2, max_steps=-1),
    option(close_weights, gradient_accumulation_steps=2, per_device_train_batch_size=2),
    option(same_weights, dataloader_num_workers=1, dataloader_persistent_workers=True),
    option(
        all_rows_are_evaluated, "drops rows of training only", dataloader_drop_last=True, per_device_eval_batch_size=4
    ),
    option(same_weights, remove_unused_columns=False),
    option(same_weights, accelerator_config={"split_batches": True}),
    option(same_weights, torch_empty_cache_steps=1),
    option(same_weights, "as a run without a checkpoint", ignore_data_skip=True),
    option(other_weights, data_seed=5),
    option(rows_in_order, train_sampling_strategy="sequential"),
    option(rows_of_similar_length, train_sampling_strategy="group_by_length", per_device_train_batch_size=6),
    option(other_weights, label_smoothing_factor=0.1),
    option(other_weights, center_rewards_coefficient=0.1),
    option(padded_to_8, pad_to_multiple_of=8),
    option(same_weights, max_length=None),
    option(same_weights, dataset_num_proc=2),
    option(completions_end_with("<|pad|>"), eos_token="<|pad|>"),
    option(same_weights, pad_token="<|im_end|>"),
    option("needs dataloader_num_workers above 0", dataloader_persistent_workers=True),
    option("eos_token: the tokenizer has no token '</s>'", eos_token="</s>"),
    option("pad_token: the tokenizer has no token '[PAD]'", pad_token="[PAD]"),
    option("chat_template_path: there is no file", chat_template_path="missing.jinja"),
    option("is neither a file that ends in .jinja", chat_template_path="./missing"),
    option("activation_offloading=True moves activations from a GPU", activation_offloading=True),
    option("label_smoothing_factor must be at least 0 and below 1", label_smoothing_factor=1.5),
    refused("`output_router_logits` in the config of a model", "output_router_logits", arguments={"model": "router"}),
    *data_rows(pair_rows),
]
"""Rows of the table of `BradleyTerryConfig`."""


# ---- The tests ----


def sizes(tokenizer, **more) -> dict[str, Any]:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "num_key_value_heads": 2}
    return shape | {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None} | more


COMMON = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "disable_tqdm": True}
COMMON |= {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "seed": 3}
COMMON |= {"lr_scheduler_type": "constant_with_warmup", "logging_steps": 1}


def make_ppo(tokenizer, folder, given: Option) -> Run:
    torch.manual_seed(0)
    arguments = {"train_dataset": Dataset.from_list(prompt_rows()), "eval_dataset": Dataset.from_list(prompt_rows())}
    arguments |= given.arguments
    moe = arguments.pop("model", None) == "router"
    model = (
        MixtralForCausalLM(MixtralConfig(**sizes(tokenizer), num_local_experts=2, output_router_logits=True))
        if moe
        else LlamaForCausalLM(LlamaConfig(**sizes(tokenizer)))
    )
    if not moe:
        model.lm_head.weight.data *= 60  # a random model is almost uniform
    own = {"num_ppo_epochs": 1, "max_completion_length": 6, "critic": "head", "exact_kl_rows": 0}
    args = PPOConfig(str(folder), **(COMMON | own | given.options))
    batches = []

    def length(prompts, completions, number, **columns):
        batches.append((prompts, completions, number))
        return [-float(len(text)) for text in completions]

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = PPOTrainer(model, length, args=args, processing_class=tokenizer, peft_config=lora, **arguments)
    return Run(trainer, batches)


def make_reward(tokenizer, folder, given: Option) -> Run:
    torch.manual_seed(0)
    arguments = {"train_dataset": Dataset.from_list(pair_rows()), "eval_dataset": Dataset.from_list(pair_rows())}
    arguments |= given.arguments
    moe = arguments.pop("model", None) == "router"
    shape = sizes(tokenizer, num_labels=1)
    model = (
        MixtralForSequenceClassification(MixtralConfig(**shape, num_local_experts=2, output_router_logits=True))
        if moe
        else LlamaForSequenceClassification(LlamaConfig(**shape))
    )
    own = {"normalize_rewards": False, "layout": "plain"}
    args = BradleyTerryConfig(output_dir=str(folder), **(COMMON | own | given.options))
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    trainer = BradleyTerryTrainer(model, args, processing_class=tokenizer, peft_config=lora, **arguments)
    return Run(trainer)


def train(run: Run) -> Run:
    run.trainer.initial = run.weights
    run.output = run.trainer.train()
    return run


@pytest.fixture(scope="module")
def plain_ppo(chat_tokenizer_factory, tmp_path_factory):
    return train(make_ppo(chat_tokenizer_factory(), tmp_path_factory.mktemp("ppo"), Option()))


@pytest.fixture(scope="module")
def plain_reward(chat_tokenizer_factory, tmp_path_factory):
    return train(make_reward(chat_tokenizer_factory(), tmp_path_factory.mktemp("reward"), Option()))


@pytest.fixture(autouse=True)
def _usual_algorithms():
    yield
    torch.use_deterministic_algorithms(False)


def try_row(row: Row, make: Callable[[], Run], plain: Run) -> None:
    if row.says is None:
        row.value.check(train(make()), plain)
        return
    with pytest.raises(UserError) as error:
        make()
    assert row.says in str(error.value) and "\n" not in str(error.value)


@each(PPO_OPTIONS)
def test_ppo_options(row, chat_tokenizer, plain_ppo, tmp_path):
    try_row(row, partial(make_ppo, chat_tokenizer, tmp_path, row.value), plain_ppo)


@each(REWARD_OPTIONS)
def test_reward_options(row, chat_tokenizer, plain_reward, tmp_path):
    try_row(row, partial(make_reward, chat_tokenizer, tmp_path, row.value), plain_reward)
