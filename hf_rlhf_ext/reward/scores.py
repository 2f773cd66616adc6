"""Scores of a batch by a sequence-classification model: at the right token, in fp32, through any wrapper."""

from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..modeling.adapters import bare_model
from ..modeling.heads import is_encoder
from ..modeling.logprobs import captured_hidden_states, contiguous_head_inputs
from ..modeling.prefix import model_inputs


def score_head(model: nn.Module) -> nn.Module:
    """The module named `score` (decoders) or `classifier` (encoders) of a sequence-classification model."""
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
    """fp32 scores (N,) of a batch of `DataCollatorForComparisons`, in either layout."""
    if "segments" not in batch:
        return score_sequences(model, batch["input_ids"], batch["attention_mask"])
    scores = _scores_by_position(model, model_inputs(model, batch))  # (R, L)
    row, column = batch["score_at"].unbind(1)
    return scores[row, column]


def score_sequences(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, head: nn.Module | None = None
) -> Tensor:
    """fp32 scores (N,) of N sequences (N, L), padded on the right, read at each one's last real token.

    Transformers' own pooling takes the right-most token that is not `pad_token_id` and ignores the mask: with
    pad == eos it reads one token early. So a hook takes the score of every position, inside `model(...)` (a call of the
    backbone would bypass DDP), and the mask's length says where to read. An encoder gives one score per row itself.
    `head` scores the hidden states of a causal LM, whose base a reward adapter shares with a policy.
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
    # (N, L), or (N, virtual + L): prompt tuning puts its virtual tokens before every row
    n_virtual = scores.shape[1] - input_ids.shape[1]
    last = attention_mask.sum(1) - 1 + n_virtual
    return scores.gather(1, last[:, None]).squeeze(1)


def _scores_by_position(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What the score head gives at every position, (N, L) fp32."""
    outputs: list[Tensor] = []
    # The head sits inside whatever wraps the model (DDP, PEFT): only a hook sees its output there.
    hook = score_head(model).register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return outputs[-1].squeeze(-1)
