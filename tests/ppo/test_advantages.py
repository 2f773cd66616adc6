"""Token rewards, GAE, whitening and explained variance: computed by hand, and with the definition as a double loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rlhf_ext.ppo.advantages import (
    completion_mask,
    explained_variance,
    generalized_advantages,
    lambda_returns,
    length_adaptive_lambda,
    token_rewards,
    whiten,
)

NAN = float("nan")


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_completion_mask():
    assert completion_mask(torch.tensor([1, 3]), 3).tolist() == [[True, False, False], [True, True, True]]


def test_token_rewards_worked_by_hand():
    kl = f64([[1.0, -2.0, NAN], [0.5, 1.0, 3.0]])
    got = token_rewards(f64([10.0, -1.0]), kl, torch.tensor([2, 3]), kl_coef=0.1)
    # The score is on the last emitted token, the stop token itself, and nowhere else.
    torch.testing.assert_close(got, f64([[-0.1, 10.2, 0.0], [-0.05, -0.1, -1.3]]), rtol=0, atol=1e-12)


def test_dense_rewards_worked_by_hand():
    kl, dense = f64([[1.0, -2.0, NAN], [0.5, 1.0, 3.0]]), f64([[5.0, 7.0, NAN], [0.0, 0.0, 20.0]])
    got = token_rewards(f64([10.0, -1.0]), kl, torch.tensor([2, 3]), kl_coef=0.1, dense=dense)
    torch.testing.assert_close(got, f64([[4.9, 17.2, 0.0], [-0.05, -0.1, 18.7]]), rtol=0, atol=1e-12)
    half = token_rewards(f64([0.0, 0.0]), kl, torch.tensor([2, 3]), kl_coef=0.1, dense=dense.float())
    assert half.dtype == torch.float64


def test_a_score_paid_in_parts_gives_the_same_return():
    # With γ = λ = 1 and no critic, an advantage is what is still to be earned: at the first token, all of it.
    lengths, kl = torch.tensor([3, 1, 4]), torch.zeros(3, 4, dtype=torch.float64)
    mask, dense = completion_mask(lengths, 4), torch.randn(3, 4, dtype=torch.float64)
    for paid in (
        token_rewards(torch.zeros(3), kl, lengths, kl_coef=0.0, dense=dense),
        token_rewards((dense * mask).sum(1), kl, lengths, kl_coef=0.0),
    ):
        advantages, _ = generalized_advantages(paid, torch.zeros_like(paid), mask, gamma=1.0, gae_lambda=1.0)
        torch.testing.assert_close(advantages[:, 0], (dense * mask).sum(1), rtol=0, atol=1e-12)


def test_token_rewards_sum_to_score_minus_kl():
    kl, lengths = torch.randn(5, 7, dtype=torch.float64), torch.tensor([1, 2, 7, 4, 6])
    mask, scores = completion_mask(lengths, 7), torch.randn(5, dtype=torch.float64)
    got = token_rewards(scores, kl, lengths, kl_coef=0.3).sum(1)
    torch.testing.assert_close(got, scores - 0.3 * (kl * mask).sum(1), rtol=0, atol=1e-12)


def test_gae_worked_by_hand():
    # γ = ½, λ = ½. δ = [1 + ½·4 - 2, 3 + 0 - 4] = [1, -1]; A = [1 + ¼·(-1), -1] = [0.75, -1]; returns = A + V.
    mask = torch.tensor([[True, True, False]])
    advantages, returns = generalized_advantages(
        f64([[1.0, 3.0, NAN]]), f64([[2.0, 4.0, 1e30]]), mask, gamma=0.5, gae_lambda=0.5
    )
    assert advantages.tolist() == [[0.75, -1.0, 0.0]]
    assert returns.tolist() == [[2.75, 3.0, 0.0]]


def gae_by_definition(rewards, values, length, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} - V_t (arXiv:1506.02438, eq. 16), as a double loop."""
    values = [*values[:length], 0.0]
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t)) for t in range(length)]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    seed=st.integers(0, 1000),
    extra=st.integers(0, 2),
)
def test_gae_equals_the_double_loop(lengths, gamma, lam, seed, extra):
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths) + extra
    rewards, values = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = completion_mask(torch.tensor(lengths), shape[1])
    dirty = (x.masked_fill(~mask, NAN) for x in (rewards, values))
    advantages, returns = generalized_advantages(*dirty, mask, gamma=gamma, gae_lambda=lam)
    for row, length in enumerate(lengths):
        expected = f64(gae_by_definition(rewards[row].tolist(), values[row].tolist(), length, gamma, lam))
        torch.testing.assert_close(advantages[row, :length], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(returns[row, :length], expected + values[row, :length], rtol=0, atol=1e-12)
        assert not advantages[row, length:].any() and not returns[row, length:].any()


def gae_by_loop(rewards, values, mask, gamma, lam):
    """The recursion as a loop over tokens, in the dtype of the arguments."""
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    running, next_values = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + gamma * next_values - values[:, t] + gamma * lam * running
        advantages[:, t], next_values = running, values[:, t]
    return advantages.masked_fill(~mask, 0.0), advantages.masked_fill(~mask, 0.0) + values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 2), (64, 40), (5, 300)])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.5, 0.0), (0.0, 1.0)])
