"""Optimizers that a user makes, schedule-free optimizers, schedules, and the choice of the best model in PPO."""

import pytest
import torch
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, MultiplicativeLR, OneCycleLR, SequentialLR
from transformers import EarlyStoppingCallback, LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback
from transformers.optimization import Adafactor, AdafactorSchedule

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.callbacks import PPOCallback
from hf_rlhf_ext.reward.scorer import RewardScorer
from tests.ppo.conftest import letter_reward
from tests.schedule_free import ScheduleFreeSGD

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def policy(tiny_config, lora):
    tiny_config.num_hidden_layers = 1
    torch.manual_seed(0)
    return get_peft_model(LlamaForCausalLM(tiny_config), lora)


@pytest.fixture
def make_own(make_trainer, policy):
    """`make_own(optimizer, scheduler)`: a trainer with a critic of the kind `adapter`, and an optimizer made before."""

    def make(optimizer, scheduler=None, **options):
        arguments = {"model": policy, "peft_config": None, "optimizers": (optimizer, scheduler)}
        return make_trainer(**(arguments | {"critic": "adapter", "max_steps": 2, "num_mini_batches": 1} | options))

    return make


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def rates(trainer):
    """The learning rate of each weight, by name."""
    names = {p: name for name, p in trainer.model.named_parameters()}
    return {names[p]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}


def adamw(model):
    return torch.optim.AdamW(trained(model), lr=2e-3)


def adamw_of_all_weights(model):
    return torch.optim.AdamW(model.parameters(), lr=2e-3)


def adamw_with_names(model):
    return torch.optim.AdamW([(name, p) for name, p in model.named_parameters() if p.requires_grad], lr=2e-3)


def adamw_with_options_of_groups(model):
    # `momentum_scale` is in all groups, but is no default of the class: a new group must have it too.
    group = {"params": trained(model), "lr": 2e-3, "momentum_scale": 1.0}
    optimizer = torch.optim.AdamW([group], lr=9.0)
    optimizer.register_step_pre_hook(lambda opt, *_: [g["momentum_scale"] for g in opt.param_groups] and None)
    return optimizer


def loraplus(model):
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=4)


def paged(model):
    import bitsandbytes

    return bitsandbytes.optim.PagedAdamW8bit(trained(model), lr=2e-3)


OWN = [adamw, adamw_of_all_weights, adamw_with_names, adamw_with_options_of_groups, loraplus, paged]


@pytest.mark.parametrize("make_optimizer", OWN, ids=lambda function: function.__name__)
def test_an_optimizer_made_before_the_trainer_trains_the_critic_too(make_own, policy, make_optimizer, caplog):
    trainer = make_own(make_optimizer(policy), value_clip_range=None)
    before = weights_of(trainer)
    trainer.train()
    still = [name for name, p in weights_of(trainer).items() if torch.equal(p, before[name])]
    # An A of LoRA has no gradient before its B has moved.
    assert not [name for name in still if "lora_B" in name or "value_head" in name]
    critic = {rate for name, rate in rates(trainer).items() if ".value." in name or "value_head" in name}
    assert critic == {2e-3}
    assert "optimizers" not in caplog.text


@pytest.mark.parametrize("rate", [None, 7e-3])
def test_value_learning_rate_holds_for_an_own_optimizer_before_and_after(make_own, make_trainer, policy, rate):
    first = make_own(adamw(policy), value_learning_rate=rate)
    second = make_trainer(value_learning_rate=rate, critic="adapter")
    second.optimizer = torch.optim.AdamW(trained(second.model), lr=2e-3)
    second.create_optimizer()
    for trainer in (first, second):
        for name, lr in rates(trainer).items():
            is_critic = ".value." in name or "value_head" in name
            assert lr == (rate if is_critic and rate is not None else 2e-3)


def test_a_class_and_its_arguments_make_an_optimizer_with_the_critic(make_trainer):
    made = (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9})
    trainer = make_trainer(optimizer_cls_and_kwargs=made, critic="adapter", max_steps=1)
    trainer.train()
    assert set(rates(trainer).values()) == {0.5} and set(rates(trainer)) == set(weights_of(trainer))
    assert all(group["momentum"] == 0.9 for group in trainer.optimizer.param_groups)


def halving(optimizer):
    return LambdaLR(optimizer, lambda step: 0.5**step)


def multiplied(optimizer):
    return MultiplicativeLR(optimizer, lambda step: 0.5)


def in_sequence(optimizer):
    parts = [LambdaLR(optimizer, lambda step: 1.0), LambdaLR(optimizer, lambda step: 0.5)]
    return SequentialLR(optimizer, parts, milestones=[1])


def one_cycle(optimizer):
    return OneCycleLR(optimizer, max_lr=2e-3, total_steps=4, cycle_momentum=False)


