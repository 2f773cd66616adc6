"""Pushes a finished run to the Hub in one commit, without files that run code and without local names.

Command line: `hf-rlhf push runs/ppo --repo alice/polite-policy`.
"""

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line, refuse_words
from .asked_card import AskedCard, as_texts
from .base_files import texts_of_base
from .cards.card_parts import text_of
from .cards.owner_text import CardMerge, marked, merged
from .client import PushError, check_access, create_private_repo, push_files
from .report import REPORT_FILE, CardOptions, RunReport
from .reports.folder_report import report_of_folder
from .run_files import LEFT_OUT, PUSHED_FILE, content_digest, run_files
from .visibility import bases_of_adapters, warn_private_base

__all__ = [
    "LEFT_OUT",
    "PUSHED_FILE",
    "PushError",
    "check_access",
    "content_digest",
    "create_private_repo",
    "later_command",
    "public_texts",
    "push_files",
    "push_run",
    "run_files",
    "try_push",
]


NO_CARD = "the recipes write a report and a card; in Python, call hf_rlhf_ext.write_card(folder, …) before the push."
_README = "README.md"


def push_run(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    allow: str | Iterable[str] | None = None,
    merge: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    model_name: str | None = None,
    tags: str | Iterable[str] | None = None,
    datasets: str | Iterable[str] | None = None,
    language: str | list[str] | None = None,
    message: str | None = None,
) -> str:
    """Pushes the folder of a run: adapters, heads, normalization, tokenizer, options, report, plots and card.

    All files are pushed in one commit, so that the repository never has an incomplete model. Files that an interrupted
    push has uploaded are not uploaded again. A leak scanner checks all files first; checkpoints, optimizer states and
    other pickles are never pushed.

    The generated part of the card stands between two comments, which the page does not show. What you write outside of
    them, in the folder or on the Hub, and what you change in the header stays at the next push.

    Args:
        folder: Folder of the run, written by a recipe, by `trainer.save_model` or by `merge_run`.
        repo_id: `owner/name`, or only a name in your own namespace; the default is the name of the folder.
        private: Whether the repository is private if it is created now; None means private. An existing one is not
            changed.
        token: Access token; the default is `HF_TOKEN` or the token stored by `hf auth login`.
        revision: Branch, which is created if it does not exist; None means `main`.
        allow: Findings of the leak scanner to accept, as they were reported, such as `email:README.md:12`.
        merge: No longer supported: use `merge_run`, and push the merged model.
        base_model: Hub id of the base, if the run used a local folder.
        license: License of the model, such as `apache-2.0`; the default is the license in the base's card on the Hub.
        license_name: Name of a license that is `other`.
        license_link: Address of a license that is `other`.
        model_name: Title of the card; the default is the one in `report.json`, which `create_model_card` and
            `push_to_hub` of a trainer record, or else the name of the repository.
        tags: Tag of the repository, or several, in addition to those of the card.
        datasets: Hub id of the training data, or several, in addition to those that the run recorded.
        language: Language of the texts, such as `en`, or several.
        message: Commit message.

    Returns:
        URL of the commit.

    Raises:
        UserError: The leak scanner found something, the token has no write access, the base is only local, or the Hub
            would refuse the name, the license or another value.
        PushError: The Hub failed, even after retries. The message has the command to push later.
    """
    folder = Path(folder)
    if merge is not None:
        raise UserError(_merge_first(folder, merge))
    if not folder.is_dir():
        raise UserError(f"push: no folder {folder}: give the output_dir of a finished run.")
    repo_id = repo_id or folder.resolve().name
    wanted = AskedCard(
        model_name=model_name,
        base_model=base_model,
        language=language,
        license=license,
        license_name=license_name,
        license_link=license_link,
        tags=as_texts("tags", tags),
        datasets=as_texts("datasets", datasets),
    ).checked(token)
    target: dict[str, Any] = {"private": private, "revision": revision, "allow": list(as_texts("allow", allow))}
    later = later_command(folder, repo_id, **target, **_options_of(wanted))
    repo_id = check_access(repo_id, token)
    digest = content_digest(folder)  # before the push, so that it is the digest of what is sent
    files = _files(folder, repo_id, wanted, token=token, revision=revision)  # the card has the full id
    for base in bases_of_adapters(files):
        warn_private_base(base, private, token, repo_id=repo_id)
    earlier = _paragraphs_of_last_push(folder, repo_id, revision)
    merged_card = CardMerge(wanted.header_keys, pushed=earlier)
    more = {"known": public_texts(files, token), "merge_card": merged_card, "token": token}
    more["card_origin"] = folder / _README
    more["message"] = message or "Upload of a finished run"
    try:
        commit = push_files(files, repo_id, **more, **target | {"private": private is not False})
    except PushError as error:
        raise PushError(f"{error} The run is kept in {folder}; later: {later}") from error
    if _README not in files:
        print(f"note: {folder} has no report.json, so the repository has no model card: {NO_CARD}", file=sys.stderr)
    pushed = {"repo_id": commit.repo_url.repo_id, "commit": commit.oid, "weights": digest}
    if revision is not None:
        pushed["revision"] = revision
    if merged_card.paragraphs:
        pushed["owner_text"] = merged_card.paragraphs
    (folder / PUSHED_FILE).write_text(json.dumps(pushed) + "\n", encoding="utf-8")
    return commit.commit_url


def public_texts(files: Mapping[str, Path | bytes], token: str | None) -> Callable[[], Collection[str]] | None:
    """Returns the function that reads the public texts of the base of a run, such as its chat template.

    Args:
        files: Name in the repository -> content, or path of the file.
        token: Access token.

    Returns:
        A function for `push_files`, which calls it only if the scanner found something. None if no base is named.
    """
    base, revision = _base_of(files)
    if base is None:
        return None
    return partial(texts_of_base, base, revision, token)


