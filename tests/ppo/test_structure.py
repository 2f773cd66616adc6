"""How `PPOTrainer` is built: by composition, with one place for its state.

Read from the source, so that a store which no test happens to run is seen as well.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from hf_rlhf_ext import compat
from hf_rlhf_ext.ppo import trainer as trainer_module
from hf_rlhf_ext.ppo.trainer import PPOTrainer

FOLDER = Path(trainer_module.__file__).parent
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

STATE = "ppo"
"""Attributes that change during a run, with everything below them."""
OF_TRAINER = {
    "hub_model_id",  # `init_hf_repo` sets it in Trainer too
    "optimizer",  # prepared with the weights, where an evaluation shards them before `train` does
    "control",  # what `callback_handler.on_evaluate` returns, as Trainer's own `evaluate` keeps it
    "control.should_training_stop",
    "control.should_save",
    "control.should_evaluate",
}
"""Attributes that methods of `Trainer` must set, as `Trainer` reads them."""


def stores(function: ast.AST, owner: str) -> Iterator[tuple[int, str]]:
    """Line and attribute path of everything that `function` stores into `owner`: `state.epoch` for `self.state.epoch`.

    Counted are assignments of every kind, targets of `for` and `with`, `del`, items (`self.counts["a"] = 1`), `setattr`
    and `delattr`, and the same through a local name for an attribute (`args = self.args; args.seed = 1`). The path of a
    name that is not known before it runs is `*`.
    """
    aliases = {owner: ()}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
            path = path_of(node.value, {owner: ()})
            for target in node.targets:
                if path and isinstance(target, ast.Name):
                    aliases[target.id] = path

    for node in ast.walk(function):
        if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            path = path_of(node, aliases)
            if path:
                yield node.lineno, ".".join(path)
        elif isinstance(node, ast.Call) and called(node) in ("setattr", "delattr", "__setattr__", "__delattr__"):
            path = path_of(node.args[0], aliases)
            if path is not None:
                name = node.args[1]
                known = isinstance(name, ast.Constant)
                yield node.lineno, ".".join([*path, str(name.value) if known else "*"])


def path_of(node: ast.expr, aliases: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Attributes from the owner to `node`, an item counted as its container; None where it starts elsewhere."""
    attributes = []
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            attributes.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Call) and called(node) == "vars" and node.args:
            attributes.append("__dict__")
            node = node.args[0]
        else:
            return None
    if node.id not in aliases:
        return None
    return (*aliases[node.id], *reversed(attributes))


def called(node: ast.Call) -> str:
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def is_allowed(path: str) -> bool:
    return path == STATE or path.startswith(f"{STATE}.") or path in OF_TRAINER


def violations(source: str, class_name: str) -> list[str]:
    """Stores of that class's methods, `__init__` left out, into anything but its state."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef) or node.name != class_name:
            continue
        for method in node.body:
            if not isinstance(method, FUNCTIONS) or method.name == "__init__" or not method.args.args:
                continue
            owner = method.args.args[0].arg
            for line, path in stores(method, owner):
                if not is_allowed(path):
                    lines.append(f"{class_name}.{method.name}, line {line}: stores into {owner}.{path}")
    return lines


def test_methods_store_into_the_state_and_into_what_trainer_reads():
    found = violations(Path(trainer_module.__file__).read_text(encoding="utf-8"), "PPOTrainer")
    assert not found, "\n".join(found)


def test_what_the_methods_may_store_is_all_used():
    """An entry that no method needs any more must be removed from the list."""
    tree = ast.parse(Path(trainer_module.__file__).read_text(encoding="utf-8"))
    stored = set()
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS) and node.name != "__init__":
            stored |= {path for _, path in stores(node, "self")}
    assert OF_TRAINER - stored == set()


def test_nothing_else_in_ppo_stores_into_a_trainer():
    """Functions that get a trainer only read it: no object sets state on another one."""
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, FUNCTIONS):
                found += [f"{path.name}:{line} stores into trainer.{name}" for line, name in stores(node, "trainer")]
                found += [
                    f"{path.name}:{line} stores into {name}"
                    for line, name in stores(node, "self")
                    if name.startswith("trainer.")
                ]
    assert not found, "\n".join(found)


ELSEWHERE = {
    ("checkpoints.py", "args.save_total_limit"),  # for the length of a save only: rotation is ours
    ("prompts.py", "args.max_steps"),  # of a copy
    ("stretch.py", "args.max_steps"),  # for the length of a call of `train`
}
"""What functions of `ppo/` store into Trainer's options, state and control."""


