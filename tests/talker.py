"""A server that speaks the OpenAI chat protocol, in a thread of the test: deterministic answers, and faults on demand.

Asked for an explanation it names the most frequent marked token; asked to detect, it says yes where that token occurs.
So latents that stand for one token are explained and detected perfectly, and anything else is not.
"""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Reply = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""


class Request(NamedTuple):
    """One request as it came."""

    path: str
    key: str
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def words(self) -> str:
        return json.dumps(self.body["messages"], sort_keys=True)


def chat_reply(text: str | None, **more: Any) -> Reply:
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    body = {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage, **more}
    return 200, {}, json.dumps(body).encode()


def honest(request: Request) -> Reply:
    """What a model that understands tokens would say."""
    user = request.body["messages"][1]["content"]
    if user.startswith("Explanation: "):
        token = json.loads(json.loads(user.splitlines()[0].removeprefix("Explanation: ")).split(" token ", 1)[1])
        passages = re.findall(r"BEGIN PASSAGE (\d+) (\w+)\n(.*?)\nEND PASSAGE \1 \2", user, flags=re.DOTALL)
        return chat_reply(json.dumps({"active": [int(number) for number, _, text in passages if token in text]}))
    active = [
        pair[0] for line in re.findall(r"^active in passage \d+: (.*)$", user, flags=re.M) for pair in json.loads(line)
    ]
    token = Counter(active).most_common(1)[0][0]
    explanation = f"It fires on the token {json.dumps(token)}"
    return chat_reply("Here you are: " + json.dumps({"explanation": explanation}))


class Talker:
    """The server. `reply` may be replaced at any time; `requests` holds all that came, in order."""

    def __init__(self) -> None:
        self.reply: Callable[[Request], Reply] = honest
        self.requests: list[Request] = []
        self.delay_seconds = 0.0
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self.url = ""

    def handle(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.delay_seconds)
            return self.reply(request)
        finally:
            with self._lock:
                self._at_once -= 1

    def place(self, request: Request) -> int:
        """How many requests came before this one."""
        return next(place for place, one in enumerate(self.requests) if one is request)


@contextmanager
def talking() -> Iterator[Talker]:
    """A running server on a free port of the loopback."""
    talker = Talker()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = self.headers.get("Authorization", "")
            status, headers, data = talker.handle(Request(self.path, key, body, dict(self.headers)))
            try:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the other side did not wait

        def log_message(self, *arguments: Any) -> None:
            """In silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    talker.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield talker
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
