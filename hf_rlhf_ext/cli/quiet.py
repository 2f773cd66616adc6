"""What recipes hide of other libraries' output: messages that nobody who runs a recipe can act on, and progress bars.

Importing this module hides the messages. It must be imported before those libraries, because some of the messages come
when they are imported. It loads none of the libraries itself.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from ..compat import OLD_NAME_WARNINGS
from . import processes

_HIDDEN_WARNINGS = (
    *OLD_NAME_WARNINGS,
    (r"Could not find a config file in embedded:", UserWarning),
)
"""Warnings by the beginning of their text, a regular expression, and their category."""

_HIDDEN_MESSAGES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",  # at every layer and step
    # Of a file that cannot be read, our own error says more.
    "datasets.packaged_modules.json.json": "Failed to load JSON from file",
    "datasets.packaged_modules.csv.csv": "Failed to read file",
    "datasets.packaged_modules.parquet.parquet": "Failed to read ",
    "transformers.trainer_utils": (
        # At a resume: Trainer has replaced shares such as `save_steps: 0.2` by steps. Our own check compares options.
        "Warning: The following arguments do not match",
        # In every run: it gives the model's config the special tokens of the tokenizer, as it should.
        "The tokenizer has new PAD/BOS/EOS tokens",
        # When old checkpoints are deleted: it then goes by their numbers, which is right.
        "mtime may not be reliable on this filesystem",
    ),
    "hf_rlhf_ext.modeling.adapters": "Only this library finds the base of",  # the recipes' last lines say it
}
"""Logger and beginning of its message, or several."""


class _HideMessage(logging.Filter):
    """Hides the messages of one logger that begin with a text, or one of several, unless `show_everything` is set."""

    show_everything = False

    def __init__(self, beginning: str | tuple[str, ...]):
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


def _let_only_the_first_process_warn() -> None:
    """Of several processes, all would give the same warnings of libraries. Must come before torch is loaded."""
    if processes.count() == 1:
        return
    # Notes for developers, from C++ code: DDP says in each process that its search for unused weights found none.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not processes.is_first():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)


_let_only_the_first_process_warn()


def _explain_ctrl_c_in_imports() -> None:
    """Says it in one line where `python recipes/x.py` is stopped in its imports, before `run_recipe` begins."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None or not Path(script).with_name("quickstart.py").is_file():  # not in the folder of the recipes
        return
    before = sys.excepthook

    def explain(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
        else:
            before(kind, error, trace)

    sys.excepthook = explain


_explain_ctrl_c_in_imports()


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
    """Switches off the bars of Transformers, and every bar where stderr is not a terminal.

    On a terminal, the other bars, such as those of `datasets`, appear only if the work takes long, and disappear at its
    end.
    """
    import datasets
    from huggingface_hub.utils import enable_progress_bars
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    datasets_hidden = datasets.are_progress_bars_disabled()
    transformers_bars = transformers_logging.is_progress_bar_enabled()
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    if not is_terminal:
        datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    if transformers_bars and is_terminal:
        enable_progress_bars()  # of downloads, which Transformers' switch disables too
    # Some bars have no switch, such as that of a GGUF file that is unpacked: None is tqdm's value for terminals only.
    tqdm_init = tqdm.__init__
    tqdm.__init__ = _on_terminals_only(tqdm_init)
    try:
        yield
    finally:
        tqdm.__init__ = tqdm_init
        if transformers_bars:
            transformers_logging.enable_progress_bar()
        if not datasets_hidden:
            datasets.enable_progress_bars()


def _on_terminals_only(tqdm_init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of tqdm with other defaults, for bars that do not ask to be drawn, as ours do."""

    @wraps(tqdm_init)
    def init(bar, *args, **kwargs):
        if kwargs.get("disable") is None:
            kwargs |= {"disable": None, "leave": False, "delay": 1.0}
        tqdm_init(bar, *args, **kwargs)

    return init
