"""Scores of a batch by a sequence-classification model, at the last token, in fp32, also inside DDP and PEFT."""

from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..modeling.adapters import bare_model
from ..modeling.heads import is_encoder
from ..modeling.logprobs import captured_hidden_states, contiguous_head_inputs
from ..modeling.prefix import model_inputs


def score_head(model: nn.Module) -> nn.Module:
    """Returns the head of a sequence-classification model: `score` in decoders, `classifier` in encoders.

    Raises:
        UserError: if the model has no such head.
    """
    base = bare_model(model)
    name = "classifier" if is_encoder(base) else "score"
    head = getattr(base, name, None)
    if not isinstance(head, nn.Module):
        raise UserError(
            f"model: {type(base).__name__} has no `score` head: load it with load_base_model(..., task='reward'), or "
            "pass a sequence-classification model with num_labels=1."
        )
    return head


def score_batch(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Scores a batch of `DataCollatorForComparisons`, in either layout.

    Args:
        model: sequence-classification model with one label, also inside DDP or PEFT.
        batch: batch with N completions.

    Returns:
        (N,) fp32 raw scores.
    """
    if "segments" not in batch:
        return score_sequences(model, batch["input_ids"], batch["attention_mask"])
    scores = _scores_by_position(model, model_inputs(model, batch))  # (R, L)
    row, column = batch["score_at"].unbind(1)
    return scores[row, column]


def score_sequences(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, head: nn.Module | None = None
) -> Tensor:
    """Scores sequences at their last token that is not padding.

    The pooling of Transformers is not used: it reads the right-most token that is not `pad_token_id` and ignores the
    mask, which is one token too early if the pad token is the stop token.

    Args:
        model: sequence-classification model with one label, also inside DDP or PEFT.
        input_ids: (N, L) int64, padded on the right.
        attention_mask: (N, L) int64, 1 for tokens and 0 for padding.
        head: score head for the hidden states of a causal LM; `None` means the head of `model`.

    Returns:
        (N,) fp32 raw scores. An encoder returns one score per row itself.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if head is None and is_encoder(bare_model(model)):
        return model(**inputs).logits.float().squeeze(-1)

    if head is None:
        scores = _scores_by_position(model, inputs)
    else:
        with captured_hidden_states(model) as captured, contiguous_head_inputs(model):
            model(**inputs, use_cache=False, logits_to_keep=1)
        scores = head(captured[-1]).squeeze(-1)
    # (N, L), or (N, virtual + L) with prompt tuning, which puts virtual tokens before every row.
    n_virtual = scores.shape[1] - input_ids.shape[1]
    last = attention_mask.sum(1) - 1 + n_virtual
    return scores.gather(1, last[:, None]).squeeze(1)


def _scores_by_position(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The output of the score head at every position, (N, L) fp32."""
    outputs: list[Tensor] = []
    # A hook reads the output of the head inside the forward pass of the wrapped model. Calling the backbone directly
    # would bypass DDP.
    hook = score_head(model).register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return outputs[-1].squeeze(-1)
