"""Access to the Hub: checks permissions, and pushes files in a single scanned commit, with retries."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoUrl
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers

from ..errors import UserError, first_line
from .cards.card_parts import text_of
from .privacy import hub_owners
from .refusals import check_header, check_repo_name, reason_of
from .scan import Files, refuse_findings, scan, with_origin

logger = logging.getLogger(__name__)
T = TypeVar("T")
MergeCard = Callable[[Path | bytes | None, bytes | None], tuple[bytes | None, list[str]]]
"""The card to push and the card in the repository -> the card to commit (None: no card), and what there is to say."""

MANIFEST = ".hf_rlhf_ext.json"
"""File in the repository that lists the files of the last push. The next push deletes those that it does not have."""
CARD = "README.md"
ATTEMPTS = 4
_LONGEST_WAIT = 300  # seconds; if the Hub asks for a longer wait, the push fails, since a rented machine would idle
_WORTH_ANOTHER_TRY = (408, 409, 412, 429)
"""Client errors to retry: timeout, conflict, a concurrent commit, too many requests."""
_NEVER_TEMPORARY = (TypeError, ValueError, LookupError, AttributeError)
"""Errors of a program or of its arguments; without a response of the Hub, other errors are those of the connection."""
_NAMES_REPOSITORIES = ("report.json", "adapter_config.json", "training_config.yaml")
"""Suffixes of files whose values may be ids on the Hub."""


class PushError(UserError):
    """Raised when the Hub did not accept a push. The repository is unchanged, and all files are still local."""


@dataclass(frozen=True)
class Target:
    """Destination of a push.

    Attributes:
        repo_id: Full id, `owner/name`.
        repo_type: `"model"` or `"dataset"`.
        private: Whether the repository is private if it is created now.
        revision: Branch; None means `main`.
    """

    repo_id: str
    repo_type: str = "model"
    private: bool = True
    revision: str | None = None

    @property
    def repository(self) -> dict[str, str]:
        """Arguments for the methods of `HfApi`."""
        return {"repo_id": self.repo_id, "repo_type": self.repo_type}


# Permissions


def check_access(repo_id: str, token: str | None = None) -> str:
    """Checks that the token can write to a repository.

    Args:
        repo_id: `owner/name`, or only a name in your own namespace.
        token: Access token; the default is `HF_TOKEN` or the token stored by `hf auth login`.

    Returns:
        The full id `owner/name`. If the Hub cannot be reached, a warning is logged and `repo_id` is returned unchanged.

    Raises:
        UserError: No repository can have this name, there is no token, the token is invalid or read-only, or the
            namespace belongs to somebody else.
    """
    check_repo_name(repo_id)
    try:
        account = HfApi(token=token).whoami()
    except LocalTokenNotFoundError:
        raise UserError("push_to_hub: no token: run `hf auth login`, or set HF_TOKEN.") from None
    except OfflineModeIsEnabled:
        raise UserError("push_to_hub: HF_HUB_OFFLINE is set, so pushing is not possible: unset it.") from None
    except Exception as error:
        if _status(error) in (401, 403):
            raise UserError("push_to_hub: the Hub does not know this token: run `hf auth login --force`.") from None
        logger.warning("push_to_hub: the Hub cannot be reached now (%s).", first_line(error))
        return repo_id
    access_token = account.get("auth", {}).get("accessToken", {})
    if access_token.get("role") == "read":
        raise UserError("push_to_hub: this token is read-only: create a token with write access.")
    owner, _, name = repo_id.rpartition("/")  # without an owner, the user's own namespace
    user = account["name"]
    organizations = [known["name"] for known in account.get("orgs", ())]
    if owner and owner != user and owner not in organizations:
        raise UserError(
            f"push_to_hub: {repo_id} is not yours: you are {user}, a member of {organizations or 'no organization'}: "
            "use one of these namespaces."
        )
    return f"{owner or user}/{name}"


def create_private_repo(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Creates the repository unless it exists. It is private unless `private` is False.

    If the Hub cannot be reached, a warning is logged, and the push at the end creates the repository.

    Returns:
        The full id of the repository.

    Raises:
        UserError: The token cannot write there (see `check_access`), or the Hub refuses to create the repository.
    """
    repo_id = check_access(repo_id, token)
    api = HfApi(token=token)
    target = Target(repo_id, private=private is not False)
    try:
        return _create(api, target).repo_id
    except Exception as error:
        if _status(error) in (400, 401, 402, 403):
            raise UserError(f"push_to_hub: cannot create {repo_id}: {reason_of(error)}.") from error
        logger.warning("push_to_hub: cannot create %s now (%s).", repo_id, reason_of(error))
        return repo_id


