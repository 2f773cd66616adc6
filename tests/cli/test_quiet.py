"""What recipes hide of other libraries' output, and that `--verbose true` shows it."""

import io
import logging
import warnings

import datasets
import pytest
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from hf_rlhf_ext.cli.quiet import library_output

DEPRECATED = "`is_gradient_checkpointing` is deprecated and will be removed"
MESSAGE = "Failed to load CPU gemm_4bit_forward from kernels-community"


@pytest.fixture
def hidden():
    """The filter of the recipes' command line, which pytest's own handling of warnings replaces in every test."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield caught


def test_bars_of_other_libraries_are_hidden_and_come_back():
    before = datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    with library_output(verbose=False):
        assert datasets.are_progress_bars_disabled() and not transformers_logging.is_progress_bar_enabled()
        captured = io.StringIO()
        list(tqdm([1, 2], file=captured))  # a bar without a switch: none where the output is captured
        assert captured.getvalue() == ""
        list(tqdm([1, 2], file=captured, disable=False))  # ours says what it wants
        assert "2/2" in captured.getvalue()
    assert before == (datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled())
    list(tqdm([1, 2], file=(captured := io.StringIO())))
    assert "2/2" in captured.getvalue()


def test_bars_come_back_after_an_error():
    enabled = transformers_logging.is_progress_bar_enabled()
    with pytest.raises(KeyboardInterrupt), library_output(verbose=False):
        raise KeyboardInterrupt
    assert transformers_logging.is_progress_bar_enabled() == enabled


def test_verbose_leaves_the_bars_alone():
    before = datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    with library_output(verbose=True):
        assert before == (datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled())


@pytest.mark.parametrize("verbose", [False, True])
def test_verbose_shows_warnings_that_are_hidden_otherwise(hidden, verbose):
    with library_output(verbose=verbose):
        warnings.warn(DEPRECATED, FutureWarning, stacklevel=1)
    assert len(hidden) == verbose


@pytest.mark.parametrize("verbose", [False, True])
def test_verbose_shows_messages_that_are_hidden_otherwise(caplog, verbose):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with library_output(verbose=verbose):
        logger.warning(MESSAGE)
        logger.warning("something else")
    expected = [MESSAGE, "something else"] if verbose else ["something else"]
    assert [record.message for record in caplog.records] == expected
    caplog.clear()
    logger.warning(MESSAGE)  # hidden again
    assert not caplog.records
