"""Study of what PPO learns in a given time and at a given KL, beside TRL's GRPO and RLOO, and of its defaults.

make study-learning                                  # everything, then the summary; continues where it was stopped
python benchmarks/learning_study.py --world stories --seed 0 --seed 2   # a part, such as one process per core
python benchmarks/learning_study.py --world stories --only 'final-*'    # settings by their names
python benchmarks/learning_study.py --collect        # the summary of what is there, with plots

The world `stories` (stories260K, reward: number of happy words) chooses, in three stages of CPU hours on one core:

1. seeds 0 to 4: today's defaults, and 23 settings that differ in one factor, 24 rollouts of 64 completions each; six
   settings of the critic's start with a reward model, 11 rollouts; on seeds 0 and 1, 12 settings of GRPO and of RLOO.
2. the same seeds: up to three joint settings of the factors that gained (`learning_rule.py` has the rule).
3. seeds 5 to 9, by which nothing was chosen: today's defaults, the winner with each kind of critic and K = 1 and 4, the
   best of GRPO and the best of RLOO, 60 rollouts. The verdict is about these.

The world `smollm2` (SmolLM2-135M, SFT policy and reward model of the quickstart, 8 rollouts of 32 completions) checks
on seeds 0 to 2: today's defaults, the winner, PPO without a critic, a warm-up of the critic, three starts of it, and
GRPO and RLOO at three learning rates on seed 0, of which the best ones go on to seeds 1 and 2.

Each run is a file docs/study/learning/WORLD/seed-N/NAME.json, which is written when the run is finished; a run that was
stopped continues from a checkpoint, at most 20 minutes old. Time is CPU time of the process, so that a pause does not
count. A stage waits until the stages that it builds on are finished on all their seeds. Settings of the worlds were
tried on seed 99, whose files stay in the work folder.
"""

import argparse
import json
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads do not help tiny tensors

sys.path.insert(0, str(Path(__file__).parent))  # for the other scripts, when this file is imported from elsewhere

import learning_grid as grid
import learning_rule as rule
import torch
from compare_study import write_json
from learning_grid import BASE, Setting

from hf_rlhf_ext.compat import versions

OUT = Path("docs/study/learning.json")
PARTS = Path("docs/study/learning")
WORK = Path("runs/learning_study")
COMMAND = "make study-learning"
CHOICE_SEEDS = (0, 1, 2, 3, 4)
TRL_SEEDS = (0, 1)
"""Seeds by which the options of TRL's trainers are chosen: the highest mean counts, so that few are enough."""
FINAL_SEEDS = (5, 6, 7, 8, 9)
SMOLLM2_SEEDS = (0, 1, 2)
TRIAL_SEED = 99
WORLDS = ("stories", "smollm2")

Parts = dict[str, dict[int, dict[str, Any]]]
"""Finished runs of a world: name of the setting -> seed -> content of the file."""


@dataclass(frozen=True)
class Task:
    """A run: a setting and a seed."""

    setting: Setting
    seed: int


# --- plan ------------------------------------------------------------------------------------------------------------


def plan(world: str, parts: dict[str, Parts]) -> tuple[list[Task], str | None]:
    """The runs of a world that are known so far, finished ones too, and what further runs wait for.

    Args:
        world: "stories" or "smollm2".
        parts: finished runs of all worlds.
    """
    return plan_stories(parts["stories"]) if world == "stories" else plan_smollm2(parts)


def plan_stories(found: Parts) -> tuple[list[Task], str | None]:
    factors = grid.stories_factors()
    tasks = on_seeds([*factors, *grid.stories_starts()], CHOICE_SEEDS) + on_seeds(grid.stories_trl(), TRL_SEEDS)
    if not are_finished(on_seeds(factors, CHOICE_SEEDS), found):
        return tasks, "stage 2 waits for all runs of stage 1"
    joint = on_seeds(rule.candidates(rule.chosen_values(factors, found)), CHOICE_SEEDS)
    tasks += joint
    if not are_finished(joint, found) or not are_finished(on_seeds(grid.stories_trl(), TRL_SEEDS), found):
        return tasks, "stage 3 waits for the runs of stages 1 and 2"
    best = [best_of(found, kind) for kind in ("grpo", "rloo")]
    return tasks + on_seeds(grid.stories_finals(winner_of(found).options, best), FINAL_SEEDS), None


