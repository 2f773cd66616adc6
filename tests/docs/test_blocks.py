"""Every code block of README and site runs, or is marked as not run and parsed."""

import re
import sys
from types import ModuleType

import pytest

from tests.docs.blocks import (
    CHECKED,
    DOCS,
    NOT_CHECKED,
    PAGES,
    ROOT,
    Block,
    as_hf_rlhf,
    blocks_of,
    check,
    run_page,
    shell_lines,
)

BLOCKS = {path.relative_to(ROOT).as_posix(): blocks_of(path) for path in PAGES}
# README's blocks run as a newcomer would run them, in an environment of their own: test_readme.py.
RUN_HERE = [page for page, blocks in BLOCKS.items() if page.startswith("docs/") and any(block.runs for block in blocks)]


def takes_long(page: str) -> bool:
    code = "\n".join(block.code for block in BLOCKS[page] if block.runs)
    return re.search(r"Trainer\(|load_base_model\(|^\s*hf-rlhf", code, re.MULTILINE) is not None


def page_parameter(page: str):
    marks = [pytest.mark.slow] if takes_long(page) else []
    return pytest.param(page, marks=marks, id=page.removeprefix("docs/"))


@pytest.mark.parametrize("page", BLOCKS, ids=str)
def test_blocks_parse_and_name_what_exists(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in BLOCKS[page]:
        assert block.language in CHECKED + NOT_CHECKED, f"{block}: a block of {block.language!r} is not checked"
        try:
            check(block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("page", BLOCKS, ids=str)
def test_no_block_hides_from_the_parser(page):
    """A fence inside a list or an admonition would be skipped: all of them are found."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = re.findall(r"^\s*```", text, re.MULTILINE)
    assert len(fences) == 2 * len(BLOCKS[page])


@pytest.mark.parametrize("page", [page_parameter(page) for page in RUN_HERE])
def test_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(BLOCKS[page])


def test_a_page_leaves_no_module_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = ModuleType("taken")
    monkeypatch.setitem(sys.modules, "taken", first)
    code = "import sys, types\nfor name in ('taken', 'fresh'):\n    sys.modules[name] = types.ModuleType(name)\n"
    run_page([Block(page="x.md", line=1, language="python", code=code, title="")])
    assert sys.modules["taken"] is first and "fresh" not in sys.modules


def test_the_checks_find_what_is_wrong():
    """One wrong block of each kind."""
    wrong = {
        "python": ["x = (", "from hf_rlhf_ext import PPOTrainerr"],
        "bash": ["hf-rlhf ppo --learning_rat 1", "hf-rlhf pppo", "make quickstartt", "make test SPEED=1"],
        "yaml": ["a: [1"],
        "json": ["{'a': 1}"],
    }
    template = BLOCKS["README.md"][0]
    for language, codes in wrong.items():
        for code in codes:
            block = type(template)(page="x.md", line=1, language=language, code=code, title="")
            with pytest.raises((Exception, SystemExit)):
                check(block)


def test_a_command_is_read_however_it_is_started():
    same = [
        "hf-rlhf check-reward --x 1",
        "python -m hf_rlhf_ext check-reward \\\n  --x 1 # a comment",
        ".venv/bin/python recipes/check_reward.py --x 1",
    ]
    for command in same:
        (words,) = shell_lines(command)
        assert as_hf_rlhf(words) == ["check-reward", "--x", "1"]
    assert as_hf_rlhf(["pip", "install", "."]) is None


def test_pages_are_those_of_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    in_navigation = re.findall(r": ([\w/-]+\.md)$", config, re.MULTILINE)
    assert sorted(in_navigation) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
