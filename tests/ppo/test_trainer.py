"""PPOTrainer on tiny real models: references, PEFT kinds, evaluation, clipping, precision, logs, and errors."""

import json
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    TrainerCallback,
)

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.metrics.names import find_metric
from hf_rlhf_ext.modeling.adapters import save_adapter
from hf_rlhf_ext.modeling.loading import load_base_model, load_tokenizer
from hf_rlhf_ext.modeling.stack import Role
from hf_rlhf_ext.ppo.config import PPOConfig
from hf_rlhf_ext.ppo.trainer import PPOTrainer

CHAT = [[{"role": "user", "content": text}] for text in ("Tell me about a fox", "What is happy?", "Words!")]


def letter_reward(completions, **kwargs):
    return [text.count("e") - 0.2 * len(text) for text in completions]


def snapshot(model, keep=lambda name, parameter: True):
    return {name: p.detach().clone() for name, p in model.named_parameters() if keep(name, p)}


def trained(model):
    return snapshot(model, lambda name, p: p.requires_grad)


def frozen(model):
    return snapshot(model, lambda name, p: not p.requires_grad)


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def assert_moved(got, before):
    assert got.keys() == before.keys()
    assert all(not torch.equal(got[name], before[name]) for name in before), [
        name for name in before if torch.equal(got[name], before[name])
    ]


@pytest.fixture
def sft_model(tiny_config, lora):
    """A PeftModel whose adapter is not zero, as after SFT."""
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(tiny_config), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


# The policy and its reference


def test_from_a_base_the_reference_is_the_bare_base(make_trainer):
    trainer = make_trainer()
    assert trainer.stack.roles["reference"] == Role()
    before, start = frozen(trainer.model), trained(trainer.model)
    trainer.train()
    assert_same(frozen(trainer.model), before)  # merging for generation leaves no trace
    assert_moved(trained(trainer.model), start)
    kl = [log["objective/kl"] for log in trainer.state.log_history if "objective/kl" in log]
    assert kl[0] == 0.0 and len(kl) == 1  # a new LoRA changes nothing
    assert trainer.evaluate(trainer.train_dataset)["eval_objective/kl_k3"] > 0


def test_from_an_adapter_the_reference_is_its_frozen_copy(make_trainer, sft_model):
    trainer = make_trainer(model=sft_model, peft_config=None, max_steps=8)
    names = {name: p for name, p in trainer.model.named_parameters() if ".ref." in name}
    assert (
        trainer.stack.roles["reference"].adapter == "ref" and names and not any(p.requires_grad for p in names.values())
    )
    before = frozen(trainer.model)
    trainer.train()
    kl = [log["objective/kl"] for log in trainer.state.log_history if "objective/kl" in log]
    assert kl[0] == pytest.approx(0.0, abs=1e-5) and abs(kl[1]) > 1e-3
    assert_same(frozen(trainer.model), before)
    assert trainer.model.active_adapter == "default"


@pytest.mark.parametrize("as_path", [False, True])
def test_an_adapter_that_was_loaded_for_inference_is_trained(
    make_trainer, sft_model, tiny_config, chat_tokenizer, tmp_path, as_path
):
    base = sft_model.get_base_model()
    base.name_or_path = str(tmp_path / "base")
    save_adapter(sft_model, "default", tmp_path / "sft")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    path = str(tmp_path / "sft")
    model = path if as_path else PeftModel.from_pretrained(LlamaForCausalLM(tiny_config), path)
    options = {"processing_class": None} if as_path else {}
    trainer = make_trainer(model=model, peft_config=None, bf16=as_path, **options)  # "auto" may load bf16
    start = trained(trainer.model)
    assert any("lora_A" in name for name in start)
    trainer.train()
    assert_moved(trained(trainer.model), start)


