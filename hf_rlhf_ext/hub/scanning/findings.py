"""Findings of the leak scanner, and what to do about them."""

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from ...errors import UserError

REMEDIES = {
    "token": "revoke the token where it was issued, since it was written to a file, and remove it",
    "private-key": "replace the key pair, since the key was written to a file, and remove the key",
    "credential": "change the password or key, since it was written to a file, and remove it",
    "home": "replace the home folder by a relative path or the name of a file",
    "path": "replace the local path by a relative one, the name of a file or an id on the Hub",
    "user": "remove the user name of this machine",
    "host": "remove the host name of this machine",
    "email": "remove the e-mail address, or ask its owner",
    "address": "remove the address of the private network",
    "remote-code": "remove trust_remote_code or auto_map, or others run code that they have not read",
    "code": "leave the file out, or publish it where code is reviewed",
    "pickle": "delete the file; weights are pushed as safetensors",
    "event-file": "delete the file, which names the host",
    "link": "replace the link by a copy of its target",
    "binary": "delete the file, or save it as text, safetensors or a picture",
}
"""Kind of finding -> how to go on."""

SECRET_KINDS = ("token", "private-key", "credential")
_SHOWN = 5  # findings


class Finding(NamedTuple):
    """A finding of the leak scanner.

    Attributes:
        kind: Kind of finding, such as `token`, `path` or `binary`.
        file: Name of the file in the repository.
        line: Line number, from 1. It is 0 for findings on a whole file.
        text: The text that was found; only the first characters of a secret.
        rule: What a secret looks like, such as `Stripe Access Key`. Empty for other kinds.
        origin: Where the text stands on this machine, if `line` counts the lines of a file that a push has made.
    """

    kind: str
    file: str
    line: int
    text: str
    rule: str = ""
    origin: str = ""

    def __str__(self) -> str:
        rule = f"{self.rule}: " if self.rule else ""
        origin = f", {self.origin}" if self.origin else ""
        return f"{self.id} ({rule}{self.text}{origin})"

    @property
    def id(self) -> str:
        """The finding as `allow` takes it."""
        return f"{self.kind}:{self.file}:{self.line}"

    def allowed(self, allow: Collection[str]) -> bool:
        """True if `allow` contains `kind:file:line`, or `kind:file` for the whole file."""
        return f"{self.kind}:{self.file}" in allow or self.id in allow

    @property
    def remedy(self) -> str:
        """How to go on."""
        return REMEDIES[self.kind]


def with_origin(finding: Finding, content: bytes, origin: Path) -> Finding:
    """Returns a finding in a file that a push has made, with the place where its line comes from.

    Args:
        finding: The finding.
        content: What is pushed.
        origin: The file from which parts of it come. It need not exist.
    """
    if not finding.line:
        return finding
    line = _lines(content)[finding.line - 1]
    for number, same in enumerate(_lines(origin.read_bytes()) if origin.is_file() else (), start=1):
        if same == line:
            return finding._replace(origin=f"line {number} of {origin}")
    return finding._replace(origin=f"a line of the {finding.file} that this push makes")


def _lines(content: bytes) -> list[str]:
    return [line.strip() for line in content.decode("utf-8", errors="replace").split("\n")]


def refuse_findings(findings: list[Finding]) -> None:
    """Raises `UserError` with a one-line message if there are findings: where, what to do, how to accept them."""
    if not findings:
        return
    shown = findings[:_SHOWN]
    listed = "; ".join(map(str, shown))
    more = len(findings) - len(shown)
    if more > 0:
        listed += f"; and {more} more"
    remedies = "; ".join(f"{kind}: {REMEDIES[kind]}" for kind in dict.fromkeys(finding.kind for finding in shown))
    raise UserError(
        f"not pushed, this must not be published: {listed}. What to do: {remedies}. What may be published is accepted "
        f"with --allow {_to_allow(findings)} (allow= in Python)."
    )


def _to_allow(findings: Collection[Finding]) -> str:
    """Returns words that accept all findings: each one, or whole files if there are many. Secrets are the last."""
    in_order = sorted(findings, key=lambda finding: finding.kind in SECRET_KINDS)
    if len(findings) > _SHOWN:
        words = [f"{finding.kind}:{finding.file}" for finding in in_order]
    else:
        words = [finding.id for finding in in_order]
    return shlex.join(dict.fromkeys(words))
