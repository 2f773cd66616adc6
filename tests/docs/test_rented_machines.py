"""The commands for rented machines, which cost money to run: `hf jobs` knows their flags, and their recipes parse."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from hf_rlhf_ext.cli.options import machine_defaults
from hf_rlhf_ext.cli.parsing import parse_recipe
from tests.docs.blocks import DOCS, ROOT, blocks_of, shell_lines

JOBS = []
for block in blocks_of(DOCS / "how_to" / "rented_machines.md"):
    if block.language == "bash":
        JOBS += [words for words in shell_lines(block.code) if words[:4] == ["hf", "jobs", "uv", "run"]]


def recipe_position(job: list[str]) -> int:
    return next(position for position, word in enumerate(job) if word.endswith(".py"))


def stage(job: list[str]) -> str:
    return Path(job[recipe_position(job)]).stem


def test_there_is_a_job_for_every_stage():
    assert {stage(job) for job in JOBS} == {"sft", "reward", "ppo"}


@pytest.fixture(scope="module")
def jobs_help() -> str:
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", "jobs", "uv", "run", "--help"]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("job", JOBS, ids=stage)
def test_a_job_is_what_hf_takes_and_its_recipe_parses(job, jobs_help):
    script = recipe_position(job)
    flags = [word for word in job[4:script] if word.startswith("-")]
    assert flags and all(flag in jobs_help for flag in flags)
    assert (ROOT / job[script]).is_file()
    # The job sees the recipes in a folder of its own.
    options = [word.replace("/recipes/", f"{ROOT}/recipes/") for word in job[script + 1 :]]
    recipe = import_module(f"recipes.{stage(job)}")
    *_, args = parse_recipe(recipe.ARGUMENTS, options, defaults=machine_defaults())
    assert args.push_to_hub and args.hub_private_repo is None  # private by default