def test_without_peft_all_weights_train_and_a_copy_is_the_reference(make_trainer, tmp_path):
    trainer = make_trainer(peft_config=None, learning_rate=1e-3, max_steps=8)
    start, reference = snapshot(trainer.model), snapshot(trainer.stack.roles["reference"].model)
    trainer.train()
    moved = snapshot(trainer.model)
    assert all(not torch.equal(moved[n], start[n]) for n in start if "embed" not in n)
    assert_same(snapshot(trainer.stack.roles["reference"].model), reference)
    kl = [log["objective/kl"] for log in trainer.state.log_history if "objective/kl" in log]
    assert kl[0] == 0.0 and abs(kl[1]) > 1e-3
    trainer.save_model(str(tmp_path / "saved"))
    loaded = snapshot(LlamaForCausalLM.from_pretrained(tmp_path / "saved"))
    assert_same(loaded, {name: weight for name, weight in moved.items() if "value_head" not in name})


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_other_adapters_train(make_trainer, kind):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **kind)
    trainer = make_trainer(peft_config=config)
    before, start = frozen(trainer.model), trained(trainer.model)
    trainer.train()
    assert_same(frozen(trainer.model), before)
    assert_moved(trained(trainer.model), start)


def test_the_value_head_is_no_target_of_all_linear(make_trainer):
    trainer = make_trainer()
    assert {name for name, _ in trainer.model.named_parameters() if "value_head" in name} == {
        "value_head.weight",
        "value_head.bias",
    }


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(make_trainer):
    runs = []
    for seed in (3, 3, 4):
        trainer = make_trainer(seed=seed)
        torch.rand(seed)  # what happened before must not matter
        trainer.train()
        runs.append(trained(trainer.model))
    assert_same(runs[0], runs[1])
    assert not all(torch.equal(runs[2][name], runs[0][name]) for name in runs[0])


# One update


@pytest.mark.parametrize("kind", ["base", "adapter", "full"])
@pytest.mark.parametrize("merge", [True, False])
def test_the_first_ratio_is_one(make_trainer, sft_model, kind, merge):
    options = {"base": {}, "adapter": {"model": sft_model}, "full": {}}[kind]
    options |= {} if kind == "base" else {"peft_config": None}
    trainer = make_trainer(max_steps=1, merge_for_generation=merge, **options)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["val/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert log["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-9) and log["policy/clipfrac_avg"] == 0.0


def test_the_loss_weights_of_the_roles_do_not_couple_through_clipping(make_trainer):
    # The value head starts at zero, so in the first step no value gradient reaches the trunk: the policy's step must be
    # the same however large the critic's gradient is.
    steps = []
    for vf_coef in (1e-3, 1e4):
        trainer = make_trainer(max_steps=1, vf_coef=vf_coef, max_grad_norm=0.01, optim="sgd")
        trainer.train()
        steps.append(trained(trainer.model))
    assert_same(*({name: p for name, p in step.items() if "lora_" in name} for step in steps))
    assert not torch.equal(steps[0]["value_head.bias"], steps[1]["value_head.bias"])


def test_each_role_is_clipped_to_the_norm_by_itself(make_trainer):
    trainer = make_trainer(max_grad_norm=0.5, critic="head")
    trainer.create_optimizer()
    head = list(trainer.value_head.parameters())
    policy = [p for name, p in trainer.model.named_parameters() if p.requires_grad and "value_head" not in name]
    for parameter in policy:
        parameter.grad = torch.full_like(parameter, 1e-5)  # below the limit: stays
    for parameter in head:
        parameter.grad = torch.full_like(parameter, 100.0)
    reported = trainer._clip_grad_norm(trainer.model)
    size = sum(p.numel() for p in policy)
    assert reported.item() == pytest.approx(1e-5 * size**0.5, rel=1e-4)
    assert all(torch.equal(p.grad, torch.full_like(p, 1e-5)) for p in policy)
    assert torch.cat([p.grad.flatten() for p in head]).norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("rate, expected", [(None, 1e-2), (3e-2, 3e-2), (0.0, 0.0)])
def test_the_value_head_has_its_own_learning_rate(make_trainer, rate, expected):
    trainer = make_trainer(value_learning_rate=rate, max_steps=1, weight_decay=0.1)
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert {id(p) for p in groups[-1]["params"]} == {id(p) for p in trainer.value_head.parameters()}
    assert trainer.state.log_history[0]["lr_value"] == expected
    assert trainer.state.log_history[0]["learning_rate"] == 1e-2
    everything = [id(p) for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(trained(trainer.model))


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_optimizers_train_both_roles(make_trainer, optim):
    trainer = make_trainer(optim=optim, critic="adapter", value_learning_rate=3e-2, max_steps=3)
    start = trained(trainer.model)
    trainer.train()
    assert_moved(trained(trainer.model), start)
    assert type(trainer.optimizer.optimizer).__module__.startswith("bitsandbytes")
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-2, 3e-2}


