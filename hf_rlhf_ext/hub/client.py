"""Talks to the Hub: who may write there, and one scanned commit a push, tried again where the Hub fails for a while."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoUrl
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers

from ..errors import UserError
from .privacy import hub_owners
from .scan import Files, refuse_findings, scan

logger = logging.getLogger(__name__)
T = TypeVar("T")

MANIFEST = ".hf_rlhf_ext.json"
"""What a push leaves in the repository: the names of its files; the next push removes those that it does not have."""
ATTEMPTS = 4
_LONGEST_WAIT = 300  # seconds; a Hub that asks for more is for later: a rented machine would wait
_WORTH_ANOTHER_TRY = (408, 409, 412, 429)
"""Client errors that pass: time-out, conflict, another commit came between, too many requests."""
_NAMES_REPOSITORIES = ("report.json", "adapter_config.json", "training_config.yaml")
"""Endings of files whose values may be ids on the Hub."""


class PushError(UserError):
    """The Hub did not take it: nothing has changed there, everything is still here."""


@dataclass(frozen=True)
class Target:
    """Where a push goes. `private` is that of a repository that is made now; `revision` a branch, None: `main`."""

    repo_id: str
    repo_type: str = "model"
    private: bool = True
    revision: str | None = None

    @property
    def repository(self) -> dict[str, str]:
        """As the client's methods take it."""
        return {"repo_id": self.repo_id, "repo_type": self.repo_type}


# Who may write


def check_access(repo_id: str, token: str | None = None) -> str:
    """The full id, if this token may write there; a network that is down is no reason to stop: then as given.

    Raises:
        UserError: no token, a wrong or read-only one, or somebody else's namespace.
    """
    try:
        account = HfApi(token=token).whoami()
    except LocalTokenNotFoundError:
        raise UserError("push_to_hub: no token: run `hf auth login`, or set HF_TOKEN.") from None
    except OfflineModeIsEnabled:
        raise UserError("push_to_hub: HF_HUB_OFFLINE is set, so nothing can be pushed: unset it.") from None
    except Exception as error:
        if _status(error) in (401, 403):
            raise UserError("push_to_hub: the Hub does not know this token: run `hf auth login --force`.") from None
        logger.warning("push_to_hub: the Hub cannot be reached now (%s).", first_line(error))
        return repo_id
    access_token = account.get("auth", {}).get("accessToken", {})
    if access_token.get("role") == "read":
        raise UserError("push_to_hub: this token may only read: make one with the right to write.")
    owner, _, name = repo_id.rpartition("/")  # no owner: one's own namespace
    user = account["name"]
    organizations = [known["name"] for known in account.get("orgs", ())]
    if owner and owner != user and owner not in organizations:
        raise UserError(
            f"push_to_hub: {repo_id} is not yours to write: you are {user}, in {organizations or 'no one'}."
        )
    return f"{owner or user}/{name}"


