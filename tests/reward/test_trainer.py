"""BradleyTerryTrainer: real PEFT, real TRL, tiny models on the CPU."""

import copy
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import BloomConfig, BloomForSequenceClassification, LlamaForSequenceClassification
from trl import TrlParser

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.metrics.preference import brier_score, calibration_error
from hf_rlhf_ext.modeling.heads import ScalarHead
from hf_rlhf_ext.modeling.loading import load_base_model
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.scorer import RewardScorer, score_batch, score_sequences
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer
from tests.reward.examples import WORDS, comparisons


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def independent_scores(model, tokenizer, row):
    """Each completion alone, without padding: the head on the last position of the backbone."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    scores = []
    for text in row["completions"]:
        ids = tokenizer(row["prompt"])["input_ids"] + tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            hidden = base.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            scores.append(base.score(hidden).item())
    return scores


def independent_metrics(model, tokenizer, rows):
    """Loss, accuracy and the rest, one pair at a time with the math module."""
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


def test_scores_are_read_by_length_when_pad_is_eos(seqcls, chat_tokenizer, make_trainer):
    chat_tokenizer.pad_token = chat_tokenizer.eos_token
    row = comparisons(1, k=4).to_list()[0]
    trainer = make_trainer(Dataset.from_list([row]), peft=None, layout="plain")
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        scores = score_sequences(trainer.model, batch["input_ids"], batch["attention_mask"])
        pooled = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    expected = torch.tensor(independent_scores(trainer.model, chat_tokenizer, row))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    assert (pooled - expected).abs().max() > 1e-3  # Transformers' own pooling reads another token


def test_4bit_base_keeps_fp32_adapters_and_reloads_to_the_bit(make_trainer, seqcls, tmp_path):
    pytest.importorskip("bitsandbytes")
    seqcls.save_pretrained(tmp_path / "base")

    def base():
        return load_base_model(str(tmp_path / "base"), task="reward", dtype="bfloat16", load_in_4bit=True)

    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    adapted = get_peft_model(base(), config)
    before = trainable(adapted)
    trainer = make_trainer(comparisons(4), model=adapted, peft=None, bf16=True, max_steps=2)
    for name, value in trainable(trainer.model).items():  # TRL has cast them to bf16 and lost bits on the way
        assert value.dtype == torch.float32 and torch.equal(value, before[name])
    assert {p.dtype for p in trainable(make_trainer(comparisons(4), model=base()).model).values()} == {torch.float32}
    trainer.train()
    trainer.save_model()
    prompts, completions = ["Tell me:", "Tell a story:"], ["a sunny day", "happy"]
    scorer = RewardScorer(trainer.model, trainer.processing_class, autocast=torch.bfloat16)
    assert RewardScorer.from_pretrained(trainer.args.output_dir).raw(prompts, completions) == scorer.raw(
        prompts, completions
    )


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
            gradient_checkpointing=checkpointing,
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


def test_a_model_that_cannot_share_a_prefix_takes_plain_rows_and_says_why(make_trainer, chat_tokenizer, caplog):
    config = BloomConfig(vocab_size=len(chat_tokenizer), hidden_size=32, n_layer=1, n_head=2, num_labels=1)
    config.pad_token_id = chat_tokenizer.pad_token_id
    bloom = BloomForSequenceClassification(config)
    with caplog.at_level("INFO"):
        assert make_trainer(comparisons(4), model=bloom, peft=None).layout == "plain"
    assert "layout: plain rows, since its backbone takes no position ids." in caplog.text
    with pytest.raises(UserError, match="'shared_prefix' does not work with this model, its backbone takes no"):
        make_trainer(comparisons(4), model=bloom, peft=None, layout="shared_prefix")
    prompts = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    assert make_trainer(comparisons(4), peft=prompts).layout == "plain"


@pytest.mark.parametrize("layout", ["plain", "shared_prefix"])
def test_losses_of_the_options_are_those_of_the_equations(make_trainer, layout):
    """One batch, each option against the formula on scores read from the model."""
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


def test_margins_that_look_like_ratings_are_said(make_trainer, caplog):
    rows = [{"prompt": "p", "chosen": f"good {k}", "rejected": "bad", "score_chosen": 9.0, "score_rejected": 1.0 + k}
            for k in range(3)]  # fmt: skip
    data = Dataset.from_list(rows)
    make_trainer(data, peft=None)
    assert "margin_scale: the loss asks for gaps of up to 8 units of reward" in caplog.text
    assert "pass margin_scale=0.1, or 0 for plain Bradley-Terry" in caplog.text
    caplog.clear()
    make_trainer(data, peft=None, margin_scale=0.1)
    make_trainer(comparisons(4), peft=None)
    assert "margin_scale" not in caplog.text
    with pytest.raises(UserError, match="margin_scale: must be 0 or positive, got -1"):
        make_trainer(data, peft=None, margin_scale=-1)


TWO_PROCESSES = """
import json, sys, torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForSequenceClassification, AutoTokenizer
from datasets import load_from_disk
from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer

