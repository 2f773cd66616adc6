"""Study of `hf-rlhf compare`: SFT-only systems, best-of-n, DPO, GRPO, RLOO and PPO on two small models, three seeds.

make study-compare      # writes docs/study/compare.json and plots; goes on where it was stopped

The worlds are in benchmarks/compare_worlds: `stories` (stories260K, all systems, minutes) and `smollm2` (SmolLM2-135M,
about an hour for a seed on two cores). For each seed a world writes demonstrations, prompts, comparisons that a
simulated annotator judged, and a `compare.yaml`. Then `hf-rlhf compare` runs on it, as a user would run it.

`compare_study.py --world stories --seed 1` runs one seed, so that several can run at once, and writes its part:
docs/study/compare/stories-seed1.json. A seed whose part is there is not run again. `--collect` merges the parts that
are there into docs/study/compare.json. Without options, all seeds are run one after the other, then collected.

Seed 99 is for trials: its part stays in the work folder. `--small` runs the small form for CI, of five systems.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))  # for `compare_worlds`, when this file is imported from elsewhere

from compare_worlds import small, smollm2, stories
from compare_worlds.world import made_once, write_config

from hf_rlhf_ext.cli.stages import StageRunner
from hf_rlhf_ext.compat import versions
from hf_rlhf_ext.recipes.compare_parts.merging import merge
from hf_rlhf_ext.recipes.compare_parts.report import (
    calibration_plot,
    category_plot,
    kl_plot,
    time_plot,
    win_rate_plot,
)
from hf_rlhf_ext.study.verdict import write_verdict

WORLDS: dict[str, ModuleType] = {"stories": stories, "smollm2": smollm2}
SEEDS = (0, 1, 2)
TRIAL_SEED = 99
OUT = Path("docs/study/compare.json")
PARTS = Path("docs/study/compare")
WORK = Path("runs/compare_study")
COMMAND = "make study-compare"
DIGITS = 5
"""Significant digits of numbers in the files."""


# --- one seed --------------------------------------------------------------------------------------------------------


def run_seed(world: str, seed: int, work: Path) -> dict[str, Any]:
    """Runs the stages of a seed that are not finished yet, and returns the results that `hf-rlhf compare` wrote."""
    module = WORLDS[world]
    folder = work / f"{world}-seed{seed}"
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    shared = made_once(work / f"{world}-shared", module.make_shared).resolve()

    stages = StageRunner(folder, {"world": world, "seed": seed}, ("files", "start", "comparisons", "compare"))
    stages.run("files", "demonstrations and prompts", as_stage(module.make_files, data, shared, seed))
    start = folder / "start"
    world_of_seed = module.of_base(shared / "base") if world == "stories" else module.WORLD
    stages.run(
        "start",
        "the SFT policy whose completions are judged",
        as_stage(world_of_seed.train_start, data / "demonstrations.jsonl", start, seed),
    )
    stages.run(
        "comparisons",
        "completions of it, judged by a simulated annotator",
        as_stage(module.make_comparisons, data, start, shared, seed),
    )
    config = folder / "compare.yaml"
    write_config(config, module.config(data.resolve(), shared, (folder / "run").resolve(), seed))
    stages.run("compare", "all systems", as_stage(run_compare, config))
    return json.loads((folder / "run" / f"seed-{seed}" / "results.json").read_text(encoding="utf-8"))


def as_stage(function: Any, *arguments: Any) -> Any:
    """A stage that calls a function and measures nothing."""

    def stage() -> dict[str, Any]:
        function(*arguments)
        return {}

    return stage


def run_compare(config: Path | str) -> None:
    """`hf-rlhf compare` in a process of its own. It continues where it was stopped."""
    subprocess.run([sys.executable, "-m", "hf_rlhf_ext", "compare", "--config", str(config)], check=True)


def part_of(world: str, seed: int, work: Path = WORK) -> Path:
    """The file with the results of a seed. It is committed, except for the trial seed's."""
    folder = work if seed == TRIAL_SEED else PARTS
    return folder / f"{world}-seed{seed}.json"


def write_part(world: str, seed: int, work: Path) -> None:
    results = run_seed(world, seed, work)
    folder = work / f"{world}-seed{seed}"
    config = yaml.safe_load((folder / "compare.yaml").read_text(encoding="utf-8"))
    part = {
        "world": world,
        "seed": seed,
        "command": f"python benchmarks/compare_study.py --world {world} --seed {seed}",
        "config": without_folders(config, work),
        "versions": versions(),
        "results": without_folders(results, work),
    }
    write_json(part_of(world, seed, work), part)