def cyclic(optimizer):
    return CyclicLR(optimizer, base_lr=1e-3, max_lr=2e-3, step_size_up=2, cycle_momentum=False)


@pytest.mark.parametrize("make_scheduler", [halving, multiplied, in_sequence, one_cycle, cyclic])
def test_a_scheduler_made_before_schedules_the_critic_in_proportion(make_own, policy, make_scheduler):
    optimizer = adamw(policy)
    trainer = make_own(optimizer, make_scheduler(optimizer), value_learning_rate=8e-3, logging_steps=1, max_steps=3)
    # Cycles begin below the learning rate of the option, which is that of their peak.
    base = 2e-3 if make_scheduler in (one_cycle, cyclic) else optimizer.param_groups[0]["initial_lr"]
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len({log["learning_rate"] for log in logs}) > 1  # the schedule did change it
    for log in logs:
        assert log["lr_value"] == pytest.approx(log["learning_rate"] * 8e-3 / base, rel=1e-9)


def test_lr_value_is_logged_for_the_same_step_as_learning_rate(make_trainer):
    trainer = make_trainer(lr_scheduler_type="linear", max_steps=4, value_learning_rate=2e-2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["learning_rate"] for log in logs] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert [log["lr_value"] for log in logs] == pytest.approx([2e-2, 1.5e-2, 1e-2, 5e-3])


def test_an_optimizer_without_weights_of_the_policy_is_refused(make_trainer, tiny_config, lora):
    base = LlamaForCausalLM(tiny_config)
    optimizer = torch.optim.AdamW(base.parameters())  # before `peft_config` froze them
    with pytest.raises(UserError, match="optimizers: .* holds no trained weight of the policy.*get_peft_model"):
        make_trainer(model=base, peft_config=lora, optimizers=(optimizer, None))


