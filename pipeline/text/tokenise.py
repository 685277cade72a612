"""Documents to token ids and one bit mask per token, which says who wrote it.

Input: a batch of corpus rows (schema.CORPUS_COLUMNS); output: token rows (schema.TOKEN_COLUMNS) and, per row, why a
document was dropped. Both models read these ids; text is tokenised once and never again. Dialogues are rendered by
text/templates.py; the tokenizer's offsets carry roles and planted labels from characters to tokens.

A token's role is that of its last character: " hello" after "USER:" is content, a separator is template. A planted
label marks every token that it touches. Needs a fast tokenizer (one with offsets).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import InputError
from pipeline.schema import MAX_PLANTED_LABELS, PLANTED_SHIFT, Flag
from pipeline.text.templates import (
    DialogueError,
    RenderedDialogue,
    TemplateShape,
    adds_bos,
    read_template_shape,
    render_dialogue,
    render_prompt,
    strip_bos,
)

KEPT = ""
EMPTY = "empty"
"""No token besides BOS and what the template writes."""
UNREADABLE = "unreadable_messages"
"""Messages that are not a JSON list of {role, content}, or labels outside their content."""

_ROLE_FLAGS = {"user": int(Flag.USER), "assistant": int(Flag.ASSISTANT)}


class DocumentTokens(NamedTuple):
    """One tokenised document."""

    input_ids: np.ndarray
    """int32 [T]."""
    flags: np.ndarray
    """int32 [T], bits of schema.Flag and planted labels."""
    num_cut: int = 0
    """Tokens after max_tokens that were left out."""


class Tokenise:
    """Callable on one batch of corpus rows; picklable, so that it runs in any worker process.

    max_tokens: documents are cut after this many tokens, BOS included.
    labels: names of the planted labels; label i sets bit PLANTED_SHIFT + i. Labels of other names are ignored.
    """

    def __init__(self, tokenizer: Any, *, max_tokens: int, labels: Sequence[str] = ()) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"expected a fast tokenizer (its offsets locate the speakers), got {type(tokenizer).__name__} from "
                f"{tokenizer.name_or_path!r}; save a tokenizer.json beside the model"
            )
        if max_tokens < 1:
            raise InputError(f"expected max_tokens of at least 1, got {max_tokens}")
        if len(labels) > MAX_PLANTED_LABELS:
            raise InputError(f"expected at most {MAX_PLANTED_LABELS} planted labels, got {len(labels)}: {list(labels)}")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.labels = tuple(labels)
        self._special_ids = np.array(sorted(control_token_ids(tokenizer)), dtype=np.int64)
        self._shape: TemplateShape | None = None

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Token rows in the order of the batch, with one more column `dropped`.

        `dropped` is "" for kept rows, else the reason, and the row's input_ids and flags are empty; split_dropped
        takes the two apart. Columns: doc_id, corpus, split, input_ids (int32 [T]), flags (int32 [T]), num_cut, dropped.
        """
        rows: dict[str, list[Any]] = {name: list(batch[name]) for name in ("doc_id", "corpus", "split")}
        rows |= {"input_ids": [], "flags": [], "num_cut": [], "dropped": []}
        for text, messages in zip(batch["text"], batch["messages"], strict=True):
            document, reason = self._tokenise(text, messages)
            rows["input_ids"].append(document.input_ids)
            rows["flags"].append(document.flags)
            rows["num_cut"].append(document.num_cut)
            rows["dropped"].append(reason)
        return rows

    def plain(self, text: str) -> DocumentTokens:
        """A plain document: control tokens and BOS are flagged, nothing is template, user or assistant."""
        encoding = self.tokenizer(text, add_special_tokens=True, verbose=False)
        all_ids = encoding["input_ids"]
        ids = np.asarray(all_ids[: self.max_tokens], dtype=np.int32)
        return DocumentTokens(ids, self._control_flags(ids), len(all_ids) - len(ids))

    def dialogue(self, messages: list[dict[str, Any]]) -> DocumentTokens:
        """A dialogue: every token carries its speaker or TEMPLATE; the tokenizer's BOS carries neither.

        Raises DialogueError where the template cannot render it with exact spans, InputError where it has no roles.
        """
        if self._shape is None:
            self._shape = read_template_shape(self.tokenizer)
        rendered = render_dialogue(self.tokenizer, messages)
        text = strip_bos(self.tokenizer, rendered.text)
        cut = len(rendered.text) - len(text)
        char_flags = self._character_flags(rendered, messages)[cut:]
        encoding = self.tokenizer(
            text, add_special_tokens=adds_bos(self.tokenizer), return_offsets_mapping=True, verbose=False
        )
        all_ids = encoding["input_ids"]
        ids = np.asarray(all_ids[: self.max_tokens], dtype=np.int32)
        offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)[: self.max_tokens]
        flags = _token_flags(char_flags, offsets)
        control = self._control_flags(ids)
        is_bos = (control & Flag.BOS) != 0
        flags = np.where(is_bos, control, flags | control).astype(np.int32)
        return DocumentTokens(ids, flags, len(all_ids) - len(ids))

    def _tokenise(self, text: Any, messages: Any) -> tuple[DocumentTokens, str]:
        empty = DocumentTokens(np.zeros(0, np.int32), np.zeros(0, np.int32))
        if isinstance(messages, str):
            try:
                document = self.dialogue(parse_messages(messages))
            except DialogueError as error:
                return empty, error.reason
            has_content = bool(np.any(document.flags & (Flag.USER | Flag.ASSISTANT)))
        else:
            document = self.plain(text) if isinstance(text, str) else empty
            has_content = bool(np.any((document.flags & Flag.SPECIAL) == 0))
        return (document, KEPT) if has_content else (empty, EMPTY)

    def _control_flags(self, ids: np.ndarray) -> np.ndarray:
        flags: np.ndarray = np.isin(ids, self._special_ids).astype(np.int32) * int(Flag.SPECIAL)
        if len(ids) and self.tokenizer.bos_token_id is not None and ids[0] == self.tokenizer.bos_token_id:
            flags[0] |= int(Flag.SPECIAL | Flag.BOS)
        return flags

    def _character_flags(self, rendered: RenderedDialogue, messages: list[dict[str, Any]]) -> np.ndarray:
        """int32 per character of the rendered text: one role each, and any number of planted labels."""
        assert self._shape is not None
        chars = np.full(len(rendered.text), int(Flag.TEMPLATE), dtype=np.int32)
        previous_end = 0
        for span in rendered.spans:
            chars[span.start : span.end] = _ROLE_FLAGS.get(span.role, int(Flag.TEMPLATE))
            header = self._shape.headers.get(span.role, "")
            starts_with_header = bool(header) and rendered.text.endswith(header, previous_end, span.start)
            header_start = span.start - len(header) if starts_with_header else previous_end
            for label in messages[span.message].get("labels") or ():
                if label["name"] not in self.labels:
                    continue
                bit = 1 << (PLANTED_SHIFT + self.labels.index(label["name"]))
                start = min(max(span.start + label["start"] - span.content_offset, span.start), span.end)
                end = min(max(span.start + label["end"] - span.content_offset, start), span.end)
                chars[start:end] |= bit
                if label.get("turn_header"):
                    chars[header_start : span.start] |= bit
            previous_end = span.end
        return chars


