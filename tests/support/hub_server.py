"""A stand-in for the Hugging Face Hub on loopback: repositories in memory, over real HTTP.

It answers what huggingface_hub asks when a folder is uploaded and a snapshot is downloaded. Every
file is a regular one; nothing is authenticated.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class Hub(ThreadingHTTPServer):
    """``files[repository][path]`` are the bytes of the main branch; ``created`` in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: list[dict] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo: str) -> str:
        digest = hashlib.sha1()
        for path, data in sorted(self.files[repo].items()):
            digest.update(path.encode() + b"\0" + data)
        return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", Content_Type="application/json", X_Error_Code=code)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _path(self) -> list[str]:
        return unquote(urlparse(self.path).path).strip("/").split("/")

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if path == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.server.created.append(asked)
            known = name in self.server.files
            self.server.files.setdefault(name, {})
            self._json({"url": f"{self.server.url}/{name}"}, 409 if known else 200)
            return
        if path == ["api", "validate-yaml"]:  # of a card
            self._json({"errors": [], "warnings": []})
            return
        repo = "/".join(path[2:4])
        if path[4:5] == ["preupload"]:
            asked = json.loads(body)["files"]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            self._json({"files": [{"path": file["path"], **mode} for file in asked]})
        elif path[4:5] == ["commit"]:
            for line in body.splitlines():
                part = json.loads(line)
                if part["key"] == "file":
                    value = part["value"]
                    self.server.files[repo][value["path"]] = base64.b64decode(value["content"])
            oid = self.server.commit(repo)
            url = f"{self.server.url}/{repo}/commit/{oid}"
            self._json({"commitUrl": url, "commitOid": oid, "success": True})
        else:
            self._missing("EntryNotFound")

    def do_GET(self) -> None:
        path = self._path()
        if path[:2] == ["api", "models"]:
            repo = "/".join(path[2:4])
            if repo not in self.server.files:
                self._missing("RepoNotFound")
            elif "tree" in path:
                files = self.server.files[repo].items()
                self._json(
                    [{"type": "file", "path": p, "size": len(d), "oid": ""} for p, d in files]
                )
            else:
                names = [{"rfilename": name} for name in self.server.files[repo]]
                self._json({"id": repo, "sha": self.server.commit(repo), "siblings": names})
            return
        repo, name = "/".join(path[:2]), "/".join(path[4:])
        if repo not in self.server.files or path[2] != "resolve":
            self._missing("RepoNotFound")
        elif name not in self.server.files[repo]:
            self._missing("EntryNotFound")
        else:
            data = self.server.files[repo][name]
            tag = f'"{hashlib.sha1(data).hexdigest()}"'
            self._send(200, data, ETag=tag, X_Repo_Commit=self.server.commit(repo))

    do_HEAD = do_GET  # noqa: N815


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A running stand-in, stopped at the end."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
