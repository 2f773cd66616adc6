import itertools
import math
import statistics

import pytest

from hf_rlhf_ext.collect.simulated import GoldReward, SimulatedPerson
from hf_rlhf_ext.errors import UserError

N = 4000


def number_of(prompts, completions):
    """A gold reward that the test sets: the number at the start of the completion."""
    return [float(text.split()[0]) for text in completions]


def person(**options):
    return SimulatedPerson(**{"name": "Ada", "gold": number_of, "noise": 0.5} | options)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def preferences(who, first, second, n=N):
    """Answers to `n` tasks, which differ in the prompt."""
    return [who.answer(f"prompt {i}", [first, second])["preference"] for i in range(n)]


def share(answers):
    return sum(answer < 4 for answer in answers) / len(answers)


def assert_share(found, expected, n=N):
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / n) + 1e-9, (found, expected)


# --- two completions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap, noise", [(0.5, 0.5), (-0.9, 0.4), (1.2, 2.0), (0.0, 0.5)])
def test_the_sign_follows_bradley_terry(gap, noise):
    who = person(noise=noise, position_bias=0.0)
    answers = preferences(who, f"{gap}", "0")
    if gap == 0:
        assert set(answers) == {4}  # equally good and no bias: a tie, always
        return
    assert 4 not in answers
    assert_share(share(answers), sigmoid(gap / noise))


@pytest.mark.parametrize("bias", [0.4, -0.3])
def test_position_bias_moves_the_point_of_indifference(bias):
    """With bias b, the first completion is taken half of the time if its gold reward is b lower."""
    who = person(position_bias=bias)
    for gap in (-bias + 1e-9, 0.0, 0.5):  # the small number keeps rounding from making a tie
        assert_share(share(preferences(who, f"{gap}", "0")), sigmoid((gap + bias) / 0.5))


def test_length_bias_is_for_each_100_characters():
    long = "0 " + "x" * 248  # 250 characters, and the short one has 50
    short = "0 " + "y" * 48
    assert_share(share(preferences(person(length_bias=0.3), long, short)), sigmoid(0.3 * 2 / 0.5))
    assert_share(share(preferences(person(length_bias=-0.3), long, short)), sigmoid(-0.3 * 2 / 0.5))


def test_strength_is_the_noisy_difference_against_the_thresholds():
    # Without noise, it is the difference itself: below 0.5 slightly, below 1 better, else much better.
    who = person(noise=0)
    expected = {"0.25": 3, "0.5": 2, "0.75": 2, "1": 1, "2": 1, "0": 4, "-0.25": 5, "-0.75": 6, "-1": 7}
    assert {gap: who.answer("p", [gap, "0"])["preference"] for gap in expected} == expected
    # With noise, P(difference + logistic noise >= t) = sigmoid((difference - t) / noise).
    answers = preferences(person(), "0.3", "0")
    assert_share(sum(answer <= 2 for answer in answers) / N, sigmoid((0.3 - 0.5) / 0.5))
    assert_share(sum(answer == 1 for answer in answers) / N, sigmoid((0.3 - 1.0) / 0.5))
    assert_share(sum(answer == 7 for answer in answers) / N, sigmoid((-0.3 - 1.0) / 0.5))


def test_answers_depend_on_name_seed_and_texts_only():
    tasks = [(f"prompt {i}", ["0.1", f"0.{i}"]) for i in range(200)]
    forward = [person().answer(*task) for task in tasks]
    again = person()
    assert [again.answer(*task) for task in reversed(tasks)][::-1] == forward
    mirrored = [person().answer(prompt, completions[::-1])["preference"] for prompt, completions in tasks]
    assert mirrored == [8 - answer["preference"] for answer in forward]  # the same winner on the other side
    assert [person(seed=1).answer(*task) for task in tasks] != forward
    assert [person(name="Grace").answer(*task) for task in tasks] != forward


def test_two_people_disagree_as_independent_draws():
    ada, grace = (preferences(person(name=name), "0.3", "0") for name in ("Ada", "Grace"))
    p = sigmoid(0.3 / 0.5)
    agree = sum((a < 4) == (b < 4) for a, b in zip(ada, grace, strict=True)) / N
    assert_share(agree, p * p + (1 - p) * (1 - p))


# --- more completions, and one ---------------------------------------------------------------------------------------


def test_each_pair_of_a_ranking_is_bradley_terry():
    golds = [0.0, 0.3, 0.9, -0.5]
    completions = [f"{gold}" for gold in golds]
    rankings = [person().answer(f"prompt {i}", completions)["ranks"] for i in range(N)]
    assert all(sorted(ranks) == [1, 2, 3, 4] for ranks in rankings)
    for i, j in itertools.combinations(range(4), 2):
        found = sum(ranks[i] < ranks[j] for ranks in rankings) / N
        assert_share(found, sigmoid((golds[i] - golds[j]) / 0.5))


