"""`--help` of every recipe."""

from importlib import import_module

import pytest

from hf_rlhf_ext.cli.parsing import parse_recipe


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "inspect_data", "check_reward", "best_of_n"])
def test_help_of_every_recipe_prints(stage, capsys):
    with pytest.raises(SystemExit) as stop:  # a stray % in a help text would be a ValueError
        parse_recipe(import_module(f"recipes.{stage}").ARGUMENTS, ["--help"])
    assert stop.value.code == 0 and "--dataset_name" in capsys.readouterr().out
