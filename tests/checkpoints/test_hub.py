"""Pushing to a hub and loading from it, against a local HTTP server that keeps files as the hub does.

The client runs in a process of its own, because the hub's address and cache are read when its library is imported.
"""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from fabricated import F, topk_tensors, write, write_scaled

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The few routes that listing, downloading, creating and committing need; `files` maps repo/path to bytes."""

    files: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
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
            self._answer(200, json.dumps({"url": f"http://{self.headers['Host']}/new/one", "id": "new/one"}).encode())
        elif "/preupload/" in path:
            wanted = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, json.dumps({"files": wanted}).encode())
        elif "/commit/" in path:
            repo_id = path.removeprefix("api/models/").split("/commit/")[0]
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


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    write(tmp_path / "theirs", topk_tensors(), {"dict_class": "BatchTopKCrossCoder"})
    write_scaled(tmp_path / "scaled")
    Hub.files = {
        "them/topk/model.safetensors": (tmp_path / "theirs" / "model.safetensors").read_bytes(),
        "them/topk/config.json": (tmp_path / "theirs" / "config.json").read_bytes(),
        "them/topk/README.md": b"# a crosscoder",
        "them/scaled/blocks.14/cc_weights.pt": (tmp_path / "scaled" / "cc_weights.pt").read_bytes(),
        "them/scaled/blocks.14/cfg.json": (tmp_path / "scaled" / "cfg.json").read_bytes(),
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def run_client(hub: str, home: Path, code: str, *, is_offline: bool = False) -> str:
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    environment["HF_HUB_OFFLINE"] = "1" if is_offline else "0"
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    code = "from pipeline.errors import InputError\nfrom pipeline.numerics.crosscoder import Crosscoder\n" + code
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_load_push_load_again_and_load_offline(hub: str, tmp_path: Path) -> None:
    online = """
theirs = Crosscoder.from_pretrained("them/topk")
print(theirs.push_to_hub("new/one"))
ours = Crosscoder.from_pretrained("new/one")
assert ours.W_dec_FMD.equal(theirs.W_dec_FMD) and ours.threshold == theirs.threshold == 1.5 and ours.k == 3
scaled = Crosscoder.from_pretrained("them/scaled")
assert scaled.W_dec_FMD.equal(Crosscoder.from_pretrained("them/scaled/blocks.14").W_dec_FMD)
try:
    Crosscoder.from_pretrained("them/absent")
except InputError as error:
    print(error)
"""
    address, error = run_client(hub, tmp_path / "home", online).splitlines()
    assert address == f"{hub}/new/one/commit/{COMMIT}"
    assert "expected a crosscoder at the hub id them/absent (revision main), came RepositoryNotFoundError" in error
    assert {key for key in Hub.files if key.startswith("new/")} == {
        "new/one/model.safetensors",
        "new/one/config.json",
    }
    offline = """
print(Crosscoder.from_pretrained("them/topk").num_latents)
try:
    Crosscoder.from_pretrained("them/never-loaded")
except InputError as error:
    print(error)
"""
    num_latents, error = run_client(hub, tmp_path / "home", offline, is_offline=True).splitlines()
    assert int(num_latents) == F
    assert "expected a crosscoder at the hub id them/never-loaded" in error
