"""A function by the name that a user gives: a module or a file. A mistake is one line with what there is instead."""

import sys

import pytest

from hf_rlhf_ext.cli.functions import functions_of_file, reward_function
from hf_rlhf_ext.errors import UserError

SHORT = "def short(completions, **columns):\n    return [-float(len(text)) for text in completions]\n"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """An empty working folder, and a function that writes a file; modules that a test imports are forgotten."""
    folder = tmp_path / "job"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name, text=SHORT):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    yield write
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def refused(name) -> str:
    with pytest.raises(UserError) as caught:
        reward_function(name, "reward_funcs")
    line = str(caught.value)
    assert line.startswith("reward_funcs: ") and "\n" not in line and len(line) < 320
    return line


@pytest.mark.parametrize(
    "name",
    [
        "rewards:short",
        "rewards.short",
        "rewards.py:short",
        "./rewards.py:short",
        "./rewards:short",
        "./rewards.short",
        "../job/rewards.py:short",
        "../job/rewards.short",
        "rewards.py.short",
        "rewards.py",
        "{folder}/rewards.py:short",
    ],
)
def test_every_form_finds_the_function(job, name):
    path = job("rewards.py")
    function = reward_function(name.format(folder=path.parent), "reward_funcs")
    assert function(completions=["four"]) == [-4.0]


def test_modules_of_packages_are_found_here_and_installed(job):
    job("package_of_mine/__init__.py", "")
    job("package_of_mine/scale.py", "FACTOR = 2\n")
    job(
        "package_of_mine/rewards.py",
        "from .scale import FACTOR\n\ndef two(completions):\n    return [FACTOR] * len(completions)\n",
    )
    for name in (
        "package_of_mine.rewards.two",
        "package_of_mine.rewards:two",
        "package_of_mine/rewards.py:two",
        "./package_of_mine/rewards.py",
    ):
        assert reward_function(name, "reward_funcs")(["a"]) == [2]
    import math

    assert reward_function("math:sqrt", "reward_funcs") is math.sqrt
    assert reward_function("os.path:join", "reward_funcs").__name__ == "join"


@pytest.mark.parametrize("installed", ["datasets", "json"])
def test_a_file_with_the_name_of_an_installed_package_is_the_users(job, installed):
    __import__(installed)
    library = sys.modules[installed]
    job(f"{installed}.py")
    for name in (f"{installed}.py:short", f"{installed}.short", f"{installed}:short"):
        assert reward_function(name, "reward_funcs")(completions=["four"]) == [-4.0]
    assert sys.modules[installed] is library


def test_an_environment_inside_the_folder_keeps_its_packages(job, monkeypatch):
    installed = job(".venv/site-packages/judge_of_mine/__init__.py", "IS_LIBRARY = True\n")
    monkeypatch.syspath_prepend(installed.parent.parent)
    import judge_of_mine

    job("judge_of_mine.py")
    assert reward_function("judge_of_mine.py:short", "reward_funcs")(completions=["a"]) == [-1.0]
    assert sys.modules["judge_of_mine"] is judge_of_mine and judge_of_mine.IS_LIBRARY


def test_a_package_that_is_not_imported_yet_stays_importable(job, monkeypatch, tmp_path):
    site = tmp_path / "site"
    (site / "judge_package").mkdir(parents=True)
    (site / "judge_package" / "__init__.py").write_text("IS_LIBRARY = True\n")
    monkeypatch.syspath_prepend(site)
    job("judge_package.py")
    assert reward_function("judge_package.py:short", "reward_funcs")(completions=["a"]) == [-1.0]
    import judge_package

    assert judge_package.IS_LIBRARY


def test_helpers_beside_the_file_are_found_also_when_the_function_is_called(job, tmp_path, monkeypatch):
    job("words_of_mine.py", "BAD = ['no']\n")
    job("marks_of_mine.py", "MARK = 3.0\n")
    text = (
        "from words_of_mine import BAD\n\n"
        "def reward(completions, **columns):\n"
        "    from marks_of_mine import MARK\n"
        "    return [MARK - (text in BAD) for text in completions]\n"
    )
    path = job("elsewhere.py", text)
    monkeypatch.chdir(tmp_path)
    assert reward_function(f"{path}:reward", "reward_funcs")(completions=["no", "yes"]) == [2.0, 3.0]


def test_the_name_of_a_file_may_have_dots(job):
    path = job("rewards.v2.py")
    for name in ("rewards.v2.py:short", "./rewards.v2.py", f"{path}:short"):
        assert reward_function(name, "reward_funcs")(completions=["four"]) == [-4.0]


def test_two_files_of_one_name_and_a_file_that_changes(job):
    first, second = job("a/rewards.py"), job("b/rewards.py", SHORT.replace("-float", "float"))
    names = [f"{first}:short", f"{second}:short"]
    assert [reward_function(name, "reward_funcs")(completions=["four"]) for name in names] == [[-4.0], [4.0]]
    # A file runs once, as it may load a model.
    assert reward_function(names[0], "reward_funcs") is reward_function(names[0], "reward_funcs")
    first.write_text("def short(completions):\n    return [0.5 for _ in completions]\n")
    assert reward_function(names[0], "reward_funcs")(["four"]) == [0.5]


