"""`hf-rlhf check-hub`: tries what this library asks of the Hub, with your token, in private repositories of its own.

The answers are compared with those of the stand-in for the Hub on which this library is tested.
"""

import argparse
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from huggingface_hub import constants

from ..errors import UserError, refuse_words
from .check_parts import Check, OwnRepositories
from .client import check_access
from .refusals import check_repo_name, reason_of

PREFIX = "hf-rlhf-check"

Step = Callable[[OwnRepositories, Path], Iterator[Check]]
"""Tries something in repositories of its own and in a temporary folder."""


def check_hub(
    repo_prefix: str = PREFIX,
    *,
    keep: bool = False,
    token: str | None = None,
    steps: Sequence[Step] | None = None,
    say: Callable[[str], object] = print,
) -> list[Check]:
    """Tries what this library asks of the Hub, and says what it did.

    Private repositories with random names are created in the token's namespace, and deleted at the end, also after an
    error. No other repository is touched.

    Args:
        repo_prefix: Beginning of their names, or `owner/beginning` for an organization.
        keep: Whether to leave the repositories on the Hub.
        token: Access token; the default is `HF_TOKEN` or the token stored by `hf auth login`.
        steps: What to try; the default is everything.
        say: Called with each line.

    Returns:
        All that was tried.

    Raises:
        UserError: There is no token with write access, or the Hub cannot be reached.
    """
    if steps is None:
        from .check_steps import STEPS  # imports torch

        steps = STEPS
    check_repo_name(repo_prefix)
    name = check_access(f"{repo_prefix}-{secrets.token_hex(8)}", token)
    if "/" not in name:
        raise UserError("check-hub: the Hub cannot be reached now: try again later.")
    checks: list[Check] = []
    say(f"Trying {constants.ENDPOINT} in private repositories {name}-…")
    with OwnRepositories(name, token, keep) as own, tempfile.TemporaryDirectory() as scratch:
        for step in steps:
            for check in _tried(step, own, Path(scratch)):
                checks.append(check)
                say(str(check))
        kept = own.urls if keep else []
        for check in () if keep else _deleted(own):
            checks.append(check)
            say(str(check))
    for url in kept:
        say(f"Kept: {url}")
    return checks


def _tried(step: Step, own: OwnRepositories, scratch: Path) -> Iterator[Check]:
    """Yields what a step finds. An error ends the step, and is something that differs."""
    try:
        yield from step(own, scratch)
    except Exception as error:
        yield Check(step.__name__.replace("_", " "), f"failed: {reason_of(error)}", "no error")


def _deleted(own: OwnRepositories) -> Iterator[Check]:
    own.delete()
    found = "all" if not own.left else f"all but {', '.join(repo_id for repo_id, _ in own.left)}"
    yield Check("deletion of the repositories", found, "all")


def make_parser() -> argparse.ArgumentParser:
    """The options of `hf-rlhf check-hub`."""
    parser = argparse.ArgumentParser(
        prog="hf-rlhf check-hub",
        description="Tries pushing, pulling and deleting on the Hub, in private repositories with random names, and "
        "says where the Hub differs from the stand-in on which this library is tested. It uses your token: HF_TOKEN, "
        "or the one that `hf auth login` stored.",
    )
    parser.add_argument(
        "--repo_prefix",
        default=PREFIX,
        help="beginning of the names of the repositories, or owner/beginning for an organization "
        "(default: %(default)s)",
    )
    parser.add_argument("--keep", action="store_true", help="leave the repositories on the Hub")
    return parser


def main(argv: list[str] | None = None) -> None:
    """`hf-rlhf check-hub`; `argv` are the words after it. Exits with 1 if the Hub differs from the stand-in."""
    parser = make_parser()
    parser.error = refuse_words
    try:
        args = parser.parse_args(argv)
        checks = check_hub(args.repo_prefix, keep=args.keep)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    differing = sum(not check.same for check in checks)
    if differing:
        print(f"{differing} of {len(checks)} differ from the stand-in.")
        raise SystemExit(1)
    print(f"All {len(checks)} as on the stand-in.")
