"""A model hub on this machine: as much of the hub's HTTP interface as huggingface_hub needs to list, fetch and commit.

Repositories are folders below `root`, `{owner}/{name}/...`. It serves one revision and takes every file inline.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the hub's address and the growing list of files that were fetched."""
    fetched: list[str] = []
    handler = type("Handler", (_Handler,), {"root": root, "fetched": fetched})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    root: Path
    fetched: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        if path[:2] == ["api", "models"]:
            self._describe(path[2:])
        elif "resolve" in path:
            at = path.index("resolve")
            self._send_file("/".join(path[:at]), "/".join(path[at + 2 :]))
        else:
            self._json({"error": f"no {self.path}"}, 404)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            (self.root / name).mkdir(parents=True, exist_ok=True)
            self._json({"url": f"{self._address()}/{name}", "id": name, "name": name})
        elif path[-2:-1] == ["preupload"]:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._json({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        elif path[-2:-1] == ["commit"]:
            repository = "/".join(path[2:4])
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    target = self.root / repository / entry["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(entry["value"]["content"]))
            self._json({"commitUrl": f"{self._address()}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})
        elif path[1:] == ["validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        else:
            self._json({"error": f"no {self.path}"}, 404)

    def _describe(self, path: list[str]) -> None:
        repository = "/".join(path[:2])
        folder = self.root / repository
        if not folder.is_dir():
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if "tree" in path:
            oids = [hashlib.sha1(file.read_bytes()).hexdigest() for file in files]
            sizes = [{"type": "file", "size": file.stat().st_size, "oid": oid} for file, oid in zip(files, oids)]
            self._json([{**size, "path": file.relative_to(folder).as_posix()} for size, file in zip(sizes, files)])
            return
        names = [{"rfilename": file.relative_to(folder).as_posix()} for file in files]
        self._json({"id": repository, "modelId": repository, "sha": COMMIT, "siblings": names, "tags": []})

    def _send_file(self, repository: str, name: str) -> None:
        file = self.root / repository / name
        if not file.is_file():
            code = "EntryNotFound" if file.parent.is_dir() else "RepoNotFound"
            self._json({"error": f"no {name}"}, 404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
            return
        content = file.read_bytes()
        if self.command == "GET":
            self.fetched.append(f"{repository}/{name}")
        self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _address(self) -> str:
        return f"http://{self.headers['Host']}"
