"""Pushes a finished run: what others need, in one commit, and nothing that runs code or names this machine.

python -m hf_rlhf_ext.hub.push runs/ppo --repo alice/polite-policy
"""

import argparse
import contextlib
import hashlib
import json
import logging
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers

from ..errors import UserError
from .card import EMBEDDED_BASES, card_from_report
from .privacy import hub_owners
from .scan import PICKLES, refuse_findings, scan

logger = logging.getLogger(__name__)
T = TypeVar("T")

LEFT_OUT = (*PICKLES, "checkpoint-*", "events.out.tfevents*", "runs", "wandb", "trackio", "merged", "ref", "ppo_*")
"""Names of files and folders that are never pushed: pickles and what only a resumed run needs."""
_LEFT_OUT_TOO = (".*", "_*", "*.tmp", "*.lock", "hf_rlhf_ext.json", "trainer_state.json", "pushed.json")
PUSHED_FILE = "pushed.json"
"""What `push_run` leaves in the folder: where it went, for the cards of what is made from it."""
MANIFEST = ".hf_rlhf_ext.json"
"""What a push leaves in the repository: the names of its files; the next push removes those that it does not have."""
_ATTEMPTS = 4
_LONGEST_WAIT = 300  # seconds; a Hub that asks for more is for later: a rented machine would wait
_LOCAL_MARKS = ("is_local", "local_files_only", "_commit_hash")
_BASE_KEYS = ("base_model_name_or_path", "base_model", "name_or_path", "_name_or_path")


class PushError(UserError):
    """The Hub did not take it: nothing has changed there, everything is still here."""


def push_run(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    allow: Iterable[str] = (),
    merge: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    message: str = "Upload of a finished run",
) -> str:
    """Pushes the folder of a run (adapters, heads, normalisation, tokenizer, options, report, plots, card).

    One commit, so that nobody ever sees half a model; what an interrupted push has uploaded is not sent again.

    Args:
        folder: what a recipe left, or `trainer.save_model` with a card beside it.
        repo_id: `owner/name`, or a name of your own; default is the folder's name.
        private: of a repository that is made now; one that exists stays as it is.
        token: default is `HF_TOKEN`, or what `hf auth login` stored.
        revision: branch, made where it does not exist.
        allow: findings of the leak scanner to let pass, each as it was reported (`email:README.md:12`).
        merge: "bfloat16", "float16" or "float32" pushes one plain model in that dtype, the adapter merged into an
            unquantised reload of its base.
        base_model: Hub id of the base, where the run had it in a local folder.
        license: of the model (`apache-2.0`); default is what the base's card on the Hub says.
        message: of the commit.

    Returns:
        The commit's URL.

    Raises:
        UserError: a leak, no right to write there, a base that nobody else has, in one line.
        PushError: the Hub failed, after retries; the line has the command that pushes later.
    """
    folder, allow = Path(folder), list(allow)
    if not folder.is_dir():
        raise UserError(f"push: no folder {folder}: give the output_dir of a finished run.")
    repo_id = repo_id or folder.resolve().name
    target: dict[str, Any] = {"private": private, "revision": revision, "allow": allow}
    about = {"base_model": base_model, "license": license}
    later = later_command(folder, repo_id, **target, merge=merge, **about)
    repo_id, digest = check_access(repo_id, token), content_digest(folder)
    with tempfile.TemporaryDirectory() as scratch:
        source = folder
        if merge is not None:
            from .merge import merge_run  # loads torch

            source = merge_run(folder, Path(scratch) / folder.resolve().name, dtype=merge, base_model=base_model)
        files = run_files(source, repo_id, **about, token=token)
        try:
            commit = push_files(files, repo_id, token=token, message=message, **target)
        except PushError as error:
            raise PushError(f"{error} It is kept in {folder}; later: {later}") from error
    if merge is None:
        known = {"repo_id": commit.repo_url.repo_id, "commit": commit.oid, "weights": digest}
        (folder / PUSHED_FILE).write_text(json.dumps(known) + "\n", encoding="utf-8")
    return commit.commit_url


