"""Readers: one file of any kind to documents, with a reason for every document that is not used.

A document is a text or a dialogue. Its identity is the hash of its words alone, without labels. Files are read as
streams from any fsspec URL (text/files.py), hub data sets through `datasets`. Documents that are filtered out
(text/filters.py) are counted like those that cannot be used.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from operator import truediv
from typing import Any, NamedTuple

import fsspec

from pipeline.errors import InputError, first_line
from pipeline.schema import Split
from pipeline.text.files import ReadShare, as_input_error, check_unpacked, open_text
from pipeline.text.filters import Filters, filter_reason
from pipeline.text.messages import is_unicode, read_messages, words_of

EMPTY = "empty"
NO_COLUMN = "column missing"
NOT_TEXT = "not text"
NOT_UNICODE = "not valid Unicode"
DUPLICATE = "duplicate"
BEYOND_LIMIT = "beyond max_documents"

BOM = "\ufeff"
"""The mark at the start of files from some editors; it is never a part of a document."""

_NUM_EXAMPLE_CHARACTERS = 80

_SPLIT_RESOLUTION = 1 << 32

_BATCH_ROWS, _BATCH_BYTES = (8, 1024), 1 << 30
"""Of Parquet: fewest and most rows that are unpacked at once, and the memory that they should take."""


class Document(NamedTuple):
    """One document, or the reason why there is none."""

    text: str | None = None
    """A plain document."""
    messages: str | None = None
    """A dialogue as JSON list of {role, content}, with labels, tool_calls and reasoning_content where it has them."""
    labels: frozenset[str] = frozenset()
    """Planted labels that occur in it."""
    reason: str = ""
    """Why it is not used; empty for a document that is."""
    num_characters: int = 0
    """Of the text, or of all contents."""
    unusable: str = ""
    """The beginning of a document that could not be used; empty for one that was left out on request (filters)."""


def document_id(document: Document) -> int:
    """First 63 bits of the SHA-256 of the words: the same text has the same id in every file."""
    if document.text is not None:
        words = document.text
    else:
        words = json.dumps(words_of(json.loads(document.messages or "[]")), ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()[:8]) >> 1


def split_of(doc_id: int, validation_frac: float) -> str:
    """train or validation, by the document's hash alone."""
    return Split.VALIDATION if doc_id % _SPLIT_RESOLUTION < validation_frac * _SPLIT_RESOLUTION else Split.TRAIN


def read_documents(path: str, source: Mapping[str, Any], share: ReadShare | None = None) -> Iterator[Document]:
    """Documents of one file (or of a hub data set, where `path` is empty) in the file's order, filters applied.

    `source` holds the settings of its corpus as in a run file: kind, text_column, messages_column, role_key,
    content_key, role_names, where, filters, split_on, ... `share` is told how far the reading is.
    """
    filters = Filters(**source.get("filters") or {})
    for document in _READERS[source["kind"]](path, source, share or ReadShare()):
        yield document if document.reason else _filtered(document, filters)


def _filtered(document: Document, filters: Filters) -> Document:
    messages = None if document.messages is None else json.loads(document.messages)
    contents = [document.text or ""] if messages is None else [message["content"] for message in messages]
    if not all(is_unicode(content) for content in (*contents, document.messages or "")):
        return _unusable(NOT_UNICODE, contents)
    reason = filter_reason(document.text, messages, filters)
    return Document(reason=reason) if reason else document._replace(num_characters=sum(map(len, contents)))


def _read_jsonl(path: str, source: Mapping[str, Any], share: ReadShare) -> Iterator[Document]:
    with as_input_error(_named(path, source)), open_text(path, share) as lines:
        for number, raw in enumerate(lines, 1):
            line = raw.lstrip(BOM)  # files that were joined have one in their middle
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                why = "nested too deep" if isinstance(error, RecursionError) else first_line(error)
                raise InputError(
                    f"{_named(path, source)}, line {number}: expected a JSON object, "
                    f"got {line[:60]!r}: {why}; correct the line"
                ) from error
            yield _from_row(row, source)


def _named(path: str, source: Mapping[str, Any]) -> str:
    return f"corpus {source['name']!r}: {path}"


