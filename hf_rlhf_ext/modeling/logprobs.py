"""Log-probabilities, entropies and hidden states of completion tokens, without logits of shape (B, T, V) in memory.

Shapes: B sequences of L tokens, T tokens of the longest completion, N emitted tokens, H units of the hidden states, V
tokens of the vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from ..compat import selective_log_softmax_and_entropy
from ..errors import UserError, first_line
from .adapters import bare_model
from .embeddings import plain_layer
from .packing import Layout, packed_groups
from .prefix import model_inputs
from .probing import evaluating
from .vocabulary_tiles import frozen_linear, tiled_logprobs

_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier")
"""Options of configs for a constant factor of the logits: Granite, Cohere, Falcon H1."""

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Options of configs for a soft cap of the logits: Gemma 2, RecurrentGemma, xLSTM."""

CHUNK_BYTES = 128 * 2**20
"""Size of fp32 logits that are in memory at one time. Their log-softmax and gradients take three times as much."""

FEW_LOGITS_BYTES = 16 * 2**20
"""Up to this size, the logits of all tokens are computed at once."""

_MEASURED = "_logit_transform"
"""Attribute of a model that `check_output_head` sets. A copy of the model has it too."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the output of its head: logits = cap · tanh(scale · output / cap).

    Attributes:
        scale: constant factor; `None` means 1.
        softcap: limit of the absolute value; `None` means no limit.
    """

    scale: float | None = None
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (..., V) fp32 from outputs of the head (..., V) fp32."""
        if self.scale is not None:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


UNCHANGED = LogitTransform()
"""The logits are the output of the head, as in most models."""


@contextmanager
def captured_hidden_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the last hidden states of a causal LM: the input of its output head.

    It uses a hook instead of calling the backbone, so that forward passes go through the wrappers of PEFT and DDP. The
    hook is on the head, as some models (OPT, the decoders of BART) project the states of their backbone or bypass it.

    Inside the context, the head computes the logits of the last position only, as those of all positions (B, L, V) are
    not needed and would be the largest tensor of the model.

    Args:
        model: a causal LM, also inside PEFT. Of a model without an output head, such as a reward model that is used as
            a critic, the output of its backbone is collected.

    Yields:
        A list to which every forward pass inside the context appends a tensor (B, L, H).
    """
    captured: list[Tensor] = []

    def capture_input(module, args) -> tuple[Tensor]:
        captured.append(args[0])
        return (args[0][:, -1:].contiguous(),)

    def capture_output(module, args, output) -> None:
        captured.append(output.last_hidden_state)

    head = model.get_output_embeddings()
    if head is not None:
        handle = head.register_forward_pre_hook(capture_input)
    else:
        handle = bare_model(model).base_model.register_forward_hook(capture_output)
    try:
        yield captured
    finally:
        handle.remove()


def hidden_width(model: nn.Module) -> int:
    """H, the size of the hidden states that `captured_hidden_states` collects.

    It is the input size of the output head or score head, which differs from `hidden_size` in models that project the
    last states, such as OPT-350m.

    Args:
        model: a causal LM or a sequence-classification model, also inside PEFT.
    """
    head = model.get_output_embeddings()
    if head is None:
        head = getattr(bare_model(model), "score", None)
    # PEFT's copy of a head that is tied to the embedding (`ensure_weight_tying`) has its sizes the wrong way around.
    width = getattr(plain_layer(head), "in_features", None)
    if width is None:
        return model.config.get_text_config().hidden_size
    return width


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
    *,
    per_prompt: int = 1,
    layout: Layout = Layout.PLAIN,
    **forward: Any,
) -> Tensor:
    """Computes the hidden states from which the emitted tokens are predicted.

    With several completions of each prompt, and a layout that the model can compute (see `modeling.layouts`), every
    prompt is computed once. The hidden states are those of plain rows up to rounding.

    Args:
        model: the model to call, also a DDP wrapper around `unwrapped`.
        unwrapped: the same model without DDP.
        input_ids: (B, L) int64, prompt and completion, padded on the right.
        prompt_lengths: (B,) int64, number of tokens of each prompt, at least 1.
        mask: (B, T) bool, True for emitted tokens. Nothing is emitted after the first False of a row.
        per_prompt: number K of completions of each prompt: rows j·K to j·K + K - 1 have the same prompt.
        layout: how the rows are arranged; with K = 1, they are plain rows.
        forward: further arguments of `model`. `adapter_names` has one name for each row.

    Returns:
        (N, H) hidden states in the dtype of the model, with N = `mask.sum()`, row after row.
    """
    if per_prompt > 1 and layout != Layout.PLAIN:
        names = forward.pop("adapter_names", None)
        groups = packed_groups(input_ids, prompt_lengths, mask, per_prompt, layout, names)
        if names is not None:
            forward["adapter_names"] = groups.row_names
        inputs = model_inputs(unwrapped, groups.batch, layout)
        with captured_hidden_states(unwrapped) as captured:
            model(**inputs, use_cache=False, **forward)
        return captured[0].flatten(0, 1)[groups.predicting]

    lengths = prompt_lengths + mask.sum(1)  # (B,)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    attention_mask = (positions[None] < lengths[:, None]).long()  # (B, L)
    with captured_hidden_states(unwrapped) as captured:
        model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            **forward,
        )
    hidden = captured[0][:, -input_ids.shape[1] :]  # prompt-learning adapters put virtual tokens before the sequence
    rows, steps = mask.nonzero(as_tuple=True)
    # Completion token t is at position prompt length + t, and the state at the position before predicts it.
    return hidden[rows, prompt_lengths[rows] - 1 + steps]


