"""Files that users name: globs, compression and object stores over fsspec, and one-line errors where reading fails.

Corpora and chat templates are opened here. fsspec finds credentials and endpoints itself (`AWS_*` for s3). Compression
follows the name: .gz, .bz2, .xz, .zst, .zip. A file that unpacks to far more than any text does is refused. Nothing
here parses a file or writes one.
"""

import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import fsspec
from fsspec.compression import compr
from fsspec.core import get_compression

from pipeline.errors import InputError, first_line

_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError, ImportError)
_REMOTE_MODULES = ("botocore", "aiobotocore", "aiohttp", "httpx", "huggingface_hub", "datasets", "fsspec", "s3fs")
"""Packages whose own exceptions mean that a remote file cannot be read; they are not OSErrors."""
_UNPACKED_BYTES, _LARGEST_RATIO = 256 << 20, 200
"""From so many unpacked bytes on a file must hold no more than this multiple of its packed ones: text has 3 to 20."""


class ReadShare:
    """How much of a file its reader has read: set by the reader, asked while the file is open by who samples it."""

    of: Callable[[], float] = staticmethod(lambda: 0.0)
    """From 0 to 1; of compressed files by packed bytes."""


@contextmanager
def as_input_error(what: str) -> Iterator[None]:
    """Turns what a damaged, missing or forbidden file raises into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        is_remote = type(error).__module__.split(".")[0] in _REMOTE_MODULES
        if not is_remote and not isinstance(error, _READ_ERRORS):
            raise
        is_forbidden = isinstance(error, PermissionError) or "Credentials" in type(error).__name__
        advice = "check permissions and credentials" if is_forbidden else "replace it or remove it from the run file"
        advice = "save it as UTF-8" if isinstance(error, UnicodeError) else advice
        raise InputError(f"{what}: expected a readable file, got {_one_line(error)}; {advice}") from error


def expand_paths(paths: Sequence[str], what: str) -> list[str]:
    """The files that paths and globs (`*`, `?`, `[...]`, `**`) name: as given, those of a glob sorted, each once.

    Raises an InputError for a glob without a match and for a path that is no file.
    """
    found: dict[str, None] = {}
    for path in paths:
        with as_input_error(f"{what}: {path}"):
            try:
                fs, inner = fsspec.core.url_to_fs(path)
            except ValueError as error:
                raise InputError(
                    f"{what}: expected a path or a URL that fsspec knows, got {path!r}: {error}"
                ) from error
            fs.invalidate_cache()
            if fs.isfile(inner):
                found[path] = None
                continue
            is_glob = any(mark in path for mark in "*?[")
            matches = sorted(name for name in fs.glob(inner) if fs.isfile(name)) if is_glob else []
            if not matches:
                raise InputError(f"{what}: expected an existing file, got {path!r}; correct the path")
            is_local = "file" in fs.protocol
            found |= dict.fromkeys(name if is_local else fs.unstrip_protocol(name) for name in matches)
    return list(found)


@contextmanager
def open_text(path: str, share: ReadShare | None = None) -> Iterator[Any]:
    """The lines of a UTF-8 file without its BOM; compression follows its name. Read it inside `as_input_error`.

    Raises an InputError where the file unpacks to so much that it is no text. `share`: told how far the reading is.
    """
    with fsspec.open(path, "rb") as raw:
        if share is not None:
            size = max(1, raw.seek(0, io.SEEK_END))
            raw.seek(0)
            share.of = lambda: raw.tell() / size
        compression = "zstd" if path.endswith(".zst") else get_compression(path, "infer")
        if compression is None:
            yield io.TextIOWrapper(raw, encoding="utf-8-sig")
            return
        with _unpacked(raw, compression) as unpacked:
            yield io.TextIOWrapper(io.BufferedReader(_Bounded(unpacked, raw, path), 1 << 16), encoding="utf-8-sig")


def _unpacked(raw: Any, compression: str) -> Any:
    if compression != "zstd":
        return compr[compression](raw, mode="r")
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")


class _Bounded(io.RawIOBase):
    """What is unpacked from a file, as long as it is in proportion to what is packed."""

    def __init__(self, unpacked: Any, raw: Any, path: str) -> None:
        self._unpacked, self._raw, self._path, self._num_bytes = unpacked, raw, path, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._unpacked.read(len(buffer))
        buffer[: len(data)] = data
        self._num_bytes += len(data)
        check_unpacked(self._path, self._num_bytes, self._raw.tell())
        return len(data)


def check_unpacked(path: str, unpacked_bytes: int, packed_bytes: int) -> None:
    """InputError where a file unpacks to so much more than it holds that it is no text."""
    if unpacked_bytes > _UNPACKED_BYTES and unpacked_bytes > _LARGEST_RATIO * packed_bytes:
        raise InputError(
            f"{path}: expected a compressed text, got one that unpacks to more than {_LARGEST_RATIO} times its size; "
            "if it is meant, unpack it first"
        )


def read_text(path: str, what: str) -> str:
    """The whole text of a file; an InputError that begins with `what` where it cannot be read."""
    with as_input_error(f"{what}: {path}"), open_text(path) as lines:
        return str(lines.read())


def read_json(path: str, what: str) -> Any:
    """The value in a JSON file; an InputError that begins with `what` where it cannot be read."""
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else first_line(error)
        raise InputError(f"{what}: expected a JSON file, got {path!r}: {why}; correct it") from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}" if str(error) else type(error).__name__
