"""The study of PPO beside GRPO and RLOO: its settings are valid, its runs resume, and its rule and tables are right."""

import json
import math
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig
from transformers import TrainerCallback

ROOT = Path(__file__).parents[1]


@pytest.fixture
def study(script, tmp_path, monkeypatch):
    """The study with its files in a folder of the test."""
    study = script("learning_study")
    monkeypatch.setattr(study, "PARTS", tmp_path / "parts")
    monkeypatch.setattr(study, "OUT", tmp_path / "learning.json")
    return study


def evaluations(*points: tuple[float, float, float]) -> list[dict]:
    """Evaluations of minutes, KL and gold."""
    found = []
    for number, (minutes, kl, gold) in enumerate(points):
        entry = {"rollouts": 4 * number, "completions": 256 * number, "cpu_seconds": 60 * minutes, "kl": kl}
        found.append(entry | {"gold": gold, "second_gold": gold / 4, "tokens": 40.0, "example": ""})
    return found


# --- settings --------------------------------------------------------------------------------------------------------


def test_every_setting_of_the_grid_is_valid_and_has_a_name_of_its_own(script, tmp_path):
    grid, runs, worlds = (script(f"learning_{name}") for name in ("grid", "runs", "worlds"))
    finals = grid.stories_finals({"learning_rate": 2e-3, "critic_warmup_rollouts": 5}, [])
    settings = [*grid.stories_factors(), *grid.stories_starts(), *grid.stories_trl(), *finals]
    assert len({setting.name for setting in settings}) == len(settings)
    for setting in settings:
        place = worlds.stories_place(replace(setting, uses_model=False), 99, tmp_path)
        make = runs.ppo_config if setting.kind == "ppo" else runs.trl_config
        args = make(setting, place, 0, tmp_path)
        steps = args.steps_per_rollout if setting.kind == "ppo" else args.num_iterations * args.steps_per_generation
        size = args.rollout_size if setting.kind == "ppo" else args.generation_batch_size
        assert (args.max_steps, size) == (steps * place.rollouts, 64), setting.name
        if "critic_warmup_rollouts" in setting.options:
            assert args.critic_warmup_steps == setting.options["critic_warmup_rollouts"] * steps


def test_what_the_stories_chose_is_carried_over_to_smollm2(script):
    grid = script("learning_grid")
    changes = {"learning_rate": 2e-3, "clip_range_high": 0.28, "critic_warmup_rollouts": 10}
    names = {setting.name: setting.options for setting in grid.smollm2_ppo(changes)}
    assert names["winner"] == {"clip_range_high": 0.28, "critic_warmup_rollouts": grid.SMOLLM2_WARMUP}
    assert grid.smollm2_winner(changes) == "winner"
    # Without a change that matters here, or with one that has a row already, there is nothing more to run.
    assert grid.smollm2_winner({"learning_rate": 2e-3}) == "base"
    assert grid.smollm2_winner(grid.NO_CRITIC) == "no-critic"


def test_the_final_settings_are_all_different(script):
    grid = script("learning_grid")
    names = [setting.name for setting in grid.stories_finals({}, [])]
    assert names == ["final-base", "final-adapter-k4", "final-head-k1", "final-head-k4", "final-none-k4"]
    found = {s.name: s.options for s in grid.stories_finals({"value_learning_rate": 0.03, "kl_coef": 0.1}, [])}
    assert found["final-none-k4"] == {"kl_coef": 0.1, "critic": "none", "num_generations": 4}
    assert found["final-winner"] == {"value_learning_rate": 0.03, "kl_coef": 0.1}


# --- the rule --------------------------------------------------------------------------------------------------------


def test_the_score_is_the_area_under_the_kept_gold(script):
    rule = script("learning_rule")
    run = {"evaluations": evaluations((0, 0, 0), (1, 2, 2), (2, 3, 1), (3, 10, 5))}
    # 0 to 2 in the first minute: area 1. Then 2 is kept while gold falls to 1: area 2. In the third minute, KL passes 6
    # at 3/7 of the way, where gold is 1 + 4 · 3/7 = 2.714; it rises there from 2, and stays.
    third = 3 / 7 * (2 + 2.7142857) / 2 + 4 / 7 * 2.7142857
    assert rule.score(run, 3) == pytest.approx((1 + 2 + third) / 3)
    assert rule.score(run, 2) == pytest.approx(1.5)
    assert rule.gold_at_minutes(run, 0.5) == pytest.approx(1)
    # A run that has ended keeps what it has.
    assert rule.score(run, 6) == pytest.approx((3 + third + 3 * 2.7142857) / 6)


