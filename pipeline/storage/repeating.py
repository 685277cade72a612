"""Something that is done again and again in the background while a block of code runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeating(action: Callable[[], None], *, seconds: float, name: str) -> Iterator[None]:
    """Calls `action` in a thread of its own, at once and then every so many seconds, until the block ends.

    name: of the thread. The thread has ended when the block has; an error of `action` ends it before.
    """
    is_over = threading.Event()

    def repeat() -> None:
        action()
        while not is_over.wait(seconds):
            action()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
