"""Finds the end of the prompt when both sides of a preference are whole conversations."""

import re
from os.path import commonprefix

from .text import Messages, make_message

Split = tuple[Messages | None, Messages | None, Messages | None]
"""Prompt, chosen and rejected. All are None if there is no common prompt."""

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
    """Splits two transcripts at the last Assistant turn that begins within their common text.

    If a reply contains "Assistant:", it is kept as part of the reply. If a reply contains another "Human:" turn, the
    conversations differ before their last turn, and the row is flagged `histories_differ`.

    Returns:
        (prompt, chosen, rejected, flags), as messages with stripped text. The prompt is None if the transcripts share
            no Assistant turn.
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
    """Reads the turns of an HH-RLHF transcript. Adjacent turns of one role are joined, since roles must alternate."""
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
    """Returns (prompt, chosen, rejected): the longest common prefix of messages and the rest, or None without one."""
    # The last message of the shorter side is its answer, even if the other side continues with more messages.
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
    """Splits two texts where they begin to differ. A space before that point belongs to the completions.

    Same as `trl.extract_prompt`, except that TRL compares the last character with a space if the first characters
    differ.

    Returns:
        (prompt, chosen, rejected).
    """
    cut = len(commonprefix([chosen, rejected]))
    shorter = min(len(chosen), len(rejected))
    if cut == shorter:
        cut = max(cut - 1, 0)  # one text continues the other: like TRL, leave neither completion empty
    elif cut > 0 and chosen[cut - 1] == " ":
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]