def create_private_repo(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Makes the repository unless it exists, private unless `private` is False; returns its full id.

    A Hub that is down is no reason to stop: the push at the end makes it.

    Raises:
        UserError: as `check_access`, or the Hub refuses to make it.
    """
    repo_id = check_access(repo_id, token)
    api = HfApi(token=token)
    target = Target(repo_id, private=private is not False)
    try:
        return _create(api, target).repo_id
    except Exception as error:
        if _status(error) in (401, 402, 403):
            raise UserError(f"push_to_hub: {repo_id} cannot be made: {first_line(error)}") from error
        logger.warning("push_to_hub: %s cannot be made now (%s).", repo_id, first_line(error))
        return repo_id


# One commit a push


def push_files(
    files: Files,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    allow: Iterable[str] = (),
    public: Iterable[str] = (),
    message: str = "Upload",
    repo_type: str = "model",
) -> CommitInfo:
    """Scans `files` (name in the repository: content, or where it is) and pushes them to `owner/name` in one commit.

    What an earlier push left there and this one lacks is removed in it. `public` are names that may be published
    (`hub_owners`), beside the owners of `repo_id` and of what a run says that it was made from.

    Raises:
        UserError: the scanner found something.
        PushError: the Hub failed, after retries.
    """
    if "/" not in repo_id:
        raise PushError(f"not pushed: the Hub cannot be reached, so it is not known whose {repo_id} would be.")
    manifest = json.dumps({"files": sorted(files)}, indent=2) + "\n"
    files = {**files, MANIFEST: manifest.encode()}
    owners = hub_owners(repo_id, *_values_in(files))
    refuse_findings(scan(files, allow, {*public, *owners}))
    api = HfApi(token=token)
    target = Target(repo_id, repo_type, private, revision)
    try:
        return _retried(lambda: _commit(api, target, files, message))
    except Exception as error:  # whatever huggingface_hub and its HTTP client make of a failure
        raise PushError(f"not pushed to {repo_id}: {first_line(error)}.") from error


def _commit(api: HfApi, target: Target, files: Files, message: str) -> CommitInfo:
    """Makes repository and branch where they do not exist, and one commit of `files`."""
    _create(api, target)
    if target.revision is not None:
        api.create_branch(**target.repository, branch=target.revision, exist_ok=True)
    head = api.repo_info(**target.repository, revision=target.revision)
    stored = {file.rfilename for file in head.siblings}
    ours = _pushed_earlier(api, target, head.sha, stored)
    stale = ours - files.keys()
    # Made anew for every attempt: they ask again what has arrived, also of a commit whose answer was lost.
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for name, content in sorted(files.items()):
        operations.append(CommitOperationAdd(name, content))
    for name in sorted(stale):
        operations.append(CommitOperationDelete(name))
    # Not upload_folder: with hf_xet it splits what is large into several commits. Where another push came between, the
    # Hub refuses this one (412, by `parent_commit`), and it is made again.
    return api.create_commit(
        **target.repository,
        operations=operations,
        commit_message=message,
        revision=target.revision,
        parent_commit=head.sha,
    )


def _pushed_earlier(api: HfApi, target: Target, commit: str, stored: set[str]) -> set[str]:
    """Files in the repository that an earlier push of ours left there; others are left alone."""
    if MANIFEST not in stored:
        return set()
    path = api.hf_hub_download(**target.repository, filename=MANIFEST, revision=commit)
    manifest = json.loads(Path(path).read_bytes())
    return stored.intersection(manifest["files"])


def _create(api: HfApi, target: Target) -> RepoUrl:
    url = api.create_repo(**target.repository, private=target.private, exist_ok=True)
    if target.private and not api.repo_info(**target.repository).private:
        logger.warning("%s exists and is public: so is what is pushed to it.", url.repo_id)
    return url


def _values_in(files: Files) -> Iterator[str]:
    """All values of a run's report, options and adapter configurations: ids on the Hub among them."""
    for name, content in files.items():
        if not name.endswith(_NAMES_REPOSITORIES):
            continue
        encoded = content if isinstance(content, bytes) else content.read_bytes()
        parse = json.loads if name.endswith(".json") else yaml.safe_load
        with contextlib.suppress(ValueError, yaml.YAMLError):  # then it names nothing
            yield from _strings_in(parse(encoded))


def _strings_in(value: Any) -> Iterator[str]:
    """All strings of a JSON or YAML value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings_in(part)


# When the Hub fails


def _retried(call: Callable[[], T]) -> T:
    """`call()`, again after a failure that may pass."""
    for attempt in range(1, ATTEMPTS):
        try:
            return call()
        except Exception as error:
            seconds = _wait(error, attempt)
            if _is_permanent(error) or seconds > _LONGEST_WAIT:
                raise
            logger.warning("push: %s; again in %d s (%d of %d).", first_line(error), seconds, attempt, ATTEMPTS - 1)
            time.sleep(seconds)
    return call()  # the last attempt: its error is the caller's


def _is_permanent(error: BaseException) -> bool:
    status = _status(error)
    if status is None or status in _WORTH_ANOTHER_TRY:  # None: the connection broke
        return False
    return 400 <= status < 500


def _wait(error: BaseException | None, attempt: int) -> int:
    """Seconds until the next attempt: what the Hub asks for, else twice as long each time."""
    headers = getattr(_response(error), "headers", {})
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1
    asked = headers.get("Retry-After", "")
    if asked.isdigit():
        return int(asked) + 1
    return 2**attempt


def _response(error: BaseException | None) -> Any:
    """The HTTP response at the bottom of an error, None where the connection broke."""
    # The client wraps what its HTTP library raised, sometimes twice.
    while error is not None:
        if getattr(error, "response", None) is not None:
            return error.response
        error = error.__cause__
    return None


def _status(error: BaseException) -> int | None:
    return getattr(_response(error), "status_code", None)


def first_line(error: BaseException) -> str:
    """The first line of an error that says something."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip().rstrip(".")
    return type(error).__name__
