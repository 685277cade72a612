"""Where log records and warnings go: into a log file of the run, and the part that a user must know to the terminal.

A run writes `logs/<run>-<time>.log` below its storage root: our own records from INFO on (kernel choice, retries, the
messages of the terminal) and the libraries' warnings. An object store cannot be appended to, so there the file is
written to `runs/logs/` of the working directory and uploaded when the run ends, well or badly. Our own warnings are
also shown on the terminal, each once and in one line. Commands without a log file show the libraries' warnings there
as well.

What workers log goes to their Ray session's log (cluster/connect.py), whose folder is named in this file.
"""

import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import CrossrayError
from pipeline.terminal import printable

if TYPE_CHECKING:
    from pipeline.storage.filesystem import Storage

FOLDER = "logs"
"""Below the storage root."""
FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"

_TERMINAL = "pipeline.terminal"
"""Logger of the messages that the terminal shows."""
_MAX_LETTERS = 400
"""Of a warning on the terminal; the log file has all of it."""

_log = logging.getLogger(__name__)


class LogFile(NamedTuple):
    """The log file of a run."""

    local: Path
    """Where it is written."""
    url: str
    """Where it stays: path or URL."""

    @property
    def is_written(self) -> bool:
        """Whether there was anything to write."""
        return self.local.exists()


@contextmanager
def terminal_logging(show: Callable[[str], object]) -> Iterator[None]:
    """For the length of the block, every warning is one line through `show`, at most once."""
    with _handling({"": _TerminalHandler(show)}):
        yield


@contextmanager
def run_logging(storage: "Storage", name: str, show: Callable[[str], object]) -> Iterator[LogFile]:
    """For the length of the block, a log file of the run; `show` is told our own warnings.

    The file appears with the first record that is more than a message of the terminal: a run that finds everything
    done writes nothing.
    """
    key = f"{FOLDER}/{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}.log"
    file = LogFile(storage.local_path(key) or Path("runs").resolve() / key, storage.url(key))
    handler = _FileHandler(file.local)
    with _handling({"": handler, "pipeline": _TerminalHandler(show)}):
        described = (name, storage.root, version("crossray"), platform.python_version())
        logging.getLogger(_TERMINAL).info("run %s on %s: crossray %s, Python %s", *described)
        try:
            yield file
        except BaseException as error:
            if file.is_written:
                _log.info("ended by %s", type(error).__name__, exc_info=True)
            raise
        finally:
            handler.close()
            if file.is_written and not storage.is_local:
                _upload(file, storage, key)


def _upload(file: LogFile, storage: "Storage", key: str) -> None:
    try:
        storage.write_bytes(key, file.local.read_bytes())
    except CrossrayError as error:
        _log.warning("the log stays at %s: %s", file.local, error)


@contextmanager
def _handling(handlers: dict[str, logging.Handler]) -> Iterator[None]:
    """Only these of our handlers, by logger name, for the length of the block; warnings become log records."""
    root, own = logging.getLogger(), logging.getLogger("pipeline")
    outer = [one for one in root.handlers if isinstance(one, _TerminalHandler)]
    level = own.level
    for one in outer:
        root.removeHandler(one)
    for logger, handler in handlers.items():
        logging.getLogger(logger).addHandler(handler)
    own.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        own.setLevel(level)
        for logger, handler in handlers.items():
            logging.getLogger(logger).removeHandler(handler)
        for one in outer:
            root.addHandler(one)
        logging.captureWarnings(bool(outer))


class _TerminalHandler(logging.Handler):
    """Shows warnings and errors, each once and in one line."""

    def __init__(self, show: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._show = show
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())[:_MAX_LETTERS]
        if text not in self._shown:
            self._shown.add(text)
            self._show(f"{record.levelname.lower()}: {text}")


class _Formatter(logging.Formatter):
    """Spells control characters and leaves secrets out, whoever logged them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _FileHandler(MemoryHandler):
    """Writes records to a file at once, but holds them back while none is more than a message of the terminal."""

    def __init__(self, path: Path) -> None:
        super().__init__(capacity=0, flushOnClose=False)  # shouldFlush alone decides
        self.setLevel(logging.INFO)
        self._path = path
        self._has_begun = False

    def shouldFlush(self, record: logging.LogRecord) -> bool:  # noqa: N802
        is_ours = record.name.startswith("pipeline.") and record.name != _TERMINAL
        if is_ours and not self._has_begun:
            self._has_begun = True
            self._open()
        return self._has_begun

    def _open(self) -> None:
        """A root that cannot be written to has no log file; what needs to write there says so."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(self._path, encoding="utf-8")
        except OSError:
            self.setTarget(logging.NullHandler())
            return
        file.setFormatter(_Formatter(FORMAT))
        self.setTarget(file)

    def close(self) -> None:
        if self.target is not None:
            self.target.close()
        super().close()
