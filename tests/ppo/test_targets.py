"""Layers that an adapter can target in several ways: a run is saved, loaded, resumed and merged as what it was."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from hf_rlhf_ext.modeling.loading import attach_adapter, load_policy
from hf_rlhf_ext.modeling.merging import merge_into_base
from hf_rlhf_ext.modeling.ownership import adapter_state

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
NO_TARGETS = {"target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]}
PISSA = {"init_lora_weights": "pissa", "target_modules": ["lm_head", "q_proj"]}
OLORA = {"init_lora_weights": "olora", "target_modules": ["lm_head", "embed_tokens", "q_proj"]}


def config(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options)


@torch.no_grad()
def logprobs(model):
    was_training = model.training
    model.eval()
    result = torch.log_softmax(model(input_ids=IDS).logits, -1)
    model.train(was_training)
    return result


def reference_is_off(trainer):
    with trainer.stack.activate("reference") as model:
        reference = logprobs(model)
    return float((reference - logprobs(trainer.policy)).abs().max())


@pytest.fixture
def bases(tiny_config, chat_tokenizer, tmp_path):
    """Folders of a base whose embeddings are not tied, and of one whose embeddings are."""
    folders = {}
    for tied in (False, True):
        shape = copy.deepcopy(tiny_config)
        shape.tie_word_embeddings = tied
        folder = tmp_path / f"base-{tied}"
        torch.manual_seed(0)
        LlamaForCausalLM(shape).save_pretrained(folder)
        chat_tokenizer.save_pretrained(folder)
        folders[tied] = str(folder)
    return folders


def base_in(folder, rows=0):
    model = LlamaForCausalLM.from_pretrained(folder, dtype="float32")
    if rows:
        torch.manual_seed(7)
        model.resize_token_embeddings(model.config.vocab_size + rows)
    return model


@pytest.mark.parametrize(
    "options, tied, rows",
    [
        ({"target_modules": r".*\.q_proj"}, False, 0),
        ({"target_modules": r".*(q_proj|embed_tokens|lm_head)"}, False, 0),
        ({"target_modules": r".*proj", "exclude_modules": r".*o_proj", "rank_pattern": {"q_proj": 2}}, False, 0),
        ({"layers_to_transform": [0]}, False, 0),
        (NO_TARGETS, False, 0),
        (PISSA, False, 0),
        (PISSA, False, 5),
        (OLORA, False, 0),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True, 0),
        ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, True, 0),
    ],
)
def test_a_run_is_saved_resumed_and_merged(make_trainer, bases, tmp_path, options, tied, rows):
    def trainer(folder):
        run = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "num_mini_batches": 1, "num_ppo_epochs": 1}
        return make_trainer(
            folder=folder, model=base_in(bases[tied], rows), peft_config=config(**options), critic="adapter", **run
        )

    whole = trainer("whole")
    assert reference_is_off(whole) < 1e-5
    whole.train()
    expected = logprobs(whole.policy)
    assert reference_is_off(whole) > 1e-6
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert torch.equal(logprobs(resumed.policy), expected)

    whole.save_model(str(tmp_path / "out"))
    loaded, _ = load_policy(str(tmp_path / "out"), dtype="float32")
    assert torch.allclose(logprobs(loaded), expected, atol=3e-6)
    merged = merge_into_base(loaded, "merge", "")
    assert torch.allclose(logprobs(merged), expected, atol=3e-6)


def test_a_head_that_pissa_changed_is_saved_only_if_it_was_resized(make_trainer, bases, tmp_path):
    for rows in (0, 5):
        model = base_in(bases[False], rows)
        original = model.lm_head.weight.detach().clone()
        trainer = make_trainer(folder=f"run-{rows}", model=model, peft_config=config(**PISSA))
        assert not torch.allclose(trainer.policy.get_output_embeddings().base_layer.weight, original, atol=1e-3)
        trainer.save_model(str(tmp_path / f"out-{rows}"))
        saved = load_file(tmp_path / f"out-{rows}" / "adapter_model.safetensors")
        heads = [value for key, value in saved.items() if key.endswith("lm_head.base_layer.weight")]
        assert len(heads) == (1 if rows else 0)
        for head in heads:
            assert torch.allclose(head, original, atol=1e-6)


@pytest.mark.parametrize(
    "targets",
    [["embed_tokens", "q_proj"], ["embed_tokens", "lm_head"], r".*(embed_tokens|q_proj)"],
)
def test_the_reference_of_tied_lora_is_a_whole_copy(make_trainer, bases, targets):
    tied = config(target_modules=targets, ensure_weight_tying=True)
    model = get_peft_model(base_in(bases[True]), tied)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    trainer = make_trainer(model=model, peft_config=None, critic="adapter", max_steps=1)
    assert model.peft_config["default"].ensure_weight_tying  # that of the user is not changed
    reference = trainer.stack.roles["reference"].adapter
    weights, copied = adapter_state(model, "default"), adapter_state(model, reference)
    assert weights.keys() == copied.keys()
    assert all(torch.equal(weights[name], copied[name]) for name in weights)
    # The adapter of the head is a transposed view, its copy is not: on some CPUs the products round differently.
    assert reference_is_off(trainer) < 1e-5
    trainer.train()
    assert reference_is_off(trainer) > 1e-3


def test_tied_copies_of_an_adapter_leave_the_base_as_it_is(bases, tmp_path):
    """Their file has both layers, and none of them is a layer of the base."""
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    model = get_peft_model(base_in(bases[True]), config(**options))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    model.save_pretrained(tmp_path / "adapter")
    loaded = attach_adapter(base_in(bases[True]), tmp_path / "adapter")
    assert torch.equal(logprobs(loaded), logprobs(model))
    with loaded.disable_adapter():
        assert torch.equal(logprobs(loaded), logprobs(base_in(bases[True])))
