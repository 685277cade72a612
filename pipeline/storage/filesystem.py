"""All reading and writing, over one fsspec file system: a local folder or an object store.

A `Storage` is only a root URL, so it can be sent to any worker; keys below it are plain `a/b/c` strings. Writing is
atomic: locally a temporary name and a rename, on an object store one put, or parts that are joined last.
No other file of the package builds a path under the root. An object store's transient faults are tried again
(faults.py); the client finds credentials itself (`AWS_*` variables for s3).
"""

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from pipeline.errors import InputError, first_line, has_secret
from pipeline.storage import faults as storage_faults

_TEMPORARY_MARK = ".tmp-"
_PIECE_BYTES = 1 << 20
_FLUSH_BYTES = 8 << 20
_NO_PLACES = ("memory", "http", "https", "data")
"""Kinds of URLs that no other process sees or that nobody can write to."""
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az")
_HAS_ADVICE = hasattr(os, "posix_fadvise")

_Result = TypeVar("_Result")


class Storage:
    """Files under one root URL, addressed by keys with forward slashes.

    Args of the constructor: `root`, a local path or any URL that fsspec knows (s3://bucket/prefix, file:///...).
    """

    def __init__(self, root: str) -> None:
        _check_root(root)
        self._has_answered = False
        self.is_local = _scheme(root) in ("", "file")
        self.root = _local_root(root) if self.is_local else root.rstrip("/")

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {
            "is_local": self.is_local,
            "root": self.root,
            "_has_answered": self._has_answered,
        }  # the file system holds sockets, so it is made again after unpickling

    @cached_property
    def _fs(self) -> Any:
        try:
            fs, _ = fsspec.core.url_to_fs(self.root, **storage_faults.client_options(urlsplit(self.root).scheme))
        except (ImportError, ValueError) as error:
            raise InputError(
                f"storage.root: expected a path or a URL that fsspec knows, got {self.root!r}: {error}"
            ) from error
        except Exception as error:  # some file systems connect at once, and each has errors of its own
            raise InputError(
                f"storage.root: expected a place that answers, got {self.root!r}: {first_line(error)}; correct the "
                "address, or try again when it can be reached"
            ) from error
        fs.retries = storage_faults.REQUEST_ATTEMPTS  # s3fs's own attribute
        return fs

    def url(self, key: str = "") -> str:
        """The full path or URL of a key."""
        return f"{self.root}/{key}" if key else self.root

    def exists(self, key: str) -> bool:
        """Whether a file or folder of this name is there (never a cached answer)."""
        self._fs.invalidate_cache()
        return bool(self._do("look for", key, lambda: self._fs.exists(self.url(key))))

    def read_bytes(self, key: str) -> bytes:
        """The whole content of a file."""
        return bytes(self._do("read", key, lambda: self._fs.cat_file(self.url(key))))

    def read_json(self, key: str) -> Any:
        """The parsed content of a JSON file."""
        data = self.read_bytes(key)
        try:
            return json.loads(data)
        except ValueError as error:
            raise InputError(
                f"{self.url(key)}: expected JSON, got {data[:40]!r}: {error}; "
                "remove the artifact's folder to make it again"
            ) from error

    def read_with(self, key: str, read: Callable[[Any], _Result]) -> _Result:
        """What `read` makes of the open file, which it may search: parts of a large file are fetched alone.

        read: called again with a fresh file where the object store fails meanwhile.
        """

        def attempt() -> _Result:
            with self._fs.open(self.url(key), "rb", cache_type="none") as file:
                return read(file)

        return self._do("read", key, attempt)

    def local_path(self, key: str) -> Path | None:
        """The path of a file on this machine, for mapping it into memory; None on an object store."""
        return Path(self.url(key)) if self.is_local else None

    def size(self, key: str) -> int:
        """Bytes of a file (never a cached answer)."""
        self._fs.invalidate_cache()
        return int(self._do("look for", key, lambda: self._fs.size(self.url(key))))

    def digest(self, key: str) -> tuple[int, str]:
        """Size and SHA-256 of a file, read in small pieces where it is local."""
        if not self.is_local:
            data = self.read_bytes(key)
            return len(data), hashlib.sha256(data).hexdigest()
        return self._do("read", key, lambda: _local_digest(Path(self.url(key))))

    def read_ahead(self, key: str) -> None:
        """Ask the operating system to bring a local file into its cache; returns at once."""
        if self.is_local and _HAS_ADVICE:
            self._do("read", key, lambda: _advise(Path(self.url(key))))

    def write_bytes(self, key: str, data: bytes) -> None:
        """Publish `data` under `key` in one step: a reader sees the old content or the new one, never a part."""
        self.write_parts(key, [data])

    def write_parts(self, key: str, parts: Sequence[bytes | memoryview]) -> None:
        """`write_bytes` of pieces that follow each other, without joining them in memory where the root is local."""
        if self.is_local:
            self._do("write", key, lambda: write_local(Path(self.url(key)), parts))
            return
        data = b"".join(parts)
        self._do("write", key, lambda: self._fs.pipe_file(self.url(key), data))

    def write_json(self, key: str, value: Any) -> None:
        """Publish a value as indented JSON with sorted keys."""
        self.write_bytes(key, (json.dumps(value, indent=1, sort_keys=True, default=str) + "\n").encode())

    def upload_folder(self, folder: Path, key: str) -> None:
        """Publish every file below a local folder; each file is atomic, the folder as a whole is not."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.write_bytes(f"{key}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    @contextmanager
    def local_folder(self, key: str) -> Iterator[Path]:
        """A folder of the storage as a local path: itself where local, else a copy that lives as long as the block."""
        if self.is_local:
            yield Path(self.url(key))
            return
        with tempfile.TemporaryDirectory(prefix="crossray-") as folder:
            for name in self.files(key):
                target = Path(folder) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(self.read_bytes(f"{key}/{name}"))
            yield Path(folder)

    def files(self, key: str) -> list[str]:
        """Names of all files below a folder, relative to it and sorted; leftovers of killed writers are not listed."""
        self._fs.invalidate_cache()
        prefix = self.url(key)
        found = self._do("list", key, lambda: self._fs.find(prefix) if self._fs.exists(prefix) else [])
        start = len(self._fs._strip_protocol(prefix)) + 1
        return sorted(path[start:] for path in found if _TEMPORARY_MARK not in path)

    def folders(self, key: str) -> list[str]:
        """Names of the folders directly below a folder, sorted."""
        self._fs.invalidate_cache()
        prefix = self.url(key)
        entries = self._do("list", key, lambda: self._fs.ls(prefix, detail=True) if self._fs.exists(prefix) else [])
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory")

    def delete(self, key: str) -> None:
        """Remove a file or a whole folder; nothing happens where there is none."""
        self._do("delete", key, lambda: self._remove(self.url(key)))

    def _remove(self, url: str) -> None:
        if self._fs.exists(url):
            self._fs.rm(url, recursive=True)

    def free_bytes(self) -> int | None:
        """Free space under a local root in bytes; None on an object store, which does not say."""
        if not self.is_local:
            return None
        path = Path(self.root)
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free

    @contextmanager
    def kept(self) -> Iterator[None]:
        """InputError in place of what fails within the block where a local root is removed or replaced meanwhile."""
        before = self._place()
        try:
            yield
        except Exception as error:
            if self._place() == before:
                raise
            raise InputError(
                f"storage.root: expected {self.root} to stay, got a folder that was removed or replaced while the run "
                f"was working ({first_line(error)}); run again"
            ) from error

    def _place(self) -> tuple[int, int] | None:
        try:
            found = Path(self.root).stat() if self.is_local else None
        except OSError:
            return None
        return None if found is None else (found.st_dev, found.st_ino)

    def check_writable(self) -> None:
        """Raise an InputError unless a file can be written, read back and removed under the root."""
        key = f".write-check{_TEMPORARY_MARK}{uuid.uuid4().hex[:8]}"
        self.write_bytes(key, b"crossray")
        if self.read_bytes(key) != b"crossray":
            raise InputError(f"storage.root: wrote a file to {self.root} and read back something else")
        self.delete(key)

    def _do(self, action: str, key: str, function: Callable[[], _Result]) -> _Result:
        """The function's result; transient faults of an object store are tried again, others told to the user."""
        if self.is_local:
            attempt = function
        else:
            retries = storage_faults.RETRIES if self._has_answered else storage_faults.FIRST_RETRIES
            attempt = partial(
                retries.call,
                function,
                server=f"storage {self.root}",
                is_transient=storage_faults.is_transient,
                describe=storage_faults.describe,
            )
        try:
            result = attempt()
        except Exception as error:
            url = self.url(key)
            explained = storage_faults.explain(error, action, url)
            if explained is None:
                raise
            raise explained from error
        self._has_answered = True
        return result


