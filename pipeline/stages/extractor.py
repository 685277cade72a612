"""Both models in one process: the rows of any documents of the tokens artifact.

An `Extractor` travels to a worker as plain values and loads the models there, on its first call. What it returns
depends on the documents alone, so what is made twice (after a lost worker, a killed run) is equal. Documents that
cannot be run are quarantined with their reason, up to the limit of the activations section.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from pipeline.config.data import ActivationsSection
from pipeline.extraction.activations import ExtractRows, RowOptions
from pipeline.extraction.quarantine import QuarantinedDocument, extract_with_quarantine, too_many_quarantined
from pipeline.models.memory import automatic_tokens_per_batch
from pipeline.models.verification import Verification, require_plain_forward
from pipeline.schema import QUARANTINE_COLUMNS
from pipeline.stages.locations import Loading
from pipeline.stages.models import load_pair
from pipeline.stages.tokens import INDEX_NAME
from pipeline.storage.filesystem import Storage
from pipeline.storage.shards import Rows
from pipeline.storage.tables import arrow_schema, read_table, write_table

_NUM_CHECKED, _NUM_CANDIDATES, _CHECKED_TOKENS = 3, 16, 256
"""Documents that the check against the plain forward runs, those it looks at to find them, tokens of each."""

REJECTED_NAME = "rejected.parquet"
REJECTED_SCHEMA = arrow_schema(QUARANTINE_COLUMNS)


class Extracted(NamedTuple):
    """Rows of some documents."""

    rows: Rows
    """In the order of the documents, positions ascending."""
    rejected: tuple[dict[str, Any], ...]
    """Quarantined documents: schema.QUARANTINE_COLUMNS by name."""
    real_token_frac: float
    """Tokens over tokens computed, padding included."""
    num_capped: int
    """Rows left out for their norm."""
    num_out_of_memory: int
    """How often a batch did not fit and was run in halves."""
    left_out: Mapping[str, int]
    """Tokens that became no rows, by reason; without those left out for their norm."""


class _Ready(NamedTuple):
    """What a worker makes on its first call."""

    extract: ExtractRows
    verification: Verification


class Extractor:
    """Callable on row numbers of the tokens' index; see the module's docstring.

    Args of the constructor: `corpora`, the names that the column `corpus` points into; `max_rejected`, documents that
    one call may quarantine before it raises an InputError.
    """

    def __init__(
        self,
        storage: Storage,
        tokens_folder: str,
        *,
        section: ActivationsSection,
        loading: Loading,
        corpora: Sequence[str],
        max_rejected: int,
    ) -> None:
        self.storage, self.tokens_folder, self.corpora = storage, tokens_folder, tuple(corpora)
        self.section, self.loading, self.max_rejected = section, loading, max_rejected

    @cached_property
    def _ready(self) -> _Ready:
        """The models, checked against the library's own forward before anything is extracted."""
        pair = load_pair(self.storage, self.loading, is_lower_only=True)
        verification = require_plain_forward(pair, self._first_documents(pair.num_readable), ("rows",))
        pair.drop_upper()
        asked = self.section.tokens_per_batch
        budget = automatic_tokens_per_batch(pair) if asked == "auto" else asked
        return _Ready(ExtractRows(pair, row_options(self.section, budget)), verification)

    @property
    def verification(self) -> Verification:
        """How far the pair is from the library's plain forward, on the first documents of the tokens."""
        return self._ready.verification

    @property
    def commits(self) -> tuple[str | None, str | None]:
        """Commits of base and chat on the hub, as they were loaded; None for local models."""
        return self._ready.extract.pair.commits

    def _first_documents(self, vocab_size: int) -> list[list[int]]:
        """Beginnings of the first documents that can be read; one of token 0 where none can."""
        index = self._index.slice(0, _NUM_CANDIDATES)
        candidates = read_token_rows(self.storage, self.tokens_folder, index)["input_ids"]
        readable = [
            row for row in candidates if row is not None and len(row) and 0 <= row.min() <= row.max() < vocab_size
        ]
        return [row[:_CHECKED_TOKENS].tolist() for row in readable[:_NUM_CHECKED]] or [[0]]

    @cached_property
    def _index(self) -> pa.Table:
        return read_table(self.storage, f"{self.tokens_folder}/{INDEX_NAME}")

    @property
    def num_layers(self) -> int:
        """Decoder layers of the chat model."""
        return int(self._ready.extract.pair.num_layers)

    def __call__(self, places: np.ndarray, on_batch: Callable[[int], None] | None = None) -> Extracted:
        """Rows of the documents at these places of the index; on_batch is told the tokens of each batch."""
        documents = read_token_rows(self.storage, self.tokens_folder, self._index.take(places))
        result = extract_with_quarantine(
            partial(self._ready.extract, on_batch=on_batch),
            documents,
            vocab_size=self._ready.extract.pair.num_readable,
            max_quarantined=self.max_rejected,
        )
        extracted = result.rows
        about = {
            doc_id: (corpus, split, 0 if ids is None else len(ids))
            for doc_id, corpus, split, ids in zip(
                *(documents[name] for name in ("doc_id", "corpus", "split", "input_ids")), strict=True
            )
        }
        corpus_B = [self.corpora.index(about[doc_id][0]) for doc_id in extracted.doc_id_B.tolist()]
        rows = Rows(
            x_BMD=extracted.x_BMD,
            token_id_B=extracted.token_id_B,
            doc_id_B=extracted.doc_id_B,
            position_B=extracted.position_B,
            flags_B=extracted.flags_B,
            corpus_B=torch.tensor(corpus_B, dtype=torch.int32),
        )
        rejected = tuple(
            dict(zip(("corpus", "split", "num_tokens"), about[doc_id], strict=True), doc_id=doc_id, reason=reason)
            for doc_id, reason in result.quarantined
        )
        return Extracted(
            rows,
            rejected,
            extracted.real_token_frac,
            extracted.num_capped,
            extracted.num_out_of_memory,
            extracted.left_out,
        )


