"""`BradleyTerryTrainer`: optimizers that a user makes, schedule-free ones, the best model, `predict`, short logs."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.scorer import RewardScorer
from tests.reward.examples import comparisons
from tests.schedule_free import ScheduleFreeSGD

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def adapted(seqcls):
    torch.manual_seed(0)
    return get_peft_model(seqcls, LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def own(make_trainer, model, optimizer, scheduler=None, **options):
    arguments = {"model": model, "peft": None, "optimizers": (optimizer, scheduler), "max_steps": 2}
    return make_trainer(comparisons(6), **(arguments | options))


def test_an_own_optimizer_trains_adapter_and_head(make_trainer, adapted, caplog):
    # The head is a plain layer of Transformers, which the trainer replaces by an fp32 one.
    trainer = own(make_trainer, adapted, torch.optim.AdamW(trained(adapted), lr=1e-2))
    before = [p.detach().clone() for p in trained(adapted)]
    trainer.train()
    assert not any(torch.equal(p, old) for p, old in zip(trained(adapted), before, strict=True))
    assert "optimizers:" not in caplog.text


def test_an_optimizer_without_trained_weights_is_refused(make_trainer, seqcls):
    optimizer = torch.optim.AdamW(seqcls.parameters())  # of the base, before the trainer adds the adapter
    with pytest.raises(UserError, match="optimizers: .* holds no trained weight of the reward model.*get_peft_model"):
        make_trainer(comparisons(4), optimizers=(optimizer, None))


def test_an_optimizer_without_the_head_is_said(make_trainer, adapted, caplog):
    lora = [p for name, p in adapted.named_parameters() if "lora_" in name]
    own(make_trainer, adapted, torch.optim.AdamW(lora, lr=1e-2))
    assert "1 of" in caplog.text and "score" in caplog.text and "keep their values" in caplog.text


def test_a_scheduler_of_another_optimizer_is_refused(make_trainer, adapted):
    other = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), lambda step: 1.0)
    with pytest.raises(UserError, match="the scheduler was made for another optimizer"):
        own(make_trainer, adapted, torch.optim.AdamW(trained(adapted)), other)


def test_schedule_free_checkpoints_have_the_averaged_weights(make_trainer, adapted, tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "normalize_rewards": False}
    trainer = own(make_trainer, adapted, ScheduleFreeSGD(trained(adapted), lr=0.5), **options)
    trainer.train()
    for step in (1, 2, 3):  # saved without an evaluation before
        state = torch.load(tmp_path / "out" / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        assert all(group["train_mode"] is False for group in state["param_groups"])
    saved = load_file(tmp_path / "out" / "checkpoint-3" / "adapter_model.safetensors")
    now = get_peft_model_state_dict(adapted)
    assert all(torch.equal(now[name], value) for name, value in saved.items())


def test_schedule_free_normalization_is_measured_on_the_averaged_weights(make_trainer, adapted, chat_tokenizer):
    optimizer = ScheduleFreeSGD(trained(adapted), lr=0.5)
    trainer = own(make_trainer, adapted, optimizer, max_steps=3, save_strategy="no")
    trainer.train()
    assert optimizer.stepped_in_eval == 0 and not optimizer.is_training
    sequences = [row["prompt_ids"] + ids for row in trainer.train_dataset for ids in row["completion_ids"]]

    def mean_score():
        return float(np.mean(RewardScorer(adapted, chat_tokenizer).score_ids(sequences)))

    assert trainer.normalization.mean == pytest.approx(mean_score(), abs=1e-6)
    optimizer.train()  # the weights at which gradients are taken give other scores
    assert abs(mean_score() - trainer.normalization.mean) > 1e-5


def test_a_schedule_free_run_resumes_exactly(make_trainer, seqcls, tmp_path):
    import copy

    def run(**kwargs):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
        model = get_peft_model(copy.deepcopy(seqcls), config)
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "normalize_rewards": False}
        own(make_trainer, model, ScheduleFreeSGD(trained(model), lr=0.5), **options).train(**kwargs)
        return [p.detach() for p in trained(model)]

    whole = run()
    resumed = run(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize(
    "metric, greater",
    [("nll", False), ("ece", False), ("eval_brier", False), ("hard_nll", False), ("loss", False), ("accuracy", True)],
)
def test_the_direction_of_a_metric_follows_its_meaning(tmp_path, metric, greater):
    args = BradleyTerryConfig(str(tmp_path), metric_for_best_model=metric, use_cpu=True, bf16=False)
    assert args.greater_is_better is greater


def test_the_best_of_several_sets_is_the_one_with_the_lowest_nll(make_trainer):
    sets = {"easy": comparisons(4), "hard": comparisons(4, seed=5)}
    options = {"load_best_model_at_end": True, "max_steps": 3, "eval_dataset": sets, **EVERY_STEP}
    trainer = make_trainer(comparisons(6), metric_for_best_model="hard_nll", normalize_rewards=False, **options)
    trainer.train()
    values = [log["eval_hard_nll"] for log in trainer.state.log_history if "eval_hard_nll" in log]
    assert trainer.state.best_metric == min(values) and len(values) == 3
    assert trainer.evaluate()["eval_hard_nll"] == pytest.approx(min(values), rel=1e-6)


@pytest.mark.parametrize(
    "metric, sets, message",
    [
        ("nlll", False, "evaluations have no 'nlll': set it to nll"),
        ("f1", False, "evaluations have no 'f1': choose one of"),
        ("nll", True, "add the name of one, as in easy_nll"),
        ("hard_nl", True, "evaluations have no 'hard_nl': set it to hard_nll"),
    ],
)
def test_a_misspelt_metric_is_refused_before_training(make_trainer, metric, sets, message):
    data = comparisons(4)
    eval_dataset = {"easy": data, "hard": data} if sets else data
    with pytest.raises(UserError, match=f"metric_for_best_model: .*{message}"):
        make_trainer(data, eval_dataset=eval_dataset, metric_for_best_model=metric, eval_strategy="steps", eval_steps=1)


def test_a_metric_of_the_user_may_be_the_best_one_and_its_absence_is_one_line(make_trainer):
    data = comparisons(4)
    options = {"eval_dataset": data, "max_steps": 1, "normalize_rewards": False, **EVERY_STEP}
    options |= {"compute_metrics": lambda prediction: {"f1": 0.5}}
    trainer = make_trainer(data, metric_for_best_model="f1", **options)
    trainer.train()
    assert trainer.state.best_metric == 0.5
    trainer.args.metric_for_best_model = "f2"
    with pytest.raises(UserError, match="metric_for_best_model: evaluation has no 'eval_f2'"):
        trainer.train()


def test_a_schedule_that_follows_a_metric_knows_its_direction(make_trainer, tmp_path):
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    data = comparisons(4)
    trainer = make_trainer(data, eval_dataset=data, metric_for_best_model="accuracy", **options)
    assert trainer.args.lr_scheduler_kwargs["mode"] == "max"
    args = BradleyTerryConfig(str(tmp_path), metric_for_best_model="nll", use_cpu=True, bf16=False, **options)
    assert args.lr_scheduler_kwargs["mode"] == "min"
    with pytest.raises(UserError, match="lr_scheduler_type='reduce_lr_on_plateau' needs evaluations"):
        make_trainer(data, lr_scheduler_type="reduce_lr_on_plateau")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_kwargs with lr_scheduler_type='cosine_with_min_lr'",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "lr_scheduler_kwargs with lr_scheduler_type='linear'"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"power": 2}}, "lr_scheduler_kwargs has no effect"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type: 'cosin' is not known: choose one of"),
        ({"max_grad_norm": None}, "max_grad_norm: must be a number"),
    ],
)
def test_a_schedule_that_cannot_work_is_one_line(tmp_path, options, message):
    with pytest.raises(UserError, match=message) as error:
        BradleyTerryConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    assert "\n" not in str(error.value)


def test_a_warmup_without_effect_is_said(make_trainer, caplog):
    make_trainer(comparisons(4), lr_scheduler_type="constant", warmup_steps=2)
    assert "warmup_steps has no effect" in caplog.text and "constant_with_warmup" in caplog.text


def test_early_stopping_without_a_metric_is_one_line(make_trainer):
    data = comparisons(4)
    with pytest.raises(UserError, match="EarlyStoppingCallback needs a metric: set metric_for_best_model"):
        make_trainer(data, eval_dataset=data, eval_strategy="steps", eval_steps=1, callbacks=[EarlyStoppingCallback()])


def test_a_run_shorter_than_logging_steps_has_a_log(make_trainer):
    trainer = make_trainer(comparisons(6), max_steps=3, logging_steps=10, normalize_rewards=False)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["step"] == 3 and {"accuracy", "margin", "mean_reward", "num_tokens"} <= set(log)


def test_predict_and_separate_batches_give_the_metrics_of_an_evaluation(make_trainer):
    data = comparisons(7)
    trainer = make_trainer(comparisons(4), eval_dataset=data, per_device_eval_batch_size=2)
    expected = trainer.evaluate()
    predicted = trainer.predict(data)
    assert predicted.predictions.shape[0] == 7 and predicted.label_ids.shape[-1] == 7
    trainer.args.eval_do_concat_batches = False  # the batches have different numbers of completions
    trainer.args.eval_accumulation_steps = 1
    separate = trainer.evaluate(metric_key_prefix="apart")
    for name in ("loss", "nll", "accuracy", "ece", "mean_reward", "pairs"):
        assert predicted.metrics[f"test_{name}"] == expected[f"eval_{name}"]
        assert separate[f"apart_{name}"] == expected[f"eval_{name}"]
