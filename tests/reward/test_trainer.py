"""The loss of `BradleyTerryTrainer` is the formula, independent of batches, layout, resuming and processes."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification

from hf_rlhf_ext.reward.scorer import score_batch
from tests.reward.examples import comparisons, trainable


@pytest.mark.parametrize("layout", ["plain", "shared_prefix"])
def test_losses_of_the_options_are_those_of_the_equations(make_trainer, layout):
    """One batch: each option compared with the formula on scores from the model."""
    ranked = {"prompt": "Tell day:", "completions": ["a sunny day", "day", "happy fox"]}
    ranked["pairs"] = [[0, 1], [0, 2], [1, 2]]
    rows = [ranked | {"targets": [1.0, 0.0, 0.0]}, {**ranked, "pairs": [[0, 1]], "targets": [0.5]}]  # 2 > 0 > 1; a tie
    data = Dataset.from_list([row | {"weights": [1.0] * len(row["pairs"])} for row in rows])

    def loss(**options):
        trainer = make_trainer(data, peft=None, layout=layout, **options)
        batch = trainer.data_collator(list(trainer.train_dataset))
        return trainer.compute_loss(trainer.model, batch), score_batch(trainer.model, batch)

    plain, (a, b, c, *tied) = loss()
    win = torch.nn.functional.logsigmoid
    expected = [-win(a - b), -win(c - a), -win(c - b), -(win(tied[0] - tied[1]) + win(tied[1] - tied[0])) / 2]
    torch.testing.assert_close(plain, sum(expected) / 4)
    ranking = -(c - torch.logsumexp(torch.stack([a, b, c]), 0) + win(a - b))  # c first, then a of a and b
    torch.testing.assert_close(loss(ranking_loss="plackett_luce")[0], (3 * ranking + expected[3]) / 4)
    half = (tied[0] - tied[1]) / 2
    tie = -torch.log(0.5 / (torch.exp(half) + torch.exp(-half) + 0.5))
    found, _ = loss(tie_model="davidson", tie_threshold=0.5, label_smoothing_factor=0.0)
    wins = [-torch.log(torch.exp(x / 2) / (torch.exp(x / 2) + torch.exp(-x / 2) + 0.5)) for x in (a - b, c - a, c - b)]
    torch.testing.assert_close(found, (sum(wins) + tie) / 4)
    smooth = [-(0.95 * win(x) + 0.05 * win(-x)) for x in (a - b, c - a, c - b)]
    torch.testing.assert_close(loss(label_smoothing_factor=0.1)[0], (sum(smooth) + expected[3]) / 4)
    data = data.add_column("margins", [[2.0, -0.5, -1.0], [0.0]])
    gaps = (a - b, 2.0), (c - a, 0.5), (c - b, 1.0)
    for scale in (1.0, 0.25, 0.0):
        further = [-win(gap - scale * margin) for gap, margin in gaps]
        torch.testing.assert_close(loss(margin_scale=scale)[0], (sum(further) + expected[3]) / 4)


def test_first_step_is_the_gradient_of_the_formula(make_trainer, seqcls, chat_tokenizer):
    data = comparisons(4)
    options = {"max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 0.0, "normalize_rewards": False}
    trainer = make_trainer(data, peft=None, lr_scheduler_type="constant", center_rewards_coefficient=0.3, **options)
    before = seqcls.score.weight.detach().clone()
    rows, total, loss = data.to_list(), 0.0, 0.0
    for row in rows:
        hidden = []
        for text in row["completions"]:
            ids = chat_tokenizer(row["prompt"])["input_ids"] + chat_tokenizer(text)["input_ids"]
            ids = torch.tensor([ids + [chat_tokenizer.eos_token_id]])
            hidden.append(seqcls.model(input_ids=ids).last_hidden_state[0, -1])
        scores = torch.cat([seqcls.score(h) for h in hidden])
        for (i, j), t, w, m in zip(row["pairs"], row["targets"], row["weights"], row["margins"], strict=True):
            p = torch.sigmoid(scores[i] - scores[j] - m)
            loss, total = loss - w * (t * p.log() + (1 - t) * (1 - p).log()), total + w
            loss = loss + 0.3 * w * (scores[i] + scores[j]) ** 2
    (expected,) = torch.autograd.grad(loss / total, [seqcls.score.weight])
    trainer.train()
    torch.testing.assert_close(before - seqcls.score.weight.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_is_the_same_however_batched(make_trainer, checkpointing, tiny_config):
    data, weights = comparisons(10), []
    for batch_size, accumulation in [(4, 1), (1, 4), (2, 2)]:
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(tiny_config)
        trainer = make_trainer(
            data,
            model=model,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            center_rewards_coefficient=0.01,
            activation_checkpointing=checkpointing,
            max_grad_norm=0.5,
            max_steps=4,  # 3 steps an epoch, the last one short
            logging_steps=1,
            normalize_rewards=False,
            optim="sgd",  # Adam's sign-like first steps would turn rounding into differences
        )
        trainer.train()
        weights.append((trainable(trainer.model), [log["loss"] for log in trainer.state.log_history if "loss" in log]))
    for other, losses in weights[1:]:
        np.testing.assert_allclose(losses, weights[0][1], rtol=1e-5)
        for name, value in weights[0][0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)


def test_layouts_and_budgets_learn_and_measure_the_same(make_trainer, tiny_config):
    def run(folder, **batches):
        torch.manual_seed(0)
        trainer = make_trainer(
            comparisons(12), model=LlamaForSequenceClassification(tiny_config), folder=folder, max_steps=3,
            gradient_accumulation_steps=2, per_device_train_batch_size=2, center_rewards_coefficient=0.1, **batches,
        )  # fmt: skip
        trainer.train()
        return trainable(trainer.model), trainer.evaluate(comparisons(7, seed=9)), trainer

    expected, measured, _ = run("plain", layout="plain")
    for k, batches in enumerate([{"layout": "plain", "max_tokens_per_batch": 70}, {}, {"max_tokens_per_batch": 40}]):
        found, metrics, trainer = run(f"other{k}", **batches)
        assert trainer.layout == batches.get("layout", "shared_prefix")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5)
        for name in ("eval_accuracy", "eval_nll", "eval_loss", "eval_mean_reward", "eval_longer_wins_baseline"):
            assert metrics[name] == pytest.approx(measured[name], abs=1e-5), name


@pytest.mark.parametrize("layout", ["plain", "shared_prefix"])
@pytest.mark.parametrize("budget", [None, 60])
def test_training_logs_true_means_over_steps(make_trainer, layout, budget):
    batches = {"layout": layout, "max_tokens_per_batch": budget}
    trainer = make_trainer(
        comparisons(8), max_steps=2, logging_steps=2, learning_rate=0.0, normalize_rewards=False, **batches
    )
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    trainer_metrics = trainer.evaluate(comparisons(8))
    for name in ("accuracy", "margin"):  # nothing moved, and both saw every pair once
        assert log[name] == pytest.approx(trainer_metrics[f"eval_{name}"], abs=1e-6)
    assert log["num_tokens"] == sum(
        len(row["prompt_ids"]) * (len(row["completion_ids"]) if layout == "plain" else 1)
        + sum(map(len, row["completion_ids"]))
        for row in trainer.train_dataset
    )


def test_resumed_training_gives_the_same_weights(make_trainer, tiny_config):
    data = comparisons(11)

    def run(resume=None, **options):
        torch.manual_seed(0)
        trainer = make_trainer(data, model=LlamaForSequenceClassification(tiny_config), save_steps=2, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    options = {"max_steps": 6, "lr_scheduler_type": "constant", "gradient_accumulation_steps": 2}
    whole = run(folder="whole", **options)
    resumed = run(resume=whole.args.output_dir + "/checkpoint-2", folder="resumed", **options)
    for name, value in trainable(whole.model).items():
        assert torch.equal(value, trainable(resumed.model)[name]), name
    assert whole.normalization == resumed.normalization


@pytest.mark.parametrize("change", [{"padding_side": "right"}, {"pad_token": None}], ids=["right", "no pad"])
def test_neither_the_pad_side_nor_a_missing_pad_token_changes_what_is_learned(
    make_trainer, tiny_config, chat_tokenizer, change
):
    found = []
    for changes in ({}, change):
        for name, value in changes.items():
            setattr(chat_tokenizer, name, value)
        torch.manual_seed(0)
        options = {"max_steps": 2, "layout": "plain", "folder": f"out{len(found)}"}
        trainer = make_trainer(comparisons(6), model=LlamaForSequenceClassification(tiny_config), **options)
        trainer.train()
        found.append((trainable(trainer.model), trainer.evaluate(comparisons(5, seed=1))["eval_nll"]))
    (weights, nll), (others, other) = found
    assert other == pytest.approx(nll, abs=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-5)


def test_no_card_of_trl_is_written(make_trainer, tmp_path):
    trainer = make_trainer(comparisons(4), max_steps=1, save_steps=1, peft=None)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "README.md").write_text("ours")
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out" / "README.md").read_text() == "ours"
