"""A Hub in this process: models with commits and branches, behind the HTTP endpoints that `huggingface_hub` calls."""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import yaml


USER, TOKEN = "reader", "hf_a_token_for_tests"


@dataclass
class Repository:
    """Each commit holds all files by their names; each branch names a commit."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        listed = sorted((name, hashlib.sha256(content).hexdigest()) for name, content in files.items())
        sha = hashlib.sha1(json.dumps([len(self.commits), listed]).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Missing("RevisionNotFound")
        return sha


class Missing(Exception):
    """404, with what the Hub calls it in a header, and the commit that lacks a file."""


@dataclass
class Hub:
    """Models by their ids, and the large files uploaded, by their sha256."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, files: Mapping[str, bytes] | Path) -> str:
        """Makes a model of these files, or of those in a folder, and returns the commit."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        self.repositories[name] = Repository()
        return self.repositories[name].commit("main", dict(files))

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise Missing("RepoNotFound")
        return self.repositories[name]

    def whoami(self, body: bytes):
        return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}

    def create(self, body: bytes):
        name = f"{USER}/{json.loads(body)['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.repositories[name] = Repository()
        self.repositories[name].commit("main", {})
        return {"url": f"{self.url}/{name}"}

    def validate_yaml(self, body: bytes):
        metadata = yaml.safe_load(json.loads(body)["content"].split("---")[1])
        errors = [] if isinstance(metadata, dict) else [{"message": "metadata must be a mapping"}]
        return (400 if errors else 200), {"errors": errors, "warnings": []}

    def preupload(self, body: bytes, name: str, revision: str):
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def lfs_batch(self, body: bytes, name: str):
        objects = [
            {**file, "actions": {"upload": {"href": f"{self.url}/uploads/{file['oid']}"}}}
            for file in json.loads(body)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def upload(self, body: bytes, oid: str):
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "not the content announced"}
        self.uploads[oid] = body
        return {}

    def branch(self, body: bytes, name: str, branch: str):
        repository = self.repository(name)
        if branch in repository.branches:
            return 409, {"error": "Reference already exists"}
        repository.branches[branch] = repository.branches["main"]
        return {}

    def commit(self, body: bytes, name: str, branch: str):
        repository = self.repository(name)
        files = dict(repository.commits[repository.resolve(branch)])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.uploads[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(branch, files)
        return {"commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha}

    def info(self, body: bytes, name: str, revision: str = "main"):
        sha = self.repository(name).resolve(revision)
        files = [{"rfilename": file} for file in self.repository(name).commits[sha]]
        return {"id": name, "sha": sha, "private": False, "tags": [], "downloads": 0, "likes": 0, "siblings": files}

    def tree(self, body: bytes, name: str, revision: str):
        repository = self.repository(name)
        return [
            {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for file, content in repository.commits[repository.resolve(revision)].items()
        ]

    def resolve(self, body: bytes, name: str, revision: str, file: str):
        repository = self.repository(name)
        sha = repository.resolve(revision)
        content = repository.commits[sha].get(file)
        if content is None:
            raise Missing("EntryNotFound", sha)
        return 200, content, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}


MODEL = "([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", "/api/whoami-v2", Hub.whoami),
    ("POST", "/api/repos/create", Hub.create),
    ("POST", "/api/validate-yaml", Hub.validate_yaml),
    ("POST", f"/api/models/{MODEL}/preupload/([^/]+)", Hub.preupload),
    ("POST", f"/{MODEL}\\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("PUT", "/uploads/(.+)", Hub.upload),
    ("POST", f"/api/models/{MODEL}/branch/(.+)", Hub.branch),
    ("POST", f"/api/models/{MODEL}/commit/([^/]+)", Hub.commit),
    ("GET", f"/api/models/{MODEL}", Hub.info),
    ("GET", f"/api/models/{MODEL}/revision/([^/]+)", Hub.info),
    ("GET", f"/api/models/{MODEL}/tree/([^/]+)", Hub.tree),
    ("GET", f"/{MODEL}/resolve/([^/]+)/(.+)", Hub.resolve),
]
WRITES = (Hub.create, Hub.lfs_batch, Hub.preupload, Hub.branch, Hub.commit)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def handle_request(self):
        body = self.read_body()
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        answer, found = next(
            (
                (answer, found)
                for route_method, pattern, answer in ROUTES
                if route_method == method and (found := re.fullmatch(pattern, path))
            ),
            (None, None),
        )
        if found is None:
            self.send(404, {"error": f"This Hub knows no {method} {path}"}, {})
            return
        if answer in WRITES and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(401, {"error": "Invalid credentials"}, {})
            return
        try:
            result = answer(self.hub, body, *map(unquote, found.groups()))
        except Missing as missing:
            self.send(404, {"error": missing.args[0]}, dict(zip(("X-Error-Code", "X-Repo-Commit"), missing.args)))
            return
        status, content, *headers = result if isinstance(result, tuple) else (200, result)
        self.send(status, content, *headers or [{}])

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionResetError("The sender has gone.")
            return body
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, status: int, content, headers: dict[str, str]):
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {**headers, "Content-Type": "application/json"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A Hub that lives as long as the block; set `HF_ENDPOINT` to its `url` and `HF_TOKEN` to `TOKEN`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
