"""The prompts of `hf-rlhf generate`."""

from dataclasses import dataclass, field
from typing import Any

from hf_rlhf_ext.data.media import refuse_media_columns
from hf_rlhf_ext.data.templates import TEMPLATE_COLUMNS
from hf_rlhf_ext.data.text import Messages, is_text, plain_text
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.readers.prompts import load_prompts


@dataclass(frozen=True)
class PromptRow:
    """A prompt of a file.

    Attributes:
        number: its row in the file, from 0.
        prompt: text or messages.
        columns: columns of the row that the chat template reads.
        all_columns: all columns of the row, for reward functions.
    """

    number: int
    prompt: str | Messages
    columns: dict[str, Any]
    all_columns: dict[str, Any] = field(default_factory=dict, repr=False)


def read_prompts(source: str, split: str, columns: dict[str, Any] | None, n_prompts: int | None) -> list[PromptRow]:
    """Reads prompts, and prints what was read.

    Args:
        source: file, folder or Hub id.
        split: split of the source.
        columns: which column has which role; `None` for the column `prompt`.
        n_prompts: number of prompts from the first; `None` for all.

    Raises:
        UserError: the source cannot be read, has no prompts, or a row has a prompt that is neither text nor messages.
    """
    try:
        rows, report = load_prompts(source, split, columns=columns)
    except UserError as error:
        raise UserError(f"prompts: {str(error).removeprefix('dataset: ')}") from error
    print(report.summary())
    refuse_media_columns(rows, where=f"prompts: {source}")
    if n_prompts is not None:
        rows = rows.select(range(min(n_prompts, len(rows))))
    prompts = []
    for number, row in enumerate(rows):
        prompt = row["prompt"]
        if not is_text(prompt) or not plain_text(prompt).strip():
            raise UserError(f"prompts: row {number} of {source} has no prompt of text or messages: fix or drop it.")
        of_template = {name: row[name] for name in TEMPLATE_COLUMNS if row.get(name) is not None}
        prompts.append(PromptRow(number, prompt, of_template, dict(row)))
    return prompts
