"""The rollout engine without PPO: it needs a policy and token ids, but no roles."""

from dataclasses import replace

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.cache_utils import DynamicLayer

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.engine import Samples, Sampling, TransformersEngine


@pytest.fixture
def sampling(chat_tokenizer):
    return Sampling(
        max_new_tokens=6,
        stop_ids=list(range(0, len(chat_tokenizer), 5)),
        pad_token_id=chat_tokenizer.pad_token_id,
    )


def assert_same_samples(first, second):
    """The same tokens, and the same log-probabilities up to rounding."""
    assert first.ids == second.ids
    for row, expected in zip(first.logprobs, second.logprobs, strict=True):
        assert row == pytest.approx(expected, abs=2e-5)


def test_several_completions_per_prompt_lie_next_to_each_other(tiny_llama, sampling):
    engine = TransformersEngine()
    engine.sync(tiny_llama)
    prompts = [[5, 6, 7], [8, 9]]
    torch.manual_seed(1)
    several = engine.generate(prompts, sampling, n=3)
    torch.manual_seed(1)
    repeated = engine.generate([prompts[0]] * 3 + [prompts[1]] * 3, sampling)
    assert isinstance(several, Samples) and len(several.ids) == len(several.logprobs) == 6
    assert_same_samples(several, repeated)
    assert len({tuple(ids) for ids in several.ids}) > 1
    for ids, logprobs in zip(several.ids, several.logprobs, strict=True):
        assert 1 <= len(ids) == len(logprobs) <= 6
        assert all(token % 5 for token in ids[:-1])  # nothing follows a stop token


# ---- A prompt with several completions goes through the model once ----

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
WIDE |= {"intermediate_size": 32}
ONCE = {
    "qwen2": lambda: Qwen2Config(**WIDE),
    "qwen3": lambda: Qwen3Config(**WIDE),
    # The longest prompt has twelve tokens: it does not fit into the window.
    "mistral": lambda: MistralConfig(**WIDE, sliding_window=4),
    "gemma2": lambda: Gemma2Config(**WIDE, sliding_window=4, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(
        **WIDE, sliding_window=4, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4),
    "opt": lambda: OPTConfig(
        hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    ),
}
EACH = {
    "mamba": lambda: MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8),
    "lfm2": lambda: Lfm2Config(
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        num_hidden_layers=2,
    ),
}
SHARED_PROMPTS = [[7, 30, 12, 9, 41, 22, 17, 5, 60, 33, 8, 19], [14, 3, 50], [21, 44, 6, 13, 9, 9, 37]]
TWELVE = Sampling(max_new_tokens=8, stop_ids=[5, 11], pad_token_id=0)


def lively_model(config):
    """A random model with 64 tokens whose distributions are far from uniform."""
    torch.manual_seed(0)
    config.vocab_size = 64
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def sampled(model, sampling, *, n=4, prompts=SHARED_PROMPTS):
    """Samples with n > 1, the same with each prompt n times, and the shapes that the model saw in the former."""
    shapes = []
    engine = TransformersEngine()
    engine.sync(model)
    engine.generate(prompts, sampling, n=n)  # the first one also tests whether the cache can be repeated
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    torch.manual_seed(3)
    several = engine.generate(prompts, sampling, n=n)
    handle.remove()
    torch.manual_seed(3)
    repeated = engine.generate([ids for ids in prompts for _ in range(n)], sampling)
    return several, repeated, shapes


@pytest.mark.seam("transformers.generation.utils.GenerationMixin._prefill")
@pytest.mark.parametrize("name", ONCE)
def test_a_prompt_goes_through_the_model_once_and_nothing_else_changes(name):
    model = lively_model(ONCE[name]())
    for sampling in (TWELVE, replace(TWELVE, top_k=1), replace(TWELVE, batch_size=4)):
        several, repeated, shapes = sampled(model, sampling)
        assert_same_samples(several, repeated)
        assert shapes[0] == ((1 if sampling.batch_size else 3), 12)
        assert shapes[1][0] == (sampling.batch_size or 12)  # from the second step on, each completion has a row
    assert "_prefill" not in vars(model)
    assert len({tuple(ids) for ids in repeated.ids}) > 3


@pytest.mark.parametrize("name", EACH)
def test_models_with_other_states_compute_prompts_for_each_completion(name, caplog):
    model = lively_model(EACH[name]())
    several, repeated, shapes = sampled(model, TWELVE)
    assert several == repeated and shapes[0][0] == 12
    assert [record.getMessage().count("once for every completion") for record in caplog.records].count(1) == 1


@pytest.mark.parametrize("further", [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}])
def test_options_of_the_cache_without_repetition_are_named(tiny_llama, further, caplog):
    several, repeated, shapes = sampled(tiny_llama, replace(TWELVE, further=further))
    assert several.ids == repeated.ids and shapes[0] == (12, 12)
    assert next(iter(further)) in caplog.text


def test_chunks_of_a_long_prompt_are_computed_once_too(tiny_llama):
    several, repeated, shapes = sampled(tiny_llama, replace(TWELVE, further={"prefill_chunk_size": 5}))
    assert_same_samples(several, repeated)
    assert shapes[:3] == [(3, 5), (3, 5), (3, 2)]


