"""A test before training: whether the scores of an encoder depend on the padding of its batch."""

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..modeling.adapters import bare_model
from ..modeling.heads import is_encoder
from ..modeling.layouts import probe_config
from ..modeling.probing import probing
from .scores import score_sequences


def check_ignores_padding(model: nn.Module) -> None:
    """Refuses an encoder whose scores depend on the length of the other rows of a batch.

    Some encoders read the padding in spite of the attention mask, such as FNet, which has none, and ConvBERT, whose
    convolutions reach over the end of a text. A decoder reads nothing after a token and needs no test.

    Args:
        model: the reward model, also inside PEFT. The random state and the mode of the model do not change.

    Raises:
        UserError: if the scores of a text differ by more than 0.1 percent with padding.
    """
    base = bare_model(model)
    if not is_encoder(base):
        return
    device = next(model.parameters()).device
    config = base.config.get_text_config()
    vocabulary = min(getattr(config, "vocab_size", None) or 1000, 1000)
    ids = torch.randint(vocabulary, (4, 8), generator=torch.Generator().manual_seed(0)).to(device)
    with probe_config(config), probing(model):
        alone = score_sequences(model, ids, torch.ones_like(ids))
        padded = score_sequences(model, *_padded(ids, config.pad_token_id))
    difference = float((padded - alone).abs().max())
    if not difference <= 1e-3 * float(alone.abs().max()):
        raise UserError(
            f"model: the scores of {type(base).__name__} depend on the padding of a batch (by {difference:.2g} in a "
            "test): choose an encoder that does not read padding, such as BERT, RoBERTa, DeBERTa or ModernBERT."
        )


def _padded(ids: Tensor, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (N, 2 L) and attention mask (N, 2 L) of rows (N, L) with L padding tokens on the right."""
    padding = torch.full_like(ids, pad_token_id)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], dim=1)
    return torch.cat([ids, padding], dim=1), mask
