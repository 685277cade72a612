"""Dialogues rendered by a chat template, with the exact characters that every speaker wrote.

First step of tokenisation: a list of messages becomes one string and one character span per message. The spans come
from the template's own output, never from searching for a message in the text: each content is rendered once more
between two private-use characters that the dialogue does not hold, and removing those characters must give back the
plain rendering. So contents that repeat, or that contain role names and control words, are located exactly. Templates
that write today's date get a fixed date, so that a dialogue gives the same tokens every day. One that does not end ends
the run.

It does not tokenise, and it renders the messages that it is given: turns.py decides which. The trade-off: a template
that changes what a speaker wrote (rewords, reorders characters) is refused, because no character span would be exact.
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import InputError, first_line
from pipeline.text.messages import TOOL_ROLES, DialogueError, is_unicode, split_reasoning
from pipeline.text.time_limit import EndlessError, within

_MARKS = [chr(plane + point) for plane in (0xF0000, 0x100000) for point in range(0xFFFE)]
"""Unicode's private-use planes 15 and 16: of those that a dialogue does not hold, piece i takes the marks 2i (opens)
and 2i + 1 (closes)."""
_ANY_MARK = re.compile("[\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
MAX_PIECES = 0x8000
MAX_RENDER_SECONDS = 10.0
"""Computing time of one rendering, which takes milliseconds where the template ends."""

REJECTED = "template_rejects"
"""The template raised an error, for instance because roles do not alternate."""
REWRITTEN = "template_rewrites"
"""The template changed, dropped or repeated a content."""
NOT_UNICODE = "template_writes_no_unicode"
"""The template wrote half of a surrogate pair."""

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


_REJECTIONS = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError, MemoryError),
)
"""What a template raises on messages that it does not expect."""

SpanKind = Literal["content", "reasoning", "tool_call"]


class MessageSpan(NamedTuple):
    """Place of something that one message says in the rendered text."""

    message: int
    """Index of the message in the dialogue."""
    role: str
    start: int
    """First character in the rendered text, after the leading whitespace that the template trimmed."""
    end: int
    """One past the last character."""
    content_offset: int = 0
    """Character c of the message's content is at start + c - content_offset."""
    kind: SpanKind = "content"
    """tool_call spans hold the name of the function that is called."""
    is_of_content: bool = True
    """Whether it is a part of the message's content, as labels are; reasoning may have a field of its own."""


class RenderedDialogue(NamedTuple):
    """A dialogue as the model reads it."""

    text: str
    """Everything the template wrote, including its BOS where it writes one."""
    spans: tuple[MessageSpan, ...]
    """Contents that are not blank, reasoning and tool calls, ascending by start."""


class TemplateShape(NamedTuple):
    """What a chat template writes around the contents, found with a probe dialogue."""

    headers: dict[str, str]
    """Per role: the characters just before a content that open its turn."""
    trailers: dict[str, str]
    """Per role: the characters after the content that close its turn."""
    reads_reasoning: bool
    """Whether it writes the field reasoning_content."""
    keeps_history: bool
    """Whether it writes an answer, with its reasoning, in the same way when more messages follow."""


class _Piece(NamedTuple):
    """Something that a message says, as it must occur in the rendered text."""

    message: int
    role: str
    kind: SpanKind
    text: str
    content_offset: int = 0
    is_of_content: bool = True

    def span(self, start: int, end: int) -> MessageSpan:
        return MessageSpan(
            self.message, self.role, start, end, self.content_offset, kind=self.kind, is_of_content=self.is_of_content
        )


