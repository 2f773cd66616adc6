"""The files of the small form of a comparison, for CI: rows of the quickstart, written in a second without a model."""

import random
from pathlib import Path

from compare_worlds.smollm2 import with_system
from hf_rlhf_ext.collect.simulated import SimulatedAnnotator
from hf_rlhf_ext.collect.tasks import write_rows
from hf_rlhf_ext.recipes.quickstart import SYSTEM
from hf_rlhf_ext.recipes.quickstart_parts.data import make_demonstrations, make_prompts
from hf_rlhf_ext.study.cloze import default_items

CONFIG = "smollm2-135m/compare_small.yaml"
FOLDER = Path("runs/compare_small")
DEMONSTRATIONS, JUDGED, PROMPTS, HELDOUT, ITEMS = 32, 24, 16, 12, 4


def make_files(folder: Path) -> None:
    """Demonstrations, comparisons of an answer with that of another prompt, prompts, and a few exact-match items."""
    rows = make_demonstrations(DEMONSTRATIONS, 0)
    write_rows([row | {"prompt": [SYSTEM, *row["prompt"]]} for row in rows], folder / "demonstrations.jsonl")
    rng = random.Random(0)
    to_judge = []
    for row in make_demonstrations(JUDGED, 1):
        other = rng.choice(rows)
        completions = [row["completion"], other["completion"]]
        to_judge.append({"prompt": [SYSTEM, *row["prompt"]], "completions": completions, "category": row["category"]})
    write_rows(SimulatedAnnotator(noise=0.1).judge(to_judge).rows, folder / "comparisons.jsonl")
    write_rows(with_system(make_prompts(PROMPTS)), folder / "prompts.jsonl")
    write_rows(with_system(make_prompts(HELDOUT, split="heldout")), folder / "heldout.jsonl")
    items = [{"prompt": item.prompt, "answers": list(item.answers)} for item in default_items()[:ITEMS]]
    write_rows(items, folder / "items.jsonl")