def test_methods_objects_and_partials_have_names_too(job):
    text = (
        "import functools\n\n"
        "class Judge:\n"
        "    def score(self, completions):\n        return [1.0]\n"
        "    def __call__(self, completions):\n        return [2.0]\n\n"
        "judge = Judge()\n"
        "def base(completions, factor):\n    return [factor]\n"
        "triple = functools.partial(base, factor=3.0)\n"
    )
    job("rewards.py", text)
    for name, expected in [("judge.score", 1.0), ("judge", 2.0), ("triple", 3.0)]:
        assert reward_function(f"rewards.py:{name}", "reward_funcs")(completions=["a"]) == [expected]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rewards.py:shrot", ["has no 'shrot'", "short, polite", "did you mean short?"]),
        ("rewards.nothing_like_it", ["short, polite"]),
        ("rewards:shrot", ["did you mean short?"]),
        ("rewards.py", ["2 functions", "short, polite", "rewards.py:short"]),
        ("reward.py:short", ["no file reward.py", "did you mean rewards.py?"]),
        ("./folder/rewards.py:short", ["no file folder/rewards.py", "no folder folder"]),
        ("../rewards.short", ["no file", "../rewards.py"]),
        ("reward.short", ["no module 'reward'", "did you mean rewards?", "path/to/file.py:function"]),
        ("rewards", ["names no function", "rewards.py:FUNCTION", "short, polite"]),
        ("short", ["path/to/file.py:function"]),
        ("rewards.py:Judge", ["is a class", "score = Judge()"]),
        ("rewards.LIMIT", ["is a int, not a function"]),
        ("rewards.py:__name__", ["is a str, not a function"]),
        ("helpers.py", ["no function with a parameter `completions`", "helpers.py:count"]),
        ("empty.py", ["def reward(completions, **columns)"]),
        ("", ["path/to/file.py:function"]),
        (":", ["path/to/file.py:function"]),
    ],
)
def test_a_wrong_name_is_one_line_with_what_there_is(job, name, words):
    text = "LIMIT = 3\n\ndef polite(completions): ...\n\ndef _help(completions): ...\n\nclass Judge: ...\n"
    job("rewards.py", SHORT + text)
    job("helpers.py", "def count(text):\n    return len(text)\n")
    job("empty.py", "")
    line = refused(name)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\ndef short(:\n", ["broken.py, line 2: SyntaxError"]),
        ("SCALE = 1\nSCALE / 0\n", ["broken.py, line 2: ZeroDivisionError: division by zero", "correct the file"]),
        ("import no_such_package_here\n", ["broken.py, line 1: ModuleNotFoundError", "install the package"]),
        ("from json import nothing_here\n", ["line 1: ImportError", "correct the file"]),
        ("from faulty import x\n", ["faulty.py, line 1: NameError"]),
        ("import sys\nsys.exit(0)\n", ["broken.py, line 2", "if __name__ == '__main__':"]),
        ("raise Exception('first\\nsecond')\n", ["Exception: first)"]),
        ("x = '\x00'\n", ["broken.py"]),
    ],
)
@pytest.mark.parametrize("form", ["broken.py:short", "broken.short", "broken.py"])
def test_an_error_in_the_file_is_one_line_with_file_and_line(job, text, words, form):
    job("faulty.py", "x = undefined\n")
    job("broken.py", text)
    line = refused(form)
    assert f"cannot import '{form}'" in line and all(word in line for word in words), line
    assert "broken" not in sys.modules


def test_a_helper_that_an_installed_package_hides_is_to_be_renamed(job):
    import json

    assert json
    job("json.py", "LIMIT = 1\n")
    job("rewards.py", "from json import LIMIT\n" + SHORT)
    assert "rename json.py, as an installed package has its name" in refused("rewards.py:short")


def test_a_function_with_two_definitions_is_one(job):
    job("rewards.py", f"try:\n    import nothing\nexcept ImportError:\n    pass\n{SHORT}\n{SHORT}")
    assert reward_function("rewards.py", "reward_funcs")(completions=["four"]) == [-4.0]


def test_the_functions_of_a_file_are_listed_without_running_it(job):
    text = (
        "raise SystemExit\n\n"
        "def first(prompts, completions): ...\n"
        "async def second(completions, answer, **columns): ...\n"
        "def third(**everything): ...\n"
        "def fourth(*, completions): ...\n"
        "fifth = lambda completions, **columns: []\n"
        "try:\n    def sixth(completions): ...\nexcept ImportError:\n    def seventh(completions): ...\n"
        "def helper(text): ...\n"
        "def _private(completions): ...\n"
        "class Judge:\n    def method(self, completions): ...\n"
        "from x import imported\n"
    )
    path = job("many.py", text)
    assert functions_of_file(path) == ["first", "second", "third", "fourth", "fifth", "sixth"]
    assert functions_of_file(job("broken.py", "def (")) == functions_of_file("no_such.py") == []
