"""A real HTTP proxy that misbehaves on purpose: it stands before an object store and answers 503, waits, or cuts."""

import http.client
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Faults:
    """What happens to which requests; counted from 1 over all requests. 0 turns a fault off."""

    busy_every: int = 0
    """Every n-th request is answered 503 and does not reach the store."""
    slow_every: int = 0
    """Every n-th request waits `slow_seconds` first."""
    slow_seconds: float = 0.2
    cut_uploads: int = 0
    """So many uploads with a body are cut after half of it, and the store sees half of it too."""
    cut_downloads: int = 0
    """So many answers with a body longer than 100 bytes are cut after half of it."""
    cut_every: int = 0
    """Every n-th request is cut where it has a body to cut: an upload half-way in, an answer half-way out."""
    refuse: bool = False
    """Every request is answered as one with a wrong key."""
    seen: list[str] = field(default_factory=list)
    """`PUT`, `503 GET`, `cut PUT`, ..., in order."""


@contextmanager
def misbehaving(upstream: str, faults: Faults) -> Iterator[str]:
    """The URL of a proxy before `upstream` for as long as the block."""
    target = urlsplit(upstream)
    numbers = itertools.count(1)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, TimeoutError):
                self.close_connection = True

        def forward(self) -> None:
            body = self._body()
            number = next(numbers)
            if faults.slow_every and number % faults.slow_every == 0:
                time.sleep(faults.slow_seconds)
            if faults.busy_every and number % faults.busy_every == 0:
                faults.seen.append(f"503 {self.command}")
                self._reply(503, {}, b"<Error><Code>SlowDown</Code><Message>Please reduce your rate</Message></Error>")
                return
            if faults.refuse:
                code = b"<Code>InvalidAccessKeyId</Code><Message>The key does not exist in our records.</Message>"
                self._reply(403, {}, b"<Error>" + code + b"</Error>")
                return
            is_cut = bool(faults.cut_every) and number % faults.cut_every == 0
            if self.command == "PUT" and len(body) > 100 and (is_cut or self._takes("cut_uploads")):
                faults.seen.append("cut PUT")
                self._send_half(body)
                self._hang_up()
                return
            faults.seen.append(self.command)
            upstream_connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
            upstream_connection.request(self.command, self.path, body, headers)
            answer = upstream_connection.getresponse()
            content = answer.read()
            if len(content) > 100 and self.command == "GET" and (is_cut or self._takes("cut_downloads")):
                faults.seen.append("cut GET")
                self.send_response(answer.status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self._hang_up()
                return
            self._reply(answer.status, dict(answer.getheaders()), content)
            upstream_connection.close()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

        def _takes(self, name: str) -> bool:
            with lock:
                left = getattr(faults, name)
                setattr(faults, name, max(0, left - 1))
                return bool(left)

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _send_half(self, body: bytes) -> None:
            with socket.create_connection((target.hostname, target.port)) as half:
                lines = [f"{self.command} {self.path} HTTP/1.1"]
                lines += [f"{name}: {value}" for name, value in self.headers.items()]
                half.sendall("\r\n".join([*lines, "", ""]).encode() + body[: len(body) // 2])

        def _hang_up(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

        def _reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
