"""Writes the tables of README and docs: numbers from the committed JSON, options and metrics from the code.

make tables

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`; NAME is a function of `TABLES`.
"""

import dataclasses
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `tests.support`, whose rows are tables too

DOCS = ROOT / "docs"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end table -->)", re.DOTALL)
SEEDS = (0, 1, 2)


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]], align: str = "") -> str:
    """A Markdown table; `align` has `r` for each column of numbers, `l` for others (default: all `l`)."""
    header = list(header)
    align = align or "l" * len(header)
    ruler = ["---:" if letter == "r" else "---" for letter in align]
    lines = [header, ruler, *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def study(name: str) -> dict[str, Any]:
    return json.loads((DOCS / "study" / f"{name}.json").read_text(encoding="utf-8"))


def quickstart_reports(prefix: str = "") -> list[dict[str, Any]]:
    """Reports of the quickstart by seed: of its default gold reward, or those whose files have this prefix."""
    paths = (DOCS / "quickstart").glob(f"{prefix}seed*.json")
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(reports, key=lambda report: report["seed"])


def arrow(before: float, after: float, digits: int) -> str:
    return f"{before:.{digits}f} → {after:.{digits}f}"


def interval(value: float, low: float, high: float, digits: int = 3) -> str:
    text = f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
    return text.replace("-", "−")


# The quickstart


def quickstart(page: Path) -> str:
    reports = quickstart_reports()
    rows: dict[str, list[str]] = {
        "Reward model: accuracy on held-out judgments (baseline: the longer one)": [],
        "Gold reward on held-out prompts, SFT → PPO": [],
        "KL to the SFT policy, nats per completion": [],
        "Minutes, peak memory": [],
    }
    for report in reports:
        model = report["reward_model"]
        ppo = report["ppo"]
        minutes = sum(report["seconds"].values()) / 60
        cells = (
            f"{model['accuracy']:.3f} ({model['longer_wins_baseline']:.3f})",
            arrow(ppo["gold_before"], ppo["gold_after"], 2),
            f"{ppo['kl']:.1f}",
            f"{minutes:.0f} min, {report['peak_memory_gb']:.1f} GB",
        )
        for row, cell in zip(rows.values(), cells, strict=True):
            row.append(cell)
    header = ["", *(f"seed {report['seed']}" for report in reports)]
    return markdown_table(header, ([label, *cells] for label, cells in rows.items()))


GOLDS_IN_WORDS = {"on_topic": "on topic and kind", "vader": "sentiment"}


def quickstart_details(page: Path) -> str:
    header = (
        "seed",
        "judged by",
        "reward model accuracy (95% interval)",
        "highest possible accuracy",
        "gold reward gain (95% interval)",
        "tokens per completion",
    )
    rows = []
    for report in quickstart_reports():
        model = report["reward_model"]
        ppo = report["ppo"]
        rows.append(
            [
                str(report["seed"]),
                GOLDS_IN_WORDS[report.get("gold_reward", "vader")],  # the oldest reports do not say it
                interval(model["accuracy"], *model["accuracy_ci95"]),
                f"{model['annotator_ceiling']:.3f}",
                interval(ppo["gold_gain"], *ppo["gold_gain_ci95"]),
                arrow(ppo["mean_length_before"], ppo["mean_length_after"], 1),
            ]
        )
    return markdown_table(header, rows)


NOT_YET = "Not measured yet.\n"
HABITS = {
    "stock_share": "Answers with a sentence that three or more prompts get",
    "most_frequent_share": "Answers with the most frequent sentence",
    "distinct_2": "Distinct-2 of all answers",
    "repetition_4": "Repeated 4-grams within an answer",
    "prompt_similarity": "Similarity of words to the prompt",
}


def quickstart_runs() -> dict[str, list[dict[str, Any]]]:
    """Reports that have both gold rewards and habits, by the gold reward that the annotator judged by, in words."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for report in [*quickstart_reports(), *quickstart_reports("sentiment-")]:
        if "habits" in report:
            runs.setdefault(GOLDS_IN_WORDS[report["gold_reward"]], []).append(report)
    return runs


def quickstart_golds(page: Path) -> str:
    """Both gold rewards before and after, means over seeds: of runs judged by the one and by the other."""
    runs = quickstart_runs()
    rows = []
    for judged_by, reports in runs.items():
        row = [judged_by, ", ".join(str(report["seed"]) for report in reports)]
        for gold in ("on_topic", "sentiment"):
            before, after = (fmean(report["golds"][gold][end] for report in reports) for end in ("before", "after"))
            row.append(arrow(before, after, 2))
        rows.append(row)
    header = ("judged by", "seeds", "on topic and kind, SFT → PPO", "sentiment, SFT → PPO")
    return markdown_table(header, rows) if rows else NOT_YET


def quickstart_habits(page: Path) -> str:
    """What the policies repeat, means over seeds."""
    runs = quickstart_runs()
    rows = []
    for key, label in HABITS.items():
        row = [label]
        for reports in runs.values():
            before, after = (fmean(report["habits"][end][key] for report in reports) for end in ("before", "after"))
            row.append(arrow(before, after, 2))
        rows.append(row)
    header = ["SFT → PPO, mean over seeds", *(f"judged by {gold}" for gold in runs)]
    return markdown_table(header, rows) if runs else NOT_YET


def quickstart_sentences(page: Path) -> str:
    """The sentence that each policy says most often after PPO."""
    rows = []
    for judged_by, reports in quickstart_runs().items():
        for report in reports:
            after = report["habits"]["after"]
            share = f"{after['most_frequent_share']:.0%}"
            rows.append([str(report["seed"]), judged_by, cell_text(after["most_frequent_sentence"]), share])
    return markdown_table(("seed", "judged by", "said most after PPO", "of answers"), rows) if rows else NOT_YET


def quickstart_samples(page: Path) -> str:
    """The first test prompts of seed 0: both policies side by side. The test prompts of a seed are always the same."""
    sampled = []
    for judged_by, reports in quickstart_runs().items():
        sampled += [(judged_by, report["samples"]) for report in reports if report["seed"] == 0]
    if not sampled:
        return NOT_YET
    rows = []
    for number, first in enumerate(sampled[0][1]):
        row = [cell_text(first["prompt"])]
        for _, samples in sampled:
            if samples[number]["prompt"] != first["prompt"]:
                raise ValueError(f"sample {number + 1} of seed 0 has another prompt in another run of it")
            row += [cell_text(samples[number]["before"]), cell_text(samples[number]["after"])]
        rows.append(row)
    header = ["prompt"]
    for judged_by, _ in sampled:
        header += [f"{judged_by}: SFT", f"{judged_by}: PPO"]
    return markdown_table(header, rows)


def quickstart_gold(page: Path) -> str:
    """What both gold rewards give to texts of known kinds."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from quickstart_gold import means

    rows = []
    for kind, (on_topic, sentiment) in means().items():
        rows.append([kind, f"{on_topic:.2f}", f"{sentiment:+.2f}".replace("-", "−")])
    return markdown_table(("text", "on topic and kind (0 to 1)", "sentiment (−1 to 1)"), rows, "lrr")


def cell_text(text: str) -> str:
    """What a model wrote, in one line, with its markup shown and not rendered."""
    from hf_rlhf_ext.hub.cards.markdown import escape_markdown

    return escape_markdown(" ".join(text.split())) or "(empty)"


def quickstart_seconds(page: Path) -> str:
    reports = quickstart_reports()
    rows = []
    for stage in reports[0]["seconds"]:
        rows.append([f"`{stage}`", *(f"{report['seconds'][stage]:.0f}" for report in reports)])
    return markdown_table(["stage", *(f"seed {report['seed']}" for report in reports)], rows, "l" + "r" * len(reports))


def quickstart_categories(page: Path) -> str:
    """All seeds together, each prompt counted once."""
    reports = quickstart_reports()
    rows = []
    for name in reports[0]["categories"]:
        of_seed = [report["categories"][name] for report in reports]
        n = sum(category["n"] for category in of_seed)
        before = sum(category["gold_before"] * category["n"] for category in of_seed) / n
        after = sum(category["gold_after"] * category["n"] for category in of_seed) / n
        rows.append([name, str(n), f"{before:+.2f}", f"{after:+.2f}"])
    return markdown_table(["use case", "prompts", "gold before", "gold after"], rows, "lrrr")


# Benchmarks


REWARD_BENCHMARK = (
    # label, dtype, TRL's run, ours
    ("pairs, TRL's micro-batch 16", "bfloat16", "trl, micro-batch 16", "ours, 16 prompts"),
    ("the same, gradient checkpointing", "bfloat16", "trl, 16, checkpointing", "ours, 16, checkpointing"),
    ("the same, gradient checkpointing", "float32", "trl, 16, checkpointing", "ours, 16, checkpointing"),
    ("pairs, TRL's micro-batch 4", "bfloat16", "trl, micro-batch 4", "ours, 16 prompts"),
    ("pairs, TRL's micro-batch 4", "float32", "trl, micro-batch 4", "ours, 16 prompts"),
    ("pairs, TRL's micro-batch 1", "float32", "trl, micro-batch 1", "ours, 16 prompts"),
    ("K = 4, short prompts", "bfloat16", "trl, K = 4 as pairs", "ours, K = 4"),
    ("K = 4, conversations", "float32", "trl, K = 4 as pairs", "ours, K = 4"),
    ("K = 9, short prompts", "bfloat16", "trl, K = 9 as pairs", "ours, K = 9"),
    ("K = 9, conversations", "float32", "trl, K = 9 as pairs", "ours, K = 9"),
)


def reward_benchmark(page: Path) -> str:
    measured = study("reward_benchmark")
    rows = []
    for label, dtype, trl_run, our_run in REWARD_BENCHMARK:
        trl = measured[dtype]["runs"][trl_run]
        ours = measured[dtype]["runs"][our_run]
        # Both sides trained on the same rows, and the label says on which.
        assert trl["rows"] == ours["rows"] and ("harmless" in trl["rows"]) == ("conversations" in label)
        rows.append(
            [
                label,
                {"bfloat16": "bf16", "float32": "fp32"}[dtype],
                f"{trl['pairs_per_s']:.2f}",
                f"{ours['pairs_per_s']:.2f}",
                f"{ours['pairs_per_s'] / trl['pairs_per_s']:.1f}",
                arrow(trl["peak_gb"], ours["peak_gb"], 1),
            ]
        )
    header = ("", "dtype", "TRL, pairs/s", "ours, pairs/s", "ratio", "peak GB, TRL → ours")
    return markdown_table(header, rows, "llrrrr")


PPO_STAGES = ("generate", "score", "update")
PPO_BENCHMARK = (
    # label, run
    ("TRL 1.12 PPO", "trl"),
    ("TRL 1.16 GRPO", "trl grpo"),
    ("TRL 1.16 GRPO, output head for completions only", "trl grpo, less head"),
    ("TRL 1.16 RLOO", "trl rloo"),
    ('ours, `critic="head"`', "ours, head"),
    ('ours, `critic="adapter"` (the default)', "ours, adapter"),
    ("ours, `head`, `num_generations=4`", "ours, head, K = 4"),
    ("ours, `adapter`, `num_generations=4`", "ours, adapter, K = 4"),
    ("ours, `none`, `num_generations=4`", "ours, none, K = 4"),
)


def ppo_benchmark(page: Path) -> str:
    """Seconds of an update and of its stages, beside TRL's. A run that is not measured yet has no row."""
    runs = study("ppo_benchmark")["runs"]
    rows = []
    for label, name in PPO_BENCHMARK:
        if name not in runs:
            continue
        run = runs[name]
        stages = [f"{run[stage]:.1f}" if stage in run else "–" for stage in PPO_STAGES]
        ratio = runs["trl"]["seconds"] / run["seconds"]
        rows.append([label, f"{run['seconds']:.1f}", *stages, f"{ratio:.2f}", f"{run['peak_gb']:.2f}"])
    header = ("", "seconds per update", "sampling", "scoring", "training", "times as fast", "peak GB")
    return markdown_table(header, rows, "lrrrrrr")


def ppo_benchmark_stages(page: Path) -> str:
    """Seconds of a stage, relative to bare passes of the same model over the same tokens."""
    stages = study("ppo_benchmark")["results"]["stages"]
    rows = []
    for critic, measured in stages.items():
        ours, bare = (sum(measured[stage][side] for stage in PPO_STAGES) for side in ("ours", "bare"))
        ratios = [measured[stage]["ratio"] for stage in PPO_STAGES] + [ours / bare]
        rows.append([f"`{critic}`", *(f"{ratio:.2f}" for ratio in ratios)])
    return markdown_table(("critic", "sampling", "scoring", "training", "all"), rows, "lrrrr")


# Studies


def reward_study(page: Path) -> str:
    summary = study("reward_model")["summary"]
    rows = []
    for seed in summary["seeds"]:
        rows.append([str(seed), interval(*summary[f"ours-{seed}"]), interval(*summary[f"trl-{seed}"])])
    return markdown_table(("seed", "ours (95% interval)", "TRL (95% interval)"), rows)


def label_noise(page: Path) -> str:
    accuracy = study("label_noise")["accuracy"]
    rows = []
    for level in ("0.0", "0.1", "0.2", "0.3", "0.4"):
        cells = []
        for method in ("single", "split", "reliability"):
            values = [accuracy[f"{level}|{method}|{seed}"] for seed in SEEDS]
            cells.append(f"{fmean(values):.3f} ± {stdev(values):.3f}")
        rows.append([f"{float(level):.0%}", *cells])
    header = ("flipped votes", "one vote per pair", "mean of three votes", "weighted by reliability")
    return markdown_table(header, rows, "rrrr")


def ppo_study_stories(page: Path) -> str:
    summary = study("ppo")["summary"]
    rows = []
    for seed in SEEDS:
        run = summary[f"stories260K-{seed}"]
        rows.append(
            [
                str(seed),
                arrow(*run["gold_before_after"], 2),
                arrow(*run["score_before_after"], 2),
                f"{run['kl_mean']:.2f}",
                f"{run['moving_mean_within_25']:.0%}",
                f"{run['explained_variance']:.2f}",
            ]
        )
    header = ("seed", "gold reward", "reward", "mean KL", "KL means within ±25 %", "explained variance")
    return markdown_table(header, rows, "rrrrrr")


def ppo_study_smollm2(page: Path) -> str:
    summary = study("ppo")["summary"]
    rows = []
    for seed in SEEDS:
        run = summary[f"smollm2-{seed}"]
        cells = [arrow(*run[f"{name}_before_after"], 2) for name in ("gold", "score", "kl")]
        rows.append([str(seed), *cells])
    return markdown_table(("seed", "gold reward", "reward", "KL, nats per completion"), rows, "rrrr")


def rounds_study(page: Path) -> str:
    """A row per policy, the mean over the seeds that have it. It works while seeds are missing."""
    measured = study("rounds")
    rows = [rounds_row("SFT", measured["sft"])]
    for entry in measured["rounds"]:
        rows.append(rounds_row(f"round {entry['round']}", entry))
    if "one_shot" in measured:
        rows.append(rounds_row("one shot", measured["one_shot"]))
        last = measured["rounds"][-1]["round"]
        difference = mean_and_interval(measured["last_round_minus_one_shot"])
        rows.append([f"round {last} minus one shot", "", "", difference, "", "", "", ""])
    header = ("policy", "seeds", "labels", "gold reward", "gain over SFT", "gain over the last round", "KL, nats")
    return markdown_table((*header, "reward model accuracy"), rows, "lrrrrrrr")


def rounds_row(name: str, entry: dict[str, Any]) -> list[str]:
    cells = [name, str(len(entry["seeds"])), str(entry["labels"]), mean_and_interval(entry["gold"])]
    for gain in ("gain_over_sft", "gain_over_last"):
        cells.append(mean_and_interval(entry[gain]) if gain in entry else "")
    accuracy = entry.get("reward_model_accuracy")
    return [*cells, f"{entry['kl']:.2f}", "" if accuracy is None else f"{accuracy:.3f}"]


def mean_and_interval(value: dict[str, Any]) -> str:
    return interval(value["mean"], *value["ci95"], digits=2)


def rounds_study_seeds(page: Path) -> str:
    """Gold reward of each policy by seed, with intervals over prompts."""
    measured = study("rounds")
    names = {"sft": "SFT"}
    for entry in measured["rounds"]:
        names[f"round-{entry['round']}"] = f"round {entry['round']}"
    if "one_shot" in measured:
        names["one_shot"] = "one shot"
    rows = []
    for seed, policies in measured["by_seed"].items():
        cells = [mean_and_interval(policies[name]["gold"]) if name in policies else "" for name in names]
        rows.append([seed, *cells])
    return markdown_table(("seed", *names.values()), rows, "r" * (1 + len(names)))


def ppo_with_shared_prompts(results: dict[str, Any], link: str) -> list[list[str]]:
    """The row of `at_a_glance` for four completions per prompt, if they were measured."""
    names = ("head_ratio_k4", "adapter_ratio_k4", "none_ratio_k4", "grpo_ratio_k4", "grpo_less_head_ratio_k4")
    if any(results.get(name) is None for name in names):
        return []
    head, adapter, none, grpo, grpo_less_head = (f"{results[name]:.1f}×" for name in names)
    label = (
        "The same with `num_generations=4`, also without a critic; without a critic against TRL 1.16's GRPO, as it is "
        "without a GPU and with its output head for completions only"
    )
    return [[label, f"{head}, {adapter}, {none}; {grpo}, {grpo_less_head}", link]]


def at_a_glance(page: Path) -> str:
    """One row per result, each with a link to how it was measured."""
    benchmarks = os.path.relpath(DOCS / "results" / "benchmarks.md", page.parent)
    studies = os.path.relpath(DOCS / "results" / "studies.md", page.parent)
    reward = study("reward_benchmark")
    bf16 = reward["bfloat16"]
    pairs_trl = bf16["runs"]["trl, micro-batch 16"]["peak_gb"]
    pairs_ours = bf16["runs"]["ours, 16 prompts"]["peak_gb"]
    fp32 = reward["float32"]["results"]
    model = study("reward_model")["summary"]
    ppo = study("ppo_benchmark")
    noise = study("label_noise")["accuracy"]
    single = fmean(noise[f"0.4|single|{seed}"] for seed in SEEDS)
    reliability = fmean(noise[f"0.4|reliability|{seed}"] for seed in SEEDS)
    difference = interval(*model["ours_minus_trl"])
    rows = [
        [
            "Reward model, speed against TRL 1.16 at its micro-batch 16, and at its fastest (bf16)",
            f"{bf16['results']['pairs_ratio']:.1f}× ({arrow(pairs_trl, pairs_ours, 1)} GB), "
            f"{bf16['results']['pairs_ratio_best']:.1f}×",
            f"[benchmark]({benchmarks}#reward-model)",
        ],
        [
            "K = 9 completions per prompt against all pairs, short prompts and conversations",
            f"{bf16['results']['k9_ratio']:.0f}× and {fp32['k9_ratio']:.0f}×",
            f"[benchmark]({benchmarks}#reward-model)",
        ],
        [
            "Reward model, accuracy minus TRL's, three seeds (95% interval)",
            difference,
            f"[study]({studies}#reward-model)",
        ],
        [
            "PPO, speed against TRL 1.12, with the critic as a head, and as an adapter (the default)",
            f"{ppo['results']['head_ratio']:.1f}× "
            f"({arrow(ppo['runs']['trl']['peak_gb'], ppo['runs']['ours, head']['peak_gb'], 1)} GB), "
            f"{ppo['results']['adapter_ratio']:.1f}×",
            f"[benchmark]({benchmarks}#ppo)",
        ],
        *ppo_with_shared_prompts(ppo["results"], f"[benchmark]({benchmarks}#ppo)"),
        was_rl_worth_it(page),
        [
            "40% of the votes flipped: accuracy with one vote per pair → weighted by reliability",
            arrow(single, reliability, 2),
            f"[study]({studies}#label-noise)",
        ],
    ]
    return markdown_table(("", "measured", ""), rows)


def was_rl_worth_it(page: Path) -> list[str]:
    """Row of `at_a_glance`: what three systems gain over SFT."""
    world = study("compare")["worlds"]["smollm2"]
    gains = {name: world["systems"][name]["gold_gain"] for name in ("ppo", "best_of_16", "grpo")}
    cells = ", ".join(f"+{interval(gain['mean'], *gain['ci95'], digits=2)}" for gain in gains.values())
    results = os.path.relpath(DOCS / "results" / "compare.md", page.parent)
    label = f"Gain over SFT in gold reward with PPO, best of 16, and GRPO; {len(world['seeds'])} seeds (95% intervals)"
    return [label, cells, f"[study]({results}#smollm2-135m)"]


# From the code


def metrics(page: Path) -> str:
    from hf_rlhf_ext.metrics.names import METRICS

    return markdown_table(
        ("metric", "unit", "meaning"),
        ([f"`{name}`", metric.unit, escaped(metric.meaning)] for name, metric in METRICS.items()),
    )


def comparison_formats(page: Path) -> str:
    from hf_rlhf_ext.readers.registry import COMPARISONS

    return formats_table(COMPARISONS)


def demonstration_formats(page: Path) -> str:
    from hf_rlhf_ext.readers.registry import DEMONSTRATIONS

    return formats_table(DEMONSTRATIONS)


def formats_table(formats: Iterable[Any]) -> str:
    rows = [[f"`{fmt.name}`", fmt.example, column_list(fmt.columns)] for fmt in formats]
    return markdown_table(("format", "an example", "columns it must have"), rows)


def column_list(columns: Sequence[str]) -> str:
    """The names of columns as code. Of many, such as `response_1` to `response_32`, the first two and the last."""
    names = [f"`{column}`" for column in columns]
    if len(names) > 8:
        names = [*names[:2], "…", names[-1]]
    return ", ".join(names)


# From the tests: published data sets and how each one is read


PUBLISHED_SETS = ROOT / "tests" / "readers" / "published.py"
CHECKS = {
    "file": "a real file",
    "card": "the data set's card",
    "code": "code that reads it",
    "documentation": "documentation",
    "example": "an example row",
    "memory": "memory",
}
"""How the columns of a published set were found out -> its name in the tables."""


def published_shapes(page: Path) -> str:
    """How many sets of each kind were checked in which way."""
    rows = []
    for check, label in CHECKS.items():
        counts = []
        for kind in ("comparisons", "demonstrations"):
            counts.append(str(sum(check_of(entry.source) == check for entry in published(kind))))
        rows.append([label, *counts])
    return markdown_table(("columns known from", "comparisons", "demonstrations"), rows, "lrr")


def published_comparisons(page: Path) -> str:
    return published_table("comparisons")


def published_demonstrations(page: Path) -> str:
    return published_table("demonstrations")


def published(kind: str) -> list[Any]:
    entries = runpy.run_path(str(PUBLISHED_SETS))["PUBLISHED"]
    return [entry for entry in entries if entry.kind == kind]


def check_of(source: str) -> str:
    """The kind of a source, a key of `CHECKS`."""
    for check in ("file", "memory", "example", "code"):
        if source.startswith(check):
            return check
    return "card" if "card of" in source or source.startswith("dataset card") else "documentation"


def published_table(kind: str) -> str:
    rows = []
    for entry in published(kind):
        check = check_of(entry.source)
        known_from = CHECKS[check]
        if check != "memory" and "memory" in entry.source:
            known_from += ", partly memory"
        rows.append([escaped(entry.name), escaped(read_as(entry)), known_from])
    return markdown_table(("data set", "read as", "columns known from"), rows)


def read_as(entry: Any) -> str:
    """The roles that the library finds for the columns of a set, or why it does not read the set."""
    from hf_rlhf_ext.readers.formats import resolve
    from hf_rlhf_ext.readers.profile import profile_of
    from hf_rlhf_ext.readers.registry import COMPARISONS, DEMONSTRATIONS

    if entry.expect.refused:
        return f"refused: `{entry.expect.refused}` holds media"
    formats = COMPARISONS if entry.kind == "comparisons" else DEMONSTRATIONS
    reading = resolve(profile_of(entry.rows), formats, entry.name)
    if reading.format.roles is None:
        return f"reader `{reading.format.name}`: {column_list(reading.format.columns)}"
    if entry.kind == "comparisons":
        return roles_in_words(reading.format.roles)
    parts = [roles_in_words(reading.convert.roles)]
    if reading.convert.label_columns:
        parts.append(f"label ← {column_list(reading.convert.label_columns)}")
    if reading.convert.numbered:
        parts.append(f"later turns ← {column_list(reading.convert.numbered)}")
    return "; ".join(parts)


def roles_in_words(roles: Any) -> str:
    """Each role with its columns. A role whose column has the same name is only named."""
    mapping = roles.as_mapping()
    meaning = mapping.pop("verdict_is", None)
    parts = []
    for role, columns in mapping.items():
        if role in ("as_text", "repeats"):  # these say how columns are read, and are no part of a row
            continue
        part = f"`{role}`" if columns in (role, [role]) else f"{role} ← {column_list(as_list(columns))}"
        if role in ("verdict", "votes") and meaning:
            part += f" ({meaning})"
            meaning = None
        parts.append(part)
    if meaning:  # no column has the verdict: it is the order of the answers
        parts.append(f"verdict ← {meaning}")
    return "; ".join(parts)


def as_list(columns: str | list[str]) -> list[str]:
    return [columns] if isinstance(columns, str) else columns


def options_ppo(page: Path) -> str:
    from hf_rlhf_ext import PPOConfig

    return options_table(PPOConfig)


def options_without_effect(page: Path) -> str:
    from tests.ppo.test_trainer_options import HARMLESS_OPTIONS

    return markdown_table(("option", "why"), ([f"`{name}`", reason] for name, reason in HARMLESS_OPTIONS.items()))


def options_reward(page: Path) -> str:
    from hf_rlhf_ext import BradleyTerryConfig

    return options_table(BradleyTerryConfig)


def options_table(config: type) -> str:
    """Options that TRL's configuration does not have, or whose default differs."""
    (base,) = config.__bases__
    inherited = {field.name: field for field in dataclasses.fields(base)}
    rows = []
    for field in dataclasses.fields(config):
        known = inherited.get(field.name)
        if known is not None and default_of(known) == default_of(field):
            continue
        rows.append([f"`{field.name}`", f"`{default_of(field)!r}`", escaped(help_of(field))])
    return markdown_table(("option", "default", "meaning"), rows)


def default_of(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def help_of(field: dataclasses.Field) -> str:
    return " ".join(field.metadata.get("help", "").split()).replace("%%", "%")


def escaped(text: str) -> str:
    """For a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def memory_parts() -> list[dict[str, Any]]:
    """The measured points of `make bench-memory`, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((DOCS / "study" / "memory").glob("*.json"))]


def memory_points(page: Path) -> str:
    from benchmarks.memory import table

    parts = memory_parts()
    return table(parts) if parts else NOT_YET


def memory_summary(page: Path) -> str:
    """Errors over all points and over those that were chosen after the planner was finished."""
    from benchmarks.memory import summary

    parts = memory_parts()
    groups = {
        "all": parts,
        "chosen after the planner was finished": [part for part in parts if part["chosen_after_freeze"]],
    }
    rows = []
    for title, group in groups.items():
        if group:
            n, *errors = summary(group).values()
            rows.append([title, str(n), *(f"{error:.1%}" for error in errors)])
    header = ("points", "number", "median error", "largest error", "largest underestimate")
    return markdown_table(header, rows, "lrrrr") if rows else NOT_YET


TABLES: dict[str, Callable[[Path], str]] = {
    table.__name__: table
    for table in (
        at_a_glance,
        comparison_formats,
        demonstration_formats,
        label_noise,
        memory_points,
        memory_summary,
        metrics,
        options_ppo,
        options_reward,
        options_without_effect,
        ppo_benchmark,
        ppo_benchmark_stages,
        ppo_study_smollm2,
        ppo_study_stories,
        published_comparisons,
        published_demonstrations,
        published_shapes,
        quickstart,
        quickstart_categories,
        quickstart_details,
        quickstart_gold,
        quickstart_golds,
        quickstart_habits,
        quickstart_samples,
        quickstart_seconds,
        quickstart_sentences,
        reward_benchmark,
        reward_study,
        rounds_study,
        rounds_study_seeds,
    )
}


def support_tables() -> dict[str, Callable[[Path], str]]:
    """What is supported: a row per test in `tests/support`."""
    from tests.support.table import table_functions

    return table_functions(markdown_table)


TABLES |= support_tables()


def tables_of_compare() -> dict[str, Callable[[Path], str]]:
    """The tables of docs/results/compare.md."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from compare_tables import compare_tables

    return compare_tables()


TABLES |= tables_of_compare()


def tables_of_overoptimization() -> dict[str, Callable[[Path], str]]:
    """The tables of docs/results/overoptimization.md."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from overoptimization_tables import overoptimization_tables

    return overoptimization_tables(markdown_table)


TABLES |= tables_of_overoptimization()


def tables_of_learning() -> dict[str, Callable[[Path], str]]:
    """The tables of docs/results/learning.md."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from learning_tables import learning_tables

    return learning_tables(markdown_table)


TABLES |= tables_of_learning()


def filled(page: Path) -> str:
    """The page's text with its tables as they should be.

    Raises:
        KeyError: the page names a table that is not in `TABLES`.
    """

    def fill(place: re.Match) -> str:
        start, name, _, end = place.groups()
        return start + TABLES[name](page) + end

    return PLACE.sub(fill, page.read_text(encoding="utf-8"))


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def main() -> int:
    for page in pages():
        text = filled(page)
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
