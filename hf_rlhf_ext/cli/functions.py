"""Finds a function by the name that a user gives: a module or a file and the function in it, or a built-in one.

`functions_of_file` reads a file without running it; `reward_function` imports the module or runs the file. The built-in
ones are those of `hf_rlhf_ext.reward_functions`.
"""

import ast
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UserError, first_line
from ..reward_functions.named import FACTORIES, built_in, similar

FORMS = "give path/to/file.py:function, or module:function"
"""The end of messages about a name that cannot be read."""
SHOWN = 8
"""Number of functions or files that a message lists."""

_loaded: dict[Path, tuple[tuple[int, int], ModuleType]] = {}
"""Modules that were made from a file, with the time and the size of the file, so that no file runs twice."""


def reward_function(name: str, option: str) -> Callable:
    """Returns the function that an option names.

    Args:
        name: `module:function`, `module.function`, `path/to/file.py:function`, or `path/to/file.py` if the file has one
            reward function. A module of the working folder comes before an installed one of the same name. Modules
            beside a file can be imported in it. Or a built-in function, such as `exact_match(column=answer)`.
        option: name of the option, for messages.

    Raises:
        UserError: there is no such file, module or function, what the name means is not a function, or the file has an
            error. The line names what there is instead, or file and line of the error.
    """
    own = built_in(name, option)
    if own is not None:
        return own
    place, function = _split(name)
    path = _file_of(place, function, name, option)
    if path is None:
        module = _imported(place, name, option)
        known = _public_callables(module)
        where = f"module {place}"
    else:
        if not function:
            function = _only_function(path, name, option)
        module = _module_of_file(path, name, option)
        known = functions_of_file(path)
        where = _shown(path)
    found = _attribute(module, function, known, where=where, name=name, option=option)
    if inspect.isclass(found):
        raise UserError(
            f"{option}: {name!r} is a class, not a function: name a function, or an object of the class that the "
            f"file makes, as in score = {found.__name__}()."
        )
    if not callable(found):
        raise UserError(f"{option}: {name!r} is a {type(found).__name__}, not a function: name a function.")
    return found


def functions_of_file(path: str | Path) -> list[str]:
    """Names of the public functions of a Python file that could be reward functions. The file is not run.

    Those are functions and lambdas at the top level that have a parameter `completions`, or take any keyword.

    Args:
        path: the file.

    Returns:
        The names, in the order of the file; empty if it is not readable or not Python.
    """
    names = [name for name, parameters in _functions(path) if _takes_completions(parameters)]
    return list(dict.fromkeys(names))  # one that is defined under `if` and under `else` is one function


# --- the name --------------------------------------------------------------------------------------------------------


def _split(name: str) -> tuple[str, str]:
    """The module or file, and the function, which is empty if the name is that of a file alone."""
    place, colon, function = name.rpartition(":")
    if colon and "/" not in function and os.sep not in function:  # else the colon of a drive, as in C:\job\rewards.py
        return place, function
    if name.endswith(".py"):
        return name, ""
    place, _, function = name.rpartition(".")
    return place, function


def _is_path(place: str) -> bool:
    return place.endswith(".py") or "/" in place or os.sep in place or place.startswith(("~", "."))


def _file_of(place: str, function: str, name: str, option: str) -> Path | None:
    """The file that a name means; `None` for a module that is to be imported."""
    if _is_path(place):
        path = Path(place).expanduser()
        if path.suffix != ".py":
            path = path.with_name(f"{path.name}.py")
        if not path.is_file():
            raise UserError(f"{option}: no file {_shown(path)}{_files_there(path)}: {FORMS}.")
        return path.resolve()
    if not place:  # a single word
        path = Path(f"{function}.py")
        if path.is_file():
            raise UserError(f"{option}: {name!r} names no function: give {path}:FUNCTION{_functions_there(path)}.")
        built_in_ones = f"or a built-in one{similar(name)}: {', '.join(FACTORIES)}"
        raise UserError(f"{option}: {name!r} names no module or file: {FORMS}, {built_in_ones}.")
    # A module of the working folder, also if an installed package has its name.
    path = Path(*place.split(".")).with_suffix(".py")
    return path.resolve() if path.is_file() else None


