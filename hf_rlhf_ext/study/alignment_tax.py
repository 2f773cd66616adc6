"""What training costs elsewhere: perplexity on plain text, and a small exact-match task.

Both are measured before and after training (InstructGPT, arXiv:2203.02155, sec. 4.3, calls the loss "alignment tax").
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..metrics.outcomes import wilson_interval
from ..modeling.logprobs import chunked_logprobs, completion_hidden_states, logit_transform, scatter_to_mask
from ..modeling.probing import evaluating
from ..ppo.batching import budget_chunks
from ..ppo.rollout import pack_sequences
from .cloze import Item, default_items, load_items

__all__ = ["Item", "default_items", "exact_match", "is_match", "load_items", "perplexity", "tax_table"]

Policy = PreTrainedModel | PeftModel
MAX_WINDOW = 2048
"""Largest window of perplexity, in tokens: what a CPU does in a short time."""


# --- perplexity -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Window:
    """A part of a text: `ids` are predicted after `context`."""

    text: int
    context: list[int]
    ids: list[int]


def perplexity(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_tokens: int | None = None,
    max_tokens_per_batch: int = 4096,
) -> dict[str, Any]:
    """How well a model predicts plain text, in nats. Models with other tokenizers are compared by `nats_per_byte`.

    Each text starts with the bos token, if there is one; otherwise its first token is not predicted. A text that is
    longer than a window is read in windows that overlap by half, so that each token is predicted once, after at least
    half a window of text (except at the beginning). No end-of-text token is predicted.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        texts: held-out plain texts.
        max_tokens: window, in tokens. None is the number of positions of the model, at most 2,048.
        max_tokens_per_batch: tokens in a forward pass, including padding.

    Returns:
        A dict: `nats_per_token`, `nats_per_byte` (of UTF-8) and `perplexity` = exp(nats_per_token) over all tokens of
        all texts; `tokens` and `bytes`, how much was predicted; `texts`; `windows`, more than `texts` if some were
        longer than one; `window`, in tokens; `nats` of each text, for paired comparisons, and `bytes_of_texts`.

    Raises:
        UserError: there is no text with a token to predict, or the window is too short.
    """
    window = max_tokens or _positions(model)
    if window < 4:
        raise UserError(f"max_tokens={window}: the window of perplexity must have at least 4 tokens.")
    windows = []
    n_bytes = []
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        n_bytes.append(_bytes_predicted(tokenizer, text, ids))
        windows += _windows(number, ids, tokenizer.bos_token_id, window)
    if not windows:
        raise UserError(f"perplexity: none of {len(texts)} texts has a token to predict: give other plain texts.")

    nats = [0.0] * len(texts)
    logprobs = _logprobs(model, tokenizer, windows, max_tokens_per_batch)
    for part, logprob in zip(windows, logprobs, strict=True):
        nats[part.text] -= logprob
    total = math.fsum(nats)
    tokens = sum(len(part.ids) for part in windows)
    per_token = total / tokens
    return {
        "nats_per_token": per_token,
        "nats_per_byte": total / sum(n_bytes),
        "perplexity": math.exp(per_token) if per_token < 700 else math.inf,
        "tokens": tokens,
        "bytes": sum(n_bytes),
        "texts": len({part.text for part in windows}),
        "windows": len(windows),
        "window": window,
        "nats": nats,
        "bytes_of_texts": n_bytes,
    }


def _positions(model: Policy) -> int:
    config = model.config.get_text_config()
    return min(getattr(config, "max_position_embeddings", None) or MAX_WINDOW, MAX_WINDOW)


def _bytes_predicted(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> int:
    """Bytes of the tokens that are predicted: all, or all but those of the first token."""
    n_bytes = len(text.encode())
    if tokenizer.bos_token_id is None and ids:
        n_bytes -= len(tokenizer.decode(ids[:1]).encode())
    return n_bytes


def _windows(text: int, ids: list[int], bos: int | None, window: int) -> list[_Window]:
    """The windows of a text of these tokens."""
    sequence = ids if bos is None else [bos, *ids]
    if len(sequence) < 2:
        return []
    windows = []
    done = 1  # the first token is context only
    start = 0
    while done < len(sequence):
        end = min(start + window, len(sequence))
        windows.append(_Window(text, sequence[start:done], sequence[done:end]))
        done = end
        start = done - window // 2
    return windows


@torch.no_grad()
def _logprobs(
    model: Policy, tokenizer: PreTrainedTokenizerBase, windows: Sequence[_Window], max_tokens: int
) -> list[float]:
    """Sum of the log-probabilities of the predicted tokens of each window, in nats."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    contexts = [part.context for part in windows]
    sequences = pack_sequences(contexts, [part.ids for part in windows], pad, model.device)
    lengths = sequences.lengths.tolist()
    sums = [0.0] * len(windows)
    with evaluating(model):
        for chunk in budget_chunks(lengths, max_rows=64, max_tokens=max_tokens):
            part = sequences.select(torch.tensor(chunk, device=model.device))
            hidden = completion_hidden_states(model, model, part.input_ids, part.prompt_lengths, part.mask)
            logprobs, _ = chunked_logprobs(
                hidden, model.get_output_embeddings(), part.targets(), transform=logit_transform(model)
            )
            of_rows = scatter_to_mask(logprobs.double(), part.mask).sum(1).tolist()
            for row, value in zip(chunk, of_rows, strict=True):
                sums[row] = value
    return sums