def push_files(
    files: dict[str, Path | bytes],
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
    """
    if "/" not in repo_id:
        raise PushError(f"not pushed: the Hub cannot be reached, so it is not known whose {repo_id} would be.")
    files = files | {MANIFEST: (json.dumps({"files": sorted(files)}, indent=2) + "\n").encode()}
    refuse_findings(scan(files, allow, {*public, *hub_owners(repo_id, *_named(files))}))
    api = HfApi(token=token)
    kind: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type}

    def push() -> CommitInfo:
        _create(api, private, **kind)
        if revision is not None:
            api.create_branch(**kind, branch=revision, exist_ok=True)
        head = api.repo_info(**kind, revision=revision)
        there, stale = {file.rfilename for file in head.siblings}, set()
        if MANIFEST in there:
            manifest = api.hf_hub_download(**kind, filename=MANIFEST, revision=head.sha)
            stale = (there & set(json.loads(Path(manifest).read_bytes())["files"])) - files.keys()
        # Made anew for every attempt: they ask again what has arrived, also of a commit whose answer was lost.
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        operations += map(CommitOperationDelete, sorted(stale))
        # Not upload_folder: with hf_xet it splits what is large into several commits. Refused (412), and made again,
        # where another push came between.
        options = {"commit_message": message, "revision": revision, "parent_commit": head.sha}
        return api.create_commit(**kind, operations=operations, **options)

    try:
        return _retried(push)
    except Exception as error:  # whatever huggingface_hub and its HTTP client make of a failure
        raise PushError(f"not pushed to {repo_id}: {_line(error)}.") from error


def run_files(
    folder: Path,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    token: str | None = None,
) -> dict[str, Path | bytes]:
    """What is pushed of a run's folder: name in the repository, and content where it differs from the file's."""
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(fnmatch(part, p) for part in name.parts for p in LEFT_OUT + _LEFT_OUT_TOO):
            named = path.name.endswith(("config.json", "reward_normalization.json"))
            files[name.as_posix()] = _public_json(path, base_model) if named else path
    if not any(name.endswith((".safetensors", "ensemble.json")) for name in files):
        raise UserError(f"push: {folder} holds no weights (*.safetensors): give the output_dir of a finished run.")
    if (readme := folder / "README.md").is_file() and "<!-- Provide" in readme.read_text(encoding="utf-8"):
        files.pop("README.md", None)  # PEFT's empty form, which names local folders
    if "report.json" in files:
        report = _read_json(folder / "report.json")
        changes = {"repo_id": repo_id} | ({"base_model": base_model} if base_model else {})
        try:
            if "card" in report:
                found = license or _license_of(base_model or report["card"].get("base_model", ""), token)
                files["README.md"] = card_from_report(report | {"license": found}, **changes).encode()
        except Exception as error:  # a report of another version, or one that somebody wrote
            raise UserError(f"push: no card can be made of {folder / 'report.json'}: {_line(error)}.") from error
    return files


def content_digest(path: Path, suffixes: tuple[str, ...] = (".safetensors",)) -> str:
    """Beginning of a sha256 over a file, or over a folder's files of such names, but for checkpoints."""
    digest = hashlib.sha256()
    for part in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in suffixes):
        if not any(folder.startswith(("checkpoint-", ".")) for folder in part.relative_to(path).parts):
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest() if part != path else file.read())
    return digest.hexdigest()[:16]


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
        logger.warning("push_to_hub: the Hub cannot be reached now (%s).", _line(error))
        return repo_id
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError("push_to_hub: this token may only read: make one with the right to write.")
    owner, _, name = repo_id.rpartition("/")
    mine = [account["name"], *(org["name"] for org in account.get("orgs", ()))]
    if owner and owner not in mine:
        raise UserError(f"push_to_hub: {repo_id} is not yours to write: you are {mine[0]}, in {mine[1:] or 'no one'}.")
    return f"{owner or mine[0]}/{name}"


