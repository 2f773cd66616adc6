"""`--num_processes` and `--accelerate_config`: what accelerate is asked for, and what is refused before it starts."""

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from hf_rlhf_ext.cli.launch import (
    LaunchOptions,
    accelerate_words,
    find_accelerate_config,
    launch,
    take_launch_options,
)
from hf_rlhf_ext.errors import UserError


@pytest.fixture(autouse=True)
def no_threads_set(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def parsed(options: LaunchOptions, n_devices: int = 0):
    """The arguments as accelerate itself reads them."""
    words = accelerate_words(options, n_devices)
    return launch_command_parser().parse_args([*words, "--module", "hf_rlhf_ext", "ppo", "--seed", "1"])


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_launch_options_are_taken_out_and_the_rest_stays():
    argv = ["--num_processes", "2", "--config", "x.yaml", "--accelerate-config=zero2", "--seed", "3"]
    options, rest = take_launch_options(argv)
    assert options == LaunchOptions(2, "zero2") and options.asked_for
    assert rest == ["--config", "x.yaml", "--seed", "3"]
    assert options.words() == ["--num_processes", "2", "--accelerate_config", "zero2"]
    options, rest = take_launch_options(["--seed", "3"])
    assert not options.asked_for and rest == ["--seed", "3"]


@pytest.mark.parametrize("value", ["two", "0", "-1", "1.5"])
def test_a_number_of_processes_that_is_none(value):
    assert "--num_processes" in refusal(take_launch_options, [f"--num_processes={value}"])


@pytest.mark.parametrize("argv", [["--num_processes"], ["--accelerate_config", "--seed"], ["--num_processes="]])
def test_a_launch_option_without_its_value(argv):
    assert "needs a value" in refusal(take_launch_options, argv)


def test_two_processes_on_a_cpu_are_two():
    args = parsed(LaunchOptions(2))
    # accelerate's own --cpu would start one process, whatever --num_processes says.
    assert args.multi_gpu and not args.cpu and (args.num_processes, args.num_machines) == (2, 1)
    assert args.mixed_precision == "no" and args.main_process_port == 0
    assert args.num_cpu_threads_per_process >= 1
    assert args.module and (args.training_script, args.training_script_args) == ("hf_rlhf_ext", ["ppo", "--seed", "1"])


def test_one_process_is_no_group_and_threads_that_are_set_stay(monkeypatch):
    assert not parsed(LaunchOptions(1), 1).multi_gpu
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert parsed(LaunchOptions(2)).num_cpu_threads_per_process is None


def test_more_processes_than_accelerators_are_refused():
    assert parsed(LaunchOptions(2), 2).multi_gpu
    line = refusal(accelerate_words, LaunchOptions(2), 1)
    assert "--num_processes 2" in line and "CUDA_VISIBLE_DEVICES=" in line


def test_a_configuration_by_name_or_by_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = find_accelerate_config("multi_gpu")
    assert yaml.safe_load(shipped.read_text())["distributed_type"] == "MULTI_GPU"
    args = parsed(LaunchOptions(2, "multi_gpu"), 2)
    assert args.config_file == str(shipped) and args.num_processes == 2 and args.main_process_port == 0
    (tmp_path / "zero2").write_text("main_process_port: 1234\nnum_machines: 2\nnum_processes: 4\n")
    args = parsed(LaunchOptions(accelerate_config="zero2"))
    assert args.config_file == "zero2" and args.main_process_port is None  # the file's own
    line = refusal(find_accelerate_config, "mutli_gpu")
    assert "mutli_gpu" in line and "ddp, fsdp2, zero2, zero3" in line and "multi_gpu, single_gpu" in line


def test_configurations_of_the_recipes_come_before_those_of_trl(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ddp", "fsdp2", "zero2", "zero3"):
        path = find_accelerate_config(name)
        assert (path.parent.name, path.parent.parent.name) == ("accelerate", "recipes")
        # The machine decides on the number of processes, or the option does.
        assert parsed(LaunchOptions(accelerate_config=name), 4).num_processes == 4
        assert parsed(LaunchOptions(3, name), 4).num_processes == 3
        # The options of the recipe decide on the precision, also with plain `accelerate launch`.
        assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"


def test_a_configuration_for_more_processes_than_accelerators_is_refused():
    line = refusal(accelerate_words, LaunchOptions(accelerate_config="multi_gpu"), 2)
    assert line.startswith("--accelerate_config multi_gpu starts 8 processes") and "add --num_processes 2" in line


def test_a_configuration_for_one_process_does_not_start_two():
    line = refusal(accelerate_words, LaunchOptions(2, "single_gpu"), 2)
    assert "--accelerate_config single_gpu" in line and "--num_processes" in line
    assert "--config_file" in accelerate_words(LaunchOptions(1, "single_gpu"), 2)


def test_nobody_is_asked_to_install_deepspeed_for_ppo(monkeypatch):
    """accelerate refuses to start DeepSpeed without its package, before a process of ours could say anything."""
    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: False)
    options = LaunchOptions(2, "zero2")
    line = refusal(launch, options, ["ppo", "--config", "x.yaml"])
    assert line.startswith("zero2 is not supported by PPOTrainer: use --accelerate_config ddp or fsdp2")
    assert "install deepspeed" in refusal(launch, options, ["reward", "--config", "x.yaml"])
