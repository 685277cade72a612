"""One dialogue as the documents that a model reads: whole, or one document per assistant turn.

Many reasoning models' templates rewrite earlier turns: they drop their reasoning as soon as the next question comes. No
single text is then what the model read while it wrote each answer. Such a dialogue becomes one document per answer,
rendered as at that answer. Everything up to the answer before is its history: context that has rows in its own
document. So every word of a dialogue is outside the history of exactly one document, with the reasoning of its turn.

Where a template keeps history, each turn's text begins with that of the turn before, and one document holds them all.
Some templates drop even the reasoning of the last turn, which the model writes itself after the header of its turn;
such an answer is put together from the prompt and what was written. Nothing here tokenises.
"""

import re
from typing import Any, Literal, NamedTuple

from pipeline.text.messages import DialogueError, with_reasoning_in_content
from pipeline.text.templates import (
    REJECTED,
    REWRITTEN,
    MessageSpan,
    RenderedDialogue,
    TemplateShape,
    render_dialogue,
)

MAX_TURNS = 1024
"""Answers of one dialogue (conversations.turn_id has room for no more)."""

Mode = Literal["auto", "whole", "per_turn"]
"""auto: one document where the template keeps history, one per answer where it rewrites it."""

_CLOSING = re.compile(r"\s*</think>\s*")
_NO_REASONING = re.compile(r"\s*<think>\s*</think>\s*")
"""What a template writes in front of an answer without reasoning."""


class DialogueDocument(NamedTuple):
    """A text that a model reads."""

    rendered: RenderedDialogue
    """Tool calls span the whole call."""
    messages: list[dict[str, Any]]
    """The messages as they were rendered; spans and labels point into their contents."""
    turn: int | None = None
    """Number of its last answer, from 0; None where one document holds the dialogue."""
    history_end: int = 0
    """Characters that belong to answers before, their questions and what closes their turn."""


def dialogue_documents(
    tokenizer: Any, messages: list[dict[str, Any]], shape: TemplateShape, mode: Mode = "auto"
) -> list[DialogueDocument]:
    """The documents of a dialogue, in the order of its answers.

    Raises DialogueError where the template cannot render the dialogue with exact spans, in mode `whole` also where it
    drops reasoning.
    """
    if not shape.reads_reasoning:
        messages = [with_reasoning_in_content(message) for message in messages]
    if mode == "whole" or (mode == "auto" and shape.keeps_history):
        try:
            whole = render_dialogue(tokenizer, messages)
            return [DialogueDocument(_with_whole_calls(whole, shape), messages)]
        except DialogueError as error:
            if mode == "whole" or error.reason != REWRITTEN:
                raise
    ends = [place + 1 for place, message in enumerate(messages) if message["role"] == "assistant"]
    if len(ends) > MAX_TURNS:
        raise DialogueError(REJECTED, f"expected at most {MAX_TURNS} answers in a dialogue, got {len(ends)}")
    if not ends or (mode == "auto" and ends[-1] < len(messages)):
        ends.append(len(messages))
    texts = [_as_at_turn(tokenizer, messages[:end], shape) for end in ends]
    last = len(ends) - 1
    kept = [k for k in range(last + 1) if mode == "per_turn" or k == last or not _begins(texts[k + 1], texts[k])]
    if len(kept) == 1:
        return [DialogueDocument(texts[last], messages)]
    documents, num_before = [], 0
    for k in kept:
        history_end = _end_of(texts[k], num_before, shape)
        documents.append(DialogueDocument(texts[k], messages[: ends[k]], k, history_end))
        num_before = ends[k]
    return documents


def closing_tag(text: str, reasoning: MessageSpan) -> tuple[int, int]:
    """Start and end of the tag that closes a span of reasoning, with the whitespace around it; empty without one."""
    found = _CLOSING.match(text, reasoning.end)
    return found.span() if found else (reasoning.end, reasoning.end)


def _as_at_turn(tokenizer: Any, messages: list[dict[str, Any]], shape: TemplateShape) -> RenderedDialogue:
    """The text when the last message had just been written."""
    rendered = render_dialogue(tokenizer, messages, may_drop_reasoning=True)
    last = len(messages) - 1
    answer = with_reasoning_in_content(messages[last])
    spans = [span for span in rendered.spans if span.message == last]
    own = render_dialogue(_AsWritten(), [{"role": answer["role"], "content": answer["content"]}])
    is_dropped = any(span.kind == "reasoning" for span in own.spans) and not any(
        span.kind == "reasoning" for span in spans
    )
    if not is_dropped:
        return _with_whole_calls(rendered, shape)
    if "tool_calls" in answer:
        raise DialogueError(
            REWRITTEN,
            "expected a chat template that writes the reasoning before a tool call, but it drops it; use a template "
            "that keeps the reasoning of the last turn",
        )
    prompt = render_dialogue(tokenizer, messages[:last], may_drop_reasoning=True, is_prompt=True)
    start = own.spans[0].start if prompt.text.rstrip().endswith("<think>") else 0
    place = len(prompt.text) - start
    text = prompt.text + own.text[start:].rstrip() + shape.trailers["assistant"]
    written = [
        span._replace(message=last, start=span.start + place, end=min(span.end, len(own.text.rstrip())) + place)
        for span in own.spans
    ]
    return _with_whole_calls(RenderedDialogue(text, (*prompt.spans, *written)), shape)


class _AsWritten:
    """Stands for a tokenizer whose template writes the contents and nothing else."""

    chat_template = "content"
    name_or_path = ""

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> str:
        return "".join(message["content"] for message in messages)


def _begins(later: RenderedDialogue, earlier: RenderedDialogue) -> bool:
    """Whether the later text keeps everything of the earlier one, up to what closed its last turn."""
    return not earlier.spans or later.text.startswith(earlier.text[: earlier.spans[-1].end])


def _end_of(rendered: RenderedDialogue, num_messages: int, shape: TemplateShape) -> int:
    """Where the first messages end, with what closes their last turn; 0 for none."""
    spans = [span for span in rendered.spans if span.message < num_messages]
    if not spans:
        return 0
    end, trailer = spans[-1].end, shape.trailers["assistant"]
    return end + len(trailer) if rendered.text.startswith(trailer, end) else end


def _with_whole_calls(rendered: RenderedDialogue, shape: TemplateShape) -> RenderedDialogue:
    """Spans of tool calls widened from the function's name to all that the assistant wrote for its calls."""
    text, spans = rendered
    if not any(span.kind == "tool_call" for span in spans):
        return rendered
    header, trailer = shape.headers["assistant"], shape.trailers["assistant"]
    widened: list[MessageSpan] = []
    for place, span in enumerate(spans):
        if span.kind != "tool_call":
            widened.append(span)
            continue
        before = widened[-1] if widened else None
        if before is not None and before.kind == "tool_call" and before.message == span.message:
            widened.pop()
            start = before.start
        elif before is not None and before.message == span.message:
            start = closing_tag(text, before)[1] if before.kind == "reasoning" else before.end
        else:
            found = text.rfind(header, before.end if before else 0, span.start) if header else -1
            start = found + len(header) if found >= 0 else span.start
            empty = _NO_REASONING.match(text, start)
            start = empty.end() if empty else start
        following = spans[place + 1].start if place + 1 < len(spans) else len(text)
        closed = text.find(trailer, span.end) if trailer else -1
        is_followed = place + 1 < len(spans) and spans[place + 1].message == span.message
        end = closed if not is_followed and span.end <= closed <= following else span.end
        widened.append(span._replace(start=start, end=end))
    return RenderedDialogue(text, tuple(widened))
