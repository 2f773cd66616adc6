"""What the README says about the Hub: its snippet runs against the stand-in, its commands parse."""

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model

from hf_rlhf_ext import load_base_model
from hf_rlhf_ext.cli.options import machine_defaults
from hf_rlhf_ext.cli.parsing import parse_recipe
from hf_rlhf_ext.hub import push
from hf_rlhf_ext.hub.push import push_run
from hf_rlhf_ext.reward.scorer import RewardNormalization

pytestmark = pytest.mark.xdist_group("processes")

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
JOBS = [shlex.split(line) for line in re.findall(r"^    (hf jobs uv run .*)$", README, re.MULTILINE)]
PUSHES = re.findall(r"^    (?:python -m hf_rlhf_ext\.hub\.push|hf-rlhf push) (.*)$", README, re.MULTILINE)


@pytest.mark.slow
def test_the_two_lines_that_load_from_the_hub_run_as_written(
    hub, elsewhere, installed, tiny_llama, chat_tokenizer, tmp_path
):
    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if '"alice/' in code]
    tiny_llama.save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    HfApi().create_repo("alice/base")
    HfApi().upload_folder(repo_id="alice/base", folder_path=tmp_path / "base")
    for name, task in (("polite-policy", "causal_lm"), ("tldr-reward", "reward")):
        config = LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS" if task == "reward" else "CAUSAL_LM")
        get_peft_model(load_base_model("alice/base", task=task), config).save_pretrained(tmp_path / name)
        chat_tokenizer.save_pretrained(tmp_path / name)
        RewardNormalization().save(tmp_path / name)
        push_run(tmp_path / name)
    printed = elsewhere(snippet, PYTHONPATH=str(installed)).stdout  # the wheel, not the checkout
    assert re.fullmatch(r"\[-?\d+\.\d+(e-\d+)?\]\n", printed)


def test_there_is_a_job_for_every_stage():
    assert [Path(job[10]).stem for job in JOBS] == ["sft", "reward", "ppo"] and len(PUSHES) >= 2


@pytest.fixture(scope="module")
def jobs_help():
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", "jobs", "uv", "run", "--help"]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job[10])
def test_a_job_is_what_hf_takes_and_its_recipe_parses(job, jobs_help):
    where = next(k for k, word in enumerate(job) if word.endswith(".py"))
    flags = [word for word in job[4:where] if word.startswith("-")]
    assert set(flags) == {"--flavor", "--secrets", "-v"} and all(flag in jobs_help for flag in flags)
    script, options = job[where], [word.replace("/recipes/", f"{ROOT}/recipes/") for word in job[where + 1 :]]
    assert (ROOT / script).is_file()
    *_, args = parse_recipe(
        import_module(f"recipes.{Path(script).stem}").ARGUMENTS, options, defaults=machine_defaults()
    )
    assert args.push_to_hub and args.hub_model_id.startswith("alice/") and args.hub_private_repo is None


@pytest.mark.parametrize("command", PUSHES)
def test_a_push_command_parses(command, monkeypatch):
    asked = []
    monkeypatch.setattr(push, "push_run", lambda *args, **options: asked.append((args, options)))
    push.main(shlex.split(command))
    assert len(asked) == 1
