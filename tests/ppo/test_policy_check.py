"""A policy that `generate` does not support is refused before training; the check changes nothing."""

import pytest
import torch
from transformers import BartConfig, BartForCausalLM

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.policy_check import check_generates


def bart_decoder(**layers):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    return BartForCausalLM(BartConfig(vocab_size=64, **sizes, **layers))


def test_a_model_with_which_generate_fails_is_one_line():
    # Transformers makes a cache for as many layers as the encoder has.
    model = bart_decoder(encoder_layers=1, decoder_layers=2)
    with pytest.raises(UserError, match="`generate` of Transformers fails with this BartForCausalLM.*use another"):
        check_generates(model, [5, 6, 7])


def test_the_check_changes_nothing(tiny_llama):
    for model in (tiny_llama.train(), bart_decoder(encoder_layers=2, decoder_layers=2).eval()):
        training, state, config = model.training, torch.get_rng_state(), model.generation_config
        check_generates(model, list(range(3, 40)))
        assert model.training is training and torch.equal(state, torch.get_rng_state())
        assert model.generation_config is config
