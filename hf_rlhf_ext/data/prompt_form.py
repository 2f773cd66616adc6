"""The form that a model was trained on, text or messages, in a file of its folder."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub.errors import HFValidationError
from transformers.utils import cached_file

from ..errors import UserError
from .text import Messages
from .transcripts import style_of

PROMPT_FORM_FILE = "prompt_form.json"
"""File in the folder of a reward model or a policy."""

TEXT, MESSAGES, MIXED = "text", "messages", "mixed"

_REMEMBERED = "_trained_prompt_form"
"""Attribute of a model in memory."""


@dataclass(frozen=True)
class PromptForm:
    """The content of `prompt_form.json`.

    Attributes:
        prompt_form: `"text"`, `"messages"`, or `"mixed"` for a model that was trained on one after the other. `None` if
            it is not known, as of token ids and of a folder that an earlier version wrote.
        chat_template_sha256: SHA-256 of the chat template that rendered the messages; `None` without messages.
    """

    prompt_form: str | None = None
    chat_template_sha256: str | None = None

    @classmethod
    def of(cls, prompt: str | Messages | None, tokenizer) -> Self:
        """The form of data, of which `prompt` is an example.

        It is not known of text that a chat template has rendered already: a model gets the same as of messages.

        Args:
            prompt: Text or messages; `None` for token ids.
            tokenizer: The tokenizer, with its chat template.
        """
        if isinstance(prompt, str):
            style = style_of(prompt)
            return cls() if style is not None and style.is_template else cls(TEXT)
        return cls() if prompt is None else cls(MESSAGES, template_digest(tokenizer))

    def after(self, earlier: Self | None) -> Self:
        """The form of a model that was trained on `earlier` before."""
        if earlier is None or None in (self.prompt_form, earlier.prompt_form):
            return self
        if earlier.prompt_form == self.prompt_form:
            return self
        return PromptForm(MIXED, self.chat_template_sha256 or earlier.chat_template_sha256)

    def other_template(self, tokenizer) -> bool:
        """Whether the tokenizer has another chat template than that of training. False if that is not known."""
        return self.chat_template_sha256 not in (None, template_digest(tokenizer))

    def save(self, folder: str | Path) -> None:
        """Writes `prompt_form.json` into `folder`."""
        (Path(folder) / PROMPT_FORM_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder_or_repo: str | Path, revision: str | None = None) -> Self:
        """Reads the file of a local folder or of a repository on the Hub. The form is `None` if there is none.

        Raises:
            UserError: The file is not what `save` writes.
        """
        path = _file_of(folder_or_repo, revision)
        if path is None:
            return cls()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{name: content.get(name) for name in ("prompt_form", "chat_template_sha256")})
        except (ValueError, AttributeError) as error:  # no JSON, or no object
            raise UserError(f"{path} is no record of a prompt's form: remove it, or save the model again.") from error


def _file_of(folder_or_repo: str | Path, revision: str | None) -> Path | None:
    """The local path of the file; `None` if there is none."""
    folder = Path(folder_or_repo).expanduser()
    if folder.is_dir():
        path = folder / PROMPT_FORM_FILE
        return path if path.is_file() else None
    is_hub_id = isinstance(folder_or_repo, str) and folder_or_repo.count("/") == 1 and folder_or_repo[0].isalnum()
    if not is_hub_id:
        return None
    try:
        path = cached_file(
            folder_or_repo,
            PROMPT_FORM_FILE,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, HFValidationError):  # no such repository, which is said where its weights are loaded
        return None
    return None if path is None else Path(path)


def template_digest(tokenizer) -> str | None:
    """SHA-256 of the chat template of a tokenizer; `None` if it has none."""
    template = tokenizer.chat_template
    if template is None:
        return None
    if not isinstance(template, str):  # several templates by name
        template = json.dumps(template, sort_keys=True)
    template = template.replace("\r\n", "\n")  # as it is read from the file that a tokenizer is saved in
    return hashlib.sha256(template.encode()).hexdigest()


def example_of(dataset: Any, text_field: str = "text") -> str | Messages | None:
    """An example of the data of SFT, for `PromptForm.of`; `None` if its form is not known.

    Args:
        dataset: Rows with `messages`, with `prompt` and `completion`, with text, or with token ids. It may be streamed.
        text_field: Column with text.
    """
    first = next(iter(dataset), {})
    for column in ("messages", "conversations", "prompt", text_field):
        value = first.get(column)
        if isinstance(value, str | list) and "input_ids" not in first:
            return value
    return None


# --- models in memory ------------------------------------------------------------------------------------------------


def remember_form(model: Any, form: PromptForm) -> None:
    """Keeps the form of a model that is loaded or trained, for the trainers that get the model next."""
    setattr(model, _REMEMBERED, form)


def remembered_form(model: Any) -> PromptForm | None:
    """What `remember_form` kept; `None` without it."""
    return getattr(model, _REMEMBERED, None)


def form_of_model(model: Any) -> PromptForm:
    """The form that a model in memory was trained on: what is remembered, or what the folder of its weights records."""
    remembered = remembered_form(model)
    if remembered is not None:
        return remembered
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    is_folder = bool(name) and Path(name).expanduser().is_dir()
    return PromptForm.load(name) if is_folder else PromptForm()
