"""Perplexity against the model's own loss, and exact match against plain greedy generation."""

import json
import math
from collections import Counter

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_rlhf_ext import load_policy
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.study.alignment_tax import (
    Item,
    _greedy_tokens,
    default_items,
    exact_match,
    is_match,
    load_items,
    perplexity,
    tax_table,
)

TEXTS = ["Tell me about a sunny day in the garden.", "Größe 12 – ok", "The quick brown fox jumps over it, many words!"]


def nats_of(model, ids, first):
    """Sum of -log p of the tokens from `first` on, from the logits of a plain forward pass."""
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(logprobs[place - 1, ids[place]].item() for place in range(first, len(ids)))


def test_perplexity_is_that_of_plain_forward_passes(tiny_llama, chat_tokenizer):
    model = tiny_llama.eval()
    rows = [chat_tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    nats = [nats_of(model, ids, 1) for ids in rows]  # no bos: nothing predicts the first token
    found = perplexity(model, chat_tokenizer, TEXTS, max_tokens_per_batch=64)
    assert found["nats"] == pytest.approx(nats, rel=1e-5)
    tokens = sum(len(ids) - 1 for ids in rows)
    first_bytes = sum(len(chat_tokenizer.decode(ids[:1]).encode()) for ids in rows)
    n_bytes = sum(len(text.encode()) for text in TEXTS) - first_bytes
    assert (found["tokens"], found["bytes"], found["texts"], found["windows"]) == (tokens, n_bytes, 3, 3)
    assert found["nats_per_token"] == pytest.approx(sum(nats) / tokens, rel=1e-5)
    assert found["nats_per_byte"] == pytest.approx(sum(nats) / n_bytes, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / tokens), rel=1e-4)


def test_a_bos_token_predicts_the_first_token(tiny_llama, chat_tokenizer):
    chat_tokenizer.bos_token = "<|im_start|>"
    ids = chat_tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    found = perplexity(tiny_llama.eval(), chat_tokenizer, TEXTS[:1])
    assert found["tokens"] == len(ids) and found["bytes"] == len(TEXTS[0].encode())
    expected = nats_of(tiny_llama, [chat_tokenizer.bos_token_id, *ids], 1)
    assert found["nats"] == [pytest.approx(expected, rel=1e-5)]


def test_a_long_text_is_read_in_windows_that_overlap_by_half(tiny_llama, chat_tokenizer):
    model = tiny_llama.eval()
    ids = chat_tokenizer(" ".join(TEXTS), add_special_tokens=False)["input_ids"]
    window = 8
    # By hand: tokens 1 to 7 in the first window, then 4 new tokens after 4 of context each.
    expected = nats_of(model, ids[:window], 1)
    n_windows = 1
    for start in range(4, len(ids) - 4, 4):
        expected += nats_of(model, ids[start : start + window], 4)
        n_windows += 1
    found = perplexity(model, chat_tokenizer, [" ".join(TEXTS)], max_tokens=window)
    assert found["nats"] == [pytest.approx(expected, rel=1e-5)]
    assert (found["windows"], found["tokens"], found["texts"]) == (n_windows, len(ids) - 1, 1)


def test_texts_without_a_token_to_predict_are_refused(tiny_llama, chat_tokenizer):
    assert perplexity(tiny_llama, chat_tokenizer, [*TEXTS, ""])["texts"] == 3
    with pytest.raises(UserError, match="other plain texts"):
        perplexity(tiny_llama, chat_tokenizer, [""])
    with pytest.raises(UserError, match="max_tokens=3"):
        perplexity(tiny_llama, chat_tokenizer, TEXTS, max_tokens=3)


# --- exact match ------------------------------------------------------------------------------------------------------


def test_continuations_are_those_of_greedy_generation(stories_path):
    model, tokenizer = load_policy(stories_path)
    model.generation_config.repetition_penalty = 5.0  # of the model, which a measurement must not have
    items = default_items()
    found = exact_match(model, tokenizer, items, batch_size=7)
    model.generation_config.repetition_penalty = None
    for item, match in list(zip(items, found["matches"], strict=True))[::9]:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(item.prompt, add_special_tokens=False)["input_ids"]]])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=-1
        )
        assert is_match(tokenizer.decode(output[0, ids.shape[1] :]), item.answers) == match, item
    # The story model knows some and not all: a loss and a gain would both be seen.
    assert 0.2 < found["accuracy"] < 0.7
    low, high = found["wilson"]
    assert low < found["accuracy"] < high and found["right"] == sum(found["matches"]) and found["n"] == 70
    assert sum(kind["right"] for kind in found["kinds"].values()) == found["right"]