def _files(
    folder: Path, repo_id: str, wanted: AskedCard, *, token: str | None, revision: str | None
) -> dict[str, Path | bytes]:
    """Returns the files to push. A card that was made for them is put together with the one in the folder."""
    report = None if (folder / REPORT_FILE).is_file() else report_of_folder(folder)
    card = _recorded_card(folder, report)
    changes = {} if card is None else wanted.changes(card)
    changes.pop("base_model", None)  # an argument of its own
    about = {"base_model": wanted.base_model, "license": wanted.license, "token": token, "revision": revision}
    files = run_files(folder, repo_id, **about, report=report, **changes)
    made = files.get(_README)
    if not isinstance(made, bytes):
        _say_unused(wanted, folder, has_card=made is not None)
        return files
    path = folder / _README
    there = text_of(path) if path.is_file() else None
    text, said = merged(marked(made.decode()), there, where=str(folder), asked=wanted.header_keys)
    for line in said:
        print(f"note: {line}", file=sys.stderr)
    return files | {_README: text.encode()}


def _recorded_card(folder: Path, report: RunReport | None) -> CardOptions | None:
    """The card options of a run. None if there are none; `run_files` tells what is wrong with a broken report."""
    if report is not None:
        return report.card
    with contextlib.suppress(Exception):
        return RunReport.load(folder).card
    return None


def _say_unused(wanted: AskedCard, folder: Path, *, has_card: bool) -> None:
    """Says which options have no use, since no card is generated."""
    names = [name for name in wanted.names if name != "base_model"]
    if not names:
        return
    reason = f"{_README} in {folder} is your own text: write it there" if has_card else "there is no card"
    print(f"note: {', '.join(names)}: not used, since {reason}.", file=sys.stderr)


def _paragraphs_of_last_push(folder: Path, repo_id: str, revision: str | None) -> list[str]:
    """Returns `CardMerge.paragraphs` of the last push of a folder, if it went to the same branch."""
    try:
        pushed = json.loads((folder / PUSHED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(pushed, dict) or (pushed.get("repo_id"), pushed.get("revision")) != (repo_id, revision):
        return []
    paragraphs = pushed.get("owner_text")
    return [str(paragraph) for paragraph in paragraphs] if isinstance(paragraphs, list) else []


def _base_of(files: Mapping[str, Path | bytes]) -> tuple[str | None, str | None]:
    """The Hub id and the revision of the base, from the report or from the configuration of an adapter."""
    found: dict[str, Any] = {}
    for name in (REPORT_FILE, "adapter_config.json"):
        content = files.get(name)
        if content is None:
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a broken file has no base
            values = json.loads(content if isinstance(content, bytes) else content.read_bytes())
            card = values.get("card") or {}
            found.setdefault("base", card.get("base_model") or values.get("base_model_name_or_path"))
            found.setdefault("revision", card.get("base_revision") or values.get("revision"))
    return found.get("base"), found.get("revision")


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
    private: bool | None = None,
    revision: str | None = None,
    allow: Iterable[str] = (),
    **card: Any,
) -> str:
    """Returns the command that pushes a folder with these arguments of `push_run`."""
    words = ["hf-rlhf", "push", str(folder)]
    if private is False:
        words.append("--public")
    for name, value in {"repo": repo_id, "revision": revision, **card}.items():
        if not value:
            continue
        words += [f"--{name}", *([value] if isinstance(value, str) else value)]
    allow = list(allow)
    if allow:
        words += ["--allow", *allow]
    return shlex.join(words)


def _options_of(wanted: AskedCard) -> dict[str, Any]:
    """The arguments of `push_run` for what a caller wants in the card."""
    return {spec.name: getattr(wanted, spec.name) for spec in fields(wanted) if spec.name != "data"}


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
    parser.add_argument("--license_name", help="name of a license that is `other`")
    parser.add_argument("--license_link", help="address of a license that is `other`")
    parser.add_argument(
        "--model_name",
        help="title of the card (default: that in report.json, or else the name of the repository)",
    )
    parser.add_argument("--language", help="language of the texts, such as en")
    parser.add_argument("--tags", nargs="+", default=[], metavar="TAG", help="further tags of the repository")
    parser.add_argument("--datasets", nargs="+", default=[], metavar="ID", help="further Hub ids of the training data")
    parser.add_argument("--merge", help=argparse.SUPPRESS)  # accepted only to print the command that merges
    parser.add_argument(
        "--allow",
        nargs="+",
        action="extend",
        default=[],
        type=_finding,
        metavar="KIND:FILE:LINE",
        help="accept findings of the leak scanner, as they were reported",
    )
    return parser


def _finding(word: str) -> str:
    """Checks that a word is not the folder of the run: `--allow` takes all words that follow it."""
    if ":" not in word and Path(word).is_dir():
        raise argparse.ArgumentTypeError(f"{word} is a folder, not a finding: give the folder before --allow.")
    return word


def main(argv: list[str] | None = None) -> None:
    """`hf-rlhf push`; `argv` are the words after it."""
    parser = make_parser()
    parser.error = refuse_words
    try:
        args = parser.parse_args(argv)
        url = push_run(
            args.folder,
            args.repo,
            private=False if args.public else None,
            revision=args.revision,
            base_model=args.base_model,
            license=args.license,
            license_name=args.license_name,
            license_link=args.license_link,
            model_name=args.model_name,
            language=args.language,
            tags=args.tags,
            datasets=args.datasets,
            merge=args.merge,
            allow=args.allow,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"Pushed: {url}")


if __name__ == "__main__":
    main()
