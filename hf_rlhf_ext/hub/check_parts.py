"""What `hf-rlhf check-hub` reports, and the repositories in which it tries things."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name

from .refusals import reason_of


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        what: What was tried.
        found: What the Hub did.
        expected: What the stand-in does.
        detail: More about `found`, such as the Hub's reason, which is not compared.
    """

    what: str
    found: str
    expected: str
    detail: str = ""

    @property
    def same(self) -> bool:
        """True if the Hub did what the stand-in does."""
        return self.found == self.expected

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        line = f"{'ok' if self.same else 'DIFFERS':<8} {self.what:<50} {self.found}{detail}"
        return line if self.same else f"{line}; the stand-in: {self.expected}"


class OwnRepositories:
    """Private repositories with random names, which are deleted when the block ends, also after an error or Ctrl-C.

    Only repositories that this object created are deleted.

    Args:
        name: Full id, `owner/name`, which the names of all repositories begin with.
        token: Access token; None means the stored one.
        keep: Whether to leave the repositories.

    Attributes:
        api: Client with the token.
        name: As given.
        left: Repositories that could not be deleted, as (id, type).
    """

    def __init__(self, name: str, token: str | None, keep: bool):
        self.api = HfApi(token=token)
        self.name = name
        self.token = token
        self.keep = keep
        self.left: list[tuple[str, str]] = []
        self._created: list[tuple[str, str]] = []

    def create(self, suffix: str, repo_type: str = "model") -> str:
        """Creates a private repository, and returns its id.

        Raises:
            HfHubHTTPError: The Hub refuses, for example since there is one with this name.
        """
        repository = (f"{self.name}-{suffix}", repo_type)
        self._created.append(repository)  # before the request, since its answer may be lost
        try:
            self.api.create_repo(repository[0], repo_type=repo_type, private=True, exist_ok=False)
        except HfHubHTTPError as error:
            if error.response.status_code < 500:  # the Hub refused, so that a repository of this name is not ours
                self._created.remove(repository)
            raise
        return repository[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.keep:
            self.delete()

    @property
    def urls(self) -> list[str]:
        """Addresses of the repositories."""
        folders = {"model": "", "dataset": "datasets/"}
        return [f"{constants.ENDPOINT}/{folders[repo_type]}{repo_id}" for repo_id, repo_type in self._created]

    def delete(self) -> None:
        """Deletes the repositories and what the client's cache has of them."""
        while self._created:
            repo_id, repo_type = self._created.pop()
            try:
                self.api.delete_repo(repo_id, repo_type=repo_type, missing_ok=True)
            except Exception as error:  # the others are still to be deleted
                self.left.append((repo_id, repo_type))
                command = f"hf repos delete {repo_id} --type {repo_type}"
                print(f"warning: not deleted ({reason_of(error)}): {repo_id}: run `{command}`", file=sys.stderr)
            folder = repo_folder_name(repo_id=repo_id, repo_type=repo_type)
            for cache in (Path(constants.HF_HUB_CACHE), Path(constants.HF_HUB_CACHE) / ".locks"):
                shutil.rmtree(cache / folder, ignore_errors=True)
