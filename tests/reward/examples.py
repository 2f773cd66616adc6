"""Comparison rows and independent scores for the tests of this folder."""

import numpy as np
import torch
from datasets import Dataset

WORDS = ["sunny", "garden", "happy", "lazy dog", "fox jumps", "words", "day", "quick brown"]


def comparisons(n, *, seed=0, k=None):
    """Comparisons of 2 to 4 completions with soft targets, margins and different weights."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        size = k or int(rng.integers(2, 5))
        texts = [" ".join(rng.choice(WORDS, rng.integers(1, 5))) + f" {m}" for m in range(size)]
        pairs = [[i, j] for i in range(size) for j in range(i + 1, size)]
        row = {"prompt": f"Tell {rng.choice(WORDS)}:", "completions": texts, "pairs": pairs}
        row["targets"] = rng.choice([0.0, 0.5, 0.8, 1.0], len(pairs)).tolist()
        row["weights"] = rng.uniform(0.2, 2, len(pairs)).tolist()
        row["margins"] = rng.normal(0, 0.3, len(pairs)).tolist()
        rows.append(row)
    return Dataset.from_list(rows)


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def independent_scores(model, tokenizer, row):
    """Scores each completion by itself, without padding: the head at the last position of the backbone."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    scores = []
    for text in row["completions"]:
        ids = tokenizer(row["prompt"])["input_ids"] + tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            hidden = base.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            scores.append(base.score(hidden).item())
    return scores
