"""Faults of the storage: whether trying again may help, and the line that tells the user what to do.

A transient fault of an object store (503, 500, 429, a timeout, a cut connection) is tried again under RETRIES, or under
FIRST_RETRIES while the store has never answered: then the address is more likely wrong than the service down. Below
this, s3fs sends a single request (a part of a large upload) up to REQUEST_ATTEMPTS times. Everything else is explained
at once. filesystem.py does the trying; nothing here reads or writes.
"""

import errno
from http.client import IncompleteRead
from typing import Any

from pipeline.errors import InputError, RetryPolicy, causes

RETRIES = RetryPolicy(first_wait_seconds=0.2, longest_wait_seconds=20.0, deadline_seconds=300.0, min_attempts=3)
FIRST_RETRIES = RETRIES._replace(deadline_seconds=10.0)
REQUEST_ATTEMPTS = 3
READ_TIMEOUT_SECONDS = 30
CONNECT_TIMEOUT_SECONDS = 10
_MENDED_ELSEWHERE = (
    *(errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST, errno.ELOOP),
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE),
)
"""Faults of a local folder that another one may not have."""
_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
_TRANSIENT_CODES = ("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted")


def client_options(scheme: str) -> dict[str, Any]:
    """Arguments for the file system of this kind of URL: timeouts, and no retries of botocore's own."""
    if scheme not in ("s3", "s3a"):
        return {}
    return {
        "config_kwargs": {
            "retries": {"max_attempts": 1, "mode": "standard"},
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "read_timeout": READ_TIMEOUT_SECONDS,
        }
    }


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    import aiohttp
    from botocore.exceptions import ConnectionError as ClientConnectionError
    from botocore.exceptions import HTTPClientError
    from botocore.parsers import ResponseParserError

    passing = (
        *(TimeoutError, ConnectionError, IncompleteRead, aiohttp.ClientError),
        *(ClientConnectionError, HTTPClientError, ResponseParserError),
    )
    for cause in causes(error):
        status, code = _answer(cause)
        if isinstance(cause, passing) or status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES:
            return True
    return False


def explain(error: Exception, action: str, url: str) -> InputError | None:
    """The user's line for a fault: what was tried, what came, what to do; None for what no user can mend."""
    tried = f"cannot {action} {url}"
    if "://" in url and (line := _explain_service(error, tried)):
        return InputError(line)
    if isinstance(error, FileNotFoundError):
        missing = error.filename or error.args[0] if error.args else url
        return InputError(f"{tried}: no such file, folder or bucket ({missing})")
    if isinstance(error, PermissionError):
        return InputError(f"{tried}: permission or credentials refused ({error}); set storage.root to a writable place")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(
            f"{tried}: no space left; free some or set storage.root elsewhere, then run again: what was finished is "
            "kept"
        )
    if isinstance(error, OSError) and error.errno in _MENDED_ELSEWHERE:
        return InputError(f"{tried}: {error.strerror}; set storage.root elsewhere")
    return None


def _explain_service(error: Exception, tried: str) -> str | None:
    """The line for a fault of an object store."""
    from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError

    came = describe(error)
    codes = {_answer(cause)[1] for cause in causes(error)}
    if "InvalidObjectState" in codes:
        return f"{tried}: the object is in an archive and cannot be read ({came}); restore it, then run again"
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return f"{tried}: no credentials ({came}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if isinstance(error, PermissionError):
        return (
            f"{tried}: the object store refused the credentials ({came}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and what they may do with this bucket"
        )
    if "NoSuchBucket" in codes:
        return f"{tried}: no such bucket; make it or correct storage.root"
    if isinstance(error, FileNotFoundError):
        return None
    if is_transient(error):
        return (
            f"{tried}: the object store gave no good answer ({came}); check AWS_ENDPOINT_URL and the service, then run "
            "again: what was finished is kept"
        )
    if isinstance(error, (BotoCoreError, OSError)) or "endpoint" in str(error).lower():
        return f"{tried}: the object store refused ({came}); check storage.root and the AWS_* variables"
    return None


def describe(error: BaseException) -> str:
    """Class, code and message of a fault in one line."""
    codes = [code for cause in causes(error) if (code := _answer(cause)[1])]
    message = " ".join(str(error).split())
    named = codes[0] if codes else type(error).__name__
    return named if message in ("", "None", named) else f"{named}: {message}"


def _answer(error: BaseException) -> tuple[int | None, str | None]:
    """HTTP status and error code of a service's answer, where the fault carries one."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return None, None
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode"), response.get("Error", {}).get("Code")