def test_gradient_checkpointing_is_on_in_training_only_and_changes_nothing(make_trainer):
    weights, recomputed = [], []
    for on in (False, True):
        options = {"check_first_rollout": False}  # it has a forward pass of its own
        trainer = make_trainer(activation_checkpointing=on, merge_for_generation=False, critic="head", **options)
        layer, calls = trainer.model.get_base_model().model.layers[0].mlp, []
        layer.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(module.training))
        trainer.train()
        weights.append(trained(trainer.model))
        recomputed.append((calls.count(True), calls.count(False)))
    (plain, generation), (twice, same) = recomputed
    assert plain == 4 and twice == 8 and generation == same > 0  # 4 micro-steps
    assert_same(*weights)


def test_bf16_trains_fp32_adapters_on_a_bf16_base(make_trainer, tiny_config):
    torch.manual_seed(0)
    trainer = make_trainer(model=LlamaForCausalLM(tiny_config).bfloat16(), bf16=True, activation_checkpointing=True)
    before, start = frozen(trainer.model), trained(trainer.model)
    assert {p.dtype for p in start.values()} == {torch.float32}
    trainer.train()
    assert_same(frozen(trainer.model), before)
    assert_moved(trained(trainer.model), start)
    first = trainer.state.log_history[0]
    assert first["val/ratio"] == pytest.approx(1.0, abs=5e-3)
    assert all(math.isfinite(value) for log in trainer.state.log_history for value in log.values())


# Steps and rollouts


@pytest.mark.parametrize("epochs, rows, steps", [(1, 3, 4), (1, 6, 4), (3, 6, 12), (0.1, 6, 4), (2, 100, 100)])
def test_max_steps_counts_whole_rollouts_over_the_prompts(make_trainer, prompts, epochs, rows, steps):
    # A rollout is 4 x 2 = 8 completions and 2 x 2 = 4 optimizer steps.
    dataset = Dataset.from_dict({"prompt": [prompts["prompt"][i % 6] for i in range(rows)]})
    trainer = make_trainer(max_steps=-1, num_train_epochs=epochs, train_dataset=dataset)
    assert trainer.args.max_steps == steps


def test_a_data_set_smaller_than_a_rollout_wraps_and_trains(make_trainer, prompts):
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append(sorted(prompts))
        return letter_reward(completions)

    trainer = make_trainer(train_dataset=prompts.select([2]), reward_funcs=reward, max_steps=-1, num_train_epochs=9)
    start = trained(trainer.model)
    trainer.train()
    assert seen == [["fox"] * 8] * 2 and trainer.state.global_step == 8  # ceil(9 / 8) rollouts
    assert_moved(trained(trainer.model), start)


def test_messages_go_through_the_chat_template_and_come_back_as_messages(make_trainer):
    seen = {}

    def reward(prompts, completions, topic, trainer_state, **kwargs):
        seen.update(prompt=prompts[0], completion=completions[0], topic=topic, columns=set(kwargs))
        return [float(len(completion[0]["content"])) for completion in completions]

    dataset = Dataset.from_dict({"prompt": CHAT, "topic": ["fox", "joy", "text"], "completion": ["x", "y", "z"]})
    make_trainer(train_dataset=dataset, reward_funcs=reward, max_steps=1).train()
    assert seen["prompt"] in CHAT and len(seen["topic"]) == 8
    assert seen["columns"] == {"completion_ids", "log_extra", "log_metric"}
    (message,) = seen["completion"]
    assert message["role"] == "assistant" and "<|im_" not in message["content"]


def test_a_sample_of_completions_is_printed_when_asked_for(make_trainer, capsys):
    make_trainer(max_steps=1, log_completions=True, num_completions_to_print=2).train()
    assert "letter_reward" in capsys.readouterr().out


# Rewards and KL


def test_the_missing_stop_token_penalty(make_trainer):
    logs = []
    for penalty in (None, 2.0):
        trainer = make_trainer(max_steps=1, missing_eos_penalty=penalty, kl_coef=0.0)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    unfinished = 1 - logs[0]["completions/stopped_frac"]
    assert 0 < unfinished < 1
    assert logs[1]["objective/scores"] == logs[0]["objective/scores"]  # the reward function's own
    paid = logs[0]["objective/rlhf_reward"] - logs[1]["objective/rlhf_reward"]
    assert paid == pytest.approx(2.0 * unfinished, abs=1e-5)


