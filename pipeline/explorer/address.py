"""What a view shows as the query string of its address, so that every view can be linked to."""

from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote_plus, urlencode

from pipeline.errors import InputError, short

VIEWS = ("text", "latent", "find", "steer")
ORDERS = ("verdict", "share", "activation")
MAX_LETTERS = 16_000
"""Of one value in an address, as it is written there; servers refuse longer addresses, so a longer one is left out."""


class View(NamedTuple):
    """One view with everything that it was asked for; defaults are left out of its address."""

    view: str = "text"
    """One of VIEWS."""
    crosscoder: str = ""
    """Empty for the run's first."""
    latent: int = -1
    """Of the latent's page, or that colours the text; -1 for the first of the list."""
    text: str = ""
    """Typed text or dialogue."""
    order: str = "verdict"
    """Of a text's latents, one of ORDERS."""
    condition: str = ""
    fires: str = ""
    """Text on which latents fire."""
    silent: str = ""
    """Text on which they do not."""
    token: str = ""
    sort: str = ""
    """Column of the latents that were found; a leading - turns it round."""
    page: int = 0
    prompt: str = ""
    steer: str = ""
    """Latents with scales, `12=1, 40=-0.5`."""
    tokens: int = 48
    """At most so many new ones."""
    temperature: float = 0.0
    random: int = 0
    """Random controls."""


def address(view: View) -> str:
    """The query string of a view, `?view=latent&latent=12`."""
    given = {
        name: value
        for name, value in view._asdict().items()
        if name == "view" or (value != View._field_defaults[name] and not is_too_long(value))
    }
    return f"?{urlencode(given)}"


def is_too_long(value: object) -> bool:
    """Whether an address leaves a value out."""
    return len(quote_plus(str(value))) > MAX_LETTERS


def view_of(query: Mapping[str, str]) -> View:
    """The view of a query string's parameters; those of other names are left alone.

    Raises InputError for a view that there is none of, and for what should be a number.
    """
    given: dict[str, str | int | float] = {}
    for name, default in View._field_defaults.items():
        if name not in query:
            continue
        try:
            given[name] = type(default)(query[name])
        except ValueError as error:
            raise InputError(
                f"{name}: expected a number in the address, got {short(query[name])}; correct it, or open the page "
                "without it"
            ) from error
    view = View(**given)  # type: ignore[arg-type]
    for name, value, known in (("view", view.view, VIEWS), ("order", view.order, ORDERS)):
        if value not in known:
            raise InputError(f"{name}: expected one of {', '.join(known)} in the address, got {short(value)}")
    return view
