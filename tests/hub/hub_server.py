"""A Hugging Face Hub in memory, for end-to-end tests without a network.

It speaks the endpoints that huggingface_hub, transformers and timm use to create repositories, upload folders
(plain files in the commit, or Git LFS) and download files or snapshots. Only models; nothing touches the disk.

Xet is not spoken: with ``upload_mode="regular"`` no client asks for it, and with ``upload_mode="lfs"`` the client
must run with ``HF_HUB_DISABLE_XET=1`` (`HubServer.environment` sets it), because a client that may use Xet has no
fallback to LFS.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

WRITE_TOKEN = "hf_localwritetoken"
READ_TOKEN = "hf_localreadtoken"
USER = "user"
LFS_SUFFIXES = (".safetensors", ".bin")


class HubError(Exception):
    """An answer other than success: HTTP status, the Hub's error code (header X-Error-Code) and its message."""

    def __init__(self, status: int, code: str | None, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool = False

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Fault:
    """Something that goes wrong with the next `times` requests that match.

    Attributes:
        method, path: Of the requests; `path` is a regular expression that is searched in theirs.
        status: Answer with this status and no more.
        headers: Of that answer.
        reset: Close the connection without an answer, after the request has been read and, with `after`, carried out.
        truncate: Close the connection after half of the answer's body.
        first: Called before the request is carried out.
    """

    method: str
    path: str
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    reset: bool = False
    after: bool = False
    truncate: bool = False
    first: Callable[[], object] | None = None


@dataclass
class Repository:
    private: bool
    refs: dict[str, str] = field(default_factory=dict)  # branch or refs/pr/N -> commit id
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)  # commit id -> files

    def commit(self, ref: str, files: dict[str, Blob]) -> str:
        oid = hashlib.sha1(f"{ref} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    @property
    def next_pull_request(self) -> int:
        return 1 + sum(ref.startswith("refs/pr/") for ref in self.refs)

    def resolve(self, revision: str) -> str:
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid


class HubServer:
    """The repositories and the thread that serves them.

    Attributes:
        upload_mode: ``"regular"`` (every file travels in the commit) or ``"lfs"`` (weights go through LFS).
        requests: (method, path) of every request seen, in order.
        faults: What is to go wrong.
        sent: Bytes of bodies sent.
    """

    def __init__(self) -> None:
        self.upload_mode: Literal["regular", "lfs"] = "regular"
        self.repositories: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.sent = 0
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: Path, *, token: str | None = WRITE_TOKEN) -> dict[str, str]:
        """Variables under which a client process talks to this server alone; `home` holds its cache."""
        environment = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1" if self.upload_mode == "lfs" else "0",
            "NO_PROXY": "127.0.0.1",
        }
        return environment | ({"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return {path: blob.data for path, blob in repository.commits[repository.resolve(revision)].items()}

    def add_repository(self, repo_id: str, files: dict[str, bytes], *, private: bool = False) -> None:
        repository = self.repositories[repo_id] = Repository(private)
        repository.commit("main", {path: Blob(data) for path, data in files.items()})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        body = self._read_body()  # always, or a kept connection would take the rest for the next request
        self.hub.requests.append((self.command, url.path))
        self.fault = self._next_fault(url.path)
        if self.fault.reset and not self.fault.after:
            self.close_connection = True
            return
        if self.fault.first is not None:
            self.fault.first()
        try:
            if self.fault.status:
                code = "RepoNotFound" if self.fault.status == 404 else None
                raise HubError(
                    self.fault.status, code, f"failed on purpose, asked with {self.headers['Authorization']}"
                )
            for method, pattern, action in _ROUTES:
                match = re.fullmatch(pattern, url.path)
                if method == self.command and match:
                    with self.hub.lock:
                        action(self, body, **{name: unquote(value) for name, value in match.groupdict().items()})
                    return
            raise HubError(404, None, f"no such endpoint: {url.path}")
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            headers |= self.fault.headers
            self._answer({"error": error.message}, status=error.status, headers=headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def _next_fault(self, path: str) -> Fault:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return Fault("", "")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: object, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json"} | (headers or {})
        if self.fault.after:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            if self.fault.truncate:
                content, self.close_connection = content[: len(content) // 2], True
            self.hub.sent += len(content)
            self.wfile.write(content)

    # Access

    def _require_write(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == READ_TOKEN:
            raise HubError(403, None, "You don't have the rights to write to this repository")
        if token != WRITE_TOKEN:
            raise HubError(401, None, "Invalid username or password.")

    def _repository(self, repo: str) -> Repository:
        repository = self.hub.repositories.get(repo)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repository is None or (repository.private and token not in (READ_TOKEN, WRITE_TOKEN)):
            # As the Hub does: a stranger cannot tell a private repository from a missing one.
            raise HubError(404 if token else 401, "RepoNotFound", "Repository not found")
        return repository

    # Endpoints

    def create(self, body: bytes) -> None:
        self._require_write()
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo}
        if repo in self.hub.repositories:
            return self._answer(answer | {"error": "You already created this model repo"}, status=409)
        self.hub.add_repository(repo, {}, private=wanted.get("visibility") == "private")
        self._answer(answer)

    def whoami(self, body: bytes) -> None:
        self._require_write()
        self._answer({"type": "user", "name": USER, "orgs": [], "auth": {}})

    def validate_yaml(self, body: bytes) -> None:
        self._answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        self._require_write()
        repository = self._repository(repo)
        present = repository.commits[repository.resolve(revision)]
        answers = []
        for entry in json.loads(body)["files"]:
            path = entry["path"]
            lfs = self.hub.upload_mode == "lfs" and path.endswith(LFS_SUFFIXES)
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in present:
                answer["oid"] = present[path].etag
            answers.append(answer)
        self._answer({"files": answers})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        self._require_write()
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs_objects:
                upload = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}", "header": {}}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs-verify"}}
            objects.append(entry)
        self._answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, None, "content does not match its sha256")
        self.hub.lfs_objects[oid] = body
        self._answer(b"")

    def lfs_verify(self, body: bytes) -> None:
        wanted = json.loads(body)
        if len(self.hub.lfs_objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, None, "no such object")
        self._answer({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        self._require_write()
        repository = self._repository(repo)
        files = dict(repository.commits[repository.resolve(revision)])
        for line in filter(None, body.splitlines()):
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header" if value.get("parentCommit") not in (None, repository.resolve(revision)):
                    raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
                case "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]))
                case "lfsFile":
                    files[value["path"]] = Blob(self.hub.lfs_objects[value["oid"]], lfs=True)
                case "deletedFile":
                    del files[value["path"]]
                case "deletedFolder":
                    files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
        answer = {"success": True}
        if self.query.get("create_pr") == ["1"]:
            number = repository.next_pull_request
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{number}"
        oid = repository.commit(revision, files)
        self._answer(answer | {"commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}"})

    def open_pull_request(self, body: bytes, repo: str) -> None:
        """The streaming upload opens its (draft) pull request first, then commits to its reference."""
        self._require_write()
        repository = self._repository(repo)
        number = repository.next_pull_request
        repository.refs[f"refs/pr/{number}"] = repository.resolve("main")
        self._answer({"num": number})

    def pull_request(self, body: bytes, repo: str, number: str) -> None:
        self._repository(repo).resolve(f"refs/pr/{number}")
        self._answer(
            {
                "num": int(number),
                "title": "Upload",
                "status": "draft",
                "isPullRequest": True,
                "author": {"name": USER},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "repo": {"name": repo, "type": "model"},
                "changes": {"base": "refs/heads/main"},
                "filesWithConflicts": [],
                "events": [],
            }
        )

    def model_info(self, body: bytes, repo: str, revision: str = "main") -> None:
        repository = self._repository(repo)
        oid = repository.resolve(revision)
        siblings = [{"rfilename": path, "size": len(blob.data)} for path, blob in repository.commits[oid].items()]
        self._answer({"id": repo, "sha": oid, "siblings": siblings, "private": repository.private, "tags": []})

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        self._require_write()
        repository = self._repository(repo)
        if revision in repository.refs:
            raise HubError(409, None, "Reference already exists")
        repository.refs[revision] = repository.resolve(json.loads(body).get("startingPoint") or "main")
        self._answer({})

    def refs(self, body: bytes, repo: str) -> None:
        repository = self._repository(repo)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": o} for n, o in repository.refs.items()]
        self._answer({"branches": branches, "tags": [], "converts": []})

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        repository = self._repository(repo)
        files = repository.commits[repository.resolve(revision)]
        entries: list[dict] = []
        for path, blob in files.items():
            if folder is None or path.startswith(folder + "/"):
                entry = {"type": "file", "oid": blob.git_oid, "size": len(blob.data), "path": path}
                if blob.lfs:
                    entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}
                entries.append(entry)
        if folder is not None and not entries:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        self._answer(entries)

    def file(self, body: bytes, repo: str, revision: str, path: str) -> None:
        repository = self._repository(repo)
        oid = repository.resolve(revision)
        blob = repository.commits[oid].get(path)
        headers = {"X-Repo-Commit": oid}
        if blob is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._answer({"error": "Entry not found"}, status=404, headers=headers)
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._answer(blob.data, headers=headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(blob.data)), len(blob.data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(blob.data)}"
        self._answer(blob.data[first : last + 1], status=206, headers=headers)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_MODEL = rf"/api/models/{_REPO}"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"{_MODEL}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"{_MODEL}/commit/{_REVISION}", _Handler.commit),
    ("POST", rf"{_MODEL}/branch/{_REVISION}", _Handler.branch),
    ("POST", rf"{_MODEL}/discussions", _Handler.open_pull_request),
    ("GET", rf"{_MODEL}/discussions/(?P<number>[0-9]+)", _Handler.pull_request),
    ("GET", rf"{_MODEL}", _Handler.model_info),
    ("GET", rf"{_MODEL}/revision/{_REVISION}", _Handler.model_info),
    ("GET", rf"{_MODEL}/refs", _Handler.refs),
    ("GET", rf"{_MODEL}/tree/{_REVISION}", _Handler.tree),
    ("GET", rf"{_MODEL}/tree/{_REVISION}/(?P<folder>.+)", _Handler.tree),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("POST", "/lfs-verify", _Handler.lfs_verify),
    ("GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.file),
    ("HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.file),
]


def running_hub() -> Iterator[HubServer]:
    """Body of a pytest fixture: a server, closed at the end."""
    server = HubServer()
    try:
        yield server
    finally:
        server.close()
