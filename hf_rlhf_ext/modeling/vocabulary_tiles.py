"""Log-probabilities from hidden states and a plain output head, a part of the vocabulary at a time.

Logits of all tokens would be the largest tensor of a training step: 400 tokens of a vocabulary of 152,000 take 232 MiB,
several times over. Here, the logits of a few hundred to a few thousand entries of the vocabulary at a time are added to
running sums, as in flash attention. The gradient with respect to the hidden states is summed in the same pass: up to a
factor for each token, it does not depend on the loss. So the backward pass needs no logits, and each weight of the head
is read once.

Shapes: N tokens, H units of the hidden states, V entries of the vocabulary, v of them in a tile.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .shards import is_sharded

_TILE_BYTES = {"cpu": 2 * 2**20}
"""Size of a tile of fp32 logits by type of the device. On a CPU, it should stay in the cache."""

_OTHER_TILE_BYTES = 64 * 2**20
"""The same on accelerators, where each tile costs several kernel launches."""

_HALF_SUMS_IN_FP32 = Version(torch.__version__) >= Version("2.8") and torch.version.hip is None
"""Whether `torch.mm` takes `out_dtype`, on CUDA. ROCm refuses it."""

_LOWEST = torch.finfo(torch.float32).min

_MAX_ROWS = 2048
"""Tokens whose tiles are computed together. With more of them, tiles would be narrow."""


class TokenSums(NamedTuple):
    """What is known about N tokens: (N,) log-probabilities and entropies in nats, and their (N, H) gradients."""

    logprobs: Tensor
    entropies: Tensor
    of_logprobs: Tensor | None
    of_entropies: Tensor | None


def frozen_linear(head: Callable[[Tensor], Tensor], hidden: Tensor) -> nn.Linear | None:
    """The layer behind an output head, if this module can compute with its weights; otherwise `None`.

    Args:
        head: a layer, or its method `forward`. It must be a frozen linear layer without hooks, shards or an adapter.
        hidden: its input, in fp32, bf16 or fp16.
    """
    layer = getattr(head, "__self__", head)
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return None
    if head is layer and (layer._forward_hooks or layer._forward_pre_hooks):
        return None
    for tensor in (layer.weight, layer.bias):
        if tensor is None:
            continue
        if tensor.requires_grad or is_sharded(tensor) or type(tensor.data) is not Tensor:
            return None
    is_supported = _compute_dtype(hidden) in (torch.float32, torch.float16, torch.bfloat16)
    return layer if is_supported else None


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def tiled_logprobs(
    hidden: Tensor,
    layer: nn.Linear,
    targets: Tensor,
    *,
    scale: float,
    softcap: float | None,
    temperature: float,
    entropy_requires_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens and entropies of their distributions.

    Logits are cap · tanh(scale · output / cap) / temperature.

    Args:
        hidden: (N, H) hidden states. Only they get a gradient.
        layer: the output head, see `frozen_linear`.
        targets: (N,) int64 ids of the tokens.
        scale: constant factor of the output of the head.
        softcap: cap of the logits; `None` means none.
        temperature: temperature of the distribution.
        entropy_requires_grad: whether entropies have a gradient too.

    Returns:
        Log-probabilities (N,) and entropies (N,), both fp32 in nats.
    """
    options = layer, targets, scale, softcap, temperature, entropy_requires_grad
    return _TiledLogprobs.apply(hidden, torch.is_grad_enabled() and hidden.requires_grad, options)


