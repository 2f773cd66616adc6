"""Load test of the collection server: 50 people at once, 5,000 judgments, and a check that each is there once.

make bench-collect    # about a minute on 2 cores; prints a table and one line of JSON

The server runs in a process of its own on loopback, with its usual limits, and with a store on disk. Each client has a
link of its own, and works in a thread of this process like the page does in a browser. They answer with and without
time to think. One judgment in 20 is sent twice with the same key, as after a lost reply. At the end, what the clients
sent is compared with what the store has: who judged which task, with which answer, for how many seconds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from hf_rlhf_ext.collect.client import JudgeClient, TaskOnPage, new_key
from hf_rlhf_ext.collect.simulated import SimulatedPerson
from hf_rlhf_ext.collect.store import Store
from hf_rlhf_ext.collect.tasks import Task
from hf_rlhf_ext.collect.web.app import create_app
from hf_rlhf_ext.collect.web.server import Server

WANTED = 2
"""People who judge each task."""
SPARE = 1.1
"""Tasks for this many times the judgments, so that nobody waits for a task at the end."""
RELOAD_EVERY, RESEND_EVERY, RANK_EVERY = 5, 20, 10
PERCENTILES = (50, 95, 99)

COMPLETION = """The answer to question {number} in version {version} has **three parts**:

