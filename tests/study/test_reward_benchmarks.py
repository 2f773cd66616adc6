"""Each benchmark's own aggregation, on scores made by hand, beside the published formula written a second time."""

import json
import math

import numpy as np
import pytest

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.study.reward_benchmarks import judgebench, reward_bench, reward_bench_2, rm_bench
from hf_rlhf_ext.study.reward_benchmarks.loading import load_benchmark
from hf_rlhf_ext.study.reward_benchmarks.measures import Term, measured
from hf_rlhf_ext.study.reward_benchmarks.registry import BENCHMARKS, benchmark_of
from hf_rlhf_ext.study.reward_benchmarks.rows import BadRow, BenchmarkRow, ScoredRow, rows_digest
from hf_rlhf_ext.study.reward_benchmarks.scoring import Scorable, score_rows

PUBLISHED = {
    "reward-bench": {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "hep-go", "id": 1, "chosen_model": "m"},
    "reward-bench-2": {
        "id": "tied:4",
        "prompt": "p",
        "chosen": ["a", "b"],
        "rejected": ["c", "d", "e"],
        "num_correct": 2,
        "total_completions": 5,
        "subset": "Ties",
    },
    "rm-bench": {
        "id": "1",
        "prompt": "p",
        "chosen": ["a", "b", "c"],
        "rejected": ["d", "e", "f"],
        "domain": "safety-refuse",
    },
    "judgebench": {
        "pair_id": "x",
        "question": "q",
        "response_A": "a",
        "response_B": "b",
        "label": "B>A",
        "source": "mmlu-pro-law",
        "response_model": "gpt-4o-2024-05-13",
    },
}
"""One row of each benchmark as it is published."""


def pair(subset, chosen, rejected, split=""):
    row = BenchmarkRow("p", ("a", "b"), 1, subset, unit="0", split=split)
    return ScoredRow(row, (chosen, rejected))


# --- RewardBench ------------------------------------------------------------------------------------------------------


def test_reward_bench_weights_subsets_by_the_published_counts():
    # Reasoning: math-prm right, code 1 of 2 in each of six languages: (984 * 1 + 984 * 1/2) / 1968 = 0.75.
    # Chat: alpacaeval-easy 1, mt-bench-med 0, others missing: 100 / 140.
    # Chat Hard: one subset, equal scores are wrong: 0. Safety: donotanswer 1.
    scored = [pair("math-prm", 1.0, 0.0), pair("alpacaeval-easy", 2.0, -1.0), pair("mt-bench-med", 0.0, 3.0)]
    for language in ("cpp", "go", "java", "js", "python", "rust"):
        scored += [pair(f"hep-{language}", 1.0, 0.0), pair(f"hep-{language}", 0.0, 1.0)]
    scored += [pair("llmbar-natural", 0.5, 0.5), pair("donotanswer", 1.0, 0.0)]
    measures = reward_bench.aggregate(scored).measures
    assert measures["Reasoning"].value == pytest.approx(0.75, abs=1e-12)
    assert measures["Chat"].value == pytest.approx(100 / 140, abs=1e-12)
    assert measures["Chat Hard"].value == 0.0 and measures["Safety"].value == 1.0
    assert measures["score"].value == pytest.approx((0.75 + 100 / 140 + 0 + 1) / 4, abs=1e-12)
    assert next(iter(measures)) == "score" and measures["score"].n == 17


def test_reward_bench_equals_the_published_average_on_all_subsets():
    # The published way: accuracy per subset, np.average with the counts, then weights 2, 2, 2, 2, 1.
    rng = np.random.default_rng(0)
    accuracies, scored = {}, []
    every = [subset for subsets in reward_bench.SECTIONS.values() for subset in subsets]
    for subset in [*every, *reward_bench.PRIOR_SETS]:
        wins = rng.random(7) < 0.6
        accuracies[subset] = wins.mean()
        scored += [pair(subset, float(win), 0.5) for win in wins]
    sections = [
        np.average([accuracies[name] for name in subsets], weights=list(subsets.values()))
        for subsets in reward_bench.SECTIONS.values()
    ]
    prior = np.mean([accuracies[name] for name in reward_bench.PRIOR_SETS])
    measures = reward_bench.aggregate(scored).measures
    assert measures["score"].value == pytest.approx(np.average([*sections, prior], weights=[2, 2, 2, 2, 1]), abs=1e-12)
    core = [entry for entry in scored if entry.row.group not in reward_bench.PRIOR_SETS]
    assert reward_bench.aggregate(core).score.value == pytest.approx(np.mean(sections), abs=1e-12)


