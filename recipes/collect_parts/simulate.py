"""Lets simulated people judge at a running server, over HTTP like people do, to try things out.

hf-rlhf collect simulate --links http://127.0.0.1:8347/join/TOKEN
"""

import math
import threading
from dataclasses import dataclass, field

from hf_rlhf_ext.collect.client import JudgeClient, work
from hf_rlhf_ext.collect.simulated import SimulatedPerson
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.collect_parts.options import check_at_least, check_between, split_names

FIRST_PATIENCE = 5.0
"""Seconds to wait for a server that does not reply to the link. Later, one that restarts is waited for longer."""


@dataclass
class SimulateArguments:
    """Who judges, and how."""

    links: list[str] | None = field(default=None, metadata={"help": "Personal links, one or several."})
    judgments: int | None = field(
        default=None, metadata={"help": "Largest number of judgments of each person. If `None`, all there are."}
    )
    noise: float = field(
        default=0.3, metadata={"help": "Noise of the judgments, in units of the gold reward, which is sentiment."}
    )
    position_bias: float = field(default=0.0, metadata={"help": "Added to the completion that is shown first."})
    length_bias: float = field(default=0.0, metadata={"help": "Added for each 100 characters of a completion."})
    lazy: float = field(default=0.0, metadata={"help": "Share of tasks that are answered without reading."})
    random: bool = field(default=False, metadata={"help": "Answer at random."})
    skip_share: float = field(default=0.0, metadata={"help": "Share of tasks that are skipped."})
    think_seconds: float = field(default=0.0, metadata={"help": "Seconds to wait before each answer."})
    seed: int = field(default=0, metadata={"help": "Seed for the noise."})

    def __post_init__(self):
        if not self.links:
            raise UserError("links is required: the links that serve printed (--links http://…/join/TOKEN …).")
        self.links = split_names(self.links, "links")
        check_at_least(self, judgments=1, noise=0, think_seconds=0, seed=0)
        check_between(self, lazy=(0, 1), skip_share=(0, 1))
        for option in ("noise", "position_bias", "length_bias", "think_seconds"):
            if not math.isfinite(getattr(self, option)):
                raise UserError(f"{option} must be a finite number, got {getattr(self, option)}.")


ARGUMENTS = (SimulateArguments,)


def run(args: SimulateArguments) -> None:
    """Works with all links at once, and prints what each person did."""
    results: dict[str, str] = {}
    errors: list[Exception] = []
    threads = []
    for link in args.links:
        thread = threading.Thread(target=_work_at, args=(link, args, results, errors), daemon=True)
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    for line in results.values():
        print(line)
    if errors:
        raise errors[0]


def _work_at(link: str, args: SimulateArguments, results: dict[str, str], errors: list[Exception]) -> None:
    """One person works until there is nothing left, or until the number of judgments is reached."""
    try:
        with JudgeClient(link) as client:
            patience = client.patience
            client.patience = FIRST_PATIENCE
            session = client.join()
            client.patience = patience
            person = SimulatedPerson(
                name=session["name"],
                noise=args.noise,
                position_bias=args.position_bias,
                length_bias=args.length_bias,
                lazy=args.lazy,
                random=args.random,
                skip_share=args.skip_share,
                seed=args.seed,
            )
            saved: list[str] = []

            def may_go_on() -> bool:
                return args.judgments is None or len(saved) < args.judgments

            work(
                client,
                person,
                may_go_on=may_go_on,
                think_seconds=args.think_seconds,
                on_saved=lambda task, answer, reply: saved.append(reply.key),
            )
            results[link] = _summary(person.name, len(saved), client)
    except Exception as error:  # in a thread: the caller raises it
        errors.append(error)


def _summary(name: str, n_answers: int, client: JudgeClient) -> str:
    """One line on what a person did, and why it ended."""
    line = f"{name}: {n_answers} answer{'' if n_answers == 1 else 's'}"
    if client.paused:
        return f"{line}; the administrator has paused the work"
    n_open = client.progress.get("open", 0)
    if n_open:
        return f"{line}, {n_open} tasks still open"
    return f"{line}, no task left for this person"
