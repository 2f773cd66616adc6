"""Finds the end of the prompt when both sides of a preference are whole conversations: messages or transcripts."""

import re
from dataclasses import dataclass
from os.path import commonprefix

from .speakers import required_role, role_of
from .text import Messages, make_message

Split = tuple[Messages | None, Messages | None, Messages | None]
"""Prompt, chosen and rejected. All are None if there is no common prompt."""

_ASSISTANT = "\n\nAssistant:"
_HUMAN = "\n\nHuman:"
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


# --- HH-RLHF ---------------------------------------------------------------------------------------------------------


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


# --- texts with the marks of a chat template -------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """How a text marks its turns.

    Attributes:
        needle: Text that every transcript of this style contains. It is found faster than the marks.
        mark: Pattern of what stands before a turn. Its group is the speaker.
        ends: Tokens that may end a turn or begin the text, which are taken off.
        preamble: Whether text before the first turn is allowed. It becomes the system message.
    """

    needle: str
    mark: re.Pattern[str]
    ends: tuple[str, ...] = ()
    preamble: bool = False

    @property
    def is_template(self) -> bool:
        """Whether the marks are tokens of a chat template, which no person writes."""
        return not self.preamble and not self.needle.endswith(":")

    def role_of(self, speaker: str) -> str | None:
        return _INSTRUCTION_MARKS.get(speaker) or role_of(speaker)


_INSTRUCTION_MARKS = {"[INST]": "user", "[/INST]": "assistant"}
_ENDS = ("<s>", "</s>", "<bos>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>")

STYLES = (
    # ChatML: Qwen and many others
    Style("<|im_start|>", re.compile(r"<\|im_start\|>\s*(\w+)\s*?\n?"), ("<|im_end|>", *_ENDS)),
    Style(
        "<|start_header_id|>",
        re.compile(r"<\|start_header_id\|>\s*([\w ]+?)\s*<\|end_header_id\|>(?:\n\n)?"),
        ("<|eot_id|>", "<|eom_id|>", *_ENDS),
    ),
    Style("<start_of_turn>", re.compile(r"<start_of_turn>\s*(\w+)\s*?\n?"), ("<end_of_turn>", *_ENDS)),
    Style("[/INST]", re.compile(r"(\[/?INST\])"), _ENDS),
    # OpenAssistant, Zephyr, Phi-3, TULU
    Style(
        "|>",
        re.compile(r"<\|(prompter|user|human|assistant|system|tool|observation)\|>\n?", re.IGNORECASE),
        ("<|end|>", "<|endofprompt|>", "<|im_end|>", *_ENDS),
    ),
    # Guanaco, Alpaca
    Style(
        "###",
        re.compile(r"###\s*(Human|User|Instruction|Question|Assistant|Response|Answer|System)\s*:\n?", re.IGNORECASE),
        _ENDS,
        preamble=True,
    ),
    # Glaive, Vicuna
    Style(
        "ASSISTANT:",
        re.compile(r"(?:^|(?<=\s)|(?<=</s>))(USER|HUMAN|ASSISTANT|SYSTEM|FUNCTION RESPONSE):"),
        _ENDS,
        preamble=True,
    ),
    Style("\nAssistant:", re.compile(r"(?:^|(?<=\n))(User|Human|Prompter|Assistant|System):"), _ENDS),
)
"""Ways to mark turns, in the order in which they are tried."""

_LLAMA_2_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)


def style_of(text: str) -> Style | None:
    """Returns how the text marks its turns, or None if it is no transcript that begins with the user or the system."""
    for style in STYLES:
        if style.needle not in text:
            continue
        first = style.mark.search(text)
        if first is None:
            continue
        before = _without_ends(text[: first.start()], style)
        if before and not style.preamble:
            continue
        roles = [style.role_of(mark.group(1)) for mark in style.mark.finditer(text)]
        is_conversation = roles[0] in ("user", "system") and "user" in roles and "assistant" in roles
        if is_conversation:
            return style
    return None


def is_marked(text: str) -> bool:
    """True for a transcript: HH-RLHF's, or a text with the marks of a chat template."""
    return is_transcript(text) or style_of(text) is not None


def read_marked(text: str, style: Style) -> Messages:
    """Reads the turns of a text with marks, without the tokens that end a turn."""
    parts = style.mark.split(text)  # [before, speaker, words, speaker, words, …]
    turns: Messages = []
    before = _without_ends(parts[0], style)
    if before:
        turns.append(make_message("system", before))
    for speaker, words in zip(parts[1::2], parts[2::2], strict=True):
        role = style.role_of(speaker) or required_role(speaker, "the transcript")
        words = _without_ends(words, style)
        if speaker == "[INST]" and not turns:
            words = _take_out_system(words, turns)
        turns.append(make_message(role, words))
    return turns


def _take_out_system(words: str, turns: Messages) -> str:
    """Llama 2 writes the system text into the first question. It becomes a message of its own."""
    system = _LLAMA_2_SYSTEM.match(words)
    if system is None:
        return words
    turns.append(make_message("system", system.group(1).strip()))
    return words[system.end() :].strip()


def _without_ends(text: str, style: Style) -> str:
    """Takes white space and the tokens of the style off both ends of a text."""
    text = text.strip()
    changed = True
    while changed:
        changed = False
        for token in style.ends:
            if text.startswith(token) or text.endswith(token):
                text = text.removeprefix(token).removesuffix(token).strip()
                changed = True
    return text


def split_marked(
    chosen: str, rejected: str
) -> tuple[str | Messages | None, str | Messages | None, str | Messages | None, list[str]]:
    """Splits two texts with the same marks at the last turn of the assistant that begins within their common text.

    HH-RLHF transcripts become messages. Other texts stay text, since their marks are those of a model's template: the
    prompt ends with the mark of the assistant.

    Returns:
        (prompt, chosen, rejected, flags). The prompt is None if the marks differ, or if the texts share no turn of the
            assistant. A row whose answers go on with other turns is flagged `histories_differ`.
    """
    if is_transcript(chosen) and is_transcript(rejected):
        return split_at_common_history(chosen, rejected)
    style = style_of(chosen)
    if style is None or style != style_of(rejected):
        return None, None, None, []
    common = commonprefix([chosen, rejected])
    cut = None
    for mark in style.mark.finditer(chosen):
        end = mark.start() + len(mark.group().rstrip())
        if end <= len(common) and style.role_of(mark.group(1)) == "assistant":
            cut = min(mark.end(), len(common))  # the line break after a mark belongs to it, if both texts have it
    if cut is None:
        return None, None, None, []
    answers = (chosen[cut:], rejected[cut:])
    flags = ["histories_differ"] if any(map(style.mark.search, answers)) else []
    return chosen[:cut], *answers, flags


# --- messages --------------------------------------------------------------------------------------------------------


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
