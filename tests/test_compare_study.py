"""The study of `hf-rlhf compare`: its worlds write files that the command reads, and its parts become one file."""

import json
from pathlib import Path

import pytest
import yaml

from hf_rlhf_ext.cli.parsing import parse_recipe
from hf_rlhf_ext.readers.formats import load_comparisons, load_demonstrations
from hf_rlhf_ext.recipes.compare import ARGUMENTS
from hf_rlhf_ext.study.leaks import find_leaks
from hf_rlhf_ext.study.styles import select
from tests.recipes.compare.simulated_results import simulated_results

ROOT = Path(__file__).parents[1]
SMALL = ("base", "sft", "best_of_4", "dpo", "ppo")


@pytest.fixture
def study(script, tmp_path, monkeypatch):
    study = script("compare_study")
    monkeypatch.setattr(study, "PARTS", tmp_path / "parts")
    monkeypatch.setattr(study, "OUT", tmp_path / "compare.json")
    return study


@pytest.mark.parametrize("world", ["stories", "smollm2"])
def test_the_config_of_a_world_names_its_systems_and_options(study, world, tmp_path):
    path = tmp_path / "compare.yaml"
    study.write_config(path, study.WORLDS[world].config(tmp_path / "data", tmp_path, tmp_path / "run", 3))
    args, _, _ = parse_recipe(ARGUMENTS, ["--config", str(path)])
    assert args.seeds == [3] and args.unused() == []
    assert list(args.specs) == list(study.WORLDS[world].SYSTEMS)
    completions = {name: spec.training for name, spec in args.specs.items() if spec.kind in ("ppo", "grpo", "rloo")}
    assert len(completions) >= 4
    assert {sampled(training) for training in completions.values()} == {sampled(completions["ppo"])}


def sampled(training) -> int:
    """Completions that a system samples in training."""
    passes = training.get("num_ppo_epochs") or training["num_iterations"]
    return training["max_steps"] * training["per_device_train_batch_size"] // passes


def test_every_style_has_a_source_file_in_the_world_of_stories(study, tmp_path):
    world = study.WORLDS["stories"]
    world.make_files(tmp_path, tmp_path, 0)
    for name, options in world.STYLES.items():
        rows = load_demonstrations(str(tmp_path / options["demonstrations"]))[0].to_list()
        selection = select(name.removeprefix("sft_").removesuffix("_style"), rows, seed=0, size=options.get("size"))
        assert 30 <= len(selection.rows), name
    ratings = [row["rating"] for row in load_demonstrations(str(tmp_path / "demonstrations.jsonl"))[0]]
    assert set(ratings) == set(range(1, 8))
    assert 0.05 < ratings.count(7) / len(ratings) < 0.4


def test_held_out_prompts_of_the_stories_are_in_no_training_file(script, study):
    texts = script("compare_worlds.story_texts")
    heldout = [row["prompt"] for row in texts.openings(160, 7, "heldout")]
    train = [row["prompt"] for row in texts.demonstrations(200, 0)]
    assert find_leaks(train, heldout).heldout == []
    assert len({text[0]["content"] for text in heldout}) == 160


def test_the_small_form_has_the_files_that_its_config_names(script, study, tmp_path):
    small = script("compare_worlds.small")
    small.make_files(tmp_path)
    config = yaml.safe_load((ROOT / "recipes" / "configs" / small.CONFIG).read_text(encoding="utf-8"))
    for option in ("demonstrations", "comparisons", "prompts", "heldout_prompts", "exact_match"):
        folder, name = config[option].rsplit("/", 1)
        assert folder == str(small.FOLDER) and (tmp_path / name).is_file()
    comparisons = load_comparisons(str(tmp_path / "comparisons.jsonl"))[0]
    assert len(comparisons) == small.JUDGED and set(config["systems"]) == {"base", "sft", "best_of_4", "dpo", "ppo"}


def write_parts(study, world: str, seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        config = {"seeds": [seed], "prompts": f"{world}-seed{seed}/data/prompts.jsonl"}
        part = {"world": world, "seed": seed, "command": "c", "config": config, "versions": {}}
        study.write_json(study.part_of(world, seed), part | {"results": simulated_results(seed, 20, SMALL)})


def test_parts_become_one_file_with_the_published_form(study):
    write_parts(study, "stories", (0, 1))
    study.main(["--collect"])
    collected = json.loads(study.OUT.read_text(encoding="utf-8"))
    assert collected["world"] == "stories" and collected["seeds"] == [0, 1]
    assert collected["worlds"]["stories"]["verdict"]
    for name in SMALL:
        entry = collected["systems"][name]
        assert set(entry["gold"]) >= {"mean", "ci95"} and entry["n"] == 40
        assert {"kl", "seconds"} <= set(entry)
        if name != "sft":
            assert set(entry["win_rate_vs_sft"]) >= {"mean", "ci95"}
    assert (study.PARTS / "stories" / "gold_against_kl.png").is_file()
    write_parts(study, "smollm2", (0,))
    assert study.collect()["world"] == "smollm2"


def test_parts_with_other_settings_are_not_merged(study):
    write_parts(study, "stories", (0, 1))
    path = study.part_of("stories", 1)
    part = json.loads(path.read_text(encoding="utf-8"))
    part["config"]["ppo"] = {"kl_coef": 0.2}
    study.write_json(path, part)
    with pytest.raises(SystemExit, match="other settings"):
        study.collect()


def test_a_part_that_is_there_is_not_run_again_and_the_trial_stays_in_the_work_folder(study, tmp_path, monkeypatch):
    write_parts(study, "stories", (0,))
    ran = []
    monkeypatch.setattr(study, "write_part", lambda *given: ran.append(given))
    study.main(["--world", "stories", "--seed", "0", "--work", str(tmp_path)])
    study.main(["--world", "stories", "--seed", "99", "--work", str(tmp_path)])
    assert ran == [("stories", 99, tmp_path)]
    assert study.part_of("stories", 99, tmp_path).parent == tmp_path
    config = {"a": [f"{tmp_path.resolve()}/stories-seed0/data/x.jsonl", 1]}
    assert study.without_folders(config, tmp_path) == {"a": ["stories-seed0/data/x.jsonl", 1]}


def test_numbers_are_rounded_and_whole_ones_are_integers(study):
    given = {"a": [1.0, 0.5, 1 / 3, None, True], "b": (1234567.25, "x", float("nan"))}
    rounded = study.compact(given)
    assert rounded["a"] == [1, 0.5, 0.33333, None, True] and isinstance(rounded["a"][0], int)
    assert rounded["b"][:2] == [1234600.0, "x"] and rounded["b"][2] != rounded["b"][2]


def test_committed_parts_name_no_folder_of_a_machine(study):
    for path in study.PARTS.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert str(study.WORK.resolve()) not in text
        assert '"/' not in text, f"{path} has an absolute path"
