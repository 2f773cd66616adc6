"""The line on memory at the start of a recipe, and the refusal of a run that cannot fit, with the real planner."""

import re

import pytest
import torch

from hf_rlhf_ext import UserError
from hf_rlhf_ext.cli.memory_check import StartArguments, check_memory, device_of
from hf_rlhf_ext.cli.options import ModelArguments
from hf_rlhf_ext.training.memory_line import device_memory, log_memory
from hf_rlhf_ext.training.sft_config import CheckedSFTConfig

GPU = torch.device("cuda", 0)
GB = 10**9


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the config of a small model, and without its weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("base")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def options(base, tmp_path):
    args = CheckedSFTConfig(str(tmp_path / "run"), max_length=2048, use_cpu=True, bf16=False)
    return args, ModelArguments(model_name_or_path=str(base), dtype="bfloat16")


def test_a_run_that_fits_has_one_line(options, capsys):
    args, model_args = options
    plan = check_memory("sft", args, model_args, mode="refuse", device=GPU, n_bytes=100 * GB)
    said = capsys.readouterr()
    line = r"Memory: about \d+\.\d GB of 100\.0 GB, peak at [a-z ]+ \([A-Za-z ]+ \d+\.\d+ GB\)\n"
    assert re.fullmatch(line, said.out)
    assert not said.err and plan.fits(100 * GB) and plan.device == "cuda"
    assert args.memory_is_planned
    log_memory(None, "sft", args)  # which could not plan this: it sees that it need not


def test_a_run_that_cannot_fit_is_refused_with_its_plan_and_what_to_change(options, capsys):
    args, model_args = options
    with pytest.raises(UserError) as error:
        check_memory("sft", args, model_args, mode="refuse", device=GPU, n_bytes=GB // 10)
    line = str(error.value)
    assert "\n" not in line and line.startswith("memory: the run needs about ") and "the GPU has 0.1 GB: try --" in line
    assert "--check_memory warn starts anyway" in line
    said = capsys.readouterr()
    assert "training step" in said.out and "▲ peak" in said.out and "warning: the GPU has 0.1 GB" in said.err


def test_a_run_that_only_short_texts_fit_starts_with_a_warning(options, capsys):
    args, model_args = options
    small = check_memory(
        "sft", args, model_args, mode="refuse", device=GPU, n_bytes=100 * GB, prompt_tokens=32, completion_tokens=32
    )
    large = check_memory("sft", args, model_args, mode="refuse", device=GPU, n_bytes=100 * GB)
    between = (small.n_bytes + large.n_bytes) // 2
    capsys.readouterr()
    assert check_memory("sft", args, model_args, mode="refuse", device=GPU, n_bytes=between) == large
    assert "warning: the GPU has" in capsys.readouterr().err


@pytest.mark.parametrize("mode, device", [("warn", GPU), ("refuse", torch.device("cpu"))])
def test_asked_to_warn_and_on_a_cpu_it_is_a_warning(options, capsys, mode, device):
    assert check_memory("sft", *options, mode=mode, device=device, n_bytes=1000) is not None
    assert re.search(r"warning: (the GPU|this machine) has 0\.00 GB, and the plan needs", capsys.readouterr().err)


def test_off_is_off(options, capsys):
    for mode in (None, "off"):
        assert check_memory("sft", *options, mode=mode) is None
        assert capsys.readouterr() == ("", "")
        assert hasattr(options[0], "memory_is_planned") is (mode == "off")  # otherwise the trainer logs it


def test_what_cannot_be_planned_starts_without_a_line(options, tmp_path, capsys):
    """Loading it says what is wrong, better than a plan could."""
    args, model_args = options
    model_args.model_name_or_path = str(tmp_path / "nothing-here")
    assert check_memory("sft", args, model_args, mode="refuse") is None
    assert capsys.readouterr() == ("", "")


def test_the_device_and_its_memory_are_those_of_the_run(options, capsys):
    args, _ = options
    assert device_of(args) == torch.device("cpu")
    plan = check_memory("sft", *options, mode="refuse")
    of = f"of {device_memory(torch.device('cpu')) / 1e9:.1f} GB"
    assert plan.device == "cpu" and plan.reserve == 0 and of in capsys.readouterr().out


def test_the_option_has_three_values():
    assert StartArguments().check_memory == "refuse" and not StartArguments().verbose
