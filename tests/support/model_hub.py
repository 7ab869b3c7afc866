"""A model hub on the loopback interface: the endpoints that huggingface_hub asks for model and dataset files, with a real hub's refusals.

Imitated from the Hub's HTTP behaviour: `/api/models/ID/revision/REV`, `/api/models/ID/tree/REV`, `/ID/resolve/REV/FILE`, for datasets
`/api/datasets/...` and `/datasets/ID/resolve/...`, the headers X-Repo-Commit, X-Linked-Etag and X-Error-Code, ranges, and 401 and 403
for gated repositories.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

LARGE = 4096  # files of this many bytes and more are listed by SHA-256, as Git LFS does; smaller ones by git blob id


@dataclass
class Repository:
    """`revisions` maps branch or tag names to commits; `commits` maps a commit to its files' bytes."""

    revisions: dict[str, str]
    commits: dict[str, dict[str, bytes]]
    gated: bool = False
    private: bool = False
    card: dict[str, object] | None = None  # what the hub reads at the top of a dataset's README.md


@dataclass
class ModelHub:
    """Serves `repositories` of models and `datasets` at `url` while it is entered. `readers` holds the tokens that may read gated and
    private ones, `tokens` those that exist at all.

    `cut` makes the hub close the connection after that many bytes of a large file, `cuts` times. `altered` names files that are served
    with other bytes than listed, `vanished` files that are listed and refused. `requests` records (method, path, Range header, token).
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    datasets: dict[str, Repository] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    readers: set[str] = field(default_factory=set)
    cut: int = 0
    cuts: int = 0
    altered: set[str] = field(default_factory=set)
    vanished: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)

    def __enter__(self) -> ModelHub:
        hub = self

        class Handler(_Handler):
            served = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: ModelHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.served.requests.append((self.command, path, self.headers.get("Range"), bearer))
        try:
            if bearer and bearer not in self.served.tokens:
                raise _Refused(401, message="Invalid credentials in Authorization header")
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]  # a revision may hold a quoted slash
            repositories = self.served.datasets if "datasets" in parts[: 2 if parts[0] == "api" else 1] else self.served.repositories
            if parts[0] == "api":
                owner, name, kind, revision = parts[2:6]
                self._send_json(self._listing(repositories, f"{owner}/{name}", kind, revision, bearer))
            else:
                owner, name, _, revision, *file = parts[1:] if repositories is self.served.datasets else parts
                self._send_file(repositories, f"{owner}/{name}", revision, "/".join(file), bearer)
        except _Refused as refused:
            self.send_response(refused.status)
            if refused.code:
                self.send_header("X-Error-Code", refused.code)
            self.send_header("X-Error-Message", refused.message)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _files(
        self, repositories: dict[str, Repository], hub_id: str, revision: str, bearer: str | None, *, contents: bool
    ) -> tuple[Repository, str, dict[str, bytes]]:
        repository = repositories.get(hub_id)
        if repository is None or (repository.private and bearer not in self.served.readers):
            raise _Refused(404 if bearer else 401, "RepoNotFound", "Repository not found")
        if contents and repository.gated and bearer not in self.served.readers:
            raise _Refused(403 if bearer else 401, "GatedRepo", f"Access to model {hub_id} is restricted.")
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit, repository.commits[commit]

    def _listing(self, repositories: dict[str, Repository], hub_id: str, kind: str, revision: str, bearer: str | None) -> object:
        repository, commit, files = self._files(repositories, hub_id, revision, bearer, contents=kind == "tree")
        if kind == "tree":
            return [
                {"type": "file", "path": file, "size": len(data), "oid": _git_id(data), **_lfs(data, "oid")} for file, data in files.items()
            ]
        siblings = [{"rfilename": file, "size": len(data), "blobId": _git_id(data), **_lfs(data, "sha256")} for file, data in files.items()]
        gated = "manual" if repository.gated else False
        card = {"cardData": repository.card} if repository.card else {}
        return {"id": hub_id, "sha": commit, "siblings": siblings, "gated": gated, "private": repository.private, "tags": [], **card}

    def _send_json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, repositories: dict[str, Repository], hub_id: str, revision: str, file: str, bearer: str | None) -> None:
        _, commit, files = self._files(repositories, hub_id, revision, bearer, contents=True)
        if file not in files or file in self.served.vanished:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        data = files[file]
        etag = hashlib.sha256(data).hexdigest() if len(data) >= LARGE else _git_id(data)
        if file in self.served.altered:
            data = data[:-1] + bytes([data[-1] ^ 1])
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        body = data[start:]
        if self.served.cuts and len(data) >= LARGE and len(body) > self.served.cut:
            self.served.cuts -= 1
            self.wfile.write(body[: self.served.cut])
            self.close_connection = True
            return
        self.wfile.write(body)


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _lfs(data: bytes, digest_name: str) -> dict[str, object]:
    if len(data) < LARGE:
        return {}
    return {"lfs": {digest_name: hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
