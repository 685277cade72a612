"""Messages of a dialogue in every layout that is read: one form of role, content, reasoning, tool calls and labels.

`read_messages` turns a row of a corpus into that form, with a reason where it cannot; `parse_messages` reads the form
back from the corpus artifact. `split_reasoning` finds the reasoning that an assistant wrote into its content. Nothing
here renders a template.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from pipeline.errors import InputError, shortened

NOT_DIALOGUE = "not a dialogue"
NOT_LABELS = "labels are not {name, start, end}"
NO_CONTENT = "a message without content"
NOT_TOOL_CALLS = "tool calls are not {name, arguments}"
NESTED = "tool calls nested too deep"
NO_PART_TEXT = "content with a text part without text"
UNREADABLE = "unreadable_messages"
"""Messages that are not a JSON list of {role, content}, or labels outside their content."""

TOOL_ROLES = frozenset({"tool", "ipython", "function"})
"""Roles of what a tool answers."""

_TEXT_KINDS = frozenset({"text", "input_text", "output_text"})
"""Types of a part of a content that is text, as chat APIs name them."""
_MAX_NESTING = 64
"""Of arguments of a tool call, which templates write as JSON by recursion."""

_REASONING = re.compile(r"(?P<before>\s*<think>\s*|)(?P<reasoning>.*?)(?P<closing>\s*</think>\s*)", re.DOTALL)
"""Reasoning at the start of a content. Without its opening tag (which some templates write themselves), the closing tag
must begin a line."""


class DialogueError(InputError):
    """One dialogue that cannot be rendered with exact spans; `reason` is the name under which it is counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ReasoningSplit(NamedTuple):
    """Places in a content."""

    start: int
    """First character of the reasoning."""
    end: int
    """One past its last character; equal to start where it is empty."""
    answer: int
    """First character of what follows the closing tag and its whitespace."""


def split_reasoning(message: Mapping[str, Any]) -> ReasoningSplit | None:
    """Where an assistant's content holds reasoning between think tags; None where it holds none."""
    if message["role"] != "assistant" or "</think>" not in message["content"]:
        return None
    found = _REASONING.match(message["content"])
    if found is None or "<think>" in found["reasoning"] or not (found["before"] or found["closing"].startswith("\n")):
        return None
    return ReasoningSplit(*found.span("reasoning"), found.end())


