"""The merged report, its tables, page, plots and cards, from results with known true values."""

import json
import math
import random
import re
from html.parser import HTMLParser
from statistics import fmean

import pytest
from PIL import Image

from hf_rlhf_ext.metrics import compare_plots
from hf_rlhf_ext.recipes.compare_parts import merging
from hf_rlhf_ext.recipes.compare_parts.merging import merge
from hf_rlhf_ext.recipes.compare_parts.page import ReportPage, as_markdown, plain
from hf_rlhf_ext.recipes.compare_parts.report import PAGE, reward_model_table, write_cards, write_report
from hf_rlhf_ext.recipes.compare_parts.samples import side_by_side
from hf_rlhf_ext.recipes.compare_parts.stacking import Stack
from hf_rlhf_ext.recipes.compare_parts.tables import (
    all_tables,
    equal_time_pairs_table,
    equal_time_table,
    judges_table,
    quality_table,
)
from hf_rlhf_ext.study.statistics import wilson_interval
from tests.recipes.compare.simulated_results import simulated_results

SMALL = ("sft", "best_of_4", "best_of_16", "grpo", "ppo")
REASON = "OutOfMemoryError: <b>no | memory</b> left"
EVIL = "<script>alert(1)</script> & **bold** | cell"


@pytest.fixture(scope="module")
def results():
    return [simulated_results(seed, 20, SMALL, failed={"rloo": REASON}) for seed in (0, 1)]


@pytest.fixture(scope="module")
def run(results, tmp_path_factory):
    """A folder of a run with answers and one policy with a card, after its report was written."""
    folder = tmp_path_factory.mktemp("run")
    for seed in (0, 1):
        for name in SMALL:
            path = folder / f"seed-{seed}" / "completions" / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {"prompt": f"{EVIL} {k}", "completion": f"{name} says {EVIL}", "category": "story"} for k in range(6)
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = folder / "seed-0" / "systems" / "ppo" / "policy"
    policy.mkdir(parents=True)
    card = {"kind": "policy", "base_model": "owner/base", "config": "seed: 0"}
    (policy / "report.json").write_text(json.dumps({"seed": 0, "ppo": {"kl": 5.0}, "card": card}))
    settings = {"seeds": [0, 1], "systems": {"ppo": {"kl_coef": 0.1}}}
    report = write_report(folder, results, settings=settings, statements=["The judge shares nothing with the reward."])
    return folder, report


# --- merging ---------------------------------------------------------------------------------------------------------


def test_the_report_has_the_form_that_the_study_publishes(run):
    folder, report = run
    stored = json.loads((folder / "report.json").read_text())
    assert stored["seeds"] == [0, 1]
    ppo = stored["systems"]["ppo"]
    assert set(ppo["gold"]) >= {"mean", "ci95"} and set(ppo["win_rate_vs_sft"]) >= {"mean", "ci95"}
    assert isinstance(ppo["kl"], float) and isinstance(ppo["seconds"], float) and ppo["n"] == 40
    assert stored["verdict"] == report["verdict"] and stored["verdict"]
    assert stored["settings"]["systems"]["ppo"] == {"kl_coef": 0.1}


def test_means_are_those_of_all_seeds(run, results):
    _, report = run
    for name in SMALL:
        entries = [result["systems"][name] for result in results]
        merged = report["systems"][name]
        assert merged["gold"]["mean"] == pytest.approx(fmean(v for entry in entries for v in entry["gold"]["gold"]))
        assert merged["kl"] == pytest.approx(fmean(v for entry in entries for v in entry["kl"]))
        assert merged["seconds"] == pytest.approx(fmean(entry["total"]["cpu_seconds"] for entry in entries))


def test_a_win_rate_is_the_same_seen_from_both_sides(run, results):
    _, report = run
    rates = report["win_rates"]["gold"]
    one, other = rates["ppo|sft"], rates["sft|ppo"]
    assert one["mean"] == pytest.approx(1 - other["mean"])
    assert (one["wins"], one["ties"], one["losses"]) == (other["losses"], other["ties"], other["wins"])
    # In results.json the pair stands the other way round.
    given = [value for result in results for value in result["outcomes"]["gold"]["sft|ppo"]]
    assert one["mean"] == pytest.approx(1 - fmean(given))
    of_system = report["systems"]["ppo"]["win_rate_vs_sft"]
    assert of_system["mean"] == pytest.approx(one["mean"]) and of_system["ci95"] == pytest.approx(one["ci95"])
    assert report["systems"]["sft"]["win_rate_vs_sft"] is None


