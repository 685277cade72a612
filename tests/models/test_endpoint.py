"""The endpoint against a real server: patience within limits, refusals at once, and a key that never shows."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from talker import Reply, Talker, chat_reply, talking

from pipeline.errors import CrossrayError, InputError
from pipeline.models.endpoint import Answer, Endpoint, EndpointOptions, Stopped, read_key

KEY = "sk-very-secret-1234"
ASKED = [{"role": "user", "content": "hello"}]


@pytest.fixture
def talker() -> Iterator[Talker]:
    with talking() as server:
        server.reply = lambda _: chat_reply("hello back")
        yield server


Making = Callable[..., Endpoint]


@pytest.fixture
def endpoint(talker: Talker) -> Iterator[Making]:
    """Makes endpoints that ask the talker, or another address; they are closed after the test."""
    made: list[Endpoint] = []

    def make(
        *,
        url: str = talker.url,
        timeout: float = 5.0,
        max_retries: int = 3,
        key: str | None = KEY,
        sleep: Callable[[float], None] | None = None,
    ) -> Endpoint:
        fields = {"model": "m", "temperature": 0.0}
        made.append(Endpoint(EndpointOptions(url, key, timeout, max_retries, 0.01), fields, sleep=sleep))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_request_follows_the_protocol_and_its_answer_is_read(talker: Talker, endpoint: Making) -> None:
    assert endpoint().ask(ASKED) == Answer("hello back", 100, 10)
    (request,) = talker.requests
    assert request.path == "/v1/chat/completions"
    assert request.key == f"Bearer {KEY}"
    assert request.body == {"model": "m", "temperature": 0.0, "messages": ASKED}


def test_no_key_sends_no_header(talker: Talker, endpoint: Making) -> None:
    endpoint(key=None).ask(ASKED)
    assert talker.requests[0].key == ""


@pytest.mark.parametrize("status", [429, 408, 500, 503])
def test_overload_and_server_errors_are_waited_out(talker: Talker, endpoint: Making, status: int) -> None:
    replies = iter([(status, {}, b"busy")] * 3)
    talker.reply = lambda _: next(replies, None) or chat_reply("at last")
    assert endpoint().ask(ASKED).text == "at last"
    assert len(talker.requests) == 4


def test_the_wait_that_the_server_asks_for_is_kept(talker: Talker, endpoint: Making) -> None:
    replies = iter([(429, {"Retry-After": "7.5"}, b"busy")])
    talker.reply = lambda _: next(replies, None) or chat_reply("at last")
    waits: list[float] = []
    assert endpoint(sleep=waits.append).ask(ASKED).text == "at last"
    assert waits == [7.5]


def test_patience_ends_with_the_last_fault_in_the_message(talker: Talker, endpoint: Making) -> None:
    talker.reply = lambda _: (503, {}, f"no room for {KEY}".encode())
    with pytest.raises(CrossrayError, match=r"got status 503: no room for \[key\] in 4 tries") as error:
        endpoint().ask(ASKED)
    assert error.value.exit_code == 1
    assert len(talker.requests) == 4


def test_slow_answers_and_closed_ports_are_faults_too(talker: Talker, endpoint: Making) -> None:
    talker.delay_seconds = 0.5
    with pytest.raises(CrossrayError, match=r"no answer within 0.1 s in 2 tries"):
        endpoint(timeout=0.1, max_retries=1).ask(ASKED)
    with pytest.raises(CrossrayError, match=r"ConnectError.* in 2 tries"):
        endpoint(url="http://127.0.0.1:9/v1", max_retries=1).ask(ASKED)


@contextmanager
def dripping(start: bytes) -> Iterator[str]:
    """The address of a server that sends `start` and then a letter every few milliseconds, without an end."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(start)
                while not ended.wait(0.01):
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        ended.set()
        thread.join()


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nX-", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"])
def test_an_endpoint_that_drips_is_given_up_in_head_and_body(endpoint: Making, start: bytes) -> None:
    """One limit holds for the whole attempt, though no single wait for a byte is long."""
    with dripping(start) as url, pytest.raises(CrossrayError, match=r"no answer within 0.3 s in 1 tries"):
        endpoint(url=url, timeout=0.3, max_retries=0).ask(ASKED)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 302])
def test_a_refusal_ends_at_once_with_the_servers_words_but_not_the_key(
    talker: Talker, endpoint: Making, status: int
) -> None:
    talker.reply = lambda _: (status, {"Location": "http://127.0.0.1:9/"}, f"bad key {KEY}".encode())
    with pytest.raises(InputError, match=rf"status {status}: bad key \[key\]") as error:
        endpoint().ask(ASKED)
    assert len(talker.requests) == 1
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "body",
    [b"", b"not json", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"\xff"],
)
def test_a_reply_without_text_is_an_empty_answer(talker: Talker, endpoint: Making, body: bytes) -> None:
    talker.reply = lambda _: (200, {}, body)
    assert endpoint().ask(ASKED).text == ""


@pytest.mark.parametrize("count", ["1e30", "-1", "true", '"7"', "1" + "0" * 40, "null", "[1]"])
def test_absurd_counts_of_tokens_count_as_none(talker: Talker, endpoint: Making, count: str) -> None:
    usage = f'{{"prompt_tokens": {count}, "completion_tokens": 7}}'
    talker.reply = lambda _: (200, {}, f'{{"choices": [{{"message": {{"content": "a"}}}}], "usage": {usage}}}'.encode())
    assert endpoint().ask(ASKED) == ("a", 0, 7)


def test_half_characters_of_an_answer_are_replaced(talker: Talker, endpoint: Making) -> None:
    talker.reply = lambda _: (200, {}, b'{"choices": [{"message": {"content": "a \\ud83d b"}}]}')
    assert endpoint().ask(ASKED).text == "a ? b"


def test_a_key_in_an_answer_is_removed(talker: Talker, endpoint: Making) -> None:
    talker.reply = lambda request: chat_reply(f"your header was {request.key}")
    assert endpoint().ask(ASKED).text == "your header was Bearer [key]"


def test_stop_ends_the_waiting_between_attempts(talker: Talker, endpoint: Making) -> None:
    asked = endpoint()

    def stop(_: object) -> Reply:
        asked.stop()
        return 429, {"Retry-After": "50"}, b""

    talker.reply = stop
    with pytest.raises(Stopped):
        asked.ask(ASKED)
    assert len(talker.requests) == 1


def test_closing_ends_a_request_under_way(talker: Talker, endpoint: Making) -> None:
    asked = endpoint(timeout=60.0)
    arrived, left = threading.Event(), threading.Event()

    def silent(_: object) -> Reply:
        arrived.set()
        left.wait(30)
        return chat_reply("too late")

    talker.reply = silent
    closing = threading.Thread(target=lambda: (arrived.wait(30), asked.close()))
    closing.start()
    with pytest.raises(Stopped):
        asked.ask(ASKED)
    left.set()
    closing.join()


def test_the_clients_own_variables_send_nothing(
    talker: Talker, endpoint: Making, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, "http://not-meant-for-this-endpoint")
    endpoint(key=None).ask(ASKED)
    (request,) = talker.requests
    assert request.key == ""
    assert not [value for value in request.headers.values() if "not-meant" in value]


def test_a_key_is_read_from_its_variable_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    assert read_key("SOME_KEY") == KEY
    assert read_key(None) is None
    monkeypatch.setenv("SOME_KEY", "")
    with pytest.raises(InputError, match="SOME_KEY"):
        read_key("SOME_KEY")
    assert KEY not in repr(EndpointOptions("http://x", KEY, 1, 1, 1))
