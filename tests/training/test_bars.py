"""Bars of long parts: drawn on terminals and in notebooks only, one at a time, and gone at the end."""

import os
import pty
import sys
import termios

import pytest

from hf_rlhf_ext.training import bars
from hf_rlhf_ext.training.bars import clock, draw_bars_in, no_bars, progress_bar


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(bars, "DELAY", 0.0)
    monkeypatch.setattr(bars, "REFRESH", 0.0)


@pytest.fixture
def drawn(monkeypatch):
    """What `work` draws on stderr, a real terminal."""

    def run(work) -> str:
        controller, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (24, 100))
        with os.fdopen(terminal, "w") as stderr, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stderr)
            work()
            print("end", file=stderr, flush=True)  # so that there is something to read
            text = ""
            while not text.rstrip().endswith("end"):  # a terminal hands over what is written in pieces
                text += os.read(controller, 1 << 16).decode()
        os.close(controller)
        return text

    return run


def two_bars():
    with progress_bar("outer part", 2) as advance:
        advance(1)
        with progress_bar("inner part", 4) as inner:
            inner(2)
        advance(1)


def test_a_terminal_has_one_bar_and_keeps_none(drawn):
    text = drawn(two_bars)
    assert "outer part" in text and "inner part" not in text
    assert text.rstrip().rpartition("\r")[2] == "end"  # the bar was removed


def test_a_part_of_one_step_leaves_the_bar_to_what_is_within(drawn):
    def work():
        with progress_bar("outer part", 1), progress_bar("inner part", 4) as advance:
            advance(2)

    text = drawn(work)
    assert "outer part" not in text and "inner part" in text


def test_captured_output_has_no_bar(capsys):
    two_bars()
    assert capsys.readouterr().err == ""


def test_no_bars_is_heeded_and_ends_with_its_context_also_after_an_error(drawn):
    def work():
        with no_bars(when=True):
            two_bars()

    assert drawn(work).strip() == "end"
    with pytest.raises(KeyboardInterrupt), no_bars():
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), progress_bar("part", 2):
        raise KeyboardInterrupt
    assert "outer part" in drawn(two_bars)
    assert "outer part" in drawn(lambda: _within_no_bars_of_false())


def _within_no_bars_of_false():
    with no_bars(when=False):
        two_bars()


class Place:
    """A table that shows everything, or nothing."""

    def __init__(self, shown: bool = True):
        self.shown = shown
        self.drawings: list[str] = []

    def is_shown(self) -> bool:
        return self.shown

    def show_bar(self, bar: str) -> None:
        self.drawings.append(bar)


@pytest.fixture
def place():
    made = Place()
    draw_bars_in(made)
    yield made
    draw_bars_in(None)


def test_a_table_gets_the_bar_and_an_empty_text_at_the_end(place):
    with progress_bar("a <b> part", 4) as advance:
        advance(1)
        advance(2)
    assert 'value="1" max="4"' in place.drawings[0] and 'value="3" max="4"' in place.drawings[1]
    assert "a &lt;b&gt; part" in place.drawings[0] and place.drawings[-1] == ""


def test_a_table_of_an_older_cell_gets_no_bar(place, capsys):
    place.shown = False
    two_bars()
    assert place.drawings == [] and capsys.readouterr().err == ""


def test_a_short_part_has_no_bar(place, monkeypatch):
    monkeypatch.setattr(bars, "DELAY", 60.0)
    two_bars()
    assert place.drawings == []


def test_times_are_readable():
    assert [clock(0), clock(61.9), clock(3725)] == ["0:00", "1:01", "1:02:05"]