def test_a_part_of_the_policy_and_foreign_weights_are_said(make_own, policy, caplog):
    foreign = torch.nn.Parameter(torch.zeros(2))
    make_own(torch.optim.AdamW([*trained(policy)[:1], foreign]))
    messages = [record.getMessage() for record in caplog.records if "optimizers:" in record.getMessage()]
    assert len(messages) == 2
    assert f"{len(trained(policy)) - 1 - 2} of" not in messages[0]  # the critic's own weights do not count
    assert "keep their values" in messages[0] and "1 weights of the optimizer are not in the model" in messages[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda opt: {"optimizers": opt}, "optimizers: pass a pair"),
        (lambda opt: {"optimizers": (None, halving(opt))}, "a scheduler without its optimizer"),
        (
            lambda opt: {"optimizers": (opt, halving(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])))},
            "the scheduler was made for another optimizer",
        ),
        (lambda opt: {"optimizers": (opt, None), "optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, "both given"),
        (lambda opt: {"optimizer_cls_and_kwargs": torch.optim.SGD}, "optimizer_cls_and_kwargs: pass a pair"),
        (lambda opt: {"callbacks": [EarlyStoppingCallback()]}, "EarlyStoppingCallback needs evaluations"),
    ],
)
def test_wrong_arguments_are_one_line(make_trainer, policy, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        make_trainer(model=policy, peft_config=None, **arguments(adamw(policy)))
    assert "\n" not in str(error.value)


def test_an_optimizer_that_cannot_hold_the_critic_is_one_line(make_own, policy, make_trainer):
    with pytest.raises(UserError, match="optimizers: Muon does not take the weights of the critic"):
        make_own(torch.optim.Muon(trained(policy)))  # of matrices only: the bias of the value head is none
    trainer = make_trainer(optimizer_cls_and_kwargs=(torch.optim.Muon, {"lr": 1e-3}))
    with pytest.raises(UserError, match="optimizer_cls_and_kwargs: the optimizer cannot be made"):
        trainer.train()


# ---- Schedule-free optimizers ----


class FirstRatios(PPOCallback):
    """Keeps the weights that sampled each rollout."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.sampled = []

    def on_rollout(self, args, state, control, **kwargs):
        self.sampled.append([p.detach().clone() for p in self.parameters])


def schedule_free(model):
    return ScheduleFreeSGD(trained(model), lr=0.5)


def test_schedule_free_rollouts_use_the_weights_that_are_trained(make_own, policy, prompts):
    parameters = trained(policy)
    callback = FirstRatios(parameters)
    options = {"max_steps": 4, "num_ppo_epochs": 2, "logging_steps": 1, "max_grad_norm": 0.0, **EVERY_STEP}
    trainer = make_own(schedule_free(policy), callbacks=[callback], eval_dataset=prompts, critic="head", **options)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["val/ratio"] for log in logs][::2] == pytest.approx([1.0, 1.0], abs=1e-5)
    optimizer = trainer.optimizer.optimizer
    assert optimizer.stepped_in_eval == 0
    assert not optimizer.is_training  # after training, the model has the averaged weights
    # The model that was saved is the average, not the weights at which gradients are taken.
    averaged = weights_of(trainer)
    optimizer.train()
    assert max(float((p - averaged[n]).abs().max()) for n, p in weights_of(trainer).items()) > 1e-6


def test_schedule_free_checkpoints_and_evaluations_have_the_averaged_weights(make_own, policy, prompts, tmp_path):
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file

    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 3}
    trainer = make_own(schedule_free(policy), eval_dataset=prompts, critic="head", max_steps=3, **options)
    trainer.train()
    for step in (1, 2):  # saved without an evaluation before
        state = torch.load(tmp_path / "out" / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        assert all(group["train_mode"] is False for group in state["param_groups"])
    saved = load_file(tmp_path / "out" / "checkpoint-3" / "adapter_model.safetensors")
    now = get_peft_model_state_dict(trainer.policy, adapter_name="default")
    assert all(torch.equal(now[name], value) for name, value in saved.items())
    # Evaluation of the saved weights gives the numbers of the evaluation in training.
    last = [log for log in trainer.state.log_history if "eval_objective/scores" in log][-1]
    assert trainer.evaluate()["eval_objective/scores"] == last["eval_objective/scores"]


def test_a_schedule_free_run_resumes_exactly(make_trainer, tiny_config, lora, tmp_path):
    def run(folder, steps, **kwargs):
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(tiny_config), lora)
        options = {"max_steps": 4, "num_mini_batches": 1, "save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(
            folder, model=model, peft_config=None, optimizers=(schedule_free(model), None), critic="head", **options
        )
        trainer.train(**kwargs)
        return weights_of(trainer)

    whole = run("whole", 4)
    resumed = run("whole", 4, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class StopAt3(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


def test_the_best_schedule_free_model_is_loaded_as_saved(make_own, policy, prompts, tmp_path):
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file

    options = {"load_best_model_at_end": True, "metric_for_best_model": "objective/kl", "max_steps": 3, **EVERY_STEP}
    # The run is stopped after a step without evaluation and checkpoint.
    options |= {"eval_steps": 2, "save_strategy": "best", "max_steps": 8, "callbacks": [StopAt3()]}
    trainer = make_own(schedule_free(policy), eval_dataset=prompts, critic="head", **options)
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/adapter_model.safetensors")
    trainer.save_model(str(tmp_path / "final"))
    final = load_file(tmp_path / "final" / "adapter_model.safetensors")
    now = get_peft_model_state_dict(trainer.policy, adapter_name="default")
    assert all(torch.equal(best[name], final[name]) and torch.equal(best[name], now[name]) for name in best)


# ---- Schedules, the best model, evaluations ----


def test_reduce_lr_on_plateau_follows_the_score_in_both_groups(make_trainer, prompts):
    def same(completions, **columns):
        return [1.0] * len(completions)  # never better than the first

    trainer = make_trainer(
        reward_funcs=same,
        eval_dataset=prompts,
        value_learning_rate=4e-2,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5},
        eval_strategy="steps",
        eval_steps=1,
        max_steps=3,
    )
    trainer.train()
    assert trainer.lr_scheduler.mode == "max"
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["learning_rate"] for log in logs] == [1e-2, 1e-2, 5e-3]
    assert [log["lr_value"] for log in logs] == [4e-2, 4e-2, 2e-2]


def test_a_list_for_the_groups_of_the_optimizer_has_one_value_each(make_trainer, prompts):
    def make(n_values):
        return make_trainer(
            eval_dataset=prompts,
            critic="adapter",
            lr_scheduler_type="reduce_lr_on_plateau",
            lr_scheduler_kwargs={"min_lr": [1e-6] * n_values},
            eval_strategy="steps",
            eval_steps=1,
            max_steps=1,
        )

    with pytest.raises(UserError, match="lr_scheduler_kwargs: min_lr has 2 values for the 4 groups of the optimizer"):
        make(2).train()
    trainer = make(4)
    trainer.train()
    assert trainer.lr_scheduler.min_lrs == [1e-6] * 4


def test_a_learning_rate_that_the_optimizer_computes_has_no_critic_rate(make_own, policy):
    def relative(model):
        return Adafactor(trained(model), lr=None, relative_step=True, scale_parameter=True, warmup_init=True)

    optimizer = relative(policy)
    with pytest.raises(UserError, match="value_learning_rate has no effect with relative_step=True"):
        make_own(optimizer, AdafactorSchedule(optimizer), value_learning_rate=1e-3)


def test_a_metric_that_only_a_function_could_log(make_trainer, prompts, tiny_config, chat_tokenizer, caplog):
    tiny_config.num_labels = 1
    reward_model = LlamaForSequenceClassification(tiny_config)
    options = {"metric_for_best_model": "politeness", "eval_strategy": "steps", "eval_steps": 1}
    make_trainer(eval_dataset=prompts, reward_funcs=lambda completions, **columns: [0.0] * len(completions), **options)
    assert "if it has no 'politeness': reward functions must log it" in caplog.text
    with pytest.raises(UserError, match="metric_for_best_model: evaluations have no 'politeness': choose one of"):
        make_trainer(eval_dataset=prompts, reward_funcs=RewardScorer(reward_model, chat_tokenizer), **options)


@pytest.mark.parametrize(
    "metric, message",
    [
        ("objective/score", "set it to objective/scores"),
        ("rewards/letters", "did you mean"),
        ("completions/words", "choose one of"),
    ],
)
def test_a_misspelt_metric_is_said_before_training(make_trainer, prompts, caplog, metric, message):
    options = {"metric_for_best_model": metric, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": prompts}

    def letters(completions, **columns):
        return letter_reward(completions)

    if message == "did you mean":  # a reward function may log a metric of this name
        make_trainer(reward_funcs=letters, **options)
        assert "did you mean rewards/letters/mean?" in caplog.text
        return
    with pytest.raises(UserError, match=f"metric_for_best_model: evaluations have no '{metric}': {message}"):
        make_trainer(reward_funcs=letters, **options)


def test_a_metric_that_no_evaluation_has_stops_at_the_first_one(make_trainer, prompts):
    trainer = make_trainer(
        eval_dataset=prompts, metric_for_best_model="letters", eval_strategy="steps", eval_steps=1, eval_on_start=True
    )
    with pytest.raises(UserError, match="metric_for_best_model: evaluation has no 'eval_letters'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_worst_as_the_best_is_said(make_trainer, prompts, caplog):
    options = {"metric_for_best_model": "objective/kl", "greater_is_better": True, "eval_strategy": "steps"}
    make_trainer(eval_dataset=prompts, eval_steps=1, **options)
    assert "greater_is_better=True" in caplog.text and "leave greater_is_better out" in caplog.text


def test_early_stopping_ends_the_run(make_trainer, prompts):
    def same(completions, **columns):
        return [1.0] * len(completions)

    options = {"metric_for_best_model": "objective/scores", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 8}
    trainer = make_trainer(
        reward_funcs=same, eval_dataset=prompts, callbacks=[EarlyStoppingCallback(2)], logging_steps=5, **options
    )
    assert trainer.train().global_step == 3
    # All three steps are in the log, although it was to be written every five.
    assert [log["step"] for log in trainer.state.log_history if "loss" in log] == [3]


def test_a_run_shorter_than_logging_steps_has_a_log(make_trainer):
    trainer = make_trainer(max_steps=3, logging_steps=10)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["step"] == 3 and {"objective/kl", "objective/scores", "loss/value_avg", "lr_value"} <= set(log)
    silent = make_trainer(max_steps=1, logging_strategy="no")
    silent.train()
    assert not [log for log in silent.state.log_history if "loss" in log]


def test_predict_gives_the_completions_and_the_metrics_of_an_evaluation(make_trainer, prompts):
    trainer = make_trainer()
    predicted = trainer.predict(prompts)
    metrics = trainer.evaluate(prompts, metric_key_prefix="test")
    rows = trainer.sample_and_score(prompts)
    assert list(predicted.predictions) == [row.completion for row in rows] and predicted.label_ids is None
    shared = set(predicted.metrics) - {"test_runtime"}
    assert {name: predicted.metrics[name] for name in shared} == {name: metrics[name] for name in shared}
    assert not [log for log in trainer.state.log_history[:-1] if "test_objective/scores" in log]


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.0},
        {"skip_memory_metrics": False},
        {"eval_delay": 2, "eval_strategy": "steps", "eval_steps": 1},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"logging_first_step": True, "logging_nan_inf_filter": False},
        {"ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_change_no_weights(make_trainer, prompts, options):
    fixed = {"max_grad_norm": 0.0} if "max_grad_norm" in options else {}
    plain = make_trainer(max_steps=2, **({"max_grad_norm": 1e9} if fixed else {}))
    plain.train()
    trainer = make_trainer(max_steps=2, eval_dataset=prompts, **options)
    trainer.train()
    expected = weights_of(plain)
    assert all(torch.equal(p, expected[name]) for name, p in weights_of(trainer).items())
    if "eval_delay" in options:
        assert [log["step"] for log in trainer.state.log_history if "eval_objective/scores" in log] == [2]