def row_options(section: ActivationsSection, tokens_per_batch: int) -> RowOptions:
    """Which tokens become rows: those of the store, and those that have codes wherever else the models run."""
    return RowOptions(
        tokens_per_batch,
        section.drop_first_tokens,
        section.drop_bos,
        section.norm_cap,
        section.rows.keep,
        section.rows.leave_out,
    )


def check_rejected(rejected: Sequence[Mapping[str, Any]], max_rejected: int) -> None:
    """InputError where more documents than `max_rejected` are quarantined."""
    if len(rejected) > max_rejected:
        quarantined = [QuarantinedDocument(document["doc_id"], document["reason"]) for document in rejected]
        raise too_many_quarantined(quarantined, limit=max_rejected)


def write_rejected(storage: Storage, folder: str, rejected: Sequence[Mapping[str, Any]]) -> None:
    """Publish the table of quarantined documents."""
    ordered = sorted(rejected, key=lambda document: int(document["doc_id"]))
    columns = {name: [document[name] for document in ordered] for name in REJECTED_SCHEMA.names}
    write_table(storage, f"{folder}/{REJECTED_NAME}", columns, REJECTED_SCHEMA)


def read_rejected(storage: Storage, folder: str) -> set[int]:
    """Ids of the documents in that table; none where the artifact has no such table."""
    key = f"{folder}/{REJECTED_NAME}"
    return set(read_table(storage, key)["doc_id"].to_pylist()) if storage.exists(key) else set()


def read_token_rows(storage: Storage, tokens_folder: str, index: pa.Table) -> dict[str, list[Any]]:
    """Token rows of the indexed documents, in the order of the index; each part is read once."""
    parts = index["part"].to_pylist()
    numbers = index["row"].to_numpy()
    rows: dict[str, list[Any]] = {}
    for part in sorted(set(parts)):
        places = [place for place, name in enumerate(parts) if name == part]
        taken = read_table(storage, f"{tokens_folder}/{part}").take(numbers[places])
        for name in taken.column_names:
            column = taken[name]
            is_list = pa.types.is_list(column.type)
            values = _lists(column) if is_list else column.to_pylist()
            target = rows.setdefault(name, [None] * len(parts))
            for place, value in zip(places, values, strict=True):
                target[place] = value
    return rows


def _lists(column: pa.ChunkedArray) -> list[np.ndarray | None]:
    """Rows of a list column as int32 arrays; None where there is none, for the quarantine to name."""
    return [np.asarray(row.values, dtype=np.int32) if row.is_valid else None for row in column]