def without_folders(value: Any, work: Path) -> Any:
    """The same with paths relative to the work folder, so that it is the same on every machine."""
    if isinstance(value, dict):
        return {name: without_folders(entry, work) for name, entry in value.items()}
    if isinstance(value, list):
        return [without_folders(entry, work) for entry in value]
    if isinstance(value, str):
        value = value.replace(f"{work.resolve()}/", "").replace(f"{Path(__file__).parents[1].resolve()}/", "")
    return value


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(compact(content), separators=(",", ":")) + "\n", encoding="utf-8")
    temporary.replace(path)  # so that the file is never incomplete


def compact(value: Any) -> Any:
    """The same with floats of at most `DIGITS` significant digits, and whole ones as integers: a third of the size."""
    if isinstance(value, dict):
        return {name: compact(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [compact(entry) for entry in value]
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() and abs(value) < 10**DIGITS else float(f"{value:.{DIGITS}g}")
    return value


# --- all seeds -------------------------------------------------------------------------------------------------------


def parts(world: str) -> list[dict[str, Any]]:
    """The parts of a world that are there, in the order of the seeds. They must have the same settings."""
    paths = [part_of(world, seed) for seed in SEEDS if part_of(world, seed).is_file()]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    settings = [settings_of(part) for part in found]
    for path, others in zip(paths, settings, strict=True):
        if others != settings[0]:
            raise SystemExit(f"{path} has other settings than {paths[0]}: run one of them again")
    return found


def settings_of(part: dict[str, Any]) -> dict[str, Any]:
    """The config of a part without what differs between seeds."""
    config = json.dumps(part["config"]).replace(f"{part['world']}-seed{part['seed']}", f"{part['world']}-seedN")
    return {name: value for name, value in json.loads(config).items() if name != "seeds"}


def collect() -> dict[str, Any]:
    """Merges all parts, writes docs/study/compare.json and the plots, and returns what the file has.

    `systems` has the main numbers of SmolLM2, or those of the stories while there are no others. `worlds` has all.
    """
    worlds = {}
    for world in WORLDS:
        of_world = parts(world)
        if not of_world:
            continue
        report = merge([part["results"] for part in of_world], command=COMMAND, settings=settings_of(of_world[0]))
        report["verdict"] = write_verdict(report)
        report["versions"] = {str(part["seed"]): part["versions"] for part in of_world}
        for draw in (kl_plot, time_plot, win_rate_plot, category_plot, calibration_plot):
            draw(report, plots_of(world))
        worlds[world] = report
    if not worlds:
        raise SystemExit(f"there are no parts in {PARTS}: run a seed first")
    first = "smollm2" if "smollm2" in worlds else next(iter(worlds))
    collected = {
        "command": COMMAND,
        "world": first,
        "seeds": worlds[first]["seeds"],
        "systems": {name: main_numbers(entry) for name, entry in worlds[first]["systems"].items()},
        "worlds": worlds,
    }
    write_json(OUT, collected)
    return collected


def plots_of(world: str) -> Path:
    """The folder of the plots of a world."""
    folder = PARTS / world
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main_numbers(entry: dict[str, Any]) -> dict[str, Any]:
    """What most readers want of a system."""
    names = ("status", "error", "gold", "kl", "kl_ci95", "n", "seconds", "win_rate_vs_sft", "gold_gain", "labels")
    return {name: entry[name] for name in names if name in entry}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=list(WORLDS), help="Only this world. By default, both.")
    parser.add_argument("--seed", type=int, help="Only this seed. By default, all that are not run yet.")
    parser.add_argument("--collect", action="store_true", help="Only merge the parts that are there.")
    parser.add_argument("--small", action="store_true", help="Only run the small form for CI, in runs/compare_small.")
    parser.add_argument("--work", type=Path, default=WORK, help="Folder for data, models and checkpoints.")
    args = parser.parse_args(argv)
    if args.small:
        small.make_files(small.FOLDER)
        run_compare(small.CONFIG)
        return
    worlds = [args.world] if args.world else list(WORLDS)
    seeds = SEEDS if args.seed is None else (args.seed,)
    if not args.collect:
        for world in worlds:
            for seed in seeds:
                if part_of(world, seed, args.work).is_file():
                    print(f"{part_of(world, seed, args.work)} is there already", flush=True)
                    continue
                write_part(world, seed, args.work)
                print(f"wrote {part_of(world, seed, args.work)}", flush=True)
    if args.collect or args.seed is None:
        for world, report in collect()["worlds"].items():
            print(f"{world}, seeds {report['seeds']}: {report['verdict']}")


if __name__ == "__main__":
    main()
