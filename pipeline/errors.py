"""Failures and what may be said of them: two kinds that a user can act on, secrets hidden, and one policy for retries.

`cli.main` turns a CrossrayError into one line and an exit code; code below it catches them only to add where the fault
is and raise again. A `RetryPolicy` repeats a call to a server that is busy or away (the object store, the tracking
server, a language model's endpoint, a cluster that starts) and tells the user when that takes noticeably long. All
other errors propagate with their traceback.

A secret is recognised by its shape. `redacted` is applied to whatever reaches a person or a log: the errors here, the
terminal (terminal.py), the log file (tracking/log_file.py). `has_secret` decides what a section of a run file and a
storage root refuse, because both are recorded, and what a job may not carry.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from tenacity import RetryCallState

_NOTICEABLE_SECONDS = 2.0
"""Waiting for less than this is nothing that a user must know."""

_Result = TypeVar("_Result")


class CrossrayError(Exception):
    """A failure with a message made for the user: what was expected, what came, where, what to do."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        """The message loses every secret that what it quotes may hold."""
        super().__init__(redacted(message))


class InputError(CrossrayError):
    """The user's input is wrong (config, model, corpus, storage): exit code 2, nothing was left behind."""

    exit_code = 2


class ArtifactError(InputError):
    """An artifact on the storage root is damaged, foreign or of another version: exit code 2."""


HIDDEN = "***"
"""In place of a secret."""
_SHORTEST_VALUE = 8
"""Letters of an environment variable's value that is looked for in texts; shorter ones are words, like `test`."""

