"""A hub on 127.0.0.1 that serves local folders, and fails as it is asked to."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session

Headers = Mapping[str, str]


@dataclass
class Hub:
    """What the server offers, and what it was asked.

    Attributes:
        models: `org/name` → revision → folder.
        refused: `org/name` → status and `X-Error-Code` of every answer about it.
        cut: file → for its next answers, the bytes after which the connection is closed.
        requests: `METHOD path`, and ` bytes=…` where a range was asked for.
    """

    models: dict[str, dict[str, Path]] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def commit(self, model: str, revision: str) -> str | None:
        """A hash for each folder; a commit names itself."""
        commits = {name: hashlib.sha1(str(folder).encode()).hexdigest() for name, folder in self.models[model].items()}
        return commits.get(revision) or next((c for c in commits.values() if c == revision), None)

    def folder(self, model: str, revision: str) -> Path:
        (found,) = {f for name, f in self.models[model].items() if self.commit(model, name) == revision}
        return found

    def answer(self, method: str, path: str, headers: Headers) -> tuple[int, dict[str, str], bytes]:
        found = re.fullmatch(r"/(api/models/)?([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)/?(.*)", path)
        if found is None:
            return self.error(404, "")
        is_api, model, what, revision, file = found.groups()
        if model in self.refused:
            return self.error(*self.refused[model])
        if model not in self.models:
            return self.error(404, "RepoNotFound")
        commit = self.commit(model, unquote(revision))
        if commit is None:
            return self.error(404, "RevisionNotFound")
        root = self.folder(model, commit)
        files = {f.relative_to(root).as_posix(): f for f in root.rglob("*") if f.is_file()}
        if is_api and what == "revision":
            entries = [{"rfilename": name, "size": f.stat().st_size} for name, f in files.items()]
            return 200, {}, json.dumps({"id": model, "sha": commit, "siblings": entries}).encode()
        if file not in files:
            return self.error(404, "EntryNotFound")
        content = files[file].read_bytes()
        facts = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        if method == "HEAD":
            return 200, facts | {"Content-Length": str(len(content))}, b""
        start = int(headers.get("Range", "bytes=0-")[6:].split("-")[0])
        facts["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return (206 if start else 200), facts, content[start:]

    @staticmethod
    def error(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
        return status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}"


@contextmanager
def served(hub: Hub) -> Iterator[Hub]:
    """Serve it at `hub.endpoint`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            wanted = self.headers.get("Range")
            hub.requests.append(f"{self.command} {path}" + (f" {wanted}" if wanted else ""))
            status, headers, body = hub.answer(self.command, path, self.headers)
            limits = hub.cut.get(Path(path).name) if self.command == "GET" else None
            limit = limits.pop(0) if limits else None
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:limit])
            self.close_connection = limit is not None

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        close_session()
        server.shutdown()
        server.server_close()


def ask_only(hub: Hub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Make `huggingface_hub` in this process ask this hub alone, with a cache in a folder of its own."""
    from huggingface_hub import constants, file_download

    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)
    patch.setattr(file_download.time, "sleep", lambda seconds: None)
