"""`hf-rlhf collect`: every subcommand, with a real store, a real server in a process, and the tests' own Hub."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from hf_rlhf_ext.cli.main import main as hf_rlhf
from hf_rlhf_ext.collect.client import JudgeClient
from hf_rlhf_ext.collect.store import Store
from hf_rlhf_ext.collect.tasks import Task, read_tasks, write_tasks
from tests.hub.conftest import ALICE, hub  # noqa: F401  (a fixture)

pytestmark = pytest.mark.xdist_group("processes")

ROOT = Path(__file__).parents[2]
SUBCOMMANDS = ["demo", "sample", "serve", "links", "export", "import", "simulate", "space"]
LINK = re.compile(r"^  (\w+) +(https?://\S+/join/(\S+))$", re.MULTILINE)


@pytest.fixture
def collect(tmp_path, monkeypatch, capsys):
    """Runs a subcommand in this process, in `tmp_path`: collect("links", store=…) -> status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, **options) -> tuple[int, str, str]:
        given = []
        for name, value in options.items():
            given += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        monkeypatch.setattr(sys, "argv", ["hf-rlhf"])
        capsys.readouterr()
        status = 0
        try:
            hf_rlhf(["collect", *words, *given])
        except SystemExit as end:
            status = end.code or 0
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


@pytest.fixture
def tasks() -> list[Task]:
    answers = [("A sunny, happy day.", "A sad and awful day."), ("Good.", "Bad, terrible."), ("Great fun!", "Dreary.")]
    return [Task(prompt=f"How is day {i}?", completions=list(pair), source="test") for i, pair in enumerate(answers)]


@pytest.fixture
def store_file(tmp_path, tasks) -> Path:
    path = tmp_path / "judgments.sqlite"
    with Store(path) as store:
        store.add_tasks(tasks)
        store.add_annotator("anna")
    return path


def judge_all(path: Path, preference: int = 2) -> None:
    with Store(path) as store:
        for person in store.annotators():
            number = 0
            while (shown := store.next_task(person.id)) is not None:
                number += 1
                store.judge(person.id, shown.task.id, f"key-of-{number:04}", {"preference": preference}, 2.0)


# The list and the options


def test_the_list_of_subcommands(collect):
    for words in ([], ["--help"], ["help"]):
        status, shown, _ = collect(*words)
        assert status == 0
        assert re.findall(r"^  (\w+) +\S", shown, re.MULTILINE) == SUBCOMMANDS
        assert shown.startswith("usage: hf-rlhf collect SUBCOMMAND")


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_of_every_subcommand(collect, name):
    status, shown, _ = collect(name, "--help")
    assert status == 0 and shown.startswith(f"usage: hf-rlhf collect {name} ")


def test_a_wrong_subcommand_or_option_is_one_line(collect):
    assert collect("serv") == (2, "", "error: collect: unknown subcommand `serv`: did you mean `serve`?\n")
    assert collect("serve", prot=1) == (2, "", "error: unknown option `--prot`: did you mean `--port`?\n")


