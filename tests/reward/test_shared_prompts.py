"""Scores of K completions behind one prompt are those of plain rows, in fewer tokens and in the passes that it says."""

import logging

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM, LlamaForSequenceClassification

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.heads import ScalarHead
from hf_rlhf_ext.modeling.layouts import Layout
from hf_rlhf_ext.reward.ensemble import RewardEnsemble
from hf_rlhf_ext.reward.scorer import RewardScorer
from hf_rlhf_ext.reward.shared_prompts import PromptGroup, prompt_groups

PROMPTS = [prompt for prompt in ("Tell a story:", "Tell me about a sunny day in the garden", "fox") for _ in range(4)]
COMPLETIONS = ["a sunny day", "", "the lazy dog " * 7, "happy", "fox", "words, many words!"] * 2


def sequences(seed=0, k=4):
    """Groups of `k` sequences that start with the same tokens, and further tokens of any number."""
    draw = np.random.default_rng(seed)
    made = []
    for length in (9, 30, 1, 17, 4):
        prompt = draw.integers(5, 300, length).tolist()
        made += [prompt + draw.integers(5, 300, draw.integers(1, 25)).tolist() for _ in range(k)]
    return made


def attention(model):
    return model.config._attn_implementation


class Passes:
    """Counts the forward passes of a model and the tokens in them, padding included."""

    def __init__(self, model):
        self.tokens = []
        self._hook = model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, module, args, output):
        self.tokens.append(args[0].numel())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._hook.remove()


@pytest.fixture
def wide(tiny_config):
    """As `seqcls`, with weights so large that scores differ clearly."""
    tiny_config.num_labels = 1
    tiny_config.initializer_range = 0.2
    torch.manual_seed(0)
    return LlamaForSequenceClassification(tiny_config).eval()


@pytest.mark.parametrize("budget", [{}, {"batch_size": 5}, {"max_tokens": 90}, {"max_tokens": 1}], ids=str)
@pytest.mark.parametrize("implementation, layout", [("sdpa", Layout.SEGMENTS), ("eager", Layout.MASK)])
def test_shared_prompts_give_the_scores_of_plain_rows(wide, chat_tokenizer, budget, implementation, layout):
    wide.set_attn_implementation(implementation)
    plain = sequences()
    expected = RewardScorer(wide, chat_tokenizer).score_ids(plain)
    assert np.std(expected) > 0.1 and attention(wide) == implementation, "nothing is tested for K = 1"
    scorer = RewardScorer(wide, chat_tokenizer, **budget)
    with Passes(wide) as unshared:
        scorer.score_ids(plain)
    n_passes = scorer.n_passes(plain, per_prompt=4)
    with Passes(wide) as passes:
        found = scorer.score_ids(plain, per_prompt=4)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)
    assert len(passes.tokens) == n_passes and scorer._shared_layout() == layout
    assert sum(passes.tokens) < 0.8 * sum(unshared.tokens)
    if budget.get("max_tokens") == 90:
        assert max(passes.tokens) <= 90 and n_passes <= 5
    with Passes(wide) as passes:
        assert scorer.score_ids(plain, per_prompt=4, at_least=30) == found
        assert scorer.score_ids([], per_prompt=4, at_least=2) == []
    assert len(passes.tokens) == 32


def test_a_mask_that_costs_more_than_plain_rows_is_not_used(wide, chat_tokenizer):
    wide.set_attn_implementation("eager")
    plain = [[7, *(number + 5 + place for place in range(40))] for number in range(20)]
    scorer = RewardScorer(wide, chat_tokenizer)
    with Passes(wide) as passes:
        shared = scorer.score_ids(plain, per_prompt=20)
    assert scorer._shared_layout() == Layout.MASK
    assert passes.tokens[-1] == 20 * 41 and shared == scorer.score_ids(plain)


def test_groups_share_their_longest_common_prefix_but_never_a_last_token():
    assert prompt_groups([[1, 2, 3, 4], [1, 2, 5]], 2) == [PromptGroup([0, 1], [1, 2], [[3, 4], [5]])]
    assert prompt_groups([[1, 2, 3], [1, 2]], 2) == [PromptGroup([0, 1], [1], [[2, 3], [2]])]
    assert prompt_groups([[1, 2], [1, 2], [1, 3], [1, 3]], 4) == [PromptGroup([0, 1, 2, 3], [1], [[2], [2], [3], [3]])]
    alone = [PromptGroup([0], [1, 2], []), PromptGroup([1], [2, 2], [])]
    assert prompt_groups([[1, 2], [2, 2]], 2) == alone
    assert prompt_groups([[1], [1, 2]], 2) == [PromptGroup([0], [1], []), PromptGroup([1], [1, 2], [])]
    assert prompt_groups([], 3) == []


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equal_sequences_and_those_that_share_nothing(wide, chat_tokenizer, implementation):
    wide.set_attn_implementation(implementation)
    groups = [[5, 6, 7], [5, 6, 7], [8, 9], [10, 11, 12], [13], [13], [5, 6], [5, 6, 7, 8]]
    scorer = RewardScorer(wide, chat_tokenizer, max_tokens=12)
    np.testing.assert_allclose(scorer.score_ids(groups, per_prompt=2), scorer.score_ids(groups), rtol=0, atol=5e-5)