class _TiledLogprobs(torch.autograd.Function):
    """Computes the gradients of each token's two numbers in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, with_gradient: bool, options: tuple) -> tuple[Tensor, Tensor]:
        layer, targets, scale, softcap, temperature, entropy_requires_grad = options
        parts = []
        dtype = _compute_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):  # sums are in fp32, and products in `dtype` as they are
            for start in range(0, max(1, len(hidden)), _MAX_ROWS):
                part = slice(start, start + _MAX_ROWS)
                sums = _RunningSums(hidden[part].to(dtype), targets[part], scale, softcap, temperature)
                if with_gradient:
                    sums.prepare_gradients(entropy_requires_grad)
                sums.add_all(layer)
                parts.append(sums.result(layer, hidden.dtype))
        logprobs = torch.cat([part.logprobs for part in parts])
        entropies = torch.cat([part.entropies for part in parts])
        if with_gradient:
            gradients = [torch.cat([part.of_logprobs for part in parts])]
            if entropy_requires_grad:
                gradients.append(torch.cat([part.of_entropies for part in parts]))
            ctx.save_for_backward(*gradients)
        if not (with_gradient and entropy_requires_grad):
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable  # the gradients are kept as numbers
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropies: Tensor) -> tuple[Tensor, None, None]:
        of_logprobs, *of_entropies = ctx.saved_tensors
        gradient = grad_logprobs[:, None] * of_logprobs
        if of_entropies:
            gradient = gradient + grad_entropies[:, None] * of_entropies[0]
        return gradient.to(of_logprobs.dtype), None, None


class _RunningSums:
    """Sums over the tiles so far, for n tokens. With z the logits, m their maximum so far and e = exp(z − m):

    Σ e, Σ e·(z − m), and for gradients Σ e·z'·w and Σ e·(z − m)·z'·w, where w are rows of the head (H,) and z' is the
    derivative of a logit with respect to the output of the head, without constant factors.
    """

    def __init__(self, hidden: Tensor, targets: Tensor, scale: float, softcap: float | None, temperature: float):
        self.hidden, self.targets = hidden, targets
        self.scale, self.softcap, self.temperature = scale, softcap, temperature
        self.maximum: Tensor | None = None
        self.total = hidden.new_zeros(len(hidden), dtype=torch.float32)
        self.weighted = self.total.clone()
        self.target_logits = torch.full_like(self.total, torch.nan)  # what remains if a target is not in the vocabulary
        self.of_total: Tensor | None = None
        self.of_weighted: Tensor | None = None

    def prepare_gradients(self, entropy_requires_grad: bool) -> None:
        """Lets the sums for gradients begin, those of entropies only if they are needed."""
        self.of_total = torch.zeros_like(self.hidden, dtype=torch.float32)
        if entropy_requires_grad:
            self.of_weighted = torch.zeros_like(self.of_total)

    def add_all(self, layer: nn.Linear) -> None:
        """Adds the whole vocabulary, tile by tile."""
        size = _TILE_BYTES.get(self.hidden.device.type, _OTHER_TILE_BYTES)
        width = max(256, size // (4 * max(1, len(self.hidden))))
        for start in range(0, len(layer.weight), width):
            weights = layer.weight[start : start + width].to(self.hidden.dtype)
            outputs = self.hidden @ weights.t()
            if layer.bias is not None:
                outputs += layer.bias[start : start + width].to(self.hidden.dtype)
            logits, slopes = self._logits(outputs.float())
            self._note_targets(logits, start)
            self._add(logits, slopes, weights)

    def _logits(self, outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (n, v) from outputs of the head, and their slopes z' (n, v); `None` if these are 1."""
        if self.scale != 1:
            outputs = outputs * self.scale
        slopes = None
        if self.softcap is not None:
            curved = torch.tanh(outputs / self.softcap)
            outputs, slopes = self.softcap * curved, 1 - curved.square()
        if self.temperature != 1:
            outputs = outputs / self.temperature
        return outputs, slopes

    def _note_targets(self, logits: Tensor, start: int) -> None:
        local = self.targets - start
        is_here = (local >= 0) & (local < logits.shape[1])
        found = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.target_logits = torch.where(is_here, found, self.target_logits)

    def _add(self, logits: Tensor, slopes: Tensor | None, weights: Tensor) -> None:
        maximum = logits.amax(1).clamp(min=_LOWEST)  # if a bias hides the whole tile, -inf less -inf would be NaN
        if self.maximum is None:
            self.maximum = maximum
        maximum = torch.maximum(maximum, self.maximum)
        lower = self.maximum - maximum  # how much the earlier terms are now below the maximum, at most 0
        shrink = lower.exp()
        above = logits.sub_(maximum[:, None])  # z − m
        powers = above.exp()  # e
        self.weighted = (self.weighted + lower * self.total) * shrink + torch.linalg.vecdot(powers, above)
        self.total = self.total * shrink + powers.sum(1)
        self.maximum = maximum
        if self.of_total is None:
            return
        if slopes is not None:
            powers = powers.mul_(slopes)
        if self.of_weighted is not None:
            self.of_weighted.add_(lower[:, None] * self.of_total).mul_(shrink[:, None])
            self._add_product(self.of_weighted, powers * above, weights)
        self.of_total.mul_(shrink[:, None])
        self._add_product(self.of_total, powers, weights)

    def _add_product(self, total: Tensor, factors: Tensor, weights: Tensor) -> None:
        """Adds (n, v) @ (v, H) in fp32: rounding every tile to half precision would bias the sum."""
        if weights.dtype != torch.float32 and weights.is_cuda and _HALF_SUMS_IN_FP32:
            # `addmm` would save a pass over the sum, but its first versions refuse a sum in fp32 to half matrices.
            total.add_(torch.mm(factors.to(weights.dtype), weights, out_dtype=torch.float32))
        else:
            # On a CPU without instructions for half precision, such a product takes 30 times as long in bf16.
            total.addmm_(factors, weights.float())

    def result(self, layer: nn.Linear, dtype: torch.dtype) -> TokenSums:
        """What follows from the sums. Gradients have the dtype of the hidden states."""
        log_total = self.total.log()
        mean_above = self.weighted / self.total  # mean of z − m under the distribution
        logprobs = self.target_logits - self.maximum - log_total
        entropies = log_total - mean_above
        if self.of_total is None:
            return TokenSums(logprobs, entropies, None, None)
        factor = self.scale / self.temperature
        mean_weight = self.of_total / self.total[:, None]
        target_weight = layer.weight[self.targets].to(self.hidden.dtype).float()
        if self.softcap is not None:
            share = self.target_logits * self.temperature / self.softcap
            target_weight = target_weight * (1 - share.square())[:, None]
        of_logprobs = (factor * (target_weight - mean_weight)).to(dtype)
        if self.of_weighted is None:
            return TokenSums(logprobs, entropies, of_logprobs, None)
        # With p = e / Σ e: dH/dz = −p·(log p + H) = −p·(z − m − mean of z − m).
        spread = self.of_weighted / self.total[:, None] - mean_above[:, None] * mean_weight
        return TokenSums(logprobs, entropies, of_logprobs, (-factor * spread).to(dtype))
