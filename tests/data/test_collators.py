"""The comparison collator, tested for any K, any lengths, duplicates and empty completions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.data.collators import DataCollatorForComparisons, fill_rows
from hf_rlhf_ext.data.tokenization import fit_row, tokenize_row
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.prefix import prefix_mask

PAD = 3
tokens = st.lists(st.integers(0, 9), max_size=6)  # the pad id is an ordinary token too


@st.composite
def comparison(draw):
    # Every completion has at least its stop token. Equal completions are allowed here.
    completions = draw(st.lists(tokens.map(lambda ids: ids + [PAD]), min_size=2, max_size=5))
    index = st.integers(0, len(completions) - 1)
    pairs = draw(st.lists(st.tuples(index, index).filter(lambda p: p[0] != p[1]).map(list), min_size=1, max_size=6))
    floats = st.lists(st.floats(0, 1, width=32), min_size=len(pairs), max_size=len(pairs))
    row = {"prompt_ids": draw(tokens), "completion_ids": completions, "pairs": pairs}
    row |= {"targets": draw(floats), "weights": draw(floats)}
    return row | ({"margins": draw(floats)} if draw(st.booleans()) else {})


@settings(max_examples=150, deadline=None)
@given(st.lists(comparison(), min_size=1, max_size=4))
def test_every_completion_appears_once_after_its_prompt_and_pairs_point_at_it(rows):
    batch = DataCollatorForComparisons(PAD)(rows)
    expected = [row["prompt_ids"] + ids for row in rows for ids in row["completion_ids"]]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == batch["pairs"].dtype == torch.int64
    assert batch["input_ids"].shape == (len(expected), max(map(len, expected))) == batch["attention_mask"].shape
    for ids, mask, sequence in zip(batch["input_ids"], batch["attention_mask"], expected, strict=True):
        n = len(sequence)
        assert ids[:n].tolist() == sequence and set(ids[n:].tolist()) <= {PAD}
        assert mask.tolist() == [1] * n + [0] * (len(mask) - n)  # by length, though PAD occurs inside
    pairs = [(k, i, j) for k, row in enumerate(rows) for i, j in row["pairs"]]
    for (a, b), (k, i, j) in zip(batch["pairs"].tolist(), pairs, strict=True):
        assert expected[a] == rows[k]["prompt_ids"] + rows[k]["completion_ids"][i]
        assert expected[b] == rows[k]["prompt_ids"] + rows[k]["completion_ids"][j] and a != b
    assert batch["prompt_index"].tolist() == [k for k, _, _ in pairs]
    for name in ("targets", "weights", "margins"):
        assert batch[name].dtype == torch.float32
        assert batch[name].tolist() == [x for row in rows for x in row.get(name) or [0.0] * len(row["pairs"])]
    assert batch["completion_counts"].tolist() == [len(row["completion_ids"]) for row in rows]
    assert batch["completion_lengths"].tolist() == [len(ids) for row in rows for ids in row["completion_ids"]]


@settings(max_examples=150, deadline=None)
@given(st.lists(comparison(), min_size=1, max_size=6))
def test_side_by_side_every_completion_sees_its_prompt_and_itself(rows):
    batch = DataCollatorForComparisons(PAD, layout="shared_prefix")(rows)
    expected = [row["prompt_ids"] + ids for row in rows for ids in row["completion_ids"]]
    mask = prefix_mask(batch["segments"], batch["owners"], batch["positions"])[:, 0]
    assert len(batch["score_at"]) == len(expected)
    for (row, column), sequence in zip(batch["score_at"].tolist(), expected, strict=True):
        seen = mask[row, column]
        assert batch["input_ids"][row][seen].tolist() == sequence
        assert batch["positions"][row][seen].tolist() == list(range(len(sequence)))
    tokens = sum(len(row["prompt_ids"]) + sum(map(len, row["completion_ids"])) for row in rows)
    assert (batch["segments"] >= 0).sum() == tokens and batch["input_ids"].shape[0] <= len(rows)
    plain = DataCollatorForComparisons(PAD)(rows)
    for name in ("pairs", "targets", "weights", "margins", "prompt_index", "completion_counts", "categories"):
        assert torch.equal(batch[name], plain[name])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.none() | st.integers(1, 4))
def test_rows_are_filled_and_never_overfull(lengths, height):
    width = max(lengths)
    place = fill_rows(lengths, width, height)
    rows = sorted({row for row in place if row is not None})
    assert rows == list(range(len(rows))) and len(rows) <= (height or len(lengths))
    loads = [sum(n for n, row in zip(lengths, place, strict=True) if row == number) for number in rows]
    assert max(loads) == width  # the longest always finds room
    left = [n for n, row in zip(lengths, place, strict=True) if row is None]
    assert all(load + min(left) > width for load in loads) if left else True
    assert height is not None or not left
    assert sum(load <= width / 2 for load in loads) <= 1  # two half-empty rows would be one


@pytest.mark.parametrize("multiple", [None, 8, 64])
@pytest.mark.parametrize("layout", ["plain", "shared_prefix"])
def test_micro_batches_hold_every_row_once_within_the_budget(layout, multiple):
    lengths = [3, 40, 7, 12, 5, 30, 9, 2, 21]
    pair = {"pairs": [[0, 1]], "targets": [1.0], "weights": [1.0]}
    rows = [
        {"prompt_ids": [1], "completion_ids": [[2] * (n - 2), [4]], "category_code": k} | pair
        for k, n in enumerate(lengths)
    ]
    collator = DataCollatorForComparisons(PAD, layout=layout, max_tokens=64, pad_to_multiple_of=multiple)
    made = collator(rows)
    parts, order = made["micro_batches"], made["order"]
    assert sorted(order) == list(range(9)) == sorted(torch.cat([part["categories"] for part in parts]).tolist())
    assert torch.cat([part["categories"] for part in parts]).tolist() == order
    assert all(part["input_ids"].numel() <= 64 or len(part["categories"]) == 1 for part in parts)
    alone = [collator([row])["micro_batches"][0]["input_ids"].numel() for row in rows]
    assert [collator.size(row) for row in rows] == alone
    if layout == "shared_prefix" and multiple is None:
        assert sum(part["input_ids"].numel() for part in parts) < 1.1 * sum(lengths)  # hardly any padding


def test_pad_to_multiple_of():
    row = {"prompt_ids": [1], "completion_ids": [[2, 4], [4]], "pairs": [[0, 1]], "targets": [1.0], "weights": [1.0]}
    batch = DataCollatorForComparisons(PAD, pad_to_multiple_of=8)([row])
    assert batch["input_ids"].tolist() == [[1, 2, 4, 3, 3, 3, 3, 3], [1, 4, 3, 3, 3, 3, 3, 3]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 2]


def test_unknown_layout_names_what_exists():
    with pytest.raises(UserError, match="layout: 'packed' .*'shared_prefix', 'plain'"):
        DataCollatorForComparisons(PAD, layout="packed")


def test_tokenized_rows_end_in_one_stop_token(chat_tokenizer):
    eos = chat_tokenizer.eos_token_id
    row = {"prompt": [{"role": "user", "content": "hi"}]}
    row["completions"] = [[{"role": "assistant", "content": text}] for text in ("yes", "", "no<|im_end|>")]
    ids = tokenize_row(row, chat_tokenizer)
    assert [c.count(eos) for c in ids["completion_ids"]] == [1, 1, 1]
    assert all(c[-1] == eos for c in ids["completion_ids"]) and ids["completion_ids"][1] == [eos]
    text = chat_tokenizer.decode(ids["prompt_ids"] + ids["completion_ids"][0])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"


def test_overflow_policies_worked_by_hand():
    row = {"prompt_ids": [1, 2, 3, 4], "completion_ids": [[5, 6, 7, 9], [8, 9]]}

    def fit(overflow, max_length=6, row=row):
        return fit_row(row, max_length=max_length, overflow=overflow, where="train row 5")

    assert fit("error", max_length=8) == row
    assert fit("drop") is None
    assert fit("truncate_prompt_left") == {"prompt_ids": [3, 4], "completion_ids": [[5, 6, 7, 9], [8, 9]]}
    assert fit("truncate_completion") == {"prompt_ids": [1, 2, 3, 4], "completion_ids": [[5, 9], [8, 9]]}
    assert fit("truncate_completion", row=row | {"completion_ids": [[8, 6, 9], [8, 9]]}) is None  # equal after the cut
    with pytest.raises(UserError, match=r"^train row 5: .* 2 over max_length=6\. Raise max_length.*overflow='drop'"):
        fit("error")
    with pytest.raises(UserError, match="overflow='truncate_prompt_left' would leave nothing.*Raise max_length"):
        fit("truncate_prompt_left", max_length=4)
    with pytest.raises(UserError, match="overflow='truncate_completion' would leave nothing.*Raise max_length"):
        fit("truncate_completion", max_length=5)


def test_a_cut_prompt_keeps_the_token_that_opens_it():
    row = {"prompt_ids": [9, 1, 2, 3], "completion_ids": [[4], [5]]}
    cut = {"max_length": 3, "overflow": "truncate_prompt_left", "where": "row 0"}
    assert fit_row(row, **cut)["prompt_ids"] == [2, 3]
    assert fit_row(row, **cut, start_ids={9})["prompt_ids"] == [9, 3]
    with pytest.raises(UserError, match="Raise max_length"):
        fit_row(row, **cut | {"max_length": 2}, start_ids={9})
