"""The process in which one program of a completion runs against one test. It is run as a script.

Its argument is a file descriptor with JSON: `program`, `test`, `limits`, and `token`, which it writes to the file
descriptor `report` only when the program and the test have ended without an error. So a program that ends early, as
with `exit()`, passes no test.
"""

import json
import os
import resource
import sys
import types

kept = []


def main() -> None:
    """Sets the limits, runs the program and then the test."""
    with os.fdopen(int(sys.argv[1]), encoding="utf-8") as request:
        asked = json.load(request)
    sys.argv = ["program.py"]
    report = asked["report"]
    limits = asked["limits"]
    # Both limits of each: a program cannot raise them again.
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_seconds"], limits["cpu_seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory"], limits["memory"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_size"], limits["file_size"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if asked["test"] is None:  # its output is compared by the parent
        _run(asked["program"], _names_of_module("__main__"))
        return
    # Not `__main__`: what a script does when it is started is no part of what a test asks.
    names = _names_of_module("program")
    _run(asked["program"], names)
    _run(asked["test"], names)
    os.write(report, asked["token"].encode())


def _names_of_module(name: str) -> dict:
    """The names of a new module, in which pickle and dataclasses find what the program defines."""
    module = types.ModuleType(name)
    kept.append(sys.modules.get(name))  # a module that nobody has loses its names
    sys.modules[name] = module
    return vars(module)


def _run(text: str, names: dict) -> None:
    exec(compile(text, "<completion>", "exec"), names)  # noqa: S102  # what this process is for


if __name__ == "__main__":
    main()
