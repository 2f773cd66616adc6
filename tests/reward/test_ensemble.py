"""Ensembles of reward models, merged exports, and the use in TRL's trainers, with real adapters of one base."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForSequenceClassification, pipeline

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.rewards import RewardFunctions
from hf_rlhf_ext.reward.config import BradleyTerryConfig
from hf_rlhf_ext.reward.ensemble import RewardEnsemble, combine_rewards, load_reward
from hf_rlhf_ext.reward.export import PROBE_TEXTS, export_merged, own_pad_token
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.reward.trainer import BradleyTerryTrainer

PROMPTS = ["Tell a story:", "Tell me:", "", "garden?"]
COMPLETIONS = ["a sunny day", "", "the lazy dog " * 7, "happy"]


@pytest.fixture
def train(tiny_config, chat_tokenizer, tmp_path):
    """Trains members on one saved base, each with its own seed; returns their folders."""
    tiny_config.num_labels = 1

    def run(n=1, base="base", bf16=False):
        torch.manual_seed(0)
        if not (tmp_path / base).is_dir():
            LlamaForSequenceClassification(tiny_config).save_pretrained(tmp_path / base)
        rows = [{"prompt": p, "chosen": c + " happy", "rejected": c} for p in PROMPTS for c in COMPLETIONS]
        folders = []
        for seed in range(n):
            folders.append(str(tmp_path / f"{base}-member-{seed}"))
            args = BradleyTerryConfig(
                folders[-1], use_cpu=True, bf16=bf16, report_to="none", learning_rate=1e-2, max_steps=4, seed=seed,
                disable_tqdm=True, save_strategy="no", model_init_kwargs={"dtype": "bfloat16" if bf16 else "float32"},
            )  # fmt: skip
            config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
            trainer = BradleyTerryTrainer(
                str(tmp_path / base), args, Dataset.from_list(rows), processing_class=chat_tokenizer, peft_config=config
            )
            trainer.train()
            trainer.save_model()
        return folders

    return run


def test_combinations_worked_by_hand():
    rewards = np.array([[1.0, 4.0], [3.0, 4.0]])
    np.testing.assert_allclose(combine_rewards(rewards, "mean"), [2.0, 4.0])
    np.testing.assert_allclose(combine_rewards(rewards, "min"), [1.0, 4.0])
    np.testing.assert_allclose(combine_rewards(rewards, "conservative", 0.5), [1.5, 4.0])
    np.testing.assert_allclose(combine_rewards(rewards, "conservative", 0.0), [2.0, 4.0])


def test_members_on_one_base_score_as_each_alone_to_the_bit(train, tmp_path):
    folders = train(3)
    alone = [RewardScorer.from_pretrained(folder, device="cpu")(PROMPTS, COMPLETIONS) for folder in folders]
    assert len({scores[0] for scores in alone}) == 3
    ensemble = RewardEnsemble.from_pretrained(folders, device="cpu")
    assert all(member.model is ensemble.members[0].model for member in ensemble.members)
    assert ensemble.rewards(PROMPTS, COMPLETIONS).tolist() == alone
    seen = {}
    combined = ensemble(PROMPTS, COMPLETIONS, log_metric=seen.__setitem__, category=["a"] * 4)
    np.testing.assert_allclose(combined, np.mean(alone, 0))
    np.testing.assert_allclose(ensemble.disagreement(PROMPTS, COMPLETIONS), np.std(alone, 0))
    assert seen == {"reward_disagreement": pytest.approx(np.std(alone, 0).mean())}

    RewardEnsemble.save(tmp_path, [folder.rsplit("/", 1)[-1] for folder in folders], combine="min")
    np.testing.assert_allclose(load_reward(tmp_path, device="cpu")(PROMPTS, COMPLETIONS), np.min(alone, 0))
    by_path = RewardFunctions(str(tmp_path))
    assert by_path.names == ["reward_ensemble"]
    np.testing.assert_allclose(by_path(PROMPTS, COMPLETIONS).flatten(), np.min(alone, 0), rtol=1e-6)


def test_members_of_other_bases_are_loaded_on_their_own_and_refusals_are_one_line(train, caplog):
    one, other = train()[0], train(base="other")[0]
    ensemble = RewardEnsemble.from_pretrained([one, other], combine="conservative", penalty=2.0, device="cpu")
    assert ensemble.members[0].model is not ensemble.members[1].model and "loaded on a separate base" in caplog.text
    alone = [RewardScorer.from_pretrained(folder, device="cpu")(PROMPTS, COMPLETIONS) for folder in (one, other)]
    np.testing.assert_allclose(ensemble(PROMPTS, COMPLETIONS), np.mean(alone, 0) - 2 * np.std(alone, 0))
    with pytest.raises(UserError, match="^members: .*two or more.* 1"):
        RewardEnsemble.from_pretrained([one])
    with pytest.raises(UserError, match="ensemble.json: .*folders of the members"):
        RewardEnsemble.from_pretrained(one)
    with pytest.raises(UserError, match="combine='median'.*mean, min, conservative"):
        RewardEnsemble(ensemble.members, combine="median")


@pytest.mark.parametrize("loses", [0, 1])
@pytest.mark.parametrize("loss, said", [("gone", "has no"), ("cut", "damaged")])
def test_a_member_that_lost_its_weights_is_named_in_one_line(train, tmp_path, loses, loss, said):
    folders = [Path(folder) for folder in train(2)]
    weights = folders[loses] / "adapter_model.safetensors"
    if loss == "gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:100])
    RewardEnsemble.save(tmp_path, [folder.name for folder in folders])
    with pytest.raises(UserError, match=f"{said}.*download it again") as caught:
        load_reward(tmp_path, device="cpu")
    assert str(folders[loses]) in str(caught.value) and "adapter_model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_a_plain_pipeline_gives_the_scores_of_a_merged_model(train, chat_tokenizer, tmp_path, pad_is_eos):
    if pad_is_eos:
        chat_tokenizer.pad_token = chat_tokenizer.eos_token
    folder = train()[0]
    scorer = RewardScorer.from_pretrained(folder, device="cpu")
    assert export_merged(folder, tmp_path / "merged", device="cpu") < 1e-5
    prompts = [*PROMPTS, [{"role": "user", "content": "Tell me about a day."}]]
    completions = [*COMPLETIONS, [{"role": "assistant", "content": "a sunny day"}]]
    pipe = pipeline("text-classification", model=str(tmp_path / "merged"), device="cpu", batch_size=3)
    texts = [scorer.text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    found = [one["score"] for one in pipe(texts)]
    expected = scorer.raw(prompts, completions)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 0.1
    assert pipe.model.config.reward_mean == scorer.mean and pipe.model.config.reward_std == scorer.std
    merged = RewardScorer.from_pretrained(tmp_path / "merged", device="cpu")
    np.testing.assert_allclose(merged(prompts, completions), scorer(prompts, completions), atol=1e-5)


def test_merging_a_bf16_model_reports_what_it_moves(train, tmp_path):
    folder = train(bf16=True)[0]
    scorer, (prompts, completions) = RewardScorer.from_pretrained(folder, device="cpu"), zip(*PROBE_TEXTS, strict=True)
    texts = [scorer.text(prompt, completion) for prompt, completion in PROBE_TEXTS]
    expected = np.array(scorer.raw(list(prompts), list(completions)))
    for dtype in ("float32", "bfloat16"):
        moved = export_merged(folder, tmp_path / dtype, dtype=dtype, device="cpu")
        pipe = pipeline("text-classification", model=str(tmp_path / dtype), device="cpu")
        found = [one["score"] for one in pipe(texts)]
        assert 0 < moved < 0.05 and moved == pytest.approx(np.abs(np.array(found) - expected).max(), abs=1e-6)


def test_merging_after_qlora_reports_what_quantization_did(train, tmp_path):
    folder = train(bf16=True)[0]
    recorded = json.loads(Path(folder, "reward_normalization.json").read_text())
    Path(folder, "reward_normalization.json").write_text(json.dumps(recorded | {"load_in_4bit": True}))
    scorer, (prompts, completions) = RewardScorer.from_pretrained(folder), zip(*PROBE_TEXTS, strict=True)
    assert scorer.model.get_base_model().is_loaded_in_4bit
    expected = np.array(scorer.raw(list(prompts), list(completions)))
    moved = export_merged(folder, tmp_path / "merged")
    merged = RewardScorer.from_pretrained(tmp_path / "merged", device="cpu")
    found = np.array(merged.raw(list(prompts), list(completions)))
    assert 1e-4 < moved == pytest.approx(np.abs(found - expected).max(), abs=1e-5)


def test_what_cannot_be_merged_is_one_line(train, tmp_path):
    folder = train()[0]
    loaded = RewardScorer.from_pretrained(folder, device="cpu").model.get_base_model()
    with pytest.raises(UserError, match="^export_merged: .*pass base= as a name"):
        export_merged(folder, tmp_path / "merged", base=loaded)
    with pytest.raises(UserError, match="^pad_token: '<pad>' .*vocabulary"):
        export_merged(folder, tmp_path / "merged", pad_token="<pad>", device="cpu")
    assert not (tmp_path / "merged").exists()


def test_a_pad_token_of_its_own(chat_tokenizer):
    assert own_pad_token(chat_tokenizer) == "<|pad|>"
    chat_tokenizer.pad_token = chat_tokenizer.eos_token
    assert own_pad_token(chat_tokenizer) == "<|pad|>"  # not <|im_start|>: the template writes it
    chat_tokenizer.chat_template += "<|pad|>"
    with pytest.raises(UserError, match="^tokenizer .*pass pad_token"):
        own_pad_token(chat_tokenizer)


@pytest.mark.slow
def test_a_policy_with_another_tokenizer_is_scored_by_its_text(train, tiny_config, chat_tokenizer, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(["ask answer"], trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=alphabet))
    other = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>", padding_side="left")
    other.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    scorer, seen = RewardScorer.from_pretrained(train()[0], device="cpu"), []
    tiny_config.vocab_size, tiny_config.eos_token_id, tiny_config.pad_token_id = len(other), 0, 0
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / "policy-base")
    other.save_pretrained(tmp_path / "policy-base")

    def reward(prompts, completions, completion_ids, **columns):
        rewards = scorer(prompts, completions, completion_ids=completion_ids, **columns)
        seen.extend(zip(prompts, completions, completion_ids, rewards, strict=True))
        return rewards

    args = GRPOConfig(
        str(tmp_path / "policy"), use_cpu=True, bf16=False, report_to="none", max_steps=1, save_strategy="no",
        per_device_train_batch_size=4, num_generations=2, max_completion_length=6, logging_steps=1,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS])
    trainer = GRPOTrainer(str(tmp_path / "policy-base"), reward, args=args, train_dataset=data)
    trainer.train()
    assert len(seen) == 4 and trainer.state.log_history[0]["rewards/reward/mean"] == pytest.approx(
        np.mean([row[3] for row in seen]), abs=1e-5
    )
    for prompt, completion, ids, given in seen:
        text = completion[0]["content"]
        assert text == other.decode(ids, skip_special_tokens=True)
        before = chat_tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        own = chat_tokenizer(before)["input_ids"] + chat_tokenizer(text + "<|im_end|>")["input_ids"]
        assert own != other(before)["input_ids"] + ids  # the template and the vocabulary of the reward model
        assert given == pytest.approx((scorer.score_ids([own])[0] - scorer.mean) / scorer.std, abs=1e-4)


@pytest.mark.slow
def test_trl_trains_a_policy_on_our_reward(train, tiny_llama, chat_tokenizer, tmp_path):
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    ensemble = RewardEnsemble.from_pretrained(train(2), device="cpu")
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS])
    tiny_llama.save_pretrained(tmp_path / "policy-base")
    chat_tokenizer.save_pretrained(tmp_path / "policy-base")
    for config, trainer_class in ((GRPOConfig, GRPOTrainer), (RLOOConfig, RLOOTrainer)):
        args = config(
            str(tmp_path / "policy"), use_cpu=True, bf16=False, report_to="none", max_steps=1, logging_steps=1,
            per_device_train_batch_size=4, num_generations=2, max_completion_length=4, save_strategy="no",
        )  # fmt: skip
        trainer = trainer_class(
            str(tmp_path / "policy-base"), [ensemble.members[0], ensemble], args=args, train_dataset=data
        )
        trainer.train()
        logged = trainer.state.log_history[0]
        assert {"rewards/reward_model/mean", "rewards/reward_ensemble/mean"} <= set(logged)
        assert logged["reward_disagreement"] > 0