# One commit per push


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
    known: Callable[[], Collection[str]] | None = None,
    merge_card: MergeCard | None = None,
    card_origin: Path | None = None,
) -> CommitInfo:
    """Scans files and pushes them in one commit.

    Files of an earlier push by this library that are not in `files` are deleted in the same commit.

    Args:
        files: Name in the repository -> content, or path of the file.
        repo_id: Full id, `owner/name`.
        private: Whether the repository is private if it is created now.
        token: Access token; the default is `HF_TOKEN` or the token stored by `hf auth login`.
        revision: Branch, which is created if it does not exist; None means `main`.
        allow: Findings of the leak scanner to accept, such as `email:README.md:12`.
        public: Names that may be published even if the user or host has the same name (see `hub_owners`). The owners
            of `repo_id` and of the ids in the report and options are always included.
        message: Commit message.
        repo_type: `"model"` or `"dataset"`.
        known: Returns texts that are public already, such as those of the base (see `scan`).
        merge_card: Puts the card and the one in the repository together, so that its owner's text stays.
        card_origin: The owner's card on this machine, if that in `files` was made from it: findings name its lines.

    Raises:
        UserError: The leak scanner found something, or the Hub refuses the header of the card.
        PushError: The Hub failed, even after retries.
    """
    if "/" not in repo_id:
        raise PushError(f"not pushed: the Hub cannot be reached, so the owner of {repo_id} is not known.")
    manifest = json.dumps({"files": sorted(files)}, indent=2) + "\n"
    files = {**files, MANIFEST: manifest.encode()}
    owners = hub_owners(repo_id, *_values_in(files))
    findings = scan(files, allow, {*public, *owners}, known)
    card = files.get(CARD)
    if isinstance(card, bytes) and card_origin is not None:
        findings = [with_origin(one, card, card_origin) if one.file == CARD else one for one in findings]
    refuse_findings(findings)
    if CARD in files:  # before anything is created or uploaded
        check_header(text_of(files[CARD]), repo_type=repo_type, token=token)
    api = HfApi(token=token)
    target = Target(repo_id, repo_type, private, revision)
    try:
        commit, said = retried(lambda: _commit(api, target, files, message, merge_card))
    except Exception as error:  # huggingface_hub and its HTTP client raise many kinds of errors
        raise PushError(f"not pushed to {repo_id}: {reason_of(error)}.") from error
    for line in said:
        logger.warning("%s", line)
    return commit


def _commit(
    api: HfApi, target: Target, files: Files, message: str, merge_card: MergeCard | None
) -> tuple[CommitInfo, list[str]]:
    """Creates repository and branch if they do not exist, and makes one commit of `files`.

    Returns:
        The commit, and what there is to say about the card.
    """
    _create(api, target)
    if target.revision is not None:
        api.create_branch(**target.repository, branch=target.revision, exist_ok=True)
    head = api.repo_info(**target.repository, revision=target.revision)
    stored = {file.rfilename for file in head.siblings}
    ours = _pushed_earlier(api, target, head.sha, stored)
    said: list[str] = []
    if merge_card is not None:  # in every attempt, since the owner may have edited the card meanwhile
        files, said = _with_merged_card(api, target, files, head.sha, stored, merge_card)
    stale = ours - files.keys()
    # New operations for every attempt: they check again which files have arrived.
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for name, content in sorted(files.items()):
        operations.append(CommitOperationAdd(name, content))
    for name in sorted(stale):
        operations.append(CommitOperationDelete(name))
    # Not `upload_folder`: with hf_xet it splits large uploads into several commits. If another push came in between,
    # the Hub rejects this commit (412, because of `parent_commit`), and it is tried again.
    commit = api.create_commit(
        **target.repository,
        operations=operations,
        commit_message=message,
        revision=target.revision,
        parent_commit=head.sha,
    )
    return commit, said


