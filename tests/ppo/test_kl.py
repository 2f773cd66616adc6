"""KL estimators compared with the exact KL of a small vocabulary; the adaptive controller computed by hand."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from hf_rlhf_ext.ppo.kl import KL_ESTIMATORS, adapted_kl_coef, kl_k1, kl_k2, kl_k3


@pytest.fixture
def policies():
    """Logits (V,) of a policy and a reference."""
    return torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_estimators_worked_by_hand():
    logprobs, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert kl_k1(logprobs, ref).item() == pytest.approx(math.log(2))
    assert kl_k2(logprobs, ref).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_k3(logprobs, ref).item() == pytest.approx(0.5 - 1 + math.log(2))
    assert set(KL_ESTIMATORS) == {"k1", "k2", "k3"}


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_k1_and_k3_are_unbiased(policies, estimator):
    policy, reference = (Categorical(logits=logits) for logits in policies)
    expectation = (policy.probs * estimator(policy.logits, reference.logits)).sum()
    assert expectation.item() == pytest.approx(kl_divergence(policy, reference).item(), abs=1e-12)


def test_k2_and_k3_are_never_negative_and_k3_varies_less(policies):
    policy, reference = (Categorical(logits=0.2 * logits) for logits in policies)
    k1, k2, k3 = (estimator(policy.logits, reference.logits) for estimator in (kl_k1, kl_k2, kl_k3))
    assert (k1 < 0).any() and (k2 >= 0).all() and (k3 >= 0).all()
    spread = [((policy.probs * k.square()).sum() - (policy.probs * k).sum() ** 2).item() for k in (k1, k3)]
    assert spread[1] < spread[0] / 10


def test_the_gradient_of_k2_as_a_loss_is_the_gradient_of_the_kl(policies):
    logits = policies[0].clone().requires_grad_()
    policy, reference = Categorical(logits=logits), Categorical(logits=policies[1])
    (exact,) = torch.autograd.grad(kl_divergence(policy, reference), logits, retain_graph=True)
    weights = policy.probs.detach()  # samples come from the policy, but are not differentiated through
    losses = {name: (weights * KL_ESTIMATORS[name](policy.logits, reference.logits)).sum() for name in KL_ESTIMATORS}
    found = {name: torch.autograd.grad(loss, logits, retain_graph=True)[0] for name, loss in losses.items()}
    torch.testing.assert_close(found["k2"], exact, rtol=0, atol=1e-12)
    assert found["k1"].abs().max() < 1e-12  # why k1 is refused as a loss
    assert (found["k3"] - exact).abs().max() > 1e-2


@pytest.mark.parametrize(
    "kl, expected",
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 64 / 1000)),  # 10 % over
        (5.4, 0.1 * (1 - 0.1 * 64 / 1000)),
        (60.0, 0.1 * (1 + 0.2 * 64 / 1000)),  # clipped at +0.2
        (-3.0, 0.1 * (1 - 0.2 * 64 / 1000)),  # and at -0.2; a k1 estimate can be negative
    ],
)
def test_the_adaptive_controller_worked_by_hand(kl, expected):
    got = adapted_kl_coef(0.1, kl, kl_target=6.0, kl_horizon=1000, n_sequences=64)
    assert got == pytest.approx(expected, abs=1e-12)


def test_the_coefficient_stays_positive_in_rollouts_of_up_to_five_horizons():
    clip = {"kl_target": 1.0, "kl_horizon": 100}
    assert 0 < adapted_kl_coef(0.1, 0.0, n_sequences=499, **clip) < 1e-3  # what PPOTrainer lets through
    assert adapted_kl_coef(0.1, 0.0, n_sequences=500, **clip) <= 0  # what it refuses
