"""The words that a function looks for, found without calling it.

Seen are collections of words (sets, lists, tuples, keys of a dict, a compiled pattern) that the function reaches:
global variables that its code names, closures, defaults, attributes, attributes of objects such as VADER's `lexicon`,
and the same of functions and classes that it uses. In the code itself, collections are seen, and words that are counted
or looked for in a text (`text.count("happy")`, `"happy" in text`, `re.findall(r"\\bhappy\\b", text)`).

Not seen: a file of words that is read when the function is called, words that are put together while it runs, and what
a model or a tokenizer knows.
"""

import dis
import functools
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from ..reward_functions.base import RewardFunction

SHARED_SHARE = 0.01
"""Two lexicons are related if they share this part of the smaller one, and at least one word.

One word in common is much for short lists (up to 100 words), and an accident for two lists of 7,000.
"""
_WORD = re.compile(r"[^\W\d_]{2,}(?:['’ -][^\W\d_]+){0,3}")
_NO_LEXICON = frozenset(
    {"role", "content", "user", "assistant", "system", "prompt", "prompts", "completion", "completions"}
)
"""Words by which messages and columns are read, in whatever collection they stand."""
_LOOKS_FOR = frozenset({"count", "find", "rfind", "index", "startswith", "endswith", "removeprefix", "removesuffix"})
_PATTERNS = frozenset({"findall", "finditer", "search", "match", "fullmatch", "compile", "sub", "split"})
_OPAQUE = frozenset(
    {"torch", "transformers", "tokenizers", "peft", "trl", "accelerate", "numpy", "scipy", "sklearn", "pandas"}
    | {"datasets", "evaluate", "safetensors", "huggingface_hub", "tqdm", "yaml", "pytest", "builtins"}
    | set(sys.stdlib_module_names)
)
"""Packages whose code and objects have many words that say nothing of a reward."""
_OF_A_WORD = (int, float, str, list, tuple, set, frozenset, type(None))
"""What a dict of words may say of each: a weight, a label, or several."""
_DEEPEST = 12
_MOST_ITEMS = 1000
"""Entries of a collection that are looked into."""


class Lexicon(NamedTuple):
    """A collection of words.

    place: where it was found, such as `POSITIVE` or `cheerful._analyzer.lexicon`.
    words: in lower case.
    """

    place: str
    words: frozenset[str]


class Found(NamedTuple):
    """What a function reaches.

    lexicons: its collections of words.
    models: ids of the models (`torch.nn.Module`), with the models, so that the ids stay theirs.
    has_code: whether its code could be read.
    """

    lexicons: list[Lexicon]
    models: dict[int, Any]
    has_code: bool


def find_lexicons(function: Callable) -> Found:
    """The words that a function looks for. See the module for what is seen."""
    search = _Search()
    search.visit(function, _name(function), 0)
    in_code = [Lexicon(f"the code of {place}", frozenset(words)) for place, words in search.words_in_code.items()]
    return Found(search.lexicons + in_code, search.models, search.has_code)


def shared_words(first: frozenset[str], second: frozenset[str]) -> frozenset[str]:
    """The words of both lexicons, if they are enough to relate them (`SHARED_SHARE`); else empty."""
    shared = first & second
    enough = max(1, math.ceil(SHARED_SHARE * min(len(first), len(second))))
    return shared if len(shared) >= enough else frozenset()


def words_of(values: Iterable[Any]) -> frozenset[str]:
    """The words of a collection, in lower case; empty if most of its entries are no words."""
    words = set()
    n_entries = 0
    for value in values:
        n_entries += 1
        if isinstance(value, str) and _WORD.fullmatch(value.strip()):
            words.add(value.strip().lower())
    if 2 * len(words) < n_entries:  # such as emojis, patterns or numbers
        return frozenset()
    return frozenset(words - _NO_LEXICON)


def words_of_pattern(pattern: str) -> frozenset[str]:
    """The words in a regular expression."""
    plain = re.sub(r"\\.|\(\?[^):]*[:)]?|\[[^\]]*\]", " ", pattern)  # without \b, (?:, (?i) and [a-z]
    return frozenset(word.lower() for word in re.findall(r"[^\W\d_]{2,}", plain)) - _NO_LEXICON