def _with_merged_card(
    api: HfApi, target: Target, files: Files, commit: str, stored: set[str], merge_card: MergeCard
) -> tuple[Files, list[str]]:
    """Returns the files with the card as it is committed, and what there is to say about it."""
    there = None
    if CARD in stored:
        there = Path(api.hf_hub_download(**target.repository, filename=CARD, revision=commit)).read_bytes()
    card, said = merge_card(files.get(CARD), there)
    files = {name: content for name, content in files.items() if name != CARD}
    return (files if card is None else {**files, CARD: card}), said


def _pushed_earlier(api: HfApi, target: Target, commit: str, stored: set[str]) -> set[str]:
    """Returns the files in the repository that an earlier push by this library created. Other files are kept."""
    if MANIFEST not in stored:
        return set()
    path = api.hf_hub_download(**target.repository, filename=MANIFEST, revision=commit)
    try:
        return stored.intersection(json.loads(Path(path).read_bytes())["files"])
    except (ValueError, TypeError, KeyError):  # somebody changed it, so that nothing is known to be ours
        logger.warning("%s of %s cannot be read, so files of an earlier push stay.", MANIFEST, target.repo_id)
        return set()


def _create(api: HfApi, target: Target) -> RepoUrl:
    url = api.create_repo(**target.repository, private=target.private, exist_ok=True)
    is_private = api.repo_info(**target.repository).private
    if target.private and not is_private:
        logger.warning("%s exists and is public, so everything pushed to it is public.", url.repo_id)
    elif is_private and not target.private:
        logger.warning("%s exists and is private, and stays so: make it public in its settings.", url.repo_id)
    return url


def _values_in(files: Files) -> Iterator[str]:
    """Yields all values in the report, options and adapter configurations of a run, which may be ids on the Hub."""
    for name, content in files.items():
        if not name.endswith(_NAMES_REPOSITORIES):
            continue
        encoded = content if isinstance(content, bytes) else content.read_bytes()
        parse = json.loads if name.endswith(".json") else yaml.safe_load
        with contextlib.suppress(ValueError, yaml.YAMLError):  # a file that cannot be parsed has no ids
            yield from _strings_in(parse(encoded))


def _strings_in(value: Any) -> Iterator[str]:
    """Yields all strings in a JSON or YAML value, without keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings_in(part)


# Retries


def retried(call: Callable[[], T]) -> T:
    """Runs `call()`, and repeats it after temporary failures of the Hub, up to `ATTEMPTS` times in all."""
    for attempt in range(1, ATTEMPTS):
        try:
            return call()
        except Exception as error:
            seconds = _wait(error, attempt)
            if _is_permanent(error) or seconds > _LONGEST_WAIT:
                raise
            logger.warning("push: %s; retry in %d s (%d of %d).", first_line(error), seconds, attempt, ATTEMPTS - 1)
            time.sleep(seconds)
    return call()  # last attempt: the caller handles its error


def _is_permanent(error: BaseException) -> bool:
    status = _status(error)
    if status is None:
        return isinstance(error, _NEVER_TEMPORARY) and not isinstance(error, OSError | json.JSONDecodeError)
    return 400 <= status < 500 and status not in _WORTH_ANOTHER_TRY


def _wait(error: BaseException | None, attempt: int) -> int:
    """Returns the seconds until the next attempt: what the Hub asks for, else twice as long each time."""
    headers = getattr(_response(error), "headers", {})
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1
    asked = headers.get("Retry-After", "")
    if asked.isdigit():
        return int(asked) + 1
    return 2**attempt


def _response(error: BaseException | None) -> Any:
    """Returns the HTTP response that caused an error. None if there is no response."""
    # The client wraps errors of its HTTP library, sometimes twice.
    while error is not None:
        if getattr(error, "response", None) is not None:
            return error.response
        error = error.__cause__
    return None


def _status(error: BaseException) -> int | None:
    return getattr(_response(error), "status_code", None)