def create_private_repo(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Makes the repository unless it exists, private unless `private` is False; returns its full id."""
    repo_id = check_access(repo_id, token)
    try:
        return _create(HfApi(token=token), private is not False, repo_id=repo_id, repo_type="model").repo_id
    except Exception as error:
        if _status(error) in (401, 402, 403):
            raise UserError(f"push_to_hub: {repo_id} cannot be made: {_line(error)}") from error
        logger.warning("push_to_hub: %s cannot be made now (%s).", repo_id, _line(error))
        return repo_id


def try_push(folder: str | Path, repo_id: str | None = None, **options: Any) -> str | None:
    """`push_run` for the end of a run, which no failure may spoil: prints one line, returns the URL or None."""
    try:
        url = push_run(folder, repo_id, **options)
    except PushError as error:
        print(f"warning: {error}", file=sys.stderr)
    except Exception as error:
        later = later_command(folder, repo_id, **{k: v for k, v in options.items() if k not in ("token", "message")})
        what = error if isinstance(error, UserError) else f"not pushed ({type(error).__name__}: {_line(error)})."
        print(f"warning: {what} The run is kept in {folder}; later: {later}", file=sys.stderr)
    else:
        print(f"Pushed: {url}")
        return url
    return None


def later_command(
    folder: str | Path, repo_id: str | None, *, private: bool = True, allow: Iterable[str] = (), **given: str | None
) -> str:
    """The command that pushes a folder; `given` are further arguments of `push_run`."""
    words = ["python", "-m", "hf_rlhf_ext.hub.push", str(folder)] + ["--public"] * (not private)
    options = [("repo", repo_id), *given.items(), *(("allow", finding) for finding in allow)]
    return shlex.join(words + [word for name, value in options if value for word in (f"--{name}", value)])


def _create(api: HfApi, private: bool, **kind: Any) -> RepoUrl:
    url = api.create_repo(**kind, private=private, exist_ok=True)
    if private and not api.repo_info(**kind).private:
        logger.warning("%s exists and is public: so is what is pushed to it.", url.repo_id)
    return url


def _public_json(path: Path, base_model: str | None) -> bytes:
    """A configuration without marks of the machine it was saved on, its base under the name that others know."""
    found = _read_json(path)
    for mark in _LOCAL_MARKS:
        found.pop(mark, None)
    for key in _BASE_KEYS:
        name = found.get(key)
        if not isinstance(name, str):
            continue
        if name in EMBEDDED_BASES:
            found[key] = EMBEDDED_BASES[name]
        elif name.startswith((".", "/", "~")) or name.endswith(".gguf") or Path(name).expanduser().exists():
            if base_model is None and key == "base_model_name_or_path":
                raise UserError(
                    f"push: {path.name} names a local base, {name}, which nobody else has: push that first, then give "
                    "its Hub id with --base_model (base_model= in Python)."
                )
            found[key] = base_model
    return (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"push: {path} is no JSON ({_line(error)}): mend or remove it.") from error
    if not isinstance(found, dict):
        raise UserError(f"push: {path} is no JSON object: mend or remove it.")
    return found


def _named(files: Mapping[str, Path | bytes]) -> Iterator[str]:
    """All values of a run's report, options and adapter configurations: ids on the Hub among them."""
    for name, content in files.items():
        if name.endswith(("report.json", "adapter_config.json", "training_config.yaml")):
            data = content if isinstance(content, bytes) else content.read_bytes()
            with contextlib.suppress(ValueError, yaml.YAMLError):  # then it names nothing
                yield from _strings((json.loads if name.endswith(".json") else yaml.safe_load)(data))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _license_of(base_model: str, token: str | None) -> str | None:
    """What the card of the base says, which a derivative inherits; None where there is no such card to be read."""
    if base_model in (*EMBEDDED_BASES, *EMBEDDED_BASES.values()):
        return "apache-2.0"
    try:
        return ModelCard.load(base_model, token=token, ignore_metadata_errors=True).data.license
    except Exception:  # no network, no repository, no card
        return None


def _retried(call: Callable[[], T]) -> T:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            status = _status(error)
            permanent = status is not None and 400 <= status < 500 and status not in (408, 409, 412, 429)
            seconds = _wait(error, attempt)
            if permanent or attempt == _ATTEMPTS or seconds > _LONGEST_WAIT:
                raise
            logger.warning("push: %s; again in %d s (%d of %d).", _line(error), seconds, attempt, _ATTEMPTS - 1)
            time.sleep(seconds)
    raise AssertionError("not reached")


def _wait(error: BaseException | None, attempt: int) -> int:
    """Seconds until the next attempt: what the Hub asks for, else twice as long each time."""
    headers = getattr(_response(error), "headers", {})
    if (limit := parse_ratelimit_headers(headers)) is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1
    asked = headers.get("Retry-After", "")
    return int(asked) + 1 if asked.isdigit() else 2**attempt


def _response(error: BaseException | None) -> Any:
    """The HTTP response at the bottom of an error, None where the connection broke."""
    while error is not None:
        if getattr(error, "response", None) is not None:
            return error.response
        error = error.__cause__
    return None


def _status(error: BaseException) -> int | None:
    return getattr(_response(error), "status_code", None)


def _line(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hf_rlhf_ext.hub.push", description="Pushes a finished run.")
    parser.add_argument("folder", help="output_dir of the run")
    parser.add_argument("--repo", help="owner/name, or a name of your own; default is the folder's name")
    parser.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    parser.add_argument("--revision", help="branch to push to, made where it does not exist")
    parser.add_argument("--base_model", help="Hub id of the base, where the run had it in a local folder")
    parser.add_argument("--license", help="licence of the model; default is the base's, as its card says")
    parser.add_argument("--merge", choices=["bfloat16", "float16", "float32"], help="push one plain, merged model")
    parser.add_argument("--allow", action="append", default=[], metavar="KIND:FILE:LINE", help="let a finding pass")
    args = parser.parse_args(argv)
    options = vars(args)
    folder, repo, public = (options.pop(name) for name in ("folder", "repo", "public"))
    try:
        print(f"Pushed: {push_run(folder, repo, private=not public, **options)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