class _Search:
    """Walks from a function to the words that it reaches."""

    def __init__(self) -> None:
        self.lexicons: list[Lexicon] = []
        self.words_in_code: dict[str, set[str]] = {}
        self.models: dict[int, Any] = {}
        self.has_code = False
        self._seen: dict[int, Any] = {}  # with the objects, so that no id is used twice

    def visit(self, value: Any, place: str, depth: int) -> None:
        """Looks into a value that was found at a place."""
        if value is None or isinstance(value, str | bytes | int | float | complex) or depth > _DEEPEST:
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, FunctionType):
            self._visit_function(value, place, depth)
        elif isinstance(value, MethodType):
            self.visit(value.__func__, place, depth + 1)
            self.visit(value.__self__, place, depth + 1)
        elif isinstance(value, functools.partial):
            self.visit(value.func, place, depth + 1)
            self.visit(value.args, place, depth + 1)
            self._visit_named(value.keywords, place, depth)
        elif isinstance(value, re.Pattern):
            if isinstance(value.pattern, str):
                self._add(place, words_of_pattern(value.pattern))
        elif isinstance(value, Mapping | set | frozenset | list | tuple):
            self._visit_collection(value, place, depth)
        elif isinstance(value, type):
            self._visit_class(value, place, depth)
        elif not isinstance(value, ModuleType):
            self._visit_object(value, place, depth)

    def _add(self, place: str, words: frozenset[str]) -> None:
        if words:
            self.lexicons.append(Lexicon(place, words))

    def _visit_named(self, values: Mapping[str, Any], place: str, depth: int) -> None:
        """Looks into values whose names are the programmer's, not words that a text may have."""
        for name, value in values.items():
            self.visit(value, f"{place}.{name}", depth + 1)

    def _visit_collection(self, values: Any, place: str, depth: int) -> None:
        entries = values
        has_words = True
        if isinstance(values, Mapping):
            entries = list(values.values())
            has_words = all(isinstance(entry, _OF_A_WORD) for entry in entries)  # else a table of functions or settings
        if has_words:
            self._add(place, words_of(values))  # of a mapping: its keys
        for _, entry in zip(range(_MOST_ITEMS), entries, strict=False):
            self.visit(entry, place, depth + 1)

    def _visit_class(self, cls: type, place: str, depth: int) -> None:
        for one in cls.__mro__:
            if _is_opaque(one):
                continue
            for name, value in vars(one).items():
                if name.startswith("__") and name not in ("__call__", "__init__"):
                    continue
                if isinstance(value, staticmethod | classmethod):
                    value = value.__func__
                elif isinstance(value, property):
                    value = value.fget
                self.visit(value, f"{one.__name__}.{name}", depth + 1)

    def _visit_object(self, value: Any, place: str, depth: int) -> None:
        if isinstance(value, RewardFunction):  # what it has beside are settings, such as names of columns
            self.has_code = True
            for pattern in value.looked_for:
                self._add(f"the pattern of {place}", words_of_pattern(pattern))
            return
        wrapped = getattr(value, "__wrapped__", None)
        if wrapped is not None and callable(value):  # such as lru_cache
            self.visit(wrapped, place, depth + 1)
        if _is_model(value):
            self.models[id(value)] = value
            return
        if type(value).__module__.partition(".")[0] in _OPAQUE:
            return
        attributes = dict(getattr(value, "__dict__", {}))
        for cls in type(value).__mro__:
            slots = vars(cls).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                attributes.setdefault(name, getattr(value, name, None))
        self._visit_named(attributes, place, depth)
        self.visit(type(value), place, depth + 1)

    def _visit_function(self, function: FunctionType, place: str, depth: int) -> None:
        self.visit(getattr(function, "__wrapped__", None), place, depth + 1)
        for cell in function.__closure__ or ():
            try:
                self.visit(cell.cell_contents, place, depth + 1)
            except ValueError:  # a variable that has no value yet
                continue
        self.visit(function.__defaults__, place, depth + 1)
        self._visit_named(function.__kwdefaults__ or {}, place, depth)
        self._visit_named(function.__dict__, place, depth)
        if _is_opaque(function):
            return
        self.has_code = True
        self._visit_code(function.__code__, function, place, depth)

    def _visit_code(self, code: CodeType, function: FunctionType, place: str, depth: int) -> None:
        words = _words_in_code(code)
        if words:
            self.words_in_code.setdefault(function.__name__, set()).update(words)
        for name in code.co_names:
            if name not in function.__globals__:
                continue
            value = function.__globals__[name]
            if not isinstance(value, ModuleType):
                self.visit(value, name, depth + 1)
            elif value.__name__.partition(".")[0] not in _OPAQUE:
                for attribute in code.co_names:
                    self.visit(getattr(value, attribute, None), f"{name}.{attribute}", depth + 1)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):  # a comprehension, a lambda or a function in the function
                self._visit_code(constant, function, place, depth)