def test_a_policy_that_comes_back_within_the_limit_counts_again(script):
    rule = script("learning_rule")
    minutes, gold = rule.kept_curve(evaluations((0, 0, 0), (1, 12, 3), (2, 4, 4)))
    np.testing.assert_allclose(minutes, [0, 0.5, 1, 1.75, 2])
    np.testing.assert_allclose(gold, [0, 1.5, 1.5, 3.75, 4])


def runs_with_gold(golds: list[float]) -> dict[int, dict]:
    """Runs of a minute that rise to these gold rewards, by seed."""
    return {seed: {"evaluations": evaluations((0, 0, 0), (1, 3, gold))} for seed, gold in enumerate(golds)}


def ppo(script, name: str, factor: str | None = None, **options):
    grid = script("learning_grid")
    return grid.Setting(name, options=options, factor=factor, rollouts=grid.CHOICE_ROLLOUTS)


def test_a_tie_keeps_the_default_and_a_clear_gain_replaces_it(script):
    rule = script("learning_rule")
    settings = [
        ppo(script, "base"),
        ppo(script, "rate-1", "rate", learning_rate=1.0),
        ppo(script, "rate-2", "rate", learning_rate=2.0),
        ppo(script, "clip", "clip", clip_range_high=0.3),
    ]
    runs = {
        "base": runs_with_gold([2.0, 2.2, 1.8, 2.0, 2.1]),
        "rate-1": runs_with_gold([2.4, 2.7, 2.2, 2.5, 2.5]),  # +0.4 to +0.5 of gold: half of it in the score
        "rate-2": runs_with_gold([2.1, 2.3, 1.9, 2.1, 2.2]),
        "clip": runs_with_gold([2.9, 1.7, 2.4, 1.5, 2.3]),  # higher on average, but not on every seed
    }
    chosen = rule.chosen_values(settings, runs)
    assert [(entry["factor"], entry["setting"], entry["replaces"]) for entry in chosen] == [
        ("rate", "rate-1", True),
        ("clip", "clip", False),
    ]
    assert chosen[0]["gain"].mean == pytest.approx(np.mean([0.4, 0.5, 0.4, 0.5, 0.4]) / 2)
    assert rule.winner(chosen, runs).name == "rate-1"
    assert rule.winner([], runs).name == "base"


def test_a_joint_setting_must_gain_over_the_one_before_it(script):
    rule = script("learning_rule")
    interval = rule.mean_interval([0.3, 0.3, 0.4], [0, 1, 2])
    names = {"a": {"learning_rate": 1.0}, "b": {"kl_coef": 0.1}, "c": {"learning_rate": 2.0}, "d": {"gae_lambda": 1.0}}
    chosen = []
    for name, options in names.items():
        chosen.append({"factor": name, "setting": name, "options": options, "gain": interval, "replaces": True})
    joint = rule.candidates(chosen)
    # c contradicts a.
    assert [setting.options for setting in joint] == [
        {"learning_rate": 1.0, "kl_coef": 0.1},
        {"learning_rate": 1.0, "kl_coef": 0.1, "gae_lambda": 1.0},
    ]
    runs = {
        "base": runs_with_gold([1.0, 1.1, 0.9]),
        "a": runs_with_gold([2.0, 2.1, 1.9]),
        "joint-2": runs_with_gold([2.5, 2.6, 2.45]),
    }
    with pytest.raises(LookupError, match="joint-3"):
        rule.winner(chosen, runs)
    assert rule.winner(chosen, runs | {"joint-3": runs_with_gold([2.4, 2.7, 2.5])}).name == "joint-2"
    assert rule.winner(chosen, runs | {"joint-3": runs_with_gold([3.5, 3.6, 3.4])}).name == "joint-3"


def test_options_of_a_critic_do_not_join_a_run_without_one(script):
    rule, grid = script("learning_rule"), script("learning_grid")
    assert rule.conflict(grid.NO_CRITIC, {"value_gae_lambda": 1.0})
    assert rule.conflict({"critic_warmup_rollouts": 5}, grid.NO_CRITIC)
    assert not rule.conflict(grid.NO_CRITIC, {"clip_range_high": 0.28})


# --- runs ------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


