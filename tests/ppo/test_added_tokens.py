"""Tokens that a chat template brings: from SFT to PPO and a reward model, and tokens for which a model has no row."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from trl import SFTConfig

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, RewardScorer
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.sft import PublishingSFTTrainer
from hf_rlhf_ext.modeling.adapters import bare_model
from hf_rlhf_ext.modeling.embeddings import n_rows
from hf_rlhf_ext.modeling.loading import load_base_model, load_policy, load_tokenizer
from hf_rlhf_ext.reward.ensemble import RewardEnsemble

TINY = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
PAIRS = [{"prompt": "Tell me", "chosen": "<think> many words </think>", "rejected": " sad" * k} for k in range(1, 9)]


def lora(task_type="CAUSAL_LM", **more):
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task_type, **more)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, chat_tokenizer_factory):
    """Bases without the new tokens, by whether they are tied, and a tokenizer that has them."""
    folder = tmp_path_factory.mktemp("added")
    tokenizer = chat_tokenizer_factory()
    paths = {"template": str(folder / "template")}
    for tied in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
            tie_word_embeddings=tied,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / str(tied))
        tokenizer.save_pretrained(folder / str(tied))
        paths[tied] = str(folder / str(tied))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(paths["template"])
    return paths


@torch.no_grad()
def logprobs(model, tokenizer):
    model.eval()
    ids = torch.tensor([tokenizer("<think>a sunny day</think>")["input_ids"]])
    return torch.log_softmax(model(input_ids=ids).logits.float(), -1)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_from_sft_with_new_tokens_to_ppo_and_back(make_trainer, folders, tied, tmp_path):
    rows = [{"prompt": "Tell me", "completion": "<think> a sunny day </think>"}] * 4
    args = SFTConfig(
        str(tmp_path / "sft"), chat_template_path=folders["template"], learning_rate=1e-2, max_steps=2, **TINY
    )
    sft = PublishingSFTTrainer(
        load_base_model(folders[tied], dtype="float32"),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(folders[tied]),
        peft_config=lora(),
    )
    sft.train()
    sft.save_model()
    new = load_tokenizer(str(tmp_path / "sft"))
    trained = logprobs(sft.model, new)
    assert torch.equal(logprobs(load_policy(tmp_path / "sft", dtype="float32")[0], new), trained)

    prompts = Dataset.from_dict({"prompt": ["<think>a sunny day</think>"] * 4})
    options = {"train_dataset": prompts, "processing_class": None, "peft_config": None, "max_steps": 1}
    trainer = make_trainer(model=load_policy(tmp_path / "sft", dtype="float32", is_trainable=True)[0],
                           **options | {"processing_class": new}, num_mini_batches=1, num_ppo_epochs=1)  # fmt: skip
    torch.testing.assert_close(logprobs(trainer.policy, new), trained, rtol=0, atol=1e-6)
    trainer.train()
    assert trainer.state.log_history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    trainer.save_model(str(tmp_path / "ppo"))
    wanted = logprobs(trainer.policy, new)
    assert not torch.equal(wanted, trained)
    assert torch.equal(logprobs(load_policy(tmp_path / "ppo", dtype="float32")[0], new), wanted)


def reward_run(folders, out, base, *, template=True, **options):
    args = BradleyTerryConfig(
        str(out), chat_template_path=folders["template"] if template else None, max_steps=2, learning_rate=1e-2,
        per_device_train_batch_size=4, **TINY | options,
    )  # fmt: skip
    tokenizer = load_tokenizer(base)
    model = load_base_model(base, task="reward", dtype="float32")
    rows = Dataset.from_list(PAIRS)
    return BradleyTerryTrainer(model, args, rows, processing_class=tokenizer, peft_config=lora("SEQ_CLS"))


def test_a_reward_model_with_new_tokens_is_loaded_again_and_never_changes_a_shared_base(
    make_trainer, folders, tmp_path, caplog
):
    base = folders[False]
    out = tmp_path / "reward"
    trainer = reward_run(folders, out, base, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    texts = (["Tell me", "fox"], ["<think> happy </think>", " words"])
    live = RewardScorer(trainer.model, trainer.processing_class).raw(*texts)
    scorer = RewardScorer.from_pretrained(out)
    assert scorer.raw(*texts) == pytest.approx(live, abs=1e-6)
    assert n_rows(scorer.model) == len(trainer.processing_class)
    # The trainer resumes from its checkpoint.
    again = reward_run(folders, out, base, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=str(out / "checkpoint-1"))
    assert RewardScorer(again.model, again.processing_class).raw(*texts) == pytest.approx(live, abs=1e-5)

    # PPO on a base without these tokens, and an ensemble with a member without them: separate bases.
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext"):
        ppo = make_trainer(
            model=load_base_model(base, dtype="float32"), reward_funcs=str(out), processing_class=load_tokenizer(base)
        )
    assert "does not fit the embeddings of the policy's base" in caplog.text
    assert bare_model(ppo.rewards.funcs[0].model) is not bare_model(ppo.policy)
    assert ppo.rewards.funcs[0].raw(*texts) == pytest.approx(live, abs=1e-6)
    reward_run(folders, tmp_path / "plain", base, template=False).save_model()
    ensemble = RewardEnsemble.from_pretrained([tmp_path / "plain", out])
    assert ensemble.members[1].raw(*texts) == pytest.approx(live, abs=1e-6)
    assert ensemble.members[0].model is not ensemble.members[1].model


def test_tokens_without_a_row_are_one_line_from_every_trainer(make_trainer, folders, tmp_path):
    base, longer = folders[False], load_tokenizer(folders["template"])
    rows = len(load_tokenizer(base))
    own = load_base_model(base, dtype="float32")
    make_trainer(model=copy.deepcopy(own), processing_class=longer, max_steps=1)  # a longer tokenizer alone is right

    def ppo(**options):
        return make_trainer(model=copy.deepcopy(own), **{"processing_class": longer} | options)

    text = Dataset.from_dict({"prompt": ["Tell me", "<think> fox"]})
    with pytest.raises(UserError, match=rf"train_dataset row 1: `prompt` has token '<think>' \({rows}\).*resize_token"):
        ppo(train_dataset=text)
    with pytest.raises(UserError, match="eval_dataset row 1"):
        ppo(eval_dataset=text)
    with pytest.raises(UserError, match=f"stop_token_ids: .* rows for {rows} tokens"):
        ppo(stop_token_ids=[rows + 1])
    for kind in ("pad", "eos"):
        tokenizer = copy.deepcopy(longer)
        setattr(tokenizer, f"{kind}_token", "</think>")
        with pytest.raises(UserError, match=f"processing_class: token '</think>' .*, the {kind} token, has no row"):
            ppo(processing_class=tokenizer)
        reward = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
        with pytest.raises(UserError, match=f"tokenizer of the reward model: token '</think>' .*, the {kind} token"):
            RewardScorer(reward, tokenizer)
        args = BradleyTerryConfig(str(tmp_path), max_steps=1, **TINY)
        rows_of_text = Dataset.from_list([{"prompt": "Tell", "chosen": " me", "rejected": " fox"}])
        with pytest.raises(UserError, match=f"processing_class: .*the {kind} token"):
            BradleyTerryTrainer(reward, args, rows_of_text, processing_class=tokenizer, peft_config=lora("SEQ_CLS"))
    reward = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    with pytest.raises(UserError, match="dataset 'train' row 0 has token '</?think>'"):
        BradleyTerryTrainer(reward, args, Dataset.from_list(PAIRS), processing_class=longer)
    reward = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    with pytest.raises(UserError, match="completion 1 with its prompt has token '<think>'"):
        RewardScorer(reward, longer).raw(["fox", "fox"], ["", "<think>"])
