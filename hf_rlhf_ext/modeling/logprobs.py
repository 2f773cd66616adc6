"""Log-probabilities, entropies and hidden states of completion tokens, without logits of shape (B, T, V) in memory.

Shapes: B sequences of L tokens, T tokens of the longest completion, N emitted tokens, H units of the hidden states, V
tokens of the vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..compat import selective_log_softmax_and_entropy
from ..errors import UserError
from .adapters import evaluating


@contextmanager
def captured_hidden_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the last hidden states of a causal LM, before the output head.

    It uses a hook instead of calling the backbone, so that forward passes go through the wrappers of PEFT and DDP.

    Args:
        model: a causal LM, also inside PEFT.

    Yields:
        A list to which every forward pass inside the context appends a tensor (B, L, H).
    """
    causal_lm = model
    if hasattr(model, "get_base_model"):  # PEFT's wrapper
        causal_lm = model.get_base_model()
    captured: list[Tensor] = []

    def capture(module, args, output) -> None:
        captured.append(output.last_hidden_state)

    handle = causal_lm.base_model.register_forward_hook(capture)
    try:
        yield captured
    finally:
        handle.remove()


@contextmanager
def contiguous_head_inputs(model: nn.Module):
    """Inside the context, the output head gets contiguous hidden states, which saves memory and time on a CPU.

    Transformers passes a slice of (B, L, H) to the head. On a CPU, PyTorch then copies the weight of the head B times
    (3.4 GB and 5 s for 64 prompts of SmolLM2-135M).

    Args:
        model: a causal LM. Models without an output head are not changed.
    """
    head = model.get_output_embeddings()
    if head is None:  # a reward model that is used as a critic
        yield
        return

    def make_contiguous(module, args) -> tuple[Tensor]:
        return (args[0].contiguous(),)

    handle = head.register_forward_pre_hook(make_contiguous)
    try:
        yield
    finally:
        handle.remove()


def completion_hidden_states(
    model: nn.Module,
    unwrapped: nn.Module,
    input_ids: Tensor,
    prompt_lengths: Tensor,
    mask: Tensor,
    **forward: Any,
) -> Tensor:
    """Computes the hidden states from which the emitted tokens are predicted.

    Args:
        model: the model to call, also a DDP wrapper around `unwrapped`.
        unwrapped: the same model without DDP.
        input_ids: (B, L) int64, prompt and completion, padded on the right.
        prompt_lengths: (B,) int64, number of tokens of each prompt, at least 1.
        mask: (B, T) bool, True for emitted tokens.
        forward: further arguments of `model`.

    Returns:
        (N, H) hidden states in the dtype of the model, with N = `mask.sum()`, row after row.
    """
    lengths = prompt_lengths + mask.sum(1)  # (B,)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    attention_mask = (positions[None] < lengths[:, None]).long()  # (B, L)
    with captured_hidden_states(unwrapped) as captured, contiguous_head_inputs(unwrapped):
        # `logits_to_keep=1`, as the logits (B, L, V) of the model are not needed and would be its largest tensor.
        model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            logits_to_keep=1,
            **forward,
        )
    hidden = captured[0][:, -input_ids.shape[1] :]  # prompt-learning adapters put virtual tokens before the sequence
    rows, steps = mask.nonzero(as_tuple=True)
    # Completion token t is at position prompt length + t, and the state at the position before predicts it.
    return hidden[rows, prompt_lengths[rows] - 1 + steps]


