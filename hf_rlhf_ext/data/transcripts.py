"""Where the prompt ends when both sides of a preference are whole conversations."""

import re
from os.path import commonprefix

from .text import Messages, make_message

Split = tuple[Messages | None, Messages | None, Messages | None]
"""Prompt, chosen, rejected; all None without a common prompt."""

_ASSISTANT = "\n\nAssistant:"
_HUMAN = "\n\nHuman:"
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


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
    common = commonprefix([chosen, rejected])
    cut = common.rfind(_ASSISTANT)
    if cut < 0:
        return None, None, None, []
    start = cut + len(_ASSISTANT)
    chosen_reply = chosen[start:]
    rejected_reply = rejected[start:]
    flags = []
    if _HUMAN in chosen_reply or _HUMAN in rejected_reply:
        flags.append("histories_differ")
    prompt = read_transcript(chosen[:cut].strip())
    return prompt, _as_answer(chosen_reply), _as_answer(rejected_reply), flags


def _as_answer(text: str) -> Messages:
    return [make_message("assistant", text.strip())]


def read_transcript(text: str) -> Messages:
    """Turns of an HH-RLHF transcript; neighbors of one role are joined, as chat templates want roles to alternate."""
    parts = _TURN.split(text)[1:]  # [speaker, words, speaker, words, …]
    speakers = parts[::2]
    turns: Messages = []
    for speaker, words in zip(speakers, parts[1::2], strict=True):
        message = make_message(_ROLES[speaker], words.strip())
        last = turns[-1] if turns else None
        if last and last["role"] == message["role"]:
            last["content"] += f"\n\n{message['content']}"
        else:
            turns.append(message)
    return turns


def split_messages(chosen: Messages, rejected: Messages) -> Split:
    """(prompt, chosen, rejected): the longest common run of messages, and what follows; prompt None if it is empty."""
    # The last message of the shorter side is its answer, even where the other side goes on with more.
    longest = min(len(chosen), len(rejected)) - 1
    shared = 0
    for ours, theirs in zip(chosen[:longest], rejected[:longest], strict=True):
        if ours != theirs:
            break
        shared += 1
    if shared == 0:
        return None, None, None
    return chosen[:shared], chosen[shared:], rejected[shared:]


def split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) where two texts begin to differ, a space before that point left to the completions.

    As `trl.extract_prompt`, which takes the last character for that space when the very first ones differ.
    """
    cut = len(commonprefix([chosen, rejected]))
    shorter = min(len(chosen), len(rejected))
    if cut == shorter:
        cut = max(cut - 1, 0)  # one continues the other: TRL leaves neither completion empty
    elif cut > 0 and chosen[cut - 1] == " ":
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]
