"""Dialogues rendered by a chat template, with the exact characters that every speaker wrote.

First step of tokenisation: a list of messages becomes one string and one character span per message. The spans come
from the template's own output, never from searching for a message in the text: each content is rendered once more
between two private-use characters, and removing those characters must give back the plain rendering. So contents that
repeat, or that contain role names and control words, are located exactly. Templates that write today's date get a
fixed date, so that a dialogue gives the same tokens every day.

It does not tokenise. The trade-off: a template that changes what a speaker wrote (drops reasoning, rewords, reorders
characters) is refused, because no character span would be exact.
"""

import re
from datetime import datetime
from itertools import takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import InputError

FIRST_SENTINEL = 0xF0000
"""First code point of Unicode's private-use plane 15; message i takes the points 2i (opens) and 2i + 1 (closes)."""
MAX_MESSAGES = 0xFFFD // 2
_SENTINEL = re.compile(f"[{chr(FIRST_SENTINEL)}-{chr(FIRST_SENTINEL + 0xFFFD)}]")

REJECTED = "template_rejects"
"""The template raised an error, for instance because roles do not alternate."""
REWRITTEN = "template_rewrites"
"""The template changed, dropped or repeated a content."""
PRIVATE_USE = "private_use_characters"
"""The dialogue contains the characters that mark contents."""

TEMPLATE_DATE = datetime(2024, 7, 26)
"""The date that every template gets: Llama 3's default where none is given."""
_DATE_CODES = ("%A", "%a", "%B", "%b", "%d", "%H", "%I", "%M", "%m", "%p", "%S", "%Y", "%y")
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{TEMPLATE_DATE.strftime(code)}')" for code in _DATE_CODES)
    + " }}{% endmacro %}{{ '' }}"
)
"""Put before a template that asks for the time; the empty expression keeps a newline at the template's start."""

_PROBE = (
    {"role": "user", "content": "First question?"},
    {"role": "assistant", "content": "An answer."},
    {"role": "user", "content": "Second question?"},
    {"role": "assistant", "content": "Another answer."},
)


class DialogueError(InputError):
    """One dialogue that cannot be rendered with exact spans; `reason` is the name under which it is counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class MessageSpan(NamedTuple):
    """Place of one message's content in the rendered text."""

    message: int
    """Index of the message in the dialogue."""
    role: str
    start: int
    """First character of the content in the rendered text, after the leading whitespace that the template trimmed."""
    end: int
    """One past the last character of the content."""
    content_offset: int
    """Leading whitespace that was trimmed: character c of the content is at start + c - content_offset."""


class RenderedDialogue(NamedTuple):
    """A dialogue as the model reads it."""

    text: str
    """Everything the template wrote, including its BOS where it writes one."""
    spans: tuple[MessageSpan, ...]
    """One per message with a content that is not blank, ascending by start."""


class TemplateShape(NamedTuple):
    """What a chat template writes around the contents, found with a probe dialogue."""

    headers: dict[str, str]
    """Per role: the characters just before a content that open its turn."""
    trailers: dict[str, str]
    """Per role: the characters after the content that close its turn."""


def render_dialogue(tokenizer: Any, messages: list[dict[str, Any]]) -> RenderedDialogue:
    """The template's text of a dialogue and the span of every content.

    Outer whitespace of a content belongs to its span unless the template trims it. Blank contents get no span. Raises
    DialogueError where the template rejects the dialogue (REJECTED) or changes, drops or repeats a content (REWRITTEN).
    """
    plain_messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    if len(messages) > MAX_MESSAGES:
        raise DialogueError(REJECTED, f"expected at most {MAX_MESSAGES} messages in a dialogue, got {len(messages)}")
    plain = _apply(tokenizer, plain_messages)
    present = _SENTINEL.search(plain)
    if present is not None:
        raise DialogueError(
            PRIVATE_USE,
            f"expected a dialogue without characters of Unicode's private-use plane 15, which mark the contents here, "
            f"but it has U+{ord(present.group()):X}; remove it from the corpus",
        )
    is_padded = any(message["content"] != message["content"].strip() for message in plain_messages)
    for is_trimmed in (False, True) if is_padded else (True,):
        marked = _apply(tokenizer, [_mark(i, m, is_trimmed=is_trimmed) for i, m in enumerate(plain_messages)])
        if _SENTINEL.sub("", marked) == plain:
            break
    else:
        raise _rewritten(plain_messages, "what it writes depends on how a content starts or ends")
    places: dict[int, list[int]] = {}
    for num_before, match in enumerate(_SENTINEL.finditer(marked)):
        places.setdefault(ord(match.group()) - FIRST_SENTINEL, []).append(match.start() - num_before)
    return RenderedDialogue(plain, _spans(plain_messages, places, plain, is_trimmed=is_trimmed))


