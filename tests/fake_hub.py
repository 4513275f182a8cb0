"""A Hugging Face hub on loopback: as much of one as huggingface_hub asks for to download a model."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".gguf")  # kept apart from the repository, as by Git LFS
TOKEN = "hf_right"  # whoever shows it may read gated models

API = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/(?P<kind>revision|tree)/(?P<revision>[^/]+)")
RESOLVE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class Hub:
    """Folders by (ORG/MODEL, revision), and what was asked of it."""

    def __init__(self) -> None:
        self.folders: dict[str, dict[str, Path]] = {}
        self.gated: set[str] = set()
        self.asked: list[tuple[str, str]] = []  # (method, path)
        self.tokens: set[str | None] = set()
        self.fails_with: int | None = None
        self._server: ThreadingHTTPServer | None = None
        self.url = ""

    def add(self, name: str, folder: Path, revision: str = "main") -> str:
        """The commit."""
        self.folders.setdefault(name, {})[revision] = folder
        return commit_of(folder)

    def find(self, name: str, revision: str) -> Path | None:
        """By branch or commit."""
        revisions = self.folders[name]
        return revisions.get(revision) or next((f for f in revisions.values() if commit_of(f) == revision), None)

    def downloaded(self) -> list[str]:
        """Names of the files that were sent, without their folders."""
        return sorted(path.rpartition("/")[2] for method, path in self.asked if method == "GET" and "/api/" not in path)

    def start(self) -> None:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Nothing answers at its address any more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()


def commit_of(folder: Path) -> str:
    names = [f"{file.relative_to(folder)} {file.stat().st_size}" for file in files_of(folder)]
    return hashlib.sha1("\n".join([str(folder), *names]).encode()).hexdigest()


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests ask what was asked."""

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.asked.append((self.command, path))
        self.hub.tokens.add(token)
        match = API.fullmatch(path) or RESOLVE.fullmatch(path)
        if self.hub.fails_with is not None:
            self.say(self.hub.fails_with)
        elif match is None or match["name"] not in self.hub.folders:
            self.say(404, error="RepoNotFound")
        elif (folder := self.hub.find(match["name"], match["revision"])) is None:
            self.say(404, error="RevisionNotFound")
        elif match.re is API:
            self.describe(match["name"], folder, match["kind"])
        elif match["name"] in self.hub.gated and token != TOKEN:  # what it is, everybody may know
            self.say(401 if token is None else 403, error="GatedRepo")
        elif not (folder / match["file"]).is_file():
            self.say(404, {"X-Repo-Commit": commit_of(folder)}, error="EntryNotFound")
        else:
            self.send_file(folder, folder / match["file"])

    def describe(self, name: str, folder: Path, kind: str) -> None:
        if kind == "revision":
            siblings = [{"rfilename": str(file.relative_to(folder))} for file in files_of(folder)]
            answer: object = {"id": name, "modelId": name, "sha": commit_of(folder), "siblings": siblings, "tags": []}
        else:
            answer = [entry_of(folder, file) for file in files_of(folder)]
        self.say(200, {"Content-Type": "application/json"}, body=json.dumps(answer).encode())

    def send_file(self, folder: Path, file: Path) -> None:
        body = file.read_bytes()
        headers = {"X-Repo-Commit": commit_of(folder), "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
        if file.suffix in LARGE:
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Linked-Size": str(len(body))}
        self.say(200, headers, body=body)

    def say(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", error: str = "") -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), **({"X-Error-Code": error} if error else {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def entry_of(folder: Path, file: Path) -> dict[str, object]:
    """A file in the listing of a repository."""
    body = file.read_bytes()
    size = len(body)
    entry: dict[str, object] = {
        "type": "file",
        "path": str(file.relative_to(folder)),
        "size": size,
        "oid": hashlib.sha1(body).hexdigest(),
    }
    if file.suffix in LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": size, "pointerSize": 130}
    return entry
