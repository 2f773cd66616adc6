"""README alone gets a newcomer from an empty environment to a model that is loaded back from the Hub."""

import os
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from hf_rlhf_ext import load_base_model, load_tokenizer
from tests.docs.blocks import ROOT, Block, blocks_of
from tests.hub.conftest import hub  # noqa: F401  (a fixture)
from tests.hub.repos import File, Repo

README = ROOT / "README.md"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what a pushed adapter of the embedded model names as its base


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180


def test_readme_sets_up_with_two_commands():
    (block,) = [block for block in blocks_of(README) if block.code.startswith("make")]
    assert block.code.split("\n")[:2] == ["make quickstart", "make test"]


def sessions(blocks: list[Block]) -> list[Block]:
    """What a newcomer types: blocks of Python that follow each other are one session; `make` is CI's own part."""
    joined: list[Block] = []
    for block in blocks:
        if not block.runs or block.code.startswith("make "):
            continue
        if joined and block.language == joined[-1].language == "python":
            last = joined.pop()
            block = Block(last.page, last.line, "python", last.code + "\n" + block.code, "")
        joined.append(block)
    return joined


@pytest.fixture
def newcomer(hub, tmp_path):  # noqa: F811
    """Runs a block in a fresh environment and an empty folder: newcomer(block, folder) -> what it printed.

    The environment sees the packages that the library needs, so that nothing is fetched, but not this checkout: what
    README's `pip install .` installs comes first.
    """
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False, symlinks=True)
    packages = environment / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = environment / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec "{environment}/bin/python" -m pip "$@"\n')
    pip.chmod(0o755)
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "VIRTUAL"))}
    settings |= {
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        # `pip install .` as it stands, from what is here.
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_TOKEN": os.environ["HF_TOKEN"],
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }

    def run(block: Block, folder: Path) -> str:
        command = ["bash", "-euc", block.code] if block.language == "bash" else ["python", "-c", block.code]
        done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture
def clone(tmp_path) -> Path:
    """What a newcomer has cloned; a build writes into it."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copyfile(ROOT / name, folder / name)
    for name in ("hf_rlhf_ext", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def put_base_on_hub(hub, folder: Path) -> None:  # noqa: F811
    """The base that the pushed adapter names: on the real Hub it is there."""
    load_base_model(dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    files = {path.name: File(path.read_bytes(), path.suffix == ".safetensors") for path in folder.iterdir()}
    repo = Repo(BASE.partition("/")[0], private=False)
    repo.branches["main"] = repo.commit("the base", files, repo.branches["main"]).oid
    hub.repos["models", BASE] = repo


@pytest.mark.slow
def test_readme_runs_from_an_empty_environment_to_a_model_loaded_back(newcomer, clone, hub, tmp_path):  # noqa: F811
    steps = sessions(blocks_of(README))
    kinds = [step.code.split()[0] if step.language == "bash" else "python" for step in steps]
    assert kinds == ["pip", "python", "hf-rlhf", "python"]
    install, train, push, load = steps
    newcomer(install, clone)
    work = tmp_path / "work"
    work.mkdir()

    code = train.code + "\nimport hf_rlhf_ext\nprint(hf_rlhf_ext.__file__)\n"
    printed = newcomer(Block(train.page, train.line, "python", code, ""), work)
    assert "2 of 2 rows kept" in printed
    scores = re.search(r"^\[(\S+), (\S+)\]$", printed, re.MULTILINE)  # of two completions
    assert float(scores[1]) > float(scores[2])
    assert str(tmp_path / "env") in printed.splitlines()[-1]  # what was installed ran, not this checkout
    assert (work / "runs" / "ppo" / "adapter_model.safetensors").is_file()

    put_base_on_hub(hub, tmp_path / "base")
    assert "alice/brief-policy" in newcomer(push, work)
    check = "\nassert policy.peft_config['default'].base_model_name_or_path == 'HuggingFaceTB/SmolLM2-135M-Instruct'\n"
    newcomer(Block(load.page, load.line, "python", load.code + check, ""), work)
