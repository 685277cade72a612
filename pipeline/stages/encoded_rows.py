"""Rows of the activation store as the row analyses see them: by name, and encoded in batches of whole documents."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pipeline.analyses.rows import RowBatch, document_slices, row_batch
from pipeline.schema import SHARD_TENSORS
from pipeline.store import ActivationStore, Shard

_ROWS_PER_BATCH = 8192


def shard_rows(store: ActivationStore, shard: Shard) -> dict[str, torch.Tensor]:
    """The rows of a shard by the names of schema.SHARD_TENSORS."""
    return dict(zip((column.name for column in SHARD_TENSORS), store.read(shard), strict=True))


def batches(crosscoder: Any, rows: Mapping[str, torch.Tensor]) -> Iterator[RowBatch]:
    """Encoded batches of whole documents."""
    for part in document_slices(rows["doc_id"], max_rows=_ROWS_PER_BATCH):
        yield row_batch(crosscoder, {name: value[part] for name, value in rows.items()})
