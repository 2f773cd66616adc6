"""Training of reward models in each layout: pairs per second, seconds of an evaluation, and peak memory.

    make bench-reward BASE=commit                    # this tree beside that of a commit, run by run in turns
    make bench-reward BASE=commit ARGS="wide long"   # only these shapes; ARGS="wide --layouts auto" only this layout

Shapes of comparisons: `pairs`, `k4` and `k9` are those of `benchmarks/reward_model.py`, on SmolLM2-135M in the dtype in
which the machine is fastest, with LoRA r 16 and micro-batches of at most 2,400 tokens; they are measured with
layout="auto" unless --layouts is given. The others are random tokens for a Llama of four layers of 128 units, which is
trained whole in fp32: prompts of P tokens with K completions of T each. `mask` is the shape `wide` with eager
attention, which needs a mask over the whole row. A shape takes one to three minutes on two idle cores, and so does each
layout more.

The first optimizer step and the first evaluation are not counted. Of --rounds runs the fastest counts. Each run has its
own process. The last line is JSON: all runs, and for each shape and layout the pairs per second of this tree divided by
those of the commit (`speedup`), and for `auto` by those of plain rows (`against_plain`).
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

from reward_model import RUNS, comparison_rows, in_a_process, our_trainer, step_clock

ROOT = Path(__file__).parents[1]
REAL = {"pairs": "ours, 16 prompts", "k4": "ours, K = 4", "k9": "ours, K = 9"}
"""Shapes of real rows: name of the run in `benchmarks/reward_model.py`."""

# name -> (tokens of the prompt, completions, tokens of each, prompts per step)
RANDOM = {
    "short": (155, 4, 48, 8),
    "long": (512, 9, 64, 2),
    "wide": (16, 32, 128, 1),
    "wider": (16, 64, 128, 1),
    "mask": (16, 32, 128, 1),
}
LAYOUTS = ("auto", "plain")
STEPS = 3
"""Optimizer steps that are counted."""


# ---- The parent: runs in turns, table ----


def run(tree: Path, shape: str, layout: str) -> dict[str, Any]:
    """Trains in a new process with the library of a tree, and returns the measurements."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", shape, layout]
    return in_a_process(command, env=environment, cwd=tree)