def _files_there(path: Path) -> str:
    """The end of a message about a missing file: the Python files of its folder."""
    if not path.parent.is_dir():
        return f", and no folder {_shown(path.parent)}"
    files = sorted(file.name for file in path.parent.glob("*.py"))
    if not files:
        return ", and its folder has no .py file"
    nearest = difflib.get_close_matches(path.name, files, n=1)
    if nearest:
        return f" (did you mean {nearest[0]}?)"
    return f" (its folder has {_listed(files)})"


def _functions_there(path: Path) -> str:
    names = functions_of_file(path)
    return f" (it has {_listed(names)})" if names else ""


def _only_function(path: Path, name: str, option: str) -> str:
    """The function of a file that was named alone."""
    functions = functions_of_file(path)
    if len(functions) == 1:
        return functions[0]
    if functions:
        raise UserError(
            f"{option}: {_shown(path)} has {len(functions)} functions: name one of {_listed(functions)}, as in "
            f"{name}:{functions[0]}."
        )
    _module_of_file(path, name, option)  # a file with an error has no functions: the error is the better message
    others = [function for function, _ in _functions(path)]
    remedy = f"name one, as in {name}:{others[0]}" if others else "write one, as in def reward(completions, **columns)"
    raise UserError(f"{option}: {_shown(path)} has no function with a parameter `completions`: {remedy}.")


# --- the module ------------------------------------------------------------------------------------------------------


def _imported(module: str, name: str, option: str) -> ModuleType:
    """Imports a module that is installed, or a package of the working folder."""
    with _importable(Path.cwd()):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
                raise UserError(
                    f"{option}: cannot import {name!r} (no module {error.name!r} in this folder, and none "
                    f"installed{_similar_file(error.name)}): {FORMS}."
                ) from None
            raise UserError(_problem_of_file(error, None, name, option)) from error
        except (Exception, SystemExit) as error:
            raise UserError(_problem_of_file(error, None, name, option)) from error


