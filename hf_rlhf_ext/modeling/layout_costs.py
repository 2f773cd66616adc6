"""What a layout costs: an estimate of the work of plain rows, of rows with a mask, and of attention by segments.

The unit is a multiply-add of a linear layer. Attention is counted in pairs of a query and a key, and a pair takes
`2 · heads · size of a head` multiply-adds in each layer, which take `PAIR_FACTOR` times as long as those of a linear
layer.

The constants were measured on one core of an x86 server CPU with PyTorch 2.13, forward and backward passes in fp32:
SDPA with (8, 203), (8, 512), (2, 1024), (1, 2048) and (1, 4112) rows and tokens against the linear layers of a layer,
for 4 heads of 32, 9 of 64 and 16 of 128. With a dense mask, a pair took 1.5 to 2.8 times the multiply-adds of a linear
layer at any length, about 2. Without a mask (`is_causal=True`), rows of up to 512 tokens took the same, and longer ones
approached half of it, as blocks of 512 keys that no query sees are skipped.

Check on whole models: for a Llama with 3 layers of 576 units and 9 heads, and prompts of P tokens with K completions of
T, seconds of a training step relative to plain rows were, measured and estimated:

| P, K, T | mask | segments |
|---|---|---|
| 155, 4, 48 | 0.46, 0.46 | 0.41, 0.43 |
| 16, 32, 128 | 2.59, 3.00 | 0.94, 0.90 |
| 512, 4, 128 | 0.49, 0.48 | 0.42, 0.41 |
| 512, 9, 64 | 0.25, 0.26 | 0.19, 0.22 |
| 16, 2, 64 | 0.86, 0.94 | 0.91, 0.91 |

The constants are used on other devices too. There, they may be off, but the masked layout is slower where it has many
times the pairs of plain rows.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ..data.storage import TokenCounts
from .adapters import bare_model
from .packing import Layout
from .prefix import FLEX

PAIR_FACTOR = 2.0
"""Seconds of a multiply-add in attention, as a multiple of those of a linear layer."""

CAUSAL_BLOCK = 512
"""Number of keys that causal attention without a mask computes or skips together."""

COPIED_KEYS = 16
"""The copies of the prompt's keys and values for a completion cost as much as this many more queries."""


@dataclass(frozen=True)
class ModelSizes:
    """What the cost of a model depends on.

    Attributes:
        per_token: multiply-adds of the linear layers for a token.
        per_pair: multiply-adds of attention for a pair of a query and a key, in all layers together.
        skips_hidden: whether attention with a mask skips what no token sees, as FlexAttention does, block by block.
    """

    per_token: int
    per_pair: int
    skips_hidden: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> "ModelSizes":
        """The sizes of a causal LM or a sequence-classification model, also inside PEFT or quantized."""
        base = bare_model(model)
        config = base.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_pair = 2 * config.num_hidden_layers * config.num_attention_heads * size
        head = base.get_output_embeddings()  # it does not see all tokens
        per_token = 0
        for module in base.modules():
            if module is not head and not isinstance(module, nn.Embedding):
                per_token += _multiply_adds(module, config)
        return cls(per_token, per_pair, skips_hidden=config._attn_implementation == FLEX)


