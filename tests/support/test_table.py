"""Every row of docs/support.md names a test that exists, and a row without one is found."""

import importlib
import re

import pytest

from tests.support import table
from tests.support.rows import Row, each


@pytest.fixture(scope="module")
def known():
    return table.known_ids()


def test_every_row_of_the_page_names_a_test(known):
    assert table.problems(table.PAGE.read_text(encoding="utf-8"), known) == []


def test_a_row_without_a_test_is_found(known):
    text = table.PAGE.read_text(encoding="utf-8")
    first = re.search(r"^\| (.+) \| (.+) \| `([^`]+)` \|$", text, re.MULTILINE)
    without = text.replace(first[0], f"| {first[1]} | {first[2]} |  |", 1)
    (found,) = table.problems(without, known)
    assert "names no test" in found and first[1] in found
    emptied = re.sub(r"(<!-- table: support_policies -->\n).*?(<!-- end)", r"\1\2", text, flags=re.DOTALL)
    assert table.problems(emptied, known) == ["the table support_policies has no rows"]
    other = text.replace(f"`{first[3]}`", "`test_adapters.py::test_nothing[lora]`", 1)
    assert any("which is no test" in line for line in table.problems(other, known))


def test_the_build_of_the_docs_runs_the_check():
    makefile = (table.ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.partition("\ndocs:")[2].partition("\n\n")[0]
    check, build = recipe.index("tests/support/table.py"), recipe.index("zensical build")
    assert check < build


def test_the_check_fails_for_a_page_without_tables(tmp_path, monkeypatch, capsys):
    page = tmp_path / "support.md"
    page.write_text("# What is supported\n")
    monkeypatch.setattr(table, "PAGE", page)
    with pytest.raises(SystemExit) as ended:
        table.main()
    assert ended.value.code == 1
    assert "is not on the page" in capsys.readouterr().err


def test_ids_are_made_from_names_and_are_distinct():
    assert Row("`optim='adafactor'`").id == "optim-adafactor"
    with pytest.raises(AssertionError, match="same id"):
        each([Row("LoRA"), Row("lora")])


def test_states_show_whether_a_row_works():
    assert table.state_of(Row("a")) == "works"
    assert table.state_of(Row("a", says="not supported", note="load it in fp32")) == (
        "refused: `not supported`; load it in fp32"
    )
    missing = Row("a", says="not supported", needs="galore_torch")
    assert table.state_of(missing) == "needs the package `galore_torch`, not installed for these tests"
    assert table.state_of(Row("a", says="no `score` head")) == "refused: ``no `score` head``"
    assert table.Line("`'<|pad|>'`", "works", []).cells == ("`'<\\|pad\\|>'`", "works", "")
    assert table.state_of(Row("a", needs="galore_torch")) == table.state_of(missing)  # also where it is installed


def test_options_that_both_trainers_treat_alike_are_in_one_table_only():
    both, ppo, reward = (
        {cells[0]: cells for cells in table.table_rows(f"support_{name}")}
        for name in ("options", "ppo_options", "reward_options")
    )
    assert not both.keys() & (ppo.keys() | reward.keys())
    for name, state, tests in both.values():
        assert {"test_ppo_options", "test_reward_options"} == set(re.findall(r"::(\w+)\[", tests)), name
        assert state.startswith(("works", "refused"))
    # An option that the trainers treat differently is in both other tables.
    assert ppo["`label_smoothing_factor=0.1`"][1] != reward["`label_smoothing_factor=0.1`"][1]
    module = importlib.import_module("tests.support.test_trainer_options")
    assert both.keys() | ppo.keys() == {table.escaped(row.name) for row in module.PPO_OPTIONS}
    assert both.keys() | reward.keys() == {table.escaped(row.name) for row in module.REWARD_OPTIONS}
