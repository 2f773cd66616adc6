"""Log-probabilities, entropies and values of completion tokens without a (B, T, V) tensor."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..compat import selective_log_softmax_and_entropy
from ..errors import UserError
from .adapters import evaluating


@contextmanager
def captured_hidden_states(model: nn.Module):
    """Collects the last hidden states (B, L, H), before the output head, of each forward of a causal LM inside.

    A hook on the backbone rather than a direct call of it: the forward still goes through PEFT's and DDP's wrappers.
    Yields a list to which every forward appends one tensor.
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
    """Hands the output head contiguous hidden states inside.

    Transformers slices the last position off (B, L, H) before its head; on a CPU, PyTorch then copies the head's
    weight B times (3.4 GB and 5 s for 64 prompts of SmolLM2-135M).
    """
    head = model.get_output_embeddings()
    if head is None:  # a reward model, as a critic
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
    **forward,
) -> Tensor:
    """Hidden states from which each completion token was predicted, for the real tokens only.

    Args:
        model: what is called (may be a DDP wrapper around `unwrapped`).
        input_ids: (B, L) prompt and completion, padded right.
        prompt_lengths: (B,) tokens of each prompt, at least 1.
        mask: (B, T) bool, True on emitted tokens.
        forward: further arguments of `model`.

    Returns:
        (N, H), N = `mask.sum()`, in row-major order of `mask`.
    """
    lengths = prompt_lengths + mask.sum(1)  # (B,)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    attention_mask = (positions[None] < lengths[:, None]).long()  # (B, L)
    with captured_hidden_states(unwrapped) as captured, contiguous_head_inputs(unwrapped):
        # One position of logits: the model's own head is not needed, and (B, L, V) would be its largest tensor.
        model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            logits_to_keep=1,
            **forward,
        )
    hidden = captured[0][:, -input_ids.shape[1] :]  # prompt-learning adapters put virtual tokens in front
    rows, steps = mask.nonzero(as_tuple=True)
    # Completion token t stands at prompt length + t; the state before it predicts it.
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
    """log softmax(head(hidden) / temperature)[targets] and the entropy, `chunk_size` rows of logits at a time.

    With gradients on, each chunk is checkpointed: its logits are recomputed in the backward pass, so that at most
    (chunk_size, V) of them exist at any time.

    Args:
        hidden: (N, H) hidden states, any floating dtype.
        head: the model's output embedding (an LM head, H → V).
        targets: (N,) token ids.
        softcap: see `final_softcap`.
        entropy_requires_grad: for an entropy bonus.

    Returns:
        logprobs and entropies, both (N,) fp32, nats.
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
    """fp32 logits (n, V) of hidden states (n, H), after Gemma 2's soft cap where there is one."""
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
    """KL(policy ‖ reference) over the whole vocabulary at each position, (N,) fp32, nats; `chunk_size` rows at a time.

    Args:
        hidden, ref_hidden: (N, H) hidden states of policy and reference at the same positions.
        head, ref_head: their output heads, (n, H) to logits (n, V).
        temperature, softcap: as in `chunked_logprobs`.
    """

    chunks = []
    for start in range(0, len(hidden), chunk_size):
        rows = slice(start, start + chunk_size)
        logprobs = torch.log_softmax(_capped_logits(head, hidden[rows], softcap) / temperature, -1)
        ref_logprobs = torch.log_softmax(_capped_logits(ref_head, ref_hidden[rows], softcap) / temperature, -1)
        chunks.append((logprobs.exp() * (logprobs - ref_logprobs)).sum(-1))
    return torch.cat(chunks)


def final_softcap(model: nn.Module) -> float | None:
    """`final_logit_softcapping` of the model's config (Gemma 2), None for most."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


@torch.no_grad()
def check_output_head(model: nn.Module, ids: list[int]) -> None:
    """Raises `UserError` unless the model's logits after `ids` are its output head's, as `chunked_logprobs` assumes."""
    tokens = torch.tensor([ids[:16]], device=model.device)
    with evaluating(model), captured_hidden_states(model) as captured:
        logits = model(input_ids=tokens, logits_to_keep=1).logits[0, -1].float()
        logprobs, token_ids = torch.log_softmax(logits, -1).sort()
        # The four least and the four most likely tokens: scaling shows most at the ends.
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
            "support: use another model (Granite and Cohere scale; Llama, Qwen, Gemma, Mistral and SmolLM do not)."
        )


def scatter_to_mask(x: Tensor, mask: Tensor) -> Tensor:
    """(N,) values of the True entries of `mask` (B, T), row-major → (B, T), zero elsewhere; keeps gradients."""
    zeros = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
    return zeros.masked_scatter(mask, x)