def plan_smollm2(parts: dict[str, Parts]) -> tuple[list[Task], str | None]:
    found = parts["smollm2"]
    waits = None
    winner: dict[str, Any] = {}
    if plan_stories(parts["stories"])[1] is None:
        winner = winner_of(parts["stories"]).options
    else:
        waits = "the winner waits for the stories"
    tasks = on_seeds(grid.smollm2_ppo(winner), SMOLLM2_SEEDS)
    trl = grid.smollm2_trl()
    tasks += on_seeds(trl, SMOLLM2_SEEDS[:1])
    if BASE not in found or not are_finished(on_seeds(trl, SMOLLM2_SEEDS[:1]), found):
        return tasks, waits or "GRPO and RLOO on seeds 1 and 2 wait for their runs on seed 0"
    best = [smollm2_best(found, kind) for kind in ("grpo", "rloo")]
    return tasks + on_seeds(best, SMOLLM2_SEEDS[1:]), waits


def winner_of(stories: Parts) -> Setting:
    """The setting that the stories chose. Stages 1 and 2 must be finished."""
    return rule.winner(rule.chosen_values(grid.stories_factors(), stories), stories)


def best_of(stories: Parts, kind: str) -> Setting:
    """The best options of a trainer of TRL on the stories."""
    return rule.best_of_kind(grid.stories_trl(), stories, kind, stories[BASE])


def smollm2_best(found: Parts, kind: str) -> Setting:
    """The best learning rate of a trainer of TRL on the first seed of SmolLM2."""
    first = {name: {SMOLLM2_SEEDS[0]: runs[SMOLLM2_SEEDS[0]]} for name, runs in found.items() if 0 in runs}
    return rule.best_of_kind(grid.smollm2_trl(), first, kind, first[BASE])


def on_seeds(settings: Sequence[Setting], seeds: Sequence[int]) -> list[Task]:
    """All runs of the first seed, then those of the next one."""
    return [Task(setting, seed) for seed in seeds for setting in settings]


def are_finished(tasks: Sequence[Task], found: Parts) -> bool:
    return all(task.seed in found.get(task.setting.name, {}) for task in tasks)


# --- parts -----------------------------------------------------------------------------------------------------------


def part_of(world: str, task: Task, work: Path = WORK) -> Path:
    """The file with a run. It is committed, except for the trial seed's."""
    folder = work / "parts" if task.seed == TRIAL_SEED else PARTS
    return folder / world / f"seed-{task.seed}" / f"{task.setting.name}.json"


def read_parts() -> dict[str, Parts]:
    """The finished runs of all worlds.

    Raises:
        SystemExit: runs of a world have other settings than the others.
    """
    found: dict[str, Parts] = {}
    for world in WORLDS:
        found[world] = {}
        first: tuple[Path, Any] | None = None
        for path in sorted((PARTS / world).glob("seed-*/*.json")):
            part = json.loads(path.read_text(encoding="utf-8"))
            if first is None:
                first = path, part["world_settings"]
            if part["world_settings"] != first[1]:
                raise SystemExit(f"{path} has other settings of the world than {first[0]}: run one of them again")
            found[world].setdefault(part["setting"]["name"], {})[part["seed"]] = part
    return found


def checked(tasks: Sequence[Task], world: str, found: Parts) -> None:
    """Refuses a finished run whose setting is not the one of the grid, such as after a change of the grid."""
    for task in tasks:
        part = found.get(task.setting.name, {}).get(task.seed)
        if part is not None and part["setting"] != as_json(asdict(task.setting)):
            raise SystemExit(f"{part_of(world, task)} has another setting than the grid: delete it to run it again")


def as_json(value: Any) -> Any:
    """The value as it is read back from a file."""
    return json.loads(json.dumps(value))


def world_settings(place: Any) -> dict[str, Any]:
    """What the runs of a world share, without folders."""
    names = ("rollouts", "rollout_size", "evaluate_every", "max_tokens", "temperature", "bf16", "ppo", "trl")
    shared = {name: getattr(place, name) for name in names}
    return shared | {"prompts": len(place.prompts), "heldout": len(place.heldout), "lora_r": place.lora.r}