def chunked_logprobs(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_size: int = 128,
    entropy_requires_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens and entropies of their distributions, computed in chunks to save memory.

    With gradients, each chunk is checkpointed: its logits are computed again in the backward pass, so that at most
    (chunk_size, V) logits are in memory.

    Args:
        hidden: (N, H) hidden states of any floating dtype.
        head: output head of the model, from (n, H) to logits (n, V).
        targets: (N,) int64 ids of the tokens.
        temperature: logits are divided by it.
        softcap: see `final_softcap`.
        chunk_size: number of rows of logits at one time.
        entropy_requires_grad: whether entropies have a gradient, which an entropy bonus needs.

    Returns:
        Log-probabilities (N,) and entropies (N,), both fp32 in nats.
    """

    def one_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = _capped_logits(head, hidden, softcap)
        return selective_log_softmax_and_entropy(
            logits,
            targets,
            entropy_requires_grad,
            temperature,
        )

    logprob_chunks = []
    entropy_chunks = []
    for start in range(0, len(targets), chunk_size):
        rows = slice(start, start + chunk_size)
        if torch.is_grad_enabled():
            logprobs, entropies = checkpoint(
                one_chunk,
                hidden[rows],
                targets[rows],
                use_reentrant=False,
            )
        else:
            logprobs, entropies = one_chunk(hidden[rows], targets[rows])
        logprob_chunks.append(logprobs)
        entropy_chunks.append(entropies)
    return torch.cat(logprob_chunks), torch.cat(entropy_chunks)


def _capped_logits(head: Callable[[Tensor], Tensor], hidden: Tensor, softcap: float | None) -> Tensor:
    """fp32 logits (n, V) of hidden states (n, H), with the soft cap of Gemma 2 if there is one."""
    logits = head(hidden).float()
    if softcap is None:
        return logits
    return softcap * torch.tanh(logits / softcap)


@torch.no_grad()
def chunked_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    ref_head: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_size: int = 128,
) -> Tensor:
    """Exact KL(policy ‖ reference) over the whole vocabulary at each position, computed in chunks to save memory.

    Args:
        hidden: (N, H) hidden states of the policy.
        ref_hidden: (N, H) hidden states of the reference at the same positions.
        head: output head of the policy, from (n, H) to logits (n, V).
        ref_head: output head of the reference.
        temperature: logits are divided by it.
        softcap: see `final_softcap`.
        chunk_size: number of rows of logits at one time.

    Returns:
        (N,) fp32, in nats.
    """

    chunks = []
    for start in range(0, len(hidden), chunk_size):
        rows = slice(start, start + chunk_size)
        logprobs = torch.log_softmax(_capped_logits(head, hidden[rows], softcap) / temperature, -1)
        ref_logprobs = torch.log_softmax(_capped_logits(ref_head, ref_hidden[rows], softcap) / temperature, -1)
        chunks.append((logprobs.exp() * (logprobs - ref_logprobs)).sum(-1))
    return torch.cat(chunks)


def final_softcap(model: nn.Module) -> float | None:
    """Returns `final_logit_softcapping` of the model's config (Gemma 2); `None` for most models."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


@torch.no_grad()
def check_output_head(model: nn.Module, ids: list[int]) -> None:
    """Checks that the logits of the model are the output of its head, as `chunked_logprobs` assumes.

    Args:
        model: a causal LM.
        ids: token ids of a text; the logits after its first 16 tokens are checked.

    Raises:
        UserError: if the model changes the output of its head, for example by a scale.
    """
    tokens = torch.tensor([ids[:16]], device=model.device)
    with evaluating(model), captured_hidden_states(model) as captured:
        logits = model(input_ids=tokens, logits_to_keep=1).logits[0, -1].float()
        logprobs, token_ids = torch.log_softmax(logits, -1).sort()
        # The four least and the four most likely tokens, as a scale has the largest effect on them.
        expected = torch.cat([logprobs[:4], logprobs[-4:]])
        targets = torch.cat([token_ids[:4], token_ids[-4:]])
        hidden = captured[0][0, -1:].expand(8, -1)
        computed, _ = chunked_logprobs(
            hidden,
            model.get_output_embeddings(),
            targets,
            softcap=final_softcap(model),
        )
    if not torch.allclose(
        computed,
        expected,
        rtol=0.05,
        atol=0.25,
    ):  # bf16 logits of 20 are rounded to 0.125
        raise UserError(
            f"model: {type(model).__name__} scales its logits after the output head, which PPOTrainer does not "
            "support: use another model (Granite and Cohere scale them; Llama, Qwen, Gemma, Mistral and SmolLM do not)."
        )


def scatter_to_mask(x: Tensor, mask: Tensor) -> Tensor:
    """Arranges the values of the emitted tokens as a tensor (B, T). Gradients are kept.

    Args:
        x: (N,) values with N = `mask.sum()`, row after row.
        mask: (B, T) bool, True for emitted tokens.

    Returns:
        (B, T) with the dtype of `x`, zero where `mask` is False.
    """
    zeros = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
    return zeros.masked_scatter(mask, x)
