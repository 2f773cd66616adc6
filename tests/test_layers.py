"""The direction of imports (CONTRIBUTING.md): three rings, inwards and downwards only; TRL's internals in one file.

Read from the syntax trees, so that an import inside a function or under TYPE_CHECKING counts too, and so do calls of
`import_module` with a name that stands there.
"""

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "hf_rlhf_ext"

CORE = ["errors", "compat", "checkpointing", "publishing", "data", "modeling", "training", "reward", "ppo"]
"""What a trainer needs, lowest first."""
KIT = ["metrics", "readers", "quality", "hub", "collect", "reward_functions", "study"]
"""What surrounds training, lowest first; the core imports none of it."""
OUTERMOST = ["cli", "recipes", "__main__"]
ORDER = CORE + KIT + OUTERMOST
"""A module imports from its own sub-package and from those before it: never upwards, without any exception."""

TRL_INTERNALS_IN = "compat"
TRL_PUBLIC_SUBMODULES = {"rewards"}
"""Submodules from which TRL's documentation imports: `from trl.rewards import accuracy_reward`."""


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
        elif is_import_call(node) and node.args and isinstance(node.args[0], ast.Constant):
            name = str(node.args[0].value)
            dots = len(name) - len(name.lstrip("."))
            base = package.split(".")[: len(package.split(".")) - dots + 1] if dots else []
            yield node.lineno, ".".join([*base, name.lstrip(".")])


def is_import_call(node: ast.AST) -> bool:
    """True for `import_module(…)`, `importlib.import_module(…)` and `__import__(…)`."""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
    return name in ("import_module", "__import__")


def level(part: str) -> int | None:
    return ORDER.index(part) if part in ORDER else None


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
        elif level(parts[1]) >= level(ours):
            found.append(f"{where}: not from a lower layer")
    return found


def is_trl_internal(path: list[str]) -> bool:
    """True for `trl.a.b` (path: a, b), where `a` is a submodule or private; False for public names such as trl.X."""
    submodules = {found.name for found in pkgutil.iter_modules(find_spec("trl").submodule_search_locations)}
    submodules -= TRL_PUBLIC_SUBMODULES
    return bool(path) and (path[0] in submodules or path[0].startswith("_"))


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
    unknown = {module.split(".")[0] for module in library_files()} - set(ORDER)
    assert not unknown, f"put {sorted(unknown)} into CORE, KIT or OUTERMOST"


def test_no_two_modules_of_the_hub_import_each_other():
    imported = {
        module: {
            name
            for _, name in imported_modules(path.read_text(encoding="utf-8"), f"{PACKAGE}.{module}", is_package=False)
        }
        for module, path in library_files().items()
        if module.startswith("hub.") and path.name != "__init__.py"
    }

    def imports(module: str, other: str) -> bool:
        return any(f"{name}.".startswith(f"{PACKAGE}.{other}.") for name in imported[module])

    assert imports("hub.check", "hub.check_parts")  # so that the test can fail
    found = [(one, other) for one in imported for other in imported if one < other]
    assert not [pair for pair in found if imports(*pair) and imports(*reversed(pair))]


def test_the_core_imports_nothing_of_the_kit():
    """The same rule, spelled without the order: what a reader of the design looks for."""
    outside = {f"{PACKAGE}.{part}" for part in KIT + OUTERMOST}
    found = [
        f"{module}:{line} imports {name}"
        for module, path in library_files().items()
        if module.split(".")[0] in CORE
        for line, name in imported_modules(
            path.read_text(encoding="utf-8"), f"{PACKAGE}.{module}", is_package=path.name == "__init__.py"
        )
        if ".".join(name.split(".")[:2]) in outside
    ]
    assert not found, "\n".join(found)


WHAT_AN_IMPORT_LOADS = """
import sys
from importlib import import_module
for module in sys.argv[1:]:
    import_module(module)
    print(*sorted(name for name in sys.modules if name.split(".")[0] in ("hf_rlhf_ext", "recipes")))
"""


@pytest.mark.slow  # loads torch and TRL
def test_importing_a_trainer_loads_nothing_around_the_core():
    """In a fresh process, where no other test has loaded anything."""
    modules = [f"{PACKAGE}.reward.trainer", f"{PACKAGE}.ppo.trainer"]
    command = [sys.executable, "-c", WHAT_AN_IMPORT_LOADS, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for module, line in zip(modules, done.stdout.splitlines(), strict=True):
        loaded = line.split()
        assert module in loaded and "recipes" not in loaded
        parts = {name.split(".")[1] for name in loaded if "." in name}
        assert parts - set(CORE) == set(), module


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
    # Neither what TYPE_CHECKING guards nor what a function imports when it is called.
    loaded = [node for node in tree.body if not isinstance(node, (ast.If, ast.FunctionDef))]
    top_level = ast.Module(loaded, [])
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
        f"{PACKAGE}.publishing.Publisher",
        f"{PACKAGE}.publishing.set_publisher",
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
        ("ppo.trainer", "from ..hub.card import write_card", "lower layer"),
        ("reward.trainer", "from ..readers.formats import load_comparisons", "lower layer"),
        ("reward.trainer", "import_module('hf_rlhf_ext.hub.push')", "lower layer"),
        ("reward.trainer", "importlib.import_module('..quality.report', __package__)", "lower layer"),
        ("reward.ensemble", "from ..ppo.kl import kl_k1", "lower layer"),
        ("readers.formats", "from ..quality import duplicates", "lower layer"),
        ("hub.card", "from ..cli import versions", "lower layer"),
        ("cli.main", "from ..recipes import ppo", "lower layer"),
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
        ("hub.publisher", "from ..metrics.plots import plot_judged\nfrom ..reward.export import export_merged"),
        ("cli.finish", "from ..hub.push import try_push"),
        ("ppo.trainer", "import_module('json')"),
        ("ppo.trainer", "from .kl import kl_k1\nfrom . import losses"),
        ("ppo.trainer", "from trl import TrlParser, RewardTrainer\nimport trl"),
        ("reward_functions.verifiable", "from trl.rewards import think_format_reward"),
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
