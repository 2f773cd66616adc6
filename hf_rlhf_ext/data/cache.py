"""Rows that were prepared once: Arrow files in the cache folder of `datasets`, which later starts and processes read.

The name of a folder is a digest of everything its rows depend on, so that a change of any of it is another folder. Rows
are written in batches and memory-mapped, so that memory does not grow with their number.
"""

import gc
import io
import json
import logging
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from typing import Any

import pyarrow as pa
from datasets import Dataset, config, is_caching_enabled
from datasets.fingerprint import Hasher, get_temporary_cache_files_directory
from filelock import FileLock

from ..errors import first_line

logger = logging.getLogger(__name__)

_LIBRARIES = ("transformers", "tokenizers", "datasets", "jinja2")
_OWN_MODULES = ("transformers.", "tokenizers.", "trl.")
RECORDS_BETWEEN_COLLECTIONS = 100_000
"""Python's default is some hundreds or thousands, less than one batch makes. Records have no cycles to be found."""
"""Where a tokenizer's class may be defined: the code of other modules is not part of a digest."""


@dataclass(frozen=True)
class Kept:
    """Prepared rows.

    Attributes:
        rows: The rows, memory-mapped if there is room on disk.
        notes: What is known of them beside the rows themselves, as JSON has it.
    """

    rows: Dataset
    notes: dict[str, Any]


class RowsFile:
    """Takes rows in batches of the same columns and writes them to a file, or to memory."""

    def __init__(self, sink: Any):
        self._sink = sink
        self._writer: pa.RecordBatchStreamWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Adds a batch. All batches have the same schema."""
        if self._writer is None:
            self._writer = pa.ipc.new_stream(self._sink, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


Build = Callable[[RowsFile], dict[str, Any]]
"""Writes rows, and returns the notes on them. It may be called again, if the disk was full."""


def kept(key: str | None, build: Build) -> Kept:
    """Returns the rows that are kept under a key, and builds them if there are none.

    Of several processes, one builds, and the others wait and read. Without a key, or after
    `datasets.disable_caching()`, rows are in a folder that is deleted at the end of the process. If the folder cannot
    be written, they stay in memory.

    Args:
        key: Digest of everything that the rows depend on, see `digest`.
        build: Writes the rows.
    """
    try:
        if key is None or not is_caching_enabled():
            return _built_in(Path(get_temporary_cache_files_directory()), build)
        folder = Path(config.HF_DATASETS_CACHE) / "hf_rlhf_ext" / key
        found = _read(folder)
        if found is not None:
            return found
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            found = _read(folder)  # of a process that was first
            if found is None:
                shutil.rmtree(folder, ignore_errors=True)
                unfinished = _write(Path(mkdtemp(dir=folder.parent, prefix="unfinished-")), build)
                unfinished.rename(folder)  # so that an incomplete folder is never read
                found = _read(folder)
        if found is not None:
            return found
        problem = f"{folder} is incomplete"
    except (OSError, NotImplementedError) as error:  # the latter from a file system that has no locks
        problem = first_line(error)
    logger.warning(
        "The prepared rows are not kept, as the cache cannot be written (%s): make room, or set HF_DATASETS_CACHE to "
        "another folder.",
        problem,
    )
    return _built_in_memory(build)


def _built_in(parent: Path, build: Build) -> Kept:
    folder = _write(Path(mkdtemp(dir=parent)), build)
    found = _read(folder)
    if found is None:
        raise OSError(f"{folder} is incomplete")
    return found


def _write(folder: Path, build: Build) -> Path:
    try:
        with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, _few_collections():
            rows = RowsFile(sink)
            notes = build(rows)
            rows.close()
        (folder / "notes.json").write_text(json.dumps(notes))
    except BaseException:  # also of the user who interrupts it
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _read(folder: Path) -> Kept | None:
    """The rows in a folder; None if it has none, or not all of them."""
    try:
        notes = json.loads((folder / "notes.json").read_text())
        rows = Dataset.from_file(str(folder / "rows.arrow"))
    except (OSError, ValueError, pa.ArrowException):
        return None
    return Kept(rows, notes)


@contextmanager
def _few_collections() -> Iterator[None]:
    """The garbage collector runs less often, and looks only at objects made from here on.

    Every batch makes many records, so that it would often run. Looking at the million objects of the imported libraries
    each time takes a third of all the time that the rows take.
    """
    thresholds = gc.get_threshold()
    freezes = gc.get_freeze_count() == 0  # else the user has frozen objects, which must stay frozen
    gc.set_threshold(RECORDS_BETWEEN_COLLECTIONS, *thresholds[1:])
    if freezes:
        gc.freeze()
    try:
        yield
    finally:
        if freezes:
            gc.unfreeze()
        gc.set_threshold(*thresholds)


def _built_in_memory(build: Build) -> Kept:
    sink = pa.BufferOutputStream()
    rows = RowsFile(sink)
    notes = build(rows)
    rows.close()
    return Kept(Dataset.from_buffer(sink.getvalue()), json.loads(json.dumps(notes)))


# --- keys ------------------------------------------------------------------------------------------------------------


def digest(*parts: Any) -> str:
    """Returns a digest of values that decide on prepared rows, of this library's code, and of the libraries it uses."""
    return Hasher.hash((_code(), parts))


