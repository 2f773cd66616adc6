"""The tokenizer of the base for a model whose folder has none, so that a repository can be used as it is."""

import logging
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from ..errors import UserError, first_line
from .hub_names import is_local, public_base

logger = logging.getLogger(__name__)


def files_of_base_tokenizer(
    folder: Path, base: str | None, revision: str | None = None, token: str | None = None
) -> dict[str, bytes]:
    """Returns the files of the tokenizer of a base, and logs whose they are.

    Args:
        folder: Folder of the model without a tokenizer, for messages.
        base: Hub id, folder or embedded model of the base, as the run recorded it. None if it is not known.
        revision: Branch, tag or commit of the base.
        token: Access token; the default is `HF_TOKEN` or the token stored by `hf auth login`.

    Returns:
        Name -> content. Empty if the Hub cannot be asked for the base now, which is logged.

    Raises:
        UserError: There is no base, or it has no tokenizer either.
    """
    save_it = f"save it beside the model (tokenizer.save_pretrained({str(folder)!r}))"
    if base is None:
        raise UserError(f"push: {folder} holds no tokenizer, and no base to take it from: {save_it}, and push again.")
    shown = public_base(base) or Path(base).name
    try:
        files = _saved_tokenizer(base, revision, token)
    except Exception as error:  # no network, no repository, no access, no tokenizer
        if is_local(base) or _is_readable(base, revision, token):
            raise UserError(
                f"push: neither {folder} nor its base {shown} holds a tokenizer ({first_line(error)}): {save_it}, and "
                "push again."
            ) from error
        logger.warning(
            "%s holds no tokenizer, and the base %s cannot be read now: pushed without one. To add it, %s, and push "
            "again.",
            folder,
            shown,
            save_it,
        )
        return {}
    logger.warning("%s holds no tokenizer: that of the base %s is pushed with it.", folder, shown)
    return files


def _saved_tokenizer(base: str, revision: str | None, token: str | None) -> dict[str, bytes]:
    from transformers import AutoTokenizer  # imported late, as an ordinary push needs no Transformers

    from ..modeling.locations import resolve_location

    path, location = resolve_location(base, revision)
    tokenizer = AutoTokenizer.from_pretrained(path, **location, token=token)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        found = [path for path in Path(scratch).rglob("*") if path.is_file()]
        return {path.relative_to(scratch).as_posix(): path.read_bytes() for path in sorted(found)}


def _is_readable(base: str, revision: str | None, token: str | None) -> bool:
    """True if the Hub has the base, so that it is known what the base lacks."""
    try:
        HfApi(token=token).model_info(base, revision=revision)
    except Exception:  # no network, no repository, no access
        return False
    return True