class Counting(BradleyTerryTrainer):
    seen = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append(len(inputs["micro_batches"]))
        return super().training_step(model, inputs, num_items_in_batch)


folder, batch = sys.argv[1], int(sys.argv[2])
args = BradleyTerryConfig(
    folder + f"/out{batch}", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", max_steps=3,
    per_device_train_batch_size=batch, max_tokens_per_batch=60, learning_rate=1e-2, disable_tqdm=True, seed=3,
    data_seed=5, gradient_accumulation_steps=2, per_device_eval_batch_size=2,
)
trainer = Counting(
    LlamaForSequenceClassification.from_pretrained(folder + "/base", dtype=torch.float32), args,
    load_from_disk(folder + "/rows"), load_from_disk(folder + "/heldout"),
    processing_class=AutoTokenizer.from_pretrained(folder + "/base"),
    peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"),
)
trainer.train()
metrics = {name: value for name, value in trainer.evaluate().items() if "time" not in name and "per_second" not in name}
found = {"metrics": metrics, "normalization": vars(trainer.normalization), "micro_batches": trainer.seen}
json.dump(found, open(f"{folder}/found{batch}-{args.process_index}.json", "w"))
weights = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
torch.save(weights, f"{folder}/weights{batch}-{args.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_with_different_numbers_of_micro_batches_equal_one(seqcls, chat_tokenizer, tmp_path):
    seqcls.save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    comparisons(12).save_to_disk(tmp_path / "rows")
    comparisons(7, seed=1).save_to_disk(tmp_path / "heldout")  # odd, and of ragged K
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for processes, batch in ((1, 4), (2, 2)):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable] if processes == 1 else launch
        done = subprocess.run(
            [*command, str(tmp_path / "train.py"), str(tmp_path), str(batch)],
            env=env, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    one, first, second = (torch.load(tmp_path / f"weights{name}.pt") for name in ("4-0", "2-0", "2-1"))
    for name, value in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0, atol=5e-5)
    alone, rank0, rank1 = (json.loads((tmp_path / f"found{n}.json").read_text()) for n in ("4-0", "2-0", "2-1"))
    assert rank0["micro_batches"] != rank1["micro_batches"] and len(rank0["micro_batches"]) == 5  # 2, 1 and 2 batches
    for name in ("metrics", "normalization"):
        assert rank0[name] == rank1[name]
        figures = {key: value for key, value in alone[name].items() if isinstance(value, float | int)}
        assert {key: rank0[name][key] for key in figures} == pytest.approx(figures, abs=1e-4)
    assert alone["metrics"]["eval_pairs"] > 7 and alone["normalization"]["n"] > 12


