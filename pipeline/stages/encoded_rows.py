"""Rows of the activation store as the row analyses see them: by name, and encoded in batches of whole documents.

How the validation shards are shared out among worker calls depends on the shards alone, never on the workers, and so
does what is summed with what: tables are the same to the last bit on any cluster.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pipeline.analyses.rows import RowBatch, document_slices, row_batch
from pipeline.schema import SHARD_TENSORS, Split
from pipeline.storage.activation_store import ActivationStore, Shard

_ROWS_PER_BATCH = 8192
_MOST_CALLS = 64
"""More workers than this find nothing to do; each call's sums travel, and weigh 3 kB per latent."""


def validation_calls(store: ActivationStore) -> list[dict[str, Any]]:
    """{number, shards} of the worker calls that read the validation rows, each shard once."""
    shards = store.manifest.of_split(Split.VALIDATION)
    num_calls = min(len(shards), _MOST_CALLS)
    return [{"number": number, "shards": shards[number::num_calls]} for number in range(num_calls)]


def shard_rows(store: ActivationStore, shard: Shard) -> dict[str, torch.Tensor]:
    """The rows of a shard by the names of schema.SHARD_TENSORS."""
    return dict(zip((column.name for column in SHARD_TENSORS), store.read(shard), strict=True))


def batches(crosscoder: Any, rows: Mapping[str, torch.Tensor]) -> Iterator[RowBatch]:
    """Encoded batches of whole documents."""
    for part in document_slices(rows["doc_id"], max_rows=_ROWS_PER_BATCH):
        yield row_batch(crosscoder, {name: value[part] for name, value in rows.items()})
