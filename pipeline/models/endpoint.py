"""A language model behind an HTTP endpoint that speaks the OpenAI chat protocol: one question, one answer.

The only file that uses the OpenAI client. Overload (429), server errors, timeouts and lost connections are tried again
under our own RetryPolicy, not the client's (max_retries=0): its waits must end when another request has failed for
good, and the user must see them. A refusal (a wrong key, an unknown model) ends the run with the endpoint's own words.
The key comes from an environment variable, goes into one header and is removed from everything that is passed on, also
where the server repeats it.

Requests run on an event loop in a thread of their own, because only there can one limit hold for a whole request: the
timeouts of a blocking client start again with every byte that arrives.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import Any, NamedTuple

from pipeline.errors import CrossrayError, InputError, RetryPolicy

_LONGEST_WAIT_SECONDS = 60.0
_MAX_QUOTED_LETTERS = 300
_MOST_TOKENS = 100_000_000
"""Of one request; a larger count is no count."""
_REMOVED_KEY = "[key]"


class EndpointOptions(NamedTuple):
    """Where the model is and how long to wait for it."""

    base_url: str
    api_key: str | None
    timeout_seconds: float
    """For one attempt, from the first byte sent to the last one read."""
    max_retries: int
    backoff_seconds: float

    def __repr__(self) -> str:
        """Without the key."""
        return f"EndpointOptions({self.base_url!r})"


class Answer(NamedTuple):
    """What came back from one request."""

    text: str
    """Empty where the reply had no text."""
    tokens_in: int
    """As the endpoint counts them; 0 where it does not."""
    tokens_out: int


class Stopped(Exception):  # noqa: N818
    """Another request failed for good, so this one was given up."""


class _TransientFault(Exception):  # noqa: N818
    """An attempt failed in a way that may pass."""

    def __init__(self, text: str, wait_seconds: float = 0.0) -> None:
        super().__init__(text)
        self.wait_seconds = wait_seconds
        """For which the endpoint asks not to be called."""


def read_key(api_key_env: str | None) -> str | None:
    """The key from its environment variable; None where none is named, an InputError where it is not set."""
    if api_key_env is None:
        return None
    key = os.environ.get(api_key_env, "").strip()
    if not key:
        raise InputError(
            f"resources.autointerp.api_key_env: expected a key in the environment variable {api_key_env}, got none; "
            "set it, or set api_key_env to null for an endpoint without keys"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(
            f"resources.autointerp.api_key_env: expected a key of plain letters, digits and signs in {api_key_env}, "
            f"got one of {len(key)} characters with a space, a control character or a letter beyond ASCII (a "
            "BOM, a line break); set it again"
        )
    return key


class Endpoint:
    """A chat endpoint, usable from many threads.

    Args of the constructor: `fields`, sent with every request (model, temperature ...); `sleep`, how to wait between
    attempts: by default until `stop`.
    """

    def __init__(
        self, options: EndpointOptions, fields: Mapping[str, Any], *, sleep: Callable[[float], None] | None = None
    ) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Omit

        self._options = options
        self._fields = dict(fields)
        self._url = f"{options.base_url}/chat/completions"
        self._stop = threading.Event()
        self._retries = RetryPolicy(
            first_wait_seconds=options.backoff_seconds,
            longest_wait_seconds=_LONGEST_WAIT_SECONDS,
            max_attempts=options.max_retries + 1,
            sleep=sleep or self._wait,
        )
        # The client would fill these from environment variables of its own, and follow redirects with the key.
        unwanted = ["OpenAI-Organization", "OpenAI-Project", *([] if options.api_key else ["Authorization"])]
        self._headers = {name: Omit() for name in unwanted}
        self._client = AsyncOpenAI(
            base_url=options.base_url,
            api_key=options.api_key or "none",
            max_retries=0,
            timeout=None,
            http_client=DefaultAsyncHttpxClient(follow_redirects=False),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="crossray-endpoint", daemon=True)
        self._thread.start()

    def ask(self, messages: Sequence[Mapping[str, str]]) -> Answer:
        """The model's answer, with an empty text where the reply could not be read.

        InputError where the endpoint refuses, CrossrayError where it stays silent or overloaded, Stopped after `stop`.
        """
        try:
            return self._retries.call(
                partial(self._attempt, messages),
                server=self._url,
                is_transient=lambda error: isinstance(error, _TransientFault),
                asked_wait=lambda error: error.wait_seconds if isinstance(error, _TransientFault) else 0.0,
            )
        except _TransientFault as fault:
            raise CrossrayError(
                f"resources.autointerp.base_url: expected an answer from {self._url}, got {fault} in "
                f"{self._options.max_retries + 1} tries; answers so far are kept: run again later, lower "
                "resources.autointerp.concurrency, or set analyses.autointerp to null"
            ) from None

    def stop(self) -> None:
        """End all waiting, so that threads return soon; requests under way are still answered."""
        self._stop.set()

    def close(self) -> None:
        """End all waiting and all requests, and close the connections."""
        self.stop()
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, seconds: float) -> None:
        self._stop.wait(seconds)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()

    def _attempt(self, messages: Sequence[Mapping[str, str]]) -> Answer:
        """One request. Faults are raised without the client's own, which hold the request and its headers."""
        from openai import APIConnectionError, APIStatusError

        if self._stop.is_set():
            raise Stopped
        try:
            return asyncio.run_coroutine_threadsafe(self._request(messages), self._loop).result()
        except CancelledError:
            raise Stopped from None
        except TimeoutError:
            raise _TransientFault(f"no answer within {self._options.timeout_seconds:g} s") from None
        except APIConnectionError as error:
            cause = error.__cause__ or error
            raise _TransientFault(self._quoted(f"{type(cause).__name__}: {cause}")) from None
        except APIStatusError as error:
            status, words = error.status_code, self._quoted(error.response.text)
            if status in (408, 429) or status >= 500:
                wait_seconds = _seconds(error.response.headers.get("retry-after"))
                raise _TransientFault(f"status {status}: {words}", wait_seconds) from None
            raise InputError(
                f"resources.autointerp: {self._url} refused the request with status {status}: {words}; correct "
                "base_url, the key, or analyses.autointerp.model and its fields"
            ) from None

    async def _request(self, messages: Sequence[Mapping[str, str]]) -> Answer:
        async with asyncio.timeout(self._options.timeout_seconds):
            reply = await self._client.chat.completions.create(
                messages=list(messages),  # type: ignore[arg-type]  # plain dictionaries of the same keys
                model=self._fields["model"],
                extra_body=self._fields,
                extra_headers=self._headers,
            )
        try:
            text, usage = reply.choices[0].message.content, reply.usage
        except (AttributeError, IndexError, TypeError):  # the client hands on what is no reply as it came
            return Answer("", 0, 0)
        tokens_in, tokens_out = (_count(usage, name) for name in ("prompt_tokens", "completion_tokens"))
        return Answer(self._without_key(text) if isinstance(text, str) else "", tokens_in, tokens_out)

    def _quoted(self, text: str) -> str:
        """What an error message may quote of a server's words."""
        return " ".join(self._without_key(text).split())[:_MAX_QUOTED_LETTERS]

    def _without_key(self, text: str) -> str:
        """The text as UTF-8 can hold it, without half characters."""
        key = self._options.api_key
        whole = text.encode("utf-8", "replace").decode()
        return whole.replace(key, _REMOVED_KEY) if key else whole


def _count(usage: object, name: str) -> int:
    """Tokens as the endpoint counts them; 0 where it does not, or absurdly."""
    value = getattr(usage, name, 0)
    return value if type(value) is int and 0 <= value <= _MOST_TOKENS else 0


def _seconds(retry_after: str | None) -> float:
    """Seconds of a Retry-After header; 0 without one, or where it is a date."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        return 0.0