def test_gae_equals_the_loop_over_tokens_to_the_bit(rows, width, gamma, lam, dtype):
    rewards, values = 10 * torch.randn(2, rows, width, dtype=dtype)
    mask = completion_mask(torch.randint(1, width + 1, (rows,)), width)
    got = generalized_advantages(rewards, values, mask, gamma=gamma, gae_lambda=lam)
    expected = gae_by_loop(rewards, values, mask, gamma, lam)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert got[0].dtype == dtype and got[0].is_contiguous()


def test_gae_with_lambda_one_is_the_discounted_return():
    rewards, values = torch.randn(2, 1, 5, dtype=torch.float64)
    _, returns = generalized_advantages(rewards, values, torch.ones(1, 5, dtype=torch.bool), gamma=0.9, gae_lambda=1.0)
    expected = [sum(0.9**k * rewards[0, t + k].item() for k in range(5 - t)) for t in range(5)]
    torch.testing.assert_close(returns[0], f64(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_a_lambda_of_each_completion_equals_the_double_loop(gamma):
    lengths = torch.tensor([5, 1, 3, 6])
    lambdas = torch.tensor([0.9, 0.3, 0.0, 1.0])
    rewards, values = torch.randn(2, 4, 6, dtype=torch.float64)
    mask = completion_mask(lengths, 6)
    dirty = [x.masked_fill(~mask, NAN) for x in (rewards, values)]
    advantages, returns = generalized_advantages(*dirty, mask, gamma=gamma, gae_lambda=lambdas.double())
    of_returns = lambda_returns(*dirty, mask, gamma=gamma, gae_lambda=lambdas.double())
    for row, length in enumerate(lengths.tolist()):
        lam = lambdas.double()[row].item()
        expected = f64(gae_by_definition(rewards[row].tolist(), values[row].tolist(), length, gamma, lam))
        torch.testing.assert_close(advantages[row, :length], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(returns[row, :length], expected + values[row, :length], rtol=0, atol=1e-12)
        torch.testing.assert_close(of_returns[row, :length], expected + values[row, :length], rtol=0, atol=1e-12)
    assert not advantages[~mask].any() and not of_returns[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_lambdas_of_all_completions_are_one_lambda_to_the_bit(dtype):
    lam = 0.875  # exact in fp32
    rewards, values = 10 * torch.randn(2, 16, 30, dtype=dtype)
    mask = completion_mask(torch.randint(1, 31, (16,)), 30)
    one = generalized_advantages(rewards, values, mask, gamma=1.0, gae_lambda=lam)
    each = generalized_advantages(rewards, values, mask, gamma=1.0, gae_lambda=torch.full((16,), lam))
    assert torch.equal(each[0], one[0]) and torch.equal(each[1], one[1])
    assert each[0].dtype == dtype and each[0].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [1.0, 0.99])
def test_returns_with_lambda_one_are_those_of_monte_carlo_to_the_bit(gamma, dtype):
    rewards, values = 10 * torch.randn(2, 16, 30, dtype=dtype)
    mask = completion_mask(torch.randint(1, 31, (16,)), 30)
    expected = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(30)):
        running = rewards.masked_fill(~mask, 0.0)[:, t] + gamma * running
        expected[:, t] = running
    got = lambda_returns(rewards, 1e6 * values, mask, gamma=gamma, gae_lambda=1.0)
    assert torch.equal(got, expected.masked_fill(~mask, 0.0))  # no value enters, not even through rounding


def test_returns_with_lambda_zero_look_one_token_ahead():
    # G_t = r_t + γ V_{t+1}: [1 + ½·4, 3]
    mask = torch.tensor([[True, True, False]])
    rewards, values = f64([[1.0, 3.0, NAN]]), f64([[2.0, 4.0, 1e30]])
    assert lambda_returns(rewards, values, mask, gamma=0.5, gae_lambda=0.0).tolist() == [[3.0, 3.0, 0.0]]


def test_the_length_adaptive_lambda_worked_by_hand():
    # 1 - 1/(0.05·48) = 1 - 1/2.4; 1 - 1/(0.05·2000) = 0.99; up to 20 tokens α·length is 1 or less.
    got = length_adaptive_lambda(torch.tensor([1, 20, 40, 48, 2000]), 0.05)
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, 0.5, 1 - 1 / 2.4, 0.99]), rtol=0, atol=1e-6)
    assert float(length_adaptive_lambda(torch.tensor([10**6]), 1e6)) <= 1.0


