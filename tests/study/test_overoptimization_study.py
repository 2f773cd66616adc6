"""The summary of the over-optimization study and its tables, from made-up runs whose curve is known."""

import json
import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
N_PROMPTS = 32


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield import_module("overoptimization_study")


@pytest.fixture(scope="module")
def tables(study):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return import_module("overoptimization_tables"), import_module("tables").markdown_table


def made_up_ppo(seed: int, study) -> dict:
    """Gold peaks at d = e, KL 7.4; the proxy rises throughout, and the held-out model follows gold."""
    rng = np.random.default_rng(seed)
    evaluations = []
    for number in range(19):
        d = 8 * number / 18
        gold = d * (1 - 0.5 * math.log(max(d, 1e-9))) + rng.normal(0, 0.2, N_PROMPTS)
        evaluations.append(
            {
                "rollouts": 2 * number,
                "kl": [d * d] * N_PROMPTS,
                "gold": gold.tolist(),
                "proxy": [d] * N_PROMPTS,
                "heldout_proxy": gold.tolist(),
                "proxy_std": 0.1,
                "heldout_proxy_std": 0.1,
                "disagreement": 0.5 + d,
                "tokens": 40.0,
                "example": "They play | and play.\nThe end",
            }
        )
    rollout_kl = [(8 * number / 36) ** 2 for number in range(36)]
    return {"seed": seed, "rollout_kl": rollout_kl, "evaluations": evaluations, "cpu_seconds": 60.0}


def made_up_best_of_n(seed: int, study) -> dict:
    rng = np.random.default_rng(seed)
    kl = [math.log(n) - (n - 1) / n for n in study.BEST_OF]
    gold = [(math.sqrt(k) + rng.normal(0, 0.1, study.BEST_OF_PROMPTS)).tolist() for k in kl]
    return {
        "seed": seed,
        "accuracy": 0.7,
        "n": study.BEST_OF,
        "kl": kl,
        "gold": gold,
        "proxy": gold,
        "cpu_seconds": 30.0,
    }


@pytest.fixture(scope="module")
def collected(study, tmp_path_factory):
    """The summary of one setting with three seeds; the others are missing."""
    out = tmp_path_factory.mktemp("study") / "overoptimization.json"
    for seed in study.SEEDS:
        folder = out.with_suffix("") / f"seed-{seed}"
        study.write_json(folder / "2048-pairs-0-flips-ppo.json", made_up_ppo(seed, study))
        study.write_json(folder / "2048-pairs-0-flips-best_of_n.json", made_up_best_of_n(seed, study))
    study.collect(out)
    return out


def test_the_summary_finds_the_peak_of_ppo_and_none_of_best_of_n(collected, study):
    summary = json.loads(collected.read_text())
    (ppo,), (best_of_n,) = summary["ppo"], summary["best_of_n"]
    assert ppo["fit"]["peak_kl"]["mean"] == pytest.approx(math.e**2, rel=0.1)
    assert ppo["fit"]["peaks_before_last"] and ppo["fall"]["ci95"][0] > 0
    assert not best_of_n["fit"]["peaks_before_last"] and best_of_n["fall"]["ci95"][0] <= 0
    assert len(summary["missing"]) == 3 * 2 * 6 - 6 and summary["cpu_seconds"] == 3 * (60 + 30)
    assert collected.with_suffix(".png").stat().st_size > 10_000
    assert [point["kl"] for point in ppo["points"]][:2] == pytest.approx([0.0, (8 / 18) ** 2])


def test_a_guard_that_sees_the_fall_keeps_more_gold_than_one_that_sees_the_proxy(collected):
    stops = {stop["guard"]: stop for stop in json.loads(collected.read_text())["stops"]}
    assert stops["best_proxy"]["kl"] == pytest.approx(64)  # the proxy never falls
    assert stops["early_stopping_heldout_model"]["stopped"] == 3
    assert stops["early_stopping_heldout_model"]["gain_over_end"]["ci95"][0] > 1
    # At the end, over the last three evaluations, d is 7.1, 7.6 and 8; "end" keeps the last of them.
    end = [d * (1 - 0.5 * math.log(d)) for d in (64 / 9, 68 / 9, 8)]
    assert stops["end"]["gain_over_end"]["mean"] == pytest.approx(end[-1] - sum(end) / 3, abs=0.1)
    assert stops["max_kl=10"]["kl"] < 10


def test_the_tables_say_what_was_found_and_what_is_missing(collected, tables, monkeypatch):
    module, markdown = tables
    monkeypatch.setattr(module, "STUDY", collected)
    made = {name: table(Path("page.md")) for name, table in module.overoptimization_tables(markdown).items()}
    finding = made["overoptimization_finding"]
    assert "gold falls after its highest point in 1 of 1 settings" in finding
    assert "excludes the last point with 2,048 pairs and 0% flipped" in finding
    assert "**Best-of-n** shows no fall" in finding and "128-pairs-0.25-flips-ppo, seed 2" in finding
    assert made["overoptimization_ppo"].splitlines()[2].startswith("| 2,048 | 0% | 0.700 |")
    assert made["overoptimization_ppo"].splitlines()[2].endswith("| 64.0 |")
    assert "They play \\| and play. The end" in made["overoptimization_stories"]
    assert "| `max_kl` = 10 nats | 3 of 3 |" in made["overoptimization_stops"]
    monkeypatch.setattr(module, "STUDY", collected.with_name("nothing.json"))
    assert "Not measured yet" in module.overoptimization_tables(markdown)["overoptimization_ppo"](Path("page.md"))
