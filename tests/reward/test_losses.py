"""The Bradley-Terry loss compared with numbers computed by hand, and its gradient with finite differences."""

import math
from itertools import combinations, permutations

import pytest
import torch

from hf_rlhf_ext.reward.losses import (
    bradley_terry_loss,
    centering_penalty,
    plackett_luce_loss,
    ranking_of,
    smooth_targets,
    tie_model_loss,
)


def f64(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize(
    "i, j, target, weight, margin, expected",
    [
        (math.log(3), 0.0, 1.0, 1.0, 0.0, math.log(4 / 3)),  # σ(log 3) = 3/4
        (math.log(3), 0.0, 0.0, 1.0, 0.0, math.log(4)),
        (0.0, math.log(3), 1.0, 0.5, 0.0, math.log(4) / 2),
        (math.log(3), 0.0, 0.5, 1.0, 0.0, (math.log(4 / 3) + math.log(4)) / 2),
        (math.log(6), 0.0, 1.0, 1.0, math.log(2), math.log(4 / 3)),  # Δ - m = log 3
        (0.0, math.log(6), 0.0, 1.0, -math.log(2), math.log(4 / 3)),  # the same pair told from the other side
        (7.0, 7.0, 1.0, 2.0, 0.0, 2 * math.log(2)),
        (-800.0, 800.0, 1.0, 1.0, 0.0, 1600.0),  # no overflow
    ],
)
def test_bradley_terry_loss_worked_by_hand(i, j, target, weight, margin, expected):
    loss = bradley_terry_loss(f64(i), f64(j), f64(target), f64(weight), f64(margin))
    assert loss.tolist() == [pytest.approx(expected, rel=1e-12)]


def test_gradient_is_weight_times_probability_error():
    # dloss/dΔ = w (σ(Δ - m) - t)
    i, j = f64(1.5, -0.2, 0.0, grad=True), f64(0.3, 0.4, 0.0, grad=True)
    target, weight, margin = f64(1.0, 0.3, 0.5), f64(1.0, 2.0, 0.7), f64(0.1, -0.4, 0.0)
    bradley_terry_loss(i, j, target, weight, margin).sum().backward()
    expected = weight * (torch.sigmoid(i - j - margin) - target)
    torch.testing.assert_close(i.grad, expected.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(j.grad, -expected.detach(), rtol=1e-12, atol=1e-14)


def test_gradcheck():
    i, j, m = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    t, w = torch.rand(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda i, j, m: bradley_terry_loss(i, j, t, w, m), (i, j, m))
    assert torch.autograd.gradcheck(lambda i, j: centering_penalty(i, j, w), (i, j))


def test_no_margin_is_a_margin_of_zero():
    i, j, t, w = (torch.rand(5, dtype=torch.float64) for _ in range(4))
    assert torch.equal(bradley_terry_loss(i, j, t, w), bradley_terry_loss(i, j, t, w, torch.zeros_like(i)))


def test_centering_penalty_worked_by_hand():
    assert centering_penalty(f64(2.0, -1.0), f64(1.0, 1.0), f64(0.5, 3.0)).tolist() == [4.5, 0.0]


@pytest.mark.parametrize("model", ["rao_kupper", "davidson"])
@pytest.mark.parametrize("delta", [-30.0, -1.3, 0.0, 0.4, 8.0])
@pytest.mark.parametrize("threshold", [0.01, 0.7, 3.0])
def test_tie_models_are_their_equations(model, delta, threshold):
    i, j, one = f64(delta + 0.2, delta + 0.2, delta + 0.2), f64(0.0, 0.0, 0.0), f64(1.0, 1.0, 1.0)
    loss = tie_model_loss(i, j, f64(1.0, 0.5, 0.0), one, f64(0.2, 0.2, 0.2), model=model, threshold=threshold)
    if model == "rao_kupper":
        theta, a, b = math.exp(threshold), math.exp(delta), 1.0  # Rao & Kupper (1967), eq. 2.5
        win, lose = a / (a + theta * b), b / (theta * a + b)
        tie = (theta**2 - 1) * a * b / ((a + theta * b) * (theta * a + b))
    else:
        a, b = math.exp(delta / 2), math.exp(-delta / 2)  # Davidson (1970), eq. 2.5 with strengths e^r
        win, tie, lose = (x / (a + b + threshold) for x in (a, threshold, b))
    assert win + tie + lose == pytest.approx(1, abs=1e-12)
    assert torch.exp(-loss).tolist() == pytest.approx([win, tie, lose], rel=1e-9)


def test_tie_models_share_soft_targets_and_refuse_nonsense():
    i, j, w = f64(0.3), f64(0.0), f64(2.0)
    parts = [tie_model_loss(i, j, f64(t), w, model="davidson", threshold=1.0) for t in (1.0, 0.0, 0.75)]
    torch.testing.assert_close(parts[2], 0.75 * parts[0] + 0.25 * parts[1])
    for options in ({"model": "soft", "threshold": 1.0}, {"model": "davidson", "threshold": 0.0}):
        with pytest.raises(ValueError, match="and a positive threshold"):
            tie_model_loss(i, j, w, w, **options)


def test_gradcheck_of_ties_and_rankings():
    i, j = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    t, w = f64(1, 0, 0.5, 0.5, 0.3, 1), torch.rand(6, dtype=torch.float64)
    for model in ("rao_kupper", "davidson"):
        check = torch.autograd.gradcheck(
            lambda i, j, m=model: tie_model_loss(i, j, t, w, model=m, threshold=0.6), (i, j)
        )
        assert check
    assert torch.autograd.gradcheck(plackett_luce_loss, (i,))


def test_smoothing_moves_wins_and_leaves_ties():
    assert smooth_targets(f64(1.0, 0.0, 0.5, 0.8), 0.2).tolist() == pytest.approx([0.9, 0.1, 0.5, 0.74])


def test_plackett_luce_sums_to_one_over_all_rankings_and_is_bradley_terry_for_two():
    scores = f64(0.3, -1.2, 0.9, 0.0)
    total = sum(torch.exp(-plackett_luce_loss(scores[list(order)])) for order in permutations(range(4)))
    assert total.item() == pytest.approx(1, abs=1e-12)
    pair = bradley_terry_loss(scores[:1], scores[1:2], f64(1.0), f64(1.0))
    torch.testing.assert_close(plackett_luce_loss(scores[:2]), pair[0])


def test_a_ranking_is_read_from_pairs_or_there_is_none():
    order = [2, 0, 3, 1]
    pairs = [(b, a) if (a + b) % 2 else (a, b) for a, b in combinations(range(4), 2)]
    targets = f64(*(float(order.index(i) < order.index(j)) for i, j in pairs))
    assert ranking_of(torch.tensor(pairs), targets, 4).tolist() == order
    assert ranking_of(torch.tensor(pairs[:-1]), targets[:-1], 4) is None  # a pair is missing
    assert ranking_of(torch.tensor(pairs), targets.where(targets == 1, 0.5), 4) is None  # ties
    twice = torch.tensor([(0, 1), (1, 0), (1, 2)])  # nobody has compared 0 and 2
    assert ranking_of(twice, f64(1.0, 0.0, 1.0), 3) is None
    circle = torch.tensor([(0, 1), (1, 2), (2, 0)])
    assert ranking_of(circle, f64(1.0, 1.0, 1.0), 3) is None