def test_an_adapter_and_a_head_on_the_base_of_a_policy(tiny_config, chat_tokenizer):
    """The attention of the base is set to segments; the policy's adapter stays the active one."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(tiny_config), lora)
    model.add_adapter("reward", lora)
    head = ScalarHead.from_linear(torch.nn.Linear(tiny_config.hidden_size, 1, bias=False))
    scorer = RewardScorer(model, chat_tokenizer, adapter="reward", head=head, batch_size=8)
    expected = scorer.score_ids(sequences())
    policy = RewardScorer(model, chat_tokenizer, adapter="default", head=head).score_ids(sequences())
    assert not np.allclose(expected, policy, atol=1e-3)
    with Passes(model) as passes:
        found = scorer.score_ids(sequences(), per_prompt=4)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)
    assert attention(model) == "segments" and model.active_adapter == "default" and passes.tokens
    np.testing.assert_allclose(
        RewardScorer(model, chat_tokenizer, head=head).score_ids(sequences()), policy, rtol=0, atol=1e-6
    )


def test_rewards_and_ensembles_of_texts(wide, chat_tokenizer):
    scorer = RewardScorer(wide, chat_tokenizer, mean=0.5, std=2.0)
    columns = {"tools": [None] * 12, "label": list(range(12))}
    ensemble = RewardEnsemble([scorer, RewardScorer(wide, chat_tokenizer, mean=1.0)], combine="min")
    for reward in (scorer, ensemble):
        expected = reward(PROMPTS, COMPLETIONS, **columns)
        with Passes(wide) as passes:
            found = reward(PROMPTS, COMPLETIONS, per_prompt=4, **columns)
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)
        assert passes.tokens[-1] < 250
        np.testing.assert_allclose(
            reward.raw(PROMPTS, COMPLETIONS, per_prompt=4), reward.raw(PROMPTS, COMPLETIONS), rtol=0, atol=5e-5
        )
    spread = ensemble.disagreement(PROMPTS, COMPLETIONS, per_prompt=4)
    np.testing.assert_allclose(spread, ensemble.disagreement(PROMPTS, COMPLETIONS), rtol=0, atol=5e-5)


def test_the_model_is_tested_once(wide, chat_tokenizer, monkeypatch):
    scorer = RewardScorer(wide, chat_tokenizer)
    scorer.score_ids(sequences())
    assert attention(wide) == "sdpa"
    with Passes(wide) as passes:
        scorer.score_ids(sequences(), per_prompt=4)
    assert attention(wide) == "segments" and len(passes.tokens) > 1, "the test of the layout is forward passes too"
    with Passes(wide) as passes:
        scorer.score_ids(sequences(), per_prompt=4)
    assert len(passes.tokens) == 1


def test_another_attention_is_tested_again(wide, chat_tokenizer):
    scorer = RewardScorer(wide, chat_tokenizer)
    expected = scorer.score_ids(sequences(), per_prompt=4)
    assert scorer._shared_layout() == Layout.SEGMENTS
    wide.set_attn_implementation("eager")
    np.testing.assert_allclose(scorer.score_ids(sequences(), per_prompt=4), expected, rtol=0, atol=5e-5)
    assert scorer._shared_layout() == Layout.MASK and attention(wide) == "eager"


def test_an_encoder_scores_plain_rows_and_is_not_tested(chat_tokenizer, caplog):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(chat_tokenizer), num_labels=1, pad_token_id=0, **sizes)
    scorer = RewardScorer(BertForSequenceClassification(config).eval(), chat_tokenizer)
    with Passes(scorer.model) as passes, caplog.at_level(logging.INFO):
        found = scorer.score_ids(sequences(), per_prompt=4)
        assert scorer.score_ids(sequences()) == found and len(passes.tokens) == 2
    assert "per_prompt: plain rows are used, since it is an encoder" in caplog.text


@pytest.mark.parametrize("per_prompt", [5, 0, [4] * 12])
def test_completions_that_are_no_groups_are_refused(wide, chat_tokenizer, per_prompt):
    with pytest.raises(UserError, match="per_prompt.*one after the other"):
        RewardScorer(wide, chat_tokenizer)(PROMPTS, COMPLETIONS, per_prompt=per_prompt)