class StopAfter(TrainerCallback):
    """Saves a checkpoint and stands for a run that is stopped in the next rollout."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == self.step
        if state.global_step > self.step:
            raise Stopped


@pytest.fixture
def place(script, stories_path, monkeypatch):
    """Three rollouts of 8 short stories."""
    runs = script("learning_runs")
    base = import_module("hf_rlhf_ext")

    def load():
        return base.load_base_model(str(stories_path), dtype="float32"), base.load_tokenizer(str(stories_path))

    def length(completions, **columns) -> list[float]:
        return [float(len(text)) / 20 for text in completions]

    return runs.Place(
        load=load,
        lora=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        reward=length,
        golds={"gold": length},
        prompts=[{"prompt": f"Once {word}"} for word in ("upon", "there", "a", "the", "one", "two", "big", "red")],
        heldout=[{"prompt": "One day"}] * 4,
        rollouts=3,
        rollout_size=8,
        evaluate_every=1,
        max_tokens=6,
        temperature=1.0,
        ppo={"num_ppo_epochs": 2, "learning_rate": 1e-2, "kl_coef": 0.1},
        trl={"num_iterations": 2, "learning_rate": 1e-2, "num_generations": 4},
    )


@pytest.mark.parametrize("kind", ["ppo", "grpo", "rloo"])
def test_a_stopped_run_goes_on_from_its_checkpoint(script, place, kind, tmp_path, monkeypatch):
    runs, grid = script("learning_runs"), script("learning_grid")
    setting = grid.Setting("a", kind)
    whole = runs.train(setting, place, 0, tmp_path / "whole")
    assert [entry["rollouts"] for entry in whole["evaluations"]] == [0, 1, 2, 3]
    assert whole["evaluations"][0]["kl"] == 0 and whole["evaluations"][-1]["kl"] != 0
    seconds = [entry["cpu_seconds"] for entry in whole["evaluations"]]
    assert seconds == sorted(seconds) and seconds[0] == 0
    assert whole["stopped"] is None and len(whole["explained_variance"]) == (3 if kind == "ppo" else 0)

    name = "ppo_trainer" if kind == "ppo" else "trl_trainer"
    build = getattr(runs, name)

    def interrupted(*args):
        trainer, recorder = build(*args)
        trainer.add_callback(StopAfter(2))
        return trainer, recorder

    monkeypatch.setattr(runs, name, interrupted)
    with pytest.raises(Stopped):
        runs.train(setting, place, 0, tmp_path / "parts")
    monkeypatch.setattr(runs, name, build)
    resumed = runs.train(setting, place, 0, tmp_path / "parts")
    for mine, theirs in zip(resumed["evaluations"], whole["evaluations"], strict=True):
        same = ("rollouts", "completions", "gold", "kl", "tokens", "example")
        assert [mine[key] for key in same] == [theirs[key] for key in same]


def test_a_run_that_a_guard_stops_is_kept_as_such(script, place, tmp_path):
    runs, grid = script("learning_runs"), script("learning_grid")
    found = runs.train(grid.Setting("a", options={"max_kl": 1e-6}), replace(place, rollouts=8), 0, tmp_path)
    assert "max_kl" in found["stopped"]
    assert len(found["evaluations"]) < 9


# --- files -----------------------------------------------------------------------------------------------------------


def write_runs(study, world: str, tasks, gold_of) -> None:
    """Files of finished runs, which reach `gold_of(setting)` and a little more on some seeds."""
    shared = {"ppo": {}, "rollouts": 60}
    for task in tasks:
        last = gold_of(task.setting) * (1 + 0.01 * (task.seed % 3))
        points = evaluations((0, 0, 0.5), (0.5, 2.5, 0.5 + last / 2), (1.0, 7.0, 0.5 + last))
        critic = task.setting.options.get("critic") != "none" and task.setting.kind == "ppo"
        content = {
            "world": world,
            "seed": task.seed,
            "setting": asdict(task.setting),
            "world_settings": shared,
            "versions": {},
            "evaluations": points,
            "explained_variance": [0.01 * number for number in range(11)] if critic else [],
            "stopped": None,
            "cpu_seconds": 66.0,
        }
        study.write_json(study.part_of(world, task), content)


def gold_of(setting) -> float:
    """What the simulated settings reach: two factors help, and GRPO is better than RLOO."""
    options = setting.options
    if setting.kind != "ppo":
        return {"grpo": 2.5, "rloo": 2.0}[setting.kind] + 0.1 * (options["learning_rate"] == 1e-3)
    return 2.0 + 0.7 * (options.get("learning_rate") == 2e-3) + 0.4 * (options.get("clip_range_high") == 0.28)


def finish(study, world: str) -> None:
    """Writes runs until nothing waits."""
    while True:
        parts = study.read_parts()
        tasks = [task for task in study.plan(world, parts)[0] if not study.part_of(world, task).is_file()]
        if not tasks:
            return
        write_runs(study, world, tasks, gold_of)


def test_the_stages_follow_each_other_and_the_summary_has_a_verdict(study):
    first, waits = study.plan("stories", study.read_parts())
    assert waits == "stage 2 waits for all runs of stage 1"
    write_runs(study, "stories", first, gold_of)
    second, waits = study.plan("stories", study.read_parts())
    assert {task.setting.name for task in second} - {task.setting.name for task in first} == {"joint-2"}
    assert waits == "stage 3 waits for the runs of stages 1 and 2"
    for world in ("stories", "smollm2"):
        finish(study, world)
    summary = study.collect()
    assert summary["missing"]["stories"] == summary["missing"]["smollm2"] == {"runs": [], "waits": None}
    stories = summary["worlds"]["stories"]
    assert stories["winner"]["options"] == {"learning_rate": 2e-3, "clip_range_high": 0.28}
    assert stories["best_trl"]["grpo"].endswith("rate0.001")
    assert stories["compared"]["ours"] == "final-winner" and stories["compared"]["seeds"] == [5, 6, 7, 8, 9]
    # PPO gains 3.1 in a minute and GRPO 2.6, one percent more on average. 6 nats are at 7/9 of the second half.
    last = stories["compared"]["settings"]["final-grpo"]["ours_minus_this_at_time"][-1]
    assert last["mean"] == pytest.approx(1.01 * 0.5 * (0.5 + 0.5 * 7 / 9), abs=0.01)
    assert "Against TRL's GRPO at equal time, PPO is" in stories["verdict"][0] and "ahead by" in stories["verdict"][0]
    smollm2 = summary["worlds"]["smollm2"]
    assert smollm2["compared"]["ours"] == "winner" and smollm2["compared"]["seeds"] == [0, 1, 2]
    for world in ("stories", "smollm2"):
        assert (study.PARTS / f"{world}.png").stat().st_size > 10_000


def test_finished_runs_are_not_run_again_and_other_settings_are_refused(study, script, tmp_path, monkeypatch):
    tasks, _ = study.plan("stories", study.read_parts())
    write_runs(study, "stories", tasks[:-1], gold_of)
    ran = []
    monkeypatch.setattr(
        study, "run", lambda world, task, work: ran.append(task) or write_runs(study, world, [task], gold_of)
    )
    study.run_all("stories", [tasks[-1].seed], tasks[-1].setting.name, tmp_path)
    assert ran == [tasks[-1]]
    path = study.part_of("stories", tasks[0])
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"world_settings": {"rollouts": 61}}))
    with pytest.raises(SystemExit, match="other settings of the world"):
        study.read_parts()
    content["setting"]["options"] = {"kl_coef": 0.7}
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="another setting than the grid: delete it"):
        study.run_all("stories", None, None, tmp_path)


def test_the_verdict_says_where_ppo_is_behind_and_what_it_would_need(script):
    summary = script("learning_summary")
    slow = {seed: {"evaluations": evaluations((0, 0, 0), (2, 3, 2 + seed / 50))} for seed in range(5)}
    fast = {seed: {"evaluations": evaluations((0, 0, 0), (1, 3, 2 + seed / 90))} for seed in range(5)}
    compared = summary.as_intervals(summary.comparison({"base": slow, "grpo": fast}), "base")
    lines = summary.verdict(compared, {"base": slow, "grpo": fast}, {"grpo": "grpo"})
    assert "after 1.00 CPU minutes behind by 1.0" in lines[0]
    assert "at 2 nats not told apart" in lines[1] or "at 2 nats ahead" in lines[1]
    assert "takes 2.0 times as long" in lines[2]


def test_gold_at_a_kl_is_that_of_the_first_policy_there(script):
    summary = script("learning_summary")
    run = {"evaluations": evaluations((0, 0, 0), (1, 4, 2), (2, 2, 9), (3, 8, 3))}
    assert summary.gold_of_run_at_kl(run, 2) == pytest.approx(1)
    assert summary.gold_of_run_at_kl(run, 6) == pytest.approx(2.5)
    assert summary.gold_of_run_at_kl(run, 9) is None
    assert math.isnan(summary.interval({0: None}).mean)


def test_the_tables_are_made_of_the_summary(study, script, monkeypatch):
    tables = script("learning_tables")
    markdown = script("tables").markdown_table
    monkeypatch.setattr(tables, "STUDY", study.OUT)
    made = tables.learning_tables(markdown)
    page = ROOT / "docs" / "results" / "learning.md"
    assert {make(page) for make in made.values()} == {tables.NOT_YET}
    finish(study, "stories")
    study.collect()
    text = {name: make(page) for name, make in made.items()}
    assert text["learning_smollm2_equal"] == tables.NOT_YET
    assert "| learning rate | `learning_rate-0.002` |" in text["learning_stories_defaults"]
    assert "The winner is `joint-2`" in text["learning_stories_defaults"]
    assert "| `final-" not in text["learning_stories_factors"] and "`critic-head`" in text["learning_stories_factors"]
    assert text["learning_stories_equal"].count("`winner`") == 2
    assert "`start-reward-5`" in text["learning_stories_critics"]
    named = {name for name in page.read_text(encoding="utf-8").split() if name.startswith("learning_")}
    assert named == set(made)