def test_padding_of_a_batch_does_not_change_positions(chat_tokenizer):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": len(chat_tokenizer)}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()  # learned positions, which a shift would change
    torch.nn.init.normal_(model.transformer.wpe.weight)
    prompts = [chat_tokenizer(text)["input_ids"] for text in ("Tell", "Tell me about a sunny day", "many words")]
    alone = [_greedy_tokens(model, [ids], 5)[0] for ids in prompts]
    assert _greedy_tokens(model, prompts, 5) == alone and len(set(map(tuple, alone))) > 1


def test_the_wilson_interval_is_that_of_the_formula(tiny_llama, chat_tokenizer):
    found = exact_match(tiny_llama, chat_tokenizer, [Item("Tell me", ("about",))] * 4)
    z = 1.959963984540054
    p, n = found["accuracy"], 4
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert found["wilson"] == pytest.approx([max(0, middle - half), min(1, middle + half)], abs=1e-9)


@pytest.mark.parametrize(
    "continuation, is_right",
    [(" ball.", True), ("Ball under", True), ("\n“ball", True), (" balls", False), (" red ball", False), ("", False)],
)
def test_a_match_is_the_whole_first_word(continuation, is_right):
    assert is_match(continuation, ["ball"]) is is_right
    assert is_match("the red ball rolled", ["dog", "The red ball"])


def test_the_shipped_items_have_no_answer_that_is_right_for_most_or_given_away():
    items = default_items()
    assert len({item.prompt for item in items}) == len(items) == 70
    assert set(Counter(item.kind for item in items).values()) == {10}
    answers = Counter(answer for item in items for answer in item.answers)
    assert answers.most_common(1)[0][1] <= 10
    for item in items:
        assert item.prompt.split()[-1].lower() not in {answer.lower() for answer in item.answers}
        assert item.prompt == item.prompt.strip()


def test_items_of_a_file_are_read_and_wrong_ones_are_named(tmp_path):
    path = tmp_path / "items.jsonl"
    rows = [{"prompt": "One, two, ", "answer": "three"}, {"prompt": "A", "answers": ["b", "B"], "kind": "letters"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [Item("One, two,", ("three",)), Item("A", ("b", "B"), "letters")]
    assert load_items(path) == expected
    (tmp_path / "items.yaml").write_text(json.dumps(rows))
    assert load_items(tmp_path / "items.yaml") == expected
    for row, message in (
        ({"prompt": ""}, "row 0: `prompt`"),
        ({"prompt": "x", "answers": ["..."]}, "`answers`"),
        ({"prompt": "x", "answers": []}, "`answers`"),
        ({"prompt": "x", "answer": "y", "reply": "z"}, "'reply' is unknown"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(UserError, match=message):
            load_items(path)
    with pytest.raises(UserError, match="missing"):
        load_items(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="no items"):
        exact_match(None, None, [])


def test_the_table_shows_before_and_after():
    before = {
        "perplexity": {"nats_per_token": 3.0, "nats_per_byte": 0.7, "perplexity": 20.09},
        "exact_match": {"right": 3, "n": 4, "accuracy": 0.75, "wilson": [0.3, 0.954]},
    }
    after = {"ppo": {"perplexity": {"nats_per_token": 3.25, "nats_per_byte": 0.8, "perplexity": 25.8}}, "failed": {}}
    lines = tax_table(before, after, name="sft").splitlines()
    assert lines[2] == "| sft | 3.000 | 0.700 | 20.09 | – | 3 of 4 (75.0%) | 30.0% to 95.4% |"
    assert lines[3] == "| ppo | 3.250 | 0.800 | 25.80 | +0.250 | – | – |"
    assert lines[4] == "| failed | – | – | – | – | – | – |"
    assert {line.count("|") for line in lines} == {8}
