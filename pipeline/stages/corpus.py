"""Texts of any source become one kind of row: doc_id, corpus, split, and a text or a dialogue.

One worker call reads one file and publishes it as Parquet parts of bounded size. A document's id is the hash of its
words, so duplicates are found across files and kept once, and the split does not depend on the order. The record counts
every dropped document by corpus and reason.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.cluster.pools import Pool, run_pool
from pipeline.config.data import CorpusSection
from pipeline.errors import InputError
from pipeline.stages.catalogue import CorpusInputs
from pipeline.stages.step import StageContext, Step
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import CORPUS_SCHEMA, read_table, write_table
from pipeline.terminal import Progress
from pipeline.text.documents import BEYOND_LIMIT, DUPLICATE, Document, document_id, read_documents, split_of
from pipeline.text.files import expand_paths
from pipeline.text.unusable import Unusable

PART_CHARACTERS = 16_000_000
"""Characters of a part, which one worker tokenises in one call: a single large file still spreads over all workers."""


class SourceFile(NamedTuple):
    """One file of a corpus."""

    number: int
    """Among the files of all corpora, in the order of the run file."""
    path: str
    """Path or URL; empty for a data set of the hub."""
    source: Mapping[str, Any]
    """Settings of its corpus as in a run file (text.documents.read_documents)."""


class Part(NamedTuple):
    """One Parquet file of documents, before duplicates across files are removed."""

    name: str
    doc_ids: np.ndarray
    """int64 [documents]."""
    num_characters: np.ndarray
    """int64 [documents]."""
    has_dialogues: bool


class FileRead(NamedTuple):
    """What became of one file."""

    number: int
    corpus: str
    parts: list[Part]
    dropped: Counter[str]
    """Documents left out, by reason."""
    unusable: dict[str, str]
    """The reasons that are a fault of the documents, each with the beginning of the first one."""
    labels: set[str]
    """Planted labels in its dialogues."""


def run(steps: Sequence[Step[CorpusInputs]], context: StageContext) -> None:
    """Read every file of every source, remove duplicates, publish the parts."""
    (step,) = steps
    section = step.inputs.section
    started = time.monotonic()
    files = _files(step.inputs, context)
    pool = Pool("tokens", context.resources.tokens, ReadFile, (context.storage, step.folder, section.validation_frac))
    progress = Progress(CorpusInputs.NAME, len(files), "files")
    results = sorted(context.follow(progress, run_pool(pool, files), lambda _: 1), key=lambda result: result.number)
    counts = remove_duplicates(context.storage, step.folder, results, section)
    unusable = unusable_of(results, counts["num_documents"])
    as_asked = {
        name: {why: n for why, n in own.items() if why != BEYOND_LIMIT} for name, own in counts["dropped"].items()
    }
    for line in (*unusable.remarks(CorpusInputs.NAME), *unusable.left_out(as_asked, CorpusInputs.NAME)):
        context.reporter.message(line)
    unusable.check(section.max_unusable_frac)
    for name, count in counts["num_documents"].items():
        if count == 0:
            raise InputError(
                f"corpus {name!r}: expected at least one document, got none "
                f"(dropped: {counts['dropped'][name] or 'nothing'}); check its path, columns and filters"
            )
    context.finish(step, counts, time.monotonic() - started)


def _files(inputs: CorpusInputs, context: StageContext) -> list[SourceFile]:
    """The files of all sources; the organism's texts are files of its artifact."""
    files: list[SourceFile] = []
    for source in inputs.section.sources:
        settings = source.model_dump(mode="json")
        if source.kind == "organism":
            column = {"documents": "text", "dialogues": "messages"}[source.part]
            assert inputs.organism is not None, "a run file with such a source has an organism"
            url = context.storage.url(f"{inputs.organism.folder}/{source.part}.jsonl")
            settings |= {"kind": "jsonl", "text_column": None, "messages_column": None, f"{column}_column": column}
            paths: Sequence[str] = (url,)
        elif source.kind == "hub":
            paths = ("",)
        else:
            paths = expand_paths(source.paths, f"corpus {source.name!r}: paths")
        files += [SourceFile(number, path, settings) for number, path in enumerate(paths, len(files))]
    return files