MISTAKES = [
    (["sample"], {}, "prompts is required"),
    (["sample"], {"prompts": "p.jsonl", "output": "t.jsonl"}, "policy is required"),
    (["sample"], {"prompts": "p.jsonl", "policy": "runs/sft"}, "output is required"),
    (["sample"], {"prompts": "p", "policy": "a=b", "output": "t", "choose": "disagreement"}, "--reward_model"),
    (["sample"], {"prompts": "p", "policy": "a=b", "output": "t", "choose": "mix"}, "--n_prompts"),
    (["sample"], {"prompts": "p", "policy": "a=b", "output": "t", "top_p": 1.5}, "top_p must be above 0 and at most 1"),
    (["sample"], {"prompts": "p", "policy": "a=b", "output": "t", "k": 10}, "k must be between 1 and 9"),
    (["sample"], {"prompts": "p", "policy": "a=b", "output": "t", "temperature": [0.8, 0]}, "got 0: 0 always gives"),
    (["sample"], {"prompts": "p", "policy": "a=b", "output": "p", "overwrite": "true"}, "is the file of --prompts"),
    (["sample"], {"prompts": "p.jsonl", "policy": ["a=b", "a=c"], "output": "t"}, "two are called 'a'"),
    (["sample"], {"prompts": "p.jsonl", "policy": "a=b", "output": "t"}, "prompts: no file p.jsonl"),
    (["sample"], {"prompts": "p.jsonl", "policy": "a=", "output": "t"}, "has no name or no location"),
    (["serve"], {"overlap_share": 2}, "overlap_share must be between 0 and 1"),
    (["serve"], {"url": "judge.example.org"}, "url: 'judge.example.org' is no address"),
    (["serve"], {"url": "https://example.org/judge"}, "has a path"),
    (["serve"], {"instructions": "none.md"}, "instructions: none.md cannot be read"),
    (["serve"], {"tasks": "none.jsonl"}, "none.jsonl"),
    (["serve"], {"backup_minutes": 0, "backup_repo": "a/b"}, "backup_minutes must be above 0"),
    (["serve"], {"backup_minutes": 5}, "--backup_repo owner/name"),
    (["serve"], {"people": ["anna", "tom,anna"]}, "'anna' is given twice"),
    (["links"], {}, "store is required"),
    (["links"], {"store": "none.sqlite"}, "store: no file none.sqlite"),
    (["export"], {"store": "none.sqlite"}, "output is required"),
    (["export"], {"output": "a.jsonl", "store": "none.sqlite"}, "store: no file none.sqlite"),
    (["export"], {"output": "a.jsonl", "push_to_hub": "alice/x"}, "--license"),
    (["export"], {"output": "a.jsonl", "push_to_hub": "alice", "license": "mit"}, "owner/name"),
    (["export"], {"output": "a.csv", "store": "none.sqlite"}, "the ending .jsonl"),
    (["export"], {"output": "a.jsonl", "store": "a.jsonl", "overwrite": "true"}, "is the file of --store"),
    (["export"], {"output": "a.jsonl", "license": "mit"}, "--push_to_hub"),
    (["export"], {"output": "a.jsonl", "demonstrations": "a.jsonl"}, "another name"),
    (["import"], {"store": "s.sqlite"}, "judged is required"),
    (["import"], {"store": "s.sqlite", "judged": "none.jsonl"}, "judged: no file none.jsonl"),
    (["simulate"], {}, "links is required"),
    (["simulate"], {"links": "http://127.0.0.1:1/judge"}, "not a personal link"),
    (["simulate"], {"links": "http://127.0.0.1:1/join/x", "length_bias": "nan"}, "length_bias must be a finite number"),
    (["demo"], {"n_prompts": 100000}, "n_prompts must be between 1 and"),
    (["space"], {"space": "judge"}, "no id of a Space"),
    (["space"], {"space": "alice/judge", "store": "x"}, "backup_repo is required"),
]


@pytest.mark.parametrize("words, options, reason", MISTAKES, ids=[row[2] for row in MISTAKES])
def test_mistakes_are_one_line_and_leave_nothing_behind(collect, tmp_path, words, options, reason):
    status, shown, error = collect(*words, **options)
    assert (status, shown) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1 and reason in error
    assert list(tmp_path.iterdir()) == []


WRONG_FILES = [
    ("not json", "row 0"),
    ('{"prompt": "Why?", "completions": ["a", "b"], "pairs": [[0, 1]], "targets": [1]}', "collect import --judged"),
    ('{"prompt": "Why?"}', "collect sample --prompts"),
]


@pytest.mark.parametrize("line, remedy", WRONG_FILES)
def test_a_wrong_file_of_tasks_is_one_line_with_the_command_that_takes_it(collect, tmp_path, line, remedy):
    (tmp_path / "file.jsonl").write_text(line + "\n")
    status, shown, error = collect("serve", tasks="file.jsonl", port=free_port())
    assert (status, shown) == (2, "") and error.count("\n") == 1
    assert error.startswith("error: tasks: file.jsonl") and remedy in error
    assert [file.name for file in tmp_path.iterdir()] == ["file.jsonl"]


