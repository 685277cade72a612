"""Rows of activations in memory, and as a store on disk that a run can read.

They keep the division into shards, because the order of training depends on it: rows that were loaded from a run's
store are trained on in the run's own order.

Shapes: B rows, M models, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.extraction.activations import ActivationRows
from pipeline.library.origin import Origin
from pipeline.numerics.moments import Moments
from pipeline.schema import SHARD_TENSORS, Split
from pipeline.storage import shards
from pipeline.storage.activation_store import MANIFEST_NAME, ActivationStore, Manifest, Shard, StoredMoments
from pipeline.storage.filesystem import Storage
from pipeline.storage.shards import OpenShard, publish_shard, summarise
from pipeline.text.documents import split_of

ORIGIN_NAME = "origin.json"
ROWS_PER_SHARD = 50_000
"""As in a run file that does not say otherwise."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Activations of both models after one layer, one row per token, whole documents in order.

    `len(rows)` is their number; `rows.x` is [B, M, D] bfloat16 on the CPU, model 0 = base and 1 = chat.
    """

    data: shards.Rows
    """Activations, token ids, documents, positions and flags (schema.Flag)."""
    corpora: tuple[str, ...]
    """Names that data.corpus_B points into."""
    origin: Origin | None = None
    """The pair and the layer; None for rows that do not say."""
    shard_sizes: tuple[int, ...] = ()
    """Rows of each shard."""
    dialogue_corpora: tuple[int, ...] = ()
    """Indices of the corpora that hold dialogues."""
    tokenizer: Any = None
    """Of the pair, for the texts of examples; None for rows that were loaded."""
    known_moments: StoredMoments | None = None
    """As the store gives them that the rows were read from: a run's, to the last bit."""

    def __post_init__(self) -> None:
        if not self.shard_sizes:
            whole, rest = divmod(len(self), ROWS_PER_SHARD)
            object.__setattr__(self, "shard_sizes", (ROWS_PER_SHARD,) * whole + ((rest,) if rest else ()))
        assert sum(self.shard_sizes) == len(self), (self.shard_sizes, len(self))

    def __len__(self) -> int:
        return len(self.data.x_BMD)

    def __repr__(self) -> str:
        pair = "" if self.origin is None else f", {self.origin.base.name} and {self.origin.chat.name}"
        layer = "" if self.origin is None else f", layer {self.origin.layer}"
        return f"Rows({len(self):,} rows, {self.num_models} models, width {self.activation_dim}{layer}{pair})"

    @property
    def x(self) -> Tensor:
        """Activations [B, M, D], bfloat16."""
        return self.data.x_BMD

    @property
    def num_models(self) -> int:
        """M."""
        return self.x.shape[1]

    @property
    def activation_dim(self) -> int:
        """D."""
        return self.x.shape[2]

    @property
    def num_documents(self) -> int:
        """Documents with at least one row."""
        return len(torch.unique(self.data.doc_id_B))

    @classmethod
    def of(cls, extracted: ActivationRows, corpus_B: Tensor, **about: Any) -> "Rows":
        """Rows as extraction returns them; `about` are the other fields."""
        columns = (extracted.token_id_B, extracted.doc_id_B, extracted.position_B, extracted.flags_B)
        return cls(shards.Rows(extracted.x_BMD, *columns, corpus_B), **about)

    def moments(self) -> Moments:
        """Count, means and variances of the rows, float64."""
        if self.known_moments is not None:
            return self.known_moments.moments()
        total = summarise(self.x[:0]).moments
        for part in self.parts():
            total = total.merge(summarise(part.x_BMD).moments)
        return total

    def parts(self) -> list[shards.Rows]:
        """The rows of each shard."""
        columns = (torch.split(column, list(self.shard_sizes)) for column in self.data)
        return [shards.Rows(*part) for part in zip(*columns, strict=True)]

    def columns(self) -> Mapping[str, Tensor]:
        """The rows by the names of schema.SHARD_TENSORS, as analyses read them."""
        return dict(zip((column.name for column in SHARD_TENSORS), self.data, strict=True))

    def split(self, validation_frac: float = 0.1) -> tuple["Rows", "Rows"]:
        """Training and validation rows, divided by document as a run divides them; InputError where one is empty."""
        if not 0 < validation_frac < 1:
            raise InputError(f"expected a validation_frac between 0 and 1, got {validation_frac}")
        documents, place_B = torch.unique(self.data.doc_id_B, return_inverse=True)
        is_held = [split_of(doc_id, validation_frac) == Split.VALIDATION for doc_id in documents.tolist()]
        is_validation_B = torch.tensor(is_held)[place_B]
        if not 0 < int(is_validation_B.sum()) < len(self):
            raise InputError(
                f"expected documents for both parts, got {len(documents)} with validation_frac {validation_frac}; take "
                "more documents or another share"
            )
        return self._of(~is_validation_B), self._of(is_validation_B)

    def of_origin(self, origin: Origin | None) -> "Rows":
        """The same rows, said to come from there."""
        return replace(self, origin=origin)

    def _of(self, is_kept_B: Tensor) -> "Rows":
        data = shards.Rows(*(column[is_kept_B] for column in self.data))
        return replace(self, data=data, shard_sizes=(), known_moments=None)

    def save(self, folder: str | Path) -> None:
        """Writes the rows as an activation store; a folder with manifest.json is complete.

        InputError where the folder holds one already.
        """
        storage, name = _place(folder)
        if storage.exists(f"{name}/{MANIFEST_NAME}"):
            raise InputError(
                f"{folder}: expected a folder without rows, got one that holds some; remove it or name another"
            )
        written = []
        for number, part in enumerate(self.parts()):
            file = f"{Split.TRAIN}-{number:05d}.safetensors"
            published = publish_shard(storage, f"{name}/{file}", part)
            num_documents = len(torch.unique(part.doc_id_B))
            written.append(Shard(file, Split.TRAIN, len(part.x_BMD), num_documents, *published))
        if self.origin is not None:
            storage.write_json(f"{name}/{ORIGIN_NAME}", self.origin.to_json())
        storage.write_json(f"{name}/{MANIFEST_NAME}", self._manifest(written).to_json())

    def _manifest(self, written: Sequence[Shard]) -> Manifest:
        moments = {Split.TRAIN: self.known_moments or StoredMoments.of(self.moments())}
        return Manifest(
            *(tuple(written), self.num_models, self.activation_dim, self.corpora, (), self.dialogue_corpora),
            moments=moments,
        )

    @classmethod
    def load(cls, folder: str | Path, *, split: str = Split.TRAIN) -> "Rows":
        """The rows of a folder that `save` wrote, or of an activations artifact; all of one split, in memory.

        Args:
            folder: folder or URL with manifest.json.
            split: train or validation; what `save` writes is train.

        Raises ArtifactError for what is damaged or no store.
        """
        storage, name = _place(folder)
        if not storage.exists(f"{name}/{MANIFEST_NAME}"):
            raise InputError(
                f"{folder}: expected rows saved by Rows.save or a run's activations, got no {MANIFEST_NAME}"
            )
        store = ActivationStore(storage, name)
        found = store.manifest.of_split(split)
        if not found:
            have = sorted({shard.split for shard in store.manifest.shards})
            raise InputError(
                f"{folder}: expected rows of the split {split!r}, got those of {', '.join(have) or 'none'}"
            )
        parts = [store.read(shard) for shard in found]
        key = f"{name}/{ORIGIN_NAME}"
        return cls(
            shards.Rows(*(torch.cat(column) for column in zip(*parts, strict=True))),
            store.manifest.corpora,
            Origin.from_json(storage.read_json(key)) if storage.exists(key) else None,
            tuple(shard.num_rows for shard in found),
            store.manifest.dialogue_corpora,
            known_moments=store.manifest.moments[split],
        )

    def store(self) -> "MemoryStore":
        """The rows as training reads a store."""
        return MemoryStore(self)


