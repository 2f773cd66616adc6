"""One table of speakers, in which case and separators make no difference. Unknown speakers are named."""

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.data.schema import Unusable
from hf_rlhf_ext.data.speakers import SPEAKERS, required_role, role_of
from hf_rlhf_ext.readers.formats import load_comparisons, load_demonstrations

FEW = settings(max_examples=25, deadline=None)


@FEW
@given(
    st.sampled_from(sorted(SPEAKERS)),
    st.sampled_from([str.lower, str.upper, str.title, str.capitalize]),
    st.sampled_from(["_", "-", " ", ""]),
)
def test_case_and_separators_make_no_difference(name, spelled, separator):
    assert role_of(spelled(name).replace("_", separator)) == SPEAKERS[name]


@pytest.mark.parametrize(
    "speaker, role",
    [
        ("User", "user"), ("prompter", "user"), ("Assistant", "assistant"), ("functionCall", "assistant"),
        ("function-call", "assistant"), ("gpt-4", "assistant"), ("developer", "system"), ("ipython", "tool"),
        ("function", "tool"), ("Function-Response", "tool"), ("tool_response", "tool"),
    ],
)  # fmt: skip
def test_speakers_of_published_sets_have_a_role(speaker, role):
    assert role_of(speaker) == role


@pytest.mark.parametrize("speaker", ["narrator", "", "users", 5, None, True, ["user"]])
def test_other_speakers_have_none(speaker):
    assert role_of(speaker) is None
    with pytest.raises(Unusable, match="chat has "):
        required_role(speaker, "chat")


def test_a_row_with_an_unknown_speaker_is_dropped_with_its_name():
    known = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    unknown = {"conversations": [{"from": "human", "value": "q"}, {"from": "narrator", "value": "a"}]}
    long = {"conversations": [{"from": "x" * 500, "value": "q"}, {"from": "gpt", "value": "a"}]}
    _, report = load_demonstrations(Dataset.from_list([known, unknown, long]))
    assert report.kept == 1 and report.dropped["conversations has the unknown speaker 'narrator'"] == [1]
    assert all(len(reason) < 100 for reason in report.dropped)

    def sides(speaker):
        question = {"role": speaker, "content": "q"}
        return {
            "chosen": [question, {"role": "GPT", "content": "a"}],
            "rejected": [question, {"role": "GPT", "content": "b"}],
        }

    dataset, report = load_comparisons(Dataset.from_list([sides("Human"), sides("narrator")]))
    assert dataset[0]["prompt"] == [{"role": "user", "content": "q"}]
    assert dataset[0]["completions"] == [[{"role": "assistant", "content": text}] for text in "ab"]
    assert report.dropped == {"chosen has the unknown speaker 'narrator'": [1]}
