"""Whether the base of an adapter was resized for more tokens, compared with the base of its name."""

import logging
from functools import lru_cache

from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UserError
from .embeddings import n_rows
from .locations import resolve_location

logger = logging.getLogger(__name__)


def was_resized(model: PeftModel, adapter: str) -> bool:
    """Whether the base has another number of tokens than the base that the adapter names.

    Only local files are read: a folder, an unpacked GGUF file, or the cache of the Hub. If the configuration of the
    base is not found there, the answer is yes, with a warning, since rows that are not saved would be lost. A base
    without a name cannot be loaded by it: the answer is no.

    Args:
        model: model with adapters.
        adapter: name of the adapter.
    """
    base: PreTrainedModel = model.get_base_model()
    config = model.peft_config[adapter]
    name = config.base_model_name_or_path or base.name_or_path
    if not name:
        return False
    known = _rows_by_name(name, config.revision, type(base.config))
    if known is not None:
        return n_rows(model) != known
    _warn_of_unknown(name)
    return True


def _rows_by_name(name: str, revision: str | None, config_class: type[PretrainedConfig]) -> int | None:
    """Number of tokens of the base with this name; `None` if it is not known offline."""
    try:
        path, location = resolve_location(name, revision)
        config = config_class.from_pretrained(path, **location, local_files_only=True)
    except (OSError, ValueError, UserError):
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


@lru_cache(maxsize=256)
def _warn_of_unknown(name: str) -> None:
    # Cached, so that it is said once and not at every checkpoint.
    logger.warning(
        "The configuration of the base %s is not found offline, so its embeddings are saved with the adapter, in case "
        "they were resized: load the base from a folder or from the Hub's cache to save small adapters.",
        name,
    )
