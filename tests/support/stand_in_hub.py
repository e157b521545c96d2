"""A server with the routes of the Hugging Face Hub that downloads and uploads use."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandInHub:
    """Serves one folder as the model `name`, of the revisions `main` and `v1`; takes uploads."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.uploaded: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.refuses = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                hub.get(self)

            do_HEAD = do_GET

            def do_POST(self) -> None:
                hub.post(self)

            def do_PUT(self) -> None:
                hub.post(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def get(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        files = sorted(p.name for p in self.folder.iterdir() if p.is_file())
        api, known = f"/api/models/{self.name}", ("main", "v1", COMMIT)
        if path == api or path.startswith(f"{api}/revision/"):
            if path != api and path.rpartition("/")[2] not in known:
                return _send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in files]
            return _json(request, {"id": self.name, "sha": COMMIT, "siblings": siblings})
        if path.startswith(f"{api}/tree/"):
            return _json(request, [self._entry(name) for name in files])
        if path.startswith(f"/{self.name}/resolve/") and path.rpartition("/")[2] in files:
            content = (self.folder / path.rpartition("/")[2]).read_bytes()
            tag = hashlib.sha1(content).hexdigest()
            return _send(request, 200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
        return _send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})

    def post(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.tokens.append(request.headers.get("Authorization"))
        if self.refuses:
            return _send(request, 403, b"", {})
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return _json(request, {"url": f"{self.url}/{self.name}", "name": self.name})
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            return _json(request, {"files": modes})
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.uploaded[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.url}/{self.name}/commit/{COMMIT}"
            return _json(request, {"commitUrl": url, "commitOid": COMMIT, "success": True})
        return _json(request, {})

    def _entry(self, name: str) -> dict[str, Any]:
        content = (self.folder / name).read_bytes()
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}


def _json(request: BaseHTTPRequestHandler, content: object) -> None:
    _send(request, 200, json.dumps(content).encode(), {"Content-Type": "application/json"})


def _send(
    request: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str]
) -> None:
    request.send_response(status)
    for key, value in (headers | {"Content-Length": str(len(content))}).items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)
