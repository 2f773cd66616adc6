"""Serves the page on which people judge, and prints a secret link for each person.

hf-rlhf collect serve --store judgments.sqlite --tasks tasks.jsonl --people anna,tom
"""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub.utils import disable_progress_bars

from hf_rlhf_ext.cli.program import how_to_run
from hf_rlhf_ext.collect.backup import Backup, BackupRepository
from hf_rlhf_ext.collect.store import Store
from hf_rlhf_ext.collect.tasks import Task, read_tasks
from hf_rlhf_ext.collect.web.app import create_app
from hf_rlhf_ext.collect.web.server import is_loopback, open_socket, serve_forever
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.collect_parts.options import (
    PORT,
    STORE_HELP,
    check_at_least,
    check_between,
    print_next,
    public_address,
    split_names_of,
)
from hf_rlhf_ext.recipes.collect_parts.people import add_people, new_links, print_links

BACKUP_MINUTES = 2.0
"""Minutes between two copies to the Hub, unless another number is given."""
ALL_ADDRESSES = ("0.0.0.0", "::", "")
"""Values of `--host` that stand for all addresses of a machine. None of them can be opened in a browser."""
SETTINGS = ("title", "wanted", "overlap_share", "overlap_wanted", "gold_share")
"""Options that are stored as settings under the same name."""


@dataclass
class ServeArguments:
    """The store, what is judged and by whom, and the address."""

    store: str = field(default="judgments.sqlite", metadata={"help": STORE_HELP + " Made if it does not exist."})
    tasks: str | None = field(
        default=None, metadata={"help": "File of tasks to add. Those that the store has already are not added again."}
    )
    people: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of people who judge, as `anna tom` or `anna,tom`. Those who are new get a link; more can be "
            "added."
        },
    )
    new_links: bool = field(default=False, metadata={"help": "Make new links for everyone. The old ones stop working."})
    instructions: str | None = field(
        default=None, metadata={"help": "Markdown file with instructions, shown beside the tasks. `None`: as before."}
    )
    title: str | None = field(default=None, metadata={"help": "Title of the page. `None`: as before."})
    wanted: int | None = field(
        default=None,
        metadata={"help": "People who judge each task of --tasks. `None`: as in the file, or as before."},
    )
    overlap_share: float | None = field(
        default=None,
        metadata={"help": "Share of the new tasks that more people judge, to measure agreement. `None`: as before."},
    )
    overlap_wanted: int | None = field(
        default=None, metadata={"help": "People who judge each task of that share. `None`: as before."}
    )
    gold_share: float | None = field(
        default=None,
        metadata={"help": "Share of gold questions among what a person is given. `None`: as before (0.1 at first)."},
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen on. 127.0.0.1 is reached from this machine only."}
    )
    port: int = field(default=PORT, metadata={"help": "Port to listen on."})
    url: str | None = field(
        default=None, metadata={"help": "Public address for the links, such as https://judge.example.org."}
    )
    trusted_proxy: bool = field(
        default=False,
        metadata={"help": "Believe X-Forwarded-For and X-Forwarded-Proto. Only behind a proxy that sets them."},
    )
    backup_repo: str | None = field(
        default=None, metadata={"help": "Private data set on the Hub that keeps a copy of the store, as owner/name."}
    )
    backup_minutes: float | None = field(
        default=None, metadata={"help": "Minutes between two copies. If `None`, 2 minutes."}
    )
    backup_public: bool = field(default=False, metadata={"help": "Accept a public data set for the copies."})

    def __post_init__(self):
        check_at_least(self, wanted=1, overlap_wanted=1)
        check_between(self, overlap_share=(0, 1), gold_share=(0, 1), port=(1, 65535))
        self.check_backup()
        split_names_of(self, "people")
        if self.url is not None:
            self.url = public_address(self.url)

    def check_backup(self) -> None:
        """Refuses options of the copies that have no effect."""
        if self.backup_repo is None and (self.backup_minutes is not None or self.backup_public):
            raise UserError("backup_minutes and backup_public are for --backup_repo owner/name: add it.")
        if self.backup_minutes is None:
            self.backup_minutes = BACKUP_MINUTES
        if not 0 < self.backup_minutes < float("inf"):
            raise UserError(f"backup_minutes must be above 0, got {self.backup_minutes}.")

    @property
    def base(self) -> str:
        """Address for the links."""
        if self.url is not None:
            return self.url
        host = self.host
        if host in ALL_ADDRESSES:
            host = "127.0.0.1"
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


ARGUMENTS = (ServeArguments,)


def run(args: ServeArguments) -> None:
    """Serves until it is interrupted."""
    # Mistakes are found before anything is made, so that they leave nothing behind.
    instructions = read_instructions(args.instructions)
    tasks = None if args.tasks is None else read_tasks_file(args.tasks)
    open_socket(args.host, args.port).close()
    repository = None
    if args.backup_repo is not None:
        disable_progress_bars()  # one for every copy
        repository = BackupRepository(args.backup_repo, allow_public=args.backup_public)
        restored = repository.restore(args.store)
        if restored is not None:
            print(f"Restored {args.store} from {repository.repo_id}: {restored} judgments")
    with Store(args.store) as store, stop_on_sigterm():
        save_settings(store, args, instructions)
        if tasks is not None:
            added = store.add_tasks(tasks)
            print(f"{args.tasks}: {added.added} tasks added, {added.known} known already")
        invite(store, args)
        for line in warnings_on(store, args):
            print(f"warning: {line}", file=sys.stderr)
        with backup_of(store, repository, args) as backup:
            serve(store, args, backup)


