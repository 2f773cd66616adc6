"""Comparisons at the end, at equal KL and at equal time, and the verdict that is written from them."""

import re

import numpy as np
import pytest

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.study.comparisons import compare_systems
from hf_rlhf_ext.study.curves import KLTarget, Point, gold_at_kl, reached_within, rising_points
from hf_rlhf_ext.study.statistics import holm, paired_gain
from hf_rlhf_ext.study.verdict import write_verdict

N = 60


def system(kind, gold, kl, own, total, *, n=1, snapshots=()):
    return {
        "status": "ok", "kind": kind, "n": n, "gold": {"words": list(gold)}, "kl": list(kl),
        "own": {"seconds": own, "cpu_seconds": own}, "total": {"seconds": total, "cpu_seconds": total},
        "snapshots": [
            {"own": {"seconds": seconds, "cpu_seconds": seconds}, "gold": {"words": list(gold)}, "kl": list(kl)}
            for seconds, gold, kl in snapshots
        ],
    }  # fmt: skip


def result(seed):
    """PPO gains 0.1 per nat up to 6 nats in 60 s; DPO gains 0.5 with 2 nats in 20 s; best-of-4 nothing at 0.6 nats."""
    rng = np.random.default_rng(seed)
    prompt = np.random.default_rng(99).normal(0, 1, N)  # the same prompts in all seeds

    def gold(gain):
        return prompt + gain + rng.normal(0, 0.05, N)

    def kl(nats):
        return nats + rng.normal(0, 0.1, N)

    snapshots = [(seconds, gold(seconds / 100), kl(seconds / 10)) for seconds in (20, 40)]
    systems = {
        "sft": system("sft", gold(0), np.zeros(N), 10, 10),
        "best_of_4": system("best_of_n", gold(0), np.full(N, 0.636), 0, 30, n=4),
        "dpo": system("dpo", gold(0.5), kl(2), 20, 30),
        "ppo": system("ppo", gold(0.6), kl(6), 60, 90, snapshots=snapshots),
        "rloo": {"status": "failed", "kind": "rloo", "error": "out of memory"},
    }
    return {
        "seed": seed, "reference": "sft", "prompts": N, "prompt_ids": [f"p{k}" for k in range(N)], "systems": systems,
        "outcomes": {"words": {}},
    }  # fmt: skip


def entry(comparisons, second, at):
    (one,) = [item for item in comparisons if (item["first"], item["second"], item["at"]) == ("ppo", second, at)]
    return one


def test_the_three_ways_to_compare():
    results = [result(seed) for seed in range(3)]
    comparisons = compare_systems(results)
    at_end = entry(comparisons, "dpo", "end")
    before = sum((one["systems"]["dpo"]["gold"]["words"] for one in results), [])
    after = sum((one["systems"]["ppo"]["gold"]["words"] for one in results), [])
    seeds, prompts = np.repeat(range(3), N).tolist(), list(range(N)) * 3
    assert at_end["gain"] == paired_gain(before, after, seeds, prompts).as_dict()
    # PPO has 0.2 at DPO's 2 nats. DPO is ready at 30 s, as PPO starts (30 s for what it needs).
    at_kl = entry(comparisons, "dpo", "equal_kl")
    assert at_kl["gain"]["mean"] == pytest.approx(0.2 - 0.5, abs=0.03)
    assert at_kl["kl"] == pytest.approx(2, abs=0.05)
    at_time = entry(comparisons, "dpo", "equal_time")
    assert at_time["gain"]["mean"] == pytest.approx(0.0 - 0.5, abs=0.03)
    assert at_time["seconds"] == 30
    assert entry(comparisons, "best_of_4", "equal_kl")["gain"]["mean"] == pytest.approx(0.0636, abs=0.03)
    later = compare_systems(results, equal_seconds=70)
    assert entry(later, "dpo", "equal_time")["gain"]["mean"] == pytest.approx(0.4 - 0.5, abs=0.03)
    assert entry(comparisons, "rloo", "end")["reason"] == "rloo failed in every seed"


