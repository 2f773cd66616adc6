"""Loads a checkpoint only if every weight of the model is in it."""

import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..errors import UserError

HEAD_NAMES = frozenset({"score", "classifier"})
"""Names of the head in sequence-classification models."""

logger = logging.getLogger(__name__)

_REPORT_LOGGER = logging.getLogger("transformers.modeling_utils")

_LOOKS_LIKE_A_HEAD = ("score", "head", "classifier", "reward", "value", "summary", "regress", "rank")
_LANGUAGE_HEADS = ("lm_head", "embed_out", "output_layer", "cls", "generator", "vision", "visual", "mtp")
"""First parts of names of other parts that a checkpoint may hold beside the backbone; they are no score head."""

MayLack = Literal["head"] | Collection[str]


def load_complete(auto_class: type, path: str, *, name: str, may_lack: MayLack = (), **options: Any) -> PreTrainedModel:
    """Loads a model, and refuses it if weights are missing or have another shape, as these would be drawn at random.

    The table in which Transformers lists such weights is logged only if the model is loaded, and only for weights that
    the model does not use.

    Args:
        auto_class: `AutoModelForCausalLM`, `AutoModelForSequenceClassification`, or the class of a model.
        path: local folder or Hub id.
        name: name of the model, for messages.
        may_lack: weights that may be missing: `"head"` for every layer beside the backbone and for the pooler of an
            encoder, which are new where a reward model is trained; or names of weights, such as those that an adapter
            brings.
        options: further arguments of `from_pretrained`.

    Raises:
        UserError: if weights are missing or have another shape, if a file is incomplete, or if a reward model is loaded
            as a language model.
    """
    with _held_reports() as reports:
        try:
            model, loaded = auto_class.from_pretrained(
                path,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, in one line
                **options,
            )
        except SafetensorError as error:
            raise UserError(
                f"{name}: a file of weights is damaged or incomplete ({error}): download or save the model again."
            ) from error
        except RuntimeError as error:
            if not reports:  # not a problem of the weights, such as too little memory
                raise
            raise UserError(
                f"{name}: Transformers cannot convert these weights: check quantization_config, and that the "
                "checkpoint was written for this class of models."
            ) from error
    unexpected = sorted(loaded["unexpected_keys"])
    _refuse_other_shapes(name, loaded["mismatched_keys"])
    missing = sorted(loaded["missing_keys"], key=lambda key: (not is_head(key), key))
    _refuse_missing(name, model, missing, unexpected, may_lack)
    if not hasattr(model, "score") and not hasattr(model, "classifier"):
        _refuse_classifier(name, unexpected)
    else:
        _check_unused_heads(name, model, unexpected, may_lack)
    if any(key.startswith(f"{model.base_model_prefix}.") for key in unexpected):
        for record in reports:  # parts of the backbone are not used: this may be another architecture
            _REPORT_LOGGER.handle(record)
    return model


@contextmanager
def _held_reports() -> Iterator[list[logging.LogRecord]]:
    """Inside the context, the reports of Transformers about missing and unused weights are held back."""
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        if "LOAD REPORT" in str(record.msg):
            held.append(record)
            return False
        return True

    _REPORT_LOGGER.addFilter(hold)
    try:
        yield held
    finally:
        _REPORT_LOGGER.removeFilter(hold)


def _refuse_other_shapes(name: str, mismatched: Iterable[tuple]) -> None:
    for key, stored, wanted in sorted(mismatched):
        remedy = "the folder is not complete or not of this model"
        if is_head(key):
            remedy = "give a model with one label (num_labels=1), or the base that it was trained from"
        raise UserError(
            f"{name}: the checkpoint has {key!r} in the shape {tuple(stored)}, but {tuple(wanted)} is needed: {remedy}."
        )


def _refuse_missing(name: str, model: PreTrainedModel, missing: list[str], unexpected: list[str], may_lack) -> None:
    if may_lack == "head":
        lost = [key for key in missing if not _is_new_layer(model, key)]
    else:
        lost = [key for key in missing if key not in may_lack]
    if not lost:
        return
    problem = f"{name}: the checkpoint lacks {listed_keys(lost)}, which would be drawn at random"
    heads = _heads_beside(model, unexpected)
    if heads:
        problem += f"; it has {listed_keys(heads)} instead"
    raise UserError(f"{problem}: {_remedy(model, lost)}")


def _remedy(model: PreTrainedModel, lost: list[str]) -> str:
    if hasattr(model, "score") or hasattr(model, "classifier"):
        if any(_is_new_layer(model, key) for key in lost):
            return "give a trained reward model, as BradleyTerryTrainer saves it."
    elif all(not key.startswith(f"{model.base_model_prefix}.") for key in lost):
        return "give a causal language model, whose output head is in the checkpoint."
    return "the folder is not complete: download or save the model again."


def _refuse_classifier(name: str, unexpected: list[str]) -> None:
    """Refuses a reward model as a language model. With tied embeddings, no weight is missing then."""
    heads = [key for key in unexpected if key.split(".")[0] in HEAD_NAMES]
    if heads:
        raise UserError(
            f"{name}: is a reward model or classifier ({listed_keys(heads)} in the checkpoint), not a language model: "
            "give a causal language model, or load it with task='reward'."
        )


def _check_unused_heads(name: str, model: PreTrainedModel, unexpected: list[str], may_lack: MayLack) -> None:
    """Refuses a trained reward model if parts of its head are not used, and warns where a new head is trained."""
    unused = _heads_beside(model, unexpected)
    if may_lack == "head" and unused:
        logger.warning("%s: the checkpoint has %s, which this model does not use.", name, listed_keys(unused))
    of_head = [key for key in unused if is_head(key)]
    if not may_lack and of_head:
        raise UserError(
            f"{name}: the checkpoint has {listed_keys(of_head)}, which a {type(model).__name__} does not use, so that "
            "scores would differ: load it with its own class, and pass the model."
        )


def _is_new_layer(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight belongs to a layer that a checkpoint of the backbone alone does not have."""
    return not key.startswith(f"{model.base_model_prefix}.") or ".pooler." in key


def is_head(key: str) -> bool:
    """Whether a weight with this name belongs to the head of a sequence-classification model."""
    return not HEAD_NAMES.isdisjoint(key.split("."))


def _heads_beside(model: PreTrainedModel, unexpected: list[str]) -> list[str]:
    """Those weights beside the backbone that may be a score head with another name."""
    backbone = f"{model.base_model_prefix}."
    return [key for key in unexpected if not key.startswith(backbone) and may_be_head(key)]


def may_be_head(key: str) -> bool:
    """Whether a weight beside the backbone may belong to a score head, by its name."""
    if key.startswith(_LANGUAGE_HEADS):
        return False
    return any(word in key.lower() for word in _LOOKS_LIKE_A_HEAD)


def listed_keys(keys: list[str]) -> str:
    """The first two names of weights, and how many more there are, for a message."""
    shown = ", ".join(repr(key) for key in keys[:2])
    if len(keys) > 2:
        shown += f" and {len(keys) - 2} more"
    return shown
