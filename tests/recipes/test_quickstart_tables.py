"""The tables of docs/quickstart.md: runs of both gold rewards side by side, and reports of the time with only one."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DOCS", tmp_path)
    (tmp_path / "quickstart").mkdir()
    return module


def report(seed: int, gold: str, share: float) -> dict:
    ends = {}
    for end, value in (("before", 0.25), ("after", share)):
        ends[end] = dict.fromkeys(
            ("distinct_2", "repetition_4", "most_frequent_share", "stock_share", "prompt_similarity"), value
        )
        ends[end]["most_frequent_sentence"] = f"i *love* {seed}"
    golds = {name: {"before": 0.25, "after": 0.5 + seed / 4} for name in ("on_topic", "sentiment")}
    samples = [{"prompt": f"Q{n}", "before": "a | b", "after": f"{gold} {n}"} for n in range(2)]
    return {"seed": seed, "gold_reward": gold, "golds": golds, "habits": ends, "samples": samples}


def write(tables, name: str, content: dict) -> None:
    (tables.DOCS / "quickstart" / f"{name}.json").write_text(json.dumps(content))


def test_runs_of_both_gold_rewards_are_side_by_side(tables, tmp_path):
    for seed in (0, 1, 10):
        write(tables, f"seed{seed}", report(seed, "on_topic", 0.0))
    write(tables, "sentiment-seed0", report(0, "vader", 0.75))
    assert [row["seed"] for row in tables.quickstart_reports()] == [0, 1, 10]
    golds = tables.quickstart_golds(tmp_path).splitlines()
    assert golds[2] == "| on topic and kind | 0, 1, 10 | 0.25 → 1.42 | 0.25 → 1.42 |"  # (0.5 + 0.75 + 3) / 3
    assert golds[3] == "| sentiment | 0 | 0.25 → 0.50 | 0.25 → 0.50 |"
    habits = tables.quickstart_habits(tmp_path).splitlines()
    assert len(habits) == 7 and all(row.endswith("| 0.25 → 0.00 | 0.25 → 0.75 |") for row in habits[2:])
    sentences = tables.quickstart_sentences(tmp_path).splitlines()
    assert sentences[-1] == r"| 0 | sentiment | i \*love\* 0 | 75% |"
    samples = tables.quickstart_samples(tmp_path).splitlines()
    assert samples[2] == r"| Q0 | a \| b | on\_topic 0 | a \| b | vader 0 |" and len(samples) == 4


def test_samples_of_other_prompts_are_not_put_side_by_side(tables, tmp_path):
    write(tables, "seed0", report(0, "on_topic", 0.0))
    other = report(0, "vader", 0.0)
    other["samples"][1]["prompt"] = "Q9"
    write(tables, "sentiment-seed0", other)
    with pytest.raises(ValueError, match="sample 2 of seed 0"):
        tables.quickstart_samples(tmp_path)


def test_reports_of_one_gold_reward_are_not_measured_yet(tables, tmp_path):
    old = report(0, "vader", 0.0)
    for section in ("golds", "habits", "samples", "gold_reward"):
        del old[section]
    write(tables, "seed0", old)
    for name in ("golds", "habits", "sentences", "samples"):
        assert getattr(tables, f"quickstart_{name}")(tmp_path) == tables.NOT_YET


def test_what_both_gold_rewards_give_to_known_texts():
    spec = importlib.util.spec_from_file_location("quickstart_gold", ROOT / "benchmarks" / "quickstart_gold.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    means = {kind: on_topic for kind, (on_topic, _) in module.means().items()}
    assert (
        means.pop("kind sentence on the topic") > 0.95 and means.pop("the topic in a question with a kind word") > 0.9
    )
    assert means.pop("the same, then a compliment that fits any prompt") < 0.51
    assert means.pop("the topic and a list of kind words") < 0.55 and means.pop("the same sentence four times") < 0.26
    assert len(means) == 4 and max(means.values()) < 0.02
