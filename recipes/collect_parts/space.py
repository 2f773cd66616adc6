"""Prepares a Hugging Face Space that serves the page: the store in a private data set, and the files of the Space.

hf-rlhf collect space --space alice/judge --store judgments.sqlite --people anna,tom --backup_repo alice/judgments
"""

import re
import shlex
import shutil
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars

from hf_rlhf_ext.cli.output import prepare_output_dir
from hf_rlhf_ext.collect.backup import Backup, BackupRepository
from hf_rlhf_ext.errors import UserError
from hf_rlhf_ext.recipes.collect_parts.options import STORE_HELP, existing_store, split_names_of
from hf_rlhf_ext.recipes.collect_parts.people import add_people, print_links


@dataclass
class SpaceArguments:
    """The Space, what it serves, and where its files go."""

    space: str | None = field(default=None, metadata={"help": "Id of the Space, as owner/name."})
    store: str | None = field(default=None, metadata={"help": STORE_HELP})
    people: list[str] | None = field(
        default=None, metadata={"help": "People to add, as `anna tom` or `anna,tom`. Their links are printed."}
    )
    backup_repo: str | None = field(
        default=None, metadata={"help": "Private data set for the store, as owner/name. Made if it does not exist."}
    )
    wheel: str | None = field(
        default=None, metadata={"help": "Wheel of this package to install. If `None`, the one of the package index."}
    )
    output_dir: str = field(default="space", metadata={"help": "Folder for the files of the Space."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a folder that an earlier run made."})

    def __post_init__(self):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.space or ""):
            raise UserError(f"space: {self.space!r} is no id of a Space: write --space alice/judge.")
        if self.backup_repo is None:
            raise UserError(
                "backup_repo is required, as the disk of a Space is lost at every restart: --backup_repo owner/name."
            )
        if self.wheel is not None and not Path(self.wheel).is_file():
            raise UserError(f"wheel: no file {self.wheel}: check the path.")
        split_names_of(self, "people")

    @property
    def url(self) -> str:
        """Address of the Space."""
        host = re.sub(r"[^a-z0-9]+", "-", self.space.lower())
        return f"https://{host}.hf.space"


ARGUMENTS = (SpaceArguments,)


def run(args: SpaceArguments) -> None:
    """Saves the store, writes the folder, and prints the links and the commands that make the Space."""
    disable_progress_bars()
    with existing_store(args.store) as store:
        repository = BackupRepository(args.backup_repo)
        # Refuses a data set with judgments that this store does not have.
        repository.restore(args.store)
        prepare_output_dir(args.output_dir, resume=False, overwrite=args.overwrite)
        write_files(args)
        tokens = add_people(store, args.people)
        backup = Backup(store, repository, minutes=60)
        backup.close()
        if backup.problem is not None:
            raise UserError(f"backup_repo: {repository.repo_id}: {backup.problem}: try again.")
        print_links(tokens, args.url)
    print(
        f"The store is in the private data set {repository.repo_id}, the files of the Space in {args.output_dir}. Next:"
    )
    token = "--secrets HF_TOKEN"  # read from the environment, so that it is in no shell history
    print(f"  hf repos create {args.space} --type space --sdk docker -e BACKUP_REPO={repository.repo_id} {token}")
    print(f"  hf upload {args.space} {shlex.quote(args.output_dir)} . --type space")


def write_files(args: SpaceArguments) -> None:
    folder = Path(args.output_dir)
    for file in files("hf_rlhf_ext.collect").joinpath("space").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if args.wheel is not None:
        shutil.copyfile(args.wheel, folder / Path(args.wheel).name)
