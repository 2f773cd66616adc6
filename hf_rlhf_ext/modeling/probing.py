"""Forward passes that find out what a model computes, and leave its mode and the random state as they were."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

PROBE_TOKENS = 8

PROBE_TEXTS = (
    "A sunny day in the garden makes people happy, and a rainy one makes the garden happy.",
    "Q: What is 12 * 7?\nA: 84, since 10 * 7 = 70 and 2 * 7 = 14.\n",
    "def mean(values):\n    return sum(values) / len(values)\n\nDie Straße war naß. 你好。",
)
"""Texts on which two models are compared."""

_PROBE_CHAT = (
    {"role": "user", "content": "Tell me about rain."},
    {"role": "assistant", "content": "Rain waters the fields, and it fills the rivers."},
)
_MOST_TOKENS = 64
"""At most how many trained tokens are compared."""

LOGPROB_ROUNDING = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.15}
"""By dtype: the mean difference of log-probabilities that rounding explains, in nats per token.

Measured between `generate` and a forward pass: 2e-5 in fp32, 0.02 in bf16, where a single token may differ by 0.3.
"""


@contextmanager
def evaluating(model: nn.Module):
    """Inside the context, the model is in eval mode; afterward each module is in its previous mode again."""
    modes = [(module, module.training) for module in model.modules()]
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for module, mode in modes:  # such as a part of a model that trains, which its user keeps in eval mode
            module.training = mode


@contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Restores the random state of the CPU and of a device afterward, so that a run does not depend on a check.

    Args:
        device: device of the model.
    """
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        yield


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Inside the context, the model is in eval mode and no gradients are kept. Mode and random state are restored.

    The random state matters also in eval mode, as some models draw random numbers there too.

    Args:
        model: the model, also inside PEFT.
    """
    device = next(model.parameters()).device
    with unchanged_random_state(device), evaluating(model), torch.no_grad():
        yield


def probe_logprobs(model: nn.Module) -> Tensor:
    """Log-probabilities of a short sequence, for tokens from all over the vocabulary.

    Args:
        model: a causal LM.

    Returns:
        (`PROBE_TOKENS`, V) fp32 log-probabilities in nats.
    """
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(PROBE_TOKENS, device=device)[None] * (vocabulary // PROBE_TOKENS)
    with probing(model):
        logits = model(input_ids=ids).logits[0, -PROBE_TOKENS:]
        return torch.log_softmax(logits.float(), -1)


def mean_difference(first: Tensor, second: Tensor) -> float:
    """Mean of the absolute differences of two tensors of the same shape."""
    return float((first - second).abs().mean())


def probe_sequences(tokenizer: PreTrainedTokenizerBase, rows: int, tokens: Collection[int] = ()) -> list[list[int]]:
    """Token ids of `PROBE_TEXTS`, and of a short chat if the tokenizer has a chat template that renders it.

    Args:
        tokenizer: the tokenizer of the models.
        rows: number of tokens of the models. Larger ids are left out.
        tokens: ids of further tokens, such as those whose embeddings were trained. The first 64 are one more sequence.

    Returns:
        Sequences of at least two tokens.
    """
    sequences = [tokenizer(text)["input_ids"] for text in PROBE_TEXTS]
    if tokenizer.chat_template is not None:
        with suppress(Exception):  # a template may need other columns, or refuse roles
            chat = tokenizer.apply_chat_template(list(_PROBE_CHAT), tokenize=False)
            sequences.append(tokenizer(chat, add_special_tokens=False)["input_ids"])
    sequences.append(sorted(tokens)[:_MOST_TOKENS])
    known = [[token for token in sequence if token < rows] for sequence in sequences]
    return [sequence for sequence in known if len(sequence) > 1]


def token_logprobs(model: nn.Module, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities of the tokens of each sequence after its first one.

    Args:
        model: a causal LM.
        sequences: token ids; each sequence is a forward pass of its own.

    Returns:
        (N,) fp32 log-probabilities in nats, of all sequences one after the other.
    """
    device = next(model.parameters()).device
    found = []
    with probing(model):
        for sequence in sequences:
            ids = torch.tensor([list(sequence)], device=device)
            logits = model(input_ids=ids).logits[0, -ids.shape[1] : -1]
            found.append(torch.log_softmax(logits.float(), -1).gather(-1, ids[0, 1:, None])[:, 0])
    return torch.cat(found)
