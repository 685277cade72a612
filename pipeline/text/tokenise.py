"""Documents to token ids and one bit mask per token, which says who wrote it.

Input: a batch of corpus rows (schema.CORPUS_COLUMNS); output: token rows (schema.TOKEN_COLUMNS) and, per row, why a
document was dropped. Both models read these ids; text is tokenised once and never again. Dialogues are rendered by
text/turns.py; the tokenizer's offsets carry roles and planted labels from characters to tokens.

A token's role is that of its last character: " hello" after "USER:" is content, a separator is template. A planted
label marks every token that it touches. Needs a fast tokenizer (one with offsets).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import InputError
from pipeline.schema import MAX_PLANTED_LABELS, PLANTED_SHIFT, Flag
from pipeline.text.conversations import turn_id
from pipeline.text.messages import TOOL_ROLES, DialogueError, parse_messages
from pipeline.text.templates import MessageSpan, TemplateShape, read_template_shape
from pipeline.text.tokenizers import BosUse, control_token_ids, encode, read_bos_use
from pipeline.text.turns import DialogueDocument, Mode, closing_tag, dialogue_documents

KEPT = ""
EMPTY = "empty"
"""No token besides BOS and what the template writes."""
CUT = "cut before its answer"
"""A document of one answer whose history alone has max_tokens tokens."""

_ROLE_FLAGS = {"user": int(Flag.USER), "assistant": int(Flag.ASSISTANT)} | dict.fromkeys(TOOL_ROLES, int(Flag.TOOL))
_KIND_FLAGS = {"content": 0, "reasoning": int(Flag.REASONING), "tool_call": int(Flag.TOOL)}
_SPOKEN = Flag.USER | Flag.ASSISTANT | Flag.TOOL


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
    dialogues: whether a dialogue becomes one document or one per answer (turns.Mode).
    labels: names of the planted labels; label i sets bit PLANTED_SHIFT + i. Labels of other names are ignored.
    """

    def __init__(
        self, tokenizer: Any, *, max_tokens: int, labels: Sequence[str] = (), dialogues: Mode = "auto"
    ) -> None:
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
        self.mode = dialogues
        self._special_ids = np.array(sorted(control_token_ids(tokenizer)), dtype=np.int64)
        self._shape: TemplateShape | None = None
        self._bos: BosUse | None = None

    @property
    def shape(self) -> TemplateShape:
        """What the chat template writes around contents; InputError where it has no roles."""
        if self._shape is None:
            self._shape = read_template_shape(self.tokenizer)
        return self._shape

    @property
    def bos(self) -> BosUse:
        """Where the tokenizer's BOS stands."""
        if self._bos is None:
            self._bos = read_bos_use(self.tokenizer)
        return self._bos

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Token rows in the order of the batch, with the columns `dropped` and `detail` besides.

        A dialogue whose template rewrites history gives one row per answer. `dropped` is "" for kept rows, else the
        reason, and the row's input_ids and flags are empty; split_dropped takes the two apart. Columns: doc_id, corpus,
        split, input_ids (int32 [T]), flags (int32 [T]), num_cut, dropped, detail (the reason at length, or "").
        """
        names = ("doc_id", "corpus", "split", "input_ids", "flags", "num_cut", "dropped", "detail")
        rows: dict[str, list[Any]] = {name: [] for name in names}
        columns = (batch[name] for name in ("doc_id", "corpus", "split", "text", "messages"))
        for doc_id, corpus, split, text, messages in zip(*columns, strict=True):
            for document in self._tokenise(int(doc_id), text, messages):
                tokens = document.tokens
                row = (document.doc_id, corpus, split, *tokens, document.reason, document.detail)
                for name, value in zip(names, row, strict=True):
                    rows[name].append(value)
        return rows

    def plain(self, text: str) -> DocumentTokens:
        """A plain document: control tokens and BOS are flagged, nothing is template, user or assistant.

        It begins with BOS where dialogues do.
        """
        all_ids = self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        if self.bos.opens_dialogues and all_ids[:1] != [self.bos.token_id]:
            all_ids = [self.bos.token_id, *all_ids]
        ids = np.asarray(all_ids[: self.max_tokens], dtype=np.int32)
        return DocumentTokens(ids, self._control_flags(ids), len(all_ids) - len(ids))

    def dialogue(self, messages: list[dict[str, Any]]) -> DocumentTokens:
        """A dialogue as one document: every token carries its speaker or TEMPLATE; the tokenizer's BOS carries neither.

        Raises DialogueError where the template cannot render it with exact spans, InputError where it has no roles.
        """
        (document,) = dialogue_documents(self.tokenizer, messages, self.shape, "whole")
        return self._tokens_of(document)

    def _tokens_of(self, document: DialogueDocument) -> DocumentTokens:
        text = document.rendered.text
        encoding = encode(self.tokenizer, text, self.bos)
        cut = len(text) - len(encoding.text)
        char_flags = self._character_flags(document)[cut:]
        ids = np.asarray(encoding.ids[: self.max_tokens], dtype=np.int32)
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)[: self.max_tokens]
        flags, control = _token_flags(char_flags, offsets), self._control_flags(ids)
        is_bos = ((control & Flag.BOS) != 0) & ((flags & Flag.TEMPLATE) != 0)
        flags = np.where(is_bos, control, flags | control)
        if document.history_end:
            flags[offsets[:, 1] <= document.history_end - cut] |= int(Flag.HISTORY)
        return DocumentTokens(ids, flags.astype(np.int32), len(encoding.ids) - len(ids))

    def _tokenise(self, doc_id: int, text: Any, messages: Any) -> "list[_Tokenised]":
        """The documents of one row, at least one."""
        if not isinstance(messages, str):
            tokens = self.plain(text) if isinstance(text, str) else _NO_TOKENS
            has_content = bool(np.any((tokens.flags & Flag.SPECIAL) == 0))
            return [_Tokenised(doc_id, tokens) if has_content else _Tokenised(doc_id, _NO_TOKENS, EMPTY)]
        try:
            documents = dialogue_documents(self.tokenizer, parse_messages(messages), self.shape, self.mode)
        except DialogueError as error:
            return [_Tokenised(doc_id, _NO_TOKENS, error.reason, str(error))]
        found = []
        for document in documents:
            own_id = doc_id if document.turn is None else turn_id(doc_id, document.turn)
            tokens = self._tokens_of(document)
            is_new = (tokens.flags & Flag.HISTORY) == 0
            reason = KEPT if np.any(is_new & ((tokens.flags & _SPOKEN) != 0)) else EMPTY
            if reason and tokens.num_cut:
                reason = CUT if document.history_end else EMPTY
            found.append(_Tokenised(own_id, _NO_TOKENS if reason else tokens, reason))
        return found

    def _control_flags(self, ids: np.ndarray) -> np.ndarray:
        flags: np.ndarray = np.isin(ids, self._special_ids).astype(np.int32) * int(Flag.SPECIAL)
        if self.bos.token_id is not None:
            is_bos = ids == self.bos.token_id
            if self.bos.opens_turns:
                is_bos[1:] = False
            flags[is_bos] |= int(Flag.SPECIAL | Flag.BOS)
        return flags

    def _character_flags(self, document: DialogueDocument) -> np.ndarray:
        """int32 per character of the rendered text: who wrote it, of what kind, and any number of planted labels."""
        text, spans = document.rendered
        chars = np.full(len(text), int(Flag.TEMPLATE), dtype=np.int32)
        previous_end = 0
        for span in spans:
            chars[span.start : span.end] = _ROLE_FLAGS.get(span.role, int(Flag.TEMPLATE)) | _KIND_FLAGS[span.kind]
            if span.kind == "reasoning":
                chars[slice(*closing_tag(text, span))] = int(Flag.TEMPLATE | Flag.REASONING)
            header = self.shape.headers.get(span.role, "")
            starts_with_header = bool(header) and text.endswith(header, previous_end, span.start)
            header_start = span.start - len(header) if starts_with_header else previous_end
            labels = (document.messages[span.message].get("labels") or ()) if span.is_of_content else ()
            self._add_labels(chars, span, labels, header_start)
            previous_end = span.end
        return chars

    def _add_labels(
        self, chars: np.ndarray, span: MessageSpan, labels: Sequence[Mapping[str, Any]], header_start: int
    ) -> None:
        """The bits of labels on the characters of their span, in place."""
        for label in labels:
            if label["name"] not in self.labels:
                continue
            bit = 1 << (PLANTED_SHIFT + self.labels.index(label["name"]))
            start = min(max(span.start + label["start"] - span.content_offset, span.start), span.end)
            end = min(max(span.start + label["end"] - span.content_offset, start), span.end)
            chars[start:end] |= bit
            if label.get("turn_header"):
                chars[header_start : span.start] |= bit


class _Tokenised(NamedTuple):
    """One document of a row, or the reason why there is none."""

    doc_id: int
    tokens: DocumentTokens
    reason: str = KEPT
    detail: str = ""


_NO_TOKENS = DocumentTokens(np.zeros(0, np.int32), np.zeros(0, np.int32))


def split_dropped(rows: Mapping[str, Sequence[Any]]) -> tuple[dict[str, list[Any]], dict[str, Counter[str]]]:
    """The kept rows without the columns `dropped` and `detail`; per corpus, the documents dropped for each reason."""
    reasons = list(rows["dropped"])
    kept = {
        name: [value for value, reason in zip(column, reasons, strict=True) if reason == KEPT]
        for name, column in rows.items()
        if name not in ("dropped", "detail")
    }
    dropped: dict[str, Counter[str]] = {}
    for corpus, reason in zip(rows["corpus"], reasons, strict=True):
        if reason != KEPT:
            dropped.setdefault(corpus, Counter())[reason] += 1
    return kept, dropped


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