_NAME = re.compile(
    r"passw|passphrase|pgpass|secret|credential|signature|authorization|bearer|netrc|database_?url|conn\w*_?str"
    r"|(?:keys?|token|auth|jwt|cookies?|creds)(?![a-z])|(?<![a-z])(?:pass|sas|sig|dsn|pat|sid)(?![a-z])"
    r"|(?<=[a-z_])pwd",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<rest>[^\s'\"<>]+)")
_PARAMETER = re.compile(r"(?P<name>[?&;#](?P<word>[\w.%-]+)=)(?P<value>[^&;#\s'\"<>]+)")
_SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|(?<=Bearer )[\w.~+/-]{8,}=*|(?<=Basic )[A-Za-z0-9+/]{8,}=*"
)


def redacted(text: str) -> str:
    """The text without passwords and signatures of URLs, tokens of known shapes, and this process's own secrets."""
    text = _without_shapes(text)
    for value in _own_secrets():
        text = text.replace(value, HIDDEN)
    return text


def has_secret(text: str) -> bool:
    """Whether a value shows a secret by its own shape: a URL with credentials, a token."""
    return _without_shapes(text) != text


def is_secret_name(name: str) -> bool:
    """Whether a variable or parameter of this name is likely to hold a secret: API_KEY, DATABASE_URL, sig."""
    return _NAME.search(_CAMEL.sub("_", name)) is not None


def _without_shapes(text: str) -> str:
    return _SHAPES.sub(HIDDEN, _PARAMETER.sub(_plain_parameter, _URL.sub(_plain_url, text)))


def _plain_url(match: re.Match[str]) -> str:
    """The URL without its user's secret: `scheme://user:***@host`; a user without a password stays for databases."""
    scheme, rest = match["scheme"], match["rest"]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    port = authority.rpartition(":")[2]
    is_cut = "@" not in authority and ":" in authority and not port.rstrip("]),.;").isdigit()
    has_password = ":" in authority.partition("@")[0] and "@" in authority
    # A password may hold / and @ that nobody has quoted, so it ends at the last @.
    user, at, host = rest.rpartition("@") if is_cut or has_password else authority.rpartition("@")
    if not at:
        return match[0]
    if not (is_cut or has_password):
        host += rest[len(authority) :]
    name, colon, _ = user.partition(":")
    is_token = not colon and scheme.lower() in ("http://", "https://")
    return f"{scheme}{HIDDEN if is_token else name}{f':{HIDDEN}' if colon else ''}@{host}"


def _plain_parameter(match: re.Match[str]) -> str:
    return f"{match['name']}{HIDDEN}" if is_secret_name(match["word"]) else match[0]


def _own_secrets() -> list[str]:
    """Values of this process's environment variables whose names say that they are secrets, longest first.

    Paths are none: RAY_AUTH_TOKEN_PATH or SSH_AUTH_SOCK.
    """
    values = {value.strip() for name, value in os.environ.items() if is_secret_name(name)}
    long = (value for value in values if len(value) >= _SHORTEST_VALUE and not value.startswith(("/", "~", ".")))
    return sorted((value for value in long if "://" not in value), key=len, reverse=True)


MAX_LINE_LETTERS = 2000
"""Of a message on the terminal: what is longer was meant for no reader."""


def shortened(text: str, limit: int = 80) -> str:
    """One line of at most `limit` letters: of a longer text its beginning and end, and how long it was."""
    line = " ".join(text.split()) if len(text) < 4 * limit else text
    if len(line) <= limit:
        return line
    head, tail = " ".join(text[: limit * 2 // 3].split()), " ".join(text[-limit // 6 :].split())
    return f"{head}...{tail} ({len(text):,} letters)"


def short(value: object) -> str:
    """A value as a message shows it, however large it is."""
    import reprlib  # here, like tenacity below: a message is rare

    shower = reprlib.Repr()
    shower.maxlevel, shower.maxstring, shower.maxother, shower.maxlong = 2, 80, 80, 40
    shower.maxlist = shower.maxtuple = shower.maxdict = 5
    return shortened(shower.repr(value), 160)


def first_line(error: BaseException) -> str:
    """What another library's exception says, on one line; its class where it says nothing."""
    return shortened((str(error).strip().splitlines() or [type(error).__name__])[0], 400)


def causes(error: BaseException, *, with_context: bool = False) -> Iterator[BaseException]:
    """The error and the ones that it was raised from, newest first; with_context adds what was being handled then."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        current = current.__cause__ or (current.__context__ if with_context else None)


class RetryPolicy(NamedTuple):
    """When a failed call is made again: exponential waits with jitter until a deadline or a number of attempts."""

    first_wait_seconds: float
    """Before the second attempt; doubled for each further one. A random part of up to this much is added to each."""
    longest_wait_seconds: float
    """Bound of each wait."""
    deadline_seconds: float | None = None
    """No further attempt starts so long after the first one began; None: max_attempts alone decides."""
    min_attempts: int = 1
    """Made even where the deadline has passed, as after one attempt that took very long."""
    max_attempts: int | None = None
    """None: the deadline alone decides."""
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def call(
        self,
        attempt: Callable[[], _Result],
        *,
        server: str,
        is_transient: Callable[[BaseException], bool],
        describe: Callable[[BaseException], str] = first_line,
        asked_wait: Callable[[BaseException], float] = lambda _: 0.0,
    ) -> _Result:
        """The result of `attempt`, which must be safe to repeat; the last fault is raised as it came.

        server: what does not answer, for the user. asked_wait: seconds for which the fault asks to wait, if it does.
        """
        import logging  # here, like tenacity, so that `crossray --help` does not wait for them

        from tenacity import Retrying, retry_if_exception, wait_exponential_jitter

        log = logging.getLogger(__name__)
        started, told = self.clock(), False
        growing = wait_exponential_jitter(
            multiplier=self.first_wait_seconds, max=self.longest_wait_seconds, jitter=self.first_wait_seconds
        )

        def left() -> float:
            passed = self.clock() - started
            return float("inf") if self.deadline_seconds is None else max(0.0, self.deadline_seconds - passed)

        def is_over(state: "RetryCallState") -> bool:
            number = state.attempt_number
            is_last = self.max_attempts is not None and number >= self.max_attempts
            return is_last or (left() == 0 and number >= self.min_attempts)

        def wait(state: "RetryCallState") -> float:
            longest = min(self.longest_wait_seconds, max(left(), self.first_wait_seconds))
            return min(longest, max(growing(state), asked_wait(_fault(state))))

        def tell(state: "RetryCallState") -> None:
            nonlocal told
            fault, seconds = describe(_fault(state)), state.upcoming_sleep
            log.info("%s: attempt %d: %s; the next in %.1f s", server, state.attempt_number, fault, seconds)
            if not told and self.clock() - started + seconds >= _NOTICEABLE_SECONDS:
                told = True
                log.warning("%s does not answer (%s): trying again %s", server, fault, self._limit())

        result = Retrying(
            retry=retry_if_exception(is_transient),
            stop=is_over,
            wait=wait,
            before_sleep=tell,
            sleep=self.sleep,
            reraise=True,
        )(attempt)
        if told:
            log.info("%s answers again", server)
        return result

    def _limit(self) -> str:
        if self.deadline_seconds is None:
            return f"up to {(self.max_attempts or 1) - 1} times"
        return f"for up to {self.deadline_seconds:.0f} s"


def _fault(state: "RetryCallState") -> BaseException:
    assert state.outcome is not None
    fault = state.outcome.exception()
    assert fault is not None
    return fault