def _multiply_adds(module: nn.Module, config: Any) -> int:
    """Multiply-adds of the matrices of a module for a token, without those of the modules inside it."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        if any(True for _ in module.parameters(recurse=False)):  # PEFT's wrapper has the sizes too, but no weight
            return module.in_features * module.out_features  # the weight of a quantized layer is packed
        return 0
    total = 0
    for weight in module.parameters(recurse=False):
        if weight.dim() == 2:
            total += weight.numel()
        elif weight.dim() == 3:  # the experts of a mixture, of which a token passes a few
            n_experts = weight.shape[0]
            total += weight.numel() * min(getattr(config, "num_experts_per_tok", n_experts), n_experts) // n_experts
    return total


class Work(NamedTuple):
    """What is computed in a layout.

    Attributes:
        tokens: number of tokens that pass through the linear layers, padding included.
        pairs: number of pairs of a query and a key that attention computes, hidden ones included.
    """

    tokens: float
    pairs: float

    def cost(self, sizes: ModelSizes) -> float:
        """The work in multiply-adds of linear layers."""
        return self.tokens * sizes.per_token + PAIR_FACTOR * self.pairs * sizes.per_pair


def causal_pairs(length: np.ndarray) -> np.ndarray:
    """Pairs of causal attention without a mask over rows of these lengths, in tokens."""
    return np.minimum(length * (length + CAUSAL_BLOCK) / 2, length**2)


def plain_work(counts: TokenCounts, together: int = 1) -> Work:
    """The work of plain rows: one row per completion, each after its prompt.

    Args:
        counts: the numbers of tokens of G prompts with their completions. Its arrays have an entry per prompt.
        together: number of prompts per batch, in the order of `counts`. Rows are padded to the longest of their batch
            and have a mask then; if all are equally long, attention needs none.
    """
    length = counts.prompt + counts.longest
    n_rows = _sum_of_batches(counts.n_completions, together)
    width = _maximum_of_batches(length, together)
    # Attention needs no mask if nothing is padded.
    tokens = counts.n_completions * counts.prompt + counts.completions
    is_full = _sum_of_batches(tokens, together) == n_rows * width
    pairs = np.where(is_full, causal_pairs(width), width**2)
    return Work(float((n_rows * width).sum()), float((n_rows * pairs).sum()))


def mask_work(counts: TokenCounts, together: int = 1) -> Work:
    """The work of rows `[prompt, y1 … yK]` with a dense mask. Short ones share a row. Arguments as of `plain_work`."""
    length = counts.prompt + counts.completions
    width = _maximum_of_batches(length, together)
    n_rows = np.ceil(_sum_of_batches(length, together) / width)
    return Work(float((n_rows * width).sum()), float((n_rows * width**2).sum()))


def segment_work(counts: TokenCounts) -> Work:
    """The work of attention by segments, in which nothing is padded. `counts` as in `plain_work`.

    A prompt attends to itself, and each completion to the prompt and itself, through a copy of the prompt's keys.
    """
    mean = counts.completions / counts.n_completions  # tokens of a completion
    of_completions = counts.n_completions * (mean + COPIED_KEYS) * (counts.prompt + mean)
    pairs = causal_pairs(counts.prompt) + of_completions
    return Work(float((counts.prompt + counts.completions).sum()), float(pairs.sum()))


def layout_cost(layout: Layout, sizes: ModelSizes, counts: TokenCounts, together: int = 1) -> float:
    """The cost of a layout, in multiply-adds of linear layers. Arguments as of `ModelSizes` and `plain_work`."""
    if layout == Layout.SEGMENTS:
        work = segment_work(counts)
    elif layout == Layout.MASK:
        work = mask_work(counts, together)
        if sizes.skips_hidden:
            work = work._replace(pairs=segment_work(counts).pairs)
    else:
        work = plain_work(counts, together)
    return work.cost(sizes)


class CheaperLayout(NamedTuple):
    """The result of `cheaper_layout`.

    Attributes:
        layout: the cheaper layout.
        ratio: cost of the layout that was asked about, divided by that of plain rows.
    """

    layout: Layout
    ratio: float


def cheaper_layout(
    layout: Layout,
    sizes: ModelSizes,
    counts: TokenCounts,
    together: int = 1,
) -> CheaperLayout:
    """Compares a layout with plain rows.

    Args:
        layout: the best layout that the model supports.
        sizes: sizes of the model.
        counts: numbers of tokens of G prompts with their completions, such as those of a training set. Its arrays have
            an entry per prompt.
        together: number of prompts per batch, in the order of `counts`. It determines the padding.

    Returns:
        The cheaper of `layout` and plain rows, and the ratio of their costs. Without prompts, `layout` and 1.
    """
    if layout == Layout.PLAIN or not len(counts.prompt):
        return CheaperLayout(layout, 1.0)
    ratio = layout_cost(layout, sizes, counts, together) / layout_cost(Layout.PLAIN, sizes, counts, together)
    return CheaperLayout(layout if ratio < 1 else Layout.PLAIN, ratio)


def _sum_of_batches(values: np.ndarray, together: int) -> np.ndarray:
    return np.add.reduceat(values, np.arange(0, len(values), together))


def _maximum_of_batches(values: np.ndarray, together: int) -> np.ndarray:
    return np.maximum.reduceat(values, np.arange(0, len(values), together))
