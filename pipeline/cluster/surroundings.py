"""What Ray needs of this machine and its network, checked before Ray, which would wait or die without a word."""

import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

from pipeline.errors import InputError, first_line

_CONNECT_SECONDS = 5.0
_LONGEST_FOLDER = 38
"""Letters: with the names of Ray's session below it, a socket's path has at most 107."""
_FEWEST_FILES, _ENOUGH_FILES = 512, 65_536
_CURRENT_CLUSTER = "ray_current_cluster"
"""In Ray's folder: the address of the cluster that was started last on this machine."""


def check_address(address: str) -> None:
    """Raise an InputError where nobody listens at a cluster's address: Ray tries for two minutes, then exits."""
    found = os.environ.get("RAY_ADDRESS") or _last_cluster() if address == "auto" else address
    if found is None or found == "local":
        return  # Ray says at once that there is none
    where = "resources.cluster.address" if address != "auto" else "resources.cluster.address: auto"
    expected = f"{where}: expected a running Ray cluster at host:port, got {found!r}"
    host, colon, port = found.removeprefix("ray://").strip("/").rpartition(":")
    if not (colon and host and port.isascii() and port.isdecimal() and 0 < int(port) < 65_536):
        raise InputError(
            f"{expected}; correct it{' (RAY_ADDRESS)' if address == 'auto' else ''}, or use address: local"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"{expected}, where nobody answers ({first_line(error)}); start one with `ray start --head` or use "
            "address: local"
        ) from error


def _last_cluster() -> str | None:
    for folder in _folders():
        with suppress(OSError):
            return (folder / "ray" / _CURRENT_CLUSTER).read_text().strip() or None
    return None


def _folders() -> list[Path]:
    named = [os.environ.get("RAY_TMPDIR"), os.environ.get("TMPDIR"), "/tmp", tempfile.gettempdir()]
    return [Path(name) for name in named if name]


def ray_folder() -> str:
    """Where a local cluster keeps its sockets and logs: the first usable one of RAY_TMPDIR, TMPDIR and /tmp."""
    for folder in _folders():
        if len(os.fsencode(folder.absolute())) <= _LONGEST_FOLDER and _is_writable(folder):
            return str(folder.absolute() / "ray")
    raise InputError(
        f"RAY_TMPDIR: expected a folder for Ray that can be written to and whose path has at most {_LONGEST_FOLDER} "
        f"letters, got none among {', '.join(dict.fromkeys(map(str, _folders())))}; set RAY_TMPDIR to one"
    )


def object_folder(fallback: str, shared: Path = Path("/dev/shm")) -> str | None:
    """Where Ray is to map its objects: `fallback` where the shared memory of this machine cannot be written to."""
    return None if not shared.is_dir() or _is_writable(shared) else fallback


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder if not (folder / "ray").exists() else folder / "ray"):
            return True
    except OSError:
        return False


def allow_files() -> None:
    """Let this process and its children open as many files as the system allows; an InputError where those are few."""
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < _FEWEST_FILES:
        raise InputError(
            f"ulimit -n: expected at least {_FEWEST_FILES} open files for a process, got at most {most}; ask for more"
        )
