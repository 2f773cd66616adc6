"""Mathematical answers: TRL's function decides, and the limits hold in any thread."""

import pickle
import subprocess
import sys
import threading
import time

import pytest
from trl.rewards import accuracy_reward

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.reward_functions import math, math_answers

HANGS = r"\boxed{9^{9^{9^{9}}}}"
ROWS = [
    (r"so it is \boxed{\frac{2}{4}}", r"$\frac12$"),
    (r"\boxed{0.5}", r"$\frac12$"),
    (r"\boxed{72}", "72"),
    (r"\boxed{73}", "72"),
    ("It is $x^2+2x+1$", "$(x+1)^2$"),
    (r"\boxed{(1,2]}", "$(1,2]$"),
    (r"\boxed{1,000}", "1000"),
    ("72", "72"),  # no LaTeX
    ("", "72"),
    (r"\boxed{5}", "no answer"),
]


@pytest.fixture(scope="module")
def function():
    """One function, whose process serves all tests."""
    return math(seconds=2)


def test_scores_are_those_of_trl(function):
    completions = [[{"role": "assistant", "content": text}] for text, _ in ROWS]
    answers = [answer for _, answer in ROWS]
    expected = accuracy_reward(completions, answers)
    assert function(prompts=[""] * len(ROWS), completions=completions, answer=answers) == expected
    assert set(expected) == {0.0, 1.0, None}


def test_answers_without_marks_numbers_and_lists(function):
    scores = function(
        completions=[r"\boxed{\frac{1}{2}}", r"\boxed{3}", r"\boxed{3}", r"\boxed{3}"],
        answer=[r"\frac{2}{4}", 3, ["4", "3"], None],
    )
    assert scores == [1.0, 1.0, 1.0, None]


def test_a_limit_holds_in_every_thread(function, caplog):
    """math-verify's own limits are signals: in a thread they are off, and this would take for ever."""
    function(completions=[r"\boxed{1}"], answer=["1"])  # the process has started
    results = []

    def call():
        start = time.perf_counter()
        scores = function(completions=[HANGS, r"\boxed{2}"], answer=["5", "2"])
        results.append((scores, time.perf_counter() - start))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(100)
    ((scores, seconds),) = results
    assert scores == [0.0, 1.0]  # the next completion has a new process
    assert seconds < 60
    assert "more than 2 seconds" in caplog.text


def test_threads_take_turns(function):
    results = {}

    def call(number):
        results[number] = function(completions=[rf"\boxed{{{number}}}"] * 3, answer=[str(number), "-1", str(number)])

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [1.0, 0.0, 1.0] for number in range(4)}


def test_thoughts_before_a_mark_do_not_count(function):
    after = math(after="</think>", seconds=2)
    after._worker = function._worker  # no second process
    texts = [r"\boxed{1}</think>\boxed{2}", r"\boxed{2}</think>no", r"\boxed{2}"]
    assert after(completions=texts, answer=["2"] * 3) == [1.0, 0.0, 0.0]


def test_files_of_the_working_folder_replace_no_module(tmp_path):
    """The process starts where the user works, who may have a `sympy.py` or `json.py` there."""
    for name in ("json", "sympy", "logging"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    code = "from hf_rlhf_ext.reward_functions import math\nprint(math()(completions=[r'\\boxed{1}'], answer=['1']))"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout == "[1.0]\n", done.stderr


def test_a_copy_has_a_process_of_its_own(function):
    again = pickle.loads(pickle.dumps(function))
    assert again(completions=[r"\boxed{1}"], answer=["1"]) == [1.0]
    assert again._worker._process.pid != function._worker._process.pid
    again._worker.close()


def test_a_missing_package_and_a_wrong_limit_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="seconds=0"):
        math(seconds=0)
    monkeypatch.setattr(math_answers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'hf-rlhf-ext\[math\]'"):
        math()
