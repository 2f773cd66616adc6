"""What recipes hide of other libraries' output: messages that nobody who runs a recipe can act on, and progress bars.

Importing this module hides the messages. It must be imported before those libraries, because some of the messages come
when they are imported. It loads none of the libraries itself.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from functools import partialmethod

_HIDDEN_WARNINGS = (
    (r"`(is_)?gradient_checkpointing(_kwargs)?` is deprecated", FutureWarning),
    (r"Could not find a config file in embedded:", UserWarning),
)
"""Warnings by the beginning of their text, a regular expression, and their category."""

_HIDDEN_MESSAGES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # Of a file that cannot be read, our own error says more.
    "datasets.packaged_modules.json.json": "Failed to load JSON from file",
    "datasets.packaged_modules.csv.csv": "Failed to read file",
    "datasets.packaged_modules.parquet.parquet": "Failed to read ",
}
"""Logger and beginning of its message."""


class _HideMessage(logging.Filter):
    """Hides the messages of one logger that begin with a text, unless `show_everything` is set."""

    show_everything = False

    def __init__(self, beginning: str):
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return _HideMessage.show_everything or not str(record.msg).startswith(self.beginning)


def _hide_messages() -> None:
    for text, category in _HIDDEN_WARNINGS:
        warnings.filterwarnings("ignore", text, category)
    for logger, beginning in _HIDDEN_MESSAGES.items():
        logging.getLogger(logger).addFilter(_HideMessage(beginning))


_hide_messages()


@contextlib.contextmanager
def library_output(*, verbose: bool) -> Iterator[None]:
    """Hides the progress bars of other libraries while a recipe runs; with `verbose`, shows them and all messages.

    Downloads keep their bars where stderr is a terminal, since they may take long.
    """
    context = _everything() if verbose else _no_bars()
    with context:
        yield


@contextlib.contextmanager
def _everything() -> Iterator[None]:
    """Shows the messages that this module hides."""
    with warnings.catch_warnings():
        for text, category in _HIDDEN_WARNINGS:
            warnings.filterwarnings("default", text, category)
        _HideMessage.show_everything = True
        try:
            yield
        finally:
            _HideMessage.show_everything = False


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Switches off the bars of `datasets` and Transformers, and every bar where stderr is not a terminal."""
    import datasets
    from huggingface_hub.utils import enable_progress_bars
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    datasets_hidden = datasets.are_progress_bars_disabled()
    transformers_bars = transformers_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    if transformers_bars and sys.stderr.isatty():
        enable_progress_bars()  # of downloads, which Transformers' switch disables too
    # Some bars have no switch, such as that of a GGUF file that is unpacked: None is tqdm's value for terminals only.
    tqdm_init = tqdm.__init__
    tqdm.__init__ = partialmethod(tqdm_init, disable=None)
    try:
        yield
    finally:
        tqdm.__init__ = tqdm_init
        if transformers_bars:
            transformers_logging.enable_progress_bar()
        if not datasets_hidden:
            datasets.enable_progress_bars()
