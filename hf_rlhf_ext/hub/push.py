"""Pushes a finished run to the Hub in one commit, without files that run code and without local names.

Command line: `hf-rlhf push runs/ppo --repo alice/polite-policy`.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line, refuse_words
from .client import PushError, check_access, create_private_repo, push_files
from .run_files import LEFT_OUT, PUSHED_FILE, content_digest, run_files

__all__ = [
    "LEFT_OUT",
    "PUSHED_FILE",
    "PushError",
    "check_access",
    "content_digest",
    "create_private_repo",
    "later_command",
    "push_files",
    "push_run",
    "run_files",
    "try_push",
]


NO_CARD = "the recipes write a report and a card; in Python, call hf_rlhf_ext.write_card(folder, …) before the push."


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
    """Pushes the folder of a run: adapters, heads, normalization, tokenizer, options, report, plots and card.

    All files are pushed in one commit, so that the repository never has an incomplete model. Files that an interrupted
    push has uploaded are not uploaded again. A leak scanner checks all files first; checkpoints, optimizer states and
    other pickles are never pushed.

    Args:
        folder: Folder of the run, written by a recipe, by `trainer.save_model` or by `merge_run`.
        repo_id: `owner/name`, or only a name in your own namespace; the default is the name of the folder.
        private: Whether the repository is private if it is created now. An existing one is not changed.
        token: Access token; the default is `HF_TOKEN` or the token stored by `hf auth login`.
        revision: Branch, which is created if it does not exist; None means `main`.
        allow: Findings of the leak scanner to accept, as they were reported, such as `email:README.md:12`.
        merge: No longer supported: use `merge_run`, and push the merged model.
        base_model: Hub id of the base, if the run used a local folder.
        license: License of the model, such as `apache-2.0`; the default is the license in the base's card on the Hub.
        message: Commit message.

    Returns:
        URL of the commit.

    Raises:
        UserError: The leak scanner found something, the token has no write access, or the base is only local.
        PushError: The Hub failed, even after retries. The message has the command to push later.
    """
    folder = Path(folder)
    allow = list(allow)
    if merge is not None:
        raise UserError(_merge_first(folder, merge))
    if not folder.is_dir():
        raise UserError(f"push: no folder {folder}: give the output_dir of a finished run.")
    repo_id = repo_id or folder.resolve().name
    about: dict[str, Any] = {"base_model": base_model, "license": license}
    target: dict[str, Any] = {"private": private, "revision": revision, "allow": allow}
    later = later_command(folder, repo_id, **target, **about)
    repo_id = check_access(repo_id, token)
    digest = content_digest(folder)  # before the push, so that it is the digest of what is sent
    files = run_files(folder, repo_id, **about, token=token)  # the card has the full id
    try:
        commit = push_files(files, repo_id, token=token, message=message, **target)
    except PushError as error:
        raise PushError(f"{error} The run is kept in {folder}; later: {later}") from error
    if "README.md" not in files:
        print(f"note: {folder} has no report.json, so the repository has no model card: {NO_CARD}", file=sys.stderr)
    pushed = {"repo_id": commit.repo_url.repo_id, "commit": commit.oid, "weights": digest}
    (folder / PUSHED_FILE).write_text(json.dumps(pushed) + "\n", encoding="utf-8")
    return commit.commit_url


def try_push(folder: str | Path, repo_id: str | None = None, **options: Any) -> str | None:
    """Runs `push_run` at the end of a run, without raising. Prints one line, and returns the URL or None."""
    try:
        url = push_run(folder, repo_id, **options)
    except PushError as error:  # its message has the command to push later
        print(f"warning: {error}", file=sys.stderr)
        return None
    except Exception as error:
        if isinstance(error, UserError):
            reason = str(error)
        else:
            reason = f"not pushed ({type(error).__name__}: {first_line(error)})."
        asked = dict(options)
        for name in ("token", "message", "merge"):  # not part of the printed command
            asked.pop(name, None)
        later = later_command(folder, repo_id, **asked)
        print(f"warning: {reason} The run is kept in {folder}; later: {later}", file=sys.stderr)
        return None
    print(f"Pushed: {url}")
    return url


def later_command(
    folder: str | Path,
    repo_id: str | None,
    *,
    private: bool = True,
    revision: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    allow: Iterable[str] = (),
) -> str:
    """Returns the command that pushes a folder with these arguments of `push_run`."""
    words = ["hf-rlhf", "push", str(folder)]
    if not private:
        words.append("--public")
    options = {"repo": repo_id, "revision": revision, "base_model": base_model, "license": license}
    for name, value in options.items():
        if value:
            words += [f"--{name}", value]
    for finding in allow:
        words += ["--allow", finding]
    return shlex.join(words)


def _merge_first(folder: Path, dtype: str) -> str:
    """Returns the message that names the commands to use instead of `merge`."""
    merged = folder.with_name(f"{folder.name}-merged")
    merge = shlex.join(["hf-rlhf", "merge", str(folder), str(merged), "--dtype", dtype])
    push = shlex.join(["hf-rlhf", "push", str(merged)])
    return f"push: merge is a command of its own: first `{merge}`, then `{push}`."


def make_parser() -> argparse.ArgumentParser:
    """The options of `hf-rlhf push`."""
    parser = argparse.ArgumentParser(prog="hf-rlhf push", description="Pushes a finished run to the Hub.")
    parser.add_argument("folder", help="output_dir of the run or of a merge")
    parser.add_argument("--repo", help="owner/name, or a name in your own namespace (default: the name of the folder)")
    parser.add_argument("--public", action="store_true", help="create a public repository (default: private)")
    parser.add_argument("--revision", help="branch to push to, created if it does not exist (default: main)")
    parser.add_argument("--base_model", help="Hub id of the base, if the run used a local folder")
    parser.add_argument("--license", help="license of the model (default: the license in the card of the base)")
    parser.add_argument("--merge", help=argparse.SUPPRESS)  # accepted only to print the command that merges
    parser.add_argument(
        "--allow", action="append", default=[], metavar="KIND:FILE:LINE", help="accept a finding of the leak scanner"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """`hf-rlhf push`; `argv` are the words after it."""
    parser = make_parser()
    parser.error = refuse_words
    try:
        args = parser.parse_args(argv)
        url = push_run(
            args.folder,
            args.repo,
            private=not args.public,
            revision=args.revision,
            base_model=args.base_model,
            license=args.license,
            merge=args.merge,
            allow=args.allow,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"Pushed: {url}")


if __name__ == "__main__":
    main()
