"""A hub on loopback: as much of the real one's interface as its clients ask for a download."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_a_test"
KINDS = {"models": "", "datasets": "datasets/"}


class FakeHub:
    """Serves `repos`: "models/org/name" or "datasets/org/name" -> path -> bytes.

    `cut` names files whose body ends after half of it; `asked` lists every request, with its range.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        self.repos = repos
        self.cut: set[str] = set()
        self.asked: list[str] = []
        self.url = ""

    @contextmanager
    def running(self) -> Iterator["FakeHub"]:
        hub = self

        class Handler(_Handler):
            served = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        words = unquote(url.path).strip("/").split("/")
        wanted = f"{self.command} {unquote(url.path)} {self.headers.get('Range', '')}"
        self.served.asked.append(wanted.strip())
        if words == [""]:
            return self.send(b"")
        if words[:3] == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if words[:2] == ["api", "validate-yaml"]:
            return self.json({"errors": [], "warnings": []})
        if words[0] == "api":
            kind, name, rest = words[1], "/".join(words[2:4]), words[4:]
        else:
            kind = "datasets" if words[0] == "datasets" else "models"
            words = words[kind == "datasets" :]
            name, rest = "/".join(words[:2]), words[2:]
        files = self.served.repos.get(f"{kind}/{name}")
        if files is None:
            return self.fail("RepoNotFound")
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self.fail("RevisionNotFound")
        if rest and rest[0] == "preupload":
            asked = [entry["path"] for entry in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return self.json({"files": [{"path": path, **plain} for path in asked]})
        if rest and rest[0] == "commit":
            return self.commit(name, files, body)
        if rest and rest[0] == "resolve":
            return self.file(files, "/".join(rest[2:]))
        if rest and rest[0] == "tree":
            return self.json(_tree(files, "/".join(rest[2:])))
        if rest and rest[0] == "paths-info":
            asked = json.loads(body)["paths"]
            found = [entry for path in asked for entry in _entry(files, path)]
            return self.json(found)
        siblings = [{"rfilename": path} for path in files]
        facts = {"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        return self.json({**facts, "downloads": 0, "likes": 0, "gated": False})

    def create(self, asked: dict) -> None:
        """A new repository, for those who are logged in."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.fail("", 401)
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        self.served.repos.setdefault(f"models/{name}", {})
        self.json({"url": f"{self.served.url}/{name}", "name": name})

    def commit(self, name: str, files: dict[str, bytes], body: bytes) -> None:
        """Files in lines of JSON, their content in base 64."""
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        where = f"{self.served.url}/{name}/commit/{COMMIT}"
        self.json({"success": True, "commitOid": COMMIT, "commitUrl": where, "hookOutput": ""})

    def file(self, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self.fail("EntryNotFound")
        data = files[path]
        start = 0
        asked = self.headers.get("Range")
        if asked and self.command == "GET":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first)
            data = data[start : int(last) + 1 if last else None]
        headers = {"ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if asked and self.command == "GET":
            size = len(files[path])
            headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{size}"
            return self.send(data, 206, headers, path in self.served.cut)
        return self.send(data, 200, headers, path in self.served.cut)

    def json(self, value: object) -> None:
        self.send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def fail(self, code: str, status: int = 404) -> None:
        self.send(b"{}", status, {"X-Error-Code": code, "Content-Type": "application/json"})

    def send(
        self,
        data: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
        cut: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True


def _entry(files: dict[str, bytes], path: str) -> list[dict[str, object]]:
    if path in files:
        oid = hashlib.sha1(files[path]).hexdigest()
        return [{"type": "file", "path": path, "size": len(files[path]), "oid": oid}]
    if any(name.startswith(path + "/") for name in files):
        return [{"type": "directory", "path": path, "size": 0, "oid": "0"}]
    return []


def _tree(files: dict[str, bytes], folder: str) -> list[dict[str, object]]:
    prefix = folder + "/" if folder else ""
    inside = {name.removeprefix(prefix) for name in files if name.startswith(prefix)}
    tops = sorted({name.partition("/")[0] for name in inside})
    return [entry for top in tops for entry in _entry(files, prefix + top)]
