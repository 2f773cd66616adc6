"""PPO's losses compared with numbers computed by hand, in float64, with nonsense in the padding."""

import math

import pytest
import torch

from hf_rlhf_ext.ppo.losses import importance_weights, masked_mean, policy_loss, value_loss

NAN = float("nan")


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_batch(seed=0, rows=4, width=5):
    """Six (B, T) tensors and a ragged mask; every row has at least one token."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(6)]
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return tensors, torch.arange(width) < lengths[:, None]


def test_masked_mean_leaves_the_padding_out():
    mask = torch.tensor([[True, False], [True, True]])
    x = f64([[1.0, NAN], [2.0, 6.0]])
    assert masked_mean(x, mask).item() == 3.0
    assert masked_mean(x, mask, 18).item() == 0.5
    assert masked_mean(x, torch.zeros_like(mask)).item() == 0.0


@pytest.mark.parametrize("advantage, loss, slope", [(2.0, -2.4, 0.0), (-2.0, 3.0, 3.0)])
def test_policy_loss_matches_the_clip_worked_by_hand(advantage, loss, slope):
    # ratio = 0.75 / 0.5 = 1.5, clipped at 1.2. A = 2: min(3, 2.4), flat. A = -2: min(-3, -2.4), slope -ratio * A = 3.
    logprobs = f64([[math.log(0.75), 900.0]]).requires_grad_()  # token 2 is padding
    mask = torch.tensor([[True, False]])
    advantages = f64([[advantage, NAN]])
    got, stats = policy_loss(logprobs, f64([[math.log(0.5), -900.0]]), advantages, mask, clip_range=0.2)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-12)
    assert logprobs.grad.tolist() == [[pytest.approx(slope, abs=1e-12), 0.0]]
    assert stats["clipfrac"].item() == float(advantage > 0)
    assert stats["ratio"].item() == pytest.approx(1.5, abs=1e-12)
    assert stats["approxkl"].item() == pytest.approx(0.5 - math.log(1.5), abs=1e-12)


@pytest.mark.parametrize("advantage, loss, slope", [(2.0, -1.0, -1.0), (-2.0, 1.6, 0.0)])
def test_policy_loss_below_the_lower_clip(advantage, loss, slope):
    # ratio = 0.25 / 0.5 = 0.5, clipped at 0.8. A = 2: min(1, 1.6), slope -1. A = -2: min(-1, -1.6), flat.
    logprobs = f64([[math.log(0.25)]]).requires_grad_()
    got, _ = policy_loss(logprobs, f64([[math.log(0.5)]]), f64([[advantage]]), torch.tensor([[True]]), clip_range=0.2)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-12)
    assert logprobs.grad.item() == pytest.approx(slope, abs=1e-12)


def test_policy_gradient_at_ratio_one_is_minus_the_advantage():
    (logprobs, advantages, *_), mask = random_batch()
    logprobs.requires_grad_()
    loss, stats = policy_loss(logprobs, logprobs.detach(), advantages, mask, clip_range=0.2)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -advantages / mask.sum(), 0.0), rtol=0, atol=1e-12)
    assert {name: value.item() for name, value in stats.items()} == {"clipfrac": 0.0, "approxkl": 0.0, "ratio": 1.0}
    assert not any(value.requires_grad for value in stats.values())


def test_importance_weights_worked_by_hand():
    old, sampled = f64([[0.5, 0.2, 0.9, NAN]]).log(), f64([[0.25, 0.4, 0.1, 1e30]]).log()
    got = importance_weights(old.requires_grad_(), sampled, torch.tensor([[True, True, True, False]]), cap=3.0)
    torch.testing.assert_close(got, f64([[2.0, 0.5, 3.0, 1.0]]), rtol=0, atol=1e-12)  # 0.9 / 0.1 is cut to the cap
    assert not got.requires_grad


def test_importance_weights_turn_an_average_over_the_sampler_into_one_over_the_policy():
    policy, sampler, rewards = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy, sampler = policy.log_softmax(0), sampler.log_softmax(0)
    weights = importance_weights(policy[None], sampler[None], torch.ones(1, 9, dtype=torch.bool), cap=math.inf)[0]
    expected = (policy.exp() * rewards).sum()
    torch.testing.assert_close((sampler.exp() * weights * rewards).sum(), expected, rtol=0, atol=1e-12)


def test_weights_multiply_each_tokens_loss_and_nothing_else():
    (logprobs, old, advantages, weights, *_), mask = random_batch(seed=4)
    weights = weights.exp().masked_fill(~mask, NAN)
    dirty = advantages.masked_fill(~mask, NAN)
    logprobs.requires_grad_()
    loss, stats = policy_loss(logprobs, old, dirty, mask, clip_range=0.2, weights=weights.requires_grad_())
    (gradient,) = torch.autograd.grad(loss, logprobs)
    expected = torch.zeros((), dtype=torch.float64)
    for row, column in mask.nonzero().tolist():  # each token by itself, as a batch of one
        one = (x[row : row + 1, column : column + 1] for x in (logprobs, old, advantages, mask))
        expected = expected + weights[row, column].detach() * policy_loss(*one, clip_range=0.2)[0] / mask.sum()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logprobs)[0], rtol=0, atol=1e-12)
    plain = policy_loss(logprobs, old, advantages, mask, clip_range=0.2)
    assert stats == plain[1] and loss != plain[0]
    ones = policy_loss(logprobs, old, advantages, mask, clip_range=0.2, weights=torch.ones_like(old))
    assert ones[0] == plain[0]


@pytest.mark.parametrize(
    "value, clip_range, loss, slope, bound",
    [
        (2.0, None, 4.5, -3.0, 0.0),  # ½(2 - 5)²
        (2.0, 0.5, 6.125, 0.0, 1.0),  # old 1, may move to 1.5: ½(1.5 - 5)², flat
        (1.25, 0.5, 7.03125, -3.75, 0.0),  # within the range: ½(1.25 - 5)²
        (8.0, 0.5, 6.125, 0.0, 1.0),  # ½·9 = 4.5 is less than the clipped 6.125
        (-1.0, 0.5, 18.0, -6.0, 0.0),  # moved away: the unclipped ½·36 is worse than ½(0.5 - 5)²
    ],
)
def test_value_loss_worked_by_hand(value, clip_range, loss, slope, bound):
    values = f64([[value, NAN]]).requires_grad_()
    mask = torch.tensor([[True, False]])
    got, fraction = value_loss(values, f64([[1.0, 7.0]]), f64([[5.0, -900.0]]), mask, clip_range=clip_range)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-12)
    assert values.grad.tolist() == [[pytest.approx(slope, abs=1e-12), 0.0]]
    assert fraction.item() == bound


@pytest.mark.parametrize("nonsense", [NAN, math.inf, -math.inf, 1e30])
def test_nothing_in_the_padding_reaches_a_loss_or_a_gradient(nonsense):
    tensors, mask = random_batch(seed=1)

    def losses(fill):
        logprobs, old, advantages, values, old_values, returns = (t.masked_fill(~mask, fill) for t in tensors)
        logprobs.requires_grad_()
        values.requires_grad_()
        loss, stats = policy_loss(logprobs, old, advantages, mask, clip_range=0.2)
        critic, fraction = value_loss(values, old_values, returns, mask, clip_range=0.2)
        (loss + critic).backward()
        return [loss, critic, fraction, *stats.values(), logprobs.grad, values.grad]

    for got, expected in zip(losses(nonsense), losses(0.0), strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, expected)


@pytest.mark.parametrize("clip_range", [0.2, None])
def test_gradients_match_finite_differences(clip_range):
    (logprobs, old, advantages, values, old_values, returns), mask = random_batch(seed=2)
    logprobs.requires_grad_()
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantages, mask, clip_range=0.2)[0], logprobs)
    assert torch.autograd.gradcheck(
        lambda x: value_loss(x, old_values, returns, mask, clip_range=clip_range)[0], values
    )


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 2], [3, 1]])
def test_shares_of_micro_batches_add_up_to_the_mini_batch(sizes):
    (logprobs, old, advantages, values, old_values, returns), mask = random_batch(seed=3)
    whole = [
        *policy_loss(logprobs, old, advantages, mask, clip_range=0.2)[1].values(),
        policy_loss(logprobs, old, advantages, mask, clip_range=0.2)[0],
        *value_loss(values, old_values, returns, mask, clip_range=0.2),
    ]
    shares = torch.zeros(len(whole), dtype=torch.float64)
    parts = zip(*(t.split(sizes) for t in (logprobs, old, advantages, values, old_values, returns, mask)), strict=True)
    for new, before, advantage, value, old_value, target, part in parts:
        given = {"clip_range": 0.2, "denominator": mask.sum()}
        loss, stats = policy_loss(new, before, advantage, part, **given)
        shares += torch.stack([*stats.values(), loss, *value_loss(value, old_value, target, part, **given)])
    torch.testing.assert_close(shares, torch.stack(whole), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ratio, advantage, loss, slope", [(1.25, 2.0, -2.5, -2.5), (1.5, 2.0, -2.6, 0.0)])
def test_the_upper_clip_may_have_a_range_of_its_own(ratio, advantage, loss, slope):
    # Clipped to [0.8, 1.3]. 1.25: not clipped, slope -ratio * A. 1.5: 1.3 * 2, flat.
    logprobs = f64([[math.log(ratio / 2), NAN]]).requires_grad_()
    mask, old = torch.tensor([[True, False]]), f64([[math.log(0.5), NAN]])
    got, stats = policy_loss(
        logprobs, old, f64([[advantage, NAN]]), mask, clip_range=0.2, clip_range_high=0.3, denominator=1
    )
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-12)
    assert logprobs.grad.tolist() == [[pytest.approx(slope, abs=1e-12), 0.0]]
    assert stats["clipfrac"].item() == float(slope == 0)


@pytest.mark.parametrize("advantage, loss, slope", [(2.0, -1.0, -1.0), (-2.0, 1.6, 0.0)])
def test_the_lower_clip_does_not_know_of_the_upper_one(advantage, loss, slope):
    # ratio 0.5, clipped at 0.8. A = 2: min(1, 1.6), slope -1. A = -2: min(-1, -1.6), flat.
    logprobs = f64([[math.log(0.25)]]).requires_grad_()
    mask, old = torch.tensor([[True]]), f64([[math.log(0.5)]])
    got, _ = policy_loss(logprobs, old, f64([[advantage]]), mask, clip_range=0.2, clip_range_high=0.9)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-12)
    assert logprobs.grad.item() == pytest.approx(slope, abs=1e-12)


def test_without_an_upper_range_the_lower_one_is_used_to_the_bit():
    (logprobs, old, advantages, *_), mask = random_batch(seed=7)
    alone, _ = policy_loss(logprobs, old, advantages, mask, clip_range=0.2)
    both, _ = policy_loss(logprobs, old, advantages, mask, clip_range=0.2, clip_range_high=0.2)
    other, _ = policy_loss(logprobs, old, advantages, mask, clip_range=0.2, clip_range_high=0.28)
    assert torch.equal(alone, both) and alone != other
