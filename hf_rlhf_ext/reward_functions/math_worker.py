"""The process in which mathematical answers are parsed and compared. It is run as a script and imports no other module.

It reads lines of JSON, `{"completion": …, "solution": …}`, and answers each with a line, `{"score": …}`. Here TRL's
function runs in the main thread of its process, where the timeouts of math-verify work.
"""

import json
import logging
import os
import resource
import sys

MEMORY = 2 * 1024**3
"""Bytes of address space: an expression such as 9^{9^{9^9}} must not take the machine's memory."""


def main() -> None:
    """Answers lines until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # Only answers go to the parent: what libraries print goes nowhere.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        asked = json.loads(line)
        completions = [[{"role": "assistant", "content": asked["completion"]}]]
        try:
            from trl.rewards import accuracy_reward

            (score,) = accuracy_reward(completions, [asked["solution"]])
            answer = {"score": score}
        except (ImportError, OSError) as error:  # the package is not installed, or cannot be loaded
            answer = {"problem": f"{type(error).__name__}: {error}"}
        except Exception as error:  # noqa: BLE001  # the parsers fail in many ways on the text of a policy
            answer = {"score": 0.0, "failed": type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
