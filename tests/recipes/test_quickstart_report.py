import copy
import json
import math

import pytest
from rich.console import Console

from hf_rlhf_ext.readers.mixture import USE_CASE_SHARES
from hf_rlhf_ext.recipes.quickstart_parts.report import (
    CATEGORIES,
    FILES,
    check_report,
    print_results,
    write_samples,
)

REPORT = {
    "seed": 0,
    "size": "full",
    "seconds": {"sft": 61.5, "ppo": 400},
    "peak_memory_gb": 3.25,
    "reward_model": {
        "pairs": 900,
        "heldout_pairs": 180,
        "accuracy": 0.781,
        "accuracy_ci95": [0.72, 0.84],
        "nll": 0.5,
        "longer_wins_baseline": 0.522,
        "annotator_ceiling": 0.853,
    },
    "ppo": {
        "updates": 16,
        "gold_before": 0.051,
        "gold_after": 0.602,
        "gold_gain_ci95": [0.45, 0.64],
        "gold_gain": 0.551,
        "proxy_before": 0.0,
        "proxy_after": 1.8,
        "kl": 8.94,
        "mean_length_before": 18.0,
        "mean_length_after": 21.0,
        "kl_coef": 0.05,
    },
    "golds": {name: {"before": 0.051, "after": 0.602, "gain": 0.551} for name in ("on_topic", "sentiment")},
    "habits": {
        end: {
            "distinct_2": 0.6,
            "repetition_4": 0.01,
            "most_frequent_share": 0.1,
            "most_frequent_sentence": "what a pity",
            "stock_share": share,
            "prompt_similarity": 0.2,
        }
        for end, share in (("before", 0.31), ("after", 0.12))
    },
    "gold_reward": "on_topic",
    "categories": {name: {"n": 15, "gold_before": 0.1, "gold_after": 0.5} for name in CATEGORIES},
    "versions": {"python": "3.11"},
    "command": "python recipes/quickstart.py",
}


def write_run(folder, report=REPORT, files=FILES):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def leaves(tree, path=()):
    """Paths of all values of a tree of dicts."""
    for key, value in tree.items():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) else [(*path, key)]


def changed(path, change):
    report = copy.deepcopy(REPORT)
    section = report
    for key in path[:-1]:
        section = section[key]
    change(section, path[-1])
    return report


def test_categories_are_those_of_the_data():
    assert list(USE_CASE_SHARES) == list(CATEGORIES)


def test_a_complete_run_has_no_problems(tmp_path):
    assert check_report(write_run(tmp_path)) == []


TEXTS = ("size", "versions", "command", "gold_reward", "most_frequent_sentence")
OPTIONAL = {("seconds", "sft"), ("seconds", "ppo")}  # stages have no fixed names


@pytest.mark.parametrize("path", [p for p in leaves(REPORT) if p not in OPTIONAL], ids=".".join)
def test_every_missing_key_is_named(tmp_path, path):
    problems = check_report(write_run(tmp_path, changed(path, lambda section, key: section.pop(key))))
    assert len(problems) == 1 and path[0] in problems[0] and path[-1 if path[0] != "versions" else 0] in problems[0]


@pytest.mark.parametrize("path", [p for p in leaves(REPORT) if p[0] not in TEXTS and p[-1] not in TEXTS], ids=".".join)
@pytest.mark.parametrize("value", [math.nan, math.inf, None, "0.5", True])
def test_every_number_must_be_a_finite_number(tmp_path, path, value):
    def spoil(section, key):
        section[key] = [value, section[key][1]] if isinstance(section[key], list) else value

    problems = check_report(write_run(tmp_path, changed(path, spoil)))
    assert len(problems) == 1 and path[-1] in problems[0]


def test_numbers_that_nobody_asked_for_must_be_finite_too(tmp_path):
    report = REPORT | {"extra": {"frontier": [{"kl": 1.0}, {"kl": math.nan}]}}
    assert check_report(write_run(tmp_path, report)) == ["report.extra.frontier[1].kl is nan, not a finite number"]


@pytest.mark.parametrize("name", FILES)
def test_every_missing_or_empty_file_is_named(tmp_path, name):
    write_run(tmp_path)
    (tmp_path / name).write_text("")
    assert [problem.split(" ")[0] for problem in check_report(tmp_path)] == [name]
    (tmp_path / name).unlink()
    assert [problem.split(" ")[0] for problem in check_report(tmp_path)] == [name]


def test_a_swapped_interval_an_empty_category_and_a_broken_file_are_found(tmp_path):
    swapped = changed(("ppo", "gold_gain_ci95"), lambda section, key: section.update({key: [0.6, 0.4]}))
    assert "low above high" in check_report(write_run(tmp_path, swapped))[0]
    empty = changed(("categories", "extract", "n"), lambda section, key: section.update({key: 0}))
    assert "categories.extract.n` is 0" in check_report(write_run(tmp_path, empty))[0]
    (tmp_path / "report.json").write_text("{")
    assert check_report(tmp_path)[0].startswith("report.json is not JSON")
    (tmp_path / "report.json").unlink()
    assert check_report(tmp_path) == ["report.json is missing: run the quickstart again"]


def test_table_is_short_and_has_the_numbers(capsys):
    console = Console(width=140, record=True)
    print_results(REPORT, console=console)
    text = console.export_text()
    for number in "0.522 0.781 0.853 0.051 0.602 +0.551 +0.450 1.800 8.9 21.0 462 3.25 31% 12%".split():
        assert number in text, number
    assert len(text.splitlines()) <= 20


def test_samples_show_what_the_model_wrote_and_nothing_else(tmp_path):
    row = {"prompt": "Say *hi*", "before": "", "after": "# Title\n<b>x</b> | [a](http://b)", "category": "chat"}
    text = write_samples(tmp_path / "s" / "samples.md", [row | {"gold_after": 0.5}] * 5).read_text()
    assert text.count("after, gold +0.50") == 5 and text.count("before: (empty)") == 5
    assert "\n# Title" not in text and "<b>" not in text and "](" not in text and "*hi*" not in text.replace(r"\*", "")
    with pytest.raises(ValueError, match="at least 5"):
        write_samples(tmp_path / "samples.md", [row] * 4)


def test_reports_of_one_gold_reward_only_are_complete_if_it_was_the_sentiment(tmp_path):
    old = {key: value for key, value in REPORT.items() if key not in ("golds", "habits")}
    assert check_report(write_run(tmp_path, old | {"gold_reward": "vader"})) == []
    print_results(old | {"gold_reward": "vader"}, console=Console(width=140, record=True))
    assert len(check_report(write_run(tmp_path, old))) == 18  # 2 * 3 means, 2 * 6 habits


def test_the_table_shows_the_gold_reward_that_nobody_judged_by():
    for judged_by, other in (("on_topic", "sentiment alone"), ("vader", "on topic and kind")):
        console = Console(width=140, record=True)
        print_results(REPORT | {"gold_reward": judged_by}, console=console)
        assert other in console.export_text()
