"""The reward models of a comparison: their names, and a digest of what their scores depend on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.hub.run_files import content_digest
from hf_rlhf_ext.modeling.source import public_name
from hf_rlhf_ext.reward.scorer import local_folder

SMALL_FILES = (
    "adapter_config.json",
    "base_record.json",
    "chat_template.jinja",
    "config.json",
    "ensemble.json",
    "prompt_form.json",
    "reward_normalization.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""Files of a reward model, beside its weights, that its scores depend on."""


@dataclass(frozen=True)
class Candidate:
    """A reward model to measure.

    Attributes:
        name: Name in tables and in the report.
        location: Folder or Hub id.
    """

    name: str
    location: str

    @property
    def folder(self) -> Path | None:
        """The folder of a local reward model. None for one on the Hub."""
        path = Path(self.location).expanduser()
        return path if path.is_dir() else None


def name_models(words: Sequence[str]) -> list[Candidate]:
    """Names reward models: as in `NAME=MODEL`, else by their Hub id or the last parts of their path that differ.

    Raises:
        UserError: Two have the same name, or are the same model.
    """
    models = []
    for word in words:
        name, equals, location = word.partition("=")
        if equals and not Path(word).expanduser().exists():
            if not location:
                raise UserError(f"reward_model: {word} names no model: give NAME=FOLDER.")
            models.append(Candidate(name, location))
        else:
            models.append(Candidate("", word))
    locations = [model.location for model in models]
    named = [Candidate(model.name or _shortest_name(model.location, locations), model.location) for model in models]
    names = [model.name for model in named]
    for name in names:
        if not name:
            raise UserError("reward_model: an entry names no model: give NAME=FOLDER, or a folder or Hub id.")
        if names.count(name) > 1:
            raise UserError(
                f"reward_model: two reward models are called {name!r}: name them (--reward_model a=FOLDER)."
            )
    return named


def _shortest_name(location: str, locations: Sequence[str]) -> str:
    """The last component of a path, with as many before it as tell it from the others."""
    if not Path(location).expanduser().exists():
        return location
    parts = Path(location).expanduser().resolve().parts
    others = [Path(other).expanduser().resolve().parts for other in locations if other != location]
    for n in range(1, len(parts)):
        if not any(other[-n:] == parts[-n:] for other in others):
            return "/".join(parts[-n:])
    return public_name(location)


def model_digest(location: str, *, trust_remote_code: bool = False) -> str:
    """16 digits of a SHA-256 over the weights of a reward model and the other files that its scores depend on."""
    folder = local_folder(location, None, code=trust_remote_code)
    digest = hashlib.sha256(content_digest(folder).encode())
    for path in sorted(folder.rglob("*")):
        if path.name in SMALL_FILES and not any(part.startswith("checkpoint-") for part in path.parts):
            digest.update(str(path.relative_to(folder)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