def serve(store: Store, args: ServeArguments, backup: Backup | None = None) -> None:
    """Serves a store until it is interrupted."""
    app = create_app(store, url=args.url, secure=args.base.startswith("https:"), trusted_proxy=args.trusted_proxy)
    if backup is not None:
        app.state.notices = backup.notices
    print(f"Serving {args.store} at {args.base} (Ctrl-C stops; everything that was confirmed is on disk)", flush=True)
    with suppress(KeyboardInterrupt):  # also before the server is up
        serve_forever(app, args.host, args.port)
    counts = store.counts()
    print(f"Stopped: {counts['judgments']} judgments, {counts['complete']} of {counts['tasks']} tasks complete.")
    if counts["judgments"]:
        print_next(["collect", "export", "--store", args.store, "--output", "comparisons.jsonl"])


def read_tasks_file(path: str) -> list[Task]:
    """Reads the file of `--tasks`. Files of another kind are refused with the command that takes them."""
    try:
        return read_tasks(path)
    except UserError as error:
        columns = columns_of(path)
        hint = ""
        if "pairs" in columns or "chosen" in columns:
            hint = f" These look like judged comparisons: {how_to_run('collect import')} --judged {path} adds them."
        elif "prompt" in columns and "completions" not in columns:
            hint = f" These look like prompts: {how_to_run('collect sample')} --prompts {path} makes tasks."
        raise UserError(f"tasks: {error}{hint}") from None


def columns_of(path: str) -> set[str]:
    """Names of the columns in the first row of a file, or none if it is not a file of JSON objects."""
    try:
        with open(path, encoding="utf-8") as file:
            row = json.loads(file.readline())
    except (OSError, ValueError):
        return set()
    return set(row) if isinstance(row, dict) else set()


def read_instructions(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"instructions: {path} cannot be read ({error}): give a Markdown file in UTF-8.") from None


def save_settings(store: Store, args: ServeArguments, instructions: str | None) -> None:
    """Stores the settings that are given as options. The others stay as they are."""
    options: dict[str, Any] = {name: getattr(args, name) for name in SETTINGS}
    options["instructions"] = instructions
    changed = {name: value for name, value in options.items() if value is not None}
    if changed:
        store.save_settings(replace(store.settings(), **changed))


def invite(store: Store, args: ServeArguments) -> None:
    """Adds people, and prints the links of those who have no link that was printed before."""
    tokens = add_people(store, args.people)
    if args.new_links:
        tokens = new_links(store)
    print_links(tokens, args.base)
    others = [person.name for person in store.annotators() if person.active and person.name not in tokens]
    if others:
        print(f"The links of {', '.join(others)} were printed earlier; --new_links true makes new ones.")
    if not any(person.active and person.role != "admin" for person in store.annotators()):
        print("Nobody judges yet: pass --people anna,tom, or add people on the admin page.")
    if not store.counts()["tasks"]:
        sample = how_to_run("collect sample")
        print(f"No tasks yet: pass --tasks FILE, or add some while this runs: {sample} --store {args.store} …")


def warnings_on(store: Store, args: ServeArguments) -> Iterator[str]:
    """Options without effect, and settings with which the work would not end or would not be private."""
    settings = store.settings()
    tasks = store.tasks()
    n_judges = sum(person.active and person.role != "admin" for person in store.annotators())
    most_wanted = max((task.wanted for task in tasks if task.gold is None), default=0)
    if n_judges and most_wanted > n_judges:
        yield f"tasks are to be judged by {most_wanted} people, and there are {n_judges}: add people to complete them"
    if args.tasks is None and (args.wanted is not None or args.overlap_share is not None):
        yield "--wanted and --overlap_share count for tasks that are added from now on, not for those in the store"
    if args.overlap_wanted is not None and settings.overlap_share == 0:
        yield "--overlap_wanted has no effect without --overlap_share"
    if args.gold_share and not any(task.gold is not None for task in tasks):
        yield "--gold_share has no effect yet: the store has no gold questions"
    if args.trusted_proxy and args.url is None:
        yield "--trusted_proxy without --url: the links are for this machine only"
    if args.host in ALL_ADDRESSES and args.url is None:
        yield f"the links are for this machine only: for others, pass --url http://ADDRESS-OF-THIS-MACHINE:{args.port}"
    if args.url is not None and args.url.startswith("http:") and not is_loopback(urlsplit(args.url).hostname or ""):
        yield "--url is http, so links and judgments go over the network unencrypted: use https"


@contextmanager
def backup_of(store: Store, repository: BackupRepository | None, args: ServeArguments) -> Iterator[Backup | None]:
    """Copies of the store to the Hub while the server runs, and once more at its end."""
    if repository is None:
        yield None
        return
    backup = Backup(store, repository, minutes=args.backup_minutes)
    print(f"Copies go to the private data set {repository.repo_id} every {args.backup_minutes:g} minutes")
    try:
        yield backup
    finally:
        backup.close()


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Lets SIGTERM, which container platforms send, end the server as Ctrl-C does: with the last copy."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