def test_nothing_in_ppo_changes_options_state_or_control_behind_the_trainer_s_back():
    stored = set()
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, FUNCTIONS):
                for owner in ("args", "state", "control"):
                    stored |= {(path.name, f"{owner}.{name}") for _, name in stores(node, owner)}
    # `PPOState.load` fills the state that it has just made.
    made = {("state.py", "state.step_in_rollout"), ("state.py", "state.rollout")}
    assert stored - made == ELSEWHERE


def test_the_trainer_inherits_trl_s_base_and_nothing_of_ours():
    assert PPOTrainer.__mro__ == (PPOTrainer, compat.BaseTrainer, transformers.Trainer, object)


def test_ppo_has_no_mixin():
    names = []
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names.append(f"{path.name}: {node.name}")
    assert names and [name for name in names if name.endswith("Mixin")] == []


# The check itself must be able to fail.

METHOD = """
class PPOTrainer:
    def __init__(self):
        self.stack = None

    def compute_loss(self, model, inputs):
        {}
"""


@pytest.mark.parametrize(
    "statement, path",
    [
        ("self.kl_coef = 0.1", "kl_coef"),
        ("self.kl_coef += 0.1", "kl_coef"),
        ("self.kl_coef: float = 0.1", "kl_coef"),
        ("self.kl_coef, self.ppo.rollout = 0.1, None", "kl_coef"),
        ("first, *self.rest = inputs", "rest"),
        ("[self.kl_coef] = inputs", "kl_coef"),
        ("loss = self.last_loss = model(inputs)", "last_loss"),
        ("del self.kl_coef", "kl_coef"),
        ("for self.row in inputs: pass", "row"),
        ("with model() as self.context: pass", "context"),
        ("setattr(self, 'kl_coef', 0.1)", "kl_coef"),
        ("setattr(self, name, 0.1)", "*"),
        ("setattr(self.args, 'seed', 0)", "args.seed"),
        ("delattr(self, 'kl_coef')", "kl_coef"),
        ("object.__setattr__(self, 'kl_coef', 0.1)", "kl_coef"),
        ("self.__dict__['kl_coef'] = 0.1", "__dict__"),
        ("vars(self)['kl_coef'] = 0.1", "__dict__"),
        ("self.args.seed = 0", "args.seed"),
        ("self.state.epoch -= 1", "state.epoch"),
        ("self.control.should_stop_soon = True", "control.should_stop_soon"),
        ("self.counts['kl'] += 1", "counts"),
        ("self.engine.pools[0].size = 1", "engine.pools.size"),
        ("args = self.args; args.seed = 0", "args.seed"),
        ("def inner():\n            self.kl_coef = 0.1", "kl_coef"),
        ("self.ppo_state = None", "ppo_state"),
    ],
)
def test_the_checker_sees(statement, path):
    found = violations(METHOD.format(statement), "PPOTrainer")
    assert len(found) == 1 and found[0].endswith(f"self.{path}"), found


@pytest.mark.parametrize(
    "statement",
    [
        "self.ppo.kl_coef = 0.1",
        "self.ppo = PPOState()",
        "self.ppo.moments.mean += 1",
        "self.ppo.history['kl'] = 0.1",
        "state = self.ppo; state.kl_coef = 0.1",
        "setattr(self.ppo, 'kl_coef', 0.1)",
        "self.control.should_training_stop = True",
        "kl_coef = self.kl_coef",
        "inputs['kl'] = self.kl_coef",
        "inputs[self.step] = 1",
        "model.kl_coef = self.kl_coef",
        "if (rate := self.args.learning_rate) > 0: print(rate)",
        "self.log({'kl': 0.1})",
    ],
)
def test_the_checker_lets_pass(statement):
    assert violations(METHOD.format(statement), "PPOTrainer") == []


def test_the_checker_knows_the_owner_by_its_place():
    assert violations("class PPOTrainer:\n    def train(this):\n        this.step = 1", "PPOTrainer") != []
    assert violations("class Other:\n    def train(self):\n        self.step = 1", "PPOTrainer") == []
