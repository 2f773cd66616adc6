"""Stop strings: a completion ends with the token that completes one, in sampling, rewards, metrics and evaluation."""

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.loading import load_tokenizer
from hf_rlhf_ext.ppo.engine import Samples, Sampling, TransformersEngine
from hf_rlhf_ext.ppo.stopping import StopStrings


def ids_of(tokenizer, *tokens):
    """Ids of texts that are one token each."""
    found = []
    for token in tokens:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        assert len(ids) == 1, f"{token!r} is {len(ids)} tokens"
        found += ids
    return found


def bytes_of(tokenizer, text):
    """Ids of a text with one token for each byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    return [tokenizer.convert_tokens_to_ids(letters[byte]) for byte in text.encode()]


@pytest.mark.parametrize(
    "strings, text, length",
    [
        ("\n\n", "ab\n\ncd", 4),  # several tokens, and a string instead of a list
        (["cd", "b\n"], "ab\n\ncd", 3),  # the first of several in the text, not in the list
        (["cd"], "ab\n\ncd", 6),  # at the end
        (["é!"], "oé!", 4),  # letters of several bytes, the end of which is not text before they are complete
        (["abab"], "abaabab", 7),
        (["x" * 40], "o" + "x" * 41, 41),
        (["no"], "ab\n\ncd", None),
        (["ab" * 9], "ab" * 8, None),
    ],
)
def test_the_end_is_the_token_that_completes_a_string(chat_tokenizer, strings, text, length):
    ids = bytes_of(chat_tokenizer, text)
    stops = StopStrings(strings, chat_tokenizer)
    assert stops.end(ids) == length
    assert [stops.is_complete(ids[:k]) for k in range(1, length or len(ids))] == [False] * ((length or len(ids)) - 1)


def test_a_token_may_go_on_after_the_string_or_be_special(chat_tokenizer):
    happy = chat_tokenizer(" happy", add_special_tokens=False)["input_ids"]
    assert len(happy) == 1
    ids = [*bytes_of(chat_tokenizer, "un"), *happy, *bytes_of(chat_tokenizer, "!")]
    assert StopStrings("n hap", chat_tokenizer).end(ids) == 3
    ids = [*bytes_of(chat_tokenizer, "un"), chat_tokenizer.convert_tokens_to_ids("<|im_start|>"), 9, 9]
    assert StopStrings("<|im_start|>", chat_tokenizer).end(ids) == 3
    assert StopStrings("start", chat_tokenizer).end(ids) is None  # reward functions do not get special tokens
    ids = [*bytes_of(chat_tokenizer, "u"), *[1] * 30, *bytes_of(chat_tokenizer, "no")]
    assert StopStrings("un", chat_tokenizer).end(ids) == 32  # they get "uno"


def test_the_spaces_of_sentencepiece_count(stories_path):
    tokenizer = load_tokenizer(str(stories_path))
    ids = tokenizer("once upon a time there was", add_special_tokens=False)["input_ids"]
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words[0].startswith("▁")
    text = tokenizer.decode(ids)
    for string in (" once", " upon a", "a time", "there"):
        length = StopStrings(string, tokenizer).end(ids)
        # The shortest part of the text, with the space of its first token, that contains the string.
        shortest = min(k for k in range(1, len(ids) + 1) if string in " " + tokenizer.decode(ids[:k]))
        assert length == shortest, string
    assert StopStrings("  once", tokenizer).end(ids) is None and "once" in text


@pytest.mark.parametrize("strings", ["", [""], [3], 3, [], ["a", None]])
def test_what_is_no_text_is_refused(chat_tokenizer, strings):
    with pytest.raises(UserError, match="stop_strings"):
        StopStrings(strings, chat_tokenizer)


@pytest.fixture
def spiky(tiny_llama):
    """A model whose samples have a few tokens that are likely, and that depend on the prompt."""
    tiny_llama.lm_head.weight.data *= 60
    return tiny_llama


def generate(model, tokenizer, prompts, stop_strings=(), seed=0, stop_ids=(2,), pad=0, **further):
    engine = TransformersEngine()
    engine.sync(model)
    torch.manual_seed(seed)
    sampling = Sampling(24, stop_ids, pad, stop_strings=stop_strings, tokenizer=tokenizer, further=further)
    return engine.generate(prompts, sampling), sampling


def test_sampling_ends_a_row_at_its_string_and_changes_no_token_before_it(spiky, chat_tokenizer):
    prompts = [[70, 71, 72], [80, 81], [90, 91, 92, 93]]
    (plain_ids, plain_logprobs), _ = generate(spiky, chat_tokenizer, prompts)
    strings = [chat_tokenizer.decode(plain_ids[0][3:5])[:3], chat_tokenizer.decode(plain_ids[1][6:8])]
    (ids, logprobs), sampling = generate(spiky, chat_tokenizer, prompts, strings)
    ended = 0
    for row in range(3):
        whole = sampling.string_stops.end(plain_ids[row])
        # The rows are sampled together: until the first one ends, with the same random numbers.
        assert ids[row] == plain_ids[row][:whole]
        assert logprobs[row] == plain_logprobs[row][:whole]
        assert sampling.is_stopped(ids[row]) == (whole is not None or ids[row][-1] == 2)
        ended += whole is not None
    assert ended >= 2 and len(ids[0]) <= 5


@pytest.mark.parametrize("pad", [0, 2])
def test_padding_after_the_string_is_no_part_of_the_completion(spiky, chat_tokenizer, pad):
    prompts = [[70, 71, 72], [80, 81]]
    (plain_ids, _), _ = generate(spiky, chat_tokenizer, prompts, pad=pad)
    string = chat_tokenizer.decode(plain_ids[0][:2])
    (ids, logprobs), _ = generate(spiky, chat_tokenizer, prompts, [string], pad=pad)  # row 1 goes on
    assert ids[0] == plain_ids[0][:2] and len(logprobs[0]) == 2 and len(ids[1]) > 2


def test_a_string_that_begins_in_the_prompt_does_not_count(spiky, chat_tokenizer):
    prompt = [70, 71, 72]
    (plain_ids, _), _ = generate(spiky, chat_tokenizer, [prompt])
    border = chat_tokenizer.decode(prompt[-1:]) + chat_tokenizer.decode(plain_ids[0][:1])
    assert border in chat_tokenizer.decode(prompt + plain_ids[0])
    inside = border in chat_tokenizer.decode(plain_ids[0])
    (ids, _), _ = generate(spiky, chat_tokenizer, [prompt], [border])
    assert not inside and ids == plain_ids


def test_strings_without_a_tokenizer_are_one_line():
    with pytest.raises(UserError, match="pass tokenizer"):
        Sampling(8, [2], 0, stop_strings=["x"])


class GoesOn(TransformersEngine):
    """An engine that does not know stop strings."""

    def generate(self, prompt_ids, sampling, n=1):
        plain = Sampling(sampling.max_new_tokens, sampling.stop_ids, sampling.pad_token_id)
        return super().generate(prompt_ids, plain, n)


class TokensOnly(GoesOn):
    def generate(self, prompt_ids, sampling, n=1):
        return Samples(super().generate(prompt_ids, sampling, n).ids, None)


@pytest.mark.parametrize("engine", [None, GoesOn, TokensOnly])
def test_loss_rewards_metrics_and_evaluation_end_at_the_string(make_trainer, tiny_config, chat_tokenizer, engine):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config)
    model.lm_head.weight.data *= 60
    seen = []

    def count(prompts, completions, completion_ids, **columns):
        seen.extend(zip(completions, completion_ids, strict=True))
        return [0.0] * len(completions)

    strings = ["e", "t", "n"]
    options = {} if engine is None else {"engine": engine()}
    trainer = make_trainer(
        model=model,
        reward_funcs=count,
        stop_token_ids=[2],
        max_completion_length=16,
        generation_kwargs={"stop_strings": strings},
        missing_eos_penalty=3.0,
        kl_coef=0.0,
        normalize_rewards=False,
        **options,
    )
    trainer.train()
    rollout = trainer.ppo.rollout
    log = trainer.state.log_history[0]
    stopped = 0
    for text, ids in seen[:8]:
        at_end = any(string in text for string in strings)
        # Nothing but the last token completes a string.
        before = chat_tokenizer.decode(ids[:-1], skip_special_tokens=True)
        assert not any(string in before for string in strings)
        assert at_end or ids[-1] == 2 or len(ids) == 16
        stopped += at_end or ids[-1] == 2
    assert 0 < stopped
    assert log["completions/stopped_frac"] == pytest.approx(stopped / 8)
    assert log["val/num_eos_tokens"] == stopped
    assert log["objective/rlhf_reward"] == pytest.approx(-3.0 * (1 - stopped / 8))  # the penalty of the others
    lengths = rollout.completion_lengths.tolist()
    assert lengths == [len(ids) for _, ids in seen[:8]] and rollout.sequences.mask.sum() == sum(lengths)
    assert torch.all(rollout.old_logprobs[~rollout.sequences.mask] == 0)

    evaluated = trainer.sample_and_score(trainer.train_dataset)
    assert any(row.stopped for row in evaluated)
    for row in evaluated:
        assert row.stopped == (any(string in row.completion for string in strings) or row.completion_ids[-1] == 2)
        assert row.n_tokens == len(row.completion_ids)
