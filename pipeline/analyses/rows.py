"""One pass over activation rows for many questions: what a row analysis gets, keeps and returns.

A row analysis turns batches of whole documents into sums (a dict of tensors), merges sums of different shards, and
makes a table of them at the end. The stage encodes each batch once and passes it to all analyses; workers send back
sums alone, as bytes. Nothing here knows of shards, Ray or files.

The trade-off: batches hold whole documents, so a batch is at least as large as its longest document; in return
documents are counted exactly and no analysis has to carry an open document from batch to batch.

Shapes: B rows, M models, D width, P active pairs.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import pandas as pd
import torch
from safetensors.torch import load, save
from torch import Tensor

from pipeline import schema
from pipeline.errors import InputError
from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.crosscoder import Crosscoder

Sums = dict[str, Tensor]
"""What an analysis keeps between batches: named float64, int64 or float32 tensors."""
_ROWS_PER_BATCH = 8192


class RowBatch(NamedTuple):
    """Rows of whole documents with their codes and reconstructions; documents are contiguous."""

    x_BMD: Tensor
    """Raw activations, float32."""
    codes: SparseCodes
    """Codes in inference mode."""
    reconstruction_BMD: Tensor
    """decode(codes), float32."""
    token_id_B: Tensor
    doc_id_B: Tensor
    position_B: Tensor
    """Token position in the document, counted before any row was dropped."""
    flags_B: Tensor
    """Bits of schema.Flag and planted labels."""
    corpus_B: Tensor
    """Index into the run's list of corpora."""


class RowAnalysis(Protocol):
    """One question about a crosscoder, answered from sums over rows. Objects are picklable."""

    def start(self) -> Sums:
        """Empty sums."""
        ...

    def update(self, sums: Sums, batch: RowBatch) -> None:
        """Adds a batch to the sums, in place."""
        ...

    def merge(self, a: Sums, b: Sums) -> Sums:
        """The sums of both parts together; associative and, up to float64 rounding, commutative."""
        ...

    def table(self, sums: Sums) -> pd.DataFrame | dict[str, float]:
        """The answer. InputError where no row was seen."""
        ...


def row_batch(crosscoder: Crosscoder, rows: Mapping[str, Tensor]) -> RowBatch:
    """Encoded and decoded batch of the rows of a shard (names of schema.SHARD_TENSORS); x becomes float32."""
    missing = [column.name for column in schema.SHARD_TENSORS if column.name not in rows]
    if missing:
        raise InputError(
            f"expected rows with {', '.join(c.name for c in schema.SHARD_TENSORS)}, got {', '.join(sorted(rows))}: "
            "read them from an activations artifact of this version"
        )
    x_BMD = rows["x"].float()
    if x_BMD.shape[1:] != (crosscoder.num_models, crosscoder.activation_dim):
        raise InputError(
            f"expected activations [rows, {crosscoder.num_models}, {crosscoder.activation_dim}], got "
            f"{tuple(x_BMD.shape)}: this crosscoder was made for another layer or pair of models"
        )
    with torch.no_grad():
        codes = crosscoder.encode(x_BMD)
        reconstruction_BMD = crosscoder.decode(codes)
    return RowBatch(
        x_BMD,
        codes,
        reconstruction_BMD,
        *(rows[name].to(x_BMD.device) for name in ("token_id", "doc_id", "position", "flags", "corpus")),
    )


def encoded_batches(crosscoder: Crosscoder, rows: Mapping[str, Tensor]) -> Iterator[RowBatch]:
    """Encoded batches of whole documents, of the rows of a shard (names of schema.SHARD_TENSORS)."""
    for part in document_slices(rows["doc_id"], max_rows=_ROWS_PER_BATCH):
        yield row_batch(crosscoder, {name: value[part] for name, value in rows.items()})


def document_slices(doc_id_B: Tensor, *, max_rows: int) -> list[slice]:
    """Consecutive slices of at most max_rows rows that never split a document (a longer one is a slice of its own)."""
    if max_rows < 1:
        raise InputError(f"expected max_rows >= 1, got {max_rows}: a batch holds at least one row")
    ends = [*(document_starts(doc_id_B)[1:]).tolist(), len(doc_id_B)] if len(doc_id_B) else []
    slices, start, previous = [], 0, 0
    for end in ends:
        if end - start > max_rows and previous > start:
            slices.append(slice(start, previous))
            start = previous
        previous = end
    return [*slices, slice(start, previous)] if previous > start else slices


