"""The rollout engine without PPO: it needs a policy and token ids, but no roles."""

import pytest
import torch
from peft import get_peft_model

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.engine import Samples, Sampling, TransformersEngine


@pytest.fixture
def sampling(chat_tokenizer):
    return Sampling(
        max_new_tokens=6,
        stop_ids=list(range(0, len(chat_tokenizer), 5)),
        pad_token_id=chat_tokenizer.pad_token_id,
    )


def test_several_completions_per_prompt_lie_next_to_each_other(tiny_llama, sampling):
    engine = TransformersEngine()
    engine.sync(tiny_llama)
    prompts = [[5, 6, 7], [8, 9]]
    torch.manual_seed(1)
    several = engine.generate(prompts, sampling, n=3)
    torch.manual_seed(1)
    repeated = engine.generate([prompts[0]] * 3 + [prompts[1]] * 3, sampling)
    assert isinstance(several, Samples) and len(several.ids) == len(several.logprobs) == 6
    assert several.ids == repeated.ids and several.logprobs == repeated.logprobs
    assert len({tuple(ids) for ids in several.ids}) > 1
    for ids, logprobs in zip(several.ids, several.logprobs, strict=True):
        assert 1 <= len(ids) == len(logprobs) <= 6
        assert all(token % 5 for token in ids[:-1])  # nothing follows a stop token


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
