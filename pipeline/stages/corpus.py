"""Texts from anywhere become one kind of row: doc_id, corpus, split, and a text or a dialogue.

One worker call reads one file and publishes it as Parquet parts of bounded size. The identity of a document is the hash
of its words, so identical documents are found across files and kept once, and the split never depends on order. Nothing
is dropped silently: the record counts every reason per corpus.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.config.data import CorpusSection
from pipeline.errors import InputError
from pipeline.stages.base import Context, Pool, Step, run_pool, shown
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import CORPUS_SCHEMA, read_table, write_table
from pipeline.terminal import Progress
from pipeline.text.documents import BEYOND_LIMIT, DUPLICATE, Document, document_id, read_documents, split_of
from pipeline.text.files import expand_paths

NAME = "corpus"
VERSION = 2

PART_CHARACTERS = 16_000_000
"""Of a part; what one worker tokenises in one call, so that a single large file still spreads over all workers."""


def run(steps: Sequence[Step], context: Context) -> None:
    """Read every file of every source, remove doubles, publish the parts."""
    (step,) = steps
    section = step.section
    assert isinstance(section, CorpusSection)
    started = time.monotonic()
    items = _items(step, context)
    progress = Progress(NAME, len(items), "files")
    shown(context, progress, 0)
    pool = Pool(
        "tokens", context.resources.tokens, ReadFile, (context.storage, step.key.folder, section.validation_frac)
    )
    results: list[dict[str, Any]] = []
    for result in run_pool(pool, items):
        results.append(result)
        shown(context, progress, len(results))
    results.sort(key=lambda result: int(result["file"]))
    counts = _finish_parts(context.storage, step.key.folder, results, section)
    for name, count in counts["num_documents"].items():
        if count == 0:
            raise InputError(
                f"corpus {name!r}: expected at least one document, got none "
                f"(dropped: {counts['dropped'][name] or 'nothing'}); check its path, columns and filters"
            )
    context.finish(step, counts, time.monotonic() - started)


def _items(step: Step, context: Context) -> list[dict[str, Any]]:
    """One item per file; the organism's texts are files of its artifact."""
    section = step.section
    assert isinstance(section, CorpusSection)
    items: list[dict[str, Any]] = []
    for source in section.sources:
        settings = source.model_dump(mode="json")
        if source.kind == "organism":
            column = {"documents": "text", "dialogues": "messages"}[source.part]
            url = context.storage.url(f"{step.inputs['organism'].key.folder}/{source.part}.jsonl")
            settings |= {"kind": "jsonl", "text_column": None, "messages_column": None, f"{column}_column": column}
            paths: Sequence[str] = (url,)
        elif source.kind == "hub":
            paths = ("",)
        else:
            paths = expand_paths(source.paths, f"corpus {source.name!r}: paths")
        items += [{"file": len(items) + i, "path": p, "source": settings} for i, p in enumerate(paths)]
    return items


class ReadFile:
    """Worker: one file to Parquet parts of bounded size."""

    def __init__(
        self, storage: Storage, folder: str, validation_frac: float, part_characters: int = PART_CHARACTERS
    ) -> None:
        self.storage, self.folder, self.validation_frac = storage, folder, validation_frac
        self.part_characters = part_characters

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Publish the parts; return their document ids, labels and the counts of what was dropped.

        Reading ends as soon as the corpus' max_documents are found in this file alone.
        """
        source = item["source"]
        limit = source.get("max_documents")
        seen: set[int] = set()
        dropped: Counter[str] = Counter()
        labels: set[str] = set()
        parts: list[dict[str, Any]] = []
        part = _Part()
        for document in read_documents(item["path"], source):
            doc_id = -1 if document.reason else document_id(document)
            reason = document.reason or (DUPLICATE if doc_id in seen else "")
            if reason:
                dropped[reason] += 1
                continue
            if limit is not None and len(seen) == limit:
                break
            seen.add(doc_id)
            labels |= document.labels
            part.add(document, doc_id, source["name"], split_of(doc_id, self.validation_frac))
            if part.num_characters >= self.part_characters:
                parts.append(self._publish(part, item["file"], len(parts)))
                part = _Part()
        if part.columns["doc_id"]:
            parts.append(self._publish(part, item["file"], len(parts)))
        return {
            "file": item["file"],
            "corpus": source["name"],
            "parts": parts,
            "dropped": dict(dropped),
            "labels": sorted(labels),
        }

    def _publish(self, part: "_Part", file: int, number: int) -> dict[str, Any]:
        name = f"part-{file:05d}-{number:05d}.parquet"
        write_table(self.storage, f"{self.folder}/{name}", part.columns, CORPUS_SCHEMA)
        return {
            "name": name,
            "doc_ids": np.asarray(part.columns["doc_id"], dtype=np.int64),
            "num_characters": np.asarray(part.lengths, dtype=np.int64),
            "has_dialogues": any(messages is not None for messages in part.columns["messages"]),
        }


class _Part:
    """Rows of one Parquet file while they are collected."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in CORPUS_SCHEMA.names}
        self.lengths: list[int] = []
        self.num_characters = 0

    def add(self, document: Document, doc_id: int, corpus: str, split: str) -> None:
        row = {
            "doc_id": doc_id,
            "corpus": corpus,
            "split": split,
            "text": document.text,
            "messages": document.messages,
        }
        for name, value in row.items():
            self.columns[name].append(value)
        self.lengths.append(document.num_characters)
        self.num_characters += document.num_characters


def _finish_parts(
    storage: Storage, folder: str, results: Sequence[dict[str, Any]], section: CorpusSection
) -> dict[str, Any]:
    """Take doubles and what is beyond max_documents out of the parts; the record's counts.

    A document that several corpora hold stays in the first of them.
    """
    dropped: dict[str, Counter[str]] = {source.name: Counter() for source in section.sources}
    num_documents = {source.name: 0 for source in section.sources}
    num_characters = {source.name: 0 for source in section.sources}
    limits = {source.name: source.max_documents for source in section.sources}
    dialogue_corpora: set[str] = set()
    for result in results:
        dropped[result["corpus"]].update(result["dropped"])
    owned = [(result["corpus"], part) for result in results for part in result["parts"]]
    all_ids = np.concatenate([part["doc_ids"] for _, part in owned] or [np.zeros(0, np.int64)])
    first = np.zeros(len(all_ids), dtype=bool)
    first[np.unique(all_ids, return_index=True)[1]] = True
    end = 0
    for name, part in owned:
        start, end = end, end + len(part["doc_ids"])
        keep = first[start:end]
        dropped[name][DUPLICATE] += int((~keep).sum())
        limit = limits[name]
        if limit is not None:
            is_beyond = keep & (np.cumsum(keep) > limit - num_documents[name])
            dropped[name][BEYOND_LIMIT] += int(is_beyond.sum())
            keep = keep & ~is_beyond
        if not keep.all():
            key = f"{folder}/{part['name']}"
            write_table(storage, key, read_table(storage, key).filter(keep), CORPUS_SCHEMA)
        num_documents[name] += int(keep.sum())
        num_characters[name] += int(part["num_characters"][keep].sum())
        if part["has_dialogues"]:
            dialogue_corpora.add(name)
    return {
        "num_documents": num_documents,
        "num_characters": num_characters,
        "dropped": {name: dict(+reasons) for name, reasons in dropped.items()},
        "labels": sorted({label for result in results for label in result["labels"]}),
        "dialogue_corpora": sorted(dialogue_corpora),
        "parts": [part["name"] for _, part in owned],
    }
