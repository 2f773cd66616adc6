"""The setup of `BradleyTerryTrainer` before training: options, layout, head, long rows, and errors."""

import copy
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BloomConfig, BloomForSequenceClassification, LlamaForSequenceClassification
from trl import TrlParser

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer
from tests.reward.examples import comparisons


def test_config_parses_with_trl_parser(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--overflow", "drop", "--normalize_rewards", "false", "--bf16", "false"]
    (args,) = TrlParser(BradleyTerryConfig).parse_args_and_config(argv)
    assert args.overflow == "drop" and args.normalize_rewards is False and args.max_length == 1024


def test_a_model_that_cannot_share_a_prefix_takes_plain_rows_and_says_why(make_trainer, chat_tokenizer, caplog):
    config = BloomConfig(vocab_size=len(chat_tokenizer), hidden_size=32, n_layer=1, n_head=2, num_labels=1)
    config.pad_token_id = chat_tokenizer.pad_token_id
    bloom = BloomForSequenceClassification(config)
    with caplog.at_level("INFO"):
        assert make_trainer(comparisons(4), model=bloom, peft=None).layout == "plain"
    assert "layout: plain rows" in caplog.text and "position ids" in caplog.text
    with pytest.raises(UserError, match="^layout: 'shared_prefix' .*position ids: pass layout='plain'"):
        make_trainer(comparisons(4), model=bloom, peft=None, layout="shared_prefix")
    prompts = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    assert make_trainer(comparisons(4), peft=prompts).layout == "plain"


def test_margins_that_look_like_ratings_are_said(make_trainer, caplog):
    rows = [{"prompt": "p", "chosen": f"good {k}", "rejected": "bad", "score_chosen": 9.0, "score_rejected": 1.0 + k}
            for k in range(3)]  # fmt: skip
    data = Dataset.from_list(rows)
    make_trainer(data, peft=None)
    assert re.search("margin_scale: .*up to 8 units of reward.* pass margin_scale=0.1, or 0", caplog.text)
    caplog.clear()
    make_trainer(data, peft=None, margin_scale=0.1)
    make_trainer(comparisons(4), peft=None)
    assert "margin_scale" not in caplog.text
    with pytest.raises(UserError, match="^margin_scale must not be negative, got -1"):
        make_trainer(data, peft=None, margin_scale=-1)


@pytest.mark.parametrize(
    "config, message",
    [
        (LoraConfig(), "^peft_config: task_type is None.*pass task_type='SEQ_CLS'"),
        (LoraConfig(task_type="CAUSAL_LM"), "^peft_config: task_type is CAUSAL_LM.*pass task_type='SEQ_CLS'"),
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
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32} and "lost by rounding" not in caplog.text
    BradleyTerryTrainer(seqcls, args, comparisons(4), processing_class=chat_tokenizer)
    assert re.search("weights are bfloat16: .*lost by rounding.*dtype='float32'.*peft_config", caplog.text)


def test_other_refusals(make_trainer, seqcls, tiny_llama, chat_tokenizer, tmp_path):
    frozen = get_peft_model(copy.deepcopy(seqcls), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="^model: the score head .*task_type='SEQ_CLS'.*is_trainable=True"):
        make_trainer(comparisons(2), model=frozen, peft=None)
    with pytest.raises(UserError, match="^model: .*load_base_model.*task='reward'"):
        make_trainer(comparisons(2), model=tiny_llama)
    config = copy.deepcopy(seqcls.config)
    config.num_labels = 2
    two_labels = LlamaForSequenceClassification(config)
    adapter = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    for model in (two_labels, get_peft_model(copy.deepcopy(two_labels), adapter)):
        with pytest.raises(UserError, match="2 outputs: .*num_labels=1"):
            make_trainer(comparisons(2), model=model, peft=None)
    with pytest.raises(UserError, match="^prediction_loss_only=True .*leave it false"):
        BradleyTerryConfig(output_dir=str(tmp_path), prediction_loss_only=True, bf16=False)
    with pytest.raises(UserError, match="^overflow: 'crop' .*error, drop"):
        BradleyTerryConfig(output_dir=str(tmp_path), overflow="crop", bf16=False)
    chat_tokenizer.chat_template = None
    messages = {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    messages["rejected"] = messages["chosen"][:1] + [{"role": "assistant", "content": "c"}]
    with pytest.raises(UserError, match="set `tokenizer.chat_template`"):
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
