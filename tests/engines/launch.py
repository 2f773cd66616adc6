"""Starts a script in several CPU processes under an engine, with the accelerate configurations that are shipped."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"
DEEPSPEED = Path(sys.prefix) / "deepspeed"
"""Where `make venv` installs DeepSpeed: accelerate imports it wherever it finds it, and it writes to stderr."""


def launch_cases(engine: str, script: str | Path, folder: Path, models: Path, cases: list[dict]) -> Path:
    """Runs `script` under `engine` with all cases in one launch, and the models beside them in `folder`.

    Returns:
        `folder`, with what the script wrote, and `stderr.txt`.
    """
    for path in models.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "cases.json").write_text(json.dumps(cases))
    done = launch(engine, script, folder, folder / "cases.json", timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def launch(
    engine: str, script: str | Path, *arguments: object, stock: bool = False, processes: int = 2, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Runs `script` under `engine`, through `accelerate launch`. Without DeepSpeed, a test of it is skipped.

    Args:
        engine: name of a file in `recipes/accelerate` (ddp, fsdp2, zero2, zero3), or a path of such a file.
        script: path of the script.
        arguments: its arguments.
        stock: whether accelerate is left as it is; then it turns neither FSDP nor DeepSpeed on.
        processes: number of processes.
        timeout: seconds, after which all processes are ended.

    Returns:
        Exit status, and what all processes wrote.
    """
    config = Path(engine) if Path(engine).is_file() else CONFIGS / f"{engine}.yaml"
    uses_deepspeed = "DEEPSPEED" in config.read_text(encoding="utf-8")
    if uses_deepspeed:
        _require_deepspeed()
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    words += ["--num_processes", processes, "--main_process_port", 0]
    words += [] if stock else ["--module", "tests.engines.on_cpu"]
    words += [script, *arguments]
    return _run([str(word) for word in words], environment(uses_deepspeed), timeout)


def _require_deepspeed() -> None:
    if DEEPSPEED.is_dir() or find_spec("deepspeed") is not None:
        return
    reason = "no DeepSpeed: make venv"
    if os.environ.get("RLHF_REQUIRE_SHARED") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def _run(words: list[str], env: dict[str, str], timeout: float) -> subprocess.CompletedProcess:
    # In a group of its own: at a timeout, the processes that the launcher has started end, too.
    child = subprocess.Popen(
        words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    try:
        out, err = child.communicate(timeout=timeout)
    except BaseException:
        os.killpg(child.pid, 9)
        child.communicate()
        raise
    return subprocess.CompletedProcess(words, child.returncode, out, err)


def environment(uses_deepspeed: bool) -> dict[str, str]:
    """Environment of a run: CPU only, one thread a process, DeepSpeed to be found if it is used."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]), *([str(DEEPSPEED)] if uses_deepspeed else [])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