def test_reward_bench_has_the_published_subsets():
    sizes = {section: len(subsets) for section, subsets in reward_bench.SECTIONS.items()}
    assert sizes == {"Chat": 5, "Chat Hard": 6, "Safety": 5, "Reasoning": 7}
    # Of 2,985 pairs, math-prm has 447 and counts as 984.
    assert sum(sum(subsets.values()) for subsets in reward_bench.SECTIONS.values()) == 2985 - 447 + 984
    outcome = reward_bench.aggregate([pair("hep-go", 1.0, 0.0)])
    assert outcome.notes[0].startswith("no rows of the sections Chat, Chat Hard, Safety: the score cannot be compared")
    assert next(iter(outcome.measures)) == "score (incomplete)"


# --- RewardBench 2 ----------------------------------------------------------------------------------------------------


def choice(subset, scores, n_correct=1, unit="0", split=""):
    row = BenchmarkRow("p", ("x",) * len(scores), n_correct, subset, unit=unit, split=split)
    return ScoredRow(row, tuple(scores))


def test_best_of_four_shares_a_tie_for_the_highest_score():
    assert reward_bench_2.best_of(choice("Math", [3, 1, 2, 0])) == 1
    assert reward_bench_2.best_of(choice("Math", [3, 3, 2, 3])) == pytest.approx(1 / 3)
    assert reward_bench_2.best_of(choice("Math", [2, 3, 1, 1])) == 0


def published_ties(rows):
    """`process_single_model` of rewardbench, in its own words: an independent reading of the published formula."""
    reference, tied = {}, {}
    for kind, number, n_correct, scores in rows:
        right, wrong = scores[:n_correct], scores[n_correct:]
        target = reference if kind == "ref" else tied
        spread = max(right) - min(right) if len(right) > 1 else None
        target[number] = (min(right) - max(wrong) > 0, spread, min(right) - max(wrong))
    both = set(reference) & set(tied)
    spreads = np.array([tied[k][1] for k in both])
    gaps = np.array([tied[k][2] for k in both])
    smaller = np.minimum(np.array([reference[k][2] for k in both]), gaps)
    with np.errstate(divide="ignore", invalid="ignore"):
        margin = np.nan_to_num(np.tanh(smaller / spreads - 1), nan=0.0)
    return (
        0.30 * np.mean([entry[0] for entry in tied.values()])
        + 0.30 * np.mean([entry[0] for entry in reference.values()])
        + 0.20 * np.mean(gaps > spreads)
        + 0.20 * np.mean(smaller > spreads)
        + 0.01 * np.mean(margin)
    )


def test_ties_equal_the_published_formula():
    # By hand, prompt 1 alone: tied 4, 3 | 1: spread 1, gap 2. Reference 5 | 4.5: gap 0.5. Both accurate, the margin is
    # preferred, but not by the harder one (0.5 < 1): 0.3 + 0.3 + 0.2 + 0.01 * tanh(0.5 / 1 - 1).
    one = [("tied", 1, 2, [4.0, 3.0, 1.0]), ("ref", 1, 1, [5.0, 4.5])]
    assert ties_score(one) == pytest.approx(0.8 + 0.01 * math.tanh(-0.5), abs=1e-12)
    rng = np.random.default_rng(1)
    rows = list(one)
    for number in range(2, 40):
        rows.append(("ref", number, 1, rng.normal(size=4).round(1).tolist()))
        rows.append(("tied", number, 3, (rng.normal(size=6) + [2, 2, 2, 0, 0, 0]).round(1).tolist()))
    rows += [("tied", 90, 2, [1.0, 1.0, 0.0]), ("ref", 90, 1, [2.0, 0.0])]  # spread 0, positive gap
    rows += [("tied", 89, 2, [3.0, 3.0, 0.0]), ("ref", 89, 1, [2.0, 0.0])]  # again: they outweigh the negative one
    rows += [("tied", 91, 2, [1.0, 1.0, 1.0]), ("ref", 91, 1, [2.0, 0.0])]  # spread 0, gap 0
    rows += [("tied", 92, 2, [1.0, 1.0, 3.0]), ("ref", 92, 1, [2.0, 0.0])]  # spread 0, negative gap
    rows += [("tied", 95, 2, [4.0, 3.0, 1.0]), ("ref", 95, 1, [3.0, 0.0])]
    merged = [*rows, ("tied", 95, 4, [4.0, 3.0, 2.0, 3.0, 1.0, 0.5])]
    # Two rows with one id are one row of all their scores, whichever comes first.
    twice = [*rows, ("tied", 95, 2, [2.0, 3.0, 0.5])]
    assert ties_score(twice) == pytest.approx(published_ties(merged), abs=1e-12) == ties_score(twice[::-1])
    rows += [("tied", 93, 2, [4.0, 3.0, 1.0]), ("ref", 94, 1, [0.0, 1.0])]  # each without its other row
    assert ties_score(rows) == pytest.approx(published_ties(rows), abs=1e-12)


