"""Ends what other people's templates compute without end.

The limit counts the processor's time, so that a busy machine or a laptop that sleeps does not end what is only slow. It
holds in the main thread, where workers and commands render; elsewhere Python has no way to interrupt a computation.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class EndlessError(Exception):
    """The time is over."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises EndlessError in the block once this process has computed for so long in it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise EndlessError(f"still computing after {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
