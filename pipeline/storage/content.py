"""The content of local files as digests, each file read once and remembered.

Every byte counts: two fine-tunes often differ in the middle of a file alone. So that hundreds of gigabytes are not read
at every start, digests of larger files are kept in one file of the user's cache folder (`XDG_CACHE_HOME`, by default
~/.cache), under device and inode, and hold for as long as size and times of the file stay. The time of the last change
of the inode is among them, since nobody can set it. A digest is kept only where the file was last changed some time
before it was read: within a tick of the clock, a second change would not show.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pipeline.storage.filesystem import write_local

DIGEST_LENGTH = 16
"""Hex digits kept of a SHA-256."""

_CHUNK_BYTES = 8 << 20
_NOTICEABLE_BYTES = 2 << 30
"""Reading more than this is said on the terminal."""
_SECONDS_BETWEEN_LINES = 10.0

_log = logging.getLogger(__name__)


class _Seen(NamedTuple):
    """A file as it was when its digest was made."""

    size: int
    mtime_ns: int
    ctime_ns: int
    digest: str


class ContentDigests:
    """Digests of local files, remembered in one file that may be missing, damaged or not writable; None for no file.

    remembered_from: smaller files are read once by every process. settled_ns: how long before the reading a file must
    have been left alone for its digest to be kept.
    """

    def __init__(
        self, path: Path | None, *, remembered_from: int = 1 << 20, settled_ns: int = 2_000_000_000, told_from: int = 0
    ) -> None:
        self.path = path
        self.remembered_from, self.settled_ns = remembered_from, settled_ns
        self.told_from = told_from or _NOTICEABLE_BYTES
        self.num_bytes_read = 0
        self._known: dict[str, _Seen] = {}
        self._is_loaded = False

    def of_file(self, path: Path) -> str:
        """Digest of one file's size and content."""
        return self.of_files([path])[path][:DIGEST_LENGTH]

    def of_group(self, files: Iterable[Path], root: Path) -> str:
        """Digest of several files together, each under its name below `root`."""
        digests = self.of_files(list(files))
        lines = sorted(f"{path.relative_to(root).as_posix()}\0{digest}\n" for path, digest in digests.items())
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:DIGEST_LENGTH]

    def of_files(self, paths: list[Path]) -> dict[Path, str]:
        """SHA-256 of each file; OSError where one cannot be read."""
        if not self._is_loaded:
            self._known, self._is_loaded = self._load(), True
        found, unread = {}, []
        for path in paths:
            state = path.stat()
            seen = self._known.get(_key(state))
            if seen is not None and seen[:3] == (state.st_size, state.st_mtime_ns, state.st_ctime_ns):
                found[path] = seen.digest
            else:
                unread.append(path)
        reading = _Reading(unread, self.told_from)
        learnt: dict[str, _Seen] = {}
        for path in unread:
            before, began = path.stat(), time.time_ns()
            found[path] = reading.digest(path)
            if before.st_ctime_ns + self.settled_ns <= began:
                times = before.st_size, before.st_mtime_ns, before.st_ctime_ns
                learnt[_key(before)] = _Seen(*times, found[path])
        self.num_bytes_read += reading.num_done
        self._known |= learnt
        if any(seen.size >= self.remembered_from for seen in learnt.values()):
            self._keep()
        return found

    def _load(self) -> dict[str, _Seen]:
        """What is remembered; nothing where the file is missing or damaged."""
        if self.path is None:
            return {}
        try:
            rows = json.loads(self.path.read_bytes())
            return {
                key: _Seen(int(size), int(mtime_ns), int(ctime_ns), str(digest))
                for key, (size, mtime_ns, ctime_ns, digest) in rows.items()
            }
        except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
            return {}

    def _keep(self) -> None:
        """Write all that is known, in one step; of two processes at once one may lose what the other learnt."""
        if self.path is None:
            return
        rows = self._load() | {key: seen for key, seen in self._known.items() if seen.size >= self.remembered_from}
        try:
            write_local(self.path, [json.dumps(rows).encode()])
        except OSError as error:
            _log.info("digests of files are not kept for the next run: %s: %s", self.path, error)


class _Reading:
    """Reads files from end to end, and says how far it is where that takes long."""

    def __init__(self, paths: list[Path], told_from: int) -> None:
        self.num_bytes = sum(path.stat().st_size for path in paths)
        self.is_told = self.num_bytes >= told_from
        self.num_done = 0
        self.said = time.monotonic()
        if self.is_told:
            _log.warning(
                "reading %s in %d files from %s on to tell their content; once, it is remembered",
                _gigabytes(self.num_bytes),
                len(paths),
                paths[0],
            )

    def digest(self, path: Path) -> str:
        digest = hashlib.sha256(f"\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                self.num_done += len(chunk)
                if self.is_told and time.monotonic() - self.said >= _SECONDS_BETWEEN_LINES:
                    self.said = time.monotonic()
                    _log.warning("read %s of %s", _gigabytes(self.num_done), _gigabytes(self.num_bytes))
        return digest.hexdigest()


def _key(state: os.stat_result) -> str:
    return f"{state.st_dev}:{state.st_ino}"


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def content_digests() -> ContentDigests:
    """The user's own."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (Path raises for no home)
    return _digests_in(Path(folder) / "crossray" / "digests.json" if os.path.isabs(folder) else None)  # noqa: PTH117


@cache
def _digests_in(path: Path | None) -> ContentDigests:
    """One for each file, so that a command reads nothing twice even where nothing can be kept."""
    return ContentDigests(path)
