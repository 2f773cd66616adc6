"""Code in a completion, run against tests of a column."""

import ast
import json
import math
import os
import re
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import UserError
from .base import RewardFunction, WarnOnce
from .code_process import Limits, Programs, can_cut_network

FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
PYTHON = ("python", "python3", "py")
NETWORK = ("off", "on", "off_if_possible")


def code(
    column: str = "tests",
    *,
    seconds: float = 5.0,
    memory_mb: int = 1024,
    output_kb: int = 256,
    parallel: int | None = None,
    network: str = "off_if_possible",
) -> RewardFunction:
    """Share of the tests that the Python program in the completion passes, from 0 to 1.

    The program is the last fenced block that says Python, else the last one that says no language, or the whole
    completion where there is none. Each test has a process
    of its own: `python -I` in a temporary folder, with an environment that has none of your variables, limits of CPU
    time, memory and output, and a time limit after which the process and its children are killed. **This is no
    sandbox**: the program can read what you can read. For programs that may mean harm, use a virtual machine or a
    container.

    Args:
        column: column with the tests of each row, a list: Python texts that run after the program, such as
            `assert add(1, 2) == 3`, or mappings with `input` (read from standard input) and `output` (to be printed).
            `{"inputs": […], "outputs": […]}` and a text with JSON of these are read too. A row without tests is not
            scored.
        seconds: CPU seconds of one test. The limit of the clock is three times that, plus 2.
        memory_mb: memory of a process, in MB.
        output_kb: what a process may print, and the size of each file that it writes, in KB.
        parallel: number of processes at a time; `None` means one per CPU core, at most 8.
        network: `off` refuses to run where the network cannot be cut, `on` leaves it, and `off_if_possible` warns.

    Raises:
        UserError: a limit is not positive, `network` is unknown, or it is `off` on a machine that cannot cut it. A call
            raises it for a test that checks nothing, and where not even an empty program runs within the limits.
    """
    if parallel is None:
        parallel = min(8, os.cpu_count() or 1)
    return CodeTests(
        column,
        limits=Limits(seconds, memory_mb, output_kb),
        parallel=parallel,
        network=network,
    )


class CodeTests(RewardFunction):
    """See `code`."""

    __name__ = "code"

    def __init__(self, column: str, *, limits: Limits, parallel: int, network: str):
        super().__init__([column])
        for name, value in {**vars(limits), "parallel": parallel}.items():
            if not 0 < value < math.inf:
                raise UserError(f"code: {name}={value} must be positive and finite.")
        if network not in NETWORK:
            raise UserError(f"code: network={network!r}: give one of {', '.join(NETWORK)}.")
        if network == "off" and not can_cut_network():
            raise UserError(
                "code: network=off, but this machine cannot cut the network of a process (it needs `unshare` and user "
                "namespaces): run in a container without network, or pass network=off_if_possible."
            )
        self.limits = limits
        self.parallel = parallel
        self.network = network
        self._warn = WarnOnce()
        self._has_run = False

    def scores(self, texts: list[str], prompts: Any, columns: dict[str, Any]) -> list[float | None]:
        (column,) = self.columns
        tests = [_tests_of(value, column) for value in columns[column]]
        programs = [program_of(text) for text in texts]
        has_network = self._has_network()
        running = Programs()
        if any(tests) and not self._has_run:
            self._check_limits(has_network)

        def passes(program: str, test: Any) -> bool:
            return running.passes(program, test, self.limits, network=has_network)

        pool = ThreadPoolExecutor(self.parallel, thread_name_prefix="reward-code")
        try:
            futures = [
                [pool.submit(passes, program, test) for test in of_row]
                for program, of_row in zip(programs, tests, strict=True)
            ]
            passed = [[future.result() for future in of_row] for of_row in futures]
        finally:  # Ctrl-C too: no program is left behind
            pool.shutdown(wait=False, cancel_futures=True)
            running.stop()
            pool.shutdown(wait=True)
        return [sum(of_row) / len(of_row) if of_row else None for of_row in passed]

    def _check_limits(self, has_network: bool) -> None:
        """Runs an empty program once: else limits that are too low score every program 0."""
        if not Programs().passes("", "pass", self.limits, network=has_network):
            raise UserError(
                f"code: an empty program does not end within the limits (seconds={self.limits.seconds:g}, "
                f"memory_mb={self.limits.memory_mb}): raise them, or pass network=on."
            )
        self._has_run = True

    def _has_network(self) -> bool:
        if self.network == "on":
            return True
        if can_cut_network():
            return False
        self._warn(
            "network",
            "code: programs of completions can use the network, as this machine cannot cut it (it needs `unshare` and "
            "user namespaces): run in a container without network, or pass network=on to silence this.",
        )
        return True


def program_of(text: str) -> str:
    """The last fenced block of Python in a text, or the text itself without one."""
    blocks = [(language.lower(), body) for language, body in FENCE.findall(text)]
    # A block without a language after one of Python is often what the program prints.
    for languages in (PYTHON, ("",)):
        programs = [body for language, body in blocks if language in languages]
        if programs:
            return textwrap.dedent(programs[-1])  # a block in a list is indented
    return text


def _tests_of(value: Any, column: str) -> list[Any]:
    """The tests of one row."""
    tests: list[Any] = []
    for test in _entries(value):
        if isinstance(test, dict):
            tests.extend(_pairs_of(test, column))
        elif isinstance(test, str) and _can_fail(test):
            tests.append(test)
        else:
            raise _wrong(test, column)
    return tests


def _entries(value: Any) -> list[Any]:
    """The entries of a row's value, which may be one test or JSON of several; without those that are `None`."""
    if hasattr(value, "tolist"):  # an array
        value = value.tolist()
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except ValueError:
            pass  # Python that starts with a list
    entries = list(value) if isinstance(value, list | tuple) else [value]
    return [entry for entry in entries if entry is not None]


def _pairs_of(test: dict[str, Any], column: str) -> Iterator[dict[str, str]]:
    """Pairs of input and output of a mapping. Arrow fills missing fields with `None`."""
    given = {name: value for name, value in test.items() if value is not None}
    if set(given) == {"inputs", "outputs"}:
        inputs, outputs = given["inputs"], given["outputs"]
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise _wrong(test, column)
    elif "output" in given and set(given) <= {"input", "output"}:
        inputs, outputs = [given.get("input", "")], [given["output"]]
    else:
        raise _wrong(test, column)
    for given_input, output in zip(inputs, outputs, strict=True):
        yield {"input": _lines_of(given_input), "output": _lines_of(output)}


def _lines_of(value: Any) -> str:
    """Text; a list has one line each."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _can_fail(test: str) -> bool:
    """Whether a test does more than to define functions or to write down a value, which any program passes."""
    try:
        statements = ast.parse(test).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True  # no program passes it
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Pass)
    for statement in statements:
        is_value = isinstance(statement, ast.Expr) and not any(
            isinstance(part, ast.Call | ast.Name | ast.Await) for part in ast.walk(statement)
        )
        if not isinstance(statement, definitions) and not is_value:
            return True
    return False


def _wrong(test: Any, column: str) -> UserError:
    return UserError(
        f"code: column {column!r} has {repr(test)[:80]}, which tests nothing: give Python text that can fail, such as "
        "`assert add(1, 2) == 3` or a call of the test that it defines, or a mapping with `input` and `output`."
    )
