"""The endpoint against a real server: patience within limits, refusals at once, and a key that never shows."""

import threading
import time
from collections.abc import Iterator

import pytest
from talker import Talker, chat_reply, talking

from pipeline.errors import CrossrayError, InputError
from pipeline.models.endpoint import Answer, Endpoint, EndpointOptions, Stopped, read_key

KEY = "sk-very-secret-1234"
ASKED = [{"role": "user", "content": "hello"}]


@pytest.fixture
def talker() -> Iterator[Talker]:
    with talking() as server:
        server.reply = lambda _: chat_reply("hello back")
        yield server


def endpoint(talker: Talker, *, timeout: float = 5.0, max_retries: int = 3, key: str | None = KEY) -> Endpoint:
    return Endpoint(EndpointOptions(talker.url, key, timeout, max_retries, 0.01), {"model": "m", "temperature": 0.0})


def test_a_request_follows_the_protocol_and_its_answer_is_read(talker: Talker) -> None:
    assert endpoint(talker).ask(ASKED) == Answer("hello back", 100, 10)
    (request,) = talker.requests
    assert request.path == "/v1/chat/completions"
    assert request.key == f"Bearer {KEY}"
    assert request.body == {"model": "m", "temperature": 0.0, "messages": ASKED}


def test_no_key_sends_no_header(talker: Talker) -> None:
    endpoint(talker, key=None).ask(ASKED)
    assert talker.requests[0].key == ""


@pytest.mark.parametrize("status", [429, 408, 500, 503])
def test_overload_and_server_errors_are_waited_out(talker: Talker, status: int) -> None:
    replies = iter([(status, {}, b"busy")] * 3)
    talker.reply = lambda _: next(replies, None) or chat_reply("at last")
    assert endpoint(talker).ask(ASKED).text == "at last"
    assert len(talker.requests) == 4


def test_the_wait_that_the_server_asks_for_is_kept(talker: Talker) -> None:
    replies = iter([(429, {"Retry-After": "0.3"}, b"busy")])
    talker.reply = lambda _: next(replies, None) or chat_reply("at last")
    started = time.monotonic()
    endpoint(talker).ask(ASKED)
    assert time.monotonic() - started >= 0.3


def test_patience_ends_with_the_last_fault_in_the_message(talker: Talker) -> None:
    talker.reply = lambda _: (503, {}, f"no room for {KEY}".encode())
    with pytest.raises(CrossrayError, match=r"got status 503: no room for \[key\] in 4 tries") as error:
        endpoint(talker).ask(ASKED)
    assert error.value.exit_code == 1
    assert len(talker.requests) == 4


def test_slow_answers_and_closed_ports_are_faults_too(talker: Talker) -> None:
    talker.delay_seconds = 0.5
    with pytest.raises(CrossrayError, match=r"no answer within 0.1 s in 2 tries"):
        endpoint(talker, timeout=0.1, max_retries=1).ask(ASKED)
    closed = Endpoint(EndpointOptions("http://127.0.0.1:9/v1", None, 1.0, 1, 0.01), {})
    with pytest.raises(CrossrayError, match=r"ConnectError.* in 2 tries"):
        closed.ask(ASKED)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 302])
def test_a_refusal_ends_at_once_with_the_servers_words_but_not_the_key(talker: Talker, status: int) -> None:
    talker.reply = lambda _: (status, {"Location": "http://127.0.0.1:9/"}, f"bad key {KEY}".encode())
    with pytest.raises(InputError, match=rf"status {status}: bad key \[key\]") as error:
        endpoint(talker).ask(ASKED)
    assert len(talker.requests) == 1
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "body",
    [b"", b"not json", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"\xff"],
)
def test_a_reply_without_text_is_an_empty_answer(talker: Talker, body: bytes) -> None:
    talker.reply = lambda _: (200, {}, body)
    assert endpoint(talker).ask(ASKED).text == ""


def test_a_key_in_an_answer_is_blotted_out(talker: Talker) -> None:
    talker.reply = lambda request: chat_reply(f"your header was {request.key}")
    assert endpoint(talker).ask(ASKED).text == "your header was Bearer [key]"


def test_stop_ends_the_waiting_of_another_thread(talker: Talker) -> None:
    talker.reply = lambda _: (429, {"Retry-After": "30"}, b"")
    asked = endpoint(talker)
    timer = threading.Timer(0.2, asked.stop)
    timer.start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        asked.ask(ASKED)
    assert time.monotonic() - started < 5
    timer.join()


def test_a_key_is_read_from_its_variable_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    assert read_key("SOME_KEY") == KEY
    assert read_key(None) is None
    monkeypatch.setenv("SOME_KEY", "")
    with pytest.raises(InputError, match="SOME_KEY"):
        read_key("SOME_KEY")
    assert KEY not in repr(EndpointOptions("http://x", KEY, 1, 1, 1))