def test_rankings_are_plackett_luce():
    """P(a, b, c) = w_a / (w_a + w_b + w_c) * w_b / (w_b + w_c), with w = exp(gold / noise)."""
    golds = {"a": 0.4, "b": 0.0, "c": -0.2}
    texts = [f"{gold} {name}" for name, gold in golds.items()]
    rankings = [tuple(person().answer(f"prompt {i}", texts)["ranks"]) for i in range(N)]
    weights = [math.exp(gold / 0.5) for gold in golds.values()]
    for order in itertools.permutations(range(3)):
        p = 1.0
        for place in range(2):
            p *= weights[order[place]] / sum(weights[i] for i in order[place:])
        ranks = tuple(order.index(i) + 1 for i in range(3))
        assert_share(rankings.count(ranks) / N, p)


def test_equally_good_completions_share_a_rank_and_keep_their_odds():
    rankings = [person().answer(f"prompt {i}", ["0.2 a", "0", "0.2 b"])["ranks"] for i in range(N)]
    assert {tuple(ranks) for ranks in rankings} == {(1, 2, 1), (2, 1, 2)}
    assert_share(sum(ranks[0] == 1 for ranks in rankings) / N, sigmoid(0.2 / 0.5))


def test_one_completion_is_rated_around_its_gold_reward():
    assert [person(noise=0).answer("p", [f"{gold}"])["ratings"] for gold in (-2, -1, -0.3, 0, 0.3, 1, 5)] == [
        [1],
        [1],
        [3],
        [4],
        [5],
        [7],
        [7],
    ]
    ratings = [person(noise=0.2).answer(f"prompt {i}", ["0"])["ratings"][0] for i in range(N)]
    # Gumbel noise with mean 0 and standard deviation 0.2 * pi / sqrt(6), in steps of a third.
    assert abs(statistics.mean(ratings) - 4) < 0.05
    assert statistics.pstdev(ratings) == pytest.approx(3 * 0.2 * math.pi / math.sqrt(6), rel=0.15)


# --- habits ----------------------------------------------------------------------------------------------------------


def test_lazy_answers_do_not_look_at_the_texts():
    answers = preferences(person(noise=0, lazy=0.25), "-1", "1")  # a careful answer is 7
    assert set(answers) == {3, 7}
    assert_share(answers.count(3) / N, 0.25)
    assert set(preferences(person(lazy=1.0, lazy_answer="tie"), "-1", "1", n=50)) == {4}
    assert person(lazy=1.0).answer("p", ["1", "2", "3"]) == {"ranks": [1, 2, 2]}
    assert person(lazy=1.0, lazy_answer="tie").answer("p", ["1", "2", "3"]) == {"ranks": [1, 1, 1]}
    assert person(lazy=1.0).answer("p", ["1"]) == {"ratings": [4]}


def test_random_answers_are_uniform():
    answers = preferences(person(random=True), "-1", "1")
    for place in range(1, 8):
        assert_share(answers.count(place) / N, 1 / 7)
    rankings = [tuple(person(random=True).answer(f"{i}", ["1", "2", "3"])["ranks"]) for i in range(N)]
    for ranks in itertools.permutations([1, 2, 3]):
        assert_share(rankings.count(ranks) / N, 1 / 6)


def test_skips_are_a_share_of_the_tasks():
    answers = [person(skip_share=0.2).answer(f"prompt {i}", ["0", "1"]) for i in range(N)]
    assert_share(answers.count({"skip": True}) / N, 0.2)
    assert person(skip_share=1.0).answer("p", ["0", "1"]) == {"skip": True}


def test_seconds_have_the_median_that_was_set():
    seconds = [person(seconds=10).seconds_for(f"prompt {i}", ["0", "1"]) for i in range(N)]
    assert statistics.median(seconds) == pytest.approx(10, rel=0.03)
    lower, _, upper = statistics.quantiles(seconds, n=4)
    assert lower == pytest.approx(10 * 3**-0.25, rel=0.05) and upper == pytest.approx(10 * 3**0.25, rel=0.05)


def test_a_conversation_and_the_default_gold_reward():
    prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    who = SimulatedPerson(name="Ada", noise=0)
    assert who.answer(prompt, ["It is wonderful, I love it.", "It is terrible, I hate it."]) == {"preference": 1}
    assert who.answer(prompt, ["", "The table is wooden."]) == {"preference": 7}  # -1 against 0
    assert isinstance(who.gold, GoldReward)


@pytest.mark.parametrize(
    "option, value",
    [
        ("noise", -0.1),
        ("noise", math.nan),
        ("position_bias", math.inf),
        ("lazy", 1.5),
        ("skip_share", -0.1),
        ("lazy_answer", "second"),
        ("better_from", 2.0),
        ("seconds", -1.0),
    ],
)
def test_impossible_options_are_refused_in_one_line(option, value):
    with pytest.raises(UserError, match=f"{option}=") as error:
        person(**{option: value})
    assert "\n" not in str(error.value)
