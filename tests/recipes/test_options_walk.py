"""Every option that a command lists is read: by the recipe and the modules it imports, or by the trainer it runs.

An option counts as read where its name is an attribute that some module loads, as in `args.seed` or
`getattr(args, "seed")`, among the modules that the command imports. Of PPO, which overrides most of `Trainer`,
`tests/ppo/test_trainer_options.py` says for every option of `TrainingArguments` where it is used. Options that nothing
reads are not listed, and refused: `unused_options` of the dataclasses.
"""

import ast
import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
import trl
from transformers import TrainingArguments

from hf_rlhf_ext.cli import main_options
from hf_rlhf_ext.cli.idle_options import PARTS, idle_options
from hf_rlhf_ext.cli.options import machine_defaults
from hf_rlhf_ext.cli.parsing import parse_recipe
from hf_rlhf_ext.errors import UserError
from tests.ppo.test_trainer_options import USED

PACKAGE = "hf_rlhf_ext"
RECIPES = {
    name: f"{PACKAGE}.recipes.{name}"
    for name in (
        "sft",
        "reward",
        "ppo",
        "rounds",
        "check_reward",
        "bench_reward",
        "inspect_data",
        "quickstart",
        "pipeline",
        "init",
        "chat",
        "generate",
        "best_of_n",
        "compare",
        "plan",
    )
}
COLLECT = ("demo", "sample", "serve", "links", "export", "import_judged", "simulate", "space")
RECIPES |= {f"collect {name}": f"{PACKAGE}.recipes.collect_parts.{name}" for name in COLLECT}
MAIN = {
    "sft": main_options.SFT,
    "reward": main_options.REWARD,
    "ppo": main_options.PPO,
    "rounds": main_options.ROUNDS,
    "pipeline": main_options.PIPELINE,
    "init": main_options.INIT,
    "check_reward": main_options.CHECK_REWARD,
    "bench_reward": main_options.BENCH_REWARD,
    "chat": main_options.CHAT,
    "generate": main_options.GENERATE,
    "best_of_n": main_options.BEST_OF_N,
    "compare": main_options.COMPARE,
    "plan": main_options.PLAN,
}

TRANSFORMERS = Path(transformers.__file__).parent
TRL = Path(trl.__file__).parent
TRAINER = [
    *(TRANSFORMERS / f"{name}.py" for name in ("trainer", "trainer_callback", "trainer_optimizer", "training_args")),
    *(TRANSFORMERS / "integrations").glob("*.py"),
    *(TRL / "trainer" / f"{name}.py" for name in ("base_trainer", "base_config", "utils", "model_config")),
]
TRAINERS = {
    "sft": [*TRAINER, TRL / "trainer" / "sft_trainer.py"],
    "reward": [*TRAINER, TRL / "trainer" / "reward_trainer.py"],
    "ppo": TRAINER,
    "rounds": TRAINER,
    "pipeline": TRAINER,
    "compare": TRAINER,
}
"""Modules of other libraries that a command runs."""

READ_IN_LOOPS = {
    "pipeline": ("sft", "reward", "ppo"),
    "compare": ("sft", "reward", "dpo", "grpo", "rloo", "ppo"),
}
"""Options that are read by `getattr` with a name that is not written there: the pipeline's sections, for each stage."""


def read_names(files: list[Path]) -> set[str]:
    """Names of all attributes that the files load, by a dot or by `getattr`."""
    return set().union(*map(names_of, files))


