"""Compares a tokenizer with the rows of a model, and with the tokenizer of another model."""

from collections.abc import Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from .embeddings import n_rows


def check_special_tokens(
    option: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    *,
    stop_ids: Iterable[int] = (),
    stop_option: str = "stop_token_ids",
) -> None:
    """Raises `UserError` if the model has no row for the tokens that every run needs: pad, eos and further stop tokens.

    A tokenizer that is longer than the embedding is not refused as such: some models ship one whose last tokens are
    never used.

    Args:
        option: name of the argument that the tokenizer comes from, for the message.
        tokenizer: the tokenizer.
        model: the model.
        stop_ids: ids of further stop tokens.
        stop_option: name of the option that they come from.
    """
    rows = n_rows(model)
    for kind, token_id in (("pad", tokenizer.pad_token_id), ("eos", tokenizer.eos_token_id)):
        if token_id is None or token_id < rows:
            continue
        remedy = f"call model.resize_token_embeddings({token_id + 1}) before the adapter is attached"
        if kind == "pad":
            remedy += ", or set another pad token (tokenizer.pad_token = tokenizer.eos_token)"
        else:
            remedy += ", or set the stop token that the model was trained with"
        raise UserError(
            f"{option}: {_named(tokenizer, token_id)}, the {kind} token, has no row in the model, which has {rows}: "
            f"{remedy}."
        )
    for token_id in stop_ids:
        if not 0 <= token_id < rows:
            raise UserError(
                f"{stop_option}: the model has rows for {rows} tokens and cannot emit {_named(tokenizer, token_id)}: "
                "leave it out, or call model.resize_token_embeddings."
            )


def check_token_ids(where: str, ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raises `UserError` if a text has a token for which the model has no row.

    Args:
        where: which text it is, for the message.
        ids: its token ids.
        tokenizer: the tokenizer.
        rows: number of tokens for which the model has a row, see `n_rows`.
    """
    largest = max(ids, default=0)
    if largest >= rows:
        raise UserError(
            f"{where} has {_named(tokenizer, largest)}, but the model has rows for {rows} tokens: call "
            f"model.resize_token_embeddings({largest + 1}) before the adapter is attached and train the new rows, or "
            "use the tokenizer of the model."
        )


def other_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str | None:
    """How two tokenizers differ, in a few words; `None` if a model can read the token ids of the other.

    Only ids that both have are compared. Added tokens may differ, as chat formats name reserved tokens.

    Args:
        first: one tokenizer.
        second: the other.
    """
    added = set(first.added_tokens_decoder) | set(second.added_tokens_decoder)
    tokens = {token_id: token for token, token_id in second.get_vocab().items()}
    for token, token_id in first.get_vocab().items():
        if token_id in added or token_id not in tokens or tokens[token_id] == token:
            continue
        return f"token {token_id} is {tokens[token_id]!r} instead of {token!r}"
    return None


def _named(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    token = tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < len(tokenizer) else None
    return f"token {token_id}" if token is None else f"token {token!r} ({token_id})"