def best_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest run, with the shortest evaluation and the smallest peak of all of them."""
    finished = [one for one in runs if "pairs_per_s" in one]
    if not finished:
        return runs[0]
    best = max(finished, key=lambda one: one["pairs_per_s"])
    for name in ("evaluation_s", "peak_gb"):
        best[name] = min(one[name] for one in finished)
    return best


def ratio(runs: dict[str, dict[str, Any]], first: str, second: str, what: str = "pairs_per_s") -> float | None:
    """What was measured in one run divided by that of another; `None` if one of them is missing."""
    both = [runs.get(name, {}).get(what) for name in (first, second)]
    return None if None in both else round(both[0] / both[1], 3)


def results_of(runs: dict[str, dict[str, Any]], shapes: list[str]) -> dict[str, Any]:
    """The ratios of each shape, see the module."""
    results: dict[str, Any] = {}
    for shape in shapes:
        found = {"against_plain": ratio(runs, f"now {shape} auto", f"now {shape} plain")}
        found["evaluation_against_plain"] = ratio(runs, f"now {shape} plain", f"now {shape} auto", "evaluation_s")
        for layout in LAYOUTS:
            names = f"now {shape} {layout}", f"before {shape} {layout}"
            found[f"speedup_{layout}"] = ratio(runs, *names)
            found[f"evaluation_speedup_{layout}"] = ratio(runs, *reversed(names), "evaluation_s")
            found[f"memory_{layout}"] = ratio(runs, *names, "peak_gb")
        results[shape] = {name: value for name, value in found.items() if value is not None}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join([*REAL, *RANDOM])}; all of them if left out")
    parser.add_argument("--base", help="commit whose tree is measured beside this one")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="layouts to measure")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each kind, of which the fastest counts")
    args = parser.parse_args()
    shapes = args.shapes or [*REAL, *RANDOM]
    if unknown := set(shapes) - {*REAL, *RANDOM}:
        raise SystemExit(f"{', '.join(unknown)}: no such shape: choose from {', '.join([*REAL, *RANDOM])}.")
    runs: dict[str, dict[str, Any]] = {}
    print(f"{'':24}{'layout':>15}{'pairs/s':>10}{'evaluation s':>14}{'peak GB':>9}{'loss':>9}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        trees = {"now": ROOT}
        if args.base:
            from startup import tree_of

            trees = {"before": tree_of(args.base, Path(folder))} | trees
        for shape in shapes:
            for layout in args.layouts or (LAYOUTS if shape in RANDOM else LAYOUTS[:1]):
                of_trees: dict[str, list[dict[str, Any]]] = {tree: [] for tree in trees}
                for _ in range(args.rounds):
                    for tree, path in trees.items():
                        of_trees[tree].append(run(path, shape, layout))
                for tree, its_runs in of_trees.items():
                    name = f"{tree} {shape} {layout}"
                    runs[name] = best_of(its_runs)
                    _print(name, runs[name])
    print(json.dumps({"runs": runs, "results": results_of(runs, shapes)}))


def _print(name: str, one: dict[str, Any]) -> None:
    if "available_gb" in one:
        print(f"{name:24} does not fit in {one['available_gb']} GB", flush=True)
        return
    numbers = f"{one['pairs_per_s']:10.2f}{one['evaluation_s']:14.2f}{one['peak_gb']:9.2f}{one['loss']:9.4f}"
    print(f"{name:24}{one['layout']:>15}{numbers}", flush=True)


# ---- The child: one training ----


def child(shape: str, layout: str) -> dict[str, Any]:
    """Trains for `STEPS` steps after a warm-up, and evaluates on the rows of one step."""
    import torch

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if shape in REAL:
            trainer, n_pairs, rows = _real(folder, shape, layout)
        else:
            trainer, n_pairs, rows = _random(folder, shape, layout)
        clock = step_clock(with_bare_loop=False)
        trainer.add_callback(clock)
        trainer.train()
        trainer.evaluate(rows)
        start = time.perf_counter()
        trainer.evaluate(rows)
        evaluation = time.perf_counter() - start
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {
        "layout": trainer.layout,
        "pairs_per_s": n_pairs * STEPS / sum(clock.seconds[1:]),
        "evaluation_s": evaluation,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "loss": losses[-1],
    }


def _real(folder: str, shape: str, layout: str) -> tuple[Any, int, Any]:
    """The trainer of a run in `benchmarks/reward_model.py`, the pairs of a step, and the rows to evaluate."""
    from datasets import Dataset
    from reward_model import common_options

    from hf_rlhf_ext import load_base_model, load_tokenizer

    _, _, k, per_step, _, _, checkpointing = RUNS[REAL[shape]]
    rows = comparison_rows(per_step * (STEPS + 1), k)
    options = common_options(folder, STEPS + 1, checkpointing) | {"layout": layout, "eval_strategy": "no"}
    options["per_device_eval_batch_size"] = per_step
    trainer = our_trainer(load_base_model(task="reward"), load_tokenizer(), rows, options, per_step)
    return trainer, per_step * k * (k - 1) // 2, Dataset.from_list(rows[:per_step])


def _random(folder: str, shape: str, layout: str) -> tuple[Any, int, Any]:
    """A trainer on random tokens, the pairs of a step, and the rows to evaluate, which are tokenized already."""
    import numpy as np
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer, load_tokenizer

    prompt, k, length, per_step = RANDOM[shape]
    tokenizer = load_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager" if shape == "mask" else "sdpa",
    )
    draw = np.random.default_rng(0)
    pairs = [list(pair) for pair in combinations(range(k), 2)]
    rows = []
    for _ in range(per_step * (STEPS + 1)):
        completions = [draw.integers(5, 500, length).tolist() for _ in range(k)]
        row = {"prompt_ids": draw.integers(5, 500, prompt).tolist(), "completion_ids": completions, "pairs": pairs}
        row |= {"targets": [1.0] * len(pairs), "weights": [1.0] * len(pairs), "margins": [0.0] * len(pairs)}
        rows.append(row)
    data = Dataset.from_list(rows)
    args = BradleyTerryConfig(
        folder,
        layout=layout,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=per_step,
        per_device_eval_batch_size=per_step,
        max_steps=STEPS + 1,
        max_length=None,
        learning_rate=1e-4,
        activation_checkpointing=False,
        normalize_rewards=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    model = LlamaForSequenceClassification(config)
    trainer = BradleyTerryTrainer(model, args, data, processing_class=tokenizer)
    return trainer, per_step * len(pairs), data.select(range(per_step))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:])))
    else:
        main()