@cache
def _code() -> str:
    """Digest of the code that reads and tokenizes rows: any change of it is a change of the rows."""
    package = Path(__file__).parents[1]
    files = sorted(path for part in ("data", "readers") for path in (package / part).glob("*.py"))
    texts = [path.read_bytes() for path in files]
    return Hasher.hash_bytes([*texts, *(version(name).encode() for name in _LIBRARIES)])


def tokenizer_digest(tokenizer) -> str | None:
    """Returns a digest of what token ids depend on; None for a tokenizer of which not all of it is known."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or not f"{type(tokenizer).__module__}.".startswith(_OWN_MODULES):
        return None
    options = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if isinstance(value, str | int | float | bool | None) and name not in ("name_or_path", "tokenizer_file")
    }
    # Its text begins with the padding and the truncation of the last call, which the next call replaces.
    core_text = core.to_str()
    core_text = core_text[core_text.find('"added_tokens"') :]
    # A template may write the date of today.
    template = str(tokenizer.chat_template)
    today = date.today().isoformat() if "strftime_now" in template else ""
    return Hasher.hash(
        (
            type(tokenizer).__qualname__,
            core_text,
            template,
            today,
            sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
            sorted(options.items()),
        )
    )


def dataset_digest(dataset: Dataset) -> str | None:
    """Returns the fingerprint of a dataset with its columns; None for one whose rows a function of the user makes."""
    if dataset.format["type"] is not None:
        return None
    return Hasher.hash((dataset._fingerprint, dataset.column_names, str(dataset.features)))


# --- rows on their way -----------------------------------------------------------------------------------------------


class Spool:
    """Holds many entries between two passes: pickled in a file of this process, or in memory if the disk is full.

    Args:
        entries: The entries, which are read once.
    """

    def __init__(self, entries: Iterable[Any] = ()):
        self._parts: list[tuple[Any, int]] = []  # file and offset of each batch
        self._file: Any = None
        for batch in in_batches(entries, 500):
            self._add(pickle.dumps(batch, pickle.HIGHEST_PROTOCOL))

    def _add(self, data: bytes) -> None:
        try:
            if self._file is None:
                self._file = TemporaryFile()
            offset = self._file.seek(0, io.SEEK_END)
            self._file.write(data)
            self._file.flush()
            self._parts.append((self._file, offset))
        except OSError:
            self._parts.append((io.BytesIO(data), 0))

    def __iter__(self) -> Iterator[Any]:
        for file, offset in self._parts:
            file.seek(offset)
            yield from pickle.load(file)


def in_batches(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yields lists of at most `size` rows."""
    batch: list[Any] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