def document_starts(doc_id_B: Tensor) -> Tensor:
    """Index of each document's first row, int64."""
    return _is_start(doc_id_B).nonzero().squeeze(1)


def document_index(doc_id_B: Tensor) -> Tensor:
    """0, 1, 2, ... for the documents of a batch in order, int64 [B]."""
    return _is_start(doc_id_B).long().cumsum(0) - 1


def _is_start(doc_id_B: Tensor) -> Tensor:
    is_start_B = torch.ones_like(doc_id_B, dtype=torch.bool)
    is_start_B[1:] = doc_id_B[1:] != doc_id_B[:-1]
    return is_start_B


def document_slices_of(doc_id_B: Tensor) -> list[slice]:
    """The rows of each document of a batch, in order."""
    edges = [*document_starts(doc_id_B).tolist(), len(doc_id_B)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def analyse(analyses: Mapping[str, RowAnalysis], batches: Iterable[RowBatch]) -> dict[str, Sums]:
    """Sums of every analysis over one pass of the batches."""
    sums = {name: analysis.start() for name, analysis in analyses.items()}
    with torch.no_grad():
        for batch in batches:
            for name, analysis in analyses.items():
                analysis.update(sums[name], batch)
    return sums


def merge_all(analyses: Mapping[str, RowAnalysis], parts: Iterable[Mapping[str, Sums]]) -> dict[str, Sums]:
    """Sums of all parts (shards, workers) together; the empty sums where there is no part."""
    merged = {name: analysis.start() for name, analysis in analyses.items()}
    for part in parts:
        merged = {name: analysis.merge(merged[name], part[name]) for name, analysis in analyses.items()}
    return merged


def merge_sums(a: Sums, b: Sums, *, maxima: Sequence[str] = ()) -> Sums:
    """Elementwise a + b, or the larger one for the names in maxima."""
    shapes_a, shapes_b = ({name: tuple(value.shape) for name, value in sums.items()} for sums in (a, b))
    if shapes_a != shapes_b:
        raise InputError(
            f"expected sums of one analysis, got {shapes_a} and {shapes_b}: merge parts of the same crosscoder only"
        )
    return {name: torch.maximum(a[name], b[name]) if name in maxima else a[name] + b[name] for name in a}


def sums_to_bytes(sums: Mapping[str, Tensor]) -> bytes:
    """Safetensors bytes of one analysis' sums, to send between processes."""
    return bytes(save({name: value.contiguous() for name, value in sums.items()}))


def sums_from_bytes(data: bytes) -> Sums:
    """Inverse of sums_to_bytes."""
    return dict(load(data))


def check_batch(batch: RowBatch, *, num_models: int, activation_dim: int, num_latents: int) -> None:
    """InputError where a batch does not belong to a crosscoder of these sizes, or its parts differ in length."""
    shape = tuple(batch.x_BMD.shape)
    if batch.x_BMD.dim() != 3 or shape[1:] != (num_models, activation_dim) or batch.codes.num_latents != num_latents:
        raise InputError(
            f"expected rows [rows, {num_models}, {activation_dim}] and {num_latents} latents, got {shape} and "
            f"{batch.codes.num_latents}: the crosscoder does not fit these activations"
        )
    lengths = {len(part) for part in (batch.reconstruction_BMD, *batch[3:])} | {batch.codes.num_rows}
    if lengths != {shape[0]} or batch.reconstruction_BMD.shape != batch.x_BMD.shape:
        raise InputError(
            f"expected {shape[0]} rows in every part of the batch, got lengths {sorted(lengths)} and reconstructions "
            f"{tuple(batch.reconstruction_BMD.shape)}: take all parts from the same rows"
        )


def check_codes(codes: SparseCodes, num_latents: int) -> None:
    """InputError where codes belong to a crosscoder with another number of latents."""
    if codes.num_latents != num_latents:
        raise InputError(
            f"expected {num_latents} latents, got {codes.num_latents}: start the analysis for this crosscoder"
        )


def require_rows(num_rows: int, analysis: str) -> None:
    """InputError where an analysis saw no row at all."""
    if num_rows == 0:
        raise InputError(
            f"expected validation rows for the {analysis} analysis, got 0: give the corpus a validation part "
            "or keep fewer rows out"
        )


def sum_by_latent(codes: SparseCodes, weight_P: Tensor) -> Tensor:
    """Sum of weight_P over each latent's active pairs: float64 [F] on the CPU."""
    sums_F = torch.zeros(codes.num_latents, dtype=torch.float64, device=weight_P.device)
    return sums_F.index_add_(0, codes.latents_P, weight_P.double()).cpu()