def test_the_interval_at_a_kl_contains_the_error_of_the_kl():
    # Gold is the same everywhere except for its slope: all uncertainty comes from the KL of the target.
    rng = np.random.default_rng(0)
    start = Point(np.zeros(50), np.zeros(50), 0.0)
    end = Point(np.full(50, 10.0), np.full(50, 10.0), 1.0)
    target = KLTarget(rng.normal(5, 1, 50))
    contributions = gold_at_kl([start, end], target)
    np.testing.assert_allclose(contributions, target.kl)  # slope 1, and the mean is the interpolated gold
    assert gold_at_kl([start, end], KLTarget(np.full(50, 11.0))) is None


def test_a_kl_that_falls_again_does_not_count():
    points = [Point(np.zeros(4), np.full(4, kl) + np.array([0, 0.01, 0, -0.01]), 0.0) for kl in (0, 2, 1, 3)]
    assert [round(point.mean_kl) for point in rising_points(points)] == [0, 2, 3]


def test_what_was_reached_within_a_time_is_a_policy_that_was_kept():
    sft = system("sft", [0.0, 2.0], [0, 0], 10, 10)
    snapshots = [(20, [0.2, 2.2], [1, 1]), (40, [0.4, 2.4], [2, 2])]
    ppo = system("ppo", [0.6, 2.6], [3, 3], 60, 90, snapshots=snapshots)

    def gold(seconds):
        measured = reached_within("ppo", ppo, sft, "cpu_seconds", seconds).measured
        return None if measured is None else measured["gold"]["words"][0]

    times = {29: None, 30: 0.0, 40: None, 50: 0.2, 69: 0.2, 70: 0.4, 89: 0.4, 90: 0.6, 500: 0.6}
    assert {seconds: gold(seconds) for seconds in times} == times
    ppo["snapshots"] = []
    assert [gold(seconds) for seconds in (30, 50, 89, 90)] == [0.0, None, None, 0.6]


def test_without_snapshots_nothing_is_claimed_at_equal_time():
    one = result(0)
    one["systems"]["ppo"]["snapshots"] = []
    at_time = entry(compare_systems([one], equal_seconds=70), "dpo", "equal_time")
    assert at_time["gain"] is None and "set snapshot_seconds" in at_time["reason"]
    report = merged([one], comparisons=compare_systems([one], equal_seconds=70))
    text = write_verdict(report)
    assert "Not compared at equal time: ppo with best_of_4 and dpo (no policy of ppo" in text
    assert "At equal time, it" not in text.split("\n\n")[0]
    # Both were finished by then.
    assert entry(compare_systems([one], equal_seconds=95), "dpo", "equal_time")["gain"]["mean"] == pytest.approx(
        0.1, abs=0.03
    )


def test_judges_without_scores_compare_at_the_end():
    results = [result(0)]
    results[0]["outcomes"] = {"people": {"dpo|ppo": [0.0] * 40 + [1.0] * 20}}
    only = entry(compare_systems(results, judge="people"), "dpo", "end")
    assert only["measure"] == "win rate"
    assert only["gain"]["mean"] == pytest.approx(40 / 60 - 0.5)
    with pytest.raises(UserError, match="Judges: words, people|Judges: people, words"):
        compare_systems(results, judge="nobody")


def merged(results, **changes):
    systems = {}
    for name, one in results[0]["systems"].items():
        kl = float(np.mean(one["kl"])) if one["status"] == "ok" else None
        seeds = [item["seed"] for item in results] if kl is not None else []
        systems[name] = {
            "status": one["status"],
            "error": one.get("error"),
            "kind": one["kind"],
            "kl": kl,
            "seeds": seeds,
        }
    report = {
        "seeds": [item["seed"] for item in results], "n": N, "reference": "sft", "judge": "words",
        "judges": {"words": {"judged": 95, "failed": 5}}, "leaks": {"heldout_left_out": 3}, "systems": systems,
        "comparisons": compare_systems(results),
    }  # fmt: skip
    return report | changes


