"""Keeps a second process out of the folder of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpointing import require_writable
from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def only_process(folder: str | Path) -> Iterator[None]:
    """Makes the folder of a run, and keeps other processes out of it until the block ends.

    The operating system ends the lock with the process, also if it is killed. Where the system or the file system has
    no locks, nothing is kept out.

    Raises:
        UserError: another process is in such a block with this folder, or the folder cannot be written.
    """
    require_writable(folder)
    if fcntl is None:
        yield
        return
    # The folder itself is locked, as every file in it may be replaced.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"output_dir: another process runs in {folder}: wait for its end, or pass another --output_dir."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