def _scheme(root: str) -> str:
    return urlsplit(root).scheme if ":" in root.partition("/")[0] else ""


def _check_root(root: str) -> None:
    """Raise an InputError for what no machine could keep artifacts in, or what would be recorded with a secret."""
    if has_secret(root):
        raise InputError(
            f"storage.root: expected an address without credentials, since it is recorded, got {root}; set AWS_* "
            "variables, or those of its file system"
        )
    if not root.strip() or not root.isprintable():
        raise InputError(f"storage.root: expected a folder or a URL, got {root!r}")
    if _scheme(root) in _NO_PLACES:
        raise InputError(
            f"storage.root: expected a place that all processes of a run share and may write to, got {root!r}; name a "
            "folder or an object store, like s3://bucket/prefix"
        )
    if _scheme(root) in _OBJECT_STORES and not urlsplit(root).netloc:
        raise InputError(f"storage.root: expected a bucket, like s3://bucket/prefix, got {root!r}; name it")


def _local_root(root: str) -> str:
    """The absolute path of a local root: plain, or as file:///x, file://localhost/x or file:/x."""
    path = re.sub(r"^file:(//(localhost(?=/))?)?", "", root)
    try:
        absolute = Path(path).expanduser().resolve()
        os.fsencode(absolute)
    except (RuntimeError, OSError, UnicodeEncodeError) as error:
        advice = "; use a locale with UTF-8 (LC_ALL=C.UTF-8)" if isinstance(error, UnicodeEncodeError) else ""
        raise InputError(
            f"storage.root: expected a folder of this machine, got {root!r}: {first_line(error)}{advice}"
        ) from error
    return str(absolute)


def write_local(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Publish a local file in one step, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{_TEMPORARY_MARK}{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part)
                for start in range(0, len(view), _FLUSH_BYTES):
                    _write_piece(file, view[start : start + _FLUSH_BYTES])
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_piece(file: io.FileIO, piece: memoryview) -> None:
    """Append a piece and start writing it to the disk, so that little is left for fsync to do."""
    start, left = file.tell(), piece
    while len(left):
        left = left[file.write(left) :]
    if _HAS_ADVICE:
        # For pages that are not yet on the disk this advice only starts the writing; they stay in the cache.
        os.posix_fadvise(file.fileno(), start, len(piece), os.POSIX_FADV_DONTNEED)


def _local_digest(path: Path) -> tuple[int, str]:
    digest, piece, size = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES)), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
            size += count
    return size, digest.hexdigest()


def _advise(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
