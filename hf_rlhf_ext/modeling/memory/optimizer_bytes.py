"""Bytes of an optimizer's state, and of what its step needs beside it."""

from dataclasses import dataclass

_STATES = {
    "adamw": 2,
    "adam": 2,
    "lion": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "sgd": 0,
    "ademamix": 3,
    "nadamw": 2,
    "radam": 2,
}
"""Numbers that an optimizer keeps for each weight."""

_SMALL = 4096
"""Tensors of fewer weights stay in 32 bits in the 8-bit optimizers of bitsandbytes."""

_BLOCK = 256
"""Weights of the 8-bit optimizers that share a scale in fp32."""


@dataclass(frozen=True)
class OptimizerBytes:
    """What an optimizer needs.

    Attributes:
        state: bytes that are kept from step to step.
        step: bytes that only a step needs.
        is_paged: whether the state may lie in the memory of the host while there is no step.
        is_known: whether the optimizer is one of those whose state is computed here; others are taken as AdamW.
    """

    state: int
    step: int
    is_paged: bool = False
    is_known: bool = True


def optimizer_bytes(name: str, sizes: list[tuple[int, int]], device: str) -> OptimizerBytes:
    """Computes what an optimizer needs for the trained weights.

    Args:
        name: as `optim` of `TrainingArguments`, such as `adamw_torch_fused` or `paged_adamw_8bit`.
        sizes: number of weights of each trained tensor, and bytes of one of them.
        device: `cuda` or `cpu`.
    """
    if "adafactor" in name:  # a row and a column instead of a matrix
        return OptimizerBytes(state=_factored(sizes), step=_largest(sizes))
    kind, is_known = _kind(name)
    if "8bit" in name:
        state = sum(_bytes_in_8_bits(n, kind) for n, _ in sizes)
        return OptimizerBytes(state, step=0, is_paged="paged" in name, is_known=is_known)
    state = sum(kind * n * (4 if "bnb" in name or "paged" in name else size) for n, size in sizes)
    step = 0
    if "fused" not in name and "bnb" not in name and "paged" not in name:
        # Without a fused kernel, all weights are stepped together on CUDA, and one after the other on a CPU.
        step = sum(n * size for n, size in sizes) if device == "cuda" else 2 * _largest(sizes)
    return OptimizerBytes(state, step, is_paged="paged" in name, is_known=is_known)


def _kind(name: str) -> tuple[int, bool]:
    """Numbers for each weight, and whether the optimizer is known."""
    for known in sorted(_STATES, key=len, reverse=True):
        if known in name:
            return _STATES[known], True
    return _STATES["adamw"], False


def _bytes_in_8_bits(n: int, kind: int) -> int:
    if n < _SMALL:
        return 4 * kind * n
    return kind * (n + 4 * -(-n // _BLOCK))


def _largest(sizes: list[tuple[int, int]]) -> int:
    return max((n * size for n, size in sizes), default=0)


def _factored(sizes: list[tuple[int, int]]) -> int:
    return sum(int(2 * n**0.5) * size for n, size in sizes)
