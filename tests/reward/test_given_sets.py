"""Sets that `BradleyTerryTrainer` is given: in another format, by name, missing, or with margins of NaN."""

import logging

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForSequenceClassification

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer

NAN = float("nan")


def pairs(**columns):
    rows = [{"prompt": f"day {k}", "chosen": " happy" + "!" * k, "rejected": " sad"} for k in range(4)]
    return Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]} | columns)


@pytest.fixture
def make(tiny_config, chat_tokenizer, tmp_path):
    tiny_config.num_labels = 1

    def make(train_dataset, **arguments):
        args = BradleyTerryConfig(
            str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=1
        )
        return BradleyTerryTrainer(
            LlamaForSequenceClassification(tiny_config),
            args=args,
            train_dataset=train_dataset,
            processing_class=chat_tokenizer,
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"),
            **arguments,
        )

    return make


@pytest.mark.parametrize("name", ["pandas", "arrow", "numpy", "torch"])
def test_a_format_changes_no_row(make, name):
    data = pairs(margin=[0.5, 1.0, 0.0, 2.0])
    columns = ["prompt_ids", "completion_ids", "margins"]
    expected = make(data).train_dataset.select_columns(columns).to_dict()
    trainer = make(data.with_format(name), eval_dataset={"kept": data.with_format(name)})
    assert trainer.train_dataset.select_columns(columns).to_dict() == expected
    assert trainer.eval_dataset["kept"].select_columns(columns).to_dict() == expected


def test_a_margin_that_is_nan_is_reported_with_its_row(make, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make(pairs(margin=[0.5, NAN, 1.0, NAN]))
    assert "train: margin is NaN in 2 of 4 rows (row 1, 3)" in caplog.text
    assert trainer.train_dataset["margins"][:] == [[0.5], [0.0], [1.0], [0.0]]


def test_evaluations_without_a_set_are_refused(make):
    trainer = make(pairs())
    with pytest.raises(UserError, match="evaluation needs eval_dataset"):
        trainer.evaluate()
    with pytest.raises(UserError, match="no set is named 'a'"):
        trainer.evaluate("a")
    with pytest.raises(UserError, match="test_dataset is None"):
        trainer.predict(None)
    named = make(pairs(), eval_dataset={"kept": pairs()})
    assert "eval_accuracy" in named.evaluate("kept")
    with pytest.raises(UserError, match="no set is named 'other'.*'kept'"):
        named.evaluate("other")
