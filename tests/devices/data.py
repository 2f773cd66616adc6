"""Rows and reward functions of the runs in this folder."""

import numpy as np
from datasets import Dataset

PROMPTS = ["Tell me", "a sunny day", "fox", "The quick brown fox jumps over", "words, many", "happy or sad?"]
WORDS = ["sunny", "garden", "happy", "lazy dog", "fox jumps", "words", "day", "quick brown"]


def comparisons(n: int, *, seed: int = 0, completions: int | None = None) -> Dataset:
    """Comparisons of 2 to 4 completions, with soft targets, margins and weights."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        size = completions or int(rng.integers(2, 5))
        pairs = [[i, j] for i in range(size) for j in range(i + 1, size)]
        row = {"prompt": f"Tell {rng.choice(WORDS)}:", "pairs": pairs}
        row["completions"] = [" ".join(rng.choice(WORDS, rng.integers(1, 5))) + f" {m}" for m in range(size)]
        row["targets"] = rng.choice([0.0, 0.5, 0.8, 1.0], len(pairs)).tolist()
        row["weights"] = rng.uniform(0.2, 2, len(pairs)).tolist()
        row["margins"] = rng.normal(0, 0.3, len(pairs)).tolist()
        rows.append(row)
    return Dataset.from_list(rows)


def rankings(n: int) -> Dataset:
    """Fully ranked triples, for `ranking_loss="plackett_luce"`."""
    rows = []
    for k in range(n):
        texts = [f"{WORDS[(k + m) % len(WORDS)]} {m}" for m in range(3)]
        rows.append({"prompt": "Tell:", "completions": texts, "pairs": [[0, 1], [0, 2], [1, 2]]})
        rows[-1] |= {"targets": [1.0, 0.0, 0.0], "weights": [1.0] * 3}
    return Dataset.from_list(rows)


def letters(completions, **columns):
    return [text.count("e") - 0.2 * len(text) for text in completions]


def per_token(completion_ids, **columns):
    return [[(token % 7) / 7 for token in ids] for ids in completion_ids]