def test_head_and_adapters_are_fp32_on_a_bf16_base_and_computed_in_bf16(make_trainer, seqcls):
    trainer = make_trainer(comparisons(4), model=seqcls.bfloat16(), bf16=True, max_steps=2, learning_rate=1e-5)
    assert {p.dtype for p in trainable(trainer.model).values()} == {torch.float32}
    assert isinstance(trainer.model.get_base_model().score.modules_to_save["default"], ScalarHead)
    lora = trainer.model.get_base_model().model.layers[0].self_attn.q_proj
    seen = []
    lora.lora_A["default"].register_forward_hook(lambda _, args, output: seen.append((args[0].dtype, output.dtype)))
    before = trainable(trainer.model)
    trainer.train()
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}  # no fp32 activations
    moved = {name: (p - before[name]).abs().max() for name, p in trainable(trainer.model).items()}
    assert all(change > 0 for name, change in moved.items() if "lora_B" in name or "score" in name)
    assert lora.cast_input_dtype_enabled  # as it was


def test_bf16_gradients_are_close_to_fp32_ones_with_checkpointing(make_trainer, tiny_config):
    gradients = {}
    for bf16 in (False, True):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(tiny_config)
        trainer = make_trainer(comparisons(4), model=model, bf16=bf16, gradient_checkpointing=True)
        torch.manual_seed(1)
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(0, 0.05)
        trainer.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.create_optimizer()
        trainer.training_step(trainer.model, batch)
        grads = [p.grad for p in trainer.model.parameters() if p.requires_grad]
        assert {g.dtype for g in grads} == {torch.float32}
        gradients[bf16] = torch.cat([g.flatten() for g in grads])
    cosine = torch.nn.functional.cosine_similarity(gradients[False], gradients[True], dim=0)
    assert cosine > 0.99


def test_peft_model_and_prompt_tuning_work(make_trainer, seqcls):
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"])
    trainer = make_trainer(comparisons(4), model=get_peft_model(seqcls.bfloat16(), config), peft=None, max_steps=1)
    assert isinstance(trainer.model.get_base_model().score.modules_to_save["default"], ScalarHead)
    assert {p.dtype for p in trainable(trainer.model).values()} == {torch.float32}
    trainer.train()


def test_prompt_tuning_reads_the_right_position(make_trainer, chat_tokenizer):
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    trainer = make_trainer(comparisons(4), peft=config)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        scores = score_sequences(trainer.model, batch["input_ids"], batch["attention_mask"])
        for row, score in enumerate(scores):
            ids = batch["input_ids"][row, : batch["attention_mask"][row].sum()][None]
            alone = trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]
            torch.testing.assert_close(score, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config, message",
    [
        (LoraConfig(), "peft_config: task_type is None, so PEFT would silently freeze the score head"),
        (LoraConfig(task_type="CAUSAL_LM"), "peft_config: task_type is CAUSAL_LM, so PEFT would silently freeze"),
    ],
)
def test_a_peft_config_that_freezes_the_head_is_refused(make_trainer, config, message):
    with pytest.raises(UserError, match=message):
        make_trainer(comparisons(2), peft=config)


def test_a_model_that_is_trained_whole_has_fp32_weights_or_a_warning(seqcls, chat_tokenizer, tmp_path, caplog):
    seqcls.bfloat16().save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    args = BradleyTerryConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none")
    trainer = BradleyTerryTrainer(str(tmp_path / "base"), args, comparisons(4))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32} and "rounded away" not in caplog.text
    BradleyTerryTrainer(seqcls, args, comparisons(4), processing_class=chat_tokenizer)
    assert "model is trained whole and its weights are bfloat16: updates far smaller" in caplog.text


