"""A stand-in for the Hub on the loopback interface, with the requests that huggingface_hub's client needs.

It can create repositories, and upload, list and download files. Repositories are in memory. As on the real Hub, binary
files over 1 kB and all safetensors and parquet files are stored in git LFS. A commit is made under a lock, completely
or not at all. `fault` simulates failures.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.repos import File, Refused, Repo

USERS = {  # token -> account, with the organizations that the token can write to
    "hf_alicealicealicealice": {"name": "alice", "orgs": ["acme"]},
    "hf_bobbobbobbobbobbobbob": {"name": "bob", "orgs": []},
}
TYPES = {"models": "", "datasets": "datasets/"}
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|datasets)/{REPO}"


@dataclass
class Fault:
    """A simulated failure, which happens `times` times, after `after` matching requests.

    The response has the status `status`. If that is None, the connection is cut after `read` bytes of the request body
    or, with `done`, after the request was executed.
    """

    status: int | None = None
    match: str = ""
    after: int = 0
    times: int = 1
    headers: dict = field(default_factory=dict)
    read: int | None = None
    done: bool = False


class HubServer:
    """The server, with `start`, `url`, `repos`, `requests` (all requests so far), `fault` and `stop`."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploaded: dict[str, bytes] = {}  # LFS content by sha256, committed or not
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._sockets: set[socket.socket] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def start(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._sockets):  # clients keep them alive, and would wait for them
            cut(connection)

    def fault(self, status: int | None = None, **options) -> None:
        self.faults.append(Fault(status, **options))

    def due(self, line: str) -> Fault | None:
        """Returns the fault for this request, if any."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.match, line):
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def repo(self, name: str, kind: str = "models") -> Repo:
        return self.repos[kind, name]

    def files(self, name: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        return {path: file.data for path, file in self.repo(name, kind).at(revision).files.items()}


def rules():
    """Returns the module with the Hub's rules for names and headers.

    It imports huggingface_hub, which reads its environment, and that may be set after this server has started.
    """
    from tests.hub import headers

    return headers


def cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
    except OSError:
        pass


class Handler(BaseHTTPRequestHandler):
    """Handles one connection. `ROUTES` maps requests to methods."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args):
        pass

    def setup(self):
        super().setup()
        self.hub._sockets.add(self.connection)

    def finish(self):
        self.hub._sockets.discard(self.connection)
        try:
            super().finish()
        except (OSError, ValueError):  # cut on purpose
            pass

    def answer(self):
        url = urlsplit(self.path)
        line = f"{self.command} {url.path}"
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.hub.requests.append(line)
        fault = self.hub.due(line)
        if fault and fault.read is not None:
            self.rfile.read(min(fault.read, int(self.headers.get("Content-Length", 0))))
        if fault and fault.status is None and not fault.done:
            return self.cut()
        self.body = self.read_body()
        try:
            if fault and fault.status:
                raise Refused(fault.status, "fault on demand", headers=fault.headers)
            with self.hub.lock:
                found = self.route(url.path)
        except Refused as refused:
            self.send(refused.status, refused.body, refused.headers)
        else:
            if fault and fault.done:
                return self.cut()
            self.send(200, *found if isinstance(found, tuple) else (found,))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def cut(self):
        self.close_connection = True
        cut(self.connection)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, status: int, content, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = dict(headers or {})
        if status == 200 and self.command in ("GET", "HEAD") and "Accept-Ranges" in headers:
            if asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(asked[1]), int(asked[2] or len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
                status, data = (206, data[first : last + 1]) if first < len(data) else (416, b"")
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
            line = str(value).splitlines()[0] if str(value) else ""
            self.send_header(name, line.encode("latin-1", "replace").decode("latin-1"))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def route(self, path: str):
        for method, pattern, function in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                given = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                return function(self, **given)  # unquoted here, since the name of a branch may contain a quoted slash
        raise Refused(404, f"Not found: {self.command} {path}")

    # Authentication and access

    @property
    def account(self) -> dict | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in USERS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return USERS.get(given)

    def find(self, kind: str, name: str, write: bool = False) -> Repo:
        """Returns the repository. Raises `Refused` if it does not exist, or if the user has no access."""
        repo, account = self.hub.repos.get((kind, name)), self.account
        member = account is not None and repo is not None and repo.owner in (account["name"], *account["orgs"])
        if repo is None or (repo.private and not member):
            raise Refused(404 if account else 401, "Repository not found", "RepoNotFound")
        if write and not member:
            raise Refused(403 if account else 401, "You don't have the rights to write to this repository")
        return repo

    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    # Accounts and repositories

    def whoami(self):
        if self.account is None:
            raise Refused(401, "Invalid username or password.")
        name, orgs = self.account["name"], [{"name": org, "type": "org"} for org in self.account["orgs"]]
        role = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "name": name, "orgs": orgs, "auth": role}

    def create(self):
        asked, account = self.json(), self.account
        if account is None:
            raise Refused(401, "Invalid username or password.")
        owner, kind = asked.get("organization") or account["name"], asked.get("type", "model") + "s"
        if owner not in (account["name"], *account["orgs"]):
            raise Refused(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"')
        name = f"{owner}/{asked['name']}"
        if not rules().is_id(name):
            raise Refused(400, f"Invalid repository name: {name}")
        found = {"url": f"{self.hub.url}/{TYPES[kind]}{name}", "name": name}
        if (kind, name) in self.hub.repos:
            raise Refused(409, body=found | {"error": "You already created this model repo"})
        self.hub.repos[kind, name] = Repo(owner, private=asked.get("visibility") == "private")
        return found

    def delete(self):
        asked, account = self.json(), self.account or {"name": ""}
        kind, name = asked.get("type", "model") + "s", f"{asked.get('organization') or account['name']}/{asked['name']}"
        self.find(kind, name, write=True)
        del self.hub.repos[kind, name]
        return {}

    def info(self, kind, repo, revision="main"):
        found = self.find(kind, repo)
        commit = found.at(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        dates = {"lastModified": commit.date, "createdAt": found.history()[-1].date}
        about = {"id": repo, "author": found.owner, "sha": commit.oid, "private": found.private}
        card = commit.files.get("README.md")
        about |= rules().understood(card.data.decode(errors="replace") if card else "")
        return about | dates | {"siblings": siblings, "downloads": 0, "likes": 0, "gated": False, "disabled": False}

    def refs(self, kind, repo):
        found = self.find(kind, repo)
        named = {"branches": (found.branches, "heads"), "tags": (found.tags, "tags")}
        return {"converts": []} | {
            key: [{"name": name, "ref": f"refs/{ref}/{name}", "targetCommit": oid} for name, oid in refs.items()]
            for key, (refs, ref) in named.items()
        }

    def branch(self, kind, repo, branch):
        found = self.find(kind, repo, write=True)
        if branch in found.branches:
            raise Refused(409, "Reference already exists")
        found.branches[branch] = found.at(self.json().get("startingPoint") or "main").oid
        return {}

    def tag(self, kind, repo, revision):
        found = self.find(kind, repo, write=True)
        found.tags[self.json()["tag"]] = found.at(revision).oid
        return {}

    def commits(self, kind, repo, revision):
        history = self.find(kind, repo).history(revision)
        return [{"id": c.oid, "title": c.title, "message": "", "date": c.date, "authors": []} for c in history]

    # Files

    def tree(self, kind, repo, revision, path=""):
        files = self.find(kind, repo).at(revision).files
        inside = {name: file for name, file in files.items() if not path or name.startswith(f"{path}/")}
        if path and not inside:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        recursive, depth = self.query.get("recursive", "").lower() == "true", path.count("/") + 1 if path else 0
        found, folders = [], set()
        for name, file in sorted(inside.items()):
            parts = name.split("/")
            folders |= {"/".join(parts[:k]) for k in range(depth + 1, len(parts) if recursive else depth + 2)} - {name}
            found += [file.entry(name)] if recursive or len(parts) == depth + 1 else []
        return found + [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]

    def paths_info(self, kind, repo, revision):
        files = self.find(kind, repo).at(revision).files
        asked = self.json() if self.body.startswith(b"{") else parse_qs(self.body.decode())
        found = [files[path].entry(path) for path in asked["paths"] if path in files]
        folders = {path for path in asked["paths"] if any(name.startswith(f"{path}/") for name in files)}
        return found + [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]

    def resolve(self, repo, revision, path, kind="models"):
        commit = self.find(kind, repo).at(revision)
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.oid})
        file = commit.files[path]
        etag = f'"{file.sha256 if file.lfs else file.blob}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        linked = {"X-Linked-Etag": etag, "X-Linked-Size": len(file.data)} if file.lfs else {}
        return file.data, {"Content-Type": "application/octet-stream"} | headers | linked

    def preupload(self, kind, repo, revision):
        files, answer = self.find(kind, repo, write=True).at(revision).files, []
        for asked in self.json()["files"]:
            path, old = asked["path"], files.get(asked["path"])
            binary = b"\0" in base64.b64decode(asked["sample"]) and asked["size"] > 1000
            lfs = binary or path.endswith((".safetensors", ".parquet", ".bin", ".pt"))
            oid = None if old is None else old.sha256 if old.lfs else old.blob
            mode = "lfs" if lfs else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def lfs_batch(self, repo, kind="models"):
        self.find(kind, repo, write=True)
        objects = []
        for asked in self.json()["objects"]:
            known = asked["oid"] in self.hub.uploaded
            actions = {name: {"href": f"{self.hub.url}/lfs/{name}/{asked['oid']}"} for name in ("upload", "verify")}
            objects.append(asked | ({} if known else {"actions": actions}))
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "content does not match its sha256")
        self.hub.uploaded[oid] = self.body
        return {}

    def lfs_verify(self, oid):
        if len(self.hub.uploaded.get(oid, b"")) != self.json()["size"]:
            raise Refused(404, "not uploaded")
        return {}

    def commit(self, kind, repo, revision):
        found = self.find(kind, repo, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, head = lines[0]["value"], found.at(revision)
        if revision not in found.branches:
            raise Refused(400, "only branches take commits")
        if header.get("parentCommit", head.oid) != head.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            self.check_card(line)
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.uploaded:
                    raise Refused(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = File(self.hub.uploaded[value["oid"]], lfs=True)
            elif key in ("deletedFile", "deletedFolder"):
                gone = [n for n in files if n == value["path"] or n.startswith(value["path"].rstrip("/") + "/")]
                files = {name: file for name, file in files.items() if name not in gone}
        made = found.commit(header["summary"], files, head.oid)
        found.branches[revision] = made.oid
        return {"commitUrl": f"{self.hub.url}/{TYPES[kind]}{repo}/commit/{made.oid}", "commitOid": made.oid}

    def check_card(self, line: dict) -> None:
        """Refuses a commit whose README.md has a header that the Hub does not accept."""
        if line["key"] == "file" and line["value"]["path"] == "README.md":
            errors, _ = rules().errors_in(base64.b64decode(line["value"]["content"]).decode())
            if errors:
                raise Refused(400, "\n".join(errors))

    def validate_yaml(self):
        errors, warnings = rules().errors_in(self.json()["content"])
        answer = {
            "errors": [{"message": text} for text in errors],
            "warnings": [{"message": text} for text in warnings],
        }
        if errors:
            raise Refused(400, body=answer)
        return answer


ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("DELETE", r"/api/repos/delete", Handler.delete),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", API, Handler.info),
    ("GET", rf"{API}/revision/(?P<revision>.+)", Handler.info),
    ("GET", rf"{API}/refs", Handler.refs),
    ("POST", rf"{API}/branch/(?P<branch>.+)", Handler.branch),
    ("POST", rf"{API}/tag/(?P<revision>.+)", Handler.tag),
    ("GET", rf"{API}/commits/(?P<revision>.+)", Handler.commits),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", Handler.tree),
    ("POST", rf"{API}/paths-info/(?P<revision>.+)", Handler.paths_info),
    ("POST", rf"{API}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"{API}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/(?P<kind>datasets)/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/upload/(?P<oid>\w+)", Handler.lfs_upload),
    ("POST", r"/lfs/verify/(?P<oid>\w+)", Handler.lfs_verify),
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    (("GET", "HEAD"), rf"/(?P<kind>datasets)/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
