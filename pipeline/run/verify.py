"""Checks the artifacts of a run byte by byte and names what is damaged; reads only.

Every finished artifact: its record (readable, of this version, identity and folder agree) and its files (there,
checksums; a name or a link that leads out of the artifact is a fault and not followed); for a store of activations
every shard against the manifest (size, checksum, rows, finite numbers) and every row against the tokens: each kept
token is there exactly once, with its own id, in the right split. Unfinished artifacts are counted, not checked.
Everything is read once; memory holds one shard, and a few bytes per document.
"""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.errors import CrossrayError, InputError, shortened
from pipeline.extraction.activations import RowOptions, kept_positions
from pipeline.schema import Split
from pipeline.stages.extractor import read_rejected
from pipeline.stages.tokens import INDEX_NAME
from pipeline.storage.activation_store import ActivationStore, Shard
from pipeline.storage.artifacts import RECORD_NAME, Record, fingerprint_of, parse_record
from pipeline.storage.filesystem import Storage
from pipeline.storage.shards import Rows
from pipeline.storage.tables import read_table
from pipeline.terminal import Progress, Reporter

_ACTIVATIONS, _TOKENS = "activations", "tokens"
_KIB = 1 << 10


class Fault(NamedTuple):
    """One thing that is wrong."""

    where: str
    """Path or URL."""
    what: str
    """What was expected, and what came."""


class Verified(NamedTuple):
    """What was checked."""

    num_artifacts: int
    num_unfinished: int
    """Folders without a record: not looked into."""
    num_bytes: int
    faults: tuple[Fault, ...]


class _Document(NamedTuple):
    """The rows of a document, by the tokens artifact."""

    split: str
    num_rows: int
    """Kept tokens."""
    digest: int
    """Of their positions and ids."""
    last_position: int
    """-1 where nothing is kept."""


