"""Storage of the Hub stand-in: repositories as commits of whole trees, in memory."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime


class Refused(Exception):
    """An error response: status, message, error code of the Hub, additional headers, and optionally a body."""

    def __init__(self, status: int, message: str = "", code: str = "", headers: dict | None = None, body=None):
        self.status, self.body = status, body or {"error": message}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})


@dataclass(frozen=True)
class File:
    """Content of a file, and whether it is stored in LFS."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob(self) -> str:
        """Git id of the content or of the LFS pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        data = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, path: str) -> dict:
        found = {"type": "file", "path": path, "size": len(self.data), "oid": self.blob}
        lfs = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        return found | ({"lfs": lfs} if self.lfs else {})


@dataclass
class Commit:
    """The whole tree at one commit."""

    oid: str
    title: str
    files: dict[str, File]
    parent: str | None
    date: str


class Repo:
    """Branches, tags and commits of one repository."""

    def __init__(self, owner: str, private: bool):
        self.owner, self.private = owner, private
        self.commits: dict[str, Commit] = {}
        self.tags: dict[str, str] = {}
        self.branches: dict[str, str] = {}
        self.branches["main"] = self.commit("initial commit", {".gitattributes": File(b"", False)}, None).oid

    def commit(self, title: str, files: dict[str, File], parent: str | None) -> Commit:
        listing = [(path, file.blob) for path, file in sorted(files.items())]
        oid = hashlib.sha1(repr((title, parent, listing, len(self.commits))).encode()).hexdigest()
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits[oid] = Commit(oid, title, files, parent, date)
        return self.commits[oid]

    def at(self, revision: str) -> Commit:
        revision = revision.removeprefix("refs/heads/")
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, branch: str = "main") -> list[Commit]:
        """Returns the commits, newest first."""
        found, oid = [], self.at(branch).oid
        while oid:
            found.append(self.commits[oid])
            oid = self.commits[oid].parent
        return found
