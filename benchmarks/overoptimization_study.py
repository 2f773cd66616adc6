"""Study of over-optimization: gold and proxy reward against √KL for best-of-n and PPO (Gao et al. 2022, 2210.10760).

make study-overoptimization                             # all seeds, then the summary; continues where it was stopped
python benchmarks/overoptimization_study.py --seed 1    # one seed, such as one process per core
python benchmarks/overoptimization_study.py --collect   # the summary of what is there, with fits, table and plot

The world is that of `story_world.py`: stories260K, a gold reward of the text, and Bradley-Terry reward models trained
on 128, 512 or 2,048 pairs of its stories, of whose judgments none or a quarter are flipped. For each of these six
settings and each seed:

- best-of-n for n up to 1,024, with unbiased estimates from 1,024 stories of each of 16 held-out prompts;
- PPO with a small KL penalty and without any guard, so that it goes on past the peak. It is evaluated every second
  rollout on 32 held-out prompts, three stories each;
- a second reward model of the same size from other pairs, which PPO does not see. It serves two of the early stops.

Each run is a file in docs/study/overoptimization/, which is written when it is finished. Settings were tried out on
seed 99 and fixed before seeds 0 to 2 were run.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads do not help tiny tensors

import numpy as np
import story_world as world
import torch
from datasets import Dataset
from transformers import PrinterCallback

from hf_rlhf_ext import PPOConfig, PPOTrainer, RewardScorer, load_base_model, load_tokenizer
from hf_rlhf_ext.metrics.overoptimization_plot import plot_overoptimization
from hf_rlhf_ext.ppo.callbacks import PPOCallback
from hf_rlhf_ext.study.best_of_n import expected_best, kl_of_best_of_n
from hf_rlhf_ext.study.early_stops import RunEvaluations, all_stops
from hf_rlhf_ext.study.overoptimization import (
    Curve,
    FittedCurves,
    fall_after_peak,
    fit_curve,
    fit_curves,
    highest_point,
)
from hf_rlhf_ext.study.statistics import mean_interval, paired_gain

OUT = Path("docs/study/overoptimization.json")
WORK = Path("runs/overoptimization")
COMMAND = "make study-overoptimization"
SEEDS = (0, 1, 2)
PAIRS = (128, 512, 2048)
FLIPS = (0.0, 0.25)
BEST_OF = tuple(2**k for k in range(11))
"""1, 2, 4 … 1,024."""
BEST_OF_PROMPTS = 16
ROLLOUTS, ROLLOUT_SIZE, EVALUATE_EVERY, EVALUATED_PER_PROMPT = 36, 64, 2, 3
PPO = {
    "learning_rate": 5e-4,
    "num_ppo_epochs": 2,
    "kl_coef": 0.002,
    "vf_coef": 0.1,
    "critic": "head",
    "max_kl": None,
}
STOPS = {"ceilings": (10.0, 20.0, 40.0), "patience": 3, "factor": 1.5}
"""`max_kl` in nats, evaluations without a new best, and multiple of the disagreement at the start."""
END_POINTS = 3
"""Number of last evaluations whose mean is the end of a run, in the fall of gold."""


@dataclass(frozen=True)
class Setting:
    """What a reward model is trained on: number of comparisons, and share of flipped judgments."""

    pairs: int
    flips: float

    @property
    def name(self) -> str:
        return f"{self.pairs}-pairs-{self.flips:g}-flips"


SETTINGS = tuple(Setting(pairs, flips) for flips in FLIPS for pairs in PAIRS)


# --- one seed --------------------------------------------------------------------------------------------------------


class SeedRun:
    """The runs of one seed. Finished ones are kept.

    Args:
        work: folder of samples and reward models, which can be made again.
        out: file of the summary, beside which the runs are written.
        seed: seed of everything.
    """

    def __init__(self, work: Path, out: Path, seed: int):
        self.seed = seed
        self.work = work / f"seed-{seed}"
        self.results = out.with_suffix("") / f"seed-{seed}"

    def run(self) -> None:
        """Runs what is not finished. PPO comes last, as it takes longest."""
        for setting in SETTINGS:
            self.keep(f"{setting.name}-best_of_n", lambda setting=setting: self.best_of_n(setting))
        for setting in SETTINGS:
            self.keep(f"{setting.name}-ppo", lambda setting=setting: self.ppo(setting))

    def keep(self, name: str, make: Callable[[], dict[str, Any]]) -> None:
        """Writes the result of a run, unless it is there."""
        path = self.results / f"{name}.json"
        if path.is_file():
            return
        start = time.process_time()
        result = {"seed": self.seed} | make()
        result["cpu_seconds"] = round(time.process_time() - start, 1)
        write_json(path, result)
        print(f"seed {self.seed}, {name}: {result['cpu_seconds']:.0f} CPU seconds", flush=True)

    def reward_model(self, setting: Setting, role: str) -> RewardScorer:
        """The reward model that PPO trains on (`proxy`), or the one from other pairs (`heldout`)."""
        folder = self.work / f"{setting.name}-{role}"
        if not (folder / "done").is_file():
            data_seed = 1000 * self.seed + {"proxy": 1, "heldout": 2}[role]
            comparisons = world.judged_pairs(setting.pairs, setting.flips, data_seed)
            world.train_reward_model(comparisons, self.seed, folder=folder)
            (folder / "done").touch()
        return RewardScorer.from_pretrained(folder, batch_size=256)

    def stories(self) -> list[list[str]]:
        """Samples of the base policy, the same for all reward models."""
        path = self.work / "stories.json"
        if not path.is_file():
            prompts = world.heldout_prompts()[:BEST_OF_PROMPTS]
            write_json(path, world.sample_stories(prompts, max(BEST_OF), 1000 * self.seed + 3))
        return json.loads(path.read_text(encoding="utf-8"))

    def best_of_n(self, setting: Setting) -> dict[str, Any]:
        """Gold and proxy reward of best-of-n, by n and prompt, and the accuracy of the reward model."""
        scorer = self.reward_model(setting, "proxy")
        heldout = world.judged_pairs(512, 0.0, 1000 * self.seed + 4, world.heldout_prompts())
        stories = self.stories()
        proxy = []
        gold = []
        for prompt, of_prompt in zip(world.heldout_prompts(), stories, strict=False):  # only the first prompts
            proxy.append(scorer([prompt] * len(of_prompt), of_prompt))
            gold.append(world.gold(of_prompt))
        return {
            "accuracy": round(world.accuracy(scorer, heldout), 4),
            "n": list(BEST_OF),
            "kl": [round(kl_of_best_of_n(n), 5) for n in BEST_OF],
            "gold": rounded(expected_best(proxy, gold, list(BEST_OF)).T),
            "proxy": rounded(expected_best(proxy, None, list(BEST_OF)).T),
        }

    def ppo(self, setting: Setting) -> dict[str, Any]:
        """Gold, proxy and KL of each evaluation by prompt, and what the early stops see."""
        recorded = Recorder()
        trainer = self.trainer(setting, recorded)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        rollout_kl = [round(row["objective/kl"], 3) for row in trainer.state.log_history if "objective/kl" in row]
        return {"rollout_kl": rollout_kl, "evaluations": recorded.evaluations}

    def trainer(self, setting: Setting, recorded: "Recorder") -> PPOTrainer:
        heldout_model = self.reward_model(setting, "heldout")

        def heldout(prompts, completions, **columns):
            return heldout_model(prompts, completions)

        steps = PPO["num_ppo_epochs"]
        args = PPOConfig(
            str(self.work / "ppo"),
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            lr_scheduler_type="constant",
            value_clip_range=None,
            logging_steps=steps,
            eval_strategy="steps",
            eval_on_start=True,
            eval_steps=EVALUATE_EVERY * steps,
            exact_kl_rows=0,
            per_device_eval_batch_size=128,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=self.seed,
            per_device_train_batch_size=ROLLOUT_SIZE,
            max_steps=ROLLOUTS * steps,
            max_completion_length=world.MAX_TOKENS,
            logprobs_chunk_size=8192,
            **PPO,
        )
        evaluated = [prompt for prompt in world.heldout_prompts() for _ in range(EVALUATED_PER_PROMPT)]
        return PPOTrainer(
            load_base_model(world.STORIES, dtype="float32"),
            self.reward_model(setting, "proxy"),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": world.train_prompts()}),
            eval_dataset=Dataset.from_dict({"prompt": evaluated}),
            eval_reward_funcs=[world.gold, heldout],
            processing_class=load_tokenizer(world.STORIES),
            callbacks=[recorded],
        )


class Recorder(PPOCallback):
    """Keeps what each evaluation measured, as means of each prompt."""

    def __init__(self):
        self.evaluations: list[dict[str, Any]] = []

    def on_eval_completions(self, args, state, control, *, rows, **kwargs):
        proxy = np.array([row.score for row in rows])
        heldout = np.array([row.rewards["heldout"] for row in rows])
        gold = [row.rewards["gold"] for row in rows]
        self.evaluations.append(
            {
                "rollouts": state.global_step // args.num_ppo_epochs,
                "kl": rounded(by_prompt([row.kl for row in rows])),
                "gold": rounded(by_prompt(gold)),
                "proxy": rounded(by_prompt(proxy)),
                "heldout_proxy": rounded(by_prompt(heldout)),
                "proxy_std": round(float(proxy.std()), 4),
                "heldout_proxy_std": round(float(heldout.std()), 4),
                # As `RewardEnsemble.disagreement` of the two models.
                "disagreement": round(float(np.std([proxy, heldout], axis=0).mean()), 4),
                "tokens": round(float(np.mean([row.n_tokens for row in rows])), 2),
                "example": rows[0].completion,
            }
        )


def by_prompt(values: Sequence[float]) -> np.ndarray:
    """Means of the completions of each prompt, which follow each other."""
    return np.reshape(values, (-1, EVALUATED_PER_PROMPT)).mean(1)


def rounded(values: np.ndarray) -> list:
    return np.round(values, 4).tolist()


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")
    temporary.replace(path)  # so that the file is never incomplete


# --- all seeds -------------------------------------------------------------------------------------------------------


def runs_of(out: Path, setting: Setting, method: str) -> list[dict[str, Any]]:
    """The finished runs of a setting, in the order of the seeds."""
    runs = []
    for seed in SEEDS:
        path = out.with_suffix("") / f"seed-{seed}" / f"{setting.name}-{method}.json"
        if path.is_file():
            runs.append(json.loads(path.read_text(encoding="utf-8")))
    return runs


def collect(out: Path) -> dict[str, Any]:
    """Fits the curves of the runs that are there, and writes summary and plot."""
    summary: dict[str, Any] = {
        "command": COMMAND,
        "seeds": list(SEEDS),
        "model": "stories260K, fp32",
        "settings": settings(),
        "best_of_n": [],
        "ppo": [],
        "missing": [],
        "cpu_seconds": 0.0,
    }
    for setting in SETTINGS:
        for method, summarize in (("best_of_n", summary_of_best_of_n), ("ppo", summary_of_ppo)):
            runs = runs_of(out, setting, method)
            found = {run["seed"] for run in runs}
            summary["missing"] += [f"{setting.name}-{method}, seed {seed}" for seed in SEEDS if seed not in found]
            summary["cpu_seconds"] += sum(run["cpu_seconds"] for run in runs)
            if runs:
                entry = {"pairs": setting.pairs, "flips": setting.flips, "seeds": sorted(found)}
                summary[method].append(entry | summarize(runs))
    summary["cpu_seconds"] = round(summary["cpu_seconds"])
    summary["stops"] = stops_of_all(out)
    write_json(out, summary)
    plot_overoptimization(summary, out.with_suffix(".png"))
    return summary


def settings() -> dict[str, Any]:
    return {
        "pairs": PAIRS,
        "flips": FLIPS,
        "best_of": BEST_OF,
        "best_of_prompts": BEST_OF_PROMPTS,
        "ppo": PPO,
        "rollouts": ROLLOUTS,
        "rollout_size": ROLLOUT_SIZE,
        "evaluate_every": EVALUATE_EVERY,
        "evaluated": world.N_HELDOUT * EVALUATED_PER_PROMPT,
        "max_tokens": world.MAX_TOKENS,
        "stops": STOPS,
        "end_points": END_POINTS,
    }


def summary_of_best_of_n(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    curves = [Curve(run["kl"], run["gold"]) for run in runs]
    proxies = [Curve(run["kl"], run["proxy"]) for run in runs]
    return {
        "accuracy": float(np.mean([run["accuracy"] for run in runs])),
        "points": [{"n": n} | point for n, point in zip(BEST_OF, points(curves, proxies), strict=True)],
    } | summary_of_curves(curves, "best_of_n", end_points=1)


def summary_of_ppo(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    curves = [Curve(values_of(run, "kl"), values_of(run, "gold")) for run in runs]
    proxies = [Curve(values_of(run, "kl"), values_of(run, "proxy")) for run in runs]
    rollouts = [entry["rollouts"] for entry in runs[0]["evaluations"]]
    return {
        "points": [{"rollouts": at} | point for at, point in zip(rollouts, points(curves, proxies), strict=True)],
        "examples": examples(runs[0]),
    } | summary_of_curves(curves, "rl", end_points=END_POINTS)


def values_of(run: dict[str, Any], name: str) -> np.ndarray:
    """(evaluations, prompts), or (evaluations,) of what an evaluation has one number of."""
    return np.array([evaluation[name] for evaluation in run["evaluations"]])


def points(curves: Sequence[Curve], proxies: Sequence[Curve]) -> list[dict[str, Any]]:
    """Means over seeds and prompts at each point, and those of each seed for the plot."""
    found = []
    for number in range(len(curves[0].kl)):
        at = [curve.kl[number].mean() for curve in curves]
        found.append(
            {
                "kl": float(np.mean(at)),
                "gold": interval_over_seeds([curve.gold[number] for curve in curves]),
                "proxy": float(np.mean([proxy.gold[number].mean() for proxy in proxies])),
                "kl_of_seeds": [round(float(value), 4) for value in at],
                "gold_of_seeds": [round(float(curve.gold[number].mean()), 4) for curve in curves],
                "proxy_of_seeds": [round(float(proxy.gold[number].mean()), 4) for proxy in proxies],
            }
        )
    return found


def interval_over_seeds(values_of_seeds: Sequence[np.ndarray]) -> dict[str, Any]:
    """Mean of values on the same prompts for each seed, with its interval over seeds and prompts."""
    seeds = [seed for seed, values in enumerate(values_of_seeds) for _ in values]
    prompts = [prompt for values in values_of_seeds for prompt in range(len(values))]
    return mean_interval(np.concatenate(values_of_seeds), seeds, prompts).as_dict()


def summary_of_curves(curves: Sequence[Curve], form: str, end_points: int) -> dict[str, Any]:
    fitted: FittedCurves = fit_curves(curves, form)
    mean, low, high = highest_point(curves)
    by_seed = [fit_curve(curve.kl.mean(1), curve.gold.mean(1), form).peak_kl for curve in curves]
    return {
        "fit": fitted.as_dict(),
        "peak_kl_of_seeds": [finite_or_none(value) for value in by_seed],
        "highest_point_kl": {"mean": mean, "ci95": [finite_or_none(low), finite_or_none(high)]},
        "fall": fall_after_peak(curves, last=end_points).as_dict(),
    }


def finite_or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) and value < 1e6 else None


def examples(run: dict[str, Any]) -> list[dict[str, Any]]:
    """A story at the start, at the evaluation with the highest gold, and at the end."""
    best = int(values_of(run, "gold").mean(1).argmax())
    chosen = []
    for name, index in (("start", 0), ("peak", best), ("end", -1)):
        entry = run["evaluations"][index]
        numbers = {key: round(float(np.mean(entry[key])), 3) for key in ("kl", "gold", "proxy")}
        chosen.append({"at": name, "rollouts": entry["rollouts"], "story": entry["example"]} | numbers)
    return chosen


KEPT_OF_STOPS = ("gold", "start", "end", "best", "kl", "stop", "seed")


def stops_of_all(out: Path) -> list[dict[str, Any]]:
    """What each guard would have chosen, over all PPO runs: gold beside that at the end and that of the best point."""
    chosen: dict[str, dict[str, list]] = {}
    for setting in SETTINGS:
        for run in runs_of(out, setting, "ppo"):
            gold = values_of(run, "gold")
            best = int(gold.mean(1).argmax())
            for name, stop in all_stops(evaluations_of(run), **STOPS).items():
                entry = chosen.setdefault(name, {key: [] for key in KEPT_OF_STOPS})
                entry["gold"].append(gold[stop.index])
                entry["start"].append(gold[0])
                entry["end"].append(gold[-END_POINTS:].mean(0))
                entry["best"].append(gold[best])
                entry["kl"].append(float(values_of(run, "kl")[stop.index].mean()))
                entry["stop"].append(stop)
                entry["seed"].append(run["seed"])
    return [{"guard": name} | summary_of_stop(entry) for name, entry in chosen.items()]


def summary_of_stop(entry: dict[str, list]) -> dict[str, Any]:
    """Means over the runs of all settings. The runs of one seed share their prompts, and are averaged first."""
    seeds = sorted(set(entry["seed"]))

    def mean_of_seeds(name: str) -> list[np.ndarray]:
        runs = list(zip(entry["seed"], entry[name], strict=True))
        return [np.mean([values for seed, values in runs if seed == wanted], axis=0) for wanted in seeds]

    golds = {name: mean_of_seeds(name) for name in ("gold", "start", "end", "best")}
    groups = [seed for seed, values in zip(seeds, golds["gold"], strict=True) for _ in values]
    prompts = [prompt for values in golds["gold"] for prompt in range(len(values))]
    flat = {name: np.concatenate(values) for name, values in golds.items()}
    return {
        "runs": len(entry["stop"]),
        "stopped": sum(stop.stopped for stop in entry["stop"]),
        "kl": float(np.mean(entry["kl"])),
        "rollouts": float(np.mean([stop.stopped_after for stop in entry["stop"]])),
        "gold": interval_over_seeds(golds["gold"]),
        "gain_over_start": paired_gain(flat["start"], flat["gold"], groups, prompts).as_dict(),
        "gain_over_end": paired_gain(flat["end"], flat["gold"], groups, prompts).as_dict(),
        "below_best": float(np.mean(flat["best"] - flat["gold"])),
    }


def evaluations_of(run: dict[str, Any]) -> RunEvaluations:
    return RunEvaluations(
        rollouts=[entry["rollouts"] for entry in run["evaluations"]],
        kl=values_of(run, "kl").mean(1).tolist(),
        proxy=values_of(run, "proxy").mean(1).tolist(),
        proxy_std=values_of(run, "proxy_std").tolist(),
        heldout_proxy=values_of(run, "heldout_proxy").mean(1).tolist(),
        heldout_proxy_std=values_of(run, "heldout_proxy_std").tolist(),
        disagreement=values_of(run, "disagreement").tolist(),
        rollout_kl=run["rollout_kl"],
        completions=world.N_HELDOUT * EVALUATED_PER_PROMPT,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, action="append", help="seed to run; default: all, then --collect")
    parser.add_argument("--collect", action="store_true", help="summary of the runs that are there")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of samples and reward models")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the summary")
    options = parser.parse_args()
    torch.set_num_threads(1)  # one core per seed, so that several seeds can run at once
    if not options.collect:
        for seed in options.seed or SEEDS:
            SeedRun(options.work, options.out, seed).run()
    if options.collect or options.seed is None:
        print(json.dumps(collect(options.out)["stops"], indent=1))


if __name__ == "__main__":
    main()
