"""Adapters that change their base: the reference, checkpoints, and reward models beside them."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.merge import merge_run
from hf_rlhf_ext.modeling.loading import load_base_model, load_policy
from hf_rlhf_ext.modeling.probing import probe_logprobs
from hf_rlhf_ext.reward.ensemble import RewardEnsemble
from hf_rlhf_ext.reward.normalization import RewardNormalization
from hf_rlhf_ext.reward.scorer import RewardScorer

TEXTS = (["Tell me", "fox"], [" happy people", " sad"])


def config_with(task="CAUSAL_LM", **options):
    return LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": task} | options)
    )


@pytest.fixture(autouse=True)
def _in_fp32_on_any_machine(monkeypatch):
    """A base that is given by its path is loaded in the dtype of the machine, which is bf16 on some CPUs."""
    monkeypatch.setattr("hf_rlhf_ext.modeling.loading._cpu_has_bf16", lambda: False)


@pytest.fixture
def base(tiny_config, chat_tokenizer, tmp_path):
    tiny_config.attention_bias = True
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def make_reward(base, chat_tokenizer, tmp_path):
    """Makes the folder of a reward adapter with random weights."""

    def make(name, **options):
        model = load_base_model(base, task="reward", dtype="float32")
        model = get_peft_model(model, config_with("SEQ_CLS", **options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        folder = tmp_path / name
        model.save_pretrained(folder)
        chat_tokenizer.save_pretrained(folder)
        RewardNormalization(base_dtype="float32").save(folder)
        return str(folder)

    return make


def distance(first, second):
    return float((first - second).abs().max())


def said(caplog, fragment):
    return [record for record in caplog.records if fragment in record.getMessage()]


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4"])
@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_a_run_resumes_on_the_changed_base(make_trainer, base, tmp_path, start, critic):
    def trainer(folder, **options):
        config = config_with(init_lora_weights=start)
        options |= {"model": base, "peft_config": config, "critic": critic, "save_strategy": "steps", "save_steps": 2}
        return make_trainer(folder, **options)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert distance(probe_logprobs(resumed.policy), probe_logprobs(whole.policy)) < 1e-5
    # What a checkpoint holds is an ordinary LoRA on the original base.
    loaded, _ = load_policy(tmp_path / "resumed" / "checkpoint-4", dtype="float32")
    assert loaded.active_peft_config.r == 8
    assert distance(probe_logprobs(loaded), probe_logprobs(whole.policy)) < 1e-5

    if start == "pissa_niter_4":  # another seed gives another decomposition
        with pytest.raises(UserError, match="the base was decomposed in another way"):
            trainer("other", seed=4).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"init_lora_weights": False}])
def test_the_reference_is_the_policy_at_the_start(caplog, make_trainer, base, options):
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext"):
        trainer = make_trainer(model=base, peft_config=config_with(**options))
    assert len(said(caplog, "the reference is a frozen copy of the adapter as initialized")) == 1
    start = probe_logprobs(trainer.policy)
    trainer.train()
    with trainer.stack.activate("reference") as reference:
        assert torch.equal(probe_logprobs(reference), start)
    assert distance(probe_logprobs(trainer.policy), start) > 1e-3


def test_plain_lora_keeps_the_bare_base_as_its_reference(caplog, make_trainer, base):
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext"):
        trainer = make_trainer(model=base, peft_config=config_with())
    assert trainer.stack.roles["reference"].adapter is None and list(trainer.policy.peft_config) == ["default"]
    assert not said(caplog, "peft_config")


def test_a_base_whose_weights_are_trained_beside_the_adapter_is_refused(make_trainer, base):
    model = get_peft_model(load_base_model(base, dtype="float32"), config_with())
    model.get_base_model().lm_head.requires_grad_(True)
    with pytest.raises(UserError, match=r"weights of the base are trainable.*lm_head.*modules_to_save"):
        make_trainer(model=model, peft_config=None)


@pytest.mark.parametrize("policy", [{}, {"init_lora_weights": "pissa"}])
@pytest.mark.parametrize("reward", [{}, {"init_lora_weights": "pissa"}, {"bias": "all"}])
def test_a_reward_model_scores_as_alone_beside_any_policy(caplog, make_trainer, base, make_reward, policy, reward):
    folder = make_reward("reward", **reward)
    alone = RewardScorer.from_pretrained(folder).raw(*TEXTS)
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext"):
        trainer = make_trainer(model=base, peft_config=config_with(**policy), reward_funcs=folder, critic="adapter")
    before = probe_logprobs(trainer.policy)
    (scorer, _), *_ = trainer.rewards.weighted()
    assert scorer.raw(*TEXTS) == pytest.approx(alone, abs=1e-5)
    assert torch.equal(probe_logprobs(trainer.policy), before)
    shares = not policy and not reward
    assert ("reward" in trainer.stack.roles) == shares
    assert bool(said(caplog, "it is loaded on a separate base")) != shares


@pytest.mark.parametrize("policy, reward, shares", [([], ["q"], False), (["q"], ["v"], False), (["q"], ["q"], True)])
def test_target_parameters_share_a_base_with_their_like_only(make_trainer, base, make_reward, policy, reward, shares):
    def options(letters):
        names = [f"self_attn.{letter}_proj.weight" for letter in letters]
        return {"target_modules": [], "target_parameters": names} if names else {}

    folder = make_reward("reward", **options(reward))
    alone = RewardScorer.from_pretrained(folder).raw(*TEXTS)
    trainer = make_trainer(model=base, peft_config=config_with(**options(policy)), reward_funcs=folder)
    (scorer, _), *_ = trainer.rewards.weighted()
    assert scorer.raw(*TEXTS) == pytest.approx(alone, abs=1e-5)
    assert ("reward" in trainer.stack.roles) == shares


@pytest.mark.parametrize("options", [{"init_lora_weights": "olora"}, {"bias": "lora_only"}])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_members_of_an_ensemble_do_not_share_a_changed_base(caplog, make_reward, options, order):
    folders = [make_reward("plain"), make_reward("changed", **options)]
    folders = [folders[place] for place in order]
    alone = [RewardScorer.from_pretrained(folder).raw(*TEXTS) for folder in folders]
    with caplog.at_level(logging.WARNING, logger="hf_rlhf_ext"):
        ensemble = RewardEnsemble.from_pretrained(folders)
    for member, expected in zip(ensemble.members, alone, strict=True):
        assert member.raw(*TEXTS) == pytest.approx(expected, abs=1e-5)
    assert said(caplog, "it is loaded on a separate base")


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_merged_run_is_the_trained_policy(make_trainer, tiny_config, chat_tokenizer, tmp_path, options):
    tiny_config.tie_word_embeddings = True
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / "tied")
    chat_tokenizer.save_pretrained(tmp_path / "tied")
    trainer = make_trainer("run", model=str(tmp_path / "tied"), peft_config=config_with(**options))
    trainer.train()
    trainer.save_model()
    merged = merge_run(tmp_path / "run", tmp_path / "merged", dtype="float32")
    plain = LlamaForCausalLM.from_pretrained(merged, dtype="float32")
    assert distance(probe_logprobs(plain), probe_logprobs(trainer.policy)) < 1e-4
    assert plain.config.tie_word_embeddings == ("target_modules" not in options)


def test_a_merge_that_is_another_model_is_refused(monkeypatch, base, chat_tokenizer, tmp_path):
    from hf_rlhf_ext.hub import merge

    model = get_peft_model(load_base_model(base, dtype="float32"), config_with(init_lora_weights=False))
    model.save_pretrained(tmp_path / "run")
    chat_tokenizer.save_pretrained(tmp_path / "run")
    monkeypatch.setattr(merge, "merge_into_base", lambda policy, *words: policy.unload())  # the adapter is lost
    with pytest.raises(UserError, match="is not the adapter on its base"):
        merge_run(tmp_path / "run", tmp_path / "merged", dtype="float32")


@pytest.mark.parametrize(
    "options, reason",
    [({"lora_bias": True, "target_modules": ["down_proj"]}, "no bias"), (None, "no weights to merge")],
)
def test_an_adapter_that_cannot_be_merged_is_one_line(base, chat_tokenizer, tmp_path, options, reason):
    from peft import PromptTuningConfig

    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    if options is not None:
        config = config_with(**options)
    get_peft_model(load_base_model(base, dtype="float32"), copy.deepcopy(config)).save_pretrained(tmp_path / "run")
    chat_tokenizer.save_pretrained(tmp_path / "run")
    with pytest.raises(UserError, match=rf"{reason}.*load_policy") as refusal:
        merge_run(tmp_path / "run", tmp_path / "merged")
    assert "\n" not in str(refusal.value)
