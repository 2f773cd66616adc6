"""Tokenization of prompts and completions: one convention for training, scoring and rollouts.

A prompt is a string, or a list of messages that is rendered by the tokenizer's chat template with the generation
prompt. A completion is a string or a list of messages. It is tokenized separately, as a policy generates it after the
prompt's last token, and ends with exactly one stop token, `tokenizer.eos_token_id`.
"""

import json
from typing import Any

from ..errors import UserError

Messages = list[dict[str, Any]]


def is_messages(value: Any) -> bool:
    """True for a non-empty list of `{"role": …, "content": …}` dicts. `content` is text, a list of parts, or None."""
    if not isinstance(value, list) or not value:
        return False
    return all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or "content" not in value:
        return False
    role = value.get("role")
    return isinstance(role, str) and isinstance(value["content"], str | list | None)


def make_message(role: str, content: str) -> dict[str, Any]:
    """Returns a chat message with text only."""
    return {"role": role, "content": content}


def is_text(value: Any) -> bool:
    """True for a string or for messages."""
    return isinstance(value, str) or is_messages(value)


def text_key(value: str | Messages) -> str:
    """Returns a key that is equal for two texts (or conversations) that differ only in white space."""
    if isinstance(value, str):
        return " ".join(value.split())
    messages = []
    for message in value:
        # Arrow fills missing fields with None, which must not make a difference.
        fields = {name: value for name, value in message.items() if value is not None}
        words = _content(message).split()
        fields["content"] = " ".join(words)
        messages.append(fields)
    return json.dumps(messages, sort_keys=True, default=str)


def plain_text(value: str | Messages) -> str:
    """Returns the text that a person reads: the string, or the contents of the messages on separate lines."""
    if isinstance(value, str):
        return value
    return "\n".join(map(_content, value))


def _content(message: dict[str, Any]) -> str:
    return str(message.get("content") or "")


def check_tokenizer(tokenizer, *, needs_chat_template: bool) -> None:
    """Raises `UserError` if the tokenizer has no stop token, no pad token, or (if needed) no chat template."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    # Completions end with the stop token, and rewards are read at its position.
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name!r} has no eos token: set `tokenizer.eos_token` to the model's stop token.")
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"tokenizer {name!r} has no pad token: set `tokenizer.pad_token` to an unused token "
            "(`tokenizer.pad_token = tokenizer.eos_token` works too, since padding is masked by length)."
        )
    if needs_chat_template and tokenizer.chat_template is None:
        raise UserError(
            f"the prompts are messages, but tokenizer {name!r} has no chat template: set `tokenizer.chat_template`, "
            "use an instruction-tuned model, or give prompts and completions as plain text."
        )


def render_prompt(tokenizer, prompt: str | Messages) -> str:
    """Returns the text that the policy continues: the prompt itself, or messages rendered by the chat template."""
    if isinstance(prompt, str):
        return prompt
    check_tokenizer(tokenizer, needs_chat_template=True)
    # With the generation prompt, the first generated token is the first token of the answer.
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def encode_prompt(tokenizer, prompt: str | Messages) -> list[int]:
    """Returns the token ids of a prompt. Special tokens are added to plain text only; a chat template has its own."""
    if not isinstance(prompt, str):
        return tokenizer(render_prompt(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt)["input_ids"]
    # T5's tokenizer appends a stop token to every text, which a prompt must not have. An encoder's separator is kept.
    has_separator = tokenizer.sep_token_id is not None
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not has_separator:
        return ids[:-1]
    return ids


def completion_text(tokenizer, prompt: str | Messages, completion: str | Messages) -> str:
    """Returns the completion as the policy would write it, without the final stop token.

    For a single assistant message, this is its content. For several messages (tool calls, further turns), it is the
    text that the chat template renders after the prompt, up to the last stop token.
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
        raise UserError(
            "the chat template renders this prompt differently when a completion follows it: pass prompts and "
            "completions as plain text."
        )
    # Templates write the stop token, and some write a line break after it, which a policy does not generate.
    written = whole.removeprefix(before)
    return written.rsplit(tokenizer.eos_token, 1)[0]


def encode_completion(
    tokenizer,
    prompt: str | Messages,
    completion: str | Messages,
) -> list[int]:
    """Returns the token ids of a completion, which end with exactly one stop token, even if the text is empty."""
    text = completion_text(tokenizer, prompt, completion)
    text = text.removesuffix(tokenizer.eos_token)  # some sources include it; there must be only one
    ids = []
    if text:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def decode_completion(tokenizer, ids: list[int]) -> str:
    """Decodes generated tokens without special tokens, for reward functions and people."""
    return tokenizer.decode(ids, skip_special_tokens=True)