@pytest.mark.parametrize("content", [b"not a database, but text of some length" * 30, b"{}"])
def test_nothing_is_sampled_for_a_file_that_is_no_store(collect, prompts_file, tmp_path, content):
    (tmp_path / "notes.sqlite").write_bytes(content)
    status, shown, error = collect("sample", prompts="prompts.jsonl", policy="a=nowhere", store="notes.sqlite")
    assert (status, shown) == (2, "") and "notes.sqlite: cannot be opened as a store" in error
    assert (tmp_path / "notes.sqlite").read_bytes() == content


def test_settings_without_effect_are_said(tmp_path, tasks):
    write_tasks(tmp_path / "tasks.jsonl", tasks)
    words = ["serve", "--tasks", "tasks.jsonl", "--people", "anna", "tom", "--wanted", 3, "--gold_share", 0.2]
    words += ["--overlap_wanted", 4, "--port", free_port(), "--host", "0.0.0.0"]
    with process(*words, cwd=tmp_path) as server:
        shown = shown_when(server, "Serving")
    assert set(links_in(shown)) == {"anna", "tom", "admin"}
    assert "judged by 3 people, and there are 2" in shown
    assert "--gold_share has no effect" in shown and "--overlap_wanted has no effect" in shown
    assert "the links are for this machine only" in shown


START = """
import sys, time
start = time.perf_counter()
from hf_rlhf_ext.cli.main import main
try:
    main(["collect", *sys.argv[1:]])
except SystemExit:
    pass
print(time.perf_counter() - start, *sorted({"torch", "transformers", "datasets"} & set(sys.modules)))
"""


START_WORDS = [["serve", "--help"], ["export", "--help"], ["sample", "--help"], ["links", "--store", "none.sqlite"]]


@pytest.mark.parametrize("words", START_WORDS)
def test_commands_that_need_no_model_load_none(tmp_path, words):
    done = subprocess.run([sys.executable, "-c", START, *words], cwd=tmp_path, capture_output=True, text=True)
    assert len(done.stdout.splitlines()[-1].split()) == 1, done.stdout[-200:]  # the seconds only


# Sampling


@pytest.fixture
def prompts_file(tmp_path, write_jsonl) -> Path:
    rows = [{"prompt": [{"role": "user", "content": f"Tell me about day {i}."}], "category": "chat"} for i in range(5)]
    return write_jsonl(tmp_path / "prompts.jsonl", rows)


def test_sample_writes_tasks_with_their_origin(collect, workspace, prompts_file, tmp_path):
    options = {"prompts": "prompts.jsonl", "policy": [f"old={workspace / 'base'}", f"new={workspace / 'base'}"]}
    options |= {"max_new_tokens": 6, "n_prompts": 3, "wanted": 2, "batch": "round-1"}
    status, shown, error = collect("sample", **options, output="tasks.jsonl")
    assert status == 0, error
    tasks = read_tasks(tmp_path / "tasks.jsonl")
    assert len(tasks) == 3 and "3 of 5 prompts chosen (uniform)" in shown and "3 tasks of 3 prompts" in shown
    for task in tasks:
        assert {made["policy"] for made in task.made_by} == {"old", "new"}
        assert (task.wanted, task.batch, task.category, task.source) == (2, "round-1", "chat", "prompts.jsonl")
    assert "collect serve --store judgments.sqlite --tasks tasks.jsonl" in shown

    again = collect("sample", **options, output="tasks.jsonl")
    assert again[0] == 2 and "tasks.jsonl exists" in again[2]


