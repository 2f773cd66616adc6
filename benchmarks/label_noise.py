"""Study: accuracy of a reward model with 0 to 40 percent flipped votes, for three kinds of targets.

make study-noise        # writes docs/study/label_noise.json and .png; continues where it was stopped

Three annotators with different error rates judge every pair; the level is their mean error rate. The reward model is a
LoRA on stories260K. The completion with more words "happy" is better, and the held-out pairs have no noise. `single`
trains on one vote per pair, `split` on the mean of the three votes, and `reliability` on the posterior of Dawid and
Skene from the same three votes.
"""

import json
import os
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory

import numpy as np
from datasets import Dataset
from peft import LoraConfig

from hf_rlhf_ext import BradleyTerryConfig, BradleyTerryTrainer
from hf_rlhf_ext.quality.refine import weigh_by_reliability

SHARED = Path(os.environ.get("RLHF_SHARED", "../shared"))
OUT = Path("docs/study/label_noise.json")
LEVELS, METHODS, SEEDS = (0.0, 0.1, 0.2, 0.3, 0.4), ("single", "split", "reliability"), (0, 1, 2)
CARE = (0.25, 1.0, 1.75)
"""Error rate of each annotator as a multiple of the level."""
WORDS = ["dog", "cat", "park", "ball", "sad", "big", "red", "tree", "play", "run"]


def judged_pairs(n: int, level: float, method: str, seed: int) -> Dataset:
    """Pairs of random story words with noisy votes. The completion with more words "happy" is better."""
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(n):
        counts = rng.permutation(4)[:2]
        texts = []
        for count in counts:
            words = [*rng.choice(WORDS, rng.integers(4, 9) - count), *["happy"] * int(count)]
            texts.append(" " + " ".join(rng.permutation(words)))
        better = bool(counts[0] > counts[1])
        labels = [float(better != (rng.random() < min(care * level, 1.0))) for care in CARE]
        votes = [{"annotator": f"annotator{a}", "pair": [0, 1], "label": label} for a, label in enumerate(labels)]
        target = labels[rng.integers(3)] if method == "single" else fmean(labels)
        row = {"prompt": "Once upon a time", "completions": texts, "pairs": [[0, 1]], "targets": [target]}
        rows.append(row | {"votes": votes, "row": k})
    data = Dataset.from_list(rows)
    return weigh_by_reliability(data)[0] if method == "reliability" else data


def accuracy(level: float, method: str, seed: int) -> float:
    """Accuracy on held-out pairs without noise, after training on noisy labels."""
    train = judged_pairs(384, level, method, seed).remove_columns("votes")
    heldout = judged_pairs(300, 0.0, "split", 1000 + seed).remove_columns("votes")
    with TemporaryDirectory() as folder:
        args = BradleyTerryConfig(
            folder,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            report_to="none",
            save_strategy="no",
            per_device_train_batch_size=16,
            num_train_epochs=4,
            learning_rate=5e-3,
            disable_tqdm=True,
            logging_strategy="no",
            seed=seed,
            model_init_kwargs={"dtype": "float32"},
        )
        trainer = BradleyTerryTrainer(
            str(SHARED / "models" / "stories260K"),
            args,
            train,
            heldout,
            peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"),
        )
        trainer.train()
        return trainer.evaluate()["eval_accuracy"]


def plot(results: dict[str, float], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for method, mark in zip(METHODS, "os^", strict=True):
        values = [[results[f"{level}|{method}|{seed}"] for seed in SEEDS] for level in LEVELS]
        means = [fmean(v) for v in values]
        axes.errorbar(LEVELS, means, [stdev(v) for v in values], marker=mark, capsize=3, label=method)
    axes.set_xlabel("mean share of flipped votes")
    axes.set_ylabel("accuracy on held-out pairs without noise")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    OUT.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(OUT.read_text())["accuracy"] if OUT.is_file() else {}
    for level in LEVELS:
        for method in METHODS:
            for seed in SEEDS:
                key = f"{level}|{method}|{seed}"
                if key not in results:
                    results[key] = accuracy(level, method, seed)
                    print(f"{key}: {results[key]:.3f}", flush=True)
                    OUT.write_text(json.dumps({"command": "make study-noise", "accuracy": results}, indent=1) + "\n")
    plot(results, OUT.with_suffix(".png"))
    print("| flipped votes | " + " | ".join(METHODS) + " |\n|---|---|---|---|")
    for level in LEVELS:
        cells = []
        for method in METHODS:
            values = [results[f"{level}|{method}|{seed}"] for seed in SEEDS]
            cells.append(f"{fmean(values):.3f} ± {stdev(values):.3f}")
        print(f"| {level:.0%} | " + " | ".join(cells) + " |")
    print(json.dumps({"runs": len(results)}))


if __name__ == "__main__":
    main()
