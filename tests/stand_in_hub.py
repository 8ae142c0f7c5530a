"""A stand-in for the Hugging Face hub: as much of its HTTP interface as models need."""

import hashlib
import json
import re
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import yaml

TOKEN = "hf_standin"
LARGE = (".safetensors", ".png")
NAME = r"(?P<name>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    """A model on the stand-in."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        """A commit that changes with the content."""
        content = repr(sorted(self.files.items())).encode()
        return hashlib.sha1(content).hexdigest()


class Hub(ThreadingHTTPServer):
    """Repositories by name, and the requests that were made."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: dict[str, int] = {}  # part of a path => the answer that it gets

    @property
    def address(self) -> str:
        """The HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, cache: object, token: str = TOKEN) -> dict[str, str]:
        """Return the variables of a process that takes this for the hub."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(cache),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
        }


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Find the route of a request."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(iter(self.chunk, b""))
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, _, _ = self.path.partition("?")
        self.server.requests.append(f"{self.command} {path}")
        for part, code in self.server.broken.items():
            if part in path:
                return self.send({"error": "broken on purpose"}, code)
        for command, pattern, method in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in command.split():
                return method(self, **found.groupdict())
        return self.send({"error": f"no route {self.command} {path}"}, 404)

    def chunk(self) -> bytes:
        """Read one chunk of a body whose length was not stated."""
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    def send(self, content: Any, code: int = 200, **headers: str) -> None:
        """Send JSON, or bytes as they are."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def may_write(self) -> bool:
        """Whether the request has the token; it is refused if not."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.send({"error": "Invalid username or password."}, 401)
        return False

    def repository(self, name: str) -> Repository | None:
        """Return a repository that the request may see; it is refused if there is none."""
        found = self.server.repositories.get(name)
        if found and (not found.private or self.headers.get("Authorization") == f"Bearer {TOKEN}"):
            return found
        self.send({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return None

    def validate(self) -> None:
        """Check the header of a card."""
        header = json.loads(self.body)["content"].split("---\n")[1]
        self.send({"errors": [], "warnings": [], "read": yaml.safe_load(header)})

    def create(self) -> None:
        """Make a repository."""
        if not self.may_write():
            return
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        is_new = name not in self.server.repositories
        if is_new:
            self.server.repositories[name] = Repository(asked.get("visibility") == "private")
        self.send({"url": f"{self.server.address}/{name}"}, 200 if is_new else 409)

    def info(self, name: str) -> None:
        """Describe a repository."""
        if found := self.repository(name):
            self.send({"id": name, "sha": found.sha, "private": found.private, "siblings": []})

    def preupload(self, name: str) -> None:
        """Say which files are large."""
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs"
                if file["path"].endswith((".safetensors", ".png"))
                else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        if self.may_write():
            self.send({"files": files})

    def batch(self, name: str) -> None:
        """Say where large files go."""
        objects = [
            {**asked, "actions": {"upload": {"href": f"{self.server.address}/lfs/{asked['oid']}"}}}
            for asked in json.loads(self.body)["objects"]
        ]
        if self.may_write():
            self.send({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        """Take a large file."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.send({"error": "another digest"}, 400)
        self.server.objects[oid] = self.body
        return self.send({})

    def commit(self, name: str) -> None:
        """Add files."""
        if not self.may_write():
            return
        found = self.server.repositories[name]
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                found.files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found.files[value["path"]] = self.server.objects[value["oid"]]
        url = f"{self.server.address}/{name}/commit/{found.sha}"
        self.send({"success": True, "commitOid": found.sha, "commitUrl": url, "hookOutput": ""})

    def tree(self, name: str) -> None:
        """List the files."""
        if found := self.repository(name):
            rows = [
                {"type": "file", "path": path, "size": len(content), "oid": etag_of(content)}
                for path, content in found.files.items()
            ]
            self.send(rows)

    def resolve(self, name: str, path: str) -> None:
        """Send a file."""
        if not (found := self.repository(name)):
            return None
        if path not in found.files:
            return self.send({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        content = found.files[path]
        return self.send(content, ETag=f'"{etag_of(content)}"', X_Repo_Commit=found.sha)


def etag_of(content: bytes) -> str:
    """Return the digest that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ROUTES = [
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", "/api/repos/create", Handler.create),
    ("GET", f"/api/models/{NAME}(?:/revision/\\w+)?", Handler.info),
    ("POST", f"/api/models/{NAME}/preupload/main", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/main", Handler.commit),
    ("GET", f"/api/models/{NAME}/tree/\\w+", Handler.tree),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(?P<oid>\w{64})", Handler.store),
    ("HEAD GET", f"/{NAME}/resolve/\\w+/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def stand_in_hub() -> Iterator[Hub]:
    """Run a stand-in on a free port of the loopback."""
    with Hub() as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
