"""What engines of the user may return: mistakes are one line that names the engine, and harmless forms are taken."""

import numpy as np
import pytest
import torch

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.ppo.engine import Samples, Sampling, TransformersEngine
from hf_rlhf_ext.ppo.engine_check import check_engine, checked_samples

SAMPLING = Sampling(max_new_tokens=4, stop_ids=[2], pad_token_id=0)
PROMPTS = [[7, 8], [9]]
IDS = [[5, 2], [3, 4, 5, 6]]
LOGPROBS = [[-1.0, -0.5], [-0.1, -0.2, -0.3, -0.4]]


class Engine(TransformersEngine):
    """An engine of the user that returns what it is given."""


def check(ids, logprobs=None, samples=None):
    samples = Samples(ids, logprobs) if samples is None else samples
    return checked_samples(samples, PROMPTS, SAMPLING, token_rows=16, engine=Engine())


@pytest.mark.parametrize(
    "ids, logprobs, fragments",
    [
        (IDS[:1], None, ("1 completions for 2 prompts", "next to each other")),
        (IDS * 2, None, ("4 completions for 2 prompts",)),
        ([[5, 2], []], None, ("completion 1 has no tokens", "stop token")),
        ([[5, 2], [3, 16]], None, ("token 16", "16 tokens")),
        ([[5, -1], [3]], None, ("token -1",)),
        ([[5.0, 2.0], [3.0]], None, ("5.0", "token ids")),
        (["ab", "c"], None, ("'a'", "token ids")),
        (IDS, LOGPROBS[:1], ("log-probabilities of 1 completions",)),
        (IDS, [[-1.0], LOGPROBS[1]], ("completion 0 has 2 tokens, but 1", "stop token included")),
        (IDS, [[-1.0, float("nan")], LOGPROBS[1]], ("nan", "or None")),
        (IDS, [[-1.0, float("-inf")], LOGPROBS[1]], ("-inf", "or None")),
        (IDS, [[0.9, 0.7], LOGPROBS[1]], ("0.9", "at most 0")),  # probabilities
        (IDS, [[-1.0, None], LOGPROBS[1]], ("None", "for all")),
    ],
)
def test_a_mistake_is_one_line_that_names_the_engine(ids, logprobs, fragments):
    with pytest.raises(UserError) as error:
        check(ids, logprobs)
    message = str(error.value)
    assert message.startswith("engine: Engine.generate") and "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("samples", [IDS, None, {"ids": IDS}])
def test_something_else_than_samples_is_one_line(samples):
    with pytest.raises(UserError, match=r"Engine.generate returned .*: return Samples"):
        check(None, samples=samples if samples is not None else [])


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_tensors_arrays_and_tuples_are_taken_as_lists(kind):
    ids, logprobs = check([kind(row) for row in IDS], [kind(row) for row in LOGPROBS])
    assert ids == IDS and all(type(token) is int for row in ids for token in row)
    for values, expected in zip(logprobs, LOGPROBS, strict=True):
        assert values == pytest.approx(expected)
    assert check(None, samples=(IDS, LOGPROBS)) == Samples(IDS, LOGPROBS)


def test_one_padded_tensor_and_tokens_after_the_end_are_cut():
    padded = torch.tensor([[5, 2, 0, 0, 0], [3, 4, 5, 6, 9]])
    ids, logprobs = check(padded, -torch.ones(2, 5))
    assert ids == IDS and [len(values) for values in logprobs] == [2, 4]


def test_a_completion_without_its_stop_token_is_a_warning_once(caplog):
    for _ in range(2):
        check([[5], [3, 4, 5, 6]])
    lines = [record.message for record in caplog.records if "does not end with a stop token" in record.message]
    assert len(lines) == 1 and "Engine.generate" in lines[0]


@pytest.mark.parametrize(
    "engine, fragments", [(object(), ("object", "sync(policy)")), (Engine, ("is the class", "engine=Engine("))]
)
def test_an_object_that_is_no_engine_is_one_line(engine, fragments):
    with pytest.raises(UserError) as error:
        check_engine(engine)
    for fragment in fragments:
        assert fragment in str(error.value)


class Altered(TransformersEngine):
    """An engine whose completions are changed by a function of prompts and samples."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def generate(self, prompt_ids, sampling, n=1):
        return self.change(prompt_ids, super().generate(prompt_ids, sampling, n))


def with_prompts(prompt_ids, samples):
    return Samples([[*prompt, *ids] for prompt, ids in zip(prompt_ids, samples.ids, strict=True)], None)


def in_tensors(prompt_ids, samples):
    return Samples([torch.tensor(ids) for ids in samples.ids], [torch.tensor(values) for values in samples.logprobs])


def past_the_stop(prompt_ids, samples):
    return Samples([[*ids, 6, 7] for ids in samples.ids], [[*values, -1.0, -1.0] for values in samples.logprobs])


def test_a_trainer_refuses_completions_that_include_the_prompt(make_trainer):
    trainer = make_trainer(engine=Altered(with_prompts), max_steps=1)
    with pytest.raises(UserError, match=r"engine: .* begins with the tokens of its prompt"):
        trainer.train()


@pytest.mark.parametrize("change", [in_tensors, past_the_stop])
def test_a_trainer_learns_the_same_from_other_forms_of_the_same_completions(make_trainer, change):
    options = {"max_steps": 1, "num_mini_batches": 1, "num_ppo_epochs": 1}
    logs = []
    for engine in (TransformersEngine(), Altered(change)):
        trainer = make_trainer(engine=engine, **options)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for name in ("loss", "completions/mean_length", "sampling/logprob_mismatch"):
        assert logs[0][name] == pytest.approx(logs[1][name], abs=1e-6)


def test_a_trainer_refuses_too_few_completions(make_trainer):
    trainer = make_trainer(engine=Altered(lambda prompts, samples: Samples(samples.ids[:-1], None)), max_steps=1)
    with pytest.raises(UserError, match="engine: Altered"):
        trainer.train()
    with pytest.raises(UserError, match="is the class"):
        make_trainer(engine=TransformersEngine)