class MemoryStore(ActivationStore):
    """Rows in memory in the place of a store; every row is training's."""

    def __init__(self, rows: Rows) -> None:
        # No call of the base class, which reads a manifest: everything that it would set is known.
        parts = rows.parts()
        names = [f"{number:05d}" for number in range(len(parts))]
        shard_list = [
            Shard(name, Split.TRAIN, len(part.x_BMD), 0, 0, "") for name, part in zip(names, parts, strict=True)
        ]
        self.manifest = rows._manifest(shard_list)
        self.folder = "memory"
        self._parts = dict(zip(names, parts, strict=True))
        self.storage = _Nowhere()

    def open(self, shard: Shard, *, verify: bool) -> OpenShard:  # noqa: ARG002 (nothing to compare with)
        """The activations of a part."""
        return OpenShard(self._parts[shard.name].x_BMD, None)

    def read(self, shard: Shard) -> shards.Rows:
        """All rows of a part."""
        return self._parts[shard.name]

    def resident_bytes(self, shard: Shard) -> int:  # noqa: ARG002
        """0: nothing is read from anywhere."""
        return 0


class _Nowhere(Storage):
    """No place: there is nothing to read ahead."""

    def __init__(self) -> None:
        super().__init__("memory-rows")

    def read_ahead(self, key: str) -> None:
        """Nothing."""


def _place(folder: str | Path) -> tuple[Storage, str]:
    parent, _, name = str(folder).rstrip("/").rpartition("/")
    if not name:
        raise InputError(f"expected a folder for rows, got {str(folder)!r}")
    return Storage(parent or ("/" if str(folder).startswith("/") else ".")), name
