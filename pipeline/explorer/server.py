"""Starts the explorer: `crossray.explore`, and who may see it.

On the loopback interface it is open, as a notebook's server beside it would be. Bound elsewhere it asks for a token,
which a visitor types into the login page: it stands in no address, in no log and in no artifact.
"""

import ipaddress
import os
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError, first_line
from pipeline.library.runs import Run

if TYPE_CHECKING:
    from pipeline.library.pair import Pair

TOKEN_VARIABLE = "CROSSRAY_EXPLORE_TOKEN"
LOOPBACK = "127.0.0.1"
_LEAST_LETTERS = 16


class Explorer:
    """A running explorer."""

    def __init__(self, blocks: Any, url: str, made_token: str | None) -> None:
        self._blocks = blocks
        self.url = url
        """Where it is."""
        self.made_token = made_token
        """What the login page asks for as password, where it was made here; None where it was given or is not asked."""

    def __repr__(self) -> str:
        return f"Explorer({self.url})"

    def wait(self) -> None:
        """Returns when the server ends, as by Ctrl-C."""
        self._blocks.block_thread()

    def close(self) -> None:
        """Ends the server."""
        self._blocks.close(verbose=False)


def explore(
    run: Run | str | Path,
    *,
    pair: "Pair | None" = None,
    overrides: Sequence[str] = (),
    host: str = LOOPBACK,
    port: int | None = None,
    token: str | None = None,
    without_token: bool = False,
) -> Explorer:
    """Starts a web application over a finished run and returns; `wait()` stays until it ends.

    Args:
        run: a run file, which brings the models along, or an opened run.
        pair: the models of an opened run; without them no text is read and nothing is steered.
        overrides: KEY=VALUE for a run file, as `--set` takes them.
        host: interface to listen on; other machines reach one that is not loopback, with a token.
        port: the first free one from 7860 by default.
        token: of at least 16 letters; CROSSRAY_EXPLORE_TOKEN by default, else one is made where it is needed.
        without_token: makes none, so that whoever reaches the interface is let in where none was given; for a place
            that decides itself who reaches it, such as a Space of the hub.

    Raises InputError where the run is not finished, Gradio is missing, or the port is taken.
    """
    app = _app()
    from pipeline.explorer.source import Explored
    from pipeline.library.run_file import open_file
    from pipeline.models.placement import device_here

    given = token or os.environ.get(TOKEN_VARIABLE) or None
    wanted = None if without_token and given is None else checked_token(given, host)
    if isinstance(run, Run):
        device = "cpu" if pair is None else str(pair.device)
        explored = Explored(run, None if pair is None else lambda: pair, device=device)
    else:
        opened = open_file(run, overrides)
        explored = Explored(opened.run, opened.load_pair if pair is None else lambda: pair, device=device_here())
    blocks = app.build(explored)
    try:
        url = app.launch(blocks, host=host, port=port, is_allowed=None if wanted is None else _guard(wanted))
    except OSError as error:
        raise InputError(
            f"--host, --port: expected an interface and a free port, got {host}:{port or 'any'}: {first_line(error)}"
        ) from error
    threading.Thread(target=explored.warm_up, name="explorer-warm-up", daemon=True).start()
    return Explorer(blocks, url, wanted if given is None else None)


def checked_token(given: str | None, host: str) -> str | None:
    """The token that a server on this interface asks for: the one given, else a new one unless it is loopback.

    InputError for one that is short enough to be guessed.
    """
    if given is None:
        return None if is_loopback(host) else secrets.token_urlsafe(24)
    if len(given) < _LEAST_LETTERS:
        raise InputError(
            f"token: expected at least {_LEAST_LETTERS} letters, got {len(given)}; leave it out and one is made"
        )
    return given


def read_token(path: str) -> str:
    """The token in a file, without the line break after it. InputError for a file that cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--token-file: expected a file with the token, got {path!r}: {first_line(error)}") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _guard(token: str) -> Any:
    """Tells the login page whether the password is the token; any name goes with it."""
    return lambda _name, password: secrets.compare_digest(password.encode(), token.encode())


def _app() -> Any:
    try:
        from pipeline.explorer import app
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        raise InputError(
            "crossray explore: expected the package gradio, got none; install it with `pip install 'crossray[explore]'`"
        ) from error
    return app