@pytest.mark.parametrize("change", [{"padding_side": "right"}, {"pad_token": None}], ids=["right", "no pad"])
def test_neither_the_pad_side_nor_a_missing_pad_token_changes_what_is_learnt(
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


def test_other_refusals(make_trainer, seqcls, tiny_llama, chat_tokenizer, tmp_path):
    frozen = get_peft_model(seqcls, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="the score head of this PeftModel is frozen"):
        make_trainer(comparisons(2), model=frozen, peft=None)
    with pytest.raises(UserError, match="LlamaForCausalLM has no `score` head"):
        make_trainer(comparisons(2), model=tiny_llama)
    config = copy.deepcopy(seqcls.config)
    config.num_labels = 2
    two_labels = LlamaForSequenceClassification(config)
    for model in (two_labels, get_peft_model(two_labels, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))):
        with pytest.raises(UserError, match="its score head has 2 outputs: load it with num_labels=1"):
            make_trainer(comparisons(2), model=model, peft=None)
    with pytest.raises(UserError, match="prediction_loss_only: the loss over the set is computed from its scores"):
        BradleyTerryConfig(output_dir=str(tmp_path), prediction_loss_only=True, bf16=False)
    with pytest.raises(UserError, match="overflow: 'crop' does not exist; choose one of error, drop"):
        BradleyTerryConfig(output_dir=str(tmp_path), overflow="crop", bf16=False)
    chat_tokenizer.chat_template = None
    messages = {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    messages["rejected"] = messages["chosen"][:1] + [{"role": "assistant", "content": "c"}]
    with pytest.raises(UserError, match="has no chat template: set `tokenizer.chat_template`"):
        make_trainer(Dataset.from_list([messages]), peft=None)


def test_overflow_is_never_silent(make_trainer, caplog):
    rows = [{"prompt": "p", "chosen": "day " * n, "rejected": "no"} for n in (2, 40, 3)]
    data = Dataset.from_list(rows)
    with pytest.raises(UserError, match=r"^train row 1: \d+ tokens, \d+ over max_length=20\. Raise max_length"):
        make_trainer(data, peft=None, max_length=20)
    with pytest.raises(UserError, match="^eval row 1: "):
        make_trainer(data.select([0]), eval_dataset=data, peft=None, max_length=20)
    trainer = make_trainer(data, peft=None, max_length=20, overflow="drop")
    assert len(trainer.train_dataset) == 2
    assert trainer.data_reports["train"].dropped == {"over max_length=20": [1]}
    assert "train: 2 of 3 rows kept; 1 dropped: over max_length=20 (row 1)" in caplog.text
    trainer = make_trainer(data, peft=None, max_length=20, overflow="truncate_completion")
    assert max(len(r["prompt_ids"]) + len(ids) for r in trainer.train_dataset for ids in r["completion_ids"]) == 20
    assert trainer.data_reports["train"].flagged == {"truncate_completion": [1]}
    trainer = make_trainer(data.select([0]), eval_dataset=data, peft=None, max_length=20, overflow="drop")
    assert trainer.data_reports["eval"].dropped == {"over max_length=20": [1]} and len(trainer.eval_dataset) == 2
    assert "eval: 2 of 3 rows kept; 1 dropped: over max_length=20 (row 1)" in caplog.text
    asked = Dataset.from_list([{"prompt": "day " * 40, "chosen": "good", "rejected": "bad"}])
    trainer = make_trainer(
        data.select([0]), eval_dataset=asked, peft=None, max_length=20, overflow="truncate_prompt_left"
    )
    (row,) = trainer.eval_dataset
    assert len(row["prompt_ids"]) + max(map(len, row["completion_ids"])) == 20
    assert trainer.data_reports["eval"].flagged == {"truncate_prompt_left": [0]}
    assert make_trainer(data, peft=None, max_length=None).data_reports["train"].kept == 3


def test_config_parses_with_trl_parser(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--overflow", "drop", "--normalize_rewards", "false", "--bf16", "false"]
    (args,) = TrlParser(BradleyTerryConfig).parse_args_and_config(argv)
    assert args.overflow == "drop" and args.normalize_rewards is False and args.max_length == 1024


def test_normalisation_file_is_written_beside_the_adapter(make_trainer, chat_tokenizer):
    demonstrations = Dataset.from_list([{"prompt": f"Tell {w}:", "completion": f"the {w} day"} for w in WORDS])
    trainer = make_trainer(comparisons(6), normalization_dataset=demonstrations, max_steps=2)
    trainer.train()
    trainer.save_model()
    found = json.loads(open(trainer.args.output_dir + "/reward_normalization.json").read())
    rows = [{"prompt": row["prompt"], "completions": [row["completion"]]} for row in demonstrations]
    scores = [independent_scores(trainer.model, chat_tokenizer, row)[0] for row in rows]
    assert found["mean"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert found["std"] == pytest.approx(np.std(scores), rel=1e-4)
    assert found | {"mean": 0, "std": 0} == {
        "mean": 0, "std": 0, "n": 8, "base_dtype": "float32", "autocast": None, "load_in_4bit": False,
        "layout": "shared_prefix", "base_model": None,
    }  # fmt: skip


def test_no_card_of_trl_is_written(make_trainer, tmp_path):
    trainer = make_trainer(comparisons(4), max_steps=1, save_steps=1, peft=None)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "README.md").write_text("ours")
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out" / "README.md").read_text() == "ours"


def story_comparisons(tokenizer, n, *, k, seed):
    """Completions of random story words; more mentions of "happy" always wins."""
    rng = np.random.default_rng(seed)
    words = ["dog", "cat", "park", "ball", "sad", "big", "red", "tree", "play", "run"]
    rows = []
    for _ in range(n):
        counts = rng.permutation(4)[:k]
        texts = []
        for count in counts:
            chosen = list(rng.choice(words, rng.integers(4, 9) - count)) + ["happy"] * int(count)
            texts.append(" " + " ".join(rng.permutation(chosen)))
        pairs = [[i, j] for i in range(k) for j in range(i + 1, k)]
        targets = [float(counts[i] > counts[j]) for i, j in pairs]
        rows.append({"prompt": "Once upon a time", "completions": texts, "pairs": pairs, "targets": targets})
    return Dataset.from_list(rows)


@pytest.mark.slow
@pytest.mark.parametrize("k, n, epochs", [(2, 384, 4), (4, 96, 3)])
def test_learns_a_rule_on_a_real_tiny_model(stories_path, tmp_path, k, n, epochs):
    args = BradleyTerryConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        per_device_train_batch_size=16 if k == 2 else 8, num_train_epochs=epochs, learning_rate=5e-3, disable_tqdm=True,
        save_strategy="no", model_init_kwargs={"dtype": "float32"}, seed=0,
    )  # fmt: skip
    trainer = BradleyTerryTrainer(
        str(stories_path), args, story_comparisons(None, n, k=k, seed=0), story_comparisons(None, 100, k=2, seed=1),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"),
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_accuracy"] < 0.75 and after["eval_accuracy"] > 0.9
    assert after["eval_nll"] < 0.4 and after["eval_longer_wins_baseline"] < 0.75
    trainer.save_model()
    scorer = RewardScorer.from_pretrained(tmp_path)
    rewards = scorer(["Once upon a time"] * 2, [" happy happy dog ran", " sad dog ran"])
    assert rewards[0] > rewards[1] + 0.5


SCORE_IN_NEW_PROCESS = """
import json, sys
from hf_rlhf_ext.reward.scorer import RewardScorer
folder, prompts, completions = json.load(sys.stdin)
print(json.dumps(RewardScorer.from_pretrained(folder).raw(prompts, completions)))
"""


@pytest.mark.slow
def test_qlora_on_a_cpu_learns_a_rule_and_reloads_in_a_new_process(stories_path, tmp_path):
    args = BradleyTerryConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=True, gradient_checkpointing=False, report_to="none",
        per_device_train_batch_size=16, num_train_epochs=3, learning_rate=1e-2, disable_tqdm=True, seed=0,
        save_strategy="no", model_init_kwargs={"load_in_4bit": True},
    )  # fmt: skip
    trainer = BradleyTerryTrainer(
        str(stories_path), args, story_comparisons(None, 128, k=4, seed=0), story_comparisons(None, 100, k=2, seed=1),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"),
    )  # fmt: skip
    assert trainer.layout == "shared_prefix" and trainer.model.get_base_model().is_loaded_in_4bit
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.9
    trainer.save_model()
    prompts, completions = ["Once upon a time"] * 3, [" happy happy dog ran", " sad dog ran", ""]
    here = RewardScorer(trainer.model, trainer.processing_class, autocast=torch.bfloat16).raw(prompts, completions)
    given = json.dumps([str(tmp_path), prompts, completions])
    command = [sys.executable, "-c", SCORE_IN_NEW_PROCESS]
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == here
