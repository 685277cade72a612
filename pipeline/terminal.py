"""What a user sees while a run works: done, total, rate and time left of the stage at hand.

`Progress` does the arithmetic, `Console` turns it into lines for a terminal (one that is overwritten) or for a log (a
new one every few seconds). Nothing here prints: the command line hands in the function that writes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

_LINE_EVERY_SECONDS = {True: 0.2, False: 10.0}  # a terminal's line is overwritten, a log's lines pile up


class Reporter(Protocol):
    """Receives what happens in a run; stages know nothing else about the terminal."""

    def message(self, text: str) -> None:
        """A line that stays."""
        ...

    def progress(self, progress: "Progress") -> None:
        """The state of the stage at hand; called as often as one likes."""
        ...


@dataclass
class Progress:
    """How far a stage is.

    Rate and time left are measured from the first update, so that start-up does not make an estimate look bad.
    """

    stage: str
    total: int
    unit: str
    done: int = 0
    note: str = ""
    _start: tuple[float, int] | None = field(default=None, repr=False)

    def update(self, done: int, note: str = "") -> "Progress":
        """Set the units done so far (not the increment)."""
        if self._start is None:
            self._start = (time.monotonic(), done)
        self.done, self.note = done, note
        return self

    @property
    def per_second(self) -> float | None:
        """Units per second since the first update; None while that cannot be told."""
        if self._start is None:
            return None
        seconds = time.monotonic() - self._start[0]
        gained = self.done - self._start[1]
        return gained / seconds if seconds > 0 and gained > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until `total` at the present rate; None while that cannot be told."""
        rate = self.per_second
        return (self.total - self.done) / rate if rate else None

    def line(self) -> str:
        """`activations  120,000/300,000 rows  40%  21,000 rows/s  8 s left`."""
        share = f"{100 * self.done / self.total:.0f}%" if self.total else "100%"
        parts = [f"{self.stage:<12}", f"{self.done:,}/{self.total:,} {self.unit}", share]
        if rate := self.per_second:
            parts.append(f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s")
        if (left := self.seconds_left) is not None:
            parts.append(f"{format_seconds(left)} left")
        if self.note:
            parts.append(self.note)
        return "  ".join(parts)


def format_seconds(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Console:
    """A Reporter for a terminal or a log file.

    Args of the constructor: `write` puts text out without adding a newline; `is_terminal` says whether a line may be
    overwritten.
    """

    def __init__(self, write: Callable[[str], object], *, is_terminal: bool) -> None:
        self._write = write
        self._is_terminal = is_terminal
        self._last = 0.0
        self._open_line = ""

    def message(self, text: str) -> None:
        """Write a line that stays, below a finished progress line."""
        self._close_line()
        self._write(f"{text}\n")

    def progress(self, progress: Progress) -> None:
        """Write the progress line if enough time has passed since the last one, or if the stage is finished."""
        now = time.monotonic()
        if now - self._last < _LINE_EVERY_SECONDS[self._is_terminal] and progress.done < progress.total:
            return
        self._last = now
        line = progress.line()
        if self._is_terminal:
            self._write(f"\r{line:<{len(self._open_line)}}")
            self._open_line = line
        else:
            self._write(f"{line}\n")

    def _close_line(self) -> None:
        if self._open_line:
            self._write("\n")
            self._open_line = ""


class SilentReporter:
    """A Reporter that keeps the messages and shows nothing; for tests and for use as a library."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        """Keep the line."""
        self.messages.append(text)

    def progress(self, progress: Progress) -> None:
        """Nothing is shown."""
