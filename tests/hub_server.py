"""A small Hugging Face Hub on this machine: what creating, uploading to and loading from a repository ask of one.

It speaks the HTTP interface that `huggingface_hub` uses with its Xet protocol switched off, and fails on demand. The
files of a repository's branch are `hub.repositories["me/name"].branches["main"]`, bytes by path, or of the main one
`.files`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
READ_TOKEN = "hf_may_only_read"
USER = "me"
LFS_SUFFIXES = (".safetensors", ".png")


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=lambda: ["0" * 40])  # their ids, the newest last

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]

    def at(self, revision: str | None) -> dict[str, bytes]:
        """The files of a branch; a commit is taken for one of the main branch."""
        return self.branches.get(revision, self.files)


class HubServer:
    """Serves on a free port, for as long as it is entered as a context.

    Attributes:
        repositories: by full name; "them/taken" belongs to somebody else.
        requests: method and path of all requests so far.
        fail: given (method, path), returns a status to answer with, 0 to drop the connection, or None to serve.
    """

    def __init__(self) -> None:
        self.repositories = {"them/taken": Repository()}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fail: Callable[[str, str], int | None] = lambda method, path: None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail_once(self, status: int, method: str, pattern: str) -> None:
        """Answer the next request that fits with a status, or drop the connection for status 0."""
        remaining = [status]

        def fail(asked: str, path: str) -> int | None:
            return remaining.pop() if remaining and asked == method and re.search(pattern, path) else None

        self.fail = fail

    def environment(self, home: Any) -> dict[str, str]:
        """Variables by which a process of its own uses this Hub, with a cache of its own, and logged in."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.hub.requests.append((self.command, path))
        status = self.hub.fail(self.command, path)
        if status == 0:
            self.close_connection = True
            self.connection.close()
            return
        if status is not None:
            return self.answer(status, b"<html>Failed on demand</html>", {"Content-Type": "text/html"})
        for method, pattern, serve in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return serve(self, *match.groups())
        self.answer(404, {"error": f"not served here: {self.command} {path}"}, {"X-Error-Code": "EntryNotFound"})

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def may_write(self, namespace: str) -> bool:
        """Answers with a refusal where the token may not write."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_TOKEN):
            self.answer(401, {"error": "Invalid username or password."})
        elif token == READ_TOKEN or namespace != USER:
            message = f"You don't have the rights to write in the namespace {namespace!r}"
            self.answer(403, {"error": message}, {"X-Error-Message": message})
        else:
            return True
        return False

    def repository(self, name: str) -> Repository | None:
        """The repository, if the token may see it; else the answer of the Hub for what is not there."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def create(self) -> None:
        wanted = json.loads(self.body)
        namespace = wanted["organization"] or USER
        name = f"{namespace}/{wanted['name']}"
        if not self.may_write(namespace):
            return
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(name, Repository(private=wanted.get("visibility") == "private"))
        self.answer(status, {"url": f"{self.hub.url}/{name}", "name": name})

    def create_branch(self, name: str, branch: str) -> None:
        repository = self.repository(name)
        if repository is None or not self.may_write(name.split("/")[0]):
            return
        status = 409 if branch in repository.branches else 200
        repository.branches.setdefault(branch, dict(repository.files))
        self.answer(status, {"error": "Reference already exists"} if status == 409 else {})

    def check_write(self, name: str) -> None:
        if self.repository(name) is not None and self.may_write(name.split("/")[0]):
            self.answer(200, {})

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        if "license: nonsense" in content:
            return self.answer(400, {"errors": [{"message": '"license" must be one of [apache-2.0, ...]'}]})
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        repository = self.repository(name)
        if repository is None or not self.may_write(name.split("/")[0]):
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": _oid(repository.at(revision), file["path"]),
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": files})

    def lfs_batch(self, name: str) -> None:
        if not self.may_write(name.split("/")[0]):
            return
        objects = [
            {"oid": file["oid"], "size": file["size"]}
            | (
                {}
                if file["oid"] in self.hub.blobs
                else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{file['oid']}"}}}
            )
            for file in json.loads(self.body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer(400, {"error": "not the bytes that were announced"})
        self.hub.blobs[oid] = self.body
        self.answer(200, {})

    def commit(self, name: str, revision: str) -> None:
        repository = self.repository(name)
        if repository is None or not self.may_write(name.split("/")[0]):
            return
        changes = {}
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                changes[value["path"]] = self.hub.blobs[value["oid"]]
        repository.at(revision).update(changes)
        repository.commits.append(hashlib.sha1(self.body + str(len(repository.commits)).encode()).hexdigest())
        oid = repository.commits[-1]
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def info(self, name: str, revision: str | None) -> None:
        if (repository := self.repository(name)) is not None:
            siblings = [{"rfilename": path} for path in repository.at(revision)]
            content = {"id": name, "private": repository.private, "sha": repository.commits[-1], "siblings": siblings}
            self.answer(200, {**content, "tags": []})

    def tree(self, name: str, revision: str, folder: str | None) -> None:
        if (repository := self.repository(name)) is not None:
            files = repository.at(revision)
            sizes = [(path, len(content)) for path, content in files.items() if path.startswith(folder or "")]
            self.answer(200, [{"type": "file", "path": path, "size": size, "oid": "0"} for path, size in sizes])

    def download(self, name: str, revision: str, path: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        if path not in repository.at(revision):
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        content = repository.at(revision)[path]
        etag = hashlib.sha256(content).hexdigest()
        self.answer(200, content, {"X-Repo-Commit": repository.commits[-1], "ETag": f'"{etag}"'})

    ROUTES = (
        (("POST",), "/api/repos/create", create),
        (("POST",), "/api/validate-yaml", validate_yaml),
        (("POST",), r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", preupload),
        (("POST",), r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", lfs_batch),
        (("PUT",), "/lfs/([0-9a-f]{64})", lfs_upload),
        (("POST",), r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", commit),
        (("POST",), r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", create_branch),
        (("GET",), r"/api/models/([^/]+/[^/]+)/auth-check/write", check_write),
        (("GET",), r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", info),
        (("GET",), r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", tree),
        (("GET", "HEAD"), r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", download),
    )


def _oid(files: dict[str, bytes], path: str) -> str | None:
    """What git would call the file: of its content, or of the pointer to large content its sha256."""
    content = files.get(path)
    if content is None:
        return None
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