def with_reasoning_in_content(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the field reasoning_content moved into its content, between think tags; labels move along."""
    reasoning = message.get("reasoning_content")
    if not reasoning:
        return message
    opening = f"<think>\n{reasoning.strip()}\n</think>\n\n"
    moved: dict[str, Any] = {key: value for key, value in message.items() if key != "reasoning_content"}
    moved["content"] = opening + message["content"]
    if message.get("labels"):
        shift = len(opening)
        moved["labels"] = [
            {**label, "start": label["start"] + shift, "end": label["end"] + shift} for label in message["labels"]
        ]
    return moved


def read_messages(value: Any, source: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The messages of one row of a corpus, or an empty list and the reason.

    A list of messages, or that list as JSON text. Contents are text or lists of text parts; null is read where the
    message calls tools. Of other keys only labels, tool calls and reasoning_content are kept.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return [], NOT_DIALOGUE
    if not isinstance(value, (list, tuple)) or not value:
        return [], NOT_DIALOGUE
    messages = []
    for message in value:
        read, reason = _read_message(message, source)
        if reason:
            return [], reason
        messages.append(read)
    return messages, ""


def _read_message(message: Any, source: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    role_key, content_key = source.get("role_key", "role"), source.get("content_key", "content")
    if not isinstance(message, Mapping) or not isinstance(message.get(role_key), str):
        return {}, NOT_DIALOGUE
    tool_calls, reason = _read_tool_calls(message.get("tool_calls"))
    reasoning = message.get("reasoning_content")
    if content_key not in message and not tool_calls and not reasoning:
        return {}, NOT_DIALOGUE
    content, content_reason = _read_content(message.get(content_key))
    if content_reason == NO_CONTENT and (tool_calls or reasoning):
        content_reason = ""
    if reason or content_reason:
        return {}, reason or content_reason
    role = (source.get("role_names") or {}).get(message[role_key], message[role_key])
    read: dict[str, Any] = {"role": role, "content": content}
    if isinstance(reasoning, str) and reasoning.strip():
        read["reasoning_content"] = reasoning
    if tool_calls:
        read["tool_calls"] = tool_calls
    if labels := message.get("labels"):
        if not isinstance(labels, (list, tuple)) or not all(_is_named(label) for label in labels):
            return {}, NOT_LABELS
        read["labels"] = list(labels)
    return read, ""


def _read_content(value: Any) -> tuple[str, str]:
    if isinstance(value, str):
        return value, ""
    if value is None:
        return "", NO_CONTENT
    if not isinstance(value, (list, tuple, Mapping)):
        return "", NOT_DIALOGUE
    texts = []
    for part in [value] if isinstance(value, Mapping) else value:
        kind = (part.get("type") or "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(kind, str) or kind not in _TEXT_KINDS:
            named = kind if isinstance(kind, str) and kind.isprintable() else ascii(kind)
            return "", f"content with a part of type {shortened(named, 30)}"
        if not isinstance(text, str):
            return "", NO_PART_TEXT
        texts.append(text)
    return "".join(texts), ""


def _read_tool_calls(value: Any) -> tuple[list[dict[str, Any]], str]:
    """Calls as {type, function: {name, arguments}}; arguments that are JSON text become what they say."""
    if value is None:
        return [], ""
    if not isinstance(value, (list, tuple)):
        return [], NOT_TOOL_CALLS
    calls = []
    for call in value:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return [], NOT_TOOL_CALLS
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):  # else it is text that the template writes as it is
                arguments = json.loads(arguments)
        if _is_nested_beyond(arguments, _MAX_NESTING):
            return [], NESTED
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}})
    return calls, ""


def _is_nested_beyond(value: Any, depth: int) -> bool:
    """Whether lists and mappings stand inside each other in more than `depth` levels."""
    level = [value]
    for _ in range(depth + 1):
        inner = [one.values() if isinstance(one, Mapping) else one for one in level if isinstance(one, (list, Mapping))]
        level = [item for one in inner for item in one]
    return bool(level)


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8; JSON and templates may hold half of a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_messages(messages: str) -> list[dict[str, Any]]:
    """Messages of one row of the corpus artifact; DialogueError(UNREADABLE) where they are malformed."""
    try:
        parsed = json.loads(messages)
    except (ValueError, RecursionError) as error:
        raise DialogueError(UNREADABLE, f"expected messages as a JSON list, got {messages[:60]!r}: {error}") from error
    if not isinstance(parsed, list) or not parsed:
        raise DialogueError(UNREADABLE, f"expected a JSON list with at least one message, got {messages[:60]!r}")
    for message in parsed:
        is_message = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not is_message or not isinstance(message.get("content"), str):
            raise DialogueError(
                UNREADABLE, f"expected messages with role and content as text, got {str(message)[:60]!r}"
            )
        for label in message.get("labels") or ():
            if not _is_label(label, len(message["content"])):
                raise DialogueError(
                    UNREADABLE,
                    "expected labels as {name, start, end} inside their content of "
                    f"{len(message['content'])} characters, got {str(label)[:60]!r}",
                )
    return parsed


def words_of(messages: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Everything that a dialogue says, without labels: what its identity is the hash of."""
    words: list[list[Any]] = []
    for message in messages:
        extras = [message[key] for key in ("reasoning_content", "tool_calls") if key in message]
        words.append([message["role"], message["content"], *extras])
    return words


def _is_named(label: Any) -> bool:
    """Whether it can be a planted label; its place in the content is checked where the content becomes tokens."""
    return isinstance(label, Mapping) and isinstance(label.get("name"), str)


def _is_label(label: Any, num_characters: int) -> bool:
    if not isinstance(label, dict) or not isinstance(label.get("name"), str):
        return False
    start, end = label.get("start"), label.get("end")
    return isinstance(start, int) and isinstance(end, int) and 0 <= start <= end <= num_characters