def rows_per_chunk(vocabulary: int) -> int:
    """Number of tokens whose fp32 logits take at most `CHUNK_BYTES`, at least 1.

    Args:
        vocabulary: V, number of logits of a token.
    """
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def n_outputs(head: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    """V, the number of logits of a token.

    Args:
        head: output head, from (n, H) to logits (n, V).
        hidden: (N, H) hidden states.
    """
    size = getattr(getattr(head, "__self__", head), "out_features", None)
    if size is not None:
        return size
    with torch.no_grad():
        return head(hidden[:1]).shape[-1]  # hooks that look at values, such as those of `debug`, need a row


def chunked_logprobs(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    transform: LogitTransform = UNCHANGED,
    chunk_size: int | None = None,
    entropy_requires_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens and entropies of their distributions, computed in chunks to save memory.

    By default, a frozen linear head is read once, see `vocabulary_tiles`. Other heads, and those of few logits, compute
    logits of some tokens at a time. With gradients, each of several chunks is checkpointed: its logits are computed
    again in the backward pass, so that those of one chunk are in memory.

    Args:
        hidden: (N, H) hidden states of any floating dtype.
        head: output head of the model, from (n, H) to logits (n, V).
        targets: (N,) int64 ids of the tokens.
        temperature: logits are divided by it.
        transform: what the model does to the output of its head, see `logit_transform`.
        chunk_size: number of rows of logits at one time; `None` means as much as `CHUNK_BYTES` are, or less.
        entropy_requires_grad: whether entropies have a gradient, which an entropy bonus needs.

    Returns:
        Log-probabilities (N,) and entropies (N,), both fp32 in nats.
    """

    if chunk_size is None:
        layer = frozen_linear(head, hidden)
        chunk_size = rows_per_chunk(n_outputs(head, hidden) if layer is None else layer.out_features)
        if layer is not None and len(targets) * layer.out_features * 4 > FEW_LOGITS_BYTES:
            return tiled_logprobs(
                hidden,
                layer,
                targets,
                scale=1.0 if transform.scale is None else transform.scale,
                softcap=transform.softcap,
                temperature=temperature,
                entropy_requires_grad=entropy_requires_grad,
            )

    def one_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = transform(head(hidden).float())
        return _logprobs_and_entropies(logits, targets, entropy_requires_grad, temperature)

    logprob_chunks = []
    entropy_chunks = []
    for start in range(0, max(1, len(targets)), chunk_size):
        rows = slice(start, start + chunk_size)
        # A single chunk is kept for the backward pass, where its logits would be in memory again.
        if torch.is_grad_enabled() and chunk_size < len(targets):
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


def _logprobs_and_entropies(
    logits: Tensor, targets: Tensor, entropy_requires_grad: bool, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n,) and entropies (n,) from logits (n, V), see `chunked_logprobs`."""
    if logits.device.type == "cuda":  # TRL has a Triton kernel there
        return selective_log_softmax_and_entropy(logits, targets, entropy_requires_grad, temperature)
    # TRL's function without a kernel calls `logsumexp` for each token: half of the time of a small model. The numbers
    # are the same to the bit.
    if temperature != 1.0:
        logits = logits / temperature
    selected = logits.gather(-1, targets[:, None])
    logprobs = (selected - logits.logsumexp(-1, keepdim=True)).squeeze(-1)
    with torch.set_grad_enabled(entropy_requires_grad and torch.is_grad_enabled()):
        entropies = []
        for part in logits.split(128):  # each of these steps needs memory
            every_logprob = part.log_softmax(-1)
            entropies.append(-(every_logprob.exp() * every_logprob).sum(-1))
    return logprobs, torch.cat(entropies)


@torch.no_grad()
def chunked_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    ref_head: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    transform: LogitTransform = UNCHANGED,
    chunk_size: int | None = None,
) -> Tensor:
    """Exact KL(policy ‖ reference) over the whole vocabulary at each position, computed in chunks to save memory.

    Args:
        hidden: (N, H) hidden states of the policy.
        ref_hidden: (N, H) hidden states of the reference at the same positions.
        head: output head of the policy, from (n, H) to logits (n, V).
        ref_head: output head of the reference.
        temperature: logits are divided by it.
        transform: what the model does to the output of its head, see `logit_transform`.
        chunk_size: number of rows of logits at one time; `None` means as much as `CHUNK_BYTES` are.

    Returns:
        (N,) fp32, in nats.
    """

    if chunk_size is None:
        chunk_size = rows_per_chunk(n_outputs(head, hidden))
    chunks = []
    for start in range(0, len(hidden), chunk_size):
        rows = slice(start, start + chunk_size)
        logprobs = torch.log_softmax(transform(head(hidden[rows]).float()) / temperature, -1)
        ref_logprobs = torch.log_softmax(transform(ref_head(ref_hidden[rows]).float()) / temperature, -1)
        chunks.append((logprobs.exp() * (logprobs - ref_logprobs)).sum(-1))
    return torch.cat(chunks)


def logit_transform(model: nn.Module) -> LogitTransform:
    """What a causal LM does to the output of its head, such as the scale of Granite and the soft cap of Gemma 2.

    `check_output_head` measures it. Of a model that was not checked and whose config has options for it, it is measured
    here.

    Args:
        model: a causal LM, also inside PEFT.

    Raises:
        UserError: if the model changes the output of its head in another way.
    """
    causal_lm = bare_model(model)
    measured = getattr(causal_lm, _MEASURED, None)
    if measured is not None:
        return measured
    if len(_possible_transforms(causal_lm.config)) == 1:
        return UNCHANGED
    return check_output_head(model, list(range(16)))


def _possible_transforms(config: PretrainedConfig) -> list[LogitTransform]:
    """The transforms that options of the config may stand for, the most likely ones first, and at last none."""
    config = config.get_text_config()
    caps = [cap for name in _CAPS if _is_number(cap := getattr(config, name, None))]
    factors = []
    for name in _SCALES:
        value = getattr(config, name, None)
        if _is_number(value) and value != 1:
            # Families differ: Granite divides by `logits_scaling`, HyperCLOVA X multiplies by it.
            factors += [value, 1 / value]

    transforms = []
    for cap in [*caps, None]:
        for factor in [*factors, None]:
            transforms.append(LogitTransform(factor, cap))
    return transforms


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


@torch.no_grad()
def check_output_head(model: nn.Module, ids: list[int]) -> LogitTransform:
    """Checks that the logits of the model are the output of its head, as `chunked_logprobs` assumes.

    The result is remembered, see `logit_transform`.

    Args:
        model: a causal LM.
        ids: token ids of a text; the logits after its first 16 tokens are checked.

    Returns:
        What the model does to the output of its head.

    Raises:
        UserError: if the model changes the output of its head in a way that its config does not explain.
    """
    name = type(bare_model(model)).__name__
    tokens = torch.tensor([ids[:16]], device=model.device)
    head_outputs: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, args, out: head_outputs.append(out))
    try:
        with evaluating(model), captured_hidden_states(model):
            logits = model(input_ids=tokens, use_cache=False).logits.float()
    except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(
            f"model: {name} fails with a prompt of text ({first_line(error)}): use another model."
        ) from error
    finally:
        hook.remove()
    if not head_outputs or head_outputs[-1].shape != logits.shape:
        raise UserError(
            f"model: the logits of {name} are not the output of one linear layer, which PPOTrainer needs: use another "
            "model, such as Llama, Qwen, Gemma or Mistral."
        )
    if not torch.isfinite(logits).all():
        raise UserError(
            f"model: {name} computes logits that are not finite for the first prompt: check its weights, or load it "
            "with dtype='float32'."
        )

    plain = head_outputs[-1].float()
    spread = (logits - logits.mean()).abs().max().clamp(min=1e-30)
    transforms = _possible_transforms(bare_model(model).config)
    # bf16 rounds logits to 0.4 percent. Of transforms that fit equally well, the first is taken, as a soft cap changes
    # nothing where logits are small.
    errors = [round(float((t(plain) - logits).abs().max() / spread), 2) for t in transforms]
    smallest = min(errors)
    if smallest > 0.02:
        raise UserError(
            f"model: {name} changes the output of its head in a way that its config does not explain, which PPOTrainer "
            "does not support: use another model, such as Llama, Qwen, Gemma or Mistral."
        )
    best = transforms[errors.index(smallest)]
    setattr(bare_model(model), _MEASURED, best)
    return best


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