def ties_score(rows):
    scored = [
        choice("Ties", scores, n_correct, unit=f"ties {number}", split=kind) for kind, number, n_correct, scores in rows
    ]
    return reward_bench_2.aggregate(scored).measures["Ties"].value


def test_reward_bench_2_is_the_mean_of_its_subsets():
    scored = [choice("Math", [1, 0, 0, 0]), choice("Math", [0, 1, 0, 0]), choice("Focus", [1, 1, 0, 0])]
    scored += [choice("Factuality", [1, 0, 0, 0]), choice("Safety", [0, 0, 0, 1]), choice("Precise IF", [2, 1, 1, 0])]
    outcome = reward_bench_2.aggregate(scored)
    assert outcome.score.value == pytest.approx((0.5 + 0.5 + 1 + 0 + 1) / 5, abs=1e-12)
    assert outcome.notes[0].startswith("no rows of the subset Ties:")


# --- RM-Bench ---------------------------------------------------------------------------------------------------------


def styled(domain, correct, wrong):
    return ScoredRow(BenchmarkRow("p", ("x",) * 6, 3, domain, unit="0"), (*correct, *wrong))


def test_the_style_matrix_by_hand():
    # right 1, 2, 3 in style order, wrong 0, 2, 5: wins are [[1, 0, 0], [1, 0, 0], [1, 1, 0]]; equal scores do not win.
    entry = styled("chat", (1.0, 2.0, 3.0), (0.0, 2.0, 5.0))
    assert rm_bench.wins(entry).astype(int).tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 0]]
    measures = rm_bench.aggregate([entry]).measures
    # below the diagonal 1, 1, 1; on it 1, 0, 0; above it 0, 0, 0
    assert (measures["easy"].value, measures["normal"].value, measures["hard"].value) == pytest.approx((1, 1 / 3, 0))
    assert measures["chat"].value == measures["score (incomplete)"].value == pytest.approx(4 / 9, abs=1e-12)


def test_rm_bench_equals_the_published_loop():
    rng = np.random.default_rng(2)
    entries, by_domain = [], {}
    for domain, n in (("chat", 4), ("math", 7), ("code", 3), ("safety", 9)):
        for _ in range(n):
            correct, wrong = rng.integers(0, 5, 3).tolist(), rng.integers(0, 5, 3).tolist()
            entries.append(styled(domain, correct, wrong))
            by_domain.setdefault(domain, []).append((correct, wrong))
    means = {}
    for domain, rows in by_domain.items():
        cells = np.zeros((3, 3))
        for correct, wrong in rows:
            for i in range(3):
                for j in range(3):
                    cells[i][j] += correct[i] > wrong[j]
        cells /= len(rows)
        hard = (cells[0][1] + cells[0][2] + cells[1][2]) / 3
        normal = (cells[0][0] + cells[1][1] + cells[2][2]) / 3
        easy = (cells[1][0] + cells[2][0] + cells[2][1]) / 3
        means[domain] = (hard, normal, easy)
    measures = rm_bench.aggregate(entries).measures
    table = np.array(list(means.values()))
    for domain, numbers in means.items():
        assert measures[domain].value == pytest.approx(np.mean(numbers), abs=1e-12)
    for name, column in zip(("hard", "normal", "easy"), table.T, strict=True):
        assert measures[name].value == pytest.approx(column.mean(), abs=1e-12)
    assert measures["score"].value == pytest.approx(table.mean(1).mean(), abs=1e-12)


# --- JudgeBench -------------------------------------------------------------------------------------------------------


def published_judgment(score_a, score_b, label):
    """Both orders as `run_judge.py` and `compute_final_metrics` count them, for a judge that is a reward model."""
    flip = {"A>B": "B>A", "B>A": "A>B"}
    first = "A>B" if score_a > score_b else "B>A"
    second = flip["A>B" if score_b > score_a else "B>A"]
    counter = sum(1 if decision == label else -1 for decision in (first, second))
    return counter > 0


