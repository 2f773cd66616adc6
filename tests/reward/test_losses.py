"""The Bradley-Terry loss against numbers worked by hand, and its gradient against finite differences."""

import math

import pytest
import torch

from hf_rlhf_ext.reward.losses import bradley_terry_loss, centering_penalty


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