1. first, a sentence of about the length that people write in an answer to a short question,
2. then `some_code({number})` in the middle of it, and
3. a [link](https://example.com/{number}) that nobody has to open.

```python
def answer(x):
    return x + {number} * {version}
```

The last paragraph says the same once more in other words, as language models like to do, and then it ends here.
"""


# ---- The server, in its own process ----------------------------------------------------------------------------------


def serve(path: str) -> None:
    """Serves a store until stdin is closed. The first line of stdout is the address."""
    with Store(path) as store, Server(create_app(store)) as server:
        print(server.url, flush=True)
        sys.stdin.read()


class ServerProcess:
    """`serve` in another process, as a context manager."""

    def __init__(self, path: Path):
        command = [sys.executable, __file__, "--serve", str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise SystemExit("the server did not start")

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


# ---- The clients -----------------------------------------------------------------------------------------------------


def length_score(prompts, completions) -> list[float]:
    """A gold reward that costs no time."""
    return [len(text) % 7 / 7 for text in completions]


class Worker(threading.Thread):
    """One person, who comes `late` seconds after the start and judges `n` tasks.

    `sent` has what was confirmed: key -> (task as it was shown, answer, seconds). `seconds` has the time of each
    request by its method and path.
    """

    def __init__(self, name: str, link: str, n: int, think_seconds: float, late: float):
        super().__init__(name=name)
        self.late = late
        self.person = SimulatedPerson(name, gold=length_score)
        self.link = link
        self.n = n
        self.think_seconds = think_seconds
        self.sent: dict[str, tuple[TaskOnPage, dict[str, Any], float]] = {}
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.n_wrong_repeats = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with JudgeClient(self.link, on_reply=self._note) as client:
                self._work(client)
        except BaseException as error:
            self.error = error

    def _note(self, method: str, path: str, seconds: float) -> None:
        if path.startswith("/api/"):
            self.seconds[f"{method} {path}"].append(seconds)

    def _work(self, client: JudgeClient) -> None:
        time.sleep(self.late)
        task = client.task()
        for number in range(self.n):
            if number % RELOAD_EVERY == 0:
                task = client.task()
            time.sleep(self.think_seconds)
            answer = self.person.answer(task.prompt, task.completions)
            if number % 3 == 0:
                answer["comment"] = f"number {number} of {self.name}"
            seconds = self.person.seconds_for(task.prompt, task.completions)
            key = new_key()
            reply = client.judge(answer, seconds, key=key)
            self.n_wrong_repeats += reply.is_repeat
            self.sent[key] = (task, answer, seconds)
            if number % RESEND_EVERY == 0:
                client.current = task
                reply = client.judge(answer, seconds, key=key)
                self.n_wrong_repeats += not reply.is_repeat
            task = reply.task


# ---- The check -------------------------------------------------------------------------------------------------------


def by_completion(answer: dict[str, Any], order: list[int]) -> dict[str, Any]:
    """The answer in the order of the task's completions. Written again here, so that it checks the store's own way."""
    result = dict(answer)
    if "ranks" in answer:
        result["ranks"] = [answer["ranks"][order.index(k)] for k in range(len(order))]
    if "preference" in answer and order == [1, 0]:
        result["preference"] = 8 - answer["preference"]
    return result


def compare(store: Store, workers: list[Worker]) -> dict[str, int]:
    """Counts the differences between what was sent and what the store has."""
    tasks = {task.id: task for task in store.tasks()}
    stored = store.judgments(live_only=False)
    by_key = {judgment.key: judgment for judgment in stored}
    found = {"sent": 0, "stored": len(stored), "lost": 0, "different": 0}
    for worker in workers:
        for key, (task, answer, seconds) in worker.sent.items():
            found["sent"] += 1
            judgment = by_key.get(key)
            if judgment is None:
                found["lost"] += 1
                continue
            shown = [tasks[judgment.task_id].completions[k] for k in judgment.order]
            expected = (worker.name, task.id, task.completions, seconds, by_completion(answer, judgment.order))
            got = (judgment.annotator, judgment.task_id, shown, judgment.seconds, judgment.answer)
            found["different"] += expected != got

    pairs = [(judgment.annotator, judgment.task_id) for judgment in stored]
    judges: dict[int, int] = defaultdict(int)
    for _, task_id in pairs:
        judges[task_id] += 1
    found["doubled"] = len(pairs) - len(set(pairs)) + found["stored"] - len(by_key)
    found["unknown"] = found["stored"] - sum(key in by_key for worker in workers for key in worker.sent)
    found["too_many_people"] = sum(n > WANTED for n in judges.values())
    found["wrong_repeats"] = sum(worker.n_wrong_repeats for worker in workers)
    return found


# ---- Runs and the table ----------------------------------------------------------------------------------------------


def make_tasks(n_judgments: int) -> list[Task]:
    tasks = []
    for number in range(round(n_judgments * SPARE / WANTED)):
        n_completions = 4 if number % RANK_EVERY == 0 else 2
        completions = [COMPLETION.format(number=number, version=version) for version in range(n_completions)]
        tasks.append(Task(prompt=f"Question {number}: what is it?", completions=completions, wanted=WANTED))
    return tasks


def run_load(folder: Path, n_clients: int, n_each: int, think_seconds: float) -> dict[str, Any]:
    """One run with a new store and a new server."""
    path = folder / f"store-{think_seconds}.sqlite"
    with Store(path) as store:
        store.add_tasks(make_tasks(n_clients * n_each))
        tokens = {f"client-{number}": store.add_annotator(f"client-{number}") for number in range(n_clients)}
    with ServerProcess(path) as server:
        workers = []
        for number, (name, token) in enumerate(tokens.items()):
            # Not everybody opens the link in the same moment.
            late = think_seconds * number / n_clients
            workers.append(Worker(name, f"{server.url}/join/{token}", n_each, think_seconds, late))
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - start
    for worker in workers:
        if worker.error is not None:
            raise worker.error
    with Store(path) as store:
        checked = compare(store, workers)
    times = defaultdict(list)
    for worker in workers:
        for request, values in worker.seconds.items():
            times[request] += values
    return {
        "think_seconds": think_seconds,
        "clients": n_clients,
        "seconds": round(seconds, 1),
        "judgments_per_second": round(checked["stored"] / seconds, 1),
        "milliseconds": {request: percentiles(values) for request, values in sorted(times.items())},
        **checked,
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    found = {f"p{p}": round(1000 * cuts[p - 1], 1) for p in PERCENTILES}
    return found | {"max": round(1000 * max(values), 1), "n": len(values)}


def show(run: dict[str, Any]) -> None:
    print(f"\n{run['clients']} clients, {run['think_seconds']:g} s to think: {run['stored']} judgments", end=" ")
    print(f"in {run['seconds']} s, {run['judgments_per_second']} a second")
    print(f"  {'milliseconds':<22}{'n':>7}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}")
    for request, ms in run["milliseconds"].items():
        print(f"  {request:<22}{ms['n']:>7}{ms['p50']:>9}{ms['p95']:>9}{ms['p99']:>9}{ms['max']:>9}")
    for name in ("sent", "stored", "lost", "doubled", "different", "unknown", "too_many_people", "wrong_repeats"):
        print(f"  {name}: {run[name]}", end="")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--judgments", type=int, default=5000, help="in all, in each run")
    parser.add_argument("--think", type=float, nargs="*", default=[0.25, 0.0], help="seconds before each answer")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for think_seconds in args.think:
            run = run_load(Path(folder), args.clients, args.judgments // args.clients, think_seconds)
            show(run)
            runs.append(run)
    problems = ("lost", "doubled", "different", "unknown", "too_many_people", "wrong_repeats")
    is_correct = all(run[name] == 0 for run in runs for name in problems)
    print(json.dumps({"is_correct": is_correct, "runs": runs}))
    if not is_correct:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