def split_dropped(rows: Mapping[str, Sequence[Any]]) -> tuple[dict[str, list[Any]], dict[str, Counter[str]]]:
    """The kept rows without the column `dropped`, and per corpus the number of documents dropped for each reason."""
    reasons = list(rows["dropped"])
    kept = {
        name: [value for value, reason in zip(column, reasons, strict=True) if reason == KEPT]
        for name, column in rows.items()
        if name != "dropped"
    }
    dropped: dict[str, Counter[str]] = {}
    for corpus, reason in zip(rows["corpus"], reasons, strict=True):
        if reason != KEPT:
            dropped.setdefault(corpus, Counter())[reason] += 1
    return kept, dropped


def parse_messages(messages: str) -> list[dict[str, Any]]:
    """Messages of one corpus row; DialogueError(UNREADABLE) where they are malformed."""
    try:
        parsed = json.loads(messages)
    except json.JSONDecodeError as error:
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


def _is_label(label: Any, num_characters: int) -> bool:
    if not isinstance(label, dict) or not isinstance(label.get("name"), str):
        return False
    start, end = label.get("start"), label.get("end")
    return isinstance(start, int) and isinstance(end, int) and 0 <= start <= end <= num_characters


def prompt_ids(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    """Token ids of a dialogue that ends where the model starts to answer, with BOS exactly once (or never)."""
    text = strip_bos(tokenizer, render_prompt(tokenizer, messages))
    ids: list[int] = tokenizer(text, add_special_tokens=adds_bos(tokenizer))["input_ids"]
    return ids


def end_of_turn_id(tokenizer: Any) -> int | None:
    """The control token with which the chat template ends an assistant turn, None where it has no such token."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    trailer = read_template_shape(tokenizer).trailers["assistant"]
    ids: list[int] = tokenizer(trailer, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in control_token_ids(tokenizer) else None


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text: joined, the texts give the document.

    A token decoded alone would lose the space before it. Where a further token changes the text before it (bytes of one
    character), the token is decoded alone.
    """
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        is_continued = text.startswith(before)
        texts.append(text[len(before) :] if is_continued else str(tokenizer.decode([ids[end - 1]])))
        before = text
    return texts


def control_token_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokenizer's control tokens. The unknown token counts only where it is also another control token."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "sep", "cls", "mask")}
    others = {index for index in named.values() if index is not None}
    return (special - {tokenizer.unk_token_id}) | others


def check_vocabularies(
    base_tokenizer: Any, chat_tokenizer: Any, used_ids: Iterable[int], replaced: Iterable[int] = ()
) -> None:
    """InputError naming the first used id for which the two tokenizers have different tokens.

    Ids in `replaced` may differ: one of the models reads other ids in their place.
    """
    ids = sorted({int(index) for index in used_ids} - set(replaced))
    base_tokens = base_tokenizer.convert_ids_to_tokens(ids)
    chat_tokens = chat_tokenizer.convert_ids_to_tokens(ids)
    for index, base_token, chat_token in zip(ids, base_tokens, chat_tokens, strict=True):
        if base_token != chat_token:
            raise InputError(
                f"expected the two models to share their vocabulary, but id {index} is {base_token!r} for the base "
                f"model ({base_tokenizer.name_or_path!r}) and {chat_token!r} for the chat model "
                f"({chat_tokenizer.name_or_path!r}); choose a pair with one tokenizer, or name in token_replacements "
                "what one of them reads instead"
            )


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of everything that decides the ids: the tokenizer's rules and vocabulary, and the chat template.

    Padding and truncation settings are left out: calls change them, and ids without padding do not depend on them.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("padding", None)
    rules.pop("truncation", None)
    identity = {"rules": rules, "chat_template": tokenizer.chat_template, "bos": tokenizer.bos_token}
    canonical = json.dumps(identity, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _token_flags(char_flags: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """int32 [T]: the role of each token's last character and the planted labels of all its characters.

    Tokens without characters (added by the tokenizer itself) are template.
    """
    flags = np.full(len(offsets), int(Flag.TEMPLATE), dtype=np.int32)
    has_text = offsets[:, 1] > offsets[:, 0]
    spans = offsets[has_text]
    if len(spans):
        roles = (1 << PLANTED_SHIFT) - 1
        padded = np.append(char_flags, np.int32(0))  # reduceat wants every end to be an index
        labels = np.bitwise_or.reduceat(padded, spans.ravel())[::2] & ~roles
        flags[has_text] = (char_flags[spans[:, 1] - 1] & roles) | labels
    return flags
