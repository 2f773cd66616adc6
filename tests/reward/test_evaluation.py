"""Evaluation of `BradleyTerryTrainer`: exact over the whole set, independent of the batches."""

import math

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from hf_rlhf_ext.reward.preference_metrics import brier_score, calibration_error
from hf_rlhf_ext.reward.scorer import RewardScorer
from tests.reward.examples import comparisons, independent_scores, trainable


def independent_metrics(model, tokenizer, rows):
    """Loss, accuracy and the other metrics, computed for one pair at a time with the math module."""
    right, decided, nll, total, loss, longer = 0, 0, 0.0, 0.0, 0.0, 0.0
    for row in rows:
        scores = independent_scores(model, tokenizer, row)
        for (i, j), t, w, m in zip(row["pairs"], row["targets"], row["weights"], row["margins"], strict=True):
            delta = scores[i] - scores[j]

            def cross_entropy(x, t=t):
                return t * math.log1p(math.exp(-x)) + (1 - t) * math.log1p(math.exp(x))

            nll, loss, total = nll + w * cross_entropy(delta), loss + w * cross_entropy(delta - m), total + w
            if t != 0.5:
                lengths = [len(tokenizer(row["completions"][k])["input_ids"]) for k in (i, j)]
                longer += 0.5 if lengths[0] == lengths[1] else float((lengths[0] > lengths[1]) == (t > 0.5))
                decided, right = decided + 1, right + ((delta > 0) == (t > 0.5))
    return {"loss": loss / total, "nll": nll / total, "accuracy": right / decided, "longer": longer / decided}


@pytest.mark.parametrize("eval_batch_size", [1, 3, 16])
def test_evaluation_equals_an_independent_count_however_batched(make_trainer, seqcls, chat_tokenizer, eval_batch_size):
    # Ragged K and a last batch of another size: a mean of batch means is wrong here.
    data = comparisons(10)
    trainer = make_trainer(data, eval_dataset=data, per_device_eval_batch_size=eval_batch_size)
    metrics = trainer.evaluate()
    expected = independent_metrics(trainer.model, chat_tokenizer, data.to_list())
    assert metrics["eval_loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert metrics["eval_nll"] == pytest.approx(expected["nll"], rel=1e-6)
    assert metrics["eval_accuracy"] == pytest.approx(expected["accuracy"], abs=1e-12)
    assert metrics["eval_longer_wins_baseline"] == pytest.approx(expected["longer"], abs=1e-12)
    assert metrics["eval_pairs"] == sum(len(row["pairs"]) for row in data)
    assert 0 <= metrics["eval_accuracy_ties"] <= 1
    judged = trainer.judged
    assert metrics["eval_brier"] == brier_score(judged.deltas, judged.targets)
    assert metrics["eval_ece"] == calibration_error(judged.deltas, judged.targets)
    assert metrics["eval_gain"] == pytest.approx(expected["accuracy"] - expected["longer"], abs=1e-12)
    assert metrics["eval_gain_low"] <= metrics["eval_gain"] <= metrics["eval_gain_high"]
    assert metrics["eval_accuracy_low"] <= metrics["eval_accuracy"] <= metrics["eval_accuracy_high"]
    for title in ("length_gap", "margin"):
        groups = judged.groups()[title]
        shown = {name: value for name, value in metrics.items() if name.startswith(f"eval_accuracy/{title}/")}
        assert shown == {f"eval_accuracy/{title}/{name}": group["accuracy"] for name, group in groups.items()}
        total = sum(group["n"] * group["accuracy"] for group in groups.values())
        assert total / sum(group["n"] for group in groups.values()) == pytest.approx(expected["accuracy"])


def test_evaluation_by_category_counts_what_each_has(make_trainer, seqcls, chat_tokenizer):
    names = ["chat", "open qa", None]
    data = comparisons(9)
    data = data.add_column("category", [names[k % 3] for k in range(9)])
    other = comparisons(4, seed=5)
    other = other.add_column("category", ["rewrite", "chat"] * 2)  # a code that training rows do not have
    trainer = make_trainer(other, eval_dataset=data, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    for name in ("chat", "open qa"):
        rows = [row for row in data.to_list() if row["category"] == name]
        expected = independent_metrics(trainer.model, chat_tokenizer, rows)["accuracy"]
        assert metrics[f"eval_accuracy/category/{name}"] == pytest.approx(expected)
    assert "eval_accuracy/category/rewrite" not in metrics and "eval_accuracy/category/" not in metrics
    assert len(trainer.judged.targets) == metrics["eval_pairs"]
    assert {title for title in trainer.judged.groups()} == {"category", "length_gap", "margin"}


def test_categories_of_another_trainers_data_are_not_taken_for_ours(make_trainer):
    theirs = make_trainer(comparisons(4).add_column("category", ["a", "b", "c", "d"]), folder="theirs")
    mine = make_trainer(comparisons(4).add_column("category", ["x", "y", "x", "y"]), folder="mine")
    metrics = mine.evaluate(theirs.train_dataset)
    assert {name[-1] for name in metrics if "/category/" in name} <= set("abcd")
    assert "eval_accuracy/category/x" in mine.evaluate(mine.train_dataset)


def test_logged_eval_accuracy_is_the_true_one(make_trainer):
    trainer = make_trainer(comparisons(6), eval_dataset=comparisons(9, seed=1), per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_accuracy"] == metrics["eval_accuracy"]


def test_best_model_is_chosen_by_the_true_accuracy(make_trainer):
    trainer = make_trainer(
        comparisons(8), eval_dataset=comparisons(9, seed=1), max_steps=6, eval_strategy="steps", eval_steps=2,
        save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_accuracy", per_device_eval_batch_size=2,
    )  # fmt: skip
    trainer.train()
    seen = [log["eval_accuracy"] for log in trainer.state.log_history if "eval_accuracy" in log]
    assert trainer.state.best_metric == max(seen)
    assert trainer.evaluate()["eval_accuracy"] == max(seen)
    best = load_file(trainer.state.best_model_checkpoint + "/adapter_model.safetensors")
    assert any("lora_B" in name for name in best) and any("score" in name for name in best)
    found = get_peft_model_state_dict(trainer.model)
    assert found.keys() == best.keys() and all(torch.equal(found[name], best[name]) for name in best)
    last = load_file(trainer.args.output_dir + "/checkpoint-6/adapter_model.safetensors")
    assert seen[-1] < max(seen) and any(not torch.equal(last[name], best[name]) for name in best)
    scorer = RewardScorer(trainer.model, trainer.processing_class)
    rows = trainer._normalization_rows
    scores = scorer.score_ids([row["prompt_ids"] + ids for row in rows for ids in row["completion_ids"]])
    assert trainer.normalization.mean == pytest.approx(np.mean(scores), abs=1e-5)  # of the best weights, not the last
    assert all(p.dtype == torch.float32 for p in trainable(trainer.model).values())
