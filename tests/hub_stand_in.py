"""A model hub on this machine: the few endpoints by which huggingface_hub reads, writes and makes repositories."""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import huggingface_hub.constants
import pytest

TOKEN = "hf_" + "a" * 34
LARGE = (".safetensors", ".parquet")
"""Files that the hub keeps as LFS objects."""


@dataclass
class Repository:
    """A repository: its files, the commits so far, and whether it shows itself to its owner alone."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)


class Hub(ThreadingHTTPServer):
    """The hub.

    Attributes:
        url: its address.
        repositories: by their address: 'datasets/me/photos', 'models/me/vit'.
        objects: LFS objects, by SHA-256.
        requests: number of requests of each kind.
        breaks_after: number of LFS objects that are taken before the hub fails; None: it never does.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.breaks_after: int | None = None
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def use(self, monkeypatch: pytest.MonkeyPatch, token: str = TOKEN) -> None:
        """Let huggingface_hub in this process talk to this hub, as HF_ENDPOINT and HF_TOKEN would."""
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", self.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", token)

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    """One answer. Each `answer_...` serves the addresses of a pattern in `ROUTES`."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def log_message(self, *_: object) -> None:
        pass

    def _route(self, method: str) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(self.path.partition("?")[0])
        for expected, pattern, answer in ROUTES:
            if method == expected and (match := re.fullmatch(pattern, path)):
                self.server.requests[answer.__name__.removeprefix("answer_")] += 1
                answer(self, *match.groups(""))
                return
        self.fail(404, "no such address")

    @property
    def is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self, value: Any) -> None:
        self.send(json.dumps(value).encode(), Content_Type="application/json")

    def fail(self, status: int, message: str, code: str = "") -> None:
        self.send(json.dumps({"error": message}).encode(), status, X_Error_Code=code, X_Error_Message=message)

    def repository(self, address: str) -> Repository | None:
        """The repository; None, after an answer that says no, if it is not there for whoever asks."""
        found = self.server.repositories.get(address)
        if found is None or (found.private and not self.is_owner):
            self.fail(404 if self.is_owner else 401, "Repository not found", "RepoNotFound")
            return None
        return found

    def writable(self, address: str) -> Repository | None:
        if not self.is_owner:
            self.fail(401, "Invalid username or password.")
            return None
        return self.repository(address)

    def answer_create(self) -> None:
        asked = json.loads(self.body)
        if not self.is_owner:
            self.fail(401, "Invalid username or password.")
            return
        if asked["organization"] not in (None, "me"):
            self.fail(403, "You don't have the rights to create a repository under this namespace")
            return
        address = f"{asked.get('type') or 'model'}s/me/{asked['name']}"
        if address in self.server.repositories:
            self.fail(409, "You already created this repo")
            return
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.server.repositories[address] = Repository(private)
        self.json({"url": f"{self.server.url}/{address.removeprefix('models/')}", "name": f"me/{asked['name']}"})

    def answer_info(self, address: str, _: str) -> None:
        if (repository := self.repository(address)) is not None:
            name = address.partition("/")[2]
            self.json({"id": name, "sha": "0" * 40, "private": repository.private, "siblings": [], "tags": []})

    def answer_tree(self, address: str, folder: str) -> None:
        if (repository := self.repository(address)) is None:
            return
        entries = [_entry(name, data) for name, data in repository.files.items() if name.startswith(folder)]
        if folder and not entries:
            self.fail(404, "no such folder", "EntryNotFound")
        else:
            self.json(entries)

    def answer_paths_info(self, address: str) -> None:
        if (repository := self.repository(address)) is not None:
            paths = json.loads(self.body)["paths"]
            self.json([_entry(name, repository.files[name]) for name in paths if name in repository.files])

    def answer_file(self, address: str, name: str) -> None:
        kind = address if address.startswith(("datasets/", "spaces/")) else f"models/{address}"
        if (repository := self.repository(kind)) is None:
            return
        if name not in repository.files:
            self.fail(404, "Entry not found", "EntryNotFound")
            return
        data = repository.files[name]
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            self.send(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit="0" * 40)
            return
        start, end = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
        if start >= len(data):
            self.send(b"", 416)
        else:
            self.send(data[start : end + 1], 206, Content_Range=f"bytes {start}-{end}/{len(data)}")

    def answer_validate(self) -> None:
        self.json({"warnings": [], "errors": []})

    def answer_preupload(self, address: str) -> None:
        if self.writable(address) is not None:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(self.body)["files"]
            ]
            self.json({"files": files})

    def answer_batch(self, _: str) -> None:
        objects = json.loads(self.body)["objects"]
        answers = []
        for asked in objects:
            action = {"actions": {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}", "header": {}}}}
            answers.append(asked | ({} if asked["oid"] in self.server.objects else action))
        self.json({"transfer": "basic", "objects": answers})

    def answer_object(self, oid: str) -> None:
        if self.server.breaks_after is not None and len(self.server.objects) >= self.server.breaks_after:
            self.fail(400, "out of order")
            return
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        self.send(b"")

    def answer_commit(self, address: str) -> None:
        if (repository := self.writable(address)) is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = {
            value["path"]: base64.b64decode(value["content"]) if key == "file" else self.server.objects[value["oid"]]
            for key, value in ((line["key"], line["value"]) for line in lines)
            if key in ("file", "lfsFile")
        }
        repository.files |= files
        repository.commits.append(list(files))
        self.json({"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.server.url}/{address}/commit/1"})


_REPOSITORY = r"((?:datasets|models|spaces)/[^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", Answer.answer_create),
    ("GET", rf"/api/{_REPOSITORY}(/revision/main)?", Answer.answer_info),
    ("GET", rf"/api/{_REPOSITORY}/tree/main/?(.*)", Answer.answer_tree),
    ("POST", rf"/api/{_REPOSITORY}/paths-info/main", Answer.answer_paths_info),
    ("POST", rf"/api/{_REPOSITORY}/preupload/main", Answer.answer_preupload),
    ("POST", rf"/api/{_REPOSITORY}/commit/main", Answer.answer_commit),
    ("POST", "/api/validate-yaml", Answer.answer_validate),
    ("POST", r"/(.+)\.git/info/lfs/objects/batch", Answer.answer_batch),
    ("PUT", "/lfs/([0-9a-f]+)", Answer.answer_object),
    ("GET", r"/((?:datasets/)?[^/]+/[^/]+)/resolve/main/(.+)", Answer.answer_file),
]


def _entry(name: str, data: bytes) -> dict[str, Any]:
    """A file as the hub lists it."""
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry
