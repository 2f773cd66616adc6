"""Answers of all systems to the same prompts, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_rlhf_ext.data.text import plain_text
from hf_rlhf_ext.recipes.rounds_parts.data import read_rows

SHOWN = 4
"""Number of prompts that the report shows."""
MAX_CHARACTERS = 2_000
"""Characters of a text that the report shows."""


def side_by_side(folder: Path, seed: int, names: Sequence[str], n: int = SHOWN) -> list[dict[str, Any]]:
    """The first held-out prompts, not selected, with the answer of each system.

    Args:
        folder: folder of the run.
        seed: whose answers.
        names: the systems; one without answers in this seed is left out.
        n: number of prompts.

    Returns:
        Mappings of `prompt`, `category` and `answers`: pairs of a system's name and its answer.
    """
    shown: list[dict[str, Any]] = []
    for name in names:
        path = folder / f"seed-{seed}" / "completions" / f"{name}.jsonl"
        if not path.is_file():
            continue
        for number, row in enumerate(read_rows(path)[:n]):
            if number == len(shown):
                prompt = shortened(as_read(row["prompt"]))
                shown.append({"prompt": prompt, "category": row.get("category"), "answers": []})
            shown[number]["answers"].append((name, shortened(plain_text(row["completion"]))))
    return shown


def shortened(text: str) -> str:
    """A text, cut where it is longer than the report shows."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} … ({len(text):,} characters in all)"


def as_read(prompt: Any) -> str:
    """A prompt as text; with roles where it has several messages."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return plain_text(prompt)
    return "\n".join(f"{message['role']}: {plain_text([message])}" for message in prompt)