def render_prompt(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """The template's text of a dialogue that ends with the header of the assistant turn to be generated."""
    return _apply(tokenizer, [{"role": m["role"], "content": m["content"]} for m in messages], is_prompt=True)


def read_template_shape(tokenizer: Any) -> TemplateShape:
    """Header and trailer of user and assistant turns.

    Raises InputError where there is no chat template, or where it writes the same around both roles: masks of user and
    assistant tokens would be meaningless.
    """
    probe = [dict(message) for message in _PROBE]
    try:
        text, spans = render_dialogue(tokenizer, probe)
    except DialogueError as error:
        raise InputError(
            f"expected a chat template that renders a plain dialogue of user and assistant, but {error}; give another "
            "one in tokens.chat_template"
        ) from error
    gap_to_assistant = text[spans[0].end : spans[1].start]
    gap_to_user = text[spans[1].end : spans[2].start]
    if gap_to_assistant == gap_to_user:
        raise InputError(
            f"expected a chat template that tells user from assistant turns, but it writes {gap_to_user!r} between "
            "both; give a template with roles in tokens.chat_template"
        )
    user_only, user_spans = render_dialogue(tokenizer, probe[:1])
    answered, answered_spans = render_dialogue(tokenizer, probe[:2])
    user_trailer = _common_prefix(user_only[user_spans[-1].end :], gap_to_assistant)
    assistant_trailer = _common_prefix(answered[answered_spans[-1].end :], gap_to_user)
    return TemplateShape(
        headers={
            "user": gap_to_user[len(assistant_trailer) :],
            "assistant": gap_to_assistant[len(user_trailer) :],
        },
        trailers={"user": user_trailer, "assistant": assistant_trailer},
    )


def check_template(text: str, where: str) -> None:
    """InputError for a chat template that is not valid Jinja; rendering shows whether its output can be used."""
    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_generation(text))
    except TemplateError as error:
        raise InputError(f"{where}: expected a Jinja chat template, got: {error}; correct the file") from error


def _without_generation(text: str) -> str:
    """The template without transformers' own tags around generated text, which plain Jinja cannot parse."""
    return re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", text)


def strip_bos(tokenizer: Any, text: str) -> str:
    """The text without the BOS that the template wrote, if the tokenizer adds one itself; else the text unchanged.

    BOS then occurs exactly once either way. Tokenizers without a BOS leave the text as it is.
    """
    bos = tokenizer.bos_token
    if not bos or not adds_bos(tokenizer):
        return text
    return text.removeprefix(bos)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its BOS in front of every text."""
    if tokenizer.bos_token_id is None:
        return False
    return bool(tokenizer("a", add_special_tokens=True)["input_ids"][0] == tokenizer.bos_token_id)


def _apply(tokenizer: Any, messages: list[dict[str, str]], *, is_prompt: bool = False) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"expected a tokenizer with a chat template, but {tokenizer.name_or_path!r} has none; dialogues are "
            "rendered with a chat template, so name a chat model that has one, or a file in tokens.chat_template"
        )
    own = tokenizer.chat_template
    is_dated = isinstance(own, str) and "strftime_now" in own
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=is_prompt,
            chat_template=_FIXED_DATE + own if is_dated else None,
        )
    except TemplateError as error:
        roles = [message["role"] for message in messages[:8]]
        raise DialogueError(
            REJECTED,
            f"expected a dialogue that the chat template accepts, got the roles {roles}: {error}; drop or repair "
            "such dialogues",
        ) from error
    return text


def _mark(index: int, message: dict[str, str], *, is_trimmed: bool) -> dict[str, str]:
    """The message with its content between two sentinels; whitespace that is trimmed stays outside them."""
    content = message["content"]
    core = content.strip() if is_trimmed else content
    if not content.strip():
        return message
    start = content.index(core)
    opens, closes = chr(FIRST_SENTINEL + 2 * index), chr(FIRST_SENTINEL + 2 * index + 1)
    return message | {"content": content[:start] + opens + core + closes + content[start + len(core) :]}


def _spans(
    messages: list[dict[str, str]], places: dict[int, list[int]], text: str, *, is_trimmed: bool
) -> tuple[MessageSpan, ...]:
    spans = []
    for index, message in enumerate(messages):
        core = message["content"].strip() if is_trimmed else message["content"]
        if not core.strip():
            continue
        opened, closed = places.get(2 * index, []), places.get(2 * index + 1, [])
        if len(opened) != 1 or len(closed) != 1 or text[opened[0] : closed[0]] != core:
            raise _rewritten(messages, f"message {index} ({message['role']}) is not in its text once and unchanged")
        offset = message["content"].index(core)
        spans.append(MessageSpan(index, message["role"], opened[0], closed[0], offset))
    return tuple(sorted(spans, key=lambda span: span.start))


def _rewritten(messages: list[dict[str, str]], detail: str) -> DialogueError:
    start = messages[0]["content"][:40] if messages else ""
    return DialogueError(
        REWRITTEN,
        f"expected a chat template that writes contents as they are, but the template rewrites contents: {detail}, in "
        f"the dialogue that starts with {start!r}; use a template that only adds text around the messages",
    )


def _common_prefix(first: str, second: str) -> str:
    pairs = zip(first, second, strict=False)
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