@cache
def names_of(file: Path) -> frozenset[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
        is_getattr = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr"
        if is_getattr and isinstance(node.args[1], ast.Constant):
            names.add(node.args[1].value)
    return frozenset(names)


@cache
def imported_by(module: str) -> frozenset[str]:
    """The modules of this library that a module imports itself."""
    file = Path(find_spec(module).origin)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join([*parents, *filter(None, [node.module])])
            found.add(name)
            if name == PACKAGE:  # its public names, such as `PPOTrainer`
                public = [getattr(import_module(PACKAGE), alias.name) for alias in node.names]
                found.update(str(getattr(value, "__module__", "")) for value in public)
            else:
                found.update(f"{name}.{alias.name}" for alias in node.names)
    return frozenset(name for name in found if name.startswith(PACKAGE) and is_module(name))


@cache
def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # a name inside a module
        return False


def files_of(module: str) -> list[Path]:
    """The files of a module and of all that it imports from this library."""
    # The package itself lists all that is public, whether the command uses it or not.
    seen, waiting = {PACKAGE}, [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += imported_by(name)
    return [Path(find_spec(name).origin) for name in seen - {PACKAGE}]


def listed_options(types, **options) -> list[str]:
    """The names of the options that `--help-all` lists."""
    text = printed_help(types, "--help-all", **options)
    return [word[2:] for word in first_words(text) if word.startswith("--")]


def first_words(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.startswith("  --"):
            yield line.split()[0]


def printed_help(types, flag, **options) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        parse_recipe(types, [flag], **options)
    return out.getvalue()


def unread_options(name: str) -> list[str]:
    """The options of a command that are listed, and that nothing reads."""
    module = import_module(RECIPES[name])
    names = read_names([*files_of(RECIPES[name]), *TRAINERS.get(name, ())])
    of_trainer = {field.name for field in fields(TrainingArguments)}
    unread = []
    for option in listed_options(module.ARGUMENTS):
        if name == "ppo" and option in of_trainer:
            is_read = option in USED or option == "resume_from_checkpoint"
        else:
            is_read = option in names or option in READ_IN_LOOPS.get(name, ())
        if not is_read:
            unread.append(option)
    return unread


@pytest.mark.parametrize("name", RECIPES)
def test_every_listed_option_is_read(name):
    assert unread_options(name) == []


@pytest.mark.parametrize("module", ["hf_rlhf_ext.cli.merge", "hf_rlhf_ext.hub.push", "hf_rlhf_ext.cli.env"])
def test_every_option_of_the_small_commands_is_read(module):
    parser = import_module(module).make_parser()
    names = read_names(files_of(module))
    assert [action.dest for action in parser._actions if action.dest not in names | {"help"}] == []


def test_an_option_that_nothing_reads_is_found(monkeypatch):
    @dataclass
    class Forgotten:
        read_by_no_module_at_all: int = 3

    module = import_module(RECIPES["sft"])
    monkeypatch.setattr(module, "ARGUMENTS", (*module.ARGUMENTS, Forgotten))
    assert unread_options("sft") == ["read_by_no_module_at_all"]


@pytest.mark.parametrize("name", RECIPES)
def test_options_without_effect_are_refused_by_name_with_the_reason(name):
    types = import_module(RECIPES[name]).ARGUMENTS
    unused = {}
    for dataclass_type in types:
        unused |= getattr(dataclass_type, "unused_options", {})
    known = {field.name for dataclass_type in types for field in fields(dataclass_type)}
    for option, reason in unused.items():
        assert option in known  # otherwise the next version of a library has renamed it
        for typed in (f"--{option}", f"--{option.replace('_', '-')}"):
            with pytest.raises(UserError, match=f"`{typed}` has no effect in .*: leave it out") as error:
                parse_recipe(types, [typed, "1"])
            assert reason in str(error.value)


def options_of(name, *argv):
    return parse_recipe(import_module(RECIPES[name]).ARGUMENTS, argv, defaults=machine_defaults())


NEEDED = {"sft": [], "reward": [], "ppo": ["--reward_funcs", "rewards.short"]}


@pytest.mark.parametrize(
    "name, argv, line",
    [
        ("sft", ["--hub_model_id", "alice/x"], "not used without --push_to_hub true: hub_model_id"),
        ("sft", ["--use_peft", "no", "--lora_r", "4"], "not used without --use_peft true: lora_r"),
        ("reward", ["--combine", "min", "--penalty", "2"], "not used without --members 2 or more: combine, penalty"),
        ("reward", ["--eval_steps", "3"], "not used without --eval_strategy steps: eval_steps"),
        ("ppo", ["--kl_horizon", "9"], "not used without --kl_target: kl_horizon"),
        ("ppo", ["--ptx_batch_size", "2"], "not used without --ptx_coef: ptx_batch_size"),
    ],
)
def test_an_option_that_belongs_to_one_that_is_off_is_said(name, argv, line):
    words = ["--dataset_name", "x.jsonl", *NEEDED[name]]
    assert idle_options(*options_of(name, *words)) == []
    assert idle_options(*options_of(name, *words, *argv)) == [line]


def test_all_parts_are_options_of_a_command():
    known = set()
    for name in NEEDED:
        known.update(field.name for kind in import_module(RECIPES[name]).ARGUMENTS for field in fields(kind))
    for needed, part in PARTS.items():
        assert {needed, *part.options} <= known


@pytest.mark.parametrize("name", MAIN)
def test_help_is_short_and_has_defaults(name):
    types = import_module(RECIPES[name]).ARGUMENTS
    options = {"main_options": MAIN[name], "defaults": machine_defaults() if name in TRAINERS else {}}
    if name in ("rounds", "pipeline", "compare"):
        options["defaults"] = {}
    short = printed_help(types, "--help", **options)
    shown = [word for word in first_words(short) if word.startswith("--")]
    assert len(shown) == sum(map(len, MAIN[name].values())) <= 20
    assert len(short.splitlines()) < 90
    others = len(listed_options(types)) - len(shown)
    assert (f"--help-all shows the other {others} options." in short) == bool(others)
    assert "default: None" not in short and "(default: " in short