def _similar_file(module: str) -> str:
    files = [path.stem for path in Path.cwd().glob("*.py")]
    nearest = difflib.get_close_matches(module.partition(".")[0], files, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _module_of_file(path: Path, name: str, option: str) -> ModuleType:
    """Runs a file as a module, once for each content of the file."""
    status = path.stat()
    version = (status.st_mtime_ns, status.st_size)
    if path in _loaded and _loaded[path][0] == version:
        return _loaded[path][1]
    folder, parts = _place_in_package(path)
    # Asked before the folder is among those that modules are imported from.
    is_free = _is_free(parts[0], folder)
    with _importable(folder):
        try:
            if len(parts) > 1 and is_free:
                module = importlib.import_module(".".join(parts))
            else:
                own_name = path.stem.replace(".", "_")  # the module of `rewards.v2.py` is in no package `rewards`
                module = _run_file(path, own_name if is_free else f"{own_name}_of_{folder.name}_{len(_loaded)}")
        except (Exception, SystemExit) as error:
            raise UserError(_problem_of_file(error, path, name, option)) from error
    _loaded[path] = (version, module)
    return module


def _place_in_package(path: Path) -> tuple[Path, list[str]]:
    """The folder from which a file is imported, and the parts of its name there: a package has an `__init__.py`."""
    folder = path.parent
    parts = [path.stem.replace(".", "_")]
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        parts.insert(0, folder.name)
        folder = folder.parent
    return folder, parts


def _is_free(module: str, folder: Path) -> bool:
    """Whether no other module than that of `folder` has this name, imported or installed."""
    known = sys.modules.get(module)
    if known is None:
        spec = importlib.util.find_spec(module)
        origin = None if spec is None else spec.origin
        if spec is None:
            return True
    else:
        origin = getattr(known, "__file__", None)
    own = (folder / f"{module}.py", folder / module / "__init__.py")  # not one of an environment in the folder
    return origin is not None and Path(origin).resolve() in own


def _run_file(path: Path, name: str) -> ModuleType:
    """Runs a file as a module.

    Its name is that of the file, with which other processes can import it, unless another module has that name:
    replacing that one in `sys.modules` would break libraries that use it.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Puts a folder first among those that modules are imported from; afterward it is the last one.

    It stays, as a function may import a module when it is called. There it hides no installed package.
    """
    entry = str(folder)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()  # the files may be new
    try:
        yield
    finally:
        sys.path.remove(entry)
        if entry not in sys.path:
            sys.path.append(entry)


# --- errors of a file ------------------------------------------------------------------------------------------------


def _problem_of_file(error: BaseException, path: Path | None, name: str, option: str) -> str:
    """One line on an error that a user's file raised when it was imported: file, line, cause and remedy."""
    where = _place_of(error, path)
    if isinstance(error, SyntaxError):
        problem = f"{type(error).__name__}: {error.msg}"
    elif isinstance(error, SystemExit):
        problem = "it ends the program: put what a script does under `if __name__ == '__main__':`"
        return f"{option}: cannot import {name!r} ({where}): {problem}."
    else:
        problem = f"{type(error).__name__}: {first_line(error)}"
    remedy = "correct the file"
    if isinstance(error, ModuleNotFoundError):
        remedy = "install the package, or put the module beside the file"
    elif isinstance(error, ImportError) and error.name is not None and path is not None:
        if (path.parent / f"{error.name}.py").is_file():
            remedy = f"rename {error.name}.py, as an installed package has its name"
    return f"{option}: cannot import {name!r} ({where}: {problem}): {remedy}."


def _place_of(error: BaseException, path: Path | None) -> str:
    """File and line of an error: of the last call in the user's folder, or else of the last call."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{Path(error.filename).name}, line {error.lineno}"
    calls = traceback.extract_tb(error.__traceback__)
    folder = Path.cwd() if path is None else path.parent
    own = [call for call in calls if folder in Path(call.filename).parents and "site-packages" not in call.filename]
    if path is not None and not own:  # not even read as Python
        return path.name
    calls = own or [call for call in calls if not call.filename.startswith("<frozen")]
    return f"{Path(calls[-1].filename).name}, line {calls[-1].lineno}"


# --- the function ----------------------------------------------------------------------------------------------------


def _attribute(module: ModuleType, function: str, known: list[str], *, where: str, name: str, option: str) -> Any:
    """What a module has under a name, which may have dots, as in `judge.score`."""
    found: Any = module
    for part in function.split("."):
        if not hasattr(found, part):
            nearest = difflib.get_close_matches(function, known, n=1)
            there = f"it has {_listed(known)}" if known else "it has no function that takes `completions`"
            if nearest:
                there += f"; did you mean {nearest[0]}?"
            raise UserError(f"{option}: {name!r} is not there: {where} has no {function!r} ({there}).")
        found = getattr(found, part)
    return found


def _public_callables(module: ModuleType) -> list[str]:
    """Names of the public functions that a module defines."""
    names = []
    for name, value in vars(module).items():
        is_own = inspect.isfunction(value) and value.__module__ == module.__name__
        if is_own and not name.startswith("_"):
            names.append(name)
    return names


def _functions(path: str | Path) -> Iterator[tuple[str, ast.arguments]]:
    """The public functions of a file with their parameters."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for statement in _top_level(tree.body):
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            named = [(statement.name, statement.args)]
        elif isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Lambda):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            named = [(target.id, statement.value.args) for target in targets if isinstance(target, ast.Name)]
        else:
            continue
        yield from (pair for pair in named if not pair[0].startswith("_"))


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, also those under `if` and `try`."""
    for statement in body:
        yield statement
        for part in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try):
                yield from _top_level(getattr(statement, part, []))


def _takes_completions(parameters: ast.arguments) -> bool:
    names = [parameter.arg for parameter in (*parameters.args, *parameters.kwonlyargs)]
    return "completions" in names or (parameters.kwarg is not None and not parameters.posonlyargs)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _shown(path: Path) -> str:
    """A path as a user would write it: relative where it is in the working folder."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
