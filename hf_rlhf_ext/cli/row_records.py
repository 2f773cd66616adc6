"""What a run leaves about its rows: a file of the held-out ones, and digests of the prompts that were trained on."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import hf_hub_download

from ..collect.tasks import write_rows
from ..data.json_columns import RowsWithoutFill
from ..data.schema import without_missing
from ..errors import UserError, first_line
from .lineage import lineage_of
from .options import DataArguments
from .rows import prompt_of

HELDOUT_FILE = "heldout.jsonl"
TRAINED_FILE = "trained_prompts.txt"
"""File with a digest of each prompt that was trained on, one a line. Neither file is ever pushed."""


@dataclass(frozen=True)
class RowRecord:
    """The rows of a run as they were read, for its folder and its report."""

    data: DataArguments
    train: Dataset
    heldout: Dataset

    def write(self, folder: str | Path, *, is_first_process: bool = True, with_digests: bool = False) -> dict[str, Any]:
        """Writes `heldout.jsonl`, if rows were held out, and returns the report's part.

        Args:
            with_digests: whether to write `trained_prompts.txt` too, for a model that is checked on rows later.
        """
        folder = Path(folder)
        held_out = folder / HELDOUT_FILE
        if is_first_process:
            held_out.unlink(missing_ok=True)  # of an earlier run
            if with_digests:
                digests = sorted(prompt_digests(self.train))
                (folder / TRAINED_FILE).write_text("".join(f"{digest}\n" for digest in digests), encoding="ascii")
            if len(self.heldout):
                _write_heldout(self.heldout, held_out)
        rows: dict[str, Any] = {
            "source": lineage_of(self.data.dataset_name, self.data.dataset_revision, dataset=True),
            "train": len(self.train),
            "heldout": len(self.heldout),
        }
        return {"rows": rows}


def _write_heldout(rows: Dataset, path: Path) -> None:
    """Writes the held-out rows, without the None that Arrow fills in."""
    try:
        write_rows(map(without_missing, RowsWithoutFill(rows)), path)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        print(f"{path.name} is not written, as JSON cannot hold a value of the rows: {first_line(error)}")


def prompt_digests(rows: Dataset) -> set[str]:
    """16 hexadecimal digits of a SHA-256 for each prompt. White space makes no difference."""
    return {digest_of(row) for row in RowsWithoutFill(rows.select_columns(_columns_of_prompt(rows)))}


def digest_of(row: dict[str, Any]) -> str:
    """The digest of the prompt of a row; of rows without a prompt, that of the whole row."""
    return hashlib.sha256(prompt_of(row).encode("utf-8", errors="replace")).hexdigest()[:16]


def _columns_of_prompt(rows: Dataset) -> list[str]:
    for name in ("prompt", "messages"):
        if name in rows.column_names:
            return [name]
    return rows.column_names


def trained_prompts(model: str) -> set[str] | None:
    """The digests in the folder of a model, or of the run that a checkpoint is in; None if there are none."""
    folder = Path(model).expanduser()
    for place in (folder, folder.parent):
        file = place / TRAINED_FILE
        if place != folder and not folder.name.startswith("checkpoint-"):
            break
        if file.is_file():
            return set(file.read_text(encoding="ascii", errors="replace").split())
    return None


def was_trained_on(model: str, data: DataArguments) -> bool:
    """Whether the report of a model names this file or dataset as what it was trained on. False without a report."""
    try:
        file = Path(model).expanduser() / "report.json"
        if not file.is_file():
            file = Path(hf_hub_download(model, "report.json"))
        source = json.loads(file.read_text(encoding="utf-8"))["card"]["lineage"]["comparisons"]
    except Exception:  # no file, no network, no id on the Hub, or another kind of report
        return False
    asked = lineage_of(data.dataset_name, dataset=True)
    digest = re.search(r"sha256 (\w+)", asked)
    if digest is not None:
        return digest[1] in source
    # Two splits of one dataset on the Hub are different rows.
    return data.dataset_test_split is None and source.partition("@")[0] == asked
