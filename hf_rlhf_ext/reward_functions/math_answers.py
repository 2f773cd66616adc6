"""Mathematical answers, through TRL's `accuracy_reward` and the parser of math-verify, with a time limit that holds.

math-verify's own timeouts are signals: they work in the main thread only, and not while a long computation runs in C.
So the parser has a process of its own, which is ended and started again when it takes too long.
"""

import json
import os
import selectors
import subprocess
import sys
import threading
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError
from .base import AnswerFunction, WarnOnce, accepted_texts

WORKER = Path(__file__).with_name("math_worker.py")
START_SECONDS = 120.0
"""Time in which the first answer must come: the process imports SymPy and TRL."""


def math(column: str = "answer", *, after: str | None = None, seconds: float = 20.0) -> AnswerFunction:
    r"""1 if the completion's mathematical answer equals that of a column, else 0, through TRL's `accuracy_reward`.

    The completion must have its answer in LaTeX: `\boxed{…}`, or `$…$` after words such as `the answer is`. With
    several boxes, all must equal the answer: let thoughts end at a mark, and pass `after`. A row whose value cannot be
    parsed, such as a word, is not scored.
    Needs the package math-verify: `pip install 'hf-rlhf-ext[math]'`.

    Args:
        column: column with the answer as LaTeX or a number; of a list, any may be met.
        after: only what follows the last occurrence of this mark counts, such as `</think>`.
        seconds: limit for one completion, which then scores 0. math-verify gives up by itself after 10 seconds of
            parsing and 5 of comparing, where it can.

    Raises:
        UserError: math-verify is not installed, or `seconds` is not positive.
    """
    return MathAnswer(column, after=after, seconds=seconds)


class MathAnswer(AnswerFunction):
    """See `math`."""

    __name__ = "math"

    def __init__(self, column: str, *, after: str | None, seconds: float):
        super().__init__(column, after)
        if find_spec("math_verify") is None:
            raise UserError("math: math-verify is not installed: pip install 'hf-rlhf-ext[math]'.")
        if not seconds > 0:
            raise UserError(f"math: seconds={seconds} must be positive.")
        self.seconds = seconds
        self._worker = MathWorker()
        self._warn = WarnOnce()

    def __getstate__(self) -> dict[str, Any]:
        """Without the process, which a copy starts itself."""
        return {**self.__dict__, "_worker": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _worker=MathWorker())

    def score(self, answer: str, expected: Any) -> float | None:
        accepted = accepted_texts(expected, self.columns[0])
        scores = [self._compared(answer, f"${text}$" if _is_bare(text) else text) for text in accepted]
        known = [score for score in scores if score is not None]
        return max(known) if known else None

    def _compared(self, answer: str, solution: str) -> float | None:
        try:
            return self._worker.score(answer, solution, self.seconds)
        except TimeoutError:
            self._warn(
                "timeout",
                "math: a completion took more than %g seconds or too much memory to compare: such ones score 0.",
                self.seconds,
            )
            return 0.0


def _is_bare(text: str) -> bool:
    r"""Whether LaTeX stands without marks, as in `\frac{1}{2}`: the parser reads LaTeX between marks only."""
    return "\\" in text and "$" not in text and "\\boxed" not in text and "\\(" not in text and "\\[" not in text


class MathWorker:
    """A process that compares answers, started when it is first needed. Threads take turns."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def score(self, completion: str, solution: str, seconds: float) -> float | None:
        """Score of one completion; `None` if the solution cannot be parsed.

        Raises:
            TimeoutError: it took longer than `seconds`. The process is ended, and the next call starts another one.
            UserError: the process cannot work at all.
        """
        with self._lock:
            is_new = self._process is None or self._process.poll() is not None
            if is_new:
                self._start()
            limit = seconds + START_SECONDS if is_new else seconds
            try:
                answer = self._asked({"completion": completion, "solution": solution}, limit)
            except BaseException:  # Ctrl-C too: an answer that comes later would be taken for the next one's
                self.close()
                raise
        if "problem" in answer:
            raise UserError(f"math: math-verify does not work ({answer['problem']}): pip install 'hf-rlhf-ext[math]'.")
        return answer["score"]

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def _start(self) -> None:
        self.close()
        # -P: a file of the working folder, such as `math.py`, must not replace a module.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C reaches the parent alone, which ends it
        )
        weakref.finalize(self, _end, self._process)

    def _asked(self, question: dict[str, str], seconds: float) -> dict[str, Any]:
        process = self._process
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise TimeoutError from None  # it has died of the last answer: memory, for example
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                raise TimeoutError
        line = process.stdout.readline()
        if not line:  # killed by a limit
            raise TimeoutError
        return json.loads(line)


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
