"""A model hub on this machine: the endpoints that huggingface_hub calls to make, fill, list and fetch a repository.

Layout as the Hub's: repositories of commits, branches that name one, large files apart by their SHA-256 (git LFS)."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers
import yaml


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))

    def commit(self, branch: str, changed: dict[str, bytes]) -> str:
        files = self.files(branch) | changed
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


class HubStandIn:
    """`with HubStandIn() as hub:` serves at hub.url. hub.refuse: status that commits are answered with."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.refuse: int | None = None
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> HubStandIn:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()  # stops within 20 ms
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """What huggingface_hub asks in this process is asked here, and what it fetches is kept in `cache`."""
        settings = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": True,  # large files by git LFS
        }
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        # transformers keeps a client with the address of its first call.
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def _answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _dispatch(self) -> None:
        path, body = self.path.split("?")[0], self._body()
        self.hub.requests.append(f"{self.command} {path}")
        for pattern, action in _ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                return action(self, body, *match.groups())
        return self._answer(404, {"error": f"no route {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def _repository(self, name: str) -> Repository | None:
        if name not in self.hub.repositories:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self.hub.repositories.get(name)

    def _create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            return self._answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories[name] = Repository(private)
        return self._answer(200, {"url": f"{self.hub.url}/{name}"})

    def _validate_card(self, body: bytes) -> None:
        """The Hub refuses a README.md whose front matter it cannot read."""
        _, front, _ = json.loads(body)["content"].split("---\n", 2)
        read = isinstance(yaml.safe_load(front), dict)
        self._answer(200 if read else 400, {"errors": [] if read else [{"message": "no metadata"}], "warnings": []})

    def _branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self._repository(name)
        if repository:
            repository.branches.setdefault(branch, repository.branches["main"])
            self._answer(200)

    def _preupload(self, body: bytes, name: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _lfs_batch(self, body: bytes, name: str) -> None:
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _lfs_put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self._answer(200)

    def _commit(self, body: bytes, name: str, branch: str) -> None:
        if self.hub.refuse:
            return self._answer(self.hub.refuse, {"error": "You may not write here"})
        changed = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.hub.large[value["oid"]]
        sha = self.hub.repositories[name].commit(branch, changed)
        return self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def _info(self, body: bytes, name: str, revision: str = "main") -> None:
        repository = self._repository(name)
        if repository and repository.files(revision) is None:
            self._answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        elif repository:
            siblings = [{"rfilename": file} for file in repository.files(revision)]
            sha = repository.branches.get(revision, revision)
            self._answer(200, {"id": name, "sha": sha, "siblings": siblings, "private": False, "tags": []})

    def _tree(self, body: bytes, name: str, revision: str) -> None:
        files = self.hub.repositories[name].files(revision)
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
        self._answer(200, entries)

    def _resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        repository = self._repository(name)
        if not repository:
            return
        content = (repository.files(revision) or {}).get(file)
        if content is None:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        else:
            sha = repository.branches.get(revision, revision)
            self._answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=sha)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    (r"POST /api/repos/create", _Handler._create),
    (r"POST /api/validate-yaml", _Handler._validate_card),
    (rf"POST /api/models/{_NAME}/branch/(.+)", _Handler._branch),
    (rf"POST /api/models/{_NAME}/preupload/.+", _Handler._preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    (r"PUT /lfs/(\w+)", _Handler._lfs_put),
    (rf"POST /api/models/{_NAME}/commit/(.+)", _Handler._commit),
    (rf"GET /api/models/{_NAME}", _Handler._info),
    (rf"GET /api/models/{_NAME}/revision/(.+)", _Handler._info),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)", _Handler._tree),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler._resolve),
)
