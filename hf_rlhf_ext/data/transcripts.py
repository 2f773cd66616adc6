"""Where the prompt ends when both sides of a preference are whole conversations."""

import re
from os.path import commonprefix
from typing import Any

_ASSISTANT = "\n\nAssistant:"
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}

Messages = list[dict[str, Any]]


def is_transcript(text: str) -> bool:
    r"""True for an HH-RLHF transcript, "\n\nHuman: …\n\nAssistant: …" (Bai et al. 2022, arXiv:2204.05862)."""
    return text.lstrip().startswith("Human:") and _ASSISTANT in text


def split_at_common_history(
    chosen: str, rejected: str
) -> tuple[Messages | None, Messages | None, Messages | None, list[str]]:
    """Splits two transcripts at the last Assistant turn that opens within their common text.

    Returns (prompt, chosen, rejected, flags) as messages, text stripped; prompt None where no Assistant turn is shared.
    A reply that itself contains "Assistant:" keeps it. A reply that contains a further "Human:" turn is flagged
    `histories_differ`: the two conversations parted before their last turn.
    """
    cut = commonprefix([chosen, rejected]).rfind(_ASSISTANT)
    if cut < 0:
        return None, None, None, []
    replies = [text[cut + len(_ASSISTANT) :] for text in (chosen, rejected)]
    flags = ["histories_differ"] if any("\n\nHuman:" in reply for reply in replies) else []
    messages = [[{"role": "assistant", "content": reply.strip()}] for reply in replies]
    return read_transcript(chosen[:cut].strip()), *messages, flags


def read_transcript(text: str) -> Messages:
    """Turns of an HH-RLHF transcript; neighbours of one role are joined, as chat templates want roles to alternate."""
    parts = _TURN.split(text)[1:]  # [speaker, words, speaker, words, …]
    turns: Messages = []
    for speaker, words in zip(parts[::2], parts[1::2], strict=True):
        role, words = _ROLES[speaker], words.strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{words}"
        else:
            turns.append({"role": role, "content": words})
    return turns


def split_messages(chosen: Messages, rejected: Messages) -> tuple[Messages | None, Messages | None, Messages | None]:
    """(prompt, chosen, rejected): the longest common run of messages, and what follows; prompt None if it is empty."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return (chosen[:shared], chosen[shared:], rejected[shared:]) if shared else (None, None, None)


def split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) where two texts begin to differ, a space before that point left to the completions.

    As `trl.extract_prompt`, which takes the last character for that space when the very first ones differ.
    """
    cut = len(commonprefix([chosen, rejected]))
    if cut == min(len(chosen), len(rejected)):
        cut = max(cut - 1, 0)  # one continues the other: TRL leaves neither completion empty
    elif cut and chosen[cut - 1] == " ":
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]
