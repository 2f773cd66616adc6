"""A column whose name is nearly right: the refusal names it in the role that it may have."""

import pytest
from datasets import Dataset

from hf_rlhf_ext.readers.formats import UnknownFormat, load_comparisons, load_demonstrations


@pytest.mark.parametrize(
    "names, nearest",
    [
        (("prompt", "choosen", "rejected"), '"chosen": "choosen", "rejected": "rejected"'),  # codespell:ignore
        (("prompt", "chosen", "regected"), '"chosen": "chosen", "rejected": "regected"'),
        (("prompt", "Chosen", "Rejected"), '"chosen": "Chosen", "rejected": "Rejected"'),
    ],
)
def test_comparisons(names, nearest):
    rows = Dataset.from_list([dict(zip(names, ("q", "a", "b"), strict=True))] * 4)
    with pytest.raises(UnknownFormat) as refused:
        load_comparisons(rows)
    assert nearest in str(refused.value) and len(str(refused.value)) < 250


@pytest.mark.parametrize(
    "names, nearest",
    [
        (("prompt", "completon"), '"prompt": "prompt", "completion": "completon"'),
        (("promt", "completion"), '"prompt": "promt", "completion": "completion"'),  # codespell:ignore
        (("question", "answer_a"), '"completion": "…"'),  # one of several answers, not a misspelt one
    ],
)
def test_demonstrations(names, nearest):
    rows = Dataset.from_list([dict(zip(names, ("Is it so?", "It is so."), strict=True))] * 4)
    with pytest.raises(UnknownFormat) as refused:
        load_demonstrations(rows)
    assert nearest in str(refused.value)
