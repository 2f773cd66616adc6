"""Pushes a finished run: what others need, in one commit, and nothing that runs code or names this machine.

hf-rlhf push runs/ppo --repo alice/polite-policy
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError
from .client import PushError, check_access, create_private_repo, first_line, push_files
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
    """Pushes the folder of a run (adapters, heads, normalization, tokenizer, options, report, plots, card).

    One commit, so that nobody ever sees half a model; what an interrupted push has uploaded is not sent again.

    Args:
        folder: what a recipe left, `trainer.save_model` with a card beside it, or what `merge_run` wrote.
        repo_id: `owner/name`, or a name of your own; default is the folder's name.
        private: of a repository that is made now; one that exists stays as it is.
        token: default is `HF_TOKEN`, or what `hf auth login` stored.
        revision: branch, made where it does not exist.
        allow: findings of the leak scanner to let pass, each as it was reported (`email:README.md:12`).
        merge: not supported any more: `merge_run` writes the merged model, which is then pushed.
        base_model: Hub id of the base, where the run had it in a local folder.
        license: of the model (`apache-2.0`); default is what the base's card on the Hub says.
        message: of the commit.

    Returns:
        The commit's URL.

    Raises:
        UserError: a leak, no right to write there, a base that nobody else has, in one line.
        PushError: the Hub failed, after retries; the line has the command that pushes later.
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
    digest = content_digest(folder)  # before the push: of what is sent
    files = run_files(folder, repo_id, **about, token=token)  # the card names the full id
    try:
        commit = push_files(files, repo_id, token=token, message=message, **target)
    except PushError as error:
        raise PushError(f"{error} It is kept in {folder}; later: {later}") from error
    pushed = {"repo_id": commit.repo_url.repo_id, "commit": commit.oid, "weights": digest}
    (folder / PUSHED_FILE).write_text(json.dumps(pushed) + "\n", encoding="utf-8")
    return commit.commit_url


def try_push(folder: str | Path, repo_id: str | None = None, **options: Any) -> str | None:
    """`push_run` for the end of a run, which no failure may spoil: prints one line, returns the URL or None."""
    try:
        url = push_run(folder, repo_id, **options)
    except PushError as error:  # has the command already
        print(f"warning: {error}", file=sys.stderr)
        return None
    except Exception as error:
        if isinstance(error, UserError):
            reason = str(error)
        else:
            reason = f"not pushed ({type(error).__name__}: {first_line(error)})."
        asked = dict(options)
        for name in ("token", "message", "merge"):  # not for a command that is printed
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
    """The command that pushes a folder with these arguments of `push_run`."""
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
    """What to do instead of `merge`, in one line."""
    merged = folder.with_name(f"{folder.name}-merged")
    merge = shlex.join(["hf-rlhf", "merge", str(folder), str(merged), "--dtype", dtype])
    push = shlex.join(["hf-rlhf", "push", str(merged)])
    return f"push: merge is a command of its own: first `{merge}`, then `{push}`."


def main(argv: list[str] | None = None) -> None:
    """`hf-rlhf push`; `argv` are the words after it."""
    parser = argparse.ArgumentParser(prog="hf-rlhf push", description="Pushes a finished run.")
    parser.add_argument("folder", help="output_dir of the run, or of a merge")
    parser.add_argument("--repo", help="owner/name, or a name of your own; default is the folder's name")
    parser.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    parser.add_argument("--revision", help="branch to push to, made where it does not exist")
    parser.add_argument("--base_model", help="Hub id of the base, where the run had it in a local folder")
    parser.add_argument("--license", help="license of the model; default is the base's, as its card says")
    parser.add_argument("--merge", help=argparse.SUPPRESS)  # only to name the command that merges
    parser.add_argument("--allow", action="append", default=[], metavar="KIND:FILE:LINE", help="let a finding pass")
    args = parser.parse_args(argv)
    try:
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
