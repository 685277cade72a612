"""What a user sees while a run works, and tables of text: the only file that imports rich.

`Progress` does the arithmetic, `Console` shows it: on a terminal as one line with a bar that is redrawn in place, in a
log as a new plain line every few seconds. Messages go to the run's log file too (tracking/log_file.py). rich is
imported when the first line is drawn, so that commands which draw nothing do not wait for it.
"""

import io
import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any, Protocol, TextIO, cast

from pipeline.errors import redacted

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

_TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 10.0
"""Between two lines: a terminal's is redrawn in place, a log's pile up."""
_WINDOW_SECONDS = 30.0
"""Over which the rate is measured."""
_SAMPLE_SECONDS = 0.25
"""Between two points of that window."""
_SETTLED_SECONDS, _SETTLED_SHARE = 5.0, 0.25
"""Of a window, or of the whole, from which on the time left is told: a guess from less is often ten times off."""
_BAR_WIDTHS = (8, 24)
"""Fewest and most letters of a bar."""
_UNLIMITED_WIDTH = 10_000

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a terminal's cursor, changes its colours or turns the direction of writing; and half characters."""

_log = logging.getLogger(__name__)


def printable(text: str) -> str:
    """The text for a person: without secrets, and with control characters (of a label, of a server's words) spelled."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), redacted(text))


class Stream:
    """A text stream to a person, whose loss ends no run: a reader that left, a full disk.

    Args of the constructor: `is_plain`, whether all that is written passes through `printable`.
    """

    def __init__(self, file: IO[str], *, is_plain: bool) -> None:
        self._file, self._is_plain = file, is_plain
        self.fault: OSError | None = None
        """Why nothing more is written."""

    def write(self, text: str) -> int:
        """Write, or forget what nobody can read."""
        self._do(lambda: self._file.write(printable(text) if self._is_plain else text))
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        self._do(self._file.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def _do(self, action: Callable[[], object]) -> None:
        if self.fault is not None:
            return
        try:
            action()
        except OSError as error:
            self.fault = error
            _log.info("the terminal is gone: %s", error)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._file.fileno())  # what is still in a buffer goes there
            os.close(null)


@contextmanager
def standard_streams() -> Iterator[Stream]:
    """Standard output and error as streams that spell control characters and outlive their readers; the output.

    A descriptor that was closed before the start is opened on nothing: the next file would get its number.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale without the letters of a label
    nothing = io.StringIO()
    output, errors = (Stream(stream or nothing, is_plain=True) for stream in before)
    sys.stdout, sys.stderr = cast("TextIO", output), cast("TextIO", errors)
    try:
        yield output
    finally:
        sys.stdout, sys.stderr = before


class Reporter(Protocol):
    """Receives what happens in a run; stages know nothing else about the terminal."""

    def message(self, text: str) -> None:
        """A line that stays."""
        ...

    def step(self, number: int, total: int) -> None:
        """Which step of the run begins, from 1; shown with the progress of this step."""
        ...

    def progress(self, progress: "Progress") -> None:
        """How far the current stage is; may be called as often as one likes."""
        ...


