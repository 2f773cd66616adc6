"""How a prompt and a completion become tokens: one convention for training, scoring and rollouts.

A prompt is a string, or a list of messages that goes through the tokenizer's chat template with the generation prompt.
A completion is a string or a list of messages, is tokenised on its own (as a policy emits it: after the prompt's last
token) and ends with exactly one stop token, `tokenizer.eos_token_id`.
"""

import json
from typing import Any

from ..errors import UserError

Messages = list[dict[str, Any]]


def is_messages(value: Any) -> bool:
    """True for a non-empty list of `{"role": …, "content": …}` mappings; content is text, a list of parts, or None."""
    return isinstance(value, list) and len(value) > 0 and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    fits = isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value
    return fits and isinstance(value["content"], str | list | None)


def is_text(value: Any) -> bool:
    """True for a string and for messages."""
    return isinstance(value, str) or is_messages(value)


def text_key(value: str | Messages) -> str:
    """What two texts (or conversations) must share to count as the same: everything but the amount of white space."""
    if isinstance(value, str):
        return " ".join(value.split())
    plain = [
        {name: entry for name, entry in m.items() if entry is not None}  # None is what Arrow fills gaps with
        | {"content": " ".join(str(m.get("content") or "").split())}
        for m in value
    ]
    return json.dumps(plain, sort_keys=True, default=str)


def plain_text(value: str | Messages) -> str:
    """What a person reads: the string, or the contents of the messages, a line apart."""
    return value if isinstance(value, str) else "\n".join(str(m.get("content") or "") for m in value)


def check_tokenizer(tokenizer, *, needs_chat_template: bool) -> None:
    """Raises `UserError` for a tokenizer without a stop token, a pad token, or (if asked) a chat template."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name!r} has no eos token: set `tokenizer.eos_token` to the model's stop token.")
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"tokenizer {name!r} has no pad token: set `tokenizer.pad_token` to an unused token "
            "(`tokenizer.pad_token = tokenizer.eos_token` works too: padding is found by length here)."
        )
    if needs_chat_template and tokenizer.chat_template is None:
        raise UserError(
            f"the prompts are messages, but tokenizer {name!r} has no chat template: set `tokenizer.chat_template`, "
            "use an instruction-tuned model, or give prompts and completions as plain text."
        )


def render_prompt(tokenizer, prompt: str | Messages) -> str:
    """The text that the policy continues: the prompt itself, or its chat template with the generation prompt."""
    if isinstance(prompt, str):
        return prompt
    check_tokenizer(tokenizer, needs_chat_template=True)
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def encode_prompt(tokenizer, prompt: str | Messages) -> list[int]:
    """Token ids of a prompt; special tokens are added to plain text only (a chat template writes its own)."""
    if not isinstance(prompt, str):
        return tokenizer(render_prompt(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt)["input_ids"]
    # T5's tokenizer closes every text with a stop token, which a prompt must not have; an encoder's separator stays.
    closed = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and tokenizer.sep_token_id is None
    return ids[:-1] if closed else ids


def completion_text(tokenizer, prompt: str | Messages, completion: str | Messages) -> str:
    """The completion as the policy would write it, without the final stop token.

    One assistant message is its content. Several messages (tool calls, further turns) are what the chat template puts
    after the rendered prompt, up to the last stop token.
    """
    if isinstance(completion, str):
        return completion
    if len(completion) == 1 and isinstance(completion[0].get("content"), str) and not completion[0].get("tool_calls"):
        return completion[0]["content"]
    before = render_prompt(tokenizer, prompt)
    whole = tokenizer.apply_chat_template(list(prompt) + list(completion), tokenize=False)
    if not whole.startswith(before):
        raise UserError("the chat template renders this prompt differently once a completion follows: pass plain text.")
    return whole[len(before) :].rsplit(tokenizer.eos_token, 1)[0]


def encode_completion(tokenizer, prompt: str | Messages, completion: str | Messages) -> list[int]:
    """Token ids of a completion, exactly one stop token last (an empty completion is that token alone)."""
    text = completion_text(tokenizer, prompt, completion).removesuffix(tokenizer.eos_token)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return ids + [tokenizer.eos_token_id]


def decode_completion(tokenizer, ids: list[int]) -> str:
    """Text of emitted tokens without special tokens: what reward functions and people read."""
    return tokenizer.decode(ids, skip_special_tokens=True)
