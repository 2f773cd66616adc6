"""Progress bars of the long parts that `Trainer` has no bar for: sampling, scoring, evaluation, normalization.

A bar is drawn where somebody watches: on a terminal (stderr), and in a notebook. There it is part of the trainer's
table during training, and an output of its own elsewhere. It needs no ipywidgets. It appears only if the part takes
longer than `DELAY`, and it disappears at the end of the part.
"""

import html
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tqdm import tqdm
from transformers.utils import is_in_notebook

DELAY = 1.0
"""Seconds after which a bar appears."""
REFRESH = 0.2
"""Seconds between two updates of a bar in a notebook."""
TERMINAL_BAR = "{desc} {percentage:3.0f}%|{bar:30}| {remaining} left"

Advance = Callable[[int], None]
"""Adds a number to the count of a bar."""


class BarPlace(Protocol):
    """Something that shows the bar of a part: the table of a training in a notebook."""

    def is_shown(self) -> bool:
        """Whether it can be updated now."""
        ...

    def show_bar(self, bar: str) -> None:
        """Shows a bar as HTML; an empty text removes it."""
        ...


_place: BarPlace | None = None  # the table of the training that is running
_depth = 0  # number of open bars and of open `no_bars`: none is drawn within another one


def draw_bars_in(place: BarPlace | None) -> None:
    """From now on, bars of a notebook are drawn in `place`; `None` means as outputs of their own."""
    global _place
    _place = place


@contextmanager
def no_bars(when: bool = True) -> Iterator[None]:
    """Inside the context, nothing draws a bar.

    Args:
        when: whether the context has an effect, such as `args.disable_tqdm`.
    """
    global _depth
    _depth += when
    try:
        yield
    finally:
        _depth -= when


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Advance]:
    """A bar during the context. Bars within it are not drawn.

    Args:
        description: what is done, in a few words.
        total: the count at the end. A part with less than two steps has no bar, but bars within it are drawn.

    Yields:
        A function that adds to the count.
    """
    if _depth or total < 2:
        yield lambda n: None
        return
    bar = _new_bar(description, total)
    if bar is None:
        yield lambda n: None
        return
    try:
        with no_bars():
            yield bar.update
    finally:
        bar.close()


def _new_bar(description: str, total: int) -> Any:
    if _place is not None and _place.is_shown():
        return NotebookBar(description, total, _place)
    if is_in_notebook():
        return NotebookBar(description, total, OwnOutput())
    if not _is_on_terminal():
        return None
    return tqdm(
        total=total,
        desc=description,
        bar_format=TERMINAL_BAR,
        dynamic_ncols=True,
        leave=False,
        delay=DELAY,
        disable=False,
    )


def _is_on_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it is closed
        return False


# ---- Notebooks ----


class NotebookBar:
    """A bar in a notebook, as HTML.

    Args:
        description: what is done.
        total: the count at the end.
        place: where it is drawn.
    """

    def __init__(self, description: str, total: int, place: BarPlace):
        self.description = description
        self.total = total
        self.place = place
        self.count = 0
        self._started = time.monotonic()
        self._drawn = 0.0  # time of the last update; 0 before the first one

    def update(self, n: int) -> None:
        """Adds to the count, and draws the bar if it is due."""
        self.count += n
        now = time.monotonic()
        if now - self._started < DELAY or now - self._drawn < REFRESH:
            return
        self._drawn = now
        self.place.show_bar(self.html(now - self._started))

    def html(self, seconds: float) -> str:
        """The bar after a number of seconds."""
        left = ""
        if 0 < self.count < self.total:
            left = f", {clock(seconds / self.count * (self.total - self.count))} left"
        return bar_html(self.count, self.total, f"{self.description}{left}", width=200)

    def close(self) -> None:
        """Removes the bar."""
        if self._drawn:
            self.place.show_bar("")


class OwnOutput:
    """An output of the current cell that is updated in place."""

    def __init__(self):
        self._handle = None

    def is_shown(self) -> bool:
        return True

    def show_bar(self, bar: str) -> None:
        from IPython.display import HTML, display

        if self._handle is None:
            self._handle = display(HTML(bar), display_id=True)
        else:
            self._handle.update(HTML(bar))


def bar_html(count: int, total: int, label: str, *, width: int = 300) -> str:
    """A bar with a text beside it.

    Args:
        count: the count now.
        total: the count at the end.
        label: the text.
        width: of the bar, in pixels.
    """
    style = f"width:{width}px; height:16px; vertical-align:middle"
    return f'<div><progress value="{count}" max="{total}" style="{style}"></progress> {html.escape(label)}</div>\n'


def clock(seconds: float) -> str:
    """A time as minutes and seconds, or as hours, minutes and seconds."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}"
