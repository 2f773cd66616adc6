"""Gold rewards of the worlds, as reward functions of prompts and completions."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `story_world`, when this file is loaded by its path

from story_world import gold_of_text

from hf_rlhf_ext.data.text import plain_text


def stories(prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
    """Joy, minus repetition, minus sentences that do not end: see `story_world.gold_of_text`."""
    return [gold_of_text(plain_text(completion)) for completion in completions]
