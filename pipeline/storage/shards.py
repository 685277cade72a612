"""One file of the activation store: rows to bytes and back, three kinds of compression, statistics of the rows.

A shard is a safetensors file, so any tool reads it. `none` holds schema.SHARD_TENSORS as they are. `lossless` splits
every bfloat16 into its exponent (8 bits, compressed with zstd) and the rest (sign and 7 mantissa bits, which hold no
redundancy); it gives back the same bits. `int8` keeps round(x / scale) with one scale per row and model, scale =
max |x| / 127. The other columns are stored as they are. The same rows give the same bytes, with one version of zstd.

Our own reader and writer, because the safetensors library copies what it writes and cannot hash it on the way: files
are written from the rows' own memory while a second thread hashes them. Local files are mapped, so opening one costs
nothing until rows are taken. Knows neither manifest nor order.

Shapes: B rows of the shard, N rows taken, M models, D width.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.errors import ArtifactError, InputError
from pipeline.numerics.moments import Moments, moments_of
from pipeline.schema import SHARD_TENSORS
from pipeline.storage.filesystem import Storage

NONE, LOSSLESS, INT8 = "none", "lossless", "int8"

_COLUMNS = tuple(column.name for column in SHARD_TENSORS)
_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FRAME_VALUES = 1 << 20
"""Values whose exponents form one zstd frame: large enough for its tables, small enough for the cache."""
_ZSTD_LEVEL = 1
"""Higher levels search for repeated sequences, which exponents do not have: slower and no smaller."""
_CHUNK_ROWS = 1024
"""Rows that are described or packed at once."""
_CHUNK_VALUES = 1 << 18
"""Values that are converted at once, so that they stay in the cache between two passes."""
_PACKING_THREADS = min(4, os.cpu_count() or 1)


class Rows(NamedTuple):
    """Some rows of a shard, in the shard's order: whole documents, positions ascending."""

    x_BMD: Tensor
    """bfloat16."""
    token_id_B: Tensor
    doc_id_B: Tensor
    position_B: Tensor
    flags_B: Tensor
    corpus_B: Tensor


class ShardFile(NamedTuple):
    """A published file."""

    num_bytes: int
    sha256: str


class Summary(NamedTuple):
    """Statistics of a shard's rows."""

    moments: Moments
    mean_norm_M: Tensor
    """Mean Euclidean norm of a row, per model, float64."""


