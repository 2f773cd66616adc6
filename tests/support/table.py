"""The tables of docs/support.md, made from the rows of the tests in this folder, and the check of their test ids.

    python tests/support/table.py

exits with status 1 if a row of the page names no test, or a test that does not exist. `make docs` runs it first.
"""

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # run as a program, Python adds only this folder

from tests.support.rows import Row  # noqa: E402

PAGE = ROOT / "docs" / "support.md"

TABLES = {
    "support_ppo_adapters": ("test_adapters", "PPO_ADAPTERS"),
    "support_reward_adapters": ("test_adapters", "REWARD_ADAPTERS"),
    "support_policies": ("test_architectures", "POLICIES"),
    "support_reward_models": ("test_architectures", "REWARD_MODELS"),
    "support_optimizers": ("test_optimizers", "OPTIMIZERS"),
    "support_options": ("test_trainer_options", "PPO_OPTIONS", "REWARD_OPTIONS"),
    "support_ppo_options": ("test_trainer_options", "PPO_OPTIONS"),
    "support_reward_options": ("test_trainer_options", "REWARD_OPTIONS"),
}
"""Name of a table on the page -> file and list that its rows come from.

A table of two lists has what both say alike. Tables of one of the two have the rest of it.
"""

HEADER = ("", "state", "test")


@dataclass
class Line:
    """A line of a table: what it is about, whether it works, and the ids of its tests."""

    name: str
    state: str
    tests: list[str]

    @property
    def cells(self) -> tuple[str, str, str]:
        tests = "<br>".join(f"`{node_id}`" for node_id in self.tests)
        return escaped(self.name), escaped(self.state), tests


def table_rows(name: str) -> list[tuple[str, str, str]]:
    """The cells of a table."""
    file, *lists = TABLES[name]
    if len(lists) == 2:
        lines = shared_lines(file, *lists)
    else:
        elsewhere = {line.name for line in lines_said_elsewhere(name)}
        lines = [line for line in lines_of(file, lists[0]) if line.name not in elsewhere]
    return [line.cells for line in lines]


def lines_said_elsewhere(name: str) -> list[Line]:
    """The lines of a table of two lists, if the list of this table is one of them."""
    file, list_name = TABLES[name]
    for other_file, *lists in TABLES.values():
        if other_file == file and len(lists) == 2 and list_name in lists:
            return shared_lines(file, *lists)
    return []


def shared_lines(file: str, first: str, second: str) -> list[Line]:
    """The lines that two lists have in common, with the tests of both."""
    others = {line.name: line for line in lines_of(file, second)}
    shared = []
    for line in lines_of(file, first):
        other = others.get(line.name)
        if other is not None and other.state == line.state:
            tests = list(dict.fromkeys(line.tests + other.tests))  # without repetition
            shared.append(Line(line.name, line.state, tests))
    return shared


def lines_of(file: str, list_name: str) -> list[Line]:
    """One line for each row of a list."""
    module = importlib.import_module(f"tests.support.{file}")
    lines = {id(row): Line(row.name, state_of(row), []) for row in getattr(module, list_name)}
    for node_id, row in tests_of(module):
        if id(row) in lines:
            lines[id(row)].tests.append(node_id)
    return list(lines.values())


def escaped(cell: str) -> str:
    """For a cell of a table, where a bar would end the cell."""
    return cell.replace("|", "\\|")


def state_of(row: Row) -> str:
    """Whether a row works, in words, which do not depend on the packages that are installed."""
    if row.needs:
        state = f"needs the package `{row.needs}`, not installed for these tests"
    elif row.says is not None:
        quotes = "``" if "`" in row.says else "`"
        state = f"refused: {quotes}{row.says}{quotes}"
    else:
        state = "works"
    return f"{state}; {row.note}" if row.note else state


def tests_of(module) -> Iterator[tuple[str, Row]]:
    """The tests of a module that `each` parametrizes: the id relative to this folder, and the row."""
    file = Path(module.__file__).name
    for function in list(vars(module).values()):
        for mark in getattr(function, "pytestmark", ()):
            if mark.name != "parametrize" or mark.args[0] != "row":
                continue
            for row in mark.args[1]:
                yield f"{file}::{function.__name__}[{row.id}]", row


def known_ids() -> set[str]:
    """The ids of all tests of rows."""
    ids = set()
    for file, *_ in TABLES.values():
        module = importlib.import_module(f"tests.support.{file}")
        ids |= {node_id for node_id, _ in tests_of(module)}
    return ids


def problems(text: str, known: set[str]) -> list[str]:
    """Rows of the tables in a page without a test, or with one that does not exist; one line each.

    Args:
        text: the page.
        known: ids of the tests that exist.
    """
    found = []
    tables = re.findall(r"<!-- table: (support_\w+) -->\n(.*?)<!-- end table -->", text, re.DOTALL)
    for name, table in tables:
        rows = table.splitlines()[2:]  # after the header and its ruler
        if not rows:
            found.append(f"the table {name} has no rows")
        for line in rows:
            cells = line.strip().strip("|").split(" | ")
            ids = re.findall(r"`([^`]+)`", cells[-1])
            if not ids:
                found.append(f"{name}: the row {cells[0].strip()!r} names no test")
            for node_id in ids:
                if node_id not in known:
                    found.append(f"{name}: the row {cells[0].strip()!r} names {node_id}, which is no test")
    missing = sorted(set(TABLES) - {name for name, _ in tables})
    return found + [f"the table {name} is not on the page" for name in missing]


def table_functions(markdown_table: Callable[..., str]) -> dict[str, Callable[[Path], str]]:
    """What `make tables` calls for each table."""

    def function_of(name: str) -> Callable[[Path], str]:
        return lambda page: markdown_table(HEADER, table_rows(name))

    return {name: function_of(name) for name in TABLES}


def main() -> None:
    found = problems(PAGE.read_text(encoding="utf-8"), known_ids())
    for line in found:
        print(f"error: docs/support.md: {line}", file=sys.stderr)
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