def test_the_verdict_says_what_the_intervals_say():
    text = write_verdict(merged([result(seed) for seed in range(3)]))
    headline = text.split("\n\n")[0]
    assert headline.startswith("ppo (at 6.0 nats) beats sft by 0.6")
    assert "At the end of training, it beats best_of_4 and dpo." in headline
    assert re.search(r"At equal KL, it loses to dpo by 0\.(29|30)", headline)
    assert re.search(r"At equal time, it loses to dpo by 0\.(49|50)", headline)
    assert "is not distinguishable from best_of_4" in headline
    assert len(headline.split()) < 100
    assert "cover other seeds and other prompts" in text
    assert "rloo failed (out of memory)." in text
    assert "words gave no judgment on 5 of 100 (it covers 95.0%)." in text
    assert "3 held-out prompts left out" in text


def test_the_verdict_says_when_n_is_too_small():
    one = result(0)
    rng = np.random.default_rng(5)
    for name in ("ppo", "dpo"):
        one["systems"][name]["gold"]["words"] = rng.normal(0, 3, N).tolist()
    text = write_verdict(merged([one]))
    assert "not distinguishable from sft" in text
    assert "n is too small" in text
    assert "instead of 60" in text
    assert "but not other seeds" in text


def test_the_verdict_without_ppo():
    one = result(0)
    del one["systems"]["ppo"]
    assert "No PPO system was compared." in write_verdict(merged([one]))


def test_a_system_without_scores_has_a_reason_and_no_gain():
    one = result(0)
    one["systems"]["ppo"]["gold"]["words"] = [None] * N
    for snapshot in one["systems"]["ppo"]["snapshots"]:
        snapshot["gold"]["words"] = [None] * N
    of_ppo = [entry for entry in compare_systems([one]) if entry["first"] == "ppo" and entry["at"] == "end"]
    assert of_ppo and all(entry["gain"] is None for entry in of_ppo)
    text = write_verdict(merged([one]))
    assert text.startswith("ppo could not be compared (words scored both on no prompt)")


def test_systems_without_ppo_count_together_for_holm():
    entries = [entry for entry in compare_systems([result(seed) for seed in range(2)]) if entry["first"] != "ppo"]
    entries = [entry for entry in entries if entry["gain"]]
    raw = [entry["gain"]["p_value"] for entry in entries]
    assert len(raw) > 1
    assert [entry["p_holm"] for entry in entries] == pytest.approx(holm(raw))


def test_the_verdict_says_of_a_gain_in_one_of_two_seeds_that_it_is_of_one():
    results = [result(0), result(1)]
    results[1]["systems"]["ppo"] = {"status": "failed", "error": "out of memory", "kind": "ppo"}
    report = merged(results)
    report["systems"]["ppo"]["seeds"] = [0]
    headline, judged, *_ = write_verdict(report).split("\n\n")
    assert "This is of one seed" in headline
    assert "but only other prompts for ppo, with one seed" in judged


def test_the_verdict_at_equal_time_names_what_best_of_n_still_samples():
    text = write_verdict(merged([result(seed) for seed in range(3)]))
    assert "This is training time, without the samples of best_of_4" in text


def test_the_verdict_says_that_ppo_had_not_begun_when_best_of_n_was_ready():
    report = merged([result(seed) for seed in range(3)])
    ready = next(
        entry["seconds"]
        for entry in report["comparisons"]
        if (entry["first"], entry["second"], entry["at"]) == ("ppo", "best_of_4", "equal_time")
    )
    for began, is_said in ((ready, True), (0.5 * ready, False)):
        report["systems"]["ppo"] |= {"seconds": began + 50.0, "own_seconds": 50.0}
        assert ("ppo had not begun and was still sft" in write_verdict(report)) == is_said


def test_a_system_that_stays_at_the_reference_has_no_equal_kl():
    one = result(0)
    ppo = one["systems"]["ppo"]
    noise = np.random.default_rng(0).normal(0, 1, N)
    ppo["kl"], ppo["snapshots"] = (noise - noise.mean()).tolist(), []
    of_ppo = [entry for entry in compare_systems([one]) if entry["first"] == "ppo" and entry["at"] == "equal_kl"]
    assert of_ppo and all(entry["gain"] is None for entry in of_ppo)
    assert "the KL of ppo is not clearly more than 0" in [entry["reason"] for entry in of_ppo]