class OpenShard(NamedTuple):
    """Activations of a shard from which single rows can be taken; local files stay on disk until then."""

    x_BMD: Tensor
    """bfloat16, or int8 with a scale."""
    scale_BM: Tensor | None
    """float32 factor of every row and model, for int8."""

    def take(self, index_N: Tensor, out_NMD: Tensor) -> None:
        """Write these rows into `out`, bfloat16 or float32; the values are those of bfloat16 in either case."""
        if self.scale_BM is None and out_NMD.dtype == self.x_BMD.dtype:
            torch.index_select(self.x_BMD, 0, index_N, out=out_NMD)
            return
        step = max(1, _CHUNK_VALUES // max(self.x_BMD[0].numel(), 1)) if len(index_N) else 1
        for start in range(0, len(index_N), step):
            chunk_N = index_N[start : start + step]
            rows_NMD = self.x_BMD.index_select(0, chunk_N)
            if self.scale_BM is not None:
                rows_NMD = (rows_NMD.float() * self.scale_BM.index_select(0, chunk_N)[:, :, None]).to(torch.bfloat16)
            out_NMD[start : start + step].copy_(rows_NMD)

    def whole(self) -> Tensor:
        """x_BMD of all rows, bfloat16."""
        if self.scale_BM is None:
            return self.x_BMD
        whole_BMD = torch.empty(self.x_BMD.shape, dtype=torch.bfloat16)
        for start in range(0, len(whole_BMD), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            whole_BMD[rows] = self.x_BMD[rows].float() * self.scale_BM[rows][:, :, None]
        return whole_BMD


def publish_shard(storage: Storage, key: str, rows: Rows, compression: str = NONE) -> ShardFile:
    """Write a shard in one step; its size and checksum. Nothing is copied, and hashing overlaps with writing."""
    parts = pack_parts(rows, compression)
    with ThreadPoolExecutor(1, thread_name_prefix="crossray-hash") as hasher:
        digest = hasher.submit(_sha256, parts)
        storage.write_parts(key, parts)
        return ShardFile(sum(part.nbytes for part in parts), digest.result())


def pack_shard(rows: Rows, compression: str = NONE) -> bytes:
    """The bytes of a shard file; the same rows give the same bytes."""
    return b"".join(pack_parts(rows, compression))


def pack_parts(rows: Rows, compression: str = NONE) -> list[memoryview]:
    """The bytes of a shard file in pieces: header first, then every tensor's own memory."""
    columns = dict(zip(_COLUMNS, rows, strict=True))
    x_BMD = columns.pop("x")
    tensors = {**columns, **_packed(x_BMD.contiguous(), compression)}
    # Wide elements first, so that every tensor starts at a multiple of its own element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"compression": compression}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *(_memory(tensors[name]) for name in order)]


def unpack_rows(data: Tensor, where: str) -> Rows:
    """All rows of a shard file from its bytes (uint8); an ArtifactError where they are none."""
    tensors, compression = _parse(data, where)
    try:
        columns = [tensors[name] for name in _COLUMNS[1:]]
        return Rows(_opened(tensors, compression, where).whole(), *columns)
    except KeyError as error:
        raise _foreign(where, f"no tensor {error}") from error


def open_shard(data: Tensor, where: str) -> OpenShard:
    """The activations of a shard file from its bytes (uint8), decompressed where they are lossless."""
    tensors, compression = _parse(data, where)
    try:
        return _opened(tensors, compression, where)
    except KeyError as error:
        raise _foreign(where, f"no tensor {error}") from error


def summarise(x_BMD: Tensor) -> Summary:
    """Moments (float64, mergeable) and mean norms of rows, a chunk at a time; NaN for rows that hold NaN or Inf."""
    total = moments_of(x_BMD[:0])
    norm_M = torch.zeros(x_BMD.shape[1], dtype=torch.float64)
    for start in range(0, len(x_BMD), _CHUNK_ROWS):
        values_BMD = x_BMD[start : start + _CHUNK_ROWS].float()
        total = total.merge(moments_of(values_BMD))
        norm_M += torch.linalg.vector_norm(values_BMD, dim=2).sum(0, dtype=torch.float64)
    return Summary(total, norm_M / max(len(x_BMD), 1))


def require_finite(rows: Rows, where: str) -> None:
    """Raise an InputError that names the first row with NaN or Inf, if there is one."""
    for start in range(0, len(rows.x_BMD), _CHUNK_ROWS):
        bits_BN = rows.x_BMD[start : start + _CHUNK_ROWS].flatten(1).view(torch.int16)
        largest_B = (bits_BN & 0x7FFF).amax(1)  # without its sign a bfloat16 orders as an integer, Inf and NaN last
        if int(largest_B.max()) >= 0x7F80:
            row = start + int((largest_B >= 0x7F80).nonzero()[0])
            raise InputError(
                f"{where}: expected finite activations, got NaN or Inf in row {row} "
                f"(document {int(rows.doc_id_B[row])}, position {int(rows.position_B[row])}); "
                "use models.dtype: bfloat16 or float32"
            )


def _packed(x_BMD: Tensor, compression: str) -> dict[str, Tensor]:
    if compression == NONE:
        return {"x": x_BMD}
    if compression == INT8:
        return _quantised(x_BMD)
    assert compression == LOSSLESS, compression
    return _split(x_BMD)


def _quantised(x_BMD: Tensor) -> dict[str, Tensor]:
    """Rows as int8 with the scale of every row and model; a row of zeros keeps scale 0."""
    x_int8 = torch.empty(x_BMD.shape, dtype=torch.int8)
    scale_BM = torch.empty(x_BMD.shape[:2], dtype=torch.float32)
    for start in range(0, len(x_BMD), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        values_BMD = x_BMD[rows].float()
        scale_BM[rows] = values_BMD.abs().amax(2) / 127
        divisor_BM = torch.where(scale_BM[rows] > 0, scale_BM[rows], 1.0)
        x_int8[rows] = (values_BMD / divisor_BM[:, :, None]).round_().clamp_(-127, 127).to(torch.int8)
    return {"x": x_int8, "x_scale": scale_BM}


def _split(x_BMD: Tensor) -> dict[str, Tensor]:
    """Exponents as zstd frames, and sign with mantissa as they are."""
    num_rows, per_row = len(x_BMD), x_BMD[0].numel() if len(x_BMD) else 0
    bits_BN = x_BMD.view(torch.int16).numpy().view(np.uint16).reshape(num_rows, per_row)
    rest_BN = np.empty((num_rows, per_row), dtype=np.uint8)
    step = max(1, _FRAME_VALUES // max(per_row, 1))
    starts = range(0, num_rows, step)

    def frame(start: int) -> bytes:
        rows = slice(start, start + step)
        turned_BN = (bits_BN[rows] << 1) | (bits_BN[rows] >> 15)  # exponent above, mantissa and sign below
        rest_BN[rows] = turned_BN.astype(np.uint8)
        exponent_BN = (turned_BN >> 8).astype(np.uint8)
        return bytes(pa.Codec("zstd", compression_level=_ZSTD_LEVEL).compress(exponent_BN, asbytes=True))

    with ThreadPoolExecutor(_PACKING_THREADS, thread_name_prefix="crossray-pack") as pool:
        frames = list(pool.map(frame, starts))
    end_bytes = np.cumsum([len(frame) for frame in frames], dtype=np.int64).tolist()
    ends = [(end, min(start + step, num_rows)) for end, start in zip(end_bytes, starts, strict=True)]
    return {
        "x_exponent": torch.from_numpy(np.frombuffer(bytearray(b"".join(frames)), dtype=np.uint8)),
        "x_frames": torch.tensor(ends, dtype=torch.int64).reshape(-1, 2),
        "x_rest": torch.from_numpy(rest_BN).reshape(x_BMD.shape),
    }


def _joined(tensors: dict[str, Tensor]) -> Tensor:
    """The bfloat16 rows of `_split`'s tensors."""
    rest = tensors["x_rest"]
    shape = rest.shape
    rest_BN, exponents = rest.flatten(1).numpy(), tensors["x_exponent"].numpy()
    bits_BN = np.empty(rest_BN.shape, dtype=np.uint16)
    codec = pa.Codec("zstd")
    byte = row = 0
    for end_byte, end_row in tensors["x_frames"].tolist():
        bits_bN, size = bits_BN[row:end_row], (end_row - row) * rest_BN.shape[1]
        exponent = np.frombuffer(codec.decompress(exponents[byte:end_byte], decompressed_size=size), dtype=np.uint8)
        bits_bN[...] = exponent.reshape(bits_bN.shape)
        np.left_shift(bits_bN, 7, out=bits_bN)
        turned_bN = rest_BN[row:end_row].astype(np.uint16)
        np.bitwise_or(bits_bN, turned_bN >> 1, out=bits_bN)  # mantissa
        np.left_shift(turned_bN, 15, out=turned_bN)  # sign
        np.bitwise_or(bits_bN, turned_bN, out=bits_bN)
        byte, row = end_byte, end_row
    return torch.from_numpy(bits_BN.view(np.int16)).view(torch.bfloat16).reshape(shape)


def _opened(tensors: dict[str, Tensor], compression: str, where: str) -> OpenShard:
    if compression == LOSSLESS:
        try:
            return OpenShard(_joined(tensors), None)
        except (OSError, ValueError) as error:
            raise _foreign(where, f"frames that zstd refuses: {error}") from error
    return OpenShard(tensors["x"], tensors["x_scale"] if compression == INT8 else None)


def _parse(data: Tensor, where: str) -> tuple[dict[str, Tensor], str]:
    """Views of a safetensors file's tensors, and its compression."""
    size = int.from_bytes(bytes(data[:8].tolist()), "little")
    if len(data) < 8 or size > len(data) - 8:
        raise _foreign(where, f"{len(data)} bytes without a header")
    try:
        header = json.loads(bytes(data[8 : 8 + size].numpy()))
        compression = header.pop("__metadata__")["compression"]
        body = data[8 + size :]
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            tensors[name] = body[start:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _foreign(where, f"a header that does not fit: {error}") from error
    if compression not in (NONE, LOSSLESS, INT8):
        raise _foreign(where, f"compression {compression!r}")
    return tensors, compression


def _foreign(where: str, came: str) -> ArtifactError:
    return ArtifactError(f"{where}: expected a shard of activations, got {came}; remove it and run again")


def _memory(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _sha256(parts: Sequence[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
