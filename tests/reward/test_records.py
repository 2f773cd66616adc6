"""The record of a saved reward model, and errors that must not lose a finished run: scale, precision, heads."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BertConfig, BertForSequenceClassification, LlamaForSequenceClassification

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.loading import load_base_model
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.scorer import RewardNormalization, RewardScorer
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer
from tests.reward.examples import WORDS, comparisons, independent_scores

PROMPTS, COMPLETIONS = ["Tell me:", "Tell a story:"], ["a sunny day", "happy"]


def test_precision_is_recorded_without_a_normalization_and_in_checkpoints(make_trainer, seqcls, tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    seqcls.save_pretrained(tmp_path / "base")
    base = load_base_model(str(tmp_path / "base"), task="reward", dtype="bfloat16", load_in_4bit=True)
    trainer = make_trainer(comparisons(4), model=base, bf16=True, max_steps=2, save_steps=1, normalize_rewards=False)
    trainer.train()
    trainer.save_model()
    scorer = RewardScorer(trainer.model, trainer.processing_class, autocast=torch.bfloat16)
    expected = scorer.raw(PROMPTS, COMPLETIONS)
    for folder in (Path(trainer.args.output_dir), Path(trainer.args.output_dir, "checkpoint-2")):
        found = RewardNormalization.load(folder)
        assert (found.mean, found.std, found.n, found.load_in_4bit, found.autocast) == (0, 1, 0, True, "bfloat16")
        trainer.processing_class.save_pretrained(folder)
        again = RewardScorer.from_pretrained(folder)
        assert again.raw(PROMPTS, COMPLETIONS) == again(PROMPTS, COMPLETIONS) == expected
    assert "without a normalization: rewards are the raw scores" in caplog.text


@pytest.mark.parametrize("fault", ["deviation", "memory"])
def test_a_normalization_that_fails_does_not_cost_the_run(make_trainer, monkeypatch, caplog, fault):
    trainer = make_trainer(comparisons(6), max_steps=1)

    def scores(self, sequences, *, at_least):
        if fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return [1.0] * len(sequences)

    monkeypatch.setattr(RewardScorer, "score_ids", scores)
    trainer.train()
    trainer.save_model()
    found = json.loads((Path(trainer.args.output_dir) / "reward_normalization.json").read_text())
    assert (found["mean"], found["std"], found["n"], found["base_dtype"]) == (0.0, 1.0, 0, "float32")
    n = sum(map(len, trainer.train_dataset["completion_ids"]))
    reasons = {"memory": "OutOfMemoryError: CUDA out of memory", "deviation": f"{n} scores have standard deviation 0.0"}
    assert re.search(f"normalize_rewards: .*raw scores: {reasons[fault]}", caplog.text)


def test_normalization_keeps_to_the_token_budget(make_trainer, seqcls):
    trainer = make_trainer(comparisons(8), max_steps=1, max_tokens_per_batch=64, per_device_eval_batch_size=16)
    seen = []
    trainer.train()
    hook = seqcls.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    measured = trainer._measure_normalization()
    hook.remove()
    assert max(rows * length for rows, length in seen) <= 64 and len(seen) > 2
    assert measured == trainer.normalization and measured.n == sum(map(len, trainer.train_dataset["completion_ids"]))


def test_demonstrations_for_the_normalization_are_counted_and_none_is_refused(make_trainer, caplog):
    rows = [
        {"prompt": f"Tell {w}:", "completion": f"the {w} day " * (20 if k == 3 else 1)} for k, w in enumerate(WORDS)
    ]
    given = {"normalization_dataset": Dataset.from_list(rows), "max_length": 30, "peft": None}
    report = make_trainer(comparisons(4), overflow="drop", **given).data_reports["normalization"]
    assert (report.rows_in, report.kept, report.dropped) == (8, 7, {"over max_length=30": [3]})
    assert "normalization: 7 of 8 rows kept; 1 dropped: over max_length=30 (row 3)" in caplog.text
    cut = make_trainer(comparisons(4), overflow="truncate_completion", **given)
    assert cut.data_reports["normalization"].flagged == {"truncate_completion": [3]}
    assert max(len(r["prompt_ids"]) + len(r["completion_ids"][0]) for r in cut._normalization_rows) == 30
    with pytest.raises(UserError, match=r"^normalization row 3: \d+ tokens"):
        make_trainer(comparisons(4), **given)
    with pytest.raises(UserError, match="^normalization_dataset .*leave it out, or pass normalize_rewards=False"):
        make_trainer(comparisons(4), normalization_dataset=Dataset.from_list(rows).select([]))


def test_a_model_by_its_name_takes_load_base_models_options_and_refuses_others(seqcls, chat_tokenizer, tmp_path):
    seqcls.save_pretrained(tmp_path / "base")

    def make(options=None, **given):
        args = BradleyTerryConfig(
            str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", model_init_kwargs=options
        )
        config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
        trainer = BradleyTerryTrainer(
            str(tmp_path / "base"), args, comparisons(2), processing_class=chat_tokenizer, peft_config=config, **given
        )
        return trainer, args, config

    with pytest.raises(UserError, match="^output_hidden_states: .*pass the loaded model"):
        make({"output_hidden_states": True})
    trainer, args, config = make({"dtype": "bfloat16", "revision": "v1"})
    assert trainer.model.get_base_model().dtype == torch.bfloat16
    assert args.model_init_kwargs == {"dtype": "bfloat16", "revision": "v1"}  # the caller's own: as they were
    assert trainer.args.model_init_kwargs is None and config.revision is None
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["revision"] == "v1"


def test_a_head_that_no_adapter_trains_is_refused(make_trainer):
    with pytest.raises(UserError, match="^model: the score head .*'score' among modules_to_save"):
        make_trainer(comparisons(2), peft=LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"]))
    trained = make_trainer(comparisons(2), peft=LoraConfig(target_modules=["q_proj"], modules_to_save=["score"]))
    assert any("score" in name for name, p in trained.model.named_parameters() if p.requires_grad)


def test_a_prompt_that_the_budget_cannot_bound_is_counted(make_trainer, caplog):
    data = comparisons(6, k=2).to_list() + comparisons(1, k=4, seed=3).to_list()
    data[-1]["completions"] = [text + " many words" * 30 for text in data[-1]["completions"]]
    make_trainer(Dataset.from_list(data), max_tokens_per_batch=120)
    assert "max_tokens_per_batch=120 is exceeded by 1 of 7 prompts" in caplog.text
    caplog.clear()
    make_trainer(Dataset.from_list(data[:-1]), max_tokens_per_batch=120)
    assert "is exceeded by" not in caplog.text


def test_losing_the_shared_prefix_is_a_warning_for_decoders_only(make_trainer, tiny_config, chat_tokenizer, caplog):
    tiny_config.num_labels, tiny_config._attn_implementation = 1, "flex_attention"  # no backward pass on a CPU
    assert make_trainer(comparisons(2), model=LlamaForSequenceClassification(tiny_config)).layout == "plain"
    said = [record for record in caplog.records if record.getMessage().startswith("layout: plain rows are used, since")]
    assert [record.levelname for record in said] == ["WARNING"]
    caplog.clear()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertForSequenceClassification(BertConfig(vocab_size=len(chat_tokenizer), num_labels=1, **sizes))
    with caplog.at_level("INFO"):
        make_trainer(comparisons(2), model=encoder, peft=None)
    said = [record for record in caplog.records if record.getMessage().startswith("layout: plain rows are used, since")]
    assert [record.levelname for record in said] == ["INFO"]


def test_another_base_than_in_training_is_said(make_trainer, seqcls, tmp_path, caplog):
    seqcls.save_pretrained(tmp_path / "base")
    trainer = make_trainer(comparisons(4), max_steps=1)
    trainer.train()
    trainer.save_model()
    for dtype, said in ((torch.float32, False), (torch.bfloat16, True)):
        caplog.clear()
        base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", dtype=dtype)
        RewardScorer.from_pretrained(trainer.args.output_dir, base=base, device="cpu")
        assert ("trained on float32 weights, here bfloat16: scores differ" in caplog.text) is said


def test_categories_stay_on_a_subset_and_come_along_from_another_trainer(make_trainer):
    data = comparisons(6).add_column("category", ["a", "b", None, "a", "b", "c"])
    data = data.map(lambda row, k: {"targets": [1.0] * len(row["pairs"])}, with_indices=True)
    other = make_trainer(data.select([5, 4]), peft=None)
    trainer = make_trainer(data, eval_dataset=data, peft=None, max_length=64, overflow="drop")
    whole = trainer.evaluate()
    found = {}
    for k in (0, 1):
        found |= trainer.evaluate(trainer.eval_dataset.select([k, 2]))
    assert {"eval_accuracy/category/a", "eval_accuracy/category/b"} <= set(found)
    foreign = trainer.evaluate(other.train_dataset)
    assert foreign["eval_accuracy/category/c"] == whole["eval_accuracy/category/c"]
    assert "eval_accuracy/category/a" not in foreign


def test_plackett_luce_evaluates_what_it_trains(make_trainer):
    data = comparisons(5, k=3).map(lambda row: {"targets": [1.0, 1.0, 1.0], "margins": [0.0] * 3, "weights": [1.0] * 3})
    losses = {}
    for kind in ("plackett_luce", "bradley_terry"):
        trainer = make_trainer(data, eval_dataset=data, peft=None, ranking_loss=kind, per_device_eval_batch_size=2)
        losses[kind] = trainer.evaluate()["eval_loss"]
        batch = trainer.data_collator(list(trainer.train_dataset))
        with torch.no_grad():
            trainer.model.eval()
            assert losses[kind] == pytest.approx(trainer.compute_loss(trainer.model, batch).item(), rel=1e-5)
    assert abs(np.diff(list(losses.values()))[0]) > 1e-3


def test_normalization_file_is_written_beside_the_adapter(make_trainer, chat_tokenizer):
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
