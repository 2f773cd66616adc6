"""Whether a model computes the same for a prompt with and without padding on its left.

Padding on the right, which scoring and training use, needs no check: the tokens of a causal model read only what is
before them.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from .cache_name import virtual_tokens_in_generate
from .probing import unchanged_random_state
from .quantization import each_token_alone

_MAX_TOKENS = 8  # tokens of the prompt that is checked, and of its padding

_ROUNDING = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""By dtype: the distance of two distributions, from 0 to 1, that another length of the same row explains."""

_SAME_SHAPE_ROUNDING = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.02}
"""The same for two rows of the same length whose padding differs. It is 0 but for mixtures of experts."""


@torch.no_grad()
def reads_left_padding(
    model: nn.Module, ids: list[int], config: GenerationConfig, *, width: int, dtype: torch.dtype
) -> bool:
    """Whether `generate` gives another distribution for a prompt if it is padded on the left, in spite of the mask.

    Some recurrent models, such as RecurrentGemma, read the padding. Some decoders count positions from the first column
    of the batch. With prompt tuning, P-tuning and prefix tuning, the virtual tokens are put before the padding. The
    random state and the mode of the model do not change.

    Args:
        model: a causal LM in eval mode, also inside PEFT.
        ids: token ids of a prompt. Its last tokens are checked.
        config: generation config with the pad token.
        width: maximum length with padding, more than `len(ids)`.
        dtype: dtype in which the model computes, which determines the tolerance.
    """
    ids = ids[-_MAX_TOKENS:]
    n_pads = min(width - len(ids), _MAX_TOKENS)
    pad = config.pad_token_id
    alone = _next_token_probabilities(model, [], ids, config)
    padded = _next_token_probabilities(model, [pad] * n_pads, ids, config)
    padded_otherwise = _next_token_probabilities(model, [_other_token(ids, pad)] * n_pads, ids, config)
    padding_matters = _distance(alone, padded) > _ROUNDING.get(dtype, _ROUNDING[torch.bfloat16])
    same_shape_limit = _SAME_SHAPE_ROUNDING.get(dtype, _SAME_SHAPE_ROUNDING[torch.bfloat16])
    token_of_padding_matters = _distance(padded, padded_otherwise) > same_shape_limit
    return padding_matters or token_of_padding_matters


def _other_token(ids: list[int], pad: int) -> int:
    """The first token of a prompt that is not the pad token; the pad token if there is no other one."""
    for token in ids:
        if token != pad:
            return token
    return pad


def _next_token_probabilities(model: nn.Module, padding: list[int], ids: list[int], config: GenerationConfig) -> Tensor:
    """(V,) probabilities of the token after `ids` with padding on its left, as `generate` computes them."""
    device = next(model.parameters()).device
    input_ids = torch.tensor([padding + ids], device=device)
    attention_mask = torch.tensor([[0] * len(padding) + [1] * len(ids)], device=device)
    config = copy.deepcopy(config)
    config.max_new_tokens = 1
    config.min_new_tokens = None  # it would be more than the one token, of which Transformers warns
    config.min_length = 0
    # The logits of the model itself, before processors such as the one that forces the last token to end the text.
    config.output_logits = True
    config.return_dict_in_generate = True
    with unchanged_random_state(device), each_token_alone(model), virtual_tokens_in_generate(model):
        output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
    return output.logits[0][0].float().softmax(-1)


def _distance(p: Tensor, q: Tensor) -> float:
    """Total variation distance of two distributions (V,), from 0 to 1."""
    return float(0.5 * (p - q).abs().sum())
