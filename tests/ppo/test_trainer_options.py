"""Every option of `TrainingArguments`: PPO uses it, it changes nothing for a reason, or it is refused."""

from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.prompts import prompt_indices
from hf_rlhf_ext.ppo.trainer_options import REFUSED_OPTIONS, UNUSED_OPTIONS

# Options that are used, by where.
OPTIMIZER = """learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules
weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm"""
ROLLOUTS = """per_device_train_batch_size num_train_epochs max_steps gradient_accumulation_steps seed data_seed
full_determinism train_sampling_strategy neftune_noise_alpha"""
PRECISION = """bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
gradient_checkpointing_kwargs torch_empty_cache_steps"""
LOGS = """logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
skip_memory_metrics debug"""
EVALUATION = """eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start load_best_model_at_end
metric_for_best_model greater_is_better"""
SAVING = """output_dir save_only_model save_strategy save_steps save_on_each_node save_total_limit push_to_hub hub_token
hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision restore_callback_states_from_checkpoint"""
DEVICES = "use_cpu ddp_backend ddp_timeout fsdp fsdp_config deepspeed accelerator_config"  # sharding is refused
PARTS_OF_ANOTHER = "torch_compile_backend torch_compile_mode"  # setting them sets torch_compile
USED = " ".join((OPTIMIZER, ROLLOUTS, PRECISION, LOGS, EVALUATION, SAVING, DEVICES, PARTS_OF_ANOTHER)).split()

HARMLESS_OPTIONS = dict(sorted({**UNUSED_OPTIONS, "resume_from_checkpoint": "for scripts: pass it to train()"}.items()))
"""Options that change nothing in PPO, and that are right all the same, each with the reason."""

# A value that is not the default, of each option that is refused.
OTHER_VALUES = {
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["inputs"],
    "include_num_input_tokens_seen": "non_padding",
    "label_names": ["labels"],
    "label_smoothing_factor": 0.1,
    "length_column_name": "n_tokens",
    "liger_kernel_config": {"rope": True},
}


def make(**options):
    return PPOConfig("out", **({"use_cpu": True, "bf16": False} | options))


def test_every_option_is_in_one_place():
    names = [field.name for field in fields(TrainingArguments)]
    assert sorted([*USED, *HARMLESS_OPTIONS, *REFUSED_OPTIONS]) == sorted(names)


def other_value(name):
    if name == "parallelism_config":
        from accelerate.utils import ParallelismConfig

        return ParallelismConfig()
    (default,) = (field.default for field in fields(PPOConfig) if field.name == name)
    return OTHER_VALUES.get(name, not default)


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_what_ppo_cannot_use_is_one_line_with_a_remedy(name):
    with pytest.raises(UserError, match=rf"^{name}.* is not supported by PPO.*: .*(leave|set|read)") as error:
        make(**{name: other_value(name)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_sampling_strategy": "group_by_length"}, "generation_batch_size batches prompts of similar length"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "set gradient_accumulation_steps"),
        ({"accelerator_config": {"frob": True}}, "frob"),
        ({"torch_compile_mode": "default"}, "torch_compile=True is not supported"),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules='all-linear': it has an effect"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_num_workers"),
        ({"torch_empty_cache_steps": 0}, "torch_empty_cache_steps"),
        ({"logging_steps": 1.5}, "logging_steps"),
        ({"fp16": True, "bf16": True}, "fp16 and bf16"),
        ({"load_best_model_at_end": True, "save_strategy": "steps"}, "load_best_model_at_end"),
    ],
)
def test_values_that_do_not_work_are_one_line(options, message):
    with pytest.raises(UserError) as error:
        make(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_data_seed_and_sequential_choose_the_prompts(make_trainer, prompts):
    numbered = prompts.add_column("number", list(range(len(prompts))))
    seen = []

    def note(completions, number, **columns):
        seen.extend(number)
        return [0.0] * len(completions)

    for options, expected in [
        ({}, prompt_indices(0, 8, 6, 3)),
        ({"data_seed": 7}, prompt_indices(0, 8, 6, 7)),
        ({"train_sampling_strategy": "sequential"}, [0, 1, 2, 3, 4, 5, 0, 1]),
    ]:
        seen.clear()
        make_trainer(reward_funcs=note, train_dataset=numbered, max_steps=1, **options).train()
        assert seen == expected


def test_sequential_prompts_go_on_in_the_next_rollout():
    assert prompt_indices(1, 4, 6, 0, shuffled=False) == [4, 5, 0, 1]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"train_dataset": {"train": Dataset.from_list([{"prompt": "a"}])}}, r"pass one split, as in .*\['train'\]"),
        ({"eval_dataset": [{"text": "a"}]}, "has no column 'prompt'"),
        ({"eval_dataset": [{"prompt": "word " * 600}]}, "eval.* row 0: `prompt` has"),
        ({"ptx_dataset": [3], "ptx_coef": 0.1}, "ptx_dataset row 0 is of type int"),
    ],
)
def test_wrong_data_end_before_training(make_trainer, given, message):
    with pytest.raises(UserError, match=message):
        make_trainer(**given)


def test_sets_that_are_given_later_may_be_of_any_kind(make_trainer):
    rows = [{"prompt": "a sunny day"}, {"prompt": "fox"}]
    trainer = make_trainer()
    assert len(trainer.sample_and_score(rows)) == 2
    metrics = trainer.evaluate({"easy": rows})
    assert trainer.evaluate(rows)["eval_objective/scores"] == metrics["eval_easy_objective/scores"]
    with pytest.raises(UserError, match="^dataset has the splits 'test'"):
        trainer.sample_and_score({"test": Dataset.from_list(rows)})
    with pytest.raises(UserError, match="^eval_dataset is streamed"):
        trainer.evaluate(Dataset.from_list(rows).to_iterable_dataset())


@pytest.mark.parametrize("length", [512, 600, 10**6])
def test_completions_that_leave_no_room_for_a_prompt_name_the_option(make_trainer, length):
    with pytest.raises(
        UserError, match=f"max_completion_length={length} leaves no room .* 512 positions: set it"
    ) as error:
        make_trainer(max_completion_length=length)
    assert "-" not in str(error.value)


@pytest.mark.parametrize("kind", ["PPO", "reward"])
def test_the_loss_of_routers_is_refused_and_a_model_without_it_trains(kind, chat_tokenizer, make_trainer, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM, MixtralForSequenceClassification

    from hf_rlhf_ext.reward.config import BradleyTerryConfig
    from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": len(chat_tokenizer), "num_local_experts": 2, "num_labels": 1}
    config = MixtralConfig(**shape, pad_token_id=0, eos_token_id=2, bos_token_id=None, output_router_logits=True)
    torch.manual_seed(0)
    model = MixtralForCausalLM(config) if kind == "PPO" else MixtralForSequenceClassification(config)
    pairs = [{"prompt": "a", "chosen": " day", "rejected": " night"}] * 4

    def train():
        if kind == "PPO":
            return make_trainer(model=model, peft_config=None, max_steps=1).train()
        options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "save_strategy": "no"}
        args = BradleyTerryConfig(output_dir=str(tmp_path), normalize_rewards=False, **options)
        return BradleyTerryTrainer(model, args, pairs, processing_class=chat_tokenizer).train()

    with pytest.raises(UserError, match="set model.config.output_router_logits = False"):
        train()
    model.config.output_router_logits = False
    assert train().global_step == 1
