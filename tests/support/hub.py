"""A Hugging Face Hub on loopback, as far as `huggingface_hub` asks: repositories, commits, large files, a CDN.

Git is left out: a commit is a dictionary of files with a random name. Large files are stored apart, fetched from
another host (`localhost` for `127.0.0.1`) to which no token may travel.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".gguf")
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Repository:
    """Branches name commits, commits hold files."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        name = secrets.token_hex(20)
        self.commits[name], self.branches[branch] = dict(files), name
        return name

    def at(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass
class StandIn:
    """The Hub's memory. `answers` can replace the answer to a request; `asked` is what was asked, in order."""

    token: str = "hf_" + "Q" * 34
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    answers: Callable[[str, str, dict[str, str]], tuple[int, dict[str, str], bytes] | None] = lambda *_: None
    url: str = ""

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        held = self.repositories[repo]
        return {name: data for name, data in held.commits[str(held.at(revision))].items() if name != ".gitattributes"}


@contextmanager
def running_hub(**fields: Any) -> Iterator[StandIn]:
    """Serve a Hub until the block ends."""
    hub = StandIn(**fields)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def connect(patch: Any, hub: StandIn, token: str | None = None) -> None:
    """Let `huggingface_hub` of this process use the Hub, with its own token or another; Xet has no stand-in."""
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    patch.setenv("HF_ENDPOINT", hub.url)
    patch.setenv("HF_TOKEN", hub.token if token is None else token)


class _Refusal(Exception):  # noqa: N818 - an answer of the server, no fault
    def __init__(self, status: int, code: str, **more: Any) -> None:
        self.status, self.code, self.more = status, code, more


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815 - the names that http.server calls

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body, path = self.rfile.read(length), unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        replaced = self.hub.answers(self.command, path, dict(self.headers))
        try:
            status, headers, data = replaced or self._answer(path, body)
        except _Refusal as refusal:
            status, headers = refusal.status, {"X-Error-Code": refusal.code}
            data = json.dumps({"error": refusal.code, **refusal.more}).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _answer(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
        if parts[0] == "cdn":
            return self._cdn(parts[1], body)
        if path == "/api/repos/create":
            return _json(self._create(json.loads(body)))
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return _json(self._batch("/".join(parts[:2]).removesuffix(".git"), json.loads(body)))
        if parts[2:3] == ["resolve"]:
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        raise _Refusal(404, "NotFound")

    # --- who may do what --------------------------------------------------------------------------------------------

    @property
    def _is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _require_owner(self) -> None:
        if not self._is_owner:
            raise _Refusal(401, "Unauthorized")

    def _repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._is_owner):
            raise _Refusal(404 if self._is_owner else 401, "RepoNotFound")
        return found

    # --- repositories -----------------------------------------------------------------------------------------------

    def _create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        self._require_owner()
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            raise _Refusal(409, "Conflict", url=f"{self.hub.url}/{name}")
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        made = self.hub.repositories[name] = Repository(private)
        made.commit("main", {".gitattributes": ATTRIBUTES})
        return {"url": f"{self.hub.url}/{name}", "name": name}

    def _api(self, name: str, words: list[str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        held = self._repository(name)
        what, revision = (words[0], "/".join(words[1:])) if words else ("revision", "main")
        if what == "branch":
            self._require_owner()
            if revision in held.branches:
                raise _Refusal(409, "Conflict")
            held.branches[revision] = held.branches["main"]
            return _json({})
        commit = held.at(revision)
        if commit is None:
            raise _Refusal(404, "RevisionNotFound")
        if what == "revision":
            return _json({"id": name, "sha": commit, "private": held.private, "siblings": []})
        if what == "tree":
            return _json([self._entry(path, data) for path, data in held.commits[commit].items()])
        self._require_owner()
        if what == "preupload":
            return _json(self._preupload(held.commits[commit], json.loads(body)))
        return _json(self._commit(name, revision, body))

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def _preupload(self, present: dict[str, bytes], wanted: dict[str, Any]) -> dict[str, Any]:
        """Say which files are stored apart, and what is there already under their names."""
        return {"files": [self._mode(file["path"], present.get(file["path"])) for file in wanted["files"]]}

    def _mode(self, path: str, present: bytes | None) -> dict[str, Any]:
        large, oid = path.endswith(LARGE), None
        if present is not None:
            oid = hashlib.sha256(present).hexdigest() if large else _blob(present)
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def _batch(self, name: str, wanted: dict[str, Any]) -> dict[str, Any]:
        self._require_owner()
        self._repository(name)
        objects: list[dict[str, Any]] = [{"oid": one["oid"], "size": one["size"]} for one in wanted["objects"]]
        for one in objects:
            if one["oid"] not in self.hub.large:
                one["actions"] = {"upload": {"href": self._elsewhere(one["oid"])}}
        return {"transfer": "basic", "objects": objects}

    def _commit(self, name: str, branch: str, body: bytes) -> dict[str, Any]:
        held = self._repository(name)
        header, *changes = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit") not in {None, held.branches[branch]}:
            raise _Refusal(412, "PreconditionFailed")
        files = dict(held.commits[held.branches[branch]])
        for change in changes:
            value = change["value"]
            if change["key"] == "deletedFile":
                files.pop(value["path"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        made = held.commit(branch, files)
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{made}", "commitOid": made, "success": True}

    # --- contents ---------------------------------------------------------------------------------------------------

    def _resolve(self, name: str, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        held = self._repository(name)
        commit = held.at(revision)
        if commit is None or path not in held.commits[commit]:
            raise _Refusal(404, "EntryNotFound" if commit else "RevisionNotFound")
        data = held.commits[commit][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob(data)}"', "Content-Length": str(len(data))}
        if not path.endswith(LARGE):
            return 200, headers, data
        digest = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)), "Location": self._elsewhere(digest)}
        self.hub.large[digest] = data
        return 302, headers | linked | {"Content-Length": "0"}, b""

    def _elsewhere(self, digest: str) -> str:
        return f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{digest}"

    def _cdn(self, digest: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if "Authorization" in self.headers:
            self.hub.leaked.append(self.path)
        if self.command != "PUT":
            return 200, {"ETag": f'"{digest}"'}, self.hub.large[digest]
        if hashlib.sha256(body).hexdigest() != digest:
            raise _Refusal(400, "BadDigest")
        self.hub.large[digest] = body
        return 200, {}, b""


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
