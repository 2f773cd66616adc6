"""Recipes that nobody runs go stale: every YAML parses against its recipe, every header asks for what exists."""

import dataclasses
import importlib
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, Qwen2Config

from hf_rlhf_ext.cli.main import COMMANDS
from hf_rlhf_ext.cli.memory_table import CARDS
from hf_rlhf_ext.cli.options import ModelArguments, machine_defaults
from hf_rlhf_ext.cli.parsing import parse_recipe
from hf_rlhf_ext.cli.requirements import main_requirements
from hf_rlhf_ext.cli.shipped import shipped_configs
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.compare_parts.systems import training_options

RECIPES = Path(__file__).parents[2] / "recipes"
ALL_CONFIGS = sorted((RECIPES / "configs").rglob("*.y*ml"))
COMPARISONS = [path for path in ALL_CONFIGS if path.stem.startswith("compare")]
PUBLIC_REWARDS = [path for path in ALL_CONFIGS if path.parent.name == "public-reward-models"]
CONFIGS = [path for path in ALL_CONFIGS if path not in COMPARISONS and path not in PUBLIC_REWARDS]
"""The configs of one stage, without those of comparisons, which name all of their files themselves, and without those
with public reward models (test_public_reward_models.py)."""
SCRIPTS = [path for path in sorted(RECIPES.glob("*.py")) if "run_recipe(main)" in path.read_text()]
HEADER = re.compile(r"^# /// script\n((?:#(?: .*)?\n)+)# ///\n", re.MULTILINE)  # PEP 723
REQUIRED = {"ppo": ["--reward_model", "runs/reward"]}  # what a YAML may leave to the command line, beside the data set


def arguments_of(recipe: str) -> tuple[type, ...]:
    return importlib.import_module(f"hf_rlhf_ext.recipes.{recipe}").ARGUMENTS


def parse(path: Path, *options: str):
    given = yaml.safe_load(path.read_text())
    data = [] if "dataset_name" in given else ["--dataset_name", "data.jsonl"]
    required = [] if "reward_model" in given else REQUIRED.get(path.stem, ())
    argv = ["--config", str(path), *data, *required, *options]
    return parse_recipe(arguments_of(path.stem), argv, defaults=machine_defaults())


def header(script: Path) -> dict:
    (found,) = HEADER.findall(script.read_text())  # exactly one
    return tomllib.loads("".join(line[2:] or "\n" for line in found.splitlines(keepends=True)))


