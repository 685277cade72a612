"""Which documents of a corpus are filtered out, and for which reason each.

Nothing here depends on a language: lengths, the order of roles, repetition, the share of letters. A document is counted
under the first filter that it fails, in the order of this file.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

TOO_SHORT = "fewer than min_characters"
TOO_LONG = "more than max_characters"
FEW_MESSAGES = "fewer than min_messages"
MANY_MESSAGES = "more than max_messages"
NOT_ALTERNATING = "roles do not alternate"
NO_ANSWER = "does not end with assistant"
REPETITIVE = "repeats its lines"
FEW_LETTERS = "too few letters"


class Filters(NamedTuple):
    """Limits of one corpus; with the defaults every document passes."""

    min_characters: int = 0
    """Of the text, or of a dialogue's contents together."""
    max_characters: int | None = None
    min_messages: int = 0
    """Messages of a dialogue, system prompts not counted."""
    max_messages: int | None = None
    alternating_roles: bool = False
    """user, assistant, user, ...; a system prompt may come first."""
    ends_with_assistant: bool = False
    max_repeated_frac: float | None = None
    """Share of a document's characters in lines that repeat one of its earlier lines."""
    min_letter_frac: float | None = None
    """Share of letters of any script among the characters that are not blank."""


def filter_reason(text: str | None, messages: Sequence[Mapping[str, Any]] | None, filters: Filters) -> str:
    """Why a document is filtered out, or "" where it passes; messages are None for a plain document."""
    contents = [text or ""] if messages is None else [str(message["content"]) for message in messages]
    num_characters = sum(map(len, contents))
    if num_characters < filters.min_characters:
        return TOO_SHORT
    if filters.max_characters is not None and num_characters > filters.max_characters:
        return TOO_LONG
    reason = "" if messages is None else _role_filter_reason([str(message["role"]) for message in messages], filters)
    if reason:
        return reason
    if filters.max_repeated_frac is not None and repeated_frac(contents) > filters.max_repeated_frac:
        return REPETITIVE
    if filters.min_letter_frac is not None and letter_frac(contents) < filters.min_letter_frac:
        return FEW_LETTERS
    return ""


def _role_filter_reason(roles: list[str], filters: Filters) -> str:
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    num_messages = sum(role != "system" for role in roles)
    if num_messages < filters.min_messages:
        return FEW_MESSAGES
    if filters.max_messages is not None and num_messages > filters.max_messages:
        return MANY_MESSAGES
    if filters.alternating_roles and spoken != [("user", "assistant")[i % 2] for i in range(len(spoken))]:
        return NOT_ALTERNATING
    if filters.ends_with_assistant and roles[-1:] != ["assistant"]:
        return NO_ANSWER
    return ""


def repeated_frac(contents: Sequence[str]) -> float:
    """Share of characters in lines that occurred before in the same document; 0 for an empty one."""
    seen: set[str] = set()
    repeated = total = 0
    for line in (line.strip() for content in contents for line in content.splitlines()):
        total += len(line)
        repeated += len(line) if line in seen else 0
        seen.add(line)
    return repeated / total if total else 0.0


def letter_frac(contents: Sequence[str]) -> float:
    """Share of letters (of any script) among characters that are not blank; 0 for an empty document."""
    visible = [character for content in contents for character in content if not character.isspace()]
    return sum(character.isalpha() for character in visible) / len(visible) if visible else 0.0
