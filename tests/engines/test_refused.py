"""An engine that a trainer does not support is refused in one line, whichever way it arrives, also on a CPU.

And the control of the engines themselves: TRL's own trainer has the weights of DDP under FSDP2, on CPU processes.
"""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import ParallelismConfig
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from hf_rlhf_ext import BradleyTerryConfig, PPOConfig, UserError
from hf_rlhf_ext.training import engines
from hf_rlhf_ext.training.engines import Engine, asked_engine, check_launched, engine_of_config
from hf_rlhf_ext.training.sft_config import CheckedSFTConfig
from tests.engines.launch import CONFIGS, ROOT, launch

pytestmark = pytest.mark.xdist_group("processes")

SCRIPT = ROOT / "tests" / "engines" / "refused_run.py"
REMEDY = "use --accelerate_config ddp or fsdp2, or leave it out."  # for PPO

# What `accelerate launch --config_file` sets, by engine.
SET_BY_LAUNCHER = {
    Engine.FSDP1: {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
    Engine.FSDP2: {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    Engine.ZERO0: {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
    Engine.ZERO1: {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    Engine.ZERO2: {"ACCELERATE_USE_DEEPSPEED": "true"},  # its default
    Engine.ZERO3: {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    Engine.MEGATRON: {"ACCELERATE_USE_MEGATRON_LM": "true"},
    Engine.PARALLELISM: {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
}
BY_OPTION = {
    Engine.FSDP1: {"fsdp": True, "fsdp_config": {"version": 1}},
    Engine.FSDP2: {"fsdp": True},
    Engine.XLA: {"fsdp": True, "fsdp_config": {"xla": True}},
    Engine.ZERO1: {"deepspeed": {"zero_optimization": {"stage": 1}}},
    Engine.ZERO2: {"deepspeed": '{"zero_optimization": {"stage": 2}}'},
    Engine.ZERO3: {"deepspeed": "a file"},
    Engine.PARALLELISM: {"parallelism_config": ParallelismConfig()},
}
WAYS = [("launcher", engine) for engine in SET_BY_LAUNCHER] + [("option", engine) for engine in BY_OPTION]
SUPPORTED = {
    PPOConfig: {Engine.DDP, Engine.FSDP2},
    BradleyTerryConfig: {Engine.DDP, Engine.FSDP2, Engine.ZERO1, Engine.ZERO2, Engine.ZERO3},
}


def refusal(make, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        make(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def make_config(tmp_path):
    def make(kind, **options):
        return kind(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", **options)

    return make


@pytest.fixture
def options_of(monkeypatch, tmp_path):
    """`options_of(way, engine)` asks for an engine, and returns the options."""

    def ask(way: str, engine: Engine) -> dict:
        if way == "launcher":
            for name, value in SET_BY_LAUNCHER[engine].items():
                monkeypatch.setenv(name, value)
            return {}
        options = dict(BY_OPTION[engine])
        if options.get("deepspeed") == "a file":
            file = tmp_path / "zero3.json"
            file.write_text('{"zero_optimization": {"stage": 3}}')
            options["deepspeed"] = str(file)
        return options

    return ask


UNSUPPORTED = [(kind, way, engine) for kind in SUPPORTED for way, engine in WAYS if engine not in SUPPORTED[kind]]


@pytest.mark.parametrize("kind, way, engine", UNSUPPORTED)
def test_an_engine_that_is_not_supported(make_config, options_of, monkeypatch, kind, way, engine):
    """Also where DeepSpeed is not installed: nobody installs it for a trainer that does not support it."""
    monkeypatch.setattr(engines, "is_deepspeed_available", lambda: False)
    line = refusal(make_config, kind, **options_of(way, engine))
    if kind is PPOConfig:
        wanted = f"{engine} is not supported by PPOTrainer: {REMEDY}"
    else:
        wanted = f"{engine} is not supported by BradleyTerryTrainer: use --accelerate_config ddp or fsdp2 or "
    assert line.startswith(wanted)


@pytest.mark.parametrize("way, engine", [way for way in WAYS if way[1] in (Engine.ZERO2, Engine.ZERO3)])
@pytest.mark.parametrize("kind", [BradleyTerryConfig, CheckedSFTConfig])
def test_deepspeed_that_is_not_installed(make_config, options_of, monkeypatch, kind, way, engine):
    monkeypatch.setattr(engines, "is_deepspeed_available", lambda: False)
    line = refusal(make_config, kind, **options_of(way, engine))
    assert line.startswith("deepspeed: the package is not installed: pip install deepspeed")
    assert "--accelerate_config ddp" in line


@pytest.mark.parametrize("kind", [PPOConfig, BradleyTerryConfig, CheckedSFTConfig])
def test_an_engine_without_a_launcher(make_config, options_of, kind):
    line = refusal(make_config, kind, **options_of("option", Engine.FSDP2))
    assert line.startswith("fsdp: it needs several processes") and "accelerate launch" in line


def test_deepspeed_without_a_launcher(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    args = SimpleNamespace(fsdp=None, deepspeed="zero2.json", bf16=False, fp16=False)
    assert "deepspeed: it needs a launcher" in refusal(check_launched, args)
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_launched(args)


@pytest.mark.parametrize("kind", [PPOConfig, BradleyTerryConfig])
def test_weights_that_only_one_process_loads(make_config, options_of, monkeypatch, kind):
    """As TRL's fsdp2.yaml says: the other processes would measure a model without weights."""
    options_of("launcher", Engine.FSDP2)
    make_config(kind)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    line = refusal(make_config, kind)
    assert line.startswith("fsdp_cpu_ram_efficient_loading: ") and "set it to false" in line


@pytest.mark.parametrize("kind", [PPOConfig, BradleyTerryConfig, CheckedSFTConfig])
def test_a_precision_of_the_launcher_that_the_options_contradict(make_config, monkeypatch, kind):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    line = refusal(make_config, kind)
    assert line.startswith("mixed_precision: the accelerate configuration says bf16, but bf16=False")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    make_config(kind)


def test_options_of_the_trainer_come_before_the_launcher(make_config, options_of):
    args = make_config(PPOConfig)
    assert asked_engine(args) is Engine.DDP
    options_of("launcher", Engine.FSDP1)
    assert asked_engine(args) is Engine.FSDP1
    args.fsdp = True
    assert asked_engine(args) is Engine.FSDP2


@pytest.mark.parametrize("name", engines.SHIPPED)
def test_the_engine_of_a_configuration(name):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert engine_of_config(config) is name


def test_the_engine_of_other_configurations(tmp_path):
    file = tmp_path / "deepspeed.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    settings = {"deepspeed_config_file": str(file)}
    assert engine_of_config({"distributed_type": "DEEPSPEED", "deepspeed_config": settings}) is Engine.ZERO3
    assert engine_of_config({"distributed_type": "DEEPSPEED"}) is Engine.ZERO2  # its default
    assert engine_of_config({"distributed_type": "FSDP"}) is Engine.FSDP1
    assert engine_of_config({"distributed_type": "MEGATRON_LM"}) is Engine.MEGATRON
    assert engine_of_config({}) is Engine.DDP


@pytest.fixture
def folder(tiny_config, chat_tokenizer, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def messages_of(folder, done, *, engine: str, processes: int = 2) -> dict[str, str]:
    """What the trainers said, the same in each process."""
    assert done.returncode == 0, done.stderr[-4000:]
    written = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    assert all(here == {"engine": engine, "messages": written[0]["messages"]} for here in written)
    assert not any("\n" in message for message in written[0]["messages"].values())
    return written[0]["messages"]


@pytest.mark.slow
def test_what_fsdp2_cannot_do_and_that_it_trains_as_ddp_does(folder):
    done = launch("fsdp2", SCRIPT, folder)
    said = messages_of(folder, done, engine="fsdp2")
    assert said["ppo, a whole model"].startswith("fsdp2: PPOTrainer supports it for adapters only")
    assert said["ppo, critic model"].startswith("critic='model' is not supported with fsdp2: choose critic='adapter'")
    assert said["ppo, accelerator of FSDP1"].startswith("fsdp1 is not supported by PPOTrainer")
    assert said["reward, accelerator of FSDP1"].startswith("fsdp1 is not supported by BradleyTerryTrainer")

    ddp, fsdp2 = (load_file(folder / name / "model.safetensors") for name in ("ddp", "fsdp2"))
    start = LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert ddp.keys() == fsdp2.keys()
    for name, weight in ddp.items():
        torch.testing.assert_close(fsdp2[name], weight, rtol=0, atol=1e-6)
    moved = "model.layers.0.self_attn.q_proj.weight"
    assert (ddp[moved] - start[moved]).abs().max() > 1e-3


@pytest.mark.slow
def test_fsdp_that_accelerate_does_not_turn_on_is_not_silently_ddp(folder):
    """As stock accelerate does on a CPU."""
    done = launch("fsdp2", SCRIPT, folder, stock=True, processes=1)
    said = messages_of(folder, done, engine="ddp", processes=1)
    assert len(said) == 3
    for line in said.values():
        assert line.startswith("fsdp2 is asked for, but accelerate runs ddp on this device (cpu)")
        assert "--accelerate_config ddp" in line


@pytest.mark.slow
def test_ppo_under_zero2(tmp_path):
    """The command, which reads the options before anything else."""
    options = ("--dataset_name", "rows.jsonl", "--reward_model", "rm", "--output_dir", tmp_path / "out")
    done = launch("zero2", ROOT / "recipes" / "ppo.py", *options, stock=True, processes=1)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines and set(lines) == {f"error: zero2 is not supported by PPOTrainer: {REMEDY}"}
    assert not (tmp_path / "out").exists()
