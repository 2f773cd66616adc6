"""Programs of completions in processes with limits: what passes, and what is stopped."""

import os
import socket
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.reward_functions import code, code_process, code_tests

ADD = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds."
TESTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(1, 1) == 3"]


def share(text, tests, **options):
    options = {"seconds": 1, "parallel": 2, "memory_mb": 256, "output_kb": 16} | options
    (score,) = code(**options)(prompts=["?"], completions=[text], tests=[tests])
    return score


def test_the_score_is_the_share_of_tests_passed():
    assert share(ADD, TESTS) == pytest.approx(2 / 3)
    assert share([{"role": "assistant", "content": ADD}], TESTS[:2]) == 1
    assert share(ADD, "assert add(2, 2) == 4") == 1
    assert share("no program", TESTS) == 0
    assert share(ADD, None) is None and share(ADD, []) is None


def test_rows_keep_their_order():
    programs = [f"x = {number}" for number in range(5)]
    tests = [[f"assert x == {number}", "assert x % 2"] for number in range(5)]
    assert code(parallel=3)(completions=programs, tests=tests) == [0.5, 1.0, 0.5, 1.0, 0.5]


@pytest.mark.parametrize(
    "text, program",
    [
        ("x = 1", "x = 1"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n```\nor\n```python\nx = 2\n```\n```text\n3\n```", "x = 2\n"),
        ("- so:\n  ```python title\n  x = 1\n  ```", "x = 1\n"),
        ("```python\nx = 1\n```\nIt prints:\n```\n1\n```", "x = 1\n"),
        ("```python\nx = 1", "```python\nx = 1"),  # not closed: cut off
    ],
)
def test_the_program_is_the_last_block_of_python(text, program):
    assert code_tests.program_of(text) == program


def test_input_and_output():
    pairs = [{"input": "1 2\n", "output": "3"}, {"input": "1 2\n", "output": "4"}]
    assert share("a, b = map(int, input().split())\nprint(a + b)", pairs) == 0.5
    assert share("import sys\nprint(len(open(0).read()))", [{"input": "1 2\n", "output": "4\n"}]) == 1
    assert share("if __name__ == '__main__':\n    print(7)\n    exit()", [{"input": "", "output": "7"}]) == 1
    assert share("print(7)\nexit(1)", [{"input": "", "output": "7"}]) == 0


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os\nfor fd in range(3, 20):\n  try: os.write(fd, b'passed')\n  except OSError: pass\nos._exit(0)",
        "import os; os.kill(os.getpid(), 9)",
    ],
)
def test_a_program_that_ends_early_passes_nothing(program):
    assert share(program, ["assert True"]) == 0


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(600)",
        "x = 'a' * 10**9",
        "print('a' * 10**6)",
        "open('large', 'w').write('a' * 10**6)",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    ],
)
def test_limits_end_a_program(program):
    start = time.perf_counter()
    assert share(program, ["assert True"]) == 0
    assert time.perf_counter() - start < 30


def test_the_same_program_passes_within_the_limits():
    assert share("x = 'a' * 10**6\nprint('a' * 100)", ["assert len(x) == 10**6"]) == 1


def test_no_child_is_left_behind():
    mark = f"reward_child_{os.getpid()}"
    program = (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)', {mark!r}])"
    )
    assert share(program, ["assert True"], memory_mb=1024) == 1
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or ())]
        if not left:
            break
        time.sleep(0.05)
    assert left == []


def test_neither_variables_nor_files_of_the_user_are_near(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(tmp_path)
    program = "import os\nopen('mine', 'w').write('x')"
    tests = [
        "assert 'HF_TOKEN' not in os.environ",
        "assert os.listdir() == ['mine']",
        "assert os.environ['HOME'] == os.getcwd()",
    ]
    assert share(program, tests) == 1
    assert list(tmp_path.iterdir()) == []


def test_temporary_folders_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(code_process.tempfile, "tempdir", str(tmp_path))
    assert share("open('a', 'w')", ["assert True"]) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_network_is_cut_where_the_platform_can():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        assert share(program, ["assert True"], network="on") == 1
        if not code_process.can_cut_network():
            pytest.skip("this machine has no user namespaces")
        assert share(program, ["assert True"], network="off") == 0


def test_a_machine_that_cannot_cut_it_is_said_or_refused(monkeypatch, caplog):
    monkeypatch.setattr(code_tests, "can_cut_network", lambda: False)
    with pytest.raises(UserError, match="network=off.*container"):
        code(network="off")
    function = code(network="off_if_possible")
    for _ in range(2):
        assert function(completions=["x = 1"], tests=[["assert x"]]) == [1.0]
    assert caplog.text.count("can use the network") == 1


def test_an_interrupted_call_leaves_no_program(monkeypatch):
    """What Ctrl-C does: the error reaches the caller, and the programs end at once."""
    running = code_process.Programs()
    limits = code_process.Limits(100, 256, 16)
    results = []
    thread = threading.Thread(
        target=lambda: results.append(running.passes("import time; time.sleep(300)", "pass", limits, network=True))
    )
    thread.start()
    deadline = time.monotonic() + 20
    while not running._running and time.monotonic() < deadline:
        time.sleep(0.01)
    running.stop()
    thread.join(20)
    assert results == [False] and not running._running


@pytest.mark.parametrize(
    "options, words",
    [
        ({"seconds": 0}, "seconds=0"),
        ({"seconds": float("inf")}, "seconds=inf must be positive and finite"),
        ({"parallel": 0}, "parallel=0"),
        ({"memory_mb": -1}, "memory_mb=-1"),
        ({"network": "of"}, "network='of': give one of off, on"),
    ],
)
def test_wrong_options_are_one_line(options, words):
    with pytest.raises(UserError, match=words):
        code(**options)


@pytest.mark.parametrize(
    "test",
    [
        7,
        "",
        "# nothing",
        "def check(candidate):\n    assert candidate(1) == 2",  # and nobody calls it
        "'assert x == 1'",
        {"input": "1"},
        {"output": "1", "kind": "stdin"},
        {"inputs": ["1"], "outputs": []},
    ],
)
def test_a_test_that_tests_nothing_is_one_line(test):
    with pytest.raises(UserError, match="column 'tests' has .*input") as caught:
        code()(completions=["x"], tests=[[test]])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tests, expected",
    [
        ('["assert x == 1", "assert x == 2"]', 0.5),  # JSON: run as Python, it would pass
        ('{"input": "", "output": "7"}', 1),
        ({"inputs": ["", "4"], "outputs": ["7", "8"]}, 0.5),
        ('{"inputs": [""], "outputs": [["7"]]}', 1),
        ([{"input": None, "output": 7, "code": None}, None], 1),
        (np.array(["assert x == 1"]), 1),
        ("[x] == [1] or 1 / 0", 1),
        (["assert ("], 0),
        ([None], None),
        (np.array([]), None),
    ],
)
def test_forms_of_tests(tests, expected):
    assert share("x = 1\nprint(7)", tests) == expected


def test_limits_in_which_nothing_runs_are_said():
    with pytest.raises(UserError, match="an empty program does not end within the limits .*memory_mb=1"):
        share("x = 1", ["assert x"], memory_mb=1)


def test_what_a_program_defines_can_be_pickled():
    program = "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__name__)"
    assert share(program, ["assert pickle.loads(pickle.dumps(A)) is A", {"input": "", "output": "A"}]) == 1


def test_a_folder_deeper_than_the_stack_is_removed(monkeypatch, tmp_path):
    """`shutil.rmtree` of Python 3.11 ends in a RecursionError, which ended the run."""
    monkeypatch.setattr(code_process.tempfile, "tempdir", str(tmp_path))
    program = "import os\nfor _ in range(1100):\n    os.mkdir('d')\n    os.chdir('d')\nos.mkdir('e', 0)"
    assert share(program, ["assert True"]) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_runner_is_a_file():
    assert Path(code_process.RUNNER).is_file()
