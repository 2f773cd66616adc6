"""The KL of best-of-n and its estimates, against sums over all draws, over all subsets, and against simulation."""

import math
from itertools import combinations, product

import numpy as np
import pytest

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.study.best_of_n_estimates import (
    best_weights,
    exact_kl_of_best_of_n,
    expected_best,
    expected_kl,
    kl_estimate,
    kl_of_best_of_n,
)


def winner_distribution(probabilities, rewards, n):
    """Chance of each completion to win, by all draws of n; among equally good draws, each wins equally often."""
    chances = np.zeros(len(probabilities))
    for draw in product(range(len(probabilities)), repeat=n):
        best = max(rewards[y] for y in draw)
        winners = [y for y in draw if rewards[y] == best]
        for y in winners:
            chances[y] += math.prod(probabilities[d] for d in draw) / len(winners)
    return chances


def kl_by_hand(probabilities, rewards, n):
    won = winner_distribution(probabilities, rewards, n)
    return sum(w * math.log(w / p) for w, p in zip(won, probabilities, strict=True) if w > 0)


def test_kl_without_ties_is_the_integral_over_the_quantile():
    # The best of n has the density n u^(n-1) at the quantile u of the reward, and the policy has 1.
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 2, 5, 64):
        log_density = math.log(n) + (n - 1) * np.log(u)
        assert kl_of_best_of_n(n) == pytest.approx(float(np.mean(np.exp(log_density) * log_density)), abs=1e-5)
    assert kl_of_best_of_n(1) == 0.0
    assert kl_of_best_of_n(2) == pytest.approx(math.log(2) - 0.5, abs=1e-15)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "probabilities, rewards",
    [
        ([0.5, 0.3, 0.2], [1.0, 2.0, 3.0]),
        ([0.5, 0.3, 0.2], [2.0, 2.0, 1.0]),  # two completions are equally good
        ([0.25, 0.25, 0.4, 0.1], [0.0, 1.0, 1.0, 5.0]),
        ([0.7, 0.3], [1.0, 1.0]),
    ],
)
def test_exact_kl_is_the_sum_over_all_draws_and_below_the_bound(probabilities, rewards, n):
    exact = exact_kl_of_best_of_n(probabilities, rewards, n)
    assert exact == pytest.approx(kl_by_hand(probabilities, rewards, n), abs=1e-12)
    assert exact <= kl_of_best_of_n(n) + 1e-12


def test_exact_kl_reaches_the_bound_with_many_completions():
    many = 20_000
    exact = exact_kl_of_best_of_n([1 / many] * many, list(range(many)), 4)
    assert exact == pytest.approx(kl_of_best_of_n(4), abs=2e-4)


def test_the_estimate_is_exact_for_a_policy_with_one_repeated_completion():
    # Best completion with probability 0.3; the rest is spread over many completions with rewards of their own.
    many = 4_000
    probabilities = [0.3, *[0.7 / many] * many]
    rewards = [many + 1.0, *range(many)]
    for n in (2, 8, 32):
        exact = exact_kl_of_best_of_n(probabilities, rewards, n)
        assert kl_estimate([math.log(0.3)], n) == pytest.approx(exact, abs=2e-3)
    assert exact < 0.5 * kl_of_best_of_n(n)


def test_the_estimate_follows_the_simulated_winners():
    # What a run has: winners with their log-probabilities. Ten different completions.
    rng = np.random.default_rng(0)
    probabilities = np.array([0.05, 0.1, 0.15, 0.02, 0.08, 0.2, 0.1, 0.12, 0.08, 0.1])
    rewards = np.arange(10.0)
    for n in (2, 4, 16):
        draws = rng.choice(10, size=(40_000, n), p=probabilities)
        winners = draws.max(axis=1)  # the reward grows with the index
        won = np.bincount(winners, minlength=10) / len(winners)
        simulated = sum(w * math.log(w / p) for w, p in zip(won, probabilities, strict=True) if w > 0)
        exact = exact_kl_of_best_of_n(probabilities, rewards, n)
        assert exact == pytest.approx(simulated, abs=0.01)
        estimate = kl_estimate(np.log(probabilities[winners]), n)
        assert exact - 0.01 < estimate < kl_of_best_of_n(n)
    assert estimate - exact < 0.3 * (kl_of_best_of_n(16) - exact)