def _read_parquet(path: str, source: Mapping[str, Any], share: ReadShare) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [source.get("text_column") or source.get("messages_column"), *(source.get("where") or {})]
    try:
        with as_input_error(_named(path, source)), fsspec.open(path, "rb") as stream:
            file = pq.ParquetFile(stream)
            for column in columns:
                if column not in file.schema_arrow.names:
                    have = ", ".join(file.schema_arrow.names)
                    raise InputError(f"{_named(path, source)}: expected a column {column!r}, got {have}")
            for number, row in enumerate(_rows_of(file, columns, path), 1):
                share.of = partial(truediv, number, file.metadata.num_rows)
                yield _from_row(row, source)
    except pa.ArrowException as error:
        raise InputError(
            f"{_named(path, source)}: expected a readable Parquet file, got: {error}; replace it"
        ) from error


def _rows_of(file: Any, columns: list[str], path: str) -> Iterator[Any]:
    """Rows of a ParquetFile; the larger a column of a group of rows, the fewer at once.

    A text that stands once in a dictionary may be the value of every row, so each may be as large as its column.
    """
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        chunks = [group.column(place) for place in range(group.num_columns)]
        chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
        for chunk in chunks:
            check_unpacked(path, chunk.total_uncompressed_size, chunk.total_compressed_size)
        largest = max(chunk.total_uncompressed_size for chunk in chunks)
        num_rows = max(_BATCH_ROWS[0], min(_BATCH_ROWS[1], _BATCH_BYTES // max(1, largest)))
        for batch in file.iter_batches(num_rows, row_groups=[number], columns=columns):
            yield from batch.to_pylist()


def _read_text(path: str, source: Mapping[str, Any], share: ReadShare) -> Iterator[Document]:
    with as_input_error(_named(path, source)), open_text(path, share) as stream:
        if source["split_on"] == "file":
            yield _from_text(stream.read())
        elif source["split_on"] == "line":
            yield from (_from_text(line) for line in stream if line.strip().strip(BOM))
        else:
            block: list[str] = []
            for line in stream:
                if line.strip().strip(BOM):
                    block.append(line)
                elif block:
                    yield _from_text("".join(block))
                    block = []
            if block:
                yield _from_text("".join(block))


def _read_hub(path: str, source: Mapping[str, Any], share: ReadShare) -> Iterator[Document]:  # noqa: ARG001
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"corpus {source['name']!r}: reading the hub needs the package datasets; install crossray[hub]"
        ) from error
    try:
        rows = datasets.load_dataset(
            source["dataset"], source["subset"], split=source["split"], revision=source["revision"], streaming=True
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"corpus {source['name']!r}: cannot read data set {source['dataset']!r}: {first_line(error)}"
        ) from error
    with as_input_error(f"corpus {source['name']!r}: data set {source['dataset']!r}"):
        yield from (_from_row(row, source) for row in rows)


_READERS = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text, "hub": _read_hub}


def _from_row(row: Any, source: Mapping[str, Any]) -> Document:
    column = source.get("text_column") or source.get("messages_column")
    if not isinstance(row, Mapping) or row.get(column) is None:
        return _unusable(NO_COLUMN, column)
    for name, expected in (source.get("where") or {}).items():
        if row.get(name) != expected or isinstance(row.get(name), bool) != isinstance(expected, bool):
            return Document(reason=f"{name} is not {expected!r}")
    value = row[column]
    return _from_text(value) if source.get("text_column") else _from_messages(value, source)


def _from_text(value: Any) -> Document:
    if not isinstance(value, str):
        return _unusable(NOT_TEXT, value)
    text = value.strip().lstrip(BOM).strip()
    return Document(text=text) if text else _unusable(EMPTY, value)


def _from_messages(value: Any, source: Mapping[str, Any]) -> Document:
    messages, reason = read_messages(value, source)
    if not reason and not any(_says_something(message) for message in messages):
        reason = EMPTY
    if reason:
        return _unusable(reason, value)
    labels = frozenset(label["name"] for message in messages for label in message.get("labels", ()))
    return Document(messages=json.dumps(messages, ensure_ascii=False), labels=labels)


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool(message["content"].strip() or "tool_calls" in message or "reasoning_content" in message)


def _unusable(reason: str, value: Any) -> Document:
    return Document(reason=reason, unusable=ascii(value)[:_NUM_EXAMPLE_CHARACTERS])
