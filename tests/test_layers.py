"""The direction of imports (docs: CONTRIBUTING.md): downwards only, and TRL's internals in one file.

Read from the syntax trees, so that an import inside a function or under TYPE_CHECKING counts too.
"""

import ast
import pkgutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "hf_rlhf_ext"

# Lowest first. A module imports from its own sub-package and from lower layers: never upwards, never sideways.
LAYERS = [
    {"errors"},
    {"compat", "checkpointing"},
    {"metrics"},
    {"data"},
    {"modeling"},
    {"reward", "ppo", "evaluation", "collect", "hub", "cli"},
    {"scripts"},
]
SIDEWAYS = {
    ("ppo", "reward.scorer"),  # PPO scores with what the reward layer trained
    ("ppo", "reward.ensemble"),
    ("reward", "hub.trainer"),  # a trainer knows how to push; cards are the recipes' business
    ("ppo", "hub.trainer"),
    ("hub", "reward.export"),
}
TRL_INTERNALS_IN = "compat"


def imported_modules(source: str, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that `source`, the text of `module`, imports."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def level(part: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if part in layer), None)


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What `module` imports against the rules, one line each. `module` is dotted, without the package: `ppo.kl`."""
    ours = module.split(".")[0]
    found = []
    for line, name in imported_modules(source, f"{PACKAGE}.{module}", is_package=is_package):
        where = f"{module}:{line} imports {name}"
        parts = name.split(".")
        if parts[0] in {"recipes", "tests"}:
            found.append(f"{where}: the library knows no {parts[0]}")
        if parts[0] == "trl" and ours != TRL_INTERNALS_IN and is_trl_internal(parts[1:]):
            found.append(f"{where}: TRL's internals come through {TRL_INTERNALS_IN}")
        if parts[0] != PACKAGE or len(parts) == 1 or parts[1] == ours:
            continue
        if level(parts[1]) is None or level(ours) is None:
            found.append(f"{where}: not a module of a known layer")
        elif level(parts[1]) >= level(ours) and not is_sideways_allowed(ours, parts[1:]):
            found.append(f"{where}: not from a lower layer")
    return found


def is_trl_internal(path: list[str]) -> bool:
    """True for `trl.a.b` (path: a, b), where `a` is a submodule or private; False for public names such as trl.X."""
    submodules = {found.name for found in pkgutil.iter_modules(find_spec("trl").submodule_search_locations)}
    return bool(path) and (path[0] in submodules or path[0].startswith("_"))


def is_sideways_allowed(ours: str, path: list[str]) -> bool:
    return (ours, ".".join(path[:2])) in SIDEWAYS


def library_files() -> dict[str, Path]:
    """Dotted name without the package -> file, the root `__init__` left out."""
    root = ROOT / PACKAGE
    files = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            files[name] = path
    return files


def test_library_imports_point_downwards():
    found = [
        line
        for module, path in library_files().items()
        for line in violations(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_every_module_has_a_layer():
    unknown = {module.split(".")[0] for module in library_files()} - set().union(*LAYERS)
    assert not unknown, f"put {sorted(unknown)} into LAYERS"


def test_recipes_import_only_public_trl():
    found = [
        f"{path.name}:{line} imports {name}"
        for path in sorted((ROOT / "recipes").rglob("*.py"))
        for line, name in imported_modules(path.read_text(encoding="utf-8"), path.stem, is_package=False)
        if name.startswith("trl.") and is_trl_internal(name.split(".")[1:])
    ]
    assert not found, "\n".join(found)


def test_the_root_loads_only_what_is_light():
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    top_level = ast.Module([node for node in tree.body if not isinstance(node, ast.If)], [])  # not TYPE_CHECKING
    names = {
        name
        for _, name in imported_modules(ast.unparse(top_level), PACKAGE, is_package=True)
        if "importlib" not in name
    }
    assert names == {
        "typing.TYPE_CHECKING",
        "typing.Any",
        f"{PACKAGE}.compat.require_supported_trl",
        f"{PACKAGE}.errors.UserError",
    }


# The checker itself must be able to fail.
@pytest.mark.parametrize(
    "module, source, reason",
    [
        ("data.schema", "from hf_rlhf_ext.modeling import loading", "lower layer"),
        ("data.schema", "from ..ppo.config import PPOConfig", "lower layer"),
        ("data.schema", "def f():\n    from ..modeling.heads import ScalarHead", "lower layer"),
        ("data.schema", "if TYPE_CHECKING:\n    import hf_rlhf_ext.reward.trainer", "lower layer"),
        ("reward.trainer", "from ..ppo.kl import kl_k1", "lower layer"),
        ("reward.trainer", "from ..hub import card", "lower layer"),
        ("ppo.trainer", "from ..reward.trainer import BradleyTerryTrainer", "lower layer"),
        ("ppo.trainer", "from ..reward import trainer", "lower layer"),
        ("hub.card", "from ..cli import versions", "lower layer"),
        ("compat", "from .cli import versions", "lower layer"),
        ("data.schema", "from .. import BradleyTerryTrainer", "known layer"),
        ("data.schema", "from hf_rlhf_ext import PPOTrainer", "known layer"),
        ("ppo.trainer", "from trl.trainer.utils import use_adapter", "TRL's internals"),
        ("ppo.trainer", "import trl.trainer.utils", "TRL's internals"),
        ("ppo.trainer", "from trl import models", "TRL's internals"),
        ("ppo.trainer", "import recipes.sft", "no recipes"),
        ("cli", "from tests.conftest import tiny_llama", "no tests"),
    ],
)
def test_the_checker_sees(module, source, reason):
    found = violations(source, module)
    assert len(found) == 1 and reason in found[0], found


@pytest.mark.parametrize(
    "module, source",
    [
        ("ppo.trainer", "from ..reward.scorer import RewardScorer"),
        ("ppo.trainer", "from ..reward import scorer"),
        ("ppo.trainer", "from .kl import kl_k1\nfrom . import losses"),
        ("ppo.trainer", "from trl import TrlParser, RewardTrainer\nimport trl"),
        ("ppo.trainer", "from ..compat import BaseTrainer\nfrom ..errors import UserError"),
        ("compat", "from trl.trainer.base_trainer import _BaseTrainer"),
        ("reward.trainer", "import datasets\nfrom data import something_else"),  # another library's `data`
    ],
)
def test_the_checker_lets_pass(module, source):
    assert violations(source, module) == []


def test_the_checker_resolves_relative_imports_of_packages():
    assert violations("from ..ppo import kl", "data", is_package=True) != []
    assert violations("from .ppo import kl", "data", is_package=True) == []  # hf_rlhf_ext.data.ppo
    assert violations("from .ppo import kl", "compat", is_package=False) != []
    assert violations("from .schema import x\nfrom ..errors import UserError", "data", is_package=True) == []