def test_the_estimate_is_a_tighter_bound_on_average():
    rng = np.random.default_rng(3)
    closer = []
    for _ in range(500):
        size, n = int(rng.integers(2, 8)), int(rng.choice([2, 3, 8, 32]))
        probabilities = rng.dirichlet(np.full(size, rng.choice([0.3, 1.0, 5.0])))
        tops = np.cumsum(probabilities)
        won = tops**n - (tops - probabilities) ** n
        per_winner = [kl_estimate([math.log(p)], n) for p in probabilities]
        estimate = float(won @ per_winner)
        exact = exact_kl_of_best_of_n(probabilities, list(range(size)), n)
        bound = kl_of_best_of_n(n)
        assert exact - 1e-9 <= estimate <= bound + 1e-9
        closer.append((bound - estimate) / (bound - exact))
    assert np.mean(closer) > 0.5  # of the way from the formula to the KL


@pytest.mark.parametrize("n", [1, 2, 64])
def test_the_estimate_is_the_formula_for_long_completions_and_0_for_the_only_one(n):
    assert kl_estimate([-40.0, -2000.0], n) == pytest.approx(kl_of_best_of_n(n), abs=1e-12)
    assert kl_estimate([0.0, 1e-7], n) == 0.0


def best_of_all_subsets(rewards, gold, n):
    """The mean of gold over all subsets with a score; among equally good ones, each is the best equally often."""
    means = []
    for subset in combinations(range(len(rewards)), n):
        scored = [place for place in subset if rewards[place] is not None]
        if not scored:
            continue
        best = max(rewards[place] for place in scored)
        means.append(np.mean([gold[place] for place in scored if rewards[place] == best]))
    return np.mean(means)


@pytest.mark.parametrize(
    "rewards",
    [
        [0.3, -1.0, 2.5, 0.0, 7.0, 1.0],
        [1.0, 1.0, 0.0, 2.0, 2.0, 2.0],
        [None, 1.0, 3.0, None, 3.0, 0.5],
        [4.0] * 6,
    ],
)
def test_expected_best_is_the_mean_over_all_subsets(rewards):
    gold = [5.0, -2.0, 0.5, 1.0, 3.0, 8.0]
    estimates = expected_best([rewards], [gold])
    assert estimates.shape == (1, 6)
    for n in range(1, 7):
        assert estimates[0, n - 1] == pytest.approx(best_of_all_subsets(rewards, gold, n), abs=1e-12)
    own = [0.0 if reward is None else reward for reward in rewards]
    assert expected_best([rewards])[0, 2] == pytest.approx(best_of_all_subsets(rewards, own, 3), abs=1e-12)


def test_expected_best_is_unbiased():
    # The maximum of n uniform numbers is n / (n + 1) on average, and gold follows the reward with noise.
    rng = np.random.default_rng(1)
    rewards = rng.random((4_000, 8))
    gold = 2 * rewards + rng.normal(size=rewards.shape)
    n = np.arange(1, 9)
    best = expected_best(rewards)
    assert np.abs(best.mean(axis=0) - n / (n + 1)).max() < 0.012
    assert np.abs(expected_best(rewards, gold).mean(axis=0) - 2 * n / (n + 1)).max() < 0.06
    # It varies less than the best of the first n, which it is the mean of over all orders.
    first = np.stack([rewards[:, :size].max(axis=1) for size in n], axis=1)
    assert (best.var(axis=0)[:-1] < first.var(axis=0)[:-1]).all()


def test_weights_sum_to_the_subsets_with_a_score():
    weights = best_weights([2.0, None, 2.0, 1.0])
    assert weights[0] == pytest.approx([0.25, 0, 0.25, 0.25])  # one subset of four has no score
    assert weights[1].sum() == pytest.approx(1.0) and weights[1, 0] == weights[1, 2]
    assert weights[3] == pytest.approx([0.5, 0, 0.5, 0])
    large = best_weights(list(range(2000)))  # binomials beyond the range of floats
    assert np.abs(large.sum(axis=1) - 1).max() < 1e-9


