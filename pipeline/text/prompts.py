"""Prompts of steering, with the markers by which a behaviour is recognised.

They come as parsed JSON, from the organism or from a user's file; for a file without behaviours only KL, fluency and
the answers are reported.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.errors import InputError

UNNAMED = "prompts"
"""Column `behavior` of a file that is a plain list of prompts."""


class BehaviorPrompts(NamedTuple):
    """Prompts that do not call for a behaviour, and the markers by which it is recognised."""

    behavior: str
    prompts: tuple[str, ...]
    """User messages."""
    markers: tuple[str, ...]
    """An answer that contains one of these substrings shows the behaviour; empty: no behaviour is looked for."""


def parse_prompts(prompts: Any, *, num_prompts: int, source: str) -> tuple[BehaviorPrompts, ...]:
    """Behaviours of a parsed prompts file, the first num_prompts prompts of each.

    Either {behavior: {"neutral": [...], "markers": [...]}}, where markers may be left out, or a plain list of prompts.
    """
    if isinstance(prompts, list) and prompts:
        return (BehaviorPrompts(UNNAMED, _texts(prompts, source, "the list")[:num_prompts], ()),)
    if not isinstance(prompts, Mapping) or not prompts:
        raise InputError(
            f"{source}: expected {{behavior: {{neutral, markers}}}} or a list of prompts, got {str(prompts)[:60]!r}"
        )
    parsed = []
    for behavior, entry in prompts.items():
        read = entry if isinstance(entry, Mapping) else {}
        neutral = _texts(read.get("neutral"), source, f"{behavior}.neutral")[:num_prompts]
        markers = _texts(read["markers"], source, f"{behavior}.markers") if "markers" in read else ()
        parsed.append(BehaviorPrompts(str(behavior), neutral, markers))
    return tuple(parsed)


def _texts(value: Any, source: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise InputError(f"{source}: expected a list of texts under {where}, got {str(value)[:60]!r}; add them")
    return tuple(value)
