"""Commands that a recipe proposes at its end, for the models that it trained."""

import shlex
from pathlib import Path

from .program import how_to_run


def use_of(folder: str | Path, *, talks: bool = True) -> list[str]:
    """The commands that use a trained model, one line each.

    Args:
        folder: folder of the model, or of a whole run.
        talks: whether it answers; a reward model does not.
    """
    quoted = shlex.quote(str(folder))
    lines = []
    if talks:
        lines.append(f"  {how_to_run('chat')} {quoted}   (talk to it)")
    if not (Path(folder) / "config.json").is_file():  # a whole model is plain already
        lines.append(f"  {how_to_run('merge')} {quoted}   (one plain model, for Transformers without this library)")
    return lines