def test_a_prompt_without_scores_has_no_estimate_and_missing_gold_is_left_out():
    assert np.isnan(expected_best([[None, None]])).all() and np.isnan(expected_kl([[None, float("nan")]])).all()
    assert expected_best([[1.0, 2.0]], [[4.0, None]], [1]).tolist() == [[4.0]]
    assert np.isnan(expected_best([[1.0, 2.0]], [[4.0, None]], 2)).all()  # the best has no gold
    assert expected_best([[1.0, 2.0], [5.0, 3.0]], n=2).tolist() == [2.0, 5.0]


def test_expected_kl_sees_ties():
    untied = expected_kl([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]])
    assert untied[0].tolist() == pytest.approx([kl_of_best_of_n(n) for n in range(1, 9)], abs=1e-9)
    assert expected_kl([[3.0] * 8]).max() == 0.0
    # Half of the completions are good: at most log 2.
    halves = expected_kl([[0.0, 1.0] * 32], [1, 4, 64])
    exact = [exact_kl_of_best_of_n([0.5, 0.5], [0.0, 1.0], n) for n in (1, 4, 64)]
    assert halves[0].tolist() == pytest.approx(exact, abs=1e-12) and halves[0, 2] == pytest.approx(math.log(2))
    # Those without a score share one place at the bottom.
    missing = expected_kl([[None] * 4 + [1.0] * 4], 8)
    assert missing.tolist() == pytest.approx([exact_kl_of_best_of_n([0.5, 0.5], [0.0, 1.0], 8)], abs=1e-12)


def test_expected_kl_follows_the_policy_with_many_samples():
    rng = np.random.default_rng(2)
    probabilities, values = [0.4, 0.3, 0.2, 0.1], [0.0, 1.0, 2.0, 3.0]
    rewards = rng.choice(values, size=(300, 64), p=probabilities)
    for n in (2, 8):
        exact = exact_kl_of_best_of_n(probabilities, values, n)
        assert expected_kl(rewards, n).mean() == pytest.approx(exact, abs=0.05)


def test_a_number_of_numpy_is_one_n():
    rewards = np.array([[1.0, 2.0, 4.0]])
    assert expected_best(rewards, n=np.int64(2)).tolist() == pytest.approx([(2 + 4 + 4) / 3])
    assert expected_kl(rewards, n=np.int64(2)).shape == (1,)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: kl_of_best_of_n(0), "n=0: .* 1 or more"),
        (lambda: exact_kl_of_best_of_n([0.5, 0.2], [1.0, 2.0], 2), "sum to 0.7"),
        (lambda: exact_kl_of_best_of_n([1.0], [1.0, 2.0], 2), "one reward per probability"),
        (lambda: expected_best([[1.0, 2.0], [1.0]]), "same number of values"),
        (lambda: expected_best([[1.0, 2.0]], [[1.0]]), "gold: .* one value for each reward"),
        (lambda: expected_best([[1.0, 2.0]], n=3), "n=3: there are 2 samples"),
        (lambda: kl_estimate([], 2), "winner_logprobs"),
        (lambda: kl_estimate([-1.0, math.nan], 2), "winner_logprobs: one is missing"),
        (lambda: exact_kl_of_best_of_n([0.5, 0.5], [1.0, None], 2), "rewards: one is missing"),
        (lambda: exact_kl_of_best_of_n([0.5, math.nan], [1.0, 2.0], 2), "sum to nan"),
        (lambda: expected_best([1.0, 2.0]), "rewards: give a list of numbers for each prompt"),
        (lambda: expected_best([[1.0, 2.0]], [[1.0, -math.inf]]), "gold: a value is infinite"),
        (lambda: expected_best([[1.0, 2.0]], n=2.0), "n=2.0: give a whole number"),
    ],
)
def test_a_mistake_is_one_line(call, said):
    with pytest.raises(UserError, match=said):
        call()
