"""A finished crosscoder of the storage, fitted or adopted: its weights, and its training curve where there is one."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import pyarrow as pa
import torch
from safetensors.torch import load, save

from pipeline.numerics.crosscoder import Crosscoder
from pipeline.numerics.injection import Injection
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import read_table
from pipeline.tracking.tracker import Point

CURVES_NAME = "curves.parquet"
INJECTION_NAME = "injection.safetensors"


@contextmanager
def open_crosscoder(storage: Storage, folder: str) -> Iterator[Crosscoder]:
    """The crosscoder of an artifact; its weights may be mapped from files that live as long as the block."""
    with storage.local_folder(folder) as path:
        yield Crosscoder.from_pretrained(path)


def write_injection(storage: Storage, folder: str, injection: Injection) -> None:
    """Keeps beside a crosscoder what was put into its rows."""
    tensors = {
        "direction_CD": injection.direction_CD,
        "frequency": torch.tensor(injection.frequency, dtype=torch.float64),
        "seed": torch.tensor(injection.seed, dtype=torch.int64),
    }
    storage.write_bytes(f"{folder}/{INJECTION_NAME}", save(tensors))


def read_injection(storage: Storage, folder: str) -> Injection | None:
    """What was put into the rows that a crosscoder was fitted on; None for a usual one."""
    key = f"{folder}/{INJECTION_NAME}"
    if not storage.exists(key):
        return None
    tensors = load(storage.read_bytes(key))
    return Injection(tensors["direction_CD"], tensors["frequency"].item(), int(tensors["seed"]))


def read_curve(storage: Storage, folder: str) -> pa.Table | None:
    """The training curve: one row per logged step; None where the crosscoder was adopted."""
    key = f"{folder}/{CURVES_NAME}"
    return read_table(storage, key) if storage.exists(key) else None


def curve_points(curve: Iterable[Mapping[str, float]]) -> list[Point]:
    """The rows of a curve as points for the tracker."""
    return [
        Point(f"train/{name}", value, int(row["step"]), int(row["time_ms"]))
        for row in curve
        for name, value in row.items()
        if name not in ("step", "time_ms")
    ]