def _words_in_code(code: CodeType) -> set[str]:
    """Words of collections that stand in the code, and words that are counted or looked for in a text."""
    words: set[str] = set()
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PRECALL", "PUSH_NULL")]
    for place, step in enumerate(steps):
        after = [other.opname for other in steps[place + 1 : place + 4]]
        before = [other.argval for other in steps[max(0, place - 2) : place] if isinstance(other.argval, str)]
        if step.opname in ("BUILD_LIST", "BUILD_SET", "BUILD_TUPLE") and step.arg:
            parts = steps[max(0, place - step.arg) : place]
            if all(part.opname == "LOAD_CONST" for part in parts):
                words |= words_of(part.argval for part in parts)
        if step.opname != "LOAD_CONST":
            continue
        constant = step.argval
        if isinstance(constant, tuple | frozenset):
            words |= _words_of_constant(constant, steps, place)
        elif isinstance(constant, str) and before and before[-1] in _PATTERNS:
            words |= words_of_pattern(constant)
        elif isinstance(constant, str) and ("CONTAINS_OP" in after or (before and before[-1] in _LOOKS_FOR)):
            words |= words_of([constant])
    return words


def _words_of_constant(constant: Any, steps: list[dis.Instruction], place: int) -> frozenset[str]:
    """The words of a tuple or frozenset of the code, unless they are names of arguments, of imports or of columns."""
    following = steps[place + 1].opname if place + 1 < len(steps) else ""
    if following in ("IMPORT_NAME", "CALL_KW", "CALL_FUNCTION_KW"):
        return frozenset()
    if following == "BUILD_CONST_KEY_MAP":  # a dict: of words only if its values are numbers
        values = steps[max(0, place - len(constant)) : place]
        if not all(isinstance(value.argval, int | float) and value.opname == "LOAD_CONST" for value in values):
            return frozenset()
    return words_of(constant)


def _is_opaque(value: Any) -> bool:
    """Whether the code of a class or a function has words that say nothing of a reward."""
    module = getattr(value, "__module__", None) or ""
    if module.startswith("hf_rlhf_ext.") and not module.startswith("hf_rlhf_ext.metrics."):
        return True  # what its objects have is still seen
    return module.partition(".")[0] in _OPAQUE


def _is_model(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def is_same_callable(first: Callable, second: Callable) -> bool:
    """Whether two callables are one: the same object, or the same function of the same file with the same closure."""
    if first is second:
        return True
    one, other = _unwrapped(first), _unwrapped(second)
    if isinstance(one, MethodType) and isinstance(other, MethodType):
        return one.__func__ is other.__func__ and one.__self__ is other.__self__
    if one is other:
        return True
    if isinstance(one, RewardFunction) and isinstance(other, RewardFunction):
        return one.is_same_as(other)
    if not (isinstance(one, FunctionType) and isinstance(other, FunctionType)):
        return False
    if one.__code__ != other.__code__ or one.__qualname__ != other.__qualname__:
        return False
    if inspect.getsourcefile(one) != inspect.getsourcefile(other):
        return False
    contents = [[cell.cell_contents for cell in function.__closure__ or ()] for function in (one, other)]
    return all(a is b or _are_equal(a, b) for a, b in zip(*contents, strict=True))


def _are_equal(first: Any, second: Any) -> bool:
    try:
        return bool(first == second)
    except Exception:  # such as two arrays
        return False


def _unwrapped(function: Any) -> Any:
    """The function behind partials and decorators."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            return function
