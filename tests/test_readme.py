"""The README's code runs and its commands parse."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from statistics import fmean, stdev

import pytest

from hf_rlhf_ext.cli.launch import take_launch_options
from hf_rlhf_ext.cli.main import find_command
from hf_rlhf_ext.cli.options import machine_defaults
from hf_rlhf_ext.cli.parsing import parse_recipe

pytestmark = pytest.mark.xdist_group("processes")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What names a repository on the Hub runs in tests/hub/test_readme_hub.py, against a stand-in.
SNIPPETS = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if '"alice/' not in code]
# As a user of the installed package types them, or as someone in a checkout does; a backslash goes on to the next line.
COMMANDS = [
    shlex.split(" ".join(line.strip().rstrip("\\") for line in block.splitlines()))
    for block in re.findall(r"^    (?:\.venv/bin/)?(?:python recipes/|hf-rlhf )(?:.*\\\n)*.*", README, re.MULTILINE)
]
WITHOUT_MACHINE_DEFAULTS = ("inspect_data", "check_reward")


def _dataclasses(stage: str):
    return import_module(f"recipes.{stage}").ARGUMENTS


def _stage_and_options(command: list[str]) -> tuple[str, list[str]]:
    """`hf-rlhf check-reward --x 1` and `python recipes/check_reward.py --x 1` alike: check_reward and its options."""
    if Path(command[0]).name == "hf-rlhf":
        known = find_command(command[1])  # refuses a command that is not there
        _, options = take_launch_options(command[2:])
        return Path(known.recipe or known.name).stem, options
    assert (ROOT / command[1]).is_file()
    return Path(command[1]).stem, command[2:]


def test_readme_shows_what_this_file_checks():
    assert len(SNIPPETS) >= 2 and len(COMMANDS) >= 16
    # Both ways to start a recipe are shown.
    assert {Path(command[0]).name for command in COMMANDS} == {"hf-rlhf", "python"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[1])
def test_recipe_commands_of_the_readme_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    stage, options = _stage_and_options(command)
    if "--help" in options or stage in ("quickstart", "merge", "push", "env"):
        return
    defaults = {} if stage in WITHOUT_MACHINE_DEFAULTS else machine_defaults()
    parse_recipe(_dataclasses(stage), options, defaults=defaults)


@pytest.mark.slow
@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_python_of_the_readme_runs(code, installed, tmp_path):
    """From the installed wheel, outside of the checkout."""
    code += "\nimport hf_rlhf_ext\nprint(hf_rlhf_ext.__file__)"
    known = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=known | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == str(installed / "hf_rlhf_ext" / "__init__.py")


def test_every_make_target_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_table_of_the_readme_is_that_of_the_committed_reports():
    from recipes.quickstart_parts.report import results_table

    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("docs/quickstart/seed*.json"))]
    (shown,) = re.findall(r"^\| seed \| reward model accuracy.*\n(?:\|.*\n)*", README, re.MULTILINE)
    assert shown.strip() == results_table(reports).strip()  # no number without the report it comes from


def test_benchmark_of_the_readme_is_the_committed_one():
    found = json.loads((ROOT / "docs" / "study" / "reward_benchmark.json").read_text(encoding="utf-8"))
    ours, rows = "ours, 16 prompts", []
    for label, dtype, trl, mine in [
        ("pairs, TRL's micro-batch 16", "bfloat16", "trl, micro-batch 16", ours),
        ("the same with gradient checkpointing", "bfloat16", "trl, 16, checkpointing", "ours, 16, checkpointing"),
        ("", "float32", "trl, 16, checkpointing", "ours, 16, checkpointing"),
        ("TRL's micro-batch 4", "bfloat16", "trl, micro-batch 4", ours),
        ("", "float32", "trl, micro-batch 4", ours),
        ("TRL's micro-batch 1", "float32", "trl, micro-batch 1", ours),
        ("K = 4 against all pairs, short prompts", "bfloat16", "trl, K = 4 as pairs", "ours, K = 4"),
        ("K = 4 against all pairs, conversations", "float32", "trl, K = 4 as pairs", "ours, K = 4"),
        ("K = 9 against all pairs, short prompts", "bfloat16", "trl, K = 9 as pairs", "ours, K = 9"),
        ("K = 9 against all pairs, conversations", "float32", "trl, K = 9 as pairs", "ours, K = 9"),
    ]:
        a, b = (found[dtype]["runs"][name] for name in (trl, mine))
        assert a["rows"] == b["rows"] and ("harmless" in a["rows"]) == ("conversations" in label)
        speeds = f"{a['pairs_per_s']:.2f} | {b['pairs_per_s']:.2f} | {b['pairs_per_s'] / a['pairs_per_s']:.1f}"
        peaks = f"{a['peak_gb']:.1f} → {b['peak_gb']:.1f}"
        rows.append(f"| {label} | {dtype} | {speeds} | {peaks} |".replace("|  |", "| |"))
    assert re.findall(r"^\|.* \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ → [\d.]+ \|$", README, re.MULTILINE) == rows
    text = " ".join(README.split())
    for dtype, short in (("bfloat16", "bf16"), ("float32", "fp32")):
        assert f"{sum(found[dtype]['minutes'].values())} minutes in {short}" in text
        assert f"{found[dtype]['results']['limit_fraction']:.0%} in {short}" in text
    largest = max(found[dtype]["results"]["max_score_diff"] for dtype in ("bfloat16", "float32"))
    assert f"differ by {largest:.0e} at most".replace("e-0", "e-") in text
    for dtype, measured in (("bfloat16", ours), ("float32", "ours, K = 4")):
        fewer = []
        for k in (4, 9):
            trl, mine = (found[dtype]["runs"][name] for name in (f"trl, K = {k} as pairs", f"ours, K = {k}"))
            ratio = trl["tokens_per_s"] / trl["pairs_per_s"] * mine["pairs_per_s"] / mine["tokens_per_s"]
            fewer.append(f"{ratio:.1f}")
        assert f"{fewer[0]} and {fewer[1]} times" in text
        assert f"{found['float32']['runs'][measured]['prompt_tokens']} tokens)" in text
    too_large = found["float32"]["runs"]["trl, micro-batch 16"]["available_gb"]
    assert f"does not fit into {too_large:.0f} GB" in text


def test_formats_of_the_readme_are_those_of_the_readers():
    from hf_rlhf_ext.readers.registry import COMPARISONS, DEMONSTRATIONS

    shown = set(re.findall(r"^\| `([a-z0-9-]+)` \| (.*?) \| yes \|", README, re.MULTILINE))
    assert shown == {(fmt.name, fmt.example) for fmt in (*COMPARISONS, *DEMONSTRATIONS) if fmt.name != "unpaired"} | {
        ("unpaired", "trl-lib/kto-mix-14k, LLaMA-Factory's kto_en_demo")
    }


def test_noise_table_of_the_readme_is_that_of_the_committed_study():
    results = json.loads((ROOT / "docs" / "study" / "label_noise.json").read_text(encoding="utf-8"))["accuracy"]
    for level in ("0.0", "0.1", "0.2", "0.3", "0.4"):
        cells = []
        for method in ("single", "split", "reliability"):
            values = [results[f"{level}|{method}|{seed}"] for seed in range(3)]
            cells.append(f"{fmean(values):.3f} ± {stdev(values):.3f}")
        assert f"| {float(level):.0%} | {' | '.join(cells)} |" in README


def test_ppo_study_of_the_readme_is_the_committed_one():
    found, rows = json.loads((ROOT / "docs" / "study" / "ppo.json").read_text(encoding="utf-8"))["summary"], []
    for seed in range(3):
        run = found[f"stories260K-{seed}"]
        assert run["moving_mean_within_25"] == 1.0 and run["rollouts"] >= 150
        gold, score = (" → ".join(f"{x:.2f}" for x in run[f"{name}_before_after"]) for name in ("gold", "score"))
        kl_and_variance = f"{run['kl_mean']:.2f} | {run['moving_mean_within_25']:.0%} | {run['explained_variance']:.2f}"
        rows.append(f"| {seed} | {gold} | {score} | {kl_and_variance} |")
    assert "\n".join(rows) in README
    small = []
    for seed in range(3):
        run = found[f"smollm2-{seed}"]
        gold, score, kl = (
            " → ".join(f"{x:.2f}" for x in run[f"{name}_before_after"]) for name in ("gold", "score", "kl")
        )
        small.append(f"| {seed} | {gold} | {score} | {kl} |")
    assert "\n".join(small) in README
    assert found["wrong"]["best_step"] is None and "KL is 132.9 nats" in found["wrong"]["stop_reason"]


def test_reward_study_of_the_readme_is_the_committed_one():
    study = json.loads((ROOT / "docs" / "study" / "reward_model.json").read_text(encoding="utf-8"))
    found = study["summary"]
    text = " ".join(README.split())
    rows = []
    for seed in found["seeds"]:
        cells = ("{:.3f} ({:.3f} to {:.3f})".format(*found[f"{kind}-{seed}"]) for kind in ("ours", "trl"))
        rows.append(f"| {seed} | {' | '.join(cells)} |")
    assert re.findall(r"^\| \d \| 0\.\d{3} \(.*\) \| 0\.\d{3} \(.* to 0\.\d{3}\) \|$", README, re.MULTILINE) == rows
    difference = "{:.3f} ({:.3f} to {:.3f})".format(*found["ours_minus_trl"]).replace("-", "−")
    assert f"ours minus TRL's is {difference}" in text
    assert f'"longer wins" reaches {found["longer_wins"]:.3f}' in text
    whole = study["runs"]["ours-all"]
    reached = "{:.3f} ({:.3f} to {:.3f})".format(*found["ours-all"])
    assert f"all {whole['pairs']:,} other pairs reaches {reached}, in {whole['cpu_minutes']:.0f} CPU minutes" in text


def test_ppo_benchmark_of_the_readme_is_the_committed_one():
    found = json.loads((ROOT / "docs" / "study" / "ppo_benchmark.json").read_text(encoding="utf-8"))
    runs, results = found["runs"], found["results"]
    for label, name in [
        ("TRL 1.12.0", "trl"),
        ('ours, `critic="head"`', "ours, head"),
        ('ours, `critic="adapter"`', "ours, adapter"),
    ]:
        ratio = runs["trl"]["seconds"] / runs[name]["seconds"]
        assert f"| {label} | {runs[name]['seconds']:.1f} | {ratio:.2f} | {runs[name]['peak_gb']:.2f} |" in README
    text = " ".join(README.split())
    for critic, words in [("head", "{:.2f}, {:.2f} and {:.2f} times"), ("adapter", "{:.2f}, {:.2f} and {:.2f} with")]:
        stages = results["stages"][critic]
        assert words.format(*(stages[stage]["ratio"] for stage in ("generate", "score", "update"))) in text


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "inspect_data", "check_reward"])
def test_help_of_every_recipe_prints(stage, capsys):
    with pytest.raises(SystemExit) as stop:  # a stray % in a help text would be a ValueError
        parse_recipe(_dataclasses(stage), ["--help"])
    assert stop.value.code == 0 and "--dataset_name" in capsys.readouterr().out