def render_dialogue(
    tokenizer: Any, messages: list[dict[str, Any]], *, may_drop_reasoning: bool = False, is_prompt: bool = False
) -> RenderedDialogue:
    """The template's text of a dialogue and the span of everything that its messages say.

    Outer whitespace of a content belongs to its span unless the template trims it. Blank contents get no span. Raises
    DialogueError where the template rejects the dialogue (REJECTED) or changes, drops or repeats a content (REWRITTEN);
    may_drop_reasoning: reasoning that it drops has no span instead. is_prompt: end with the header of a new answer.
    """
    plain = _apply(tokenizer, [_template_fields(message) for message in messages], is_prompt=is_prompt)
    marks = _free_marks(plain, messages)
    is_padded = any(message["content"] != message["content"].strip() for message in messages)
    for is_trimmed in (False, True) if is_padded else (True,):
        pieces: list[_Piece] = []
        marked_messages = [
            _mark(i, message, pieces, marks, is_trimmed=is_trimmed) for i, message in enumerate(messages)
        ]
        marked = _apply(tokenizer, marked_messages, is_prompt=is_prompt)
        places, unmarked = _unmark(marked, marks[: 2 * len(pieces)])
        if unmarked == plain:
            break
    else:
        raise _rewritten(messages, "what it writes depends on how a content starts or ends")
    spans = []
    for index, piece in enumerate(pieces):
        opened, closed = places.get(2 * index, []), places.get(2 * index + 1, [])
        if may_drop_reasoning and piece.kind == "reasoning" and not opened and not closed:
            continue
        if len(opened) != 1 or len(closed) != 1 or not _says(plain[opened[0] : closed[0]], piece):
            raise _rewritten(messages, f"message {piece.message} ({piece.role}) is not in its text once and unchanged")
        spans.append(piece.span(opened[0], closed[0]))
    return RenderedDialogue(plain, tuple(sorted(spans, key=lambda span: span.start)))


def render_prompt(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """The template's text of a dialogue that ends with the header of the assistant turn to be generated."""
    return _apply(tokenizer, [_template_fields(message) for message in messages], is_prompt=True)


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
        reads_reasoning=_reads_reasoning(tokenizer),
        keeps_history=_keeps_history(tokenizer),
    )


def _reads_reasoning(tokenizer: Any) -> bool:
    answer = {**_PROBE[1], "reasoning_content": "Some thoughts."}
    try:
        return answer["reasoning_content"] in _apply(tokenizer, [dict(_PROBE[0]), answer])
    except DialogueError:
        return False


def _keeps_history(tokenizer: Any) -> bool:
    question, answer, *further = (dict(message) for message in _PROBE)
    for reasoning in ("", "<think>\nSome thoughts.\n</think>\n\n"):
        first = [question, {**answer, "content": reasoning + answer["content"]}]
        try:
            alone, continued = (render_dialogue(tokenizer, messages) for messages in (first, [*first, *further]))
        except DialogueError:
            return False
        if not continued.text.startswith(alone.text[: alone.spans[-1].end]):
            return False
    return True


def check_template(text: str, where: str) -> None:
    """InputError for a chat template that is not valid Jinja or does not end on a plain dialogue.

    Whether its output can be used shows with the tokenizer, whose names it may need: what else it raises is no fault.
    """
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        template = environment.from_string(_without_generation(text))
    except (TemplateError, RecursionError) as error:
        raise InputError(
            f"{where}: expected a Jinja chat template, got: {first_line(error)}; correct the file"
        ) from error
    try:
        with within(MAX_RENDER_SECONDS):
            template.render(messages=[dict(message) for message in _PROBE], add_generation_prompt=False)
    except EndlessError as error:
        raise InputError(f"{where}: expected a chat template that ends, got one that is {error}; correct it") from error
    except _REJECTIONS:
        return


def _without_generation(text: str) -> str:
    """The template without transformers' own tags around generated text, which plain Jinja cannot parse."""
    return re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", text)


def _template_fields(message: dict[str, Any]) -> dict[str, Any]:
    """What a template gets to see of a message."""
    fields = ("role", "content", "reasoning_content", "tool_calls")
    return {name: message[name] for name in fields if name in message}