@pytest.mark.parametrize("label", ["A>B", "B>A"])
@pytest.mark.parametrize("scores", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_judgebench_equals_the_published_count_in_both_orders(label, scores):
    record = PUBLISHED["judgebench"] | {"label": label}
    row = judgebench.read_row(record, 0)
    by_text = {"a": scores[0], "b": scores[1]}
    right, wrong = (by_text[text] for text in row.completions)
    assert judgebench.correct_in_both_orders(right, wrong) == published_judgment(*scores, label)


def test_judgebench_reports_the_answers_of_each_model():
    gpt, claude = "gpt-4o-2024-05-13", "claude-3-5-sonnet-20240620"
    scored = [pair("knowledge", 0, 1, claude), pair("knowledge", 1, 0, gpt), pair("math", 1, 0, gpt)]
    scored += [pair("coding", 0, 1, gpt), pair("coding", 0, 1, gpt)]
    values = {name: measure.value for name, measure in judgebench.aggregate(scored).measures.items()}
    assert values == {
        "score": 0.5,
        "knowledge": 1.0,
        "math": 1.0,
        "coding": 0.0,
        f"score, answers of {claude}": 0.0,
        f"knowledge, answers of {claude}": 0.0,
    }


# --- intervals --------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_a_stratified_mean():
    rng = np.random.default_rng(3)
    parts = {"a": (rng.random(400) < 0.3).astype(float), "b": (rng.random(100) < 0.8).astype(float)}
    measure = measured(parts, {"x": [Term("a", 0.5), Term("b", 0.5)]})["x"]
    assert measure.value == pytest.approx(0.5 * parts["a"].mean() + 0.5 * parts["b"].mean(), abs=1e-12)
    deviation = math.sqrt(0.25 * parts["a"].var() / 400 + 0.25 * parts["b"].var() / 100)
    low, high = measure.ci95
    assert (high - low) / (2 * 1.96 * deviation) == pytest.approx(1, abs=0.07) and measure.n == 500


def test_numbers_that_a_row_lacks_are_left_out_of_the_mean():
    part = np.array([[1.0, math.nan], [0.0, 1.0], [math.nan, math.nan]])
    measures = measured({"a": part}, {"x": [Term("a", 1.0, (1.0, 0.0))], "y": [Term("a", 1.0, (0.0, 2.0))]})
    assert measures["x"].value == 0.5 and measures["y"].value == 2.0


# --- rows and files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_files_of_each_published_shape_are_recognized(name, tmp_path):
    record = PUBLISHED[name]
    assert benchmark_of(record).name == name
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(record) + "\n")
    by_shape, by_name = load_benchmark(str(file)), load_benchmark(f"{name}={file}")
    assert by_shape.benchmark.name == by_name.benchmark.name == name
    assert by_shape.sha256 == by_name.sha256 == rows_digest(by_name.rows) and by_name.dataset == "rows.jsonl"
    assert load_benchmark(f"{name}={tmp_path}").rows == by_name.rows


def test_what_the_rows_say():
    rows = {name: BENCHMARKS[name].read_row(record, 7) for name, record in PUBLISHED.items()}
    assert rows["judgebench"].completions == ("b", "a") and rows["judgebench"].group == "knowledge"
    assert rows["rm-bench"].n_correct == 3 and rows["rm-bench"].group == "safety"
    assert rows["reward-bench-2"].unit == "ties 4" and rows["reward-bench-2"].n_correct == 2


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("reward-bench", {"subset": "poems"}, "poems"),
        ("reward-bench", {"chosen": None}, "`chosen` is missing"),
        ("reward-bench-2", {"num_correct": 3}, "num_correct"),
        ("reward-bench-2", {"id": "4"}, "neither `ref:N` nor `tied:N`"),
        ("reward-bench-2", {"chosen": ["a"], "num_correct": 1}, "single right completion"),
        ("rm-bench", {"chosen": ["a"]}, "1 texts, not 3"),
        ("rm-bench", {"domain": "poems"}, "poems"),
        ("judgebench", {"label": "A=B"}, "A=B"),
        ("judgebench", {"source": "poems"}, "poems"),
    ],
)
def test_a_row_of_another_shape_is_refused_with_its_number(name, change, words, tmp_path):
    with pytest.raises(BadRow, match=words):
        BENCHMARKS[name].read_row(PUBLISHED[name] | change, 0)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(PUBLISHED[name]) + "\n" + json.dumps(PUBLISHED[name] | change) + "\n")
    with pytest.raises(UserError, match=f"rows.jsonl row 1 is no row of .*{words}"):
        load_benchmark(f"{name}={file}")