def test_a_system_that_worked_in_one_seed_counts_there_only(results):
    broken = json.loads(json.dumps(results))
    broken[1]["systems"]["grpo"] = {"status": "failed", "error": "stopped", "kind": "grpo"}
    outcomes = broken[1]["outcomes"]["gold"]
    broken[1]["outcomes"]["gold"] = {pair: values for pair, values in outcomes.items() if "grpo" not in pair}
    merged = merge(broken)["systems"]["grpo"]
    assert merged["seeds"] == [0] and merged["errors"] == {"1": "stopped"} and merged["n"] == 20
    assert merged["gold"]["mean"] == pytest.approx(fmean(results[0]["systems"]["grpo"]["gold"]["gold"]))
    row = quality_table(merge(broken)).rows[SMALL.index("grpo")]
    assert row[0] == "grpo (failed in seed 1)"


def test_the_table_at_equal_time_takes_the_last_snapshot_within_the_budget(results):
    # grpo: 150 s of SFT and reward model, 600 s of its own; snapshots at 150, 300 and 450 s of its own.
    found = merge(results, equal_seconds=460.0)["equal_time"]
    assert found["seconds"] == 460.0
    grpo = found["systems"]["grpo"]
    assert grpo["steps"] == [20, 20] and grpo["seconds"] == 450.0
    expected = fmean(v for result in results for v in result["systems"]["grpo"]["snapshots"][1]["gold"]["gold"])
    assert grpo["gold"]["mean"] == pytest.approx(expected)
    assert found["systems"]["best_of_16"]["steps"] == [None, None]
    assert found["systems"]["best_of_16"]["seconds"] == 150.0
    # Without a budget it is the total of the quickest system that is trained further than SFT, then at its end.
    assert merge(results)["equal_time"]["seconds"] == 750.0
    assert merge(results)["equal_time"]["systems"]["grpo"]["steps"] == [None, None]
    early = merge(results, equal_seconds=100.0)
    assert early["equal_time"]["systems"]["ppo"]["gold"] is None
    rows = {row[0]: row for row in equal_time_table(early).rows}
    assert "was not ready by then" in rows["ppo"][-1]


def test_both_tables_at_equal_time_have_the_same_values(results):
    found = merge(results, equal_seconds=460.0)
    reached = found["equal_time"]["systems"]
    pairs = [entry for entry in found["comparisons"] if entry["at"] == "equal_time" and entry["gain"]]
    assert {entry["second"] for entry in pairs} >= {"grpo", "best_of_16"}
    for entry in pairs:
        gold = [reached[entry[side]]["gold"]["mean"] for side in ("first", "second")]
        assert entry["gain"]["mean"] == pytest.approx(gold[0] - gold[1])
    # Between its start (150 s) and its first snapshot (325 s), nothing is known of PPO.
    early = merge(results, equal_seconds=200.0)
    assert early["equal_time"]["systems"]["ppo"]["gold"] is None
    for table, cell in ((equal_time_table(early), -1), (equal_time_pairs_table(early), -2)):
        assert any("set snapshot_seconds" in row[cell] for row in table.rows if row[0] == "ppo")
    # As it starts, it is the reference.
    start = merge(results, equal_seconds=150.0)
    rows = {row[0]: row for row in equal_time_table(start).rows}
    assert rows["ppo"][-1] == "at its start, still sft"
    assert rows["ppo"][1] == rows["sft"][1]


def test_the_report_says_what_a_judge_did_not_judge(results, tmp_path):
    few = json.loads(json.dumps(results))
    for result in few:
        pairs = {f"{name}|sft": [1.0] * 3 + [None] * 17 for name in ("ppo", "grpo")}
        result["outcomes"]["people"] = pairs
        result["coverage"]["people"] = {"judged": 6, "failed": 1, "not_asked": 33, "unit": "pairs"}
    report = write_report(tmp_path, few)
    said = "Judged by: gold, people (12 of 80 pairs, 66 not asked, 2 without a judgment)."
    for name in ("compare.md", PAGE):
        assert said in (tmp_path / name).read_text()
    rows = {row[0]: row for row in judges_table(report).rows}
    assert rows["ppo"][-1].endswith("(n = 6)") and "n =" not in rows["ppo"][2]


def test_calibration_finds_a_reward_model_that_is_too_sure():
    """The judge prefers the side with the higher reward with P = σ(difference); the model says σ(3 × difference)."""
    draw = random.Random(0)
    result = simulated_results(0, 3000, ("sft", "ppo"))
    rewards = [draw.gauss(0, 1) for _ in range(3000)]
    result["systems"]["sft"]["proxy"] = [0.0] * 3000
    result["systems"]["ppo"]["proxy"] = rewards
    result["outcomes"]["gold"]["sft|ppo"] = [float(draw.random() > 1 / (1 + math.exp(-value))) for value in rewards]
    result["reward_model"]["scale"] = 1.0
    honest = merging.calibration(Stack([result]), "gold")
    assert sum(entry["n"] for entry in honest) == 3000
    for entry in honest:
        if entry["n"] > 100:
            assert entry["observed"]["mean"] == pytest.approx(entry["predicted"], abs=0.06)
    result["reward_model"]["scale"] = 3.0
    too_sure = merging.calibration(Stack([result]), "gold")[-1]
    assert too_sure["observed"]["mean"] < too_sure["predicted"] - 0.15


