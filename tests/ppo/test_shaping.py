"""Running moments compared with those of all values at once; penalties and PAR computed by hand."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.ppo.shaping import (
    RunningMoments,
    length_penalty,
    preference_as_reward,
    shape_scores,
    soft_overlong_penalty,
)


def moments_of(parts):
    moments = RunningMoments()
    for part in parts:
        moments = moments.update(part)
    return moments


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8), seed=st.integers(0, 999), shift=st.integers(-50, 50))
def test_moments_are_those_of_everything_concatenated(sizes, seed, shift):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, generator=generator, dtype=torch.float64) * n + shift for n in sizes]
    moments = moments_of(parts)
    variance, mean = torch.var_mean(torch.cat(parts), correction=0)
    assert moments.count == sum(sizes)
    assert moments.mean == pytest.approx(mean.item(), rel=1e-12, abs=1e-12)
    assert moments.std == pytest.approx(variance.sqrt().item(), rel=1e-12, abs=1e-12)


def test_moments_of_fp32_scores_far_from_zero_keep_their_digits():
    parts = (1e4 + torch.randn(20, 100, generator=torch.Generator().manual_seed(0))).unbind()
    moments = moments_of(parts)
    variance, mean = torch.var_mean(torch.cat(parts).double(), correction=0)
    assert moments.mean == pytest.approx(mean.item(), abs=1e-9)  # fp32 itself: 1e-3
    assert moments.std == pytest.approx(variance.sqrt().item(), rel=1e-9)


def test_the_start_and_a_batch_of_several_dimensions():
    start = RunningMoments()
    assert (start.count, start.mean, start.std) == (0, 0.0, 1.0)
    moments = start.update(torch.tensor([[1.0, 3.0], [5.0, 7.0]]))
    assert (moments.count, moments.mean, moments.m2) == (4, 4.0, 20.0)
    assert start == RunningMoments()  # an update changes nothing in place


def test_moments_survive_json_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(6, 5, generator=generator).unbind()
    before = moments_of(parts[:3])
    loaded = RunningMoments.from_dict(json.loads(json.dumps(before.to_dict())))
    assert loaded == before
    for part in parts[3:]:
        before, loaded = before.update(part), loaded.update(part)
    assert loaded == before


def test_length_costs_beyond_the_target_only():
    found = length_penalty(torch.tensor([1, 10, 11, 30]), 0.5, 10)
    assert found.tolist() == [0.0, 0.0, 0.5, 10.0] and found.dtype == torch.float32
    assert length_penalty(torch.tensor([3]), 0.1, 0).item() == pytest.approx(0.3)


def test_the_overlong_penalty_grows_in_its_zone_only():
    # L_max = 10, zone 4: 0 up to 6 tokens, then (6 - length) / 4.
    completions = [[5] * length for length in (1, 6, 7, 8, 10)]
    found = soft_overlong_penalty(completions, 10, 4)
    assert found.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0] and found.dtype == torch.float32
    assert soft_overlong_penalty([[5], [5, 5]], 2, 2).tolist() == [-0.5, -1.0]  # the zone may be all of it


def test_par_is_the_mean_probability_of_being_preferred():
    # sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4, sigmoid(0) = 1/2.
    third = math.log(3.0)
    scores = torch.tensor([third, 0.0, 2.0], dtype=torch.float64)
    references = torch.tensor([[0.0, third], [third, 0.0], [2.0, math.nan]], dtype=torch.float64)
    expected = torch.tensor([(0.75 + 0.5) / 2, (0.25 + 0.5) / 2, 0.5], dtype=torch.float64)
    torch.testing.assert_close(preference_as_reward(scores, references), expected, rtol=0, atol=1e-12)


def test_par_is_bounded_and_reads_differences_only():
    scores = torch.tensor([1e6, -1e6, 3.5])
    references = torch.tensor([[0.0], [0.0], [1.5]])
    found = preference_as_reward(scores, references)
    assert found[:2].tolist() == [1.0, 0.0]
    shifted = preference_as_reward(scores[2:] + 64.0, references[2:] + 64.0)
    assert shifted.tolist() == found[2:].tolist() == pytest.approx([1 / (1 + math.exp(-2))])


def test_the_overlong_penalty_comes_after_scale_normalization_and_clip():
    scores = torch.tensor([0.0, 10.0])
    options = {"scale": 3.0, "clip": 1.0, "overlong": torch.tensor([-0.5, -1.0]), "overlong_weight": 2.0}
    shaped = shape_scores(scores, torch.tensor([4, 5]), torch.tensor([True, True]), RunningMoments(), **options)
    assert shaped.scores.tolist() == [-1.0, -1.0]  # 0 - 2 * 0.5, and 1 - 2 * 1
    assert shaped.moments == RunningMoments()