def test_sample_adds_to_a_store_and_does_not_choose_the_same_prompts_again(collect, workspace, prompts_file, tmp_path):
    options = {"prompts": "prompts.jsonl", "policy": str(workspace / "base"), "max_new_tokens": 6, "store": "j.sqlite"}
    assert "3 tasks added, 0 known" in collect("sample", **options, n_prompts=3)[1]
    status, shown, _ = collect("sample", **options, n_prompts=5)
    assert status == 0 and "2 of 5 prompts chosen" in shown
    with Store(tmp_path / "j.sqlite") as store:
        tasks = store.tasks()
    assert len({task.prompt[0]["content"] for task in tasks}) == len(tasks) == 5
    assert tasks[0].made_by[0]["policy"] == "base"  # the last part of the location


def test_the_ways_to_choose_are_those_of_the_library():
    from hf_rlhf_ext.collect.selection import HOW
    from hf_rlhf_ext.recipes.collect_parts.sample import WAYS_TO_CHOOSE

    assert WAYS_TO_CHOOSE == HOW


def test_a_policy_that_does_not_exist_is_refused_before_another_one_samples(collect, workspace, prompts_file, tmp_path):
    policies = [f"here={workspace / 'base'}", "gone=runs/gone"]
    status, shown, error = collect(
        "sample", prompts="prompts.jsonl", policy=policies, output="tasks.jsonl", n_prompts=1
    )
    assert status == 2 and error.count("\n") == 1 and "policy 'gone': runs/gone is no folder here" in error
    assert "tasks of" not in shown and not (tmp_path / "tasks.jsonl").exists()


def test_a_folder_has_no_revision(collect, workspace, prompts_file):
    policy = f"a={workspace / 'base'}@main"
    status, _, error = collect("sample", prompts="prompts.jsonl", policy=policy, output="tasks.jsonl")
    assert status == 2 and "it has no revision: leave @main out" in error