def test_a_lora_policy_shares_prompts_and_virtual_tokens_do_not(tiny_llama, lora, caplog):
    several, repeated, shapes = sampled(get_peft_model(tiny_llama, lora), TWELVE)
    assert_same_samples(several, repeated)
    assert shapes[0] == (3, 12) and not caplog.records
    tuned = get_peft_model(tiny_llama, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    several, repeated, _ = sampled(tuned, TWELVE)
    assert several == repeated and "virtual tokens" in caplog.text


def test_a_cache_that_is_repeated_wrongly_is_noticed(tiny_llama, monkeypatch, caplog):
    select = DynamicLayer.batch_select_indices
    monkeypatch.setattr(DynamicLayer, "batch_select_indices", lambda layer, rows: select(layer, rows.flip(0)))
    several, repeated, shapes = sampled(tiny_llama, TWELVE)
    assert several == repeated and shapes[0] == (12, 12)
    assert "computes something else" in caplog.text


def test_generation_batches_count_completions_and_keep_those_of_a_prompt_together(tiny_llama):
    # Completions of two prompts, three each.
    for batch_size, rows in ((100, [6]), (7, [6]), (5, [3, 3]), (3, [3, 3]), (2, [2, 2, 2]), (1, [1] * 6)):
        sampling = replace(TWELVE, batch_size=batch_size, max_new_tokens=2, stop_ids=())
        *_, shapes = sampled(tiny_llama, sampling, n=3, prompts=SHARED_PROMPTS[:2])
        assert [shape[0] for shape in shapes if shape[1] == 1] == rows, batch_size


def test_stop_strings_end_completions_of_a_shared_prompt(tiny_llama, chat_tokenizer):
    prompts = [[40, 50, 60], [70, 80]]
    options = {"max_new_tokens": 12, "stop_ids": [], "stop_strings": ["a", "e", "t"], "tokenizer": chat_tokenizer}
    several, repeated, _ = sampled(tiny_llama, replace(TWELVE, **options), prompts=prompts)
    assert_same_samples(several, repeated)
    assert len({len(ids) for ids in several.ids}) > 1


def test_batches_keep_the_order_of_the_prompts(tiny_llama, sampling):
    greedy = Sampling(sampling.max_new_tokens, sampling.stop_ids, sampling.pad_token_id, top_k=1)
    in_twos = Sampling(sampling.max_new_tokens, sampling.stop_ids, sampling.pad_token_id, top_k=1, batch_size=2)
    engine = TransformersEngine()
    engine.sync(tiny_llama)
    prompts = [[5], [6, 7, 8], [9, 10], [11, 12, 13, 14]]
    assert engine.generate(prompts, in_twos).ids == engine.generate(prompts, greedy).ids


def test_an_adapter_is_sampled_with_its_weights_of_now_and_left_as_it_was(tiny_llama, sampling, lora):
    model = get_peft_model(tiny_llama, lora)
    engine = TransformersEngine(merge=True)
    engine.sync(model)
    greedy = Sampling(sampling.max_new_tokens, sampling.stop_ids, sampling.pad_token_id, top_k=1)
    bare = engine.generate([[5, 6, 7]], greedy)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    merged = engine.generate([[5, 6, 7]], greedy)
    unmerged_engine = TransformersEngine(merge=False)
    unmerged_engine.sync(model)
    assert merged.ids == unmerged_engine.generate([[5, 6, 7]], greedy).ids != bare.ids
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_an_engine_without_a_policy_says_what_is_missing(sampling):
    with pytest.raises(UserError, match="sync"):
        TransformersEngine().generate([[5]], sampling)


def test_options_of_generation_that_ppo_cannot_use_are_refused(tiny_llama, sampling):
    engine = TransformersEngine()
    engine.sync(tiny_llama)
    several = Sampling(6, sampling.stop_ids, sampling.pad_token_id, further={"num_return_sequences": 2})
    with pytest.raises(UserError, match="num_return_sequences=2"):
        engine.generate([[5]], several)


def test_a_trainer_samples_with_the_engine_that_it_is_given(make_trainer, prompts):
    class Counting(TransformersEngine):
        def __init__(self):
            super().__init__()
            self.prompts = 0
            self.syncs = 0

        def sync(self, policy):
            self.syncs += 1
            super().sync(policy)

        def generate(self, prompt_ids, sampling, n=1):
            self.prompts += len(prompt_ids)
            samples = super().generate(prompt_ids, sampling, n)
            return Samples(samples.ids, None)  # an engine may return no log-probabilities

    engine = Counting()
    trainer = make_trainer(engine=engine, max_steps=4)
    trainer.train()
    assert engine.prompts == 8 and trainer.state.log_history[0]["sampling/logprob_mismatch"] == 0
    # Once per rollout and once per evaluation: a copying engine sends all weights each time.
    assert engine.syncs == 1
    trainer.args.per_device_eval_batch_size = 2
    trainer.sample_and_score(prompts)
    assert engine.syncs == 2 and engine.prompts == 8 + len(prompts)
