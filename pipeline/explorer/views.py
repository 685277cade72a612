"""Which HTML comes of what a visitor asks for; the state of a visitor is in its `View` alone.

The server keeps texts that were read lately, for everyone, and the events that end the answers being written.
"""

import threading
from collections.abc import Iterator
from functools import lru_cache

from pipeline.errors import CrossrayError
from pipeline.explorer import pages
from pipeline.explorer.address import View
from pipeline.explorer.asked import text_of
from pipeline.explorer.finding import find
from pipeline.explorer.latent_page import latent_page
from pipeline.explorer.reading import RANK_COLUMNS, ReadText, read_text, strongest
from pipeline.explorer.source import Explored
from pipeline.explorer.steering import answers_of

_NUM_STRONG = 20
_NUM_KEPT_TEXTS = 16


class Views:
    """The views of one run."""

    def __init__(self, explored: Explored) -> None:
        self.explored = explored
        self._read = lru_cache(maxsize=_NUM_KEPT_TEXTS)(self._read_text)
        self._stops: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def _read_text(self, crosscoder: str, typed: str) -> ReadText:
        with self.explored.models() as pair:
            return read_text(pair, self.explored.crosscoder(crosscoder), text_of(typed))

    def html(self, view: View) -> str:
        """A view, empty where nothing was asked for; what was wrong with what was asked stands in its place."""
        try:
            return self._html(view)
        except CrossrayError as error:
            return pages.fault_html(str(error))

    def _html(self, view: View) -> str:
        name = self.explored.crosscoder_name(view.crosscoder)
        if view.view == "latent":
            return pages.latent_html(view, latent_page(self.explored, name, view.latent)) if view.latent >= 0 else ""
        if view.view == "find":
            return pages.found_html(view, find(self.explored, view))
        if view.view == "steer" or not view.text.strip():
            return ""
        read = self._read(name, view.text)
        latents = self.explored.columns(name, RANK_COLUMNS)
        strong = strongest(read, latents, order=view.order, num=_NUM_STRONG)
        return pages.text_html(view, read, strong, latents["max_activation"].to_numpy())

    def answers(self, view: View, session: str) -> Iterator[str]:
        """The steering view, again and again while answers are written; ends what the session had asked before."""
        stop = threading.Event()
        with self._lock:
            former, self._stops[session] = self._stops.get(session), stop
        if former is not None:
            former.set()
        try:
            for answers in answers_of(self.explored, view, stop):
                yield pages.answers_html(view, answers)
        except CrossrayError as error:
            yield pages.fault_html(str(error))
        finally:
            stop.set()
            with self._lock:
                if self._stops.get(session) is stop:
                    del self._stops[session]

    def stop(self, session: str) -> None:
        """Ends the answers that a session has asked for after their next token."""
        with self._lock:
            event = self._stops.get(session)
        if event is not None:
            event.set()
