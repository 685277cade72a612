"""The activation store: the manifest of its shards, and reading them with their damage named.

What one file holds is shards.py; the order in which training reads rows is row_order.py. A store is read only with
its manifest, which is written when all shards are there; each shard's checksum is compared once per reading object.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pipeline.errors import ArtifactError
from pipeline.numerics.moments import Moments
from pipeline.schema import Split
from pipeline.storage.filesystem import Storage
from pipeline.storage.shards import LOSSLESS, NONE, OpenShard, Rows, open_shard, require_finite, unpack_rows

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One file of the store, as the manifest describes it."""

    name: str
    split: str
    num_rows: int
    num_documents: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredMoments:
    """numerics.moments.Moments as plain numbers."""

    num_rows: int
    mean: tuple[tuple[float, ...], ...]
    """[M][D], float64."""
    variance: tuple[float, ...]
    """[M]: sum over d of the population variance, float64; 0 for no rows."""

    @classmethod
    def of(cls, moments: Moments) -> "StoredMoments":
        """The numbers of these moments."""
        variance_M = moments.square_M / moments.num_rows.clamp(min=1)
        return cls(int(moments.num_rows), tuple(map(tuple, moments.mean_MD.tolist())), tuple(variance_M.tolist()))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "StoredMoments":
        """The moments that were written as a dict of the fields."""
        return cls(value["num_rows"], tuple(map(tuple, value["mean"])), tuple(value["variance"]))

    def moments(self) -> Moments:
        """The moments, float64, to be merged or used."""
        num_rows = torch.tensor(self.num_rows, dtype=torch.float64)
        variance_M = torch.tensor(self.variance, dtype=torch.float64)
        return Moments(num_rows, torch.tensor(self.mean, dtype=torch.float64), variance_M * num_rows)


@dataclass(frozen=True)
class Manifest:
    """What a store holds."""

    shards: tuple[Shard, ...]
    num_models: int
    activation_dim: int
    corpora: tuple[str, ...]
    """Names that the column `corpus` points into."""
    labels: tuple[str, ...]
    """Planted labels, in the order of their bits."""
    dialogue_corpora: tuple[int, ...]
    """Indices of the corpora that hold dialogues."""
    compression: str = NONE
    """How the shards keep their activations (shards.py)."""
    moments: Mapping[str, StoredMoments] = field(default_factory=dict)
    """Count, mean and variance of the rows of each split."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for manifest.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Manifest":
        """The manifest written by `to_json`; KeyError or ValidationError for what is none."""
        for own in fields(cls):
            value[own.name]
        return TypeAdapter(cls).validate_python(value)

    def training_moments(self) -> Moments:
        """Moments of the training rows; of the validation rows where no training rows are kept (stream mode)."""
        kept = next(split for split in (Split.TRAIN, Split.VALIDATION) if self.num_rows(split))
        return self.moments[kept].moments()

    def training_rms_M(self) -> Tensor:  # noqa: N802 (shape letter)
        """Root mean square of each model's rows around their mean, sqrt(sum_d var_d), float64 [M]."""
        return self.training_moments().variance_M().sqrt()

    def of_split(self, split: str) -> tuple[Shard, ...]:
        """The shards of one split, in order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def num_rows(self, split: str) -> int:
        """Rows of one split."""
        return sum(shard.num_rows for shard in self.of_split(split))


class ActivationStore:
    """A finished store. `folder` is the key of its artifact."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self.storage = storage
        self.folder = folder
        where = storage.url(f"{folder}/{MANIFEST_NAME}")
        try:
            self.manifest = Manifest.from_json(storage.read_json(f"{folder}/{MANIFEST_NAME}"))
        except (KeyError, TypeError, ValidationError) as error:
            what = " ".join(str(error).split())[:200]
            raise ArtifactError(
                f"{where}: expected a manifest of activations, got another thing ({what}); remove its folder to make "
                "it again"
            ) from error
        self._verified: set[str] = set()

    def read(self, shard: Shard) -> Rows:
        """All rows of a shard; checksum and numbers are verified on the first read by this object.

        Local files without compression are mapped, not copied: what is not looked at is not read.
        """
        is_first = shard.name not in self._verified
        rows = unpack_rows(self._data(shard, verify=True), self._where(shard))
        if is_first:
            require_finite(rows, self._where(shard))
        return rows

    def open(self, shard: Shard, *, verify: bool) -> OpenShard:
        """Activations of a shard to take rows from; `verify` compares the checksum unless this object has done so."""
        return open_shard(self._data(shard, verify=verify), self._where(shard))

    def resident_bytes(self, shard: Shard) -> int:
        """Memory that an open shard holds: 0 where it is mapped from a local file."""
        if self.manifest.compression == LOSSLESS:
            return 2 * shard.num_rows * self.manifest.num_models * self.manifest.activation_dim
        return 0 if self.storage.is_local else shard.num_bytes

    def _where(self, shard: Shard) -> str:
        return self.storage.url(f"{self.folder}/{shard.name}")

    def _data(self, shard: Shard, *, verify: bool) -> Tensor:
        """The bytes of a shard, uint8: a private mapping of a local file, a copy of an object."""
        key = f"{self.folder}/{shard.name}"
        is_new = verify and shard.name not in self._verified
        path = self.storage.local_path(key)
        if path is None:
            content = self.storage.read_bytes(key)
            self._compare(shard, len(content), hashlib.sha256(content).hexdigest() if is_new else None)
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        else:
            found = self.storage.digest(key) if is_new else (self.storage.size(key), None)
            self._compare(shard, *found)
            data = torch.from_file(str(path), shared=False, size=shard.num_bytes, dtype=torch.uint8)
        if is_new:
            self._verified.add(shard.name)
        return data

    def _compare(self, shard: Shard, num_bytes: int, sha256: str | None) -> None:
        """Raise an ArtifactError unless size and checksum (None: not taken) are the manifest's."""
        if num_bytes == shard.num_bytes and sha256 in (None, shard.sha256):
            return
        came = f"{num_bytes} bytes" + (f" with {sha256[:12]}" if sha256 else "")
        raise ArtifactError(
            f"damaged shard {self._where(shard)}: expected {shard.num_bytes} bytes with SHA-256 "
            f"{shard.sha256[:12]}, got {came}; "
            "remove it and the record.json beside it and run again: only this shard is extracted again"
        )
