"""A local HTTP server that keeps files as a hub does, and the environment of a client that speaks to it.

The client runs in a process of its own, because the hub's address and cache are read when its library is imported.
"""

import base64
import http.server
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The few routes that listing, downloading, creating and committing need; `files` maps repo/path to bytes."""

    files: dict[str, bytes]
    kinds: dict[str, str]
    """What each of them is: model or space."""
    created: dict[str, bool]
    """Whether each repository that was made is private."""
    token = "hf_test"
    """The one that it knows."""
    public: set[str]
    """Repositories that are there and public, whatever is asked for."""
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if path == "api/whoami-v2":
            is_known = self.headers.get("Authorization") == f"Bearer {self.token}"
            self._answer(*((200, b'{"name": "new", "type": "user"}') if is_known else (401, b'{"error": "no token"}')))
            return
        if path.startswith(("api/models/", "api/spaces/")) and path.count("/") == 3:
            repo_id = path.split("/", 2)[2]
            if repo_id in self.created:
                info = {"id": repo_id, "private": self.created[repo_id] and repo_id not in self.public}
                self._answer(200, json.dumps(info).encode())
                return
        if path.startswith("api/models/"):
            owner, name, *_ = path.removeprefix("api/models/").split("/")
            found = [key.removeprefix(f"{owner}/{name}/") for key in self.files if key.startswith(f"{owner}/{name}/")]
            if not found:
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif "/tree/" in path:
                tree = [{"type": "file", "path": file, "size": 1, "oid": "0"} for file in found]
                self._answer(200, json.dumps(tree).encode())
            else:
                info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": file} for file in found]}
                self._answer(200, json.dumps(info).encode())
            return
        key = path.replace("/resolve/main/", "/").replace(f"/resolve/{COMMIT}/", "/")
        if key not in self.files:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        body = self.files[key]
        self._answer(200, body, {"ETag": f'"{sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path).strip("/")
        if path == "api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked.get('organization') or 'new'}/{asked['name']}"
            self.kinds[repo_id] = asked.get("type") or "model"
            self.created[repo_id] = bool(asked.get("private") or asked.get("visibility") == "private")
            answer = {"url": f"http://{self.headers['Host']}/{repo_id}", "id": repo_id}
            self._answer(200, json.dumps(answer).encode())
        elif "/preupload/" in path:
            wanted = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, json.dumps({"files": wanted}).encode())
        elif "/commit/" in path:
            repo_id = path.split("/", 2)[2].split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[f"{repo_id}/{line['value']['path']}"] = base64.b64decode(line["value"]["content"])
            address = f"http://{self.headers['Host']}/{repo_id}/commit/{COMMIT}"
            answer = {"commitUrl": address, "commitOid": COMMIT}
            self._answer(200, json.dumps(answer).encode())
        else:
            self._answer(200, b"{}")

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving_hub() -> Iterator[str]:
    """The server's address, while it serves Hub.files."""
    Hub.created, Hub.kinds, Hub.public = {}, {}, set()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def client_environment(hub: str, home: Path) -> dict[str, str]:
    """Variables of a process that speaks to this hub and to nothing else."""
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_TOKEN": Hub.token, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return environment | {"PYTHONPATH": os.pathsep.join(sys.path)}
