"""Held-out prompts in training data: each kind of leak, and templates, which are none."""

import gzip
import json
import os
from pathlib import Path

import pytest

from hf_rlhf_ext.study.leaks import find_leaks
from recipes.quickstart_parts.data import make_prompts

STORY = (
    "Anna went to the market early in the morning because she wanted fresh bread for her mother who was ill and could "
    "not leave the house before the doctor came"
)
TRAIN = ["What is the capital of France?", f"Summarize this text. {STORY}", "Name a color."]


@pytest.mark.parametrize(
    ("prompt", "kind", "train_row"),
    [
        ("What is the capital of France?", "exact", 0),
        ("what is the  CAPITAL of france", "normalized", 0),
        (f"Summarize this text. {STORY.replace('fresh', 'warm')}", "near", 1),
        (" ".join(STORY.split()[:16]), "contained", 1),
        ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a color."}], "exact", 2),
    ],
)
def test_each_kind_of_leak_is_found(prompt, kind, train_row):
    leaks = find_leaks(TRAIN, ["Tell me a joke about a cat.", prompt])
    assert [(leak.row, leak.train_row, leak.kind) for leak in leaks.found] == [(1, train_row, kind)]
    assert leaks.keep() == [0]
    described = leaks.as_dict()
    assert described["leaked"] == 1
    assert described["kinds"][kind] == 1
    assert described["examples"][0]["train_row"] == train_row


def test_prompts_of_one_template_are_no_leaks():
    template = "Write a short story in simple words for small children about {} and give it a title that fits to it."
    train = [template.format(f"number {k}") for k in range(20)]
    heldout = [template.format(f"letter {k}") for k in range(20)]
    assert find_leaks(train, heldout).found == ()
    # The same one is a leak nevertheless.
    assert [leak.kind for leak in find_leaks(train, [train[3]]).found] == ["exact"]


def test_few_of_the_quickstart_prompts_are_taken_for_leaks():
    heldout = [row["prompt"] for row in make_prompts(100, split="heldout")]
    for n in (200, 600):
        train = [row["prompt"] for row in make_prompts(n)]
        assert len(find_leaks(train, heldout).found) <= 2
        planted = [*heldout[:90], *train[:10]]
        found = find_leaks(train, planted)
        assert {leak.row for leak in found.found} >= set(range(90, 100))


def test_leaks_of_real_prompts():
    shared = os.environ.get("RLHF_SHARED")
    if not shared:
        pytest.skip("RLHF_SHARED is not set")
    with gzip.open(Path(shared) / "data" / "hh_harmless_test.jsonl.gz", "rt") as lines:
        prompts = [json.loads(line)["chosen"].rpartition("\n\nAssistant:")[0] for line in lines][:1200]
    train, heldout = prompts[:1000], prompts[1000:]
    found = find_leaks(train, heldout)
    # Conversations that go on from one of the training rows, but no others.
    assert len(found.found) <= 0.1 * len(heldout)
    shouted = [prompt.upper() for prompt in train[:100]]
    assert len(find_leaks(train, shouted).found) == 100
