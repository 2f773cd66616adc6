"""What the subcommands of `hf-rlhf collect` share. It imports neither torch nor the web server."""

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hf_rlhf_ext.cli.program import how_to_run
from hf_rlhf_ext.collect.store import Store
from hf_rlhf_ext.errors import UserError

PORT = 8347
"""Port of the page, unless another one is given."""

STORE_HELP = "The store: a SQLite file with tasks, people and judgments."


def check_between(options: Any, **limits: tuple[float, float]) -> None:
    """Raises `UserError` for an option outside its limits, or one that is NaN; None is always allowed."""
    for name, (least, most) in limits.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            allowed = f"at least {least:g}" if most == float("inf") else f"between {least:g} and {most:g}"
            raise UserError(f"{name} must be {allowed}, got {value}.")


def check_at_least(options: Any, **smallest: float) -> None:
    """Raises `UserError` for an option below its smallest value, or one that is NaN; None is always allowed."""
    # `hf_rlhf_ext.cli.options` has the same, but imports torch.
    check_between(options, **{name: (least, float("inf")) for name, least in smallest.items()})


def split_names(words: Sequence[str] | str | None, option: str) -> list[str]:
    """The names in `anna tom`, in `anna,tom`, or in both, in their order.

    Args:
        words: the words of the option, one text from a config file, or None.
        option: name of the option, for messages.

    Raises:
        UserError: a name is given twice.
    """
    if isinstance(words, str):
        words = [words]
    names: list[str] = []
    for word in words or ():
        for part in str(word).split(","):
            name = part.strip()
            if not name:
                continue
            if name in names:
                raise UserError(f"{option}: {name!r} is given twice: give each name once.")
            names.append(name)
    return names


def split_names_of(options: Any, *names: str) -> None:
    """Replaces options that hold names by lists of them, see `split_names`. None becomes an empty list."""
    for name in names:
        setattr(options, name, split_names(getattr(options, name), name))


def public_address(url: str) -> str:
    """The address without a slash at the end. Raises `UserError` if it is none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"url: {url!r} is no address: write --url https://judge.example.org.")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise UserError(f"url: {url!r} has a path: the page must be at the root of its host, as {parts.netloc}.")
    return f"{parts.scheme}://{parts.netloc}"


def existing_store(path: str | None) -> Store:
    """Opens a store that must exist, so that a wrong path does not make an empty one."""
    if path is None:
        raise UserError("store is required: the file of `hf-rlhf collect serve` (--store judgments.sqlite).")
    if not Path(path).is_file():
        raise UserError(f"store: no file {path}: check the path; `hf-rlhf collect serve --store {path}` makes one.")
    return Store(path)


def check_new_file(path: str, option: str, *, overwrite: bool, inputs: Mapping[str, str | None]) -> None:
    """Checks an output file before any work is done.

    Args:
        path: the output file.
        option: its option, for messages.
        overwrite: whether the file may exist.
        inputs: option -> file that the command reads, which is never overwritten.

    Raises:
        UserError: the file exists and may not, is an input or a folder, or cannot be written.
    """
    file = Path(path)
    for name, given in inputs.items():
        if given is not None and file.resolve() == Path(given).resolve():
            raise UserError(f"{option}: {path} is the file of --{name}: give another name.")
    if file.is_dir():
        raise UserError(f"{option}: {path} is a folder: give a file.")
    if file.exists() and not overwrite:
        raise UserError(f"{option}: {path} exists: pass another name, or --overwrite true.")
    check_writable(path, option)


def check_writable(path: str, option: str) -> None:
    """Raises `UserError` if a file cannot be written. Nothing is made."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    if place != Path(path).absolute() and not place.is_dir():
        raise UserError(f"{option}: {path} cannot be written, as {place} is a file: give another path.")
    if not os.access(place, os.W_OK):
        raise UserError(f"{option}: {path} cannot be written (no permission for {place}): give another path.")


def check_file_exists(path: str, option: str) -> None:
    """Raises `UserError` if `path` looks like a file, and not like a Hub id, and does not exist."""
    looks_like_file = Path(path).suffix in (".jsonl", ".json", ".csv", ".tsv", ".xlsx", ".parquet", ".txt", ".gz")
    if looks_like_file and not Path(path).expanduser().exists():
        raise UserError(f"{option}: no file {path}: check the path.")


def print_next(*commands: Iterable[str]) -> None:
    """Prints commands to go on with; each is the words after `hf-rlhf`."""
    print("Next:")
    for words in commands:
        print(f"  {how_to_run(shlex.join(words))}")
