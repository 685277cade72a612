"""Asking a language model over HTTP: one call of the OpenAI chat protocol, with patience and without secrets in sight.

The only file that speaks HTTP. Overload (429), server errors, time-outs and lost connections are waited out within a
limit; a refusal (a wrong key, an unknown model) ends the run with the endpoint's own words. The key comes from an
environment variable, goes into one header and is blotted out of everything that is passed on, also where the server
sends it back. httpx2 is used because huggingface_hub brings it along and its client may be shared by threads.
"""

import os
import random
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import httpx2

from pipeline.errors import CrossrayError, InputError

_LONGEST_WAIT_SECONDS = 60.0
_SHOWN_LETTERS = 300
_BLOTTED = "[key]"


class EndpointOptions(NamedTuple):
    """Where and how to ask."""

    base_url: str
    api_key: str | None
    timeout_seconds: float
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
    return key


class Endpoint:
    """A chat endpoint, usable from many threads. `fields` are sent with every request (model, temperature ...)."""

    def __init__(self, options: EndpointOptions, fields: Mapping[str, Any]) -> None:
        self._options = options
        self._fields = dict(fields)
        self._url = f"{options.base_url}/chat/completions"
        self._stop = threading.Event()
        headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        limits = httpx2.Limits(max_connections=None)
        self._client = httpx2.Client(headers=headers, timeout=options.timeout_seconds, limits=limits)

    def ask(self, messages: Sequence[Mapping[str, str]]) -> Answer:
        """The model's answer, with an empty text where the reply could not be read.

        InputError where the endpoint refuses, CrossrayError where it stays silent or overloaded, Stopped after `stop`.
        """
        body = {**self._fields, "messages": list(messages)}
        for attempt in range(self._options.max_retries + 1):
            if self._stop.is_set():
                raise Stopped
            fault, wait = self._try(body)
            if isinstance(fault, Answer):
                return fault
            if attempt < self._options.max_retries:
                doubled = self._options.backoff_seconds * 2.0**attempt * random.uniform(0.75, 1.25)
                self._stop.wait(min(max(doubled, wait), _LONGEST_WAIT_SECONDS))
        raise CrossrayError(
            f"resources.autointerp.base_url: expected an answer from {self._url}, got {fault} in "
            f"{self._options.max_retries + 1} tries; answers so far are kept: run again later, lower "
            "resources.autointerp.concurrency, or set analyses.autointerp to null"
        )

    def stop(self) -> None:
        """End all waiting, so that threads return soon."""
        self._stop.set()

    def close(self) -> None:
        """End all waiting and close the connections."""
        self.stop()
        self._client.close()

    def _try(self, body: Mapping[str, Any]) -> tuple[Answer | str, float]:
        """An answer, or what stood in its way and how many seconds the endpoint wants to be left alone."""
        try:
            response = self._client.post(self._url, json=body)
        except httpx2.TimeoutException:
            return f"no answer within {self._options.timeout_seconds:g} s", 0.0
        except httpx2.RequestError as error:
            return self._shown(f"{type(error).__name__}: {error}"), 0.0
        except RuntimeError:  # the client was closed under us
            if self._stop.is_set():
                raise Stopped from None
            raise
        status = response.status_code
        if status == 429 or status == 408 or status >= 500:
            return self._shown(f"status {status}: {response.text}"), _retry_after(response)
        if status != 200:
            raise InputError(
                f"resources.autointerp: {self._url} refused the request with status {status}: "
                f"{self._shown(response.text)}; correct base_url, the key, or analyses.autointerp.model and its fields"
            )
        return self._read(response), 0.0

    def _read(self, response: httpx2.Response) -> Answer:
        try:
            reply = response.json()
        except ValueError:
            return Answer("", 0, 0)
        text = _at(reply, "choices", 0, "message", "content")
        tokens = [_at(reply, "usage", name) for name in ("prompt_tokens", "completion_tokens")]
        tokens_in, tokens_out = (one if isinstance(one, int) and one >= 0 else 0 for one in tokens)
        return Answer(self._blotted(text) if isinstance(text, str) else "", tokens_in, tokens_out)

    def _shown(self, text: str) -> str:
        """What an error message may show of a server's words."""
        return " ".join(self._blotted(text).split())[:_SHOWN_LETTERS]

    def _blotted(self, text: str) -> str:
        key = self._options.api_key
        return text.replace(key, _BLOTTED) if key else text


def _at(value: Any, *path: str | int) -> Any:
    """The value at a path of keys and indices, or None where the path ends early."""
    for step in path:
        if isinstance(step, str) and isinstance(value, dict):
            value = value.get(step)
        elif isinstance(step, int) and isinstance(value, list) and len(value) > step:
            value = value[step]
        else:
            return None
    return value


def _retry_after(response: httpx2.Response) -> float:
    """Seconds of a Retry-After header; 0 without one, or where it is a date."""
    try:
        return max(0.0, float(response.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0
