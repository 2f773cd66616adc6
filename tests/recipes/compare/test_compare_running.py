"""Runs of `hf-rlhf compare` on a tiny model: all systems, failures, changes, stops and time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft.utils import load_peft_weights

from hf_rlhf_ext.cli.stage_progress import StageProgress
from hf_rlhf_ext.cli.stages import StageRunner
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.run_files import content_digest
from hf_rlhf_ext.recipes.compare import failed_judgments, run_compare
from hf_rlhf_ext.recipes.compare_parts.making import time_with_earlier_calls
from hf_rlhf_ext.recipes.compare_parts.records import Clock, SystemRecord
from hf_rlhf_ext.recipes.compare_parts.running import CompareRun
from hf_rlhf_ext.recipes.compare_parts.snapshots import TrainingTimer
from hf_rlhf_ext.study.judges import RewardModelJudge

pytestmark = pytest.mark.xdist_group("processes")


class TrainingOnly(CompareRun):
    """A comparison without its evaluation."""

    def _run_evaluation(self, seed):
        return {"seed": seed}


@pytest.fixture
def train(model):
    """Trains the systems of a comparison; returns the run."""

    def run(args, kind=TrainingOnly):
        comparison = kind(args, model)
        comparison.check()
        comparison.folder.mkdir(parents=True, exist_ok=True)
        comparison.open_stages()
        for seed in args.seeds:
            comparison.run_seed(seed)
        return comparison

    return run


def records(run, seed=0) -> dict[str, SystemRecord]:
    return {record.name: record for record in run.records(seed)}


def logs(run, name, seed=0) -> list[dict]:
    text = (run.system_folder(seed, name) / "policy" / "log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def weights(run, name, part="policy") -> dict[str, torch.Tensor]:
    return load_peft_weights(str(run.system_folder(0, name) / part), device="cpu")


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_every_system_is_trained_from_the_same_start_on_the_same_labels(options, train, compare_world):
    systems = {"base": {}, "sft": {}, "sft_top_rated": {}, "best_of_2": {}, "rejection_sampling": {"n": 2}}
    systems |= {"dpo": {}, "grpo": {}, "rloo": {}, "ppo": {}, "ppo_adaptive": {"kl_target": 3.0}, "ppo_ptx": {}}
    systems["dpo_of_base"] = {"start": "base"}
    run = train(
        options(
            systems,
            ratings_column="stars",
            labels=6,
            plain_text=str(compare_world / "texts.jsonl"),
            snapshot_seconds=1e-6,
            ppo={"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1},
        )
    )
    made = records(run)
    assert list(made) == list(run.specs) and run.failures(0) == {}
    assert made["base"].location == str(compare_world / "base") and made["best_of_2"].n == 2
    assert made["best_of_2"].location == "systems/sft/policy"
    for name in ("best_of_2", "rejection_sampling", "grpo", "rloo", "ppo"):
        assert made[name].needs == ("sft", "reward_model") and made[name].labels["judgments"] == 6
    assert made["dpo_of_base"].needs == () and made["sft"].snapshots == ()
    assert made["dpo"].needs == ("sft",) and made["dpo"].labels["judgments"] == 6
    assert made["sft_top_rated"].labels == {"demonstrations": 6, "ratings": 6}  # all that had to be written
    assert "rated" in made["sft_top_rated"].rule
    # 2 steps of a pass, 2 passes: 4 steps are one rollout of PPO's 4, of GRPO's 4 completions.
    assert made["ppo"].completions == made["grpo"].completions == made["rloo"].completions == 4
    assert made["rejection_sampling"].completions == 2 * len(run.data.prompts)
    total = made["sft"].own + run.own_time(0, "reward_model") + made["ppo"].own
    assert made["ppo"].total.seconds == pytest.approx(total.seconds)

    # At the first step, the policy is the reference of its KL.
    assert logs(run, "grpo")[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert logs(run, "rloo")[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert logs(run, "ppo")[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
    for name in ("dpo", "grpo", "rloo", "ppo", "rejection_sampling"):
        steps = [snapshot.step for snapshot in made[name].snapshots]
        assert steps == list(range(1, len(steps) + 1))  # one at each step, and the last one once
        assert same(weights(run, name), weights(run, name, f"snapshots/{len(steps) - 1}"))
        assert not same(weights(run, name), weights(run, "sft"))
        times = [snapshot.own.seconds for snapshot in made[name].snapshots]
        assert times == sorted(times) and times[-1] <= made[name].own.seconds + 1e-6
        assert not list(run.system_folder(0, name).glob("policy/checkpoint-*"))


def test_a_system_that_fails_is_recorded_and_the_others_go_on(options, train, monkeypatch, capsys):
    systems = {"sft": {}, "dpo": {}, "ppo": {"start": "dpo"}, "best_of_2": {}}
    fails = monkeypatch.context()
    with fails as patched:
        patched.setattr(
            "hf_rlhf_ext.recipes.compare_parts.trl_learners.TRLLearners.dpo",
            lambda *args: (_ for _ in ()).throw(RuntimeError("no memory\nat all")),
        )
        run = train(options(systems))
    assert run.failures(0) == {"dpo": "RuntimeError: no memory at all", "ppo": "needs dpo"}
    assert list(records(run)) == ["sft", "best_of_2"]
    said = capsys.readouterr().out
    assert "failed: seed-0/dpo: RuntimeError: no memory at all (traceback: " in said
    assert "no memory\nat all" in (run.folder / "failures" / "seed-0-dpo.txt").read_text()

    again = train(options(systems))
    assert again.failures(0) == {} and set(records(again)) == set(systems)
    assert "seed-0/sft: finished earlier, kept" in capsys.readouterr().out


def test_other_options_of_a_system_redo_it_and_what_builds_on_it_only(options, train, capsys, compare_world):
    systems = {"sft": {}, "dpo": {}, "sft_more": {"start": "dpo"}, "sft_other": {}}
    first = train(options(systems))
    before = {name: record.own for name, record in records(first).items()}
    capsys.readouterr()
    changed = train(options(systems | {"dpo": {"beta": 0.3}, "best_of_2": {}}, seeds=[0]))
    said = capsys.readouterr().out
    after = records(changed)
    assert {name for name in before if after[name].own != before[name]} == {"dpo", "sft_more"}
    assert after["dpo"].settings["beta"] == 0.3
    assert "done again, as its settings differ (beta: None then, 0.3 now)" in said
    assert "done again, as it builds on dpo, which changed" in said
    assert set(after) == {*systems, "best_of_2"}  # a system that was added

    # A system with demonstrations of its own is added: the others are kept.
    systems |= {"dpo": {"beta": 0.3}, "best_of_2": {}}
    own = str(compare_world / "demonstrations.jsonl")
    grown = train(options(systems | {"sft_own": {"demonstrations": own, "max_steps": 1}}))
    assert "done again" not in capsys.readouterr().out and "sft_own" in records(grown)

    # Another seed in the same folder, alone.
    other = train(options({"sft": {}}, seeds=[1], comparisons=None))
    assert set(records(other, 1)) == {"sft"} and (changed.seed_folder(0) / "systems" / "dpo").is_dir()


@pytest.mark.parametrize("name, step", [("sft", 1), ("dpo", 1), ("grpo", 4), ("ppo", 4)])
def test_a_stopped_training_goes_on_from_its_checkpoint(options, train, monkeypatch, name, step):
    more = {"dpo": {"max_steps": 3}, "grpo": {"max_steps": 8}, "ppo": {"max_steps": 8}, "sft": {"max_steps": 3}}
    systems = {"sft": {}, name: more[name]}
    if name == "sft":
        systems["sft"]["snapshot_seconds"] = 1e-6
    args = options(systems, save_seconds=1e-6, snapshot_seconds=1e-6)
    begin = TrainingTimer.on_step_end

    def stop(self, trainer_args, state, control, **kwargs):
        if name in Path(trainer_args.output_dir).parts and state.global_step == step + 1:
            raise RuntimeError("stopped")
        return begin(self, trainer_args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingTimer, "on_step_end", stop)
        assert name in train(args).failures(0)
    folder = args.folder / "seed-0" / "systems" / name
    (checkpoint,) = folder.glob("policy/checkpoint-*")
    assert checkpoint.name == f"checkpoint-{step}"
    own = json.loads((checkpoint / "own_time.json").read_text())["own"]["seconds"]

    first_steps = []

    def note(self, trainer_args, state, control, **kwargs):
        if name in Path(trainer_args.output_dir).parts:
            first_steps.append(state.global_step)
        return begin(self, trainer_args, state, control, **kwargs)

    monkeypatch.setattr(TrainingTimer, "on_step_end", note)
    run = train(args)
    record = records(run)[name]
    assert first_steps[0] == step + 1 and first_steps[-1] == more[name]["max_steps"]
    assert record.own.seconds > own > 0
    assert [snapshot.step for snapshot in record.snapshots] == list(range(1, more[name]["max_steps"] + 1))


def test_training_ends_after_its_seconds(options, train):
    run = train(options({"sft": {"max_seconds": 1e-6}}, sft={"max_steps": 50, "per_device_train_batch_size": 2}))
    record = records(run)["sft"]
    assert record.settings["max_seconds"] == 1e-6
    assert logs(run, "sft")[-1]["step"] == 1


def test_mistakes_are_found_before_anything_is_trained(options, model, compare_world):
    def check(**changes):
        CompareRun(options(**changes), model).check()

    with pytest.raises(UserError, match="systems: ppo: unknown key `kl_coeff`: did you mean `kl_coef`"):
        check(systems={"sft": {}, "ppo": {"kl_coeff": 0.1}})
    with pytest.raises(UserError, match="systems: grpo: unknown key `num_generation`.*`num_generations`"):
        check(systems={"sft": {}, "grpo": {"num_generation": 2}})
    with pytest.raises(UserError, match="reward: unknown key `learning_rat`"):
        check(systems={"sft": {}, "best_of_2": {}}, reward={"learning_rat": 0.1})
    with pytest.raises(UserError, match="dpo.* `beta` needs a number"):
        check(systems={"sft": {}, "dpo": {"beta": "much"}})
    with pytest.raises(UserError, match="demonstrations: "):
        check(systems={"sft": {}}, demonstrations="nowhere.jsonl")
    with pytest.raises(UserError, match="reward_funcs: "):
        check(systems={"sft": {}, "ppo": {}}, reward_funcs="nowhere.py:f")
    with pytest.raises(UserError, match="judges"):
        check(systems={"sft": {}}, judges=[{"gold": "nowhere.py:f"}])
    for section, option, value in (
        ("sft", "per_device_train_batch_size", "eight"),
        ("sft", "num_train_epochs", None),
        ("reward", "per_device_train_batch_size", 0),
        ("ppo", "num_mini_batches", 0),
        ("grpo", "num_generations", "x"),
        ("rloo", "steps_per_generation", 0),
    ):
        with pytest.raises(UserError, match=f"{section}: `{option}` (needs a number|must be positive)"):
            check(systems={"sft": {}, "ppo": {}, "grpo": {}, "rloo": {}}, **{section: {option: value}})
    twice = [{"gold": f"{compare_world / 'rewards.py'}:gold"}] * 2
    with pytest.raises(UserError, match="judges: two have the name .*give one of them a `name`"):
        check(systems={"sft": {}}, judges=twice)
    with pytest.raises(UserError, match="judges: no folder at /nowhere"):
        check(systems={"sft": {}}, judges=[{"reward_model": "/nowhere"}])
    with pytest.raises(UserError, match="judges: .*without a score head"):
        check(systems={"sft": {}}, judges=[{"reward_model": model.model_name_or_path}])
    with pytest.raises(UserError, match="gold"):  # the judge is what the systems are trained on
        check(systems={"sft": {}, "ppo": {}}, reward_funcs=f"{compare_world / 'rewards.py'}:gold")


KILLER = """
import os, signal
from pathlib import Path

