"""The tables of README and docs are those that `make tables` writes: no number without the file it comes from."""

import importlib.util

import pytest

from tests.docs.blocks import PAGES, ROOT


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tables_of_a_page_are_current(tables, page):
    assert tables.filled(page) == page.read_text(encoding="utf-8"), "run `make tables`"


def test_every_table_is_shown_somewhere(tables):
    shown = set()
    for page in PAGES:
        shown |= {name for _, name, _, _ in tables.PLACE.findall(page.read_text(encoding="utf-8"))}
    assert shown == set(tables.TABLES)


def test_a_table_is_written_between_its_markers(tables, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: reward_study -->\nold\n<!-- end table -->\nafter\n")
    text = tables.filled(page)
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    page.write_text(text)
    assert tables.filled(page) == text  # a second time changes nothing
    assert "| 0 | 0.668 (0.626 to 0.710) |" in text
