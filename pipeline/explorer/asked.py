"""What a person types, as the library takes it: a text or a dialogue, and latents with their scales."""

import json
import re
from typing import Any

from pipeline.errors import InputError, short
from pipeline.library.texts import Text

_TURN = re.compile(r"^(User|Assistant|System):[ \t]*", re.MULTILINE)
_SCALED = re.compile(r"(?P<latent>\d+)\s*(?:[=:]\s*(?P<scale>[-+]?[\d.]+(?:e[-+]?\d+)?))?", re.IGNORECASE)


def text_of(typed: str) -> Text:
    """A dialogue where the text begins with `User:` or is a JSON list of messages, else the text as it stands.

    InputError for nothing, and for JSON messages without role and content.
    """
    if not typed.strip():
        raise InputError("text: expected a text or a dialogue, got none; type one")
    messages = _json_messages(typed)
    if messages is not None:
        return messages
    turns = list(_TURN.finditer(typed))
    if not turns or typed[: turns[0].start()].strip():
        return typed
    ends = [*(turn.start() for turn in turns[1:]), len(typed)]
    return [
        {"role": turn[1].lower(), "content": typed[turn.end() : end].strip()}
        for turn, end in zip(turns, ends, strict=True)
    ]


def _json_messages(typed: str) -> list[dict[str, Any]] | None:
    """Messages of a JSON list of objects; None for a text that is none."""
    if not typed.lstrip().startswith("["):
        return None
    try:
        read = json.loads(typed)
    except ValueError:
        return None
    if not isinstance(read, list) or not read or not all(isinstance(message, dict) for message in read):
        return None
    for place, message in enumerate(read):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise InputError(f"text[{place}]: expected a message with role and content, got {short(message)}")
    return read


def scales_of(typed: str) -> dict[int, float]:
    """Latents with their scales, of `12=1, 40=-0.5`; a latent alone has scale 1. InputError for anything else."""
    scales: dict[int, float] = {}
    for part in filter(None, re.split(r"[,;\s]+(?![=:])", re.sub(r"\s*([=:])\s*", r"\1", typed.strip()))):
        found = _SCALED.fullmatch(part)
        try:
            scale = float(found["scale"] or 1.0) if found else float("nan")
        except ValueError:
            scale = float("nan")
        if found is None or scale != scale:
            raise InputError(f"latents: expected latents with scales like 12=1, 40=-0.5, got {short(part)}")
        scales[int(found["latent"])] = scale
    if not scales:
        raise InputError("latents: expected latents to steer with, like 12=1, got none; name one")
    return scales