calls = []

def length(prompts, completions, **columns):
    calls.append(1)
    flag = Path(__file__).with_name("killed")
    if len(calls) == 3 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(str(completion)) / 10 for completion in completions]
"""


def test_a_killed_run_goes_on_and_writes_the_report(options, model, compare_world, tmp_path, recipes_path, capsys):
    (tmp_path / "killer.py").write_text(KILLER)
    (tmp_path / "items.jsonl").write_text(json.dumps({"prompt": "A day at the", "answer": "park"}) + "\n")
    files = {"reward_funcs": f"{tmp_path / 'killer.py'}:length", "exact_match": str(tmp_path / "items.jsonl")}
    systems = {"base": {}, "sft": {}, "ppo": {"max_steps": 12}, "best_of_2": {}}
    args = options(systems, comparisons=None, save_seconds=0.001, reward=None, **files)
    config = {name: getattr(args, name) for name in args.__dataclass_fields__ if args.is_changed(name)}
    config |= {"systems": systems, "model_name_or_path": str(compare_world / "base"), "dtype": "float32", "lora_r": 4}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(recipes_path / "compare.py"), "--config", str(tmp_path / "compare.yaml")]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr

    report = run_compare(args, model)
    said = capsys.readouterr().out
    assert "seed-0/sft: finished earlier, kept" in said and "seed-0/ppo: PPO from sft" in said
    assert set(report["systems"]) == set(systems)
    assert report == json.loads((args.folder / "report.json").read_text())
    log = (args.folder / "seed-0" / "systems" / "ppo" / "policy" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log if "loss" in json.loads(line)] == list(range(1, 13))


def test_a_signal_saves_a_checkpoint_and_ends_the_run(options, train, monkeypatch):
    args = options({"sft": {}, "rloo": {}, "base": {}})
    step = TrainingTimer.on_step_end

    def at_a_signal(self, trainer_args, state, control, **kwargs):
        if "rloo" in Path(trainer_args.output_dir).parts and state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, trainer_args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingTimer, "on_step_end", at_a_signal)
        with pytest.raises(KeyboardInterrupt, match="saved checkpoint-3"):
            train(args)
    run = train(args)
    assert run.failures(0) == {} and [log["step"] for log in logs(run, "rloo") if "loss" in log] == [1, 2, 3, 4]


# --- stages and time left --------------------------------------------------------------------------------------------


def test_a_stage_is_kept_while_its_settings_and_what_it_needs_are_the_same(tmp_path):
    done = []

    def runner():
        return StageRunner(tmp_path, {}, ["seed-0/a", "seed-0/b"])

    def run(stages, a, b=0):
        work = {"a": lambda: {"a": a}, "b": lambda: done.append("b") or {}}
        stages.run_if_changed("seed-0/a", "…", work["a"], settings={"x": a})
        stages.run_if_changed("seed-0/b", "…", work["b"], settings={"x": b}, needs=["seed-0/a"])

    run(runner(), a=1)
    run(runner(), a=1)
    assert done == ["b"]
    run(runner(), a=2)
    assert done == ["b", "b"] and runner().measured("seed-0/a") == {"a": 2}
    run(runner(), a=2, b=3)
    assert len(done) == 3


def test_an_interrupt_ends_all_stages_also_where_failures_are_recorded(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    stages = StageRunner(tmp_path, {}, ["a"])
    with pytest.raises(KeyboardInterrupt):
        stages.run_if_changed("a", "…", interrupted, settings={}, may_fail=True)
    assert stages.error_of("a") is None and not stages.is_finished("a")


def test_the_time_left_follows_from_the_same_stage_of_another_seed(capsys):
    names = [f"seed-{seed}/{name}" for seed in (0, 1) for name in ("data", "sft", "ppo")]
    progress = StageProgress(names, weights={"data": 0.01, "sft": 1.0, "ppo": 2.0}, draws_bar=True)
    assert progress.seconds_left() is None
    for name, seconds in (("seed-0/data", 1.0), ("seed-0/sft", 10.0)):
        progress.begin(name)
        progress.end(name, seconds)
    # ppo has twice the weight of sft: 20 + 10 + 20.
    assert progress.seconds_left() == pytest.approx(1.0 + 50.0, abs=0.5)
    progress.begin("seed-0/ppo")
    progress._began -= 6.0
    progress.advance(0.25)  # 6 seconds for a quarter: 18 to go
    assert progress.seconds_left() == pytest.approx(18 + 1.0 + 10 + 20, abs=0.5)
    progress.end("seed-0/ppo", 24.0)
    assert progress.seconds_left() == pytest.approx(1.0 + 10 + 24, abs=0.5)
    progress.close()
    assert "stage 4 of 6" in capsys.readouterr().err


def test_the_time_left_is_without_stages_that_are_kept(tmp_path, capsys):
    names = ["a", "b", "c"]

    def stages(**settings):
        manifest = tmp_path / "manifest.json"
        state = json.loads(manifest.read_text()) if manifest.is_file() else {"stages": {}}
        for name, stage in state["stages"].items():
            stage["seconds"] = {"a": 600, "b": 60, "c": 3600}[name]
        if state["stages"]:
            manifest.write_text(json.dumps(state))
        earlier = {name: stage["seconds"] for name, stage in state["stages"].items()}
        runner = StageRunner(tmp_path, {}, names, progress=StageProgress(names, seconds=earlier))
        before = {"b": ["a"], "c": []}
        for name in names:
            runner.run_if_changed(name, "…", dict, settings=settings.get(name, {}), needs=before.get(name, ()))
        return [line.rpartition("about ")[2] for line in capsys.readouterr().out.splitlines()]

    stages()
    assert stages() == ["00:00 left)"] * 3
    assert stages(b={"x": 1}) == ["00:00 left)", "01:00 left)", "00:00 left)"]
    # What builds on a changed stage is counted from its line on, and c is still kept.
    assert stages(a={"x": 1}, b={"x": 1}) == ["11:00 left)", "01:00 left)", "00:00 left)"]


def test_the_statement_on_rows_counts_the_pairs_within_the_budget(options, model, compare_world, tmp_path, write_jsonl):
    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "training_config.yaml").write_text("dataset_name: <path>/moved.jsonl")
    data = [{"role": "comparisons", "sha256": content_digest(compare_world / "pairs.jsonl")}]
    report = json.dumps({"card": {"data": data}})
    others = [{"prompt": "Why?", "chosen": " So.", "rejected": " No."}]
    write_jsonl(tmp_path / "others.jsonl", others)
    named = RewardModelJudge(folder, trained_on=tmp_path / "others.jsonl")

    def said(judge, **changes):
        run = CompareRun(options({"sft": {}, "dpo": {}}, **changes), model)
        run.judges = [judge]  # it is not loaded
        return " ".join(statement.text for statement in run.independence)

    assert "training reward on 5, and no pair" in said(named, labels=5)
    both = said(named, labels=5, seeds=[0, 1])
    assert "training reward of all seeds on" in both and "seeds on 5," not in both
    assert "is unknown" in said(RewardModelJudge(folder), labels=5)
    (folder / "report.json").write_text(report)
    with pytest.raises(UserError, match="same SHA-256: .*other comparisons.*trained_on"):
        said(RewardModelJudge(folder), labels=5)


def test_a_judge_that_fails_is_named_with_the_reason():
    coverage = {"a.py:f": {"judged": 3, "failed": 0}, "b.py:g": {"judged": 1, "failed": 3, "first_error": "TypeError"}}
    (line,) = failed_judgments([{"seed": 2, "coverage": coverage}])
    assert line == "judges: b.py:g failed on 3 of 4 answers or pairs (seed 2; first: TypeError)"


def test_the_time_of_sampling_is_that_of_all_calls(tmp_path):
    path = tmp_path / "time.json"
    assert time_with_earlier_calls(Clock(4.0, 3.0), path) == Clock(4.0, 3.0)
    # Stopped in the training after it: the samples are read, and their time too.
    assert time_with_earlier_calls(Clock(0.5, 0.5), path) == Clock(4.5, 3.5)


def test_saving_is_not_counted_as_training(tmp_path):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    timer = TrainingTimer(clock="wall", save_seconds=100)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state = TrainerState(global_step=0, max_steps=2)
    event = (args, state, TrainerControl())
    began = time.monotonic()
    timer.on_train_begin(*event)
    time.sleep(0.1)
    state.global_step = 1
    timer.on_step_end(*event, model=None)
    time.sleep(0.3)
    timer.on_save(*event)
    time.sleep(0.1)
    timer.on_step_end(*event, model=None)
    assert 0.2 <= timer.own.seconds <= time.monotonic() - began - 0.3
