"""Short names with arguments, as the command line and YAML files give them."""

import inspect

import pytest
import yaml

from hf_rlhf_ext import reward_functions
from hf_rlhf_ext.cli.functions import reward_function
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.reward_functions.named import FACTORIES, built_in, public_text, split, texts_of

JUDGE = "judge(model=m, base_url=http://127.0.0.1:8000/v1"


def refused(name):
    with pytest.raises(UserError) as caught:
        reward_function(name, "reward_funcs")
    line = str(caught.value)
    assert line.startswith("reward_funcs: ") and "\n" not in line and len(line) < 360
    return line


def test_the_names_are_those_of_the_package():
    assert sorted(FACTORIES) == sorted(reward_functions.__all__)
    for name in FACTORIES:
        factory = getattr(reward_functions, name)
        assert inspect.isfunction(factory) and factory.__name__ == name
        assert inspect.getdoc(factory)


@pytest.mark.parametrize("name", ["exact_match", "exact_match()", " exact_match ( column = answer ) "])
def test_a_name_makes_a_function(name):
    function = reward_function(name, "reward_funcs")
    assert function.__name__ == "exact_match" and function.columns == ("answer",)
    assert function(completions=["a", "b"], answer=["a", "a"]) == [1.0, 0.0]


def test_values_have_the_types_of_the_parameters():
    function = reward_function("exact_match(column=no, ignore_case=yes, after='a, (b')", "reward_funcs")
    assert (function.columns, function.ignore_case, function.after) == (("no",), True, "a, (b")
    assert reward_function("exact_match(after=null)", "reward_funcs").after is None
    assert float(reward_function("number(tolerance=1e-3)", "reward_funcs").tolerance) == 0.001
    assert reward_function(f"{JUDGE}, retries=2, timeout=3)", "reward_funcs").endpoint.retries == 2


@pytest.mark.parametrize(
    "written, pattern",
    [
        (r"^\d+$", r"^\d+$"),
        ("[0-9]+", "[0-9]+"),
        ("#### 7 # x", "#### 7 # x"),
        ("a: b", "a: b"),
        ("'a, b'", "a, b"),
        ("don't", "don't"),
        ('"a\\tb\\""', 'a\tb"'),
        ("'(a|b)'", "(a|b)"),
    ],
)
def test_texts_are_as_they_stand(written, pattern):
    assert reward_function(f"regex(pattern={written})", "reward_funcs").pattern.pattern == pattern


@pytest.mark.parametrize(
    "name, words",
    [
        ("exact_match(answer)", "write name=value, as in exact_match(column=answer)"),
        ("exact_match(columns=a)", "did you mean column?"),
        ("exact_match(column=a, column=b)", "column is given twice"),
        ("exact_match(ignore_case=maybe)", "needs true or false"),
        ("number(tolerance=x)", "needs a number"),
        (f"{JUDGE}, retries=1.5)", "needs a whole number"),
        ("judge(model=m)", "base_url is missing"),
        ("judge", "model is missing"),
        ("regex(pattern=()", "put text with such signs into quotes"),
        ('regex(pattern="\\d")', "use single quotes"),
        ("think_format(1)", "takes none"),
        ("exact_mach(column=a)", "did you mean exact_match?"),
        ("exact_mach", "did you mean exact_match?"),
        ("short(5)", "give path/to/file.py:function"),
        ("regex(pattern='(')", "no regular expression"),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(name, words):
    assert words in refused(name)


def test_functions_of_files_and_modules_are_not_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "number.py").write_text("def short(completions):\n    return [2.0]\n")
    assert reward_function("number.py", "reward_funcs")(completions=["a"]) == [2.0]
    assert reward_function("number:short", "reward_funcs")(completions=["a"]) == [2.0]
    assert built_in("number.short", "reward_funcs") is None
    assert reward_function("number", "reward_funcs").__name__ == "number"


def test_mappings_of_yaml_are_calls():
    text = r"""
    - exact_match: {column: answer, ignore_case: true, after: '#, "x"'}
    - regex:
        pattern: '^\d+, (\w+)$'
    - judge:
        model: org/m
        base_url: http://127.0.0.1:8000/v1
        rubric: |
          Kind, short (and right).
          It's 100 %.
        otherwise: 0.5
    - think_format:
    - number(column=answer)
    - rewards.py:short
    """
    names = texts_of(yaml.safe_load(text), "reward_funcs")
    assert names[-3:] == ["think_format", "number(column=answer)", "rewards.py:short"]
    match, pattern, judge = (reward_function(name, "reward_funcs") for name in names[:3])
    assert (match.columns, match.ignore_case, match.after) == (("answer",), True, '#, "x"')
    assert pattern.pattern.pattern == r"^\d+, (\w+)$"
    assert judge.request.rubric == "Kind, short (and right).\nIt's 100 %." and judge.otherwise == 0.5
    assert judge.options["model"] == "org/m"
    assert texts_of(None, "x") == [] and texts_of({"number": None}, "x") == ["number"]


@pytest.mark.parametrize("entry", [7, {"a": {}, "b": {}}, {"number": "answer"}, {1: {}}])
def test_entries_that_name_nothing_are_refused(entry):
    with pytest.raises(UserError, match="^reward_funcs: "):
        texts_of([entry], "reward_funcs")


def test_commas_outside_of_brackets_separate():
    assert split("a.py:f, number(column=x, tolerance=1),, b:c") == ["a.py:f", "number(column=x, tolerance=1)", "b:c"]
    assert texts_of("a.py:f,regex(pattern='a,)')", "x") == ["a.py:f", "regex(pattern='a,)')"]


def test_what_is_published_names_no_server():
    assert public_text(f"{JUDGE}, cache=/home/a/x, api_key_env=KEY, highest=5)") == "judge(model=m, highest=5)"
    assert public_text("exact_match") == "exact_match"