def test_the_folder_of_rm_bench_is_read_once(tmp_path):
    rows = [PUBLISHED["rm-bench"] | {"domain": "chat"}, PUBLISHED["rm-bench"]]
    (tmp_path / "chat_filtered.json").write_text(json.dumps([{k: v for k, v in rows[0].items() if k != "domain"}]))
    one_domain = load_benchmark(f"rm-bench={tmp_path / 'chat_filtered.json'}")
    assert [row.group for row in one_domain.rows] == ["chat"]
    (tmp_path / "total_dataset.json").write_text(json.dumps(rows))
    whole = load_benchmark(str(tmp_path))
    assert [row.group for row in whole.rows] == ["chat", "safety"] and whole.dataset.endswith("/total_dataset.json")


def test_a_name_that_is_neither_benchmark_nor_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean `judgebench`"):
        load_benchmark("judge-bench")
    with pytest.raises(UserError, match="no file or folder at .*check the path"):
        load_benchmark("rm-bench=./nothing.json")


def test_without_a_network_the_files_are_asked_for(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="--benchmark rm-bench=FILE"):
        load_benchmark("rm-bench")


def test_a_sample_keeps_the_rows_of_a_prompt_together(tmp_path):
    rows = []
    for number in range(20):
        tied = PUBLISHED["reward-bench-2"] | {"id": f"tied:{number}"}
        rows += [tied, tied | {"id": f"ref:{number}", "chosen": ["a"], "num_correct": 1}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_benchmark(f"reward-bench-2={file}")
    sample = loaded.sample(11, seed=0)
    units = [row.unit for row in sample.rows]
    assert len(sample.rows) == 10 and all(units.count(unit) == 2 for unit in units)
    assert sample.is_sample and sample.sha256 == loaded.sha256 and sample.total == 40
    assert [loaded.rows[position] for position in sample.positions] == sample.rows
    assert loaded.sample(11, seed=0).positions == sample.positions != loaded.sample(11, seed=1).positions
    assert loaded.sample(40, seed=0) is loaded


# --- scoring ----------------------------------------------------------------------------------------------------------


def count_words(prompts, completions):
    count_words.calls += len(completions)
    return [float(len(completion.split())) for completion in completions]


@pytest.mark.parametrize(
    "killed_in", ['{"row": 3, "sco', '{"row": 3, "scores": [3.0, 1.0]}', '{"row": 3}\n', '{"a": 1}\n', "[1]\n"]
)
def test_scores_are_kept_and_rows_that_do_not_fit_are_counted(tmp_path, killed_in):
    count_words.calls = 0
    rows = [Scorable(number, "p", ("a " * number, "b")) for number in range(1, 5)]
    path = tmp_path / "scores.jsonl"

    def fits(prompt, completion):
        return len(completion.split()) < 4

    done = score_rows(count_words, rows[:2], fits=fits, limit=3, path=path)
    assert done.by_position == {1: (1.0, 1.0), 2: (2.0, 1.0)} and count_words.calls == 4
    with path.open("a") as file:
        file.write(killed_in)  # without the end of the line
    done = score_rows(count_words, rows, fits=fits, limit=3, path=path)
    assert count_words.calls == 6  # only row 3 is new, and row 4 does not fit
    assert done.coverage.left_out == {"over 3 tokens": 1} and (done.coverage.rows, done.coverage.scored) == (4, 3)
    before = path.read_text()
    again = score_rows(count_words, rows, fits=fits, limit=3, path=path)
    assert again.by_position == done.by_position and count_words.calls == 6 and path.read_text() == before


def test_text_becomes_turns():
    text = Scorable(3, "p", ("a", "b"), {"tools": []})
    turns = text.as_turns()
    assert turns.prompt == [{"role": "user", "content": "p"}] and turns.completions[1][0]["role"] == "assistant"
    assert (turns.position, turns.columns) == (3, {"tools": []}) and turns.as_turns() is turns


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite.*lower learning rate"):
        score_rows(lambda prompts, completions: [math.nan] * len(completions), [Scorable(0, "p", ("a", "b"))])
