"""Texts of a base that its public repository holds: what a run has from there is no leak."""

import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from .privacy import hub_owners
from .scanning.text import find_leaks, strings_in
from .scanning.vocabularies import other_strings

_FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""Files that a run takes over from its base, whole or string by string."""
_MORE_TEMPLATES = "additional_chat_templates/"


def texts_of_base(base_model: str | None, revision: str | None = None, token: str | None = None) -> frozenset[str]:
    """Returns texts in the files of a base, such as its chat template, that would be findings of the leak scanner.

    Args:
        base_model: Hub id of the base.
        revision: Revision of the base that the run was made from; None means its main branch.
        token: Access token; the default is `HF_TOKEN` or the token stored by `hf auth login`.

    Returns:
        Whole files, and strings in JSON files. Empty if the base is only local or private, or cannot be read.
    """
    if not hub_owners(base_model) or Path(str(base_model)).exists():
        return frozenset()
    try:
        info = HfApi(token=token).model_info(str(base_model), revision=revision)
        if info.private:
            return frozenset()
        names = [file.rfilename for file in info.siblings or ()]
        texts = {text for name in names if _is_taken_over(name) for text in _texts(info.id, name, info.sha, token)}
    except Exception:  # no network, no repository, no access: the findings stay, which is safe
        return frozenset()
    return frozenset(text for text in texts if next(find_leaks(text, "x.jinja"), None) is not None)


def _is_taken_over(name: str) -> bool:
    return name in _FILES or name.startswith(_MORE_TEMPLATES)


def _texts(base_model: str, name: str, revision: str | None, token: str | None) -> Iterator[str]:
    path = Path(hf_hub_download(base_model, name, revision=revision, token=token))
    text = path.read_text(encoding="utf-8")
    if name == "tokenizer.json":
        yield from other_strings(name, text)
    elif path.suffix == ".json":
        yield from strings_in(json.loads(text))
    else:
        yield text