def test_sample_reads_the_columns_of_a_table_and_says_what_it_does_not_read(collect, workspace, tmp_path, write_jsonl):
    rows = [{"prompt": f"Tell me about day {i // 2}.", "system": "Be kind.", "category": i // 2} for i in range(4)]
    write_jsonl(tmp_path / "table.jsonl", rows)
    options = {"prompts": "table.jsonl", "policy": f"a={workspace / 'base'}", "max_new_tokens": 6}
    status, shown, error = collect("sample", **options, output="plain.jsonl")
    assert status == 0 and "columns not read: system" in shown, error
    assert "2 of 4 prompts chosen" in shown and "2 left out: repeats an earlier prompt" in shown
    tasks = read_tasks(tmp_path / "plain.jsonl")
    assert [(task.category, task.source, task.row) for task in tasks] == [
        ("0", "table.jsonl", 0),
        ("1", "table.jsonl", 2),
    ]

    columns = "{prompt: prompt, system: system}"
    status, shown, error = collect("sample", **options, output="chat.jsonl", columns=columns)
    assert status == 0 and "not read" not in shown, error
    assert read_tasks(tmp_path / "chat.jsonl")[0].prompt[0] == {"role": "system", "content": "Be kind."}

    status, _, error = collect("sample", **options, output="other.jsonl", category_column="topic")
    assert status == 2 and "has no column 'topic'" in error


def test_sample_says_which_column_is_missing(collect, tmp_path, write_jsonl):
    write_jsonl(tmp_path / "questions.jsonl", [{"question": "Why?"}, {"question": "When?"}])
    options = {"prompts": "questions.jsonl", "policy": "a=nowhere", "output": "tasks.jsonl"}
    status, _, error = collect("sample", **options)
    assert status == 2 and "no column `prompt`, only question" in error and "--columns" in error


# Serving


@contextmanager
def process(*words: str, cwd: Path, env: dict[str, str] | None = None):
    """A command that runs until the block ends; it has SIGTERM as a platform sends it."""
    command = [sys.executable, "-m", "hf_rlhf_ext", "collect", *map(str, words)]
    with running(command, cwd, env) as started:
        yield started


@contextmanager
def running(command: list[str], cwd: Path, env: dict[str, str] | None = None):
    settings = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | (env or {})
    settings.pop("DISPLAY", None)
    log = cwd / "log.txt"
    with log.open("w") as file:
        started = subprocess.Popen(command, cwd=cwd, env=settings, stdout=file, stderr=subprocess.STDOUT)
    started.log = log
    try:
        yield started
        if started.poll() is None:
            started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0, log.read_text()
    finally:
        if started.poll() is None:
            started.kill()


def shown_when(started: subprocess.Popen, text: str, seconds: float = 60) -> str:
    """What the command has printed, once `text` is in it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        shown = started.log.read_text()
        if text in shown:
            return shown
        assert started.poll() is None, shown
        time.sleep(0.05)
    raise AssertionError(started.log.read_text())


def links_in(shown: str) -> dict[str, str]:
    return {name: link for name, link, _ in LINK.findall(shown)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def judge(link: str, n: int) -> None:
    """One person judges `n` tasks over HTTP."""
    with JudgeClient(link, patience=20) as client:
        client.join()
        client.task()
        for _ in range(n):
            client.judge({"preference": 2}, 1.0)


def test_serve_to_export_to_the_readers(collect, tmp_path, tasks):
    write_tasks(tmp_path / "tasks.jsonl", tasks)
    (tmp_path / "read_me.md").write_text("Look at **tone**.")
    port = free_port()
    words = ["serve", "--port", port, "--tasks", "tasks.jsonl", "--people", "anna,tom"]
    words += ["--wanted", 2, "--title", "Days", "--instructions", "read_me.md"]
    with process(*words, cwd=tmp_path) as server:
        shown = shown_when(server, "Serving judgments.sqlite")
        links = links_in(shown)
        assert set(links) == {"anna", "tom", "admin"}
        assert all(link.startswith(f"http://127.0.0.1:{port}/join/") for link in links.values())
        judge(links["anna"], 3)
        judge(links["tom"], 1)  # who then has the second task open, so that the third one is left for mira
        # A second server cannot have the port, and says so before it makes anything.
        status, _, error = collect("serve", store="other.sqlite", port=port)
        assert status == 2 and f"port {port}" in error and error.count("\n") == 1
        assert not (tmp_path / "other.sqlite").exists()
        # People are listed and added while it runs.
        assert re.search(r"^anna +annotator +active +3 judged", collect("links", store="judgments.sqlite")[1], re.M)
        added = links_in(collect("links", store="judgments.sqlite", add="mira", url=f"http://127.0.0.1:{port}")[1])
        judge(added["mira"], 1)
    assert "Stopped: 5 judgments, 2 of 3 tasks complete" in server.log.read_text()
    with Store(tmp_path / "judgments.sqlite") as store:
        settings = store.settings()
        assert (settings.title, settings.instructions, settings.wanted) == ("Days", "Look at **tone**.", 2)

    status, shown, error = collect("export", store="judgments.sqlite", output="rows.jsonl")
    assert status == 0, error
    assert "3 of 3 rows kept" in shown and "Krippendorff's alpha" in shown
    assert "reward --config smollm2-135m/reward.yaml --dataset_name rows.jsonl" in shown
    from hf_rlhf_ext import load_comparisons

    rows, report = load_comparisons(tmp_path / "rows.jsonl")
    assert report.kept == 3 and sum(len(row["votes"]) for row in rows) == 5
    again = collect("export", store="judgments.sqlite", output="rows.jsonl")
    assert again[0] == 2 and "--overwrite true" in again[2]

    # Into another store, with every vote.
    status, shown, error = collect("import", store="copy.sqlite", judged="rows.jsonl")
    assert status == 0 and "copy.sqlite: 3 tasks, 5 judgments" in shown, error


def test_links_are_printed_once_and_new_ones_end_the_old(tmp_path, tasks):
    write_tasks(tmp_path / "tasks.jsonl", tasks)
    port = free_port()
    with process("serve", "--port", port, "--tasks", "tasks.jsonl", "--people", "anna", cwd=tmp_path) as server:
        first = links_in(shown_when(server, "Serving"))
    with process("serve", "--port", port, "--tasks", "tasks.jsonl", "--people", "anna", cwd=tmp_path) as server:
        shown = shown_when(server, "Serving")
        assert links_in(shown) == {} and "The links of anna, admin were printed earlier" in shown
        assert "0 tasks added, 3 known already" in shown
        judge(first["anna"], 1)
    with process("serve", "--port", port, "--new_links", "true", cwd=tmp_path) as server:
        second = links_in(shown_when(server, "Serving"))
        assert set(second) == {"anna", "admin"}
        judge(second["anna"], 1)
    with Store(tmp_path / "judgments.sqlite") as store:
        assert store.annotator_of(first["anna"].rpartition("/")[2]) is None
        assert store.counts()["judgments"] == 2


def test_a_person_cannot_have_the_name_of_the_administrator(collect, tmp_path):
    status, _, error = collect("serve", port=free_port(), people="anna,admin")
    assert status == 2 and "another name" in error
    with Store(tmp_path / "judgments.sqlite") as store:
        assert store.annotators() == []


def test_a_backup_that_fails_is_said_on_the_admin_page_and_work_goes_on(tmp_path, tasks, hub):  # noqa: F811
    write_tasks(tmp_path / "tasks.jsonl", tasks)
    port = free_port()
    words = ["serve", "--port", port, "--tasks", "tasks.jsonl", "--people", "anna"]
    words += ["--backup_repo", "alice/judgments", "--backup_minutes", 0.01]
    with process(*words, cwd=tmp_path, env=hub_settings(hub, tmp_path)) as server:
        links = links_in(shown_when(server, "Serving"))
        hub.fault(status=403, match="commit", times=1000)
        judge(links["anna"], 1)
        shown_when(server, "backup to alice/judgments failed")
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, follow_redirects=True) as admin:
            admin.get(links["admin"])
            (notice,) = admin.get("/api/admin/statistics").json()["notices"]
        assert "alice/judgments failed" in notice
        hub.faults.clear()
        judge(links["anna"], 1)
    assert "2 judgments" in server.log.read_text()
    copy = tmp_path / "copy.sqlite"
    copy.write_bytes(hub.files("alice/judgments", "datasets")["judgments.sqlite"])
    with Store(copy) as store:
        assert store.counts()["judgments"] == 2


def test_simulated_people_work_at_a_running_server(collect, tmp_path, tasks):
    write_tasks(tmp_path / "tasks.jsonl", tasks)
    words = ["serve", "--port", free_port(), "--tasks", "tasks.jsonl", "--people", "anna,tom", "--wanted", 2]
    with process(*words, cwd=tmp_path) as server:
        links = links_in(shown_when(server, "Serving"))
        status, shown, error = collect("simulate", links=[links["anna"], links["tom"]], noise=0)
        assert status == 0, error
        assert "anna: 3 answers" in shown and "tom: 3 answers" in shown
    with Store(tmp_path / "judgments.sqlite") as store:
        assert store.counts()["complete"] == 3


# People


def test_links_add_renew_and_deactivate(collect, store_file):
    options = {"store": store_file.name, "url": "https://judge.example.org/"}
    added = links_in(collect("links", **options, add="tom,mira", add_admin="boss")[1])
    assert set(added) == {"tom", "mira", "boss"} and added["tom"].startswith("https://judge.example.org/join/")
    renewed = links_in(collect("links", **options, new="tom")[1])
    shown = collect("links", **options, deactivate="mira")[1]
    assert "mira cannot judge any more" in shown
    listed = collect("links", store=store_file.name)[1]
    assert re.search(r"^mira +annotator +deactivated", listed, re.MULTILINE) and "join" not in listed
    with Store(store_file) as store:
        assert store.annotator_of(added["tom"].rpartition("/")[2]) is None
        assert store.annotator_of(renewed["tom"].rpartition("/")[2]).name == "tom"
        assert store.annotator_of(added["boss"].rpartition("/")[2]).role == "admin"
        assert store.annotator_of(added["mira"].rpartition("/")[2]) is None


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"add": "anna"}, "--new anna"),
        ({"add": ["tom", "mira"], "new": "mira"}, "is also in --add"),
        ({"new": "ana"}, "the store has anna"),
        ({"add": "tom,tom"}, "given twice"),
    ],
)
def test_a_wrong_name_changes_nothing(collect, store_file, options, reason):
    status, _, error = collect("links", store=store_file.name, **({"add": "jonas"} | options))
    assert status == 2 and reason in error
    with Store(store_file) as store:
        assert [person.name for person in store.annotators()] == ["anna"]


# Export


def test_an_export_without_demonstrations_still_has_the_comparisons(collect, store_file, tmp_path):
    judge_all(store_file)
    options = {"store": store_file.name, "annotators": ["anna"]}
    status, shown, error = collect("export", **options, output="rows.jsonl", demonstrations="texts.jsonl")
    assert status == 0, error
    assert "3 of 3 rows kept" in shown and "0 demonstrations" in shown and "--min_rating" not in shown
    assert "--eval_rows 1 " in shown  # of three rows
    assert (tmp_path / "rows.jsonl").exists() and not (tmp_path / "texts.jsonl").exists()
    status, _, error = collect("export", **options, demonstrations="texts.jsonl")
    assert status == 2 and "no demonstrations" in error


def test_import_with_columns_of_another_tool(collect, tmp_path, write_jsonl):
    write_jsonl(tmp_path / "other.jsonl", [{"query": "Why?", "a": "So.", "b": "No.", "label": 2}])
    columns = "{prompt: query, answers: [a, b], verdict: label, verdict_is: 1 or 2}"
    status, shown, error = collect("import", store="new.sqlite", judged="other.jsonl", columns=columns)
    assert status == 0 and "new.sqlite: 1 tasks, 1 judgments" in shown, error
    with Store(tmp_path / "new.sqlite") as store:
        (judgment,) = store.judgments()
    assert judgment.answer["votes"][0]["label"] == 0


# The Hub


def test_export_pushes_a_private_data_set_without_names(collect, store_file, hub):  # noqa: F811
    judge_all(store_file)
    options = {"store": store_file.name, "output": "rows.jsonl", "push_to_hub": "alice/judged", "license": "cc-by-4.0"}
    status, shown, error = collect("export", **options)
    assert status == 0, error
    assert "Pushed: " in shown and hub.repo("alice/judged", "datasets").private
    files = hub.files("alice/judged", "datasets")
    assert "cc-by-4.0" in files["README.md"].decode()
    assert not any(b"anna" in data for data in files.values())


def test_a_name_that_no_data_set_can_have_is_refused_before_a_file_is_written(collect, store_file, hub):  # noqa: F811
    judge_all(store_file)
    options = {"store": store_file.name, "output": "refused.jsonl", "license": "cc-by-4.0"}
    status, _, error = collect("export", **options, push_to_hub="alice/judged..again")
    assert status == 2 and "alice/judged.again" in error.splitlines()[-1]
    assert not (store_file.parent / "refused.jsonl").exists() and not hub.repos


def hub_settings(hub, home: Path) -> dict[str, str]:  # noqa: F811
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": ALICE, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return settings | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(home / "hf_home"), "HOME": str(home)}


def judge_behind_proxy(port: int, host: str, token: str, n: int) -> None:
    """A person judges `n` tasks by https at `host`; the requests are as the proxy of a Space passes them on."""
    passed_on = {"Host": host, "X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.9"}
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=passed_on, trust_env=False) as client:
        cookie = client.get(f"/join/{token}").headers["Set-Cookie"]
        assert "Secure" in cookie and "HttpOnly" in cookie
        client.headers["Cookie"] = cookie.partition(";")[0]
        client.headers["Origin"] = f"https://{host}"
        client.headers["X-CSRF-Token"] = client.get("/api/session").json()["csrf"]
        task = client.get("/api/task").json()["task"]
        for number in range(n):
            judged = {"task": task["id"], "key": f"proxy-key-{number}", "seconds": 1, "answer": {"preference": 3}}
            reply = client.post("/api/judgments", json=judged)
            assert reply.status_code == 200, reply.text
            task = reply.json()["next"]["task"]


def test_a_space_serves_saves_when_it_is_stopped_and_continues_on_a_new_disk(collect, store_file, tmp_path, hub):  # noqa: F811
    options = {"space": "Alice/my_judge", "store": store_file.name, "backup_repo": "alice/judgments", "people": "tom"}
    status, shown, error = collect("space", **options)
    assert status == 0, error
    links = links_in(shown)
    assert links["tom"].startswith("https://alice-my-judge.hf.space/join/") and "admin" in links
    assert "hf repos create Alice/my_judge --type space --sdk docker -e BACKUP_REPO=alice/judgments" in shown
    folder = tmp_path / "space"
    assert {"Dockerfile", "README.md", "start.sh"} <= {file.name for file in folder.iterdir()}
    assert "How is day" not in "".join(file.read_text() for file in folder.iterdir())  # the Space may be public

    # `start.sh` as the container runs it, with this environment's command.
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "hf-rlhf").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hf_rlhf_ext "$@"\n')
    (commands / "hf-rlhf").chmod(0o755)
    port = free_port()
    token = links["tom"].rpartition("/")[2]
    for disk, n_restored in (("first", 0), ("second", 2)):
        home = tmp_path / disk
        home.mkdir()
        env = hub_settings(hub, home) | {"PATH": f"{commands}:{os.environ['PATH']}", "PORT": str(port)}
        env |= {"BACKUP_REPO": "alice/judgments", "SPACE_HOST": "alice-my-judge.hf.space"}
        with running(["bash", str(folder / "start.sh")], home, env) as space:
            shown = shown_when(space, "Serving")
            assert f"alice/judgments: {n_restored} judgments" in shown
            assert links_in(shown) == {}  # no secret link in the log of a Space
            if disk == "first":
                judge_behind_proxy(port, "alice-my-judge.hf.space", token, 2)
    with Store(tmp_path / "second" / "judgments.sqlite") as store:
        assert store.counts()["judgments"] == 2


# Trying it out


@pytest.mark.slow
def test_demo_shows_a_page_with_answers_and_keeps_them(collect, workspace, tmp_path):
    words = ["demo", "--policy", workspace / "base", "--n_prompts", 4, "--max_new_tokens", 6]
    with process(*words, cwd=tmp_path) as demo:
        shown = shown_when(demo, "4 tasks are on the page", seconds=120)
        assert re.search(r"Ready after \d+ seconds", shown)
        link = re.search(r"http://\S+/join/\S+", shown)[0]
        judge(link, 3)
    assert "Stopped: 3 judgments" in demo.log.read_text()
    with process(*words, cwd=tmp_path) as demo:
        judge(re.search(r"http://\S+/join/\S+", shown_when(demo, "4 tasks are on the page"))[0], 1)
    assert "Stopped: 4 judgments" in demo.log.read_text()


# What is installed


def test_the_wheel_has_the_page_and_the_files_of_a_space(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = [*(ROOT / "hf_rlhf_ext/collect/space").iterdir(), *(ROOT / "hf_rlhf_ext/collect/web/static").iterdir()]
    assert len(wanted) >= 8
    assert {path.relative_to(ROOT).as_posix() for path in wanted} <= names


def test_the_header_of_the_space_is_what_the_server_listens_on():
    import yaml

    folder = ROOT / "hf_rlhf_ext/collect/space"
    header = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert header["sdk"] == "docker"
    assert f"PORT:-{header['app_port']}" in (folder / "start.sh").read_text()
    assert f"EXPOSE {header['app_port']}" in (folder / "Dockerfile").read_text()
    assert json.dumps(header["title"])