# --- exact match ------------------------------------------------------------------------------------------------------


def exact_match(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item] | None = None,
    *,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Share of prompts that a model continues with the right word, greedily.

    Prompts are plain text after the bos token, if there is one, also for a chat model: the task measures what training
    did to the language model.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        items: prompts with their right answers. None is the shipped set of `default_items`.
        batch_size: number of prompts in a generation batch.

    Returns:
        `accuracy`; `wilson`, its 95 % Wilson interval; `right` and `n`; `kinds`, the right ones and the number of each
        kind; and `matches`, whether each item is right, for paired comparisons.

    Raises:
        UserError: there are no items.
    """
    items = default_items() if items is None else list(items)
    if not items:
        raise UserError("exact_match: no items: give at least one, or None for the shipped ones.")
    continuations = _continue_greedily(model, tokenizer, items, batch_size)
    matches = [is_match(text, item.answers) for text, item in zip(continuations, items, strict=True)]
    kinds: dict[str, dict[str, int]] = {}
    for item, match in zip(items, matches, strict=True):
        counts = kinds.setdefault(item.kind, {"right": 0, "n": 0})
        counts["right"] += match
        counts["n"] += 1
    right = sum(matches)
    return {
        "accuracy": right / len(items),
        "wilson": list(wilson_interval(right, len(items))),
        "right": right,
        "n": len(items),
        "kinds": kinds,
        "matches": matches,
    }


def is_match(continuation: str, answers: Sequence[str]) -> bool:
    """Whether a continuation begins with one of the answers as whole words. Case, and signs before it, do not count."""
    words = re.findall(r"\w+", continuation.lower())
    for answer in answers:
        wanted = re.findall(r"\w+", answer.lower())
        if wanted and words[: len(wanted)] == wanted:
            return True
    return False


@torch.no_grad()
def _continue_greedily(
    model: Policy, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], batch_size: int
) -> list[str]:
    """The most probable continuation of each prompt, long enough for its longest answer and one token more."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = [bos + tokenizer(item.prompt, add_special_tokens=False)["input_ids"] for item in items]
    answers = [
        tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] for item in items for answer in item.answers
    ]
    n_new = max(map(len, answers)) + 2
    texts = [""] * len(items)
    by_length = sorted(range(len(items)), key=lambda row: len(prompts[row]))
    with evaluating(model):
        for start in range(0, len(items), batch_size):
            rows = by_length[start : start + batch_size]
            emitted = _greedy_tokens(model, [prompts[row] for row in rows], n_new)
            for row, ids in zip(rows, emitted, strict=True):
                texts[row] = tokenizer.decode(ids)
    return texts


def _greedy_tokens(model: Policy, prompts: list[list[int]], n_new: int) -> list[list[int]]:
    """Greedy tokens after each prompt, without a stop.

    It is a loop of its own, as the generation config of a model may hold a repetition penalty or a stop token.
    """
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(ids)) + ids for ids in prompts]
    masks = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    input_ids = torch.tensor(rows, device=model.device)  # (B, P), padded on the left
    attention_mask = torch.tensor(masks, device=model.device)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    emitted = []
    cache = None
    for _ in range(n_new):
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        input_ids = output.logits[:, -1:].argmax(-1)  # (B, 1)
        emitted.append(input_ids)
        attention_mask = torch.cat([attention_mask, torch.ones_like(input_ids)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.cat(emitted, dim=1).tolist()


# --- the table --------------------------------------------------------------------------------------------------------


def tax_table(before: Mapping[str, Any], after: Mapping[str, Mapping[str, Any]], *, name: str = "before") -> str:
    """Markdown table of perplexity and exact match before training and of each system.

    Args:
        before: `{"perplexity": perplexity(…), "exact_match": exact_match(…)}` before training; either may be missing.
        after: the same of each system after training.
        name: what the row of `before` is called, such as "sft".
    """
    header = "| system | nats/token | nats/byte | perplexity | change of nats/token | exact match | 95 % interval |"
    lines = [header, "|---|---|---|---|---|---|---|"]
    for system, found in {name: before, **after}.items():
        text = found.get("perplexity") or {}
        task = found.get("exact_match") or {}
        own, first = text.get("nats_per_token"), (before.get("perplexity") or {}).get("nats_per_token")
        change = None if system == name or own is None or first is None else own - first
        cells = [
            system,
            _number(own, "{:.3f}"),
            _number(text.get("nats_per_byte"), "{:.3f}"),
            _number(text.get("perplexity"), "{:.2f}"),
            _number(change, "{:+.3f}"),
            f"{task['right']} of {task['n']} ({task['accuracy']:.1%})" if task else "–",
            "{:.1%} to {:.1%}".format(*task["wilson"]) if task else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