@dataclass
class Progress:
    """How far a stage is.

    The rate is that of the last _WINDOW_SECONDS. The first update, before workers have started, counts only until
    there are two others, so that neither a slow start nor a change of pace spoils the time left. rich keeps such a
    window too, but not without a display.
    """

    stage: str
    total: int
    unit: str
    done: int = 0
    note: str = ""
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    _samples: deque[tuple[float, int]] = field(default_factory=deque, repr=False)
    _has_start: bool = field(default=True, repr=False)

    def update(self, done: int, note: str = "") -> "Progress":
        """Set the units done so far (not the increment)."""
        self.done, self.note = done, note
        now = self.clock()
        if len(self._samples) > 1 and now - self._samples[-2][0] < _SAMPLE_SECONDS:
            self._samples.pop()
        self._samples.append((now, done))
        if self._has_start and len(self._samples) > 2:
            self._samples.popleft()
            self._has_start = False
        while len(self._samples) > 2 and self._samples[1][0] <= now - _WINDOW_SECONDS:
            self._samples.popleft()
        return self

    @property
    def per_second(self) -> float | None:
        """Units per second in the window; None while that cannot be told."""
        if not self._samples:
            return None
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - start) if end > start and last > first else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until `total` at the present rate; None while too little is known of it."""
        rate = self.per_second
        if not rate:
            return None
        is_settled = self._samples[-1][0] - self._samples[0][0] >= _SETTLED_SECONDS and not self._has_start
        is_settled |= self.done >= _SETTLED_SHARE * self.total
        return (self.total - self.done) / rate if is_settled else None

    def details(self) -> str:
        """`120,000/300,000 rows  40%  21,000 rows/s  8 s left`."""
        share = f"{100 * self.done / self.total:.0f}%" if self.total else "100%"
        parts = [f"{self.done:,}/{self.total:,} {self.unit}", share]
        if rate := self.per_second:
            parts.append(f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s")
        if (left := self.seconds_left) is not None:
            parts.append(f"{format_seconds(left)} left")
        if self.note:
            parts.append(self.note)
        return "  ".join(parts)

    def line(self) -> str:
        """The stage and its details, as a log shows them."""
        return f"{self.stage:<12}  {self.details()}"


def format_seconds(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Console:
    """A Reporter for a terminal or a log file; to be closed, which leaves the terminal as it was.

    Args of the constructor: `file`, an open text stream; `is_terminal`, whether a line of it can be redrawn (default:
    the stream's own answer).
    """

    def __init__(
        self, file: IO[str], *, is_terminal: bool | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._file = Stream(file, is_plain=False)
        self._is_terminal = file.isatty() if is_terminal is None else is_terminal
        self._clock = clock
        self._last_seconds = float("-inf")
        self._last_progress: Progress | None = None
        self._step = ""
        self._live: Live | None = None

    @cached_property
    def _rich(self) -> "RichConsole":
        from rich.console import Console as RichConsole

        file = cast("IO[str]", self._file)
        return RichConsole(file=file, force_terminal=True, markup=False, highlight=False, emoji=False)

    def message(self, text: str) -> None:
        """Write a line that stays, above the progress line; keep it in the run's log file too."""
        _log.info("%s", text)
        self.note(text)

    def note(self, text: str) -> None:
        """Write a line that stays without logging it, as what shows what was logged must."""
        text = printable(text)
        if self._live is not None:
            self._rich.print(text, soft_wrap=True)
        else:
            self._file.write(f"{text}\n")
            self._file.flush()

    def step(self, number: int, total: int) -> None:
        """Show this position with the progress from now on."""
        self._step = f"step {number} of {total}"

    def progress(self, progress: Progress) -> None:
        """Show the progress if enough time has passed since it was last shown, or if the stage is finished."""
        now, is_finished = self._clock(), progress.done >= progress.total
        is_new = self._is_terminal and progress is not self._last_progress
        pause = _TERMINAL_SECONDS if self._is_terminal else _LOG_SECONDS
        if now - self._last_seconds < pause and not is_finished and not is_new:
            return
        self._last_seconds, self._last_progress = now, progress
        if self._is_terminal:
            self._draw(progress)
            if is_finished:
                self.close()
        else:
            self.note("  ".join(part for part in (self._step, progress.line()) if part))

    def close(self) -> None:
        """Leave the progress line as it is and begin a new one below it."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self, progress: Progress) -> None:
        from rich.live import Live

        if self._live is None:
            self._live = Live(console=self._rich, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._live.start()
        self._live.update(self._line(progress), refresh=True)

    def _line(self, progress: Progress) -> "Table | Text":
        """One line, cut where the terminal ends; the bar takes what room there is."""
        from rich.progress_bar import ProgressBar
        from rich.table import Column, Table
        from rich.text import Text

        head, details = f"{self._step}  {printable(progress.stage)}".strip(), printable(progress.details())
        room = min(_BAR_WIDTHS[1], self._rich.width - len(f"{head}    {details}"))
        if room < _BAR_WIDTHS[0]:
            return Text(f"{head}  {details}", no_wrap=True, overflow="ellipsis")
        line = Table.grid(Column(no_wrap=True), Column(width=room), Column(no_wrap=True), padding=(0, 2, 0, 0))
        line.add_row(head, ProgressBar(progress.total, progress.done), details)
        return line


class SilentReporter:
    """A Reporter that keeps the messages and shows nothing; for tests and for use as a library."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        """Keep the line."""
        self.messages.append(text)

    def step(self, number: int, total: int) -> None:
        """Nothing is shown."""

    def progress(self, progress: Progress) -> None:
        """Nothing is shown."""


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, align_numbers: bool = True) -> str:
    """A table as plain text of any width: a header, a rule, and the rows, without a final newline.

    align_numbers: columns after the first whose cells all begin with a digit or "-" are aligned to the right.
    """
    from io import StringIO

    from rich.console import Console as RichConsole
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    table = Table.grid(padding=(0, 2, 0, 0))
    for place in range(len(columns)):
        is_number = align_numbers and place > 0 and all(_is_number(row[place]) for row in rows)
        table.add_column(justify="right" if is_number else "left", no_wrap=True)
    table.add_row(*map(Text, columns))
    table.add_row(*(Rule(characters="-", style="") for _ in columns))
    for row in rows:
        table.add_row(*map(Text, row))
    text = StringIO()
    RichConsole(file=text, width=_UNLIMITED_WIDTH, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] == "-"
