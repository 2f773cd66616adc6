"""Scores of a batch by a sequence-classification model, at the last token, in fp32, also inside DDP and PEFT."""

from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..modeling.adapters import bare_model
from ..modeling.families import check_reward_model
from ..modeling.heads import is_encoder
from ..modeling.layouts import Layout
from ..modeling.logprobs import captured_hidden_states
from ..modeling.prefix import model_inputs


def score_head(model: nn.Module) -> nn.Module:
    """Returns the head of a sequence-classification model: `score` in decoders, `classifier` in encoders.

    Raises:
        UserError: if the model has no such head.
    """
    base = bare_model(model)
    check_reward_model(base)
    name = "classifier" if is_encoder(base) else "score"
    head = getattr(base, name, None)
    if not isinstance(head, nn.Module):
        raise UserError(
            f"model: {type(base).__name__} has no `score` or `classifier` head: load it with load_base_model(..., "
            "task='reward'), or pass a sequence-classification model that has one, such as Llama, Qwen or BERT."
        )
    return head


def check_one_output(model: nn.Module) -> None:
    """Raises `UserError` unless the model is a sequence-classification model with one label.

    Args:
        model: the model, also inside DDP or PEFT.
    """
    head = score_head(model)
    outputs = getattr(head, "out_features", None)
    if outputs is None:  # an encoder's head of several layers, or a copy of the head in PEFT's wrapper
        outputs = bare_model(model).config.num_labels
    if outputs != 1:
        raise UserError(f"model: its score head has {outputs} outputs: load it with num_labels=1.")


def score_batch(
    model: nn.Module,
    batch: dict[str, Tensor],
    head: nn.Module | None = None,
    *,
    layout: Layout | None = None,
) -> Tensor:
    """Scores a batch of `DataCollatorForComparisons`, in either layout.

    Args:
        model: sequence-classification model with one label, also inside DDP or PEFT.
        batch: batch with N completions.
        head: score head for the hidden states of a causal LM; `None` means the head of `model`.
        layout: how the model computes the layout `"shared_prefix"`: `MASK` or `SEGMENTS`; `None` means as its attention
            is set.

    Returns:
        (N,) fp32 raw scores.
    """
    if "segments" not in batch:
        return score_sequences(model, batch["input_ids"], batch["attention_mask"], head)
    inputs = model_inputs(model, batch, layout)
    if head is None:
        scores = _scores_by_position(model, inputs)  # (R, L)
    else:
        scores = _scores_of_head(model, inputs, head)
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
        logits, outputs = _classify(model, inputs)
        if outputs.dim() < 3:
            return logits.float().squeeze(-1)
        scores = outputs.float().squeeze(-1)  # a decoder whose head is called `classifier`, such as CTRL
    elif head is None:
        scores = _scores_by_position(model, inputs)
    else:
        scores = _scores_of_head(model, inputs, head)
    # (N, L), or (N, virtual + L) with prompt tuning, which puts virtual tokens before every row.
    n_virtual = scores.shape[1] - input_ids.shape[1]
    last = attention_mask.sum(1) - 1 + n_virtual
    return scores.gather(1, last[:, None]).squeeze(1)


def _scores_of_head(model: nn.Module, inputs: dict[str, Any], head: nn.Module) -> Tensor:
    """The output (N, L) of a score head for the hidden states of a causal LM at every position."""
    with captured_hidden_states(model) as captured:
        model(**inputs, use_cache=False)
    return head(captured[-1]).squeeze(-1)


def _scores_by_position(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The output of the score head at every position, (N, L) fp32."""
    _, outputs = _classify(model, inputs | {"use_cache": False})
    return outputs.squeeze(-1)


def _classify(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The logits (N, 1) of the model, and the output of its head: (N, L, 1) in decoders, (N, 1) in encoders."""
    outputs: list[Tensor] = []
    # A hook reads the output of the head inside the forward pass of the wrapped model. Calling the backbone directly
    # would bypass DDP.
    hook = score_head(model).register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    return logits, outputs[-1]