def test_whitening_worked_by_hand():
    # 1, 3, 5: mean 3, population variance 8/3.
    x, mask = f64([[1.0, 3.0, NAN], [5.0, NAN, 1e30]]), torch.tensor([[True, True, False], [True, False, False]])
    unit = (8 / 3) ** -0.5
    got = whiten(x, mask, eps=0.0)
    torch.testing.assert_close(got, f64([[-2 * unit, 0, 0], [2 * unit, 0, 0]]), rtol=0, atol=1e-12)
    kept = whiten(x, mask, shift_mean=False, eps=0.0)
    torch.testing.assert_close(kept, f64([[3 - 2 * unit, 3, 0], [3 + 2 * unit, 0, 0]]), rtol=0, atol=1e-12)


def test_whitening_a_constant_gives_zeros():
    assert whiten(f64([[2.0, 2.0]]), torch.tensor([[True, True]])).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    "values, expected",
    [
        ([[1.0, 2.0, 4.0]], 1.0),  # perfect
        ([[2.0, 3.0, 5.0]], 1.0),  # off by a constant: no error in the variance
        ([[7.0, 7.0, 7.0]], 0.0),  # a constant
        ([[-1.0, -2.0, -4.0]], -3.0),  # errors twice the returns: 1 - 4
    ],
)
def test_explained_variance_worked_by_hand(values, expected):
    returns, mask = f64([[1.0, 2.0, 4.0, NAN]]), torch.tensor([[True, True, True, False]])
    got = explained_variance(f64([[*values[0], 1e30]]), returns, mask)
    assert got.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, -1234.5])
def test_explained_variance_of_equal_returns_is_not_defined(constant):
    mask = torch.ones(3, 5, dtype=torch.bool)
    for values in (torch.zeros(3, 5), torch.full((3, 5), constant), torch.randn(3, 5)):
        assert explained_variance(values, torch.full((3, 5), constant), mask).isnan()
    returns = constant + 1e-3 * max(1.0, abs(constant)) * torch.randn(3, 5)
    assert explained_variance(returns, returns, mask) == 1