@pytest.mark.parametrize("target, factor", [(1e6, 0.8), (1e-6, 1.2)])
def test_the_kl_coefficient_adapts_towards_its_target(make_trainer, sft_model, target, factor):
    # Horizon 8 = the rollout, error clipped at ±0.2: a factor 0.8 or 1.2 a rollout, after a first one whose KL is 0.
    trainer = make_trainer(kl_target=target, kl_horizon=8, kl_coef=0.1, max_steps=12, learning_rate=0.03)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "objective/kl_coef" in log]
    assert [log["objective/kl_coef"] for log in logs] == pytest.approx([0.1, 0.08, 0.08 * factor])
    assert logs[0]["objective/kl"] == 0.0 and (target > 1) == (logs[1]["objective/kl"] < target)


def test_a_strong_penalty_keeps_the_policy_near_the_reference(make_trainer):
    kl = []
    for coefficient in (0.0, 100.0):
        trainer = make_trainer(kl_coef=coefficient, max_steps=24, learning_rate=3e-3)
        trainer.train()
        kl.append(trainer.evaluate(trainer.train_dataset)["eval_objective/kl_k3"])
    assert kl[1] < kl[0] / 2


def test_a_story_ends_where_the_model_ends_it(stories_path, make_trainer):
    tokenizer = load_tokenizer(str(stories_path))
    model = load_base_model(str(stories_path), dtype="float32")
    dataset = Dataset.from_dict({"prompt": ["Once upon a time"] * 16})
    seen = []

    def reward(completion_ids, **kwargs):
        seen.extend(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    trainer = make_trainer(
        model=model,
        processing_class=tokenizer,
        stop_token_ids=None,
        max_completion_length=256,
        per_device_eval_batch_size=16,
        reward_funcs=reward,
    )
    rows = trainer.sample_and_score(dataset)
    assert trainer.tools.sampling.stop_ids == [1, 2] and tokenizer.eos_token_id == 2
    finished = [ids for ids in seen if ids[-1] == 1]
    assert len(finished) > 1 and not any(1 in ids[:-1] or 2 in ids[:-1] for ids in seen)
    assert sum(row.stopped for row in rows) == len(finished)
    assert all(row.n_tokens == len(ids) == row.score for row, ids in zip(rows, seen, strict=True))
    assert all("<s>" not in row.completion for row in rows)


# Evaluation


def test_evaluation_leaves_training_bit_equal(make_trainer, prompts):
    weights = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": prompts}):
        trainer = make_trainer(max_steps=8, **options)  # a second rollout draws after the evaluations
        trainer.train()
        weights.append(trained(trainer.model))
    assert_same(*weights)


def test_evaluation_metrics(make_trainer, prompts):
    def gold(completions, **kwargs):
        return [1.0] * len(completions)

    def sometimes(prompts, **kwargs):
        return [2.0 if prompt == "fox" else None for prompt in prompts]

    trainer = make_trainer(
        eval_dataset={"easy": prompts, "one": prompts.select([0])},
        eval_reward_funcs=[gold, sometimes],
        eval_strategy="steps",
        eval_steps=4,
        per_device_eval_batch_size=4,
    )
    trainer.train()
    easy = next(log for log in trainer.state.log_history if "eval_easy_objective/scores" in log)
    assert easy["eval_easy_rewards/gold/mean"] == 1.0
    assert easy["eval_easy_rewards/sometimes/mean"] == 2.0  # the rows it scored
    assert easy["eval_easy_objective/scores"] == pytest.approx(easy["eval_easy_rewards/letter_reward/mean"])
    assert 1 <= easy["eval_easy_completions/mean_length"] <= 6
    assert any("eval_one_objective/kl" in log for log in trainer.state.log_history)
    assert not any("gold" in key for log in trainer.state.log_history for key in log if not key.startswith("eval_"))
    first, second, other = (trainer.sample_and_score(prompts, seed=seed) for seed in (None, 3, 9))
    completions = [[(row.prompt, row.completion, row.kl) for row in rows] for rows in (first, second, other)]
    assert completions[0] == completions[1] != completions[2]  # common random numbers
    assert [row.prompt for row in first] == prompts["prompt"]


def test_evaluation_needs_a_data_set(make_trainer):
    with pytest.raises(UserError, match="evaluation needs eval_dataset: pass one to the trainer"):
        make_trainer().evaluate()


class WeightsOfStep(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        self.__dict__.setdefault("steps", {})[state.global_step] = trained(model)


def test_the_best_model_is_loaded_at_the_end_with_its_value_head(make_trainer, prompts):
    verdicts = iter([1.0, 5.0, 0.0, 0.0])

    def judge(prompts, **kwargs):
        return [next(verdicts)] * len(prompts)

    recorder = WeightsOfStep()
    trainer = make_trainer(
        eval_dataset=prompts,
        eval_reward_funcs=judge,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="rewards/judge/mean",
        load_best_model_at_end=True,
        callbacks=[recorder],
    )
    trainer.train()
    assert trainer.state.best_metric == 5.0 and trainer.state.best_global_step == 2
    assert_same(trained(trainer.model), recorder.steps[2])
    assert not torch.equal(recorder.steps[2]["value_head.weight"], recorder.steps[4]["value_head.weight"])


# Logs


TRAINERS_OWN = {"step", "total_flos", "eval_runtime", "train_runtime"}
TRAINERS_OWN |= {"train_samples_per_second", "train_steps_per_second"}


def test_every_logged_number_has_a_unit_and_a_meaning(make_trainer, prompts):
    trainer = make_trainer(eval_dataset=prompts, eval_strategy="steps", eval_steps=2, max_steps=8)
    trainer.train()
    history = trainer.state.log_history
    keys = {key for log in history for key in log} - TRAINERS_OWN
    assert {key for key in keys if find_metric(key) is None} == set()
    assert keys >= {
        "objective/kl",
        "objective/scores",
        "policy/clipfrac_avg",
        "loss/policy_avg",
        "loss/value_avg",
        "val/ratio",
        "val/explained_variance",
        "rewards/letter_reward/std",
        "eval_objective/kl",
        "completions/mean_length",
    }
    assert [log["episode"] for log in history if "episode" in log] == [8, 16]
    assert all(math.isfinite(value) for log in history for value in log.values())


def test_logged_means_do_not_depend_on_accumulation(make_trainer):
    logs = []
    for batch, accumulation in ((4, 1), (1, 4)):
        trainer = make_trainer(
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, logging_steps=4
        )
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[0].keys() == logs[1].keys()
    for key in logs[0]:
        assert logs[0][key] == pytest.approx(logs[1][key], abs=1e-4), key


# Errors that a new user will see: one line each


def rows(**columns):
    return Dataset.from_dict(columns)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_dataset": None}, "train_dataset is required: pass a dataset with a column 'prompt'."),
        ({"train_dataset": rows(question=["a"])}, "train_dataset has no column 'prompt', only ['question']: rename"),
        ({"train_dataset": rows(prompt=[])}, "train_dataset is empty: PPO needs at least one prompt."),
        ({"train_dataset": rows(prompt=["a", None])}, "train_dataset row 1: `prompt` is None, not text or a list of"),
        ({"train_dataset": rows(prompt=[3])}, "train_dataset row 0: `prompt` is 3, not text or a list of messages"),
        ({"train_dataset": rows(prompt=["a", ""])}, "train_dataset row 1: `prompt` has no tokens: remove the row"),
        ({"max_prompt_length": 4}, "train_dataset row 3: `prompt` has"),
        ({"max_prompt_length": 4}, "over the 4 that max_prompt_length leaves: change that option, or shorten or drop"),
        ({"max_completion_length": 510}, "over the 2 that max_completion_length of 512 positions leaves: change"),
        ({"train_dataset": IterableDataset.from_generator(iter)}, "train_dataset is streamed: read as many rows as"),
        (
            {"reward_weights": [1.0, 2.0]},
            "reward_weights has 2 entries for 1 reward_funcs: give one each, in the order letter_reward.",
        ),
        ({"reward_funcs": []}, "reward_funcs: give at least one callable, reward model or path."),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"kl_target": 0.0}, "kl_target must be positive, got 0.0: leave it out for a fixed kl_coef."),
        ({"kl_target": 1.0, "kl_coef": 0.0}, "kl_coef must be positive when kl_target is set"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3, got 'k4'."),
        ({"num_mini_batches": 0}, "num_mini_batches must be at least 1, got 0."),
        ({"generation_kwargs": {"top_k": 5}}, "generation_kwargs: top_k has an option of its own in PPO: set top_k"),
    ],
)
def test_a_mistake_is_one_line(make_trainer, options, message):
    with pytest.raises(UserError) as error:
        make_trainer(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_without_chat_template_or_pad_is_one_line(make_trainer, chat_tokenizer):
    chat_tokenizer.chat_template = None
    with pytest.raises(UserError, match="the prompts are messages, but tokenizer .* has no chat template: set"):
        make_trainer(train_dataset=Dataset.from_dict({"prompt": CHAT}))
    chat_tokenizer.pad_token = None
    with pytest.raises(UserError, match="has no pad token: set `tokenizer.pad_token` to an unused token"):
        make_trainer()


def test_a_second_adapter_is_one_line(make_trainer, sft_model):
    with pytest.raises(UserError, match="peft_config was given, but the model already has an adapter: leave one"):
        make_trainer(model=sft_model)


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_one_line(make_trainer, tiny_config):
    small = {name: getattr(tiny_config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    granite = GraniteForCausalLM(GraniteConfig(**small, num_attention_heads=4, intermediate_size=64, logits_scaling=8))
    granite.register_forward_hook(lambda module, args, output: output.__setitem__("logits", output.logits**3))
    with pytest.raises(UserError, match="GraniteForCausalLM changes the output of its head"):
        make_trainer(model=granite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_soft_capped_logits_trains(make_trainer, tiny_config, dtype):
    small = {name: getattr(tiny_config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    config = Gemma2Config(**small, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64,
                          final_logit_softcapping=2.0)  # fmt: skip
    gemma = Gemma2ForCausalLM(config).to(dtype)
    gemma.lm_head.weight.data *= 50
    make_trainer(model=gemma, max_steps=1).train()


def test_a_bad_evaluation_set_is_named_as_such(make_trainer):
    with pytest.raises(UserError, match="eval_dataset has no column 'prompt', only \\['text'\\]"):
        make_trainer().evaluate(Dataset.from_dict({"text": ["a"]}))


def test_a_reward_that_fails_in_training_is_one_line(make_trainer):
    with pytest.raises(UserError, match="reward function 'short' returned 1 scores for 8 completions"):

        def short(**kwargs):
            return [1.0]

        make_trainer(reward_funcs=short).train()


def test_a_generation_option_reaches_generation(make_trainer, prompts):
    trainer = make_trainer(generation_kwargs={"suppress_tokens": list(range(40, 384))})
    rows = trainer.sample_and_score(prompts)
    vocabulary = trainer.processing_class.convert_ids_to_tokens(range(40))
    assert all(character in "".join(vocabulary) for row in rows for character in row.completion)


def test_the_defaults_are_those_of_trl(tmp_path):
    args = PPOConfig(str(tmp_path), use_cpu=True)
    assert args.activation_checkpointing and args.bf16 and args.learning_rate == 1e-5
    assert (args.minibatch_size, args.rollout_size, args.steps_per_rollout) == (8, 8, 4)
    assert PPOTrainer._name == "PPO"


def test_trust_remote_code_reaches_everything_that_is_loaded(tiny_config, chat_tokenizer, prompts, lora, tmp_path):
    folder = tmp_path / "remote"
    LlamaForCausalLM(tiny_config).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "of_a_stranger", "architectures": ["StrangeModel"]}
    config["auto_map"] = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.StrangeModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class StrangeConfig(LlamaConfig):\n    model_type = 'of_a_stranger'\n"
        "class StrangeModel(LlamaForCausalLM):\n    config_class = StrangeConfig\n"
    )

    def make(trust):
        args = PPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", trust_remote_code=trust,
                         max_completion_length=4, critic="model", save_strategy="no")  # fmt: skip
        reward = {"reward_funcs": letter_reward, "value_model": str(folder)}
        return PPOTrainer(str(folder), args=args, train_dataset=prompts, peft_config=lora, **reward)

    with pytest.raises((ValueError, UserError)):
        make(False)
    trainer = make(True)
    assert type(trainer.model.get_base_model()).__name__ == "StrangeModel"
    assert type(trainer.stack.roles["value"].model).__name__ == "StrangeModel"