def test_every_stage_of_every_model_has_a_config_and_a_script():
    found = {(path.parent.name, path.stem) for path in CONFIGS}
    models = {"smollm2-135m", *SHAPES, *(f"card-{card}gb" for card in CARDS)}
    assert found == {(model, stage) for model in models for stage in ("sft", "reward", "ppo")}
    stages = {"sft", "reward", "ppo", "rounds", "quickstart", "inspect_data", "check_reward", "collect"}
    stages |= {"init", "pipeline", "chat", "generate", "best_of_n", "bench_reward", "compare", "plan"}
    assert {path.stem for path in SCRIPTS} == stages


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_the_systems_of_a_comparison_parse(path):
    given = yaml.safe_load(path.read_text())
    args, _, model_args = parse_recipe(arguments_of("compare"), ["--config", str(path)])
    assert list(args.specs) == list(given["systems"])
    assert model_args.lora_r == given["lora_r"]
    for section in ("sft", "reward", "dpo", "grpo", "rloo", "ppo"):
        assert args.section(section) == given.get(section, {})
        if section in given:
            training_options(section, section, given[section], output_dir="runs/x", use_cpu=True, bf16=False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_yaml_parses_and_every_value_arrives(path):
    parsed = parse(path)
    for key, value in yaml.safe_load(path.read_text()).items():
        (owner,) = [arguments for arguments in parsed if hasattr(arguments, key)]
        found = getattr(owner, key)
        found = getattr(found, "value", found)  # enumerations
        assert found == ([] if value == "none" and key == "report_to" else value), key


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_machine_is_assumed(path):
    """Dtype and device come from the machine: a YAML that sets them works on some cards only."""
    assert not {"bf16", "fp16", "use_cpu", "dtype", "trust_remote_code"} & set(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("stale, near", [("learning_rte", "learning_rate"), ("per_device_batch_size", "per_device_")])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_stale_key_fails(path, stale, near, tmp_path):
    spoilt = tmp_path / path.name
    spoilt.write_text(path.read_text() + f"{stale}: 1\n")
    with pytest.raises(UserError, match=f"unknown key `{stale}`: did you mean `{near}"):
        parse(spoilt)


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_defaults_fit_the_machine_and_yield_to_the_user(recipe):
    """TRL's own defaults are bf16 on a card: on a CPU its configs refuse to be made without `use_cpu`."""
    import torch

    argv = ["--dataset_name", "data.jsonl", *REQUIRED.get(recipe, ())]
    *_, args = parse_recipe(arguments_of(recipe), argv, defaults=machine_defaults())
    assert args.use_cpu is not torch.accelerator.is_available()
    *_, args = parse_recipe(arguments_of(recipe), [*argv, "--bf16", "false"], defaults=machine_defaults())
    assert args.bf16 is False


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_inline_metadata_can_be_installed(script):
    metadata = header(script)
    assert metadata.keys() == {"requires-python", "dependencies"}
    pythons = SpecifierSet(metadata["requires-python"])
    assert "3.11" in pythons and "3.10" not in pythons
    for requirement in map(Requirement, metadata["dependencies"]):
        assert not requirement.specifier.contains("999.0"), f"{requirement} has no upper bound"
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), (
            f"not what is here: {requirement}"
        )
        serves_the_page = script.stem in ("collect", "rounds")
        extras = {"collect"} if serves_the_page else set()
        assert requirement.extras == extras, "all else that a recipe needs is a main dependency"


NEEDS = {
    "load_in_4bit": {"bitsandbytes"},
    "reliability": {"crowd-kit", "datasketch", "krippendorff", "py3langid", "scikit-learn"},
}
"""Option of a recipe -> packages that it needs."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_package_brings_what_the_config_needs(path):
    """A rented machine must not find out after it has been paid for."""
    needs = {"gguf"} if path.parent.name == "smollm2-135m" else set()  # the embedded model's file
    for options in parse(path):
        for option, packages in NEEDS.items():
            if getattr(options, option, None) is not None:
                needs |= packages
    main = {requirement.name for requirement in main_requirements()}
    assert needs <= main


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_commands_in_the_docstring_parse(script):
    """What `--help` shows first must not be wrong: its options exist, and the files of the checkout are there.

    A config is shipped, or the docstring says which command writes it.
    """
    (name,) = [command.name for command in COMMANDS if command.recipe == script.name]
    text = script.read_text()
    commands = re.findall(rf"^hf-rlhf {name} ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        words = command.replace("\\\n", " ").split()
        for config in [word for word in words if word.endswith(".yaml")]:
            assert config in shipped_configs() or re.search(rf"`hf-rlhf init .*--output {config}`", text)
        known = {word for word in words if word.startswith("--")} - {"--config"}
        if script.stem == "collect":
            importlib.import_module("hf_rlhf_ext.recipes.collect").parse(words)
        elif script.stem == "quickstart":
            assert known == {"--size", "--seed", "--output_dir"}
        else:
            fields = {name for arguments in arguments_of(script.stem) for name in arguments.__dataclass_fields__}
            assert {word.removeprefix("--") for word in known} <= fields


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_option_of_ours_has_a_help_that_says_its_unit(script):
    """Numbers of ours are counted in something; what TRL and Transformers add is theirs."""
    module = importlib.import_module(f"hf_rlhf_ext.recipes.{script.stem}")
    if script.stem == "collect":
        types = [arguments for subcommand in module.SUBCOMMANDS for arguments in subcommand.load().ARGUMENTS]
    else:
        types = module.ARGUMENTS
    for arguments in types:
        for field in dataclasses.fields(arguments):
            inherited = any(field.name in getattr(base, "__dataclass_fields__", ()) for base in arguments.__mro__[1:])
            if inherited or not arguments.__module__.startswith("hf_rlhf_ext"):
                continue
            text = field.metadata.get("help", "")
            assert len(text) > 10, f"{arguments.__name__}.{field.name}"
            if (
                field.type in (int, float, int | None, float | None)
                and arguments.__module__ != "hf_rlhf_ext.ppo.config"
            ):
                assert UNITS.search(text), f"{arguments.__name__}.{field.name}: {text}"


UNITS = re.compile(
    r"rows|words|share|scale|seed|prompts|tokens|models to train|standard deviations|evaluations|sequences|units|"
    r"completions|pairs|log-odds|score|weight|probability|number|nats?|people|seconds|minutes|\bport\b|added",
    re.IGNORECASE,
)


# What `config.json` of the models says, for the memory that a YAML's comment states.
QWEN = {"vocab_size": 151936, "num_hidden_layers": 28, "tie_word_embeddings": True}
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
SHAPES = {
    "qwen2.5-1.5b": (Qwen2Config, QWEN, (1536, 8960, 12, 2)),
    "qwen2.5-7b": (Qwen2Config, QWEN | {"vocab_size": 152064, "tie_word_embeddings": False}, (3584, 18944, 28, 4)),
    "llama-3.2-3b": (LlamaConfig, LLAMA | {"num_hidden_layers": 28, "tie_word_embeddings": True}, (3072, 8192, 24, 8)),
    "llama-3.1-8b": (LlamaConfig, LLAMA | {"num_hidden_layers": 32}, (4096, 14336, 32, 8)),
}
NF4 = (
    0.5 + 1 / 64 + 4 / (64 * 256)
)  # bytes a weight: 4 bits, an 8-bit scale a block of 64, an fp32 one for 256 of those
MEMORY = re.compile(
    r"NF4 weights ([\d.]+) GB, embeddings(?: and output layer)? in bf16 ([\d.]+) GB, adapter .* fp32 ([\d.]+) GB[.,]"
    r"(?:\n# reference and reward adapters, frozen, in fp32 ([\d.]+) GB)?"
)


@pytest.mark.parametrize(
    "dtype, use_peft, expected",
    [("auto", True, "auto"), ("auto", False, "float32"), ("bfloat16", False, "bfloat16")],
)
def test_weights_that_are_trained_themselves_are_fp32_unless_asked_otherwise(dtype, use_peft, expected):
    argv = ["--dataset_name", "x.jsonl", "--dtype", dtype, "--use_peft", str(use_peft).lower()]
    *_, model_args, args = parse_recipe(arguments_of("reward"), argv, defaults=machine_defaults())
    assert model_args.base_options(args)["dtype"] == expected


def test_the_memory_of_the_embedded_model_is_what_its_shapes_give():
    path = RECIPES / "configs" / "smollm2-135m" / "reward.yaml"
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    config = LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, num_labels=1)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
        weights = sum(p.numel() for p in model.parameters())
        model = get_peft_model(
            model, next(o for o in parse(path) if isinstance(o, ModelArguments)).peft_config("SEQ_CLS")
        )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = " ".join(path.read_text().replace("#", "").split())
    found = re.search(r"Weights ([\d.]+) GB in bf16 \(([\d.]+) in fp32\), adapter .* fp32 ([\d.]+) GB", text).groups()
    assert [float(n) for n in found] == [round(n / 1e9, 2) for n in (weights * 2, weights * 4, trained * 4 * 4)]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_memory_in_the_comment_is_what_the_shapes_give(name, stage):
    path = RECIPES / "configs" / name / f"{stage}.yaml"
    task = "SEQ_CLS" if stage == "reward" else "CAUSAL_LM"
    config_class, options, (hidden, intermediate, heads, kv_heads) = SHAPES[name]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}
    config = config_class(**options | sizes | {"num_key_value_heads": kv_heads, "num_labels": 1})
    auto = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
        embeddings = sum(p.numel() for name, p in model.named_parameters() if re.search("embed_tokens|lm_head", name))
        linear = sum(p.numel() for name, p in model.named_parameters() if name.endswith("proj.weight"))
        model = get_peft_model(model, next(o for o in parse(path) if isinstance(o, ModelArguments)).peft_config(task))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = [linear * NF4, embeddings * 2, trained * 4 * 4]  # weight, gradient, two moments
    expected += [trained * 4 * 2] if stage == "ppo" else []
    found = [float(n) for n in MEMORY.search(path.read_text()).groups() if n is not None]
    assert found == [round(n / 1e9, 2) for n in expected]