class ReadFile:
    """Worker: one file to Parquet parts of bounded size."""

    def __init__(
        self, storage: Storage, folder: str, validation_frac: float, part_characters: int = PART_CHARACTERS
    ) -> None:
        self.storage, self.folder, self.validation_frac = storage, folder, validation_frac
        self.part_characters = part_characters

    def __call__(self, file: SourceFile) -> FileRead:
        """Publish the parts; reading ends as soon as the corpus' max_documents are found in this file alone."""
        source = file.source
        limit = source.get("max_documents")
        seen: set[int] = set()
        dropped: Counter[str] = Counter()
        unusable: dict[str, str] = {}
        labels: set[str] = set()
        parts: list[Part] = []
        rows = _Rows()
        for document in read_documents(file.path, source):
            doc_id = -1 if document.reason else document_id(document)
            reason = document.reason or (DUPLICATE if doc_id in seen else "")
            if reason:
                dropped[reason] += 1
                if document.unusable:
                    unusable.setdefault(reason, document.unusable)
                continue
            if limit is not None and len(seen) == limit:
                break
            seen.add(doc_id)
            labels |= document.labels
            rows.add(document, doc_id, source["name"], split_of(doc_id, self.validation_frac))
            if rows.num_characters >= self.part_characters:
                parts.append(self._publish(rows, file.number, len(parts)))
                rows = _Rows()
        if rows.columns["doc_id"]:
            parts.append(self._publish(rows, file.number, len(parts)))
        return FileRead(file.number, source["name"], parts, dropped, unusable, labels)

    def _publish(self, rows: "_Rows", file: int, number: int) -> Part:
        name = f"part-{file:05d}-{number:05d}.parquet"
        write_table(self.storage, f"{self.folder}/{name}", rows.columns, CORPUS_SCHEMA)
        return Part(
            name,
            np.asarray(rows.columns["doc_id"], dtype=np.int64),
            np.asarray(rows.lengths, dtype=np.int64),
            any(messages is not None for messages in rows.columns["messages"]),
        )


class _Rows:
    """Rows of one Parquet file while they are collected."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in CORPUS_SCHEMA.names}
        self.lengths: list[int] = []
        self.num_characters = 0

    def add(self, document: Document, doc_id: int, corpus: str, split: str) -> None:
        row = (doc_id, corpus, split, document.text, document.messages)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        self.lengths.append(document.num_characters)
        self.num_characters += document.num_characters


def unusable_of(results: Sequence[FileRead], num_documents: Mapping[str, int]) -> Unusable:
    """Documents that cannot be used, of all files; what filters and limits leave out is not among them."""
    dropped: dict[str, Counter[str]] = {name: Counter() for name in num_documents}
    examples: dict[str, dict[str, str]] = {}
    for result in results:
        dropped[result.corpus].update({why: n for why, n in result.dropped.items() if why in result.unusable})
        examples[result.corpus] = {**result.unusable, **examples.get(result.corpus, {})}
    num_read = {name: num + sum(dropped[name].values()) for name, num in num_documents.items()}
    return Unusable(dropped, examples, num_read)


def remove_duplicates(
    storage: Storage, folder: str, results: Sequence[FileRead], section: CorpusSection
) -> dict[str, Any]:
    """Rewrite the parts without duplicates and without what is beyond max_documents; the record's counts.

    A document that several corpora hold stays in the first of them.
    """
    dropped: dict[str, Counter[str]] = {source.name: Counter() for source in section.sources}
    num_documents = {source.name: 0 for source in section.sources}
    num_characters = {source.name: 0 for source in section.sources}
    limits = {source.name: source.max_documents for source in section.sources}
    dialogue_corpora: set[str] = set()
    for result in results:
        dropped[result.corpus].update(result.dropped)
    owned = [(result.corpus, part) for result in results for part in result.parts]
    all_ids = np.concatenate([part.doc_ids for _, part in owned] or [np.zeros(0, np.int64)])
    first = np.zeros(len(all_ids), dtype=bool)
    first[np.unique(all_ids, return_index=True)[1]] = True
    end = 0
    for name, part in owned:
        start, end = end, end + len(part.doc_ids)
        keep = first[start:end]
        dropped[name][DUPLICATE] += int((~keep).sum())
        limit = limits[name]
        if limit is not None:
            is_beyond = keep & (np.cumsum(keep) > limit - num_documents[name])
            dropped[name][BEYOND_LIMIT] += int(is_beyond.sum())
            keep = keep & ~is_beyond
        if not keep.all():
            key = f"{folder}/{part.name}"
            write_table(storage, key, read_table(storage, key).filter(keep), CORPUS_SCHEMA)
        num_documents[name] += int(keep.sum())
        num_characters[name] += int(part.num_characters[keep].sum())
        if part.has_dialogues:
            dialogue_corpora.add(name)
    return {
        "num_documents": num_documents,
        "num_characters": num_characters,
        "dropped": {name: dict(+reasons) for name, reasons in dropped.items()},
        "labels": sorted({label for result in results for label in result.labels}),
        "dialogue_corpora": sorted(dialogue_corpora),
        "parts": [part.name for _, part in owned],
    }
