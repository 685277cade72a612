"""One writer at a time: who makes an artifact holds its lock, and whoever comes second is told who that is.

On a local root the kernel keeps the lock (flock), so it ends with its process however that ends. On an object store,
and where a file system has no such locks, a lock is a small file that its holder renews: one that was not renewed for
STALE_SECONDS, or whose process was on this machine and is gone, is nobody's.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import CrossrayError
from pipeline.storage.filesystem import Storage
from pipeline.storage.repeating import repeating

FOLDER = "locks"
"""Below the storage root; gone while nobody works there."""
STALE_SECONDS = 120.0
_RENEWAL_SECONDS = 20.0
_NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_WAIT_SECONDS = 0.2


class HeldError(CrossrayError):
    """Someone else holds the lock."""


@contextmanager
def locked(storage: Storage, names: list[str], run_name: str) -> Iterator[None]:
    """Hold the locks of these artifacts or folders for the length of the block; HeldError where one is held."""
    owner = {"run": run_name, "host": socket.gethostname(), "pid": os.getpid()}
    with ExitStack() as stack:
        for name in sorted(names):
            stack.enter_context(_one(storage, name, owner))
        yield


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait for the lock of a local path and hold it for the length of the block."""
    while (file := _flocked(path, b"")) is None:
        time.sleep(_WAIT_SECONDS)
    try:
        yield
    finally:
        _release(path, file)


@contextmanager
def _one(storage: Storage, name: str, owner: dict[str, Any]) -> Iterator[None]:
    key = f"{FOLDER}/{name.replace('/', '-')}.lock"
    path = storage.local_path(key)
    if path is not None:
        try:
            file = _flocked(path, json.dumps(owner).encode())
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise CrossrayError(f"{path}: cannot make a lock there: {error.strerror}") from error
            path = None
        else:
            if file is None:
                raise _held(storage.url(name), _read(storage, key))
            try:
                yield
            finally:
                _release(path, file)
            return
    with _leased(storage, key, name, owner):
        yield


def _flocked(path: Path, content: bytes) -> int | None:
    """The open file of a lock that is now ours; None where another process has it."""
    import fcntl  # not on Windows, where Ray has no clusters either

    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(file).st_ino:
                    os.truncate(file, 0)
                    os.write(file, content)
                    return file
        except BlockingIOError:
            os.close(file)
            return None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its former holder has removed it meanwhile


def _release(path: Path, file: int) -> None:
    path.unlink(missing_ok=True)
    os.close(file)
    with suppress(OSError):  # others hold locks in this folder
        path.parent.rmdir()


@contextmanager
def _leased(storage: Storage, key: str, name: str, owner: dict[str, Any]) -> Iterator[None]:
    holder = _read(storage, key)
    if holder and not _is_stale(holder):
        raise _held(storage.url(name), holder)

    def renew() -> None:
        with suppress(CrossrayError):  # a store that is away is told by whoever writes an artifact there
            storage.write_json(key, {**owner, "renewed": time.time()})

    storage.write_json(key, {**owner, "renewed": time.time()})
    try:
        with repeating(renew, seconds=_RENEWAL_SECONDS, name="crossray-lock"):
            yield
    finally:
        with suppress(CrossrayError):
            storage.delete(key)


def _read(storage: Storage, key: str) -> dict[str, Any]:
    """Who holds a lock; empty where nobody does, or where it cannot be told."""
    with suppress(CrossrayError):
        found = storage.read_json(key) if storage.exists(key) else {}
        return found if isinstance(found, dict) else {}
    return {}


def _is_stale(holder: dict[str, Any]) -> bool:
    renewed = holder.get("renewed")
    if not isinstance(renewed, (int, float)) or time.time() - renewed > STALE_SECONDS:
        return True
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _held(what: str, holder: dict[str, Any]) -> HeldError:
    who = f"run {holder.get('run', '?')!r}, process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    return HeldError(
        f"{what}: expected to be its only writer, got one already at work ({who}); wait for it to end and run again, "
        "which takes over what it has made, or name another storage.root"
    )
