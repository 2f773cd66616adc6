"""The roles of speakers: one table for every reader, in which upper and lower case make no difference."""

import re
from typing import Any

from .schema import Unusable

SPEAKERS = {
    # who asks
    "user": "user", "human": "user", "prompter": "user", "prompt": "user", "usr": "user", "question": "user",
    "query": "user", "instruction": "user", "customer": "user", "student": "user",
    # who answers
    "assistant": "assistant", "gpt": "assistant", "gpt_3.5": "assistant", "gpt_4": "assistant",
    "gpt_4o": "assistant", "chatgpt": "assistant", "chatbot": "assistant", "bot": "assistant", "ai": "assistant",
    "model": "assistant", "llm": "assistant", "bing": "assistant", "bard": "assistant", "claude": "assistant",
    "gemini": "assistant", "llama": "assistant", "answer": "assistant", "response": "assistant",
    "output": "assistant", "completion": "assistant", "tutor": "assistant",
    # an answer that is a call of a function
    "function_call": "assistant", "function_calls": "assistant", "tool_call": "assistant", "tool_calls": "assistant",
    # who gives directions
    "system": "system", "sys": "system", "developer": "system", "system_prompt": "system",
    # what a function returned
    "tool": "tool", "function": "tool", "observation": "tool", "observations": "tool", "ipython": "tool",
    "function_response": "tool", "function_result": "tool", "function_output": "tool", "function_return": "tool",
    "tool_response": "tool", "tool_responses": "tool", "tool_result": "tool", "tool_results": "tool",
    "tool_output": "tool", "tool_return": "tool", "environment": "tool", "environments": "tool",
}  # fmt: skip
"""Name of the speaker in ShareGPT, Vicuna, OASST, LLaMA-Factory, ms-swift, OpenAI and Llama -> role of the message."""


def _key(speaker: str) -> str:
    """Writes `Function-Call`, `function call` and `functionCall` alike."""
    return re.sub(r"[\W_]+", "", speaker.lower())


_ROLE_OF_KEY = {_key(name): role for name, role in SPEAKERS.items()}


def role_of(speaker: Any) -> str | None:
    """Returns the role of a speaker: user, assistant, system or tool. None for a speaker that is not in the table."""
    if not isinstance(speaker, str):
        return None
    # Most speakers are written as in the table.
    return SPEAKERS.get(speaker) or _ROLE_OF_KEY.get(_key(speaker))


def required_role(speaker: Any, column: str) -> str:
    """Returns the role of a speaker. Raises `Unusable`, with the name of the speaker, if it is not in the table."""
    role = role_of(speaker)
    if role is not None:
        return role
    if not isinstance(speaker, str):
        raise Unusable(f"{column} has a turn without a known speaker and text")
    raise Unusable(f"{column} has the unknown speaker {_shortened(speaker)!r}")


def _shortened(speaker: str) -> str:
    return speaker if len(speaker) <= 30 else f"{speaker[:29]}…"