def verify(storage: Storage, folders: Sequence[str], reporter: Reporter) -> Verified:
    """Check the finished artifacts among these folders; every fault is reported as it is found."""
    finished = [folder for folder in folders if storage.exists(f"{folder}/{RECORD_NAME}")]
    sizes = {folder: _size(storage, folder) for folder in finished}
    progress = Progress("verify", max(1, sum(sizes.values()) // _KIB), "KiB")
    faults: list[Fault] = []
    done = 0
    reporter.progress(progress.update(0))
    for folder in finished:
        for read, found in _whatever_it_holds(storage, folder):
            for fault in found:
                faults.append(fault)
                reporter.message(f"fault    {fault.where}: {fault.what}")
            reporter.progress(progress.update(min((done + read) // _KIB, progress.total - 1), folder))
        done += sizes[folder]
    reporter.progress(progress.update(progress.total))
    return Verified(len(finished), len(folders) - len(finished), done, tuple(faults))


def _whatever_it_holds(storage: Storage, folder: str) -> Iterator[tuple[int, list[Fault]]]:
    """The checks of one artifact; what they cannot even work with is a fault of it, whatever the error."""
    try:
        yield from _check_artifact(storage, folder)
    except Exception as error:
        what = f"expected parts of the right types, got what cannot be checked: {type(error).__name__}: {error}"
        yield 0, [Fault(storage.url(folder), shortened(what, 300))]


def _size(storage: Storage, folder: str) -> int:
    """Bytes of an artifact's own files."""
    own = (name for name in storage.files(folder) if not _leads_out(storage, folder, name))
    return sum(storage.size(f"{folder}/{name}") for name in own if storage.exists(f"{folder}/{name}"))


def _check_artifact(storage: Storage, folder: str) -> Iterator[tuple[int, list[Fault]]]:
    """(bytes read so far, new faults) while one artifact is checked."""
    where = storage.url(f"{folder}/{RECORD_NAME}")
    try:
        record = parse_record(storage.read_json(f"{folder}/{RECORD_NAME}"), where)
    except CrossrayError as error:
        yield 0, [Fault(where, str(error).removeprefix(f"{where}: "))]
        return
    yield 0, _check_identity(record, folder, where)
    read = 0
    for name, expected in sorted(record.checksums.items()):
        size, faults = _check_file(storage, folder, name, expected)
        read += size
        yield read, faults
    if record.stage == _ACTIVATIONS:
        for size, faults in _check_store(storage, folder, record):
            read += size
            yield read, faults


def _check_identity(record: Record, folder: str, where: str) -> list[Fault]:
    try:
        fingerprint = fingerprint_of({"stage": record.stage, **record.identity})
    except (TypeError, ValueError) as error:
        return [Fault(where, f"expected an identity with a fingerprint, got one without: {error}")]
    if folder == f"{record.stage}/{record.fingerprint}" and fingerprint == record.fingerprint:
        return []
    return [
        Fault(
            where,
            f"expected the record of {folder}, got one of {record.stage}/{record.fingerprint} whose identity has the "
            f"fingerprint {fingerprint}",
        )
    ]


def _leads_out(storage: Storage, folder: str, name: str) -> bool:
    """Whether a name, or a link of this name, means a file outside its artifact, which nothing here may vouch for."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
        return True
    own, path = storage.local_path(folder), storage.local_path(f"{folder}/{name}")
    try:
        return own is not None and path is not None and not path.resolve().is_relative_to(own.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return True


def _check_file(storage: Storage, folder: str, name: str, expected: str) -> tuple[int, list[Fault]]:
    """Size of a file, and its fault."""
    key = f"{folder}/{name}"
    where = storage.url(key)
    if _leads_out(storage, folder, name):
        return 0, [Fault(where, "expected a file of this artifact, got a name or a link that leads out of it")]
    if not storage.exists(key):
        return 0, [Fault(where, "expected a file, found none")]
    try:
        size, came = storage.digest(key)
    except CrossrayError as error:
        return 0, [Fault(where, str(error))]
    if came == expected:
        return size, []
    return size, [Fault(where, f"expected SHA-256 {expected[:12]}, got {size} bytes with {came[:12]}")]


def _check_store(storage: Storage, folder: str, record: Record) -> Iterator[tuple[int, list[Fault]]]:
    """Every shard and every row, as (bytes of the shard, its faults)."""
    try:
        store = ActivationStore(storage, folder)
        expected = _expected_documents(storage, folder, record)
    except (CrossrayError, OSError) as error:
        yield 0, [Fault(storage.url(folder), f"the rows cannot be checked: {error}")]
        return
    seen: set[int] = set()
    num_rows, is_complete = 0, True
    for shard in store.manifest.shards:
        where = storage.url(f"{folder}/{shard.name}")
        try:
            if _leads_out(storage, folder, shard.name):
                raise InputError("expected a shard of this store, got a name or a link that leads out of it")
            if not storage.exists(f"{folder}/{shard.name}"):
                raise InputError("expected a shard, found none")
            rows = store.read(shard)
        except CrossrayError as error:
            is_complete = False
            yield shard.num_bytes, [Fault(where, str(error).removeprefix(f"{where}: "))]
            continue
        num_rows += len(rows.x_BMD)
        yield shard.num_bytes, [Fault(where, what) for what in _check_rows(rows, shard, store, expected, seen)]
    if is_complete:
        yield 0, [Fault(storage.url(folder), what) for what in _check_coverage(record, expected, seen, num_rows)]


def _check_rows(
    rows: Rows, shard: Shard, store: ActivationStore, expected: dict[int, _Document], seen: set[int]
) -> Iterator[str]:
    """What is wrong with a shard's rows; `seen` gathers the documents of all shards."""
    shape = (shard.num_rows, store.manifest.num_models, store.manifest.activation_dim)
    if tuple(rows.x_BMD.shape) != shape or any(len(column) != shard.num_rows for column in rows):
        yield f"expected {shard.num_rows} rows of {shape[1:]}, got columns of {[list(c.shape) for c in rows]}"
        return
    doc_ids, lengths = torch.unique_consecutive(rows.doc_id_B, return_counts=True)
    start = 0
    for doc_id, length in zip(doc_ids.tolist(), lengths.tolist(), strict=True):
        own = slice(start, start + length)
        start += length
        document = expected.get(doc_id)
        if document is None:
            yield f"document {doc_id}: expected none of its rows, got {length}"
        elif doc_id in seen:
            yield f"document {doc_id}: expected each row once, got {length} of them again"
        elif document.split != shard.split:
            yield f"document {doc_id}: expected it in the {document.split} part, got it in {shard.split}"
        else:
            positions, token_ids = rows.position_B[own].numpy(), rows.token_id_B[own].numpy()
            if length == document.num_rows and _digest(positions, token_ids) != document.digest:
                yield f"document {doc_id}: expected the tokens of the corpus, got others or the same in another order"
            elif not (np.diff(positions) > 0).all() or positions[-1] > document.last_position:
                yield f"document {doc_id}: expected each kept token once, got positions twice or out of range"
            elif length > document.num_rows:
                yield f"document {doc_id}: expected {document.num_rows} rows, got {length}"
        seen.add(doc_id)


def _check_coverage(record: Record, expected: dict[int, _Document], seen: set[int], num_rows: int) -> Iterator[str]:
    """Whether all documents and all rows are there, but for those that the norm cap has left out."""
    num_capped = int(record.counts.get("num_rows_above_norm_cap", 0))
    total = sum(document.num_rows for document in expected.values())
    if num_rows != total - num_capped:
        lacking = [doc_id for doc_id, document in expected.items() if document.num_rows and doc_id not in seen]
        named = f"; {len(lacking)} documents are missing, the first is {lacking[0]}" if lacking else ""
        yield f"expected {total - num_capped} rows, one per kept token, got {num_rows}{named}"


def _expected_documents(storage: Storage, folder: str, record: Record) -> dict[int, _Document]:
    """The rows of every document that must be in this store, by doc_id."""
    section = record.identity["section"]
    rows = section.get("rows", {"keep": (), "leave_out": ()})
    options = RowOptions(
        1,
        section["drop_first_tokens"],
        section["drop_bos"],
        keep=tuple(rows["keep"]),
        leave_out=tuple(rows["leave_out"]),
    )
    tokens = f"{_TOKENS}/{record.identity['inputs']['tokens']}"
    index = read_table(storage, f"{tokens}/{INDEX_NAME}").to_pydict()
    is_stream = section.get("mode") == "stream"
    rejected = read_rejected(storage, folder)
    by_part: dict[str, list[int]] = {}
    for place, part in enumerate(index["part"]):
        if index["doc_id"][place] not in rejected and not (is_stream and index["split"][place] == Split.TRAIN):
            by_part.setdefault(part, []).append(place)
    documents: dict[int, _Document] = {}
    for part, places in sorted(by_part.items()):
        if _leads_out(storage, tokens, part):
            raise InputError(
                f"{storage.url(tokens)}: expected a part of the tokens, got {part!r}, which leads out of it"
            )
        table = read_table(storage, f"{tokens}/{part}")
        ids, flags = table["input_ids"], table["flags"]
        for place in places:
            row = index["row"][place]
            kept = kept_positions(np.asarray(flags[row].values, dtype=np.int32), options)
            token_ids = np.asarray(ids[row].values, dtype=np.int32)[kept]
            last = int(kept[-1]) if len(kept) else -1
            digest = _digest(kept, token_ids)
            documents[index["doc_id"][place]] = _Document(index["split"][place], len(kept), digest, last)
    return documents


def _digest(positions: Any, token_ids: Any) -> int:
    return zlib.crc32(token_ids.astype("<i4").tobytes(), zlib.crc32(positions.astype("<i4").tobytes()))
