"""How a prompt and a completion become tokens: one convention for training, scoring and rollouts.

A prompt is a string, or a list of messages that goes through the tokenizer's chat template with the generation prompt.
A completion is a string or a list of messages, is tokenized on its own (as a policy emits it: after the prompt's last
token) and ends with exactly one stop token, `tokenizer.eos_token_id`.
"""

import json
from typing import Any

from ..errors import UserError

Messages = list[dict[str, Any]]


def is_messages(value: Any) -> bool:
    """True for a non-empty list of `{"role": …, "content": …}` mappings; content is text, a list of parts, or None."""
    if not isinstance(value, list) or not value:
        return False
    return all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or "content" not in value:
        return False
    role = value.get("role")
    return isinstance(role, str) and isinstance(value["content"], str | list | None)


def make_message(role: str, content: str) -> dict[str, Any]:
    """A chat message of text alone."""
    return {"role": role, "content": content}


def is_text(value: Any) -> bool:
    """True for a string and for messages."""
    return isinstance(value, str) or is_messages(value)


def text_key(value: str | Messages) -> str:
    """What two texts (or conversations) must share to count as the same: everything but the amount of white space."""
    if isinstance(value, str):
        return " ".join(value.split())
    messages = []
    for message in value:
        # None is what Arrow fills gaps with: a message without the field is the same.
        fields = {name: value for name, value in message.items() if value is not None}
        words = _content(message).split()
        fields["content"] = " ".join(words)
        messages.append(fields)
    return json.dumps(messages, sort_keys=True, default=str)


def plain_text(value: str | Messages) -> str:
    """What a person reads: the string, or the contents of the messages, a line apart."""
    if isinstance(value, str):
        return value
    return "\n".join(map(_content, value))


def _content(message: dict[str, Any]) -> str:
    return str(message.get("content") or "")


def check_tokenizer(tokenizer, *, needs_chat_template: bool) -> None:
    """Raises `UserError` for a tokenizer without a stop token, a pad token, or (if asked) a chat template."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    # Without a stop token no completion ends, and no reward is read at its end.
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
    # With the generation prompt: the policy's first token is the answer's first.
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def encode_prompt(tokenizer, prompt: str | Messages) -> list[int]:
    """Token ids of a prompt; special tokens are added to plain text only (a chat template writes its own)."""
    if not isinstance(prompt, str):
        return tokenizer(render_prompt(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt)["input_ids"]
    # T5's tokenizer closes every text with a stop token, which a prompt must not have; an encoder's separator stays.
    has_separator = tokenizer.sep_token_id is not None
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not has_separator:
        return ids[:-1]
    return ids


def completion_text(tokenizer, prompt: str | Messages, completion: str | Messages) -> str:
    """The completion as the policy would write it, without the final stop token.

    One assistant message is its content. Several messages (tool calls, further turns) are what the chat template puts
    after the rendered prompt, up to the last stop token.
    """
    if isinstance(completion, str):
        return completion
    if len(completion) == 1 and not completion[0].get("tool_calls"):
        content = completion[0].get("content")
        if isinstance(content, str):
            return content
    before = render_prompt(tokenizer, prompt)
    conversation = [*prompt, *completion]
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    if not whole.startswith(before):
        raise UserError("the chat template renders this prompt differently once a completion follows: pass plain text.")
    # Templates write the stop token, and some a line break after it, which no policy emits.
    written = whole.removeprefix(before)
    return written.rsplit(tokenizer.eos_token, 1)[0]


def encode_completion(
    tokenizer,
    prompt: str | Messages,
    completion: str | Messages,
) -> list[int]:
    """Token ids of a completion, exactly one stop token last (an empty completion is that token alone)."""
    text = completion_text(tokenizer, prompt, completion)
    text = text.removesuffix(tokenizer.eos_token)  # some sources spell it: one is enough
    ids = []
    if text:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def decode_completion(tokenizer, ids: list[int]) -> str:
    """Text of emitted tokens without special tokens: what reward functions and people read."""
    return tokenizer.decode(ids, skip_special_tokens=True)