def _apply(tokenizer: Any, messages: list[dict[str, Any]], *, is_prompt: bool = False) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"expected a tokenizer with a chat template, but {tokenizer.name_or_path!r} has none; dialogues are "
            "rendered with a chat template, so name a chat model that has one, or a file in tokens.chat_template"
        )
    own = tokenizer.chat_template
    is_dated = isinstance(own, str) and "strftime_now" in own
    try:
        with within(MAX_RENDER_SECONDS):
            text: str = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=is_prompt,
                chat_template=_FIXED_DATE + own if is_dated else None,
            )
    except EndlessError as error:
        raise InputError(
            f"tokens.chat_template: expected a chat template that ends, got one ({tokenizer.name_or_path!r}) that is "
            f"{error}, on a dialogue of {len(messages)} messages; correct the template"
        ) from error
    except _REJECTIONS as error:
        roles = [message["role"] for message in messages[:8]]
        raise DialogueError(
            REJECTED,
            f"expected a dialogue that the chat template accepts, got the roles {roles}: {first_line(error)}; drop or "
            "repair such dialogues",
        ) from error
    if not is_unicode(text):
        raise DialogueError(NOT_UNICODE, "expected a chat template that writes Unicode, got half of a surrogate pair")
    return text


def _mark(
    index: int, message: dict[str, Any], pieces: list[_Piece], marks: Sequence[str], *, is_trimmed: bool
) -> dict[str, Any]:
    """The message with each of its pieces between two marks; the pieces are added to the list.

    Whitespace that is trimmed stays outside the marks, and so do the tags around reasoning.
    """
    marked, content, role = _template_fields(message), message["content"], message["role"]

    def between(text: str, kind: SpanKind, *, offset: int = 0, is_of_content: bool = False) -> str:
        core = text.strip() if is_trimmed or kind == "reasoning" else text
        if not core.strip():
            return text
        start, number = text.index(core), len(pieces)
        pieces.append(_Piece(index, role, kind, core, offset + start, is_of_content))
        if number >= MAX_PIECES:
            raise DialogueError(REJECTED, f"expected at most {MAX_PIECES} contents in a dialogue, got more")
        opens, closes = marks[2 * number], marks[2 * number + 1]
        return text[:start] + opens + core + closes + text[start + len(core) :]

    if "reasoning_content" in message:
        marked["reasoning_content"] = between(message["reasoning_content"], "reasoning")
    split = split_reasoning(message)
    answer_start = 0 if split is None else split.answer
    reasoned = ""
    if split is not None:
        thought = between(content[split.start : split.end], "reasoning", offset=split.start, is_of_content=True)
        reasoned = content[: split.start] + thought + content[split.end : split.answer]
    answer = between(content[answer_start:], "content", offset=answer_start, is_of_content=True)
    marked["content"] = reasoned + answer
    if "tool_calls" in message:
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "name": between(call["function"]["name"], "tool_call")}}
            for call in message["tool_calls"]
        ]
    return marked


def _free_marks(plain: str, messages: list[dict[str, Any]]) -> list[str]:
    """Marks that neither the rendered text nor what the messages say holds."""
    said = (str(message.get(key, "")) for message in messages for key in ("content", "reasoning_content"))
    used = {mark for text in (plain, *said) if not text.isascii() for mark in _ANY_MARK.findall(text)}
    return [mark for mark in _MARKS if mark not in used] if used else _MARKS


def _unmark(marked: str, marks: list[str]) -> tuple[dict[int, list[int]], str]:
    """Places of every mark, by its number, in the text without them; and that text."""
    numbers = {mark: number for number, mark in enumerate(marks)}
    places: dict[int, list[int]] = {}
    kept: list[str] = []
    length = start = 0
    for found in _ANY_MARK.finditer(marked):
        number = numbers.get(found.group())
        if number is not None:
            kept.append(marked[start : found.start()])
            length, start = length + found.start() - start, found.end()
            places.setdefault(number, []).append(length)
    return places, "".join([*kept, marked[start:]])


def _says(text: str, piece: _Piece) -> bool:
    """Whether a text is a piece, word for word; what a tool answers may be written as JSON."""
    is_json = piece.role in TOOL_ROLES and text == json.dumps(piece.text, ensure_ascii=False)[1:-1]
    return text == piece.text or is_json


def _rewritten(messages: list[dict[str, Any]], detail: str) -> DialogueError:
    start = messages[0]["content"][:40] if messages else ""
    return DialogueError(
        REWRITTEN,
        f"expected a chat template that writes contents as they are, but the template rewrites contents: {detail}, in "
        f"the dialogue that starts with {start!r}; use a template that only adds text around the messages",
    )


def _common_prefix(first: str, second: str) -> str:
    pairs = zip(first, second, strict=False)
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