def run(world: str, task: Task, work: Path) -> None:
    """Trains, and writes the file of the run."""
    from learning_runs import train  # these load the trainers, which a summary does not need
    from learning_worlds import WORLDS as PLACES

    place = PLACES[world](task.setting, task.seed, work)
    folder = work / world / f"seed-{task.seed}" / "runs" / task.setting.name
    result = train(task.setting, place, task.seed, folder)
    part = {
        "world": world,
        "seed": task.seed,
        "setting": asdict(task.setting),
        "world_settings": world_settings(place),
        "versions": versions(),
        **result,
    }
    write_json(part_of(world, task, work), part)
    shutil.rmtree(folder, ignore_errors=True)
    last = result["evaluations"][-1]
    stopped = f", stopped: {result['stopped']}" if result["stopped"] else ""
    print(
        f"{world}, seed {task.seed}, {task.setting.name}: gold {last['gold']:.3f} at {last['kl']:.1f} nats in "
        f"{last['cpu_seconds'] / 60:.1f} CPU minutes, {result['cpu_seconds'] / 60:.1f} with evaluations{stopped}",
        flush=True,
    )


def run_all(world: str, seeds: Sequence[int] | None, only: str | None, work: Path) -> list[Task]:
    """Runs what is not finished, until nothing more can be run with these seeds and names.

    Returns:
        The runs that ended with an error, whose traceback was printed. The others went on.
    """
    failed: list[Task] = []
    while True:
        parts = read_parts()
        tasks, waits = plan(world, parts)
        checked(tasks, world, parts[world])
        if seeds == [TRIAL_SEED]:
            tasks = on_seeds(list({task.setting.name: task.setting for task in tasks}.values()), seeds)
        wanted = [task for task in tasks if is_wanted(task, seeds, only) and not part_of(world, task, work).is_file()]
        wanted = [task for task in wanted if task not in failed]
        if not wanted:
            if waits:
                print(f"{world}: {waits}", flush=True)
            return failed
        for task in wanted:
            if part_of(world, task, work).is_file():  # another process has finished it
                continue
            try:
                run(world, task, work)
            except Exception:
                traceback.print_exc()
                print(f"{world}, seed {task.seed}, {task.setting.name}: failed, see above", file=sys.stderr, flush=True)
                failed.append(task)


def is_wanted(task: Task, seeds: Sequence[int] | None, only: str | None) -> bool:
    return (seeds is None or task.seed in seeds) and (only is None or fnmatch(task.setting.name, only))


# --- all seeds -------------------------------------------------------------------------------------------------------


def collect() -> dict[str, Any]:
    """Writes docs/study/learning.json and the plots from the runs that are there, and returns the content.

    Raises:
        SystemExit: there are no runs.
    """
    from learning_plots import draw
    from learning_summary import summary_of_smollm2, summary_of_stories

    parts = read_parts()
    for world in WORLDS:
        checked(plan(world, parts)[0], world, parts[world])
    if not any(parts.values()):
        raise SystemExit(f"there are no runs in {PARTS}: run some first")
    summary: dict[str, Any] = {"command": COMMAND, "kl_limit": rule.KL_LIMIT, "worlds": {}, "missing": {}}
    for world, summarize in (("stories", summary_of_stories), ("smollm2", summary_of_smollm2)):
        if not parts[world]:
            continue
        tasks, waits = plan(world, parts)
        missing = [f"{task.setting.name}, seed {task.seed}" for task in tasks if not are_finished([task], parts[world])]
        summary["missing"][world] = {"runs": missing, "waits": waits}
        summary["worlds"][world] = summarize(parts, tasks)
    write_json(OUT, summary)
    draw(summary, PARTS)
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, help="one world; default: both")
    parser.add_argument("--seed", type=int, action="append", help="seed to run; default: all, then --collect")
    parser.add_argument("--only", help="names of settings to run, with * for any characters")
    parser.add_argument("--collect", action="store_true", help="summary and plots of the runs that are there")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of models and checkpoints")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # one core per process, so that several can run at once
    failed: list[Task] = []
    if not options.collect:
        for world in [options.world] if options.world else WORLDS:
            failed += run_all(world, options.seed, options.only, options.work)
    if options.collect or (options.seed is None and options.only is None):
        print(json.dumps(collect()["missing"], indent=1))
    if failed:
        raise SystemExit(f"{len(failed)} runs failed, see above: run the same command again when the cause is fixed")


if __name__ == "__main__":
    main()
