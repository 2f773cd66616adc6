"""Results of seeds with known true values, in the form of `results.json`."""

import random
from itertools import combinations
from typing import Any

SYSTEMS = {
    # name: kind, n, true gain over SFT, KL, seconds of its own
    "base": ("base", 1, -0.5, 6.0, 0.0),
    "sft": ("sft", 1, 0.0, 0.0, 60.0),
    "sft_top_rated": ("sft", 1, 0.15, 2.0, 40.0),
    "best_of_4": ("best_of_n", 4, 0.35, 0.64, 0.0),
    "best_of_16": ("best_of_n", 16, 0.6, 1.84, 0.0),
    "rejection_sampling": ("rejection_sampling", 1, 0.3, 1.1, 200.0),
    "dpo": ("dpo", 1, 0.4, 4.0, 240.0),
    "grpo": ("grpo", 1, 0.65, 5.0, 600.0),
    "rloo": ("rloo", 1, 0.55, 4.5, 610.0),
    "ppo": ("ppo", 1, 0.5, 5.2, 700.0),
    "ppo_ptx": ("ppo", 1, 0.45, 4.8, 760.0),
}
CATEGORIES = ("advice", "story", "list")
NEEDS_REWARD = ("best_of_n", "rejection_sampling", "grpo", "rloo", "ppo")


def simulated_results(
    seed: int, n: int = 60, systems: tuple[str, ...] = tuple(SYSTEMS), *, failed: dict[str, str] | None = None
) -> dict[str, Any]:
    """A seed's results: gold is the true gain, plus what a prompt, a seed and an answer add."""
    draw = random.Random(seed)
    of_prompts = [random.Random(f"prompt {k}").gauss(0, 0.3) for k in range(n)]
    entries: dict[str, Any] = {}
    for name in systems:
        entries[name] = entry_of(name, of_prompts, draw)
    for name, reason in (failed or {}).items():
        entries[name] = {"status": "failed", "error": reason, "kind": "rloo"}
    working = [name for name in entries if entries[name]["status"] == "ok"]
    outcomes = {}
    for first, second in combinations(working, 2):
        pairs = zip(entries[first]["gold"]["gold"], entries[second]["gold"]["gold"], strict=True)
        outcomes[f"{first}|{second}"] = [0.5 if abs(a - b) < 0.05 else float(a > b) for a, b in pairs]
    return {
        "seed": seed,
        "clock": "cpu",
        "prompts": n,
        "prompt_ids": [f"prompt {k}" for k in range(n)],
        "leaks": {"train": 400, "heldout_left_out": 2, "examples": []},
        "reference": "sft",
        "reward_model": {"accuracy": 0.68, "accuracy_ci95": [0.6, 0.75], "pairs": 400, "scale": 1.4},
        "systems": entries,
        "categories": [CATEGORIES[k % len(CATEGORIES)] for k in range(n)],
        "outcomes": {"gold": outcomes},
        "coverage": {"gold": {"judged": n * len(working), "failed": 0}},
    }


def entry_of(name: str, of_prompts: list[float], draw: random.Random) -> dict[str, Any]:
    """The entry of a system that works."""
    kind, n, gain, kl, own = SYSTEMS[name]
    before = 60.0 * (kind not in ("base", "sft")) + 90.0 * (kind in NEEDS_REWARD)
    measured = measured_of(gain + draw.gauss(0, 0.03), kl, of_prompts, draw)
    snapshots = []
    if kind in ("dpo", "grpo", "rloo", "ppo"):
        for step in (1, 2, 3):
            share = step / 4
            snapshot = measured_of(gain * share**0.6, kl * share, of_prompts, draw)
            snapshots.append({"step": 10 * step, "own": clock(own * share)} | snapshot)
    return measured | {
        "status": "ok",
        "error": None,
        "kind": kind,
        "n": n,
        "labels": {"demonstrations": 400 * (name != "base"), "judgments": 400 * (kind in (*NEEDS_REWARD, "dpo"))},
        "settings": {},
        "rule": "train.jsonl, rows rated 7" if name == "sft_top_rated" else None,
        "needs": [],
        "own": clock(own),
        "total": clock(own + before),
        "completions": 4096 * (kind in ("grpo", "rloo", "ppo")),
        "snapshots": snapshots,
        "texts": {"distinct_2": 0.6, "repetition": 0.03, "refusal_rate": 0.01},
        "alignment_tax": None
        if kind == "best_of_n"
        else {
            "perplexity": {"nats_per_token": 2.0 + 0.02 * kl, "perplexity": 7.4 + 0.1 * kl},
            "exact_match": {"accuracy": 0.6, "right": 18, "n": 30, "wilson": [0.42, 0.75]},
        },
    }


def measured_of(gain: float, kl: float, of_prompts: list[float], draw: random.Random) -> dict[str, Any]:
    """Values of each prompt."""
    gold = [gain + of_prompt + draw.gauss(0, 0.25) for of_prompt in of_prompts]
    return {
        "kl": [kl + draw.gauss(0, 0.5) * (kl > 0) for _ in gold],
        "length": [draw.randint(20, 40) for _ in gold],
        "proxy": [0.6 * value + draw.gauss(0, 0.4) for value in gold],
        "gold": {"gold": gold},
    }


def clock(seconds: float) -> dict[str, float]:
    """A time on both clocks."""
    return {"seconds": 1.3 * seconds, "cpu_seconds": seconds}