# --- tables and page -------------------------------------------------------------------------------------------------


def test_a_failed_system_is_in_the_main_table_with_its_reason(run):
    folder, report = run
    row = next(row for row in quality_table(report).rows if row[0] == "rloo")
    assert row[1] == f"failed: {REASON}"
    page = (folder / PAGE).read_text()
    assert "&lt;b&gt;no | memory&lt;/b&gt;" in page and "<b>no" not in page
    assert r"no \| memory" in (folder / "compare.md").read_text()


def test_every_row_of_every_table_has_a_cell_for_every_column(run):
    _, report = run
    titles = [table.title for table in all_tables(report)]
    assert {"How good are the answers?", "What does it cost?", "At equal training time", "Alignment tax"} <= set(titles)
    for table in all_tables(report):
        for row in table.rows:
            assert len(row) == len(table.header), table.title


class Page(HTMLParser):
    """Collects what a page would load, its texts, and elements that are not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.alternatives: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.loaded += [value for name, value in attrs if name in ("src", "srcset", "data", "poster")]
        if tag != "a":
            self.loaded += [value for name, value in attrs if name == "href"]
        elif not values["href"].startswith("#"):
            self.loaded.append(values["href"])
        if tag == "img":
            self.alternatives.append(values.get("alt", ""))


def test_the_page_loads_nothing_and_runs_nothing(run):
    folder, _ = run
    text = (folder / PAGE).read_text()
    page = Page(text)
    assert page.loaded and all(source.startswith("data:image/png;base64,") for source in page.loaded)
    assert "script" not in page.tags and "url(" not in text and "@import" not in text
    assert all(page.alternatives)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; **bold** | cell" in text


def test_answers_stand_side_by_side_in_the_order_of_the_prompts(run):
    folder, _ = run
    text = (folder / PAGE).read_text()
    numbers = re.findall(r'<div class="prompt">.*? (\d)</div>', text)
    assert numbers == ["0", "1", "2", "3"]  # the first ones, not selected
    assert text.count('<div class="answer"><b>best_of_16</b>') == 4
    markdown = (folder / "compare.md").read_text()
    assert "&lt;script&gt;" in markdown and "<script>" not in markdown


def test_markdown_links_to_plots_that_are_there(run):
    folder, _ = run
    plots = re.findall(r"\]\((\w+\.png)\)", (folder / "compare.md").read_text())
    assert len(plots) == 5
    for plot in plots:
        with Image.open(folder / plot) as image:
            assert image.width >= 600
    columns = 0
    for line in (folder / "compare.md").read_text().splitlines():
        cells = re.split(r"(?<!\\)\|", line)  # a bar within a cell has a backslash
        if line.startswith(("| system |", "| first |", "| reward model |")):
            columns = len(cells)
        elif line.startswith("| "):
            assert len(cells) == columns, line


def test_the_first_paragraph_of_the_verdict_is_the_headline():
    page = ReportPage("t", "l", "PPO wins.\n\nIn detail <b>so</b>.\n\nAnd more.", [], [], "{}")
    assert page.headline == "PPO wins." and page.details == ["In detail <b>so</b>.", "And more."]
    assert as_markdown(page).count("> ") == 1


def test_numbers_trace_to_command_seeds_and_files(run):
    folder, report = run
    text = (folder / PAGE).read_text()
    for word in ("seed-N/results.json", "The judge shares nothing with the reward.", "kl_coef", report["hardware"]):
        assert word in text
    assert "2 held-out prompts left out" in text


def test_the_card_of_a_policy_gets_the_table_once(run):
    folder, report = run
    policy = folder / "seed-0" / "systems" / "ppo" / "policy"
    write_cards(report, folder)  # a second call replaces it
    card = (policy / "README.md").read_text()
    assert card.count("hf-rlhf compare") == 1
    assert r"| best\_of\_16 |" in card and "rloo" in card
    assert "system `ppo` of seed 0" in card
    stored = json.loads((policy / "report.json").read_text())
    assert stored["comparison"]["system"] == "ppo" and stored["ppo"] == {"kl": 5.0}


def test_without_a_judge_there_is_no_verdict_but_a_report(results, tmp_path):
    unjudged = json.loads(json.dumps(results))
    for result in unjudged:
        result["outcomes"], result["coverage"] = {}, {}
        for entry in result["systems"].values():
            if entry["status"] == "ok":
                entry["gold"] = {}
                for snapshot in entry["snapshots"]:
                    snapshot["gold"] = {}
    report = write_report(tmp_path, unjudged)
    assert "judges" in report["verdict"]
    assert (tmp_path / PAGE).is_file()


# --- plots -----------------------------------------------------------------------------------------------------------


def test_names_beside_a_plot_do_not_overlap():
    spread = compare_plots._spread([0.1, 0.5, 0.5, 0.51, 0.98, 0.99], 0.05)
    gaps = [second - first for first, second in zip(spread, spread[1:], strict=False)]
    assert min(gaps) >= 0.05 - 1e-9
    assert spread[0] == 0.1 and spread[-1] <= 1.0
    assert fmean(spread[1:4]) == pytest.approx(fmean([0.5, 0.5, 0.51]))


def test_every_kind_has_its_own_color_and_every_system_of_a_kind_its_own_marker():
    points = [{"kind": kind} for kind in ("sft", "sft", "ppo", "dpo", "ppo", "unknown")]
    styles = compare_plots.system_styles(points)
    assert len(set(styles)) == len(styles)
    assert styles[0][0] == styles[1][0] and styles[0][0] != styles[2][0]
    assert len(set(compare_plots.COLORS.values())) == len(compare_plots.COLORS)


def test_the_frontier_is_drawn_for_negative_estimates_of_kl_too(tmp_path):
    points = [
        {"name": "sft", "kind": "sft", "gold": {"mean": 0.0, "ci95": [-0.1, 0.1]}, "kl": 0.0, "seconds": 0.0},
        {"name": "ppo", "kind": "ppo", "gold": {"mean": 0.1, "ci95": [None, None]}, "kl": -0.02, "seconds": 4.0},
    ]
    path = compare_plots.plot_gold_against_kl(points, tmp_path / "kl.png")
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: compare_plots.plot_gold_against_kl([], path),
        lambda path: compare_plots.plot_win_rates([], {}, path),
        lambda path: compare_plots.plot_categories([], {}, path),
        lambda path: compare_plots.plot_calibration([], path),
    ],
)
def test_a_plot_of_nothing_is_refused(draw, tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(tmp_path / "plot.png")


@pytest.mark.parametrize("failed", [{"ppo": REASON}, {}])
def test_a_reference_alone_still_has_its_report(failed, tmp_path):
    report = write_report(tmp_path, [simulated_results(0, 8, ("sft",), failed=failed)])
    assert "No PPO system was compared" in report["verdict"]
    assert (tmp_path / PAGE).is_file()


def without_scores(result, names):
    """The result of a seed whose judge failed on all answers of these systems."""
    n = result["prompts"]
    for name in names:
        for measured in (result["systems"][name], *result["systems"][name]["snapshots"]):
            measured["gold"]["gold"] = [None] * n
    for pair in result["outcomes"]["gold"]:
        if set(pair.split("|")) & set(names):
            result["outcomes"]["gold"][pair] = [None] * n
    return result


@pytest.mark.parametrize("names", [("sft",), SMALL])
def test_a_judge_that_failed_on_the_reference_ends_no_report(names, tmp_path):
    report = write_report(tmp_path, [without_scores(simulated_results(0, 8, SMALL), names)])
    assert report["systems"]["sft"]["gold"] is None
    assert report["systems"]["ppo"]["rating"] is None
    assert "ppo could not be compared" in report["verdict"]


def test_more_seeds_make_no_more_questions():
    entry = {"alignment_tax": {"exact_match": {"accuracy": 0.6, "right": 18, "n": 30}}}
    merged = merging.merged_tax([entry] * 3)["exact_match"]
    assert (merged["right"], merged["n"]) == (54, 90)
    assert merged["wilson95"] == pytest.approx(wilson_interval(18, 30))


def test_a_reward_model_that_is_always_right_has_an_interval(run):
    measured = {"accuracy": 1.0, "accuracy_ci95": [1.0, 1.0], "decided_pairs": 5, "pairs": 60}
    table = reward_model_table({"seeds": [0], "reward_model": [measured]})
    assert table.rows == (("seed 0", "100 % [57, 100]", "5", "60"),)


def test_a_name_becomes_no_link_in_markdown():
    assert plain("[story](http://example.com)") == r"[story]\(http://example.com)"


def test_a_very_long_answer_is_cut_and_says_so(tmp_path):
    path = tmp_path / "seed-0" / "completions" / "sft.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"prompt": "Tell all.", "completion": "word " * 1000, "category": None}))
    ((_, answer),) = side_by_side(tmp_path, 0, ["sft"])[0]["answers"]
    assert len(answer) < 2100 and answer.endswith("characters in all)")
