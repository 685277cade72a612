"""Where latents fire on a sample of the run's validation rows: encoded once, in the background, read by every view.

Rows are encoded a few at a time, and a view takes what is finished. The sample is bounded by rows and by work, so that
a large dictionary on a CPU does not keep a machine busy for minutes; what a view shows says how many rows it is from.

Shapes: B rows, F latents, P active pairs.
"""

import logging
import threading
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from pipeline.analyses.rows import RowBatch, document_slices
from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import SHARD_TENSORS, Split
from pipeline.storage.activation_store import ActivationStore

MAX_ROWS = 16_384
_MAX_PRODUCTS = 2e12
"""Multiplications of encoding on a CPU: under a minute on two cores."""
_DENSE_NUMBERS = 1 << 24
"""In one batch of codes before most of them become 0."""


class Fired(NamedTuple):
    """The rows of the sample on which one latent fires, strongest first."""

    row_N: np.ndarray
    """Index into the sample."""
    value_N: np.ndarray
    """f_j there."""


class Cofiring(NamedTuple):
    """Another latent that fires on the same rows."""

    latent: int
    num_both: int
    jaccard: float
    """Rows on which both fire over rows on which either does."""


class Sampled:
    """Finished batches, whole documents each; a new object for every number of batches."""

    def __init__(self, batches: tuple[RowBatch, ...], corpora: tuple[str, ...], *, is_complete: bool) -> None:
        """is_complete: no more batches will come."""
        self.batches, self.corpora, self.is_complete = batches, corpora, is_complete
        self.num_rows = sum(batch.codes.num_rows for batch in batches)

    @cached_property
    def _pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Row, latent and value of every pair, by latent, then row; and where each latent begins, int64 [F + 1]."""
        firsts = np.cumsum([0, *(batch.codes.num_rows for batch in self.batches)])
        rows, latents, values = (
            np.concatenate(parts)
            for parts in zip(
                *(
                    (first + batch.codes.rows_P().numpy(), batch.codes.latents_P.numpy(), batch.codes.values_P.numpy())
                    for first, batch in zip(firsts, self.batches, strict=False)
                ),
                strict=True,
            )
        )
        order = np.argsort(latents, kind="stable")
        counts_F = np.bincount(latents, minlength=self.batches[0].codes.num_latents)
        return rows[order], latents[order], values[order], np.concatenate([[0], np.cumsum(counts_F)])

    def column(self, name: str) -> np.ndarray:
        """token_id, doc_id, position, flags or corpus of every row."""
        return np.concatenate([getattr(batch, f"{name}_B").numpy() for batch in self.batches])

    @cached_property
    def token_id_B(self) -> np.ndarray:  # noqa: N802 (shape letter)
        """The token of every row."""
        return self.column("token_id")

    def of(self, latent: int) -> Fired:
        """Where one latent fires."""
        if not self.batches:
            return Fired(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
        row_P, _, value_P, start_F = self._pairs
        here = slice(start_F[latent], start_F[latent + 1])
        order = np.argsort(-value_P[here], kind="stable")
        return Fired(row_P[here][order], value_P[here][order])

    def cofiring(self, latent: int, num: int) -> list[Cofiring]:
        """Latents that share most rows with one, by Jaccard's index."""
        fired = self.of(latent)
        if not len(fired.row_N):
            return []
        row_P, latent_P, _, start_F = self._pairs
        is_there_B = np.zeros(self.num_rows, dtype=bool)
        is_there_B[fired.row_N] = True
        both_F = np.bincount(latent_P[is_there_B[row_P]], minlength=len(start_F) - 1)
        either_F = len(fired.row_N) + np.diff(start_F) - both_F
        jaccard_F = both_F / np.maximum(either_F, 1)
        jaccard_F[latent] = -1.0
        best = np.argsort(-jaccard_F, kind="stable")[:num]
        return [Cofiring(int(j), int(both_F[j]), float(jaccard_F[j])) for j in best if both_F[j]]

    def on_tokens(self, token_ids: np.ndarray) -> np.ndarray:
        """share_F: how much of each latent's summed activation falls on rows of these tokens; 0 where it is silent."""
        if not self.batches:
            return np.zeros(0)
        row_P, latent_P, value_P, start_F = self._pairs
        size = len(start_F) - 1
        is_wanted_P = np.isin(self.token_id_B, token_ids)[row_P]
        there_F, all_F = (
            np.bincount(latent_P, weights=weight_P, minlength=size) for weight_P in (value_P * is_wanted_P, value_P)
        )
        return there_F / np.maximum(all_F, np.finfo(np.float64).tiny)


class Sampler:
    """Encodes the sample of one crosscoder in a thread of its own; `so_far` is what is finished."""

    def __init__(self, store: ActivationStore, crosscoder: Crosscoder) -> None:
        self._store, self._crosscoder = store, crosscoder
        self._done: list[RowBatch] = []
        self._changed = threading.Condition()
        self._is_complete = False
        self._latest = Sampled((), store.manifest.corpora, is_complete=False)
        self._thread = threading.Thread(target=self._work, name="explorer-sample", daemon=True)
        self._thread.start()

    def so_far(self, *, wait_seconds: float = 0.0) -> Sampled:
        """What is finished; waits so long for the rest."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_complete, timeout=wait_seconds)
            latest = self._latest
            if len(latest.batches) != len(self._done) or latest.is_complete != self._is_complete:
                self._latest = Sampled(tuple(self._done), latest.corpora, is_complete=self._is_complete)
            return self._latest

    def _work(self) -> None:
        try:
            for batch in encoded_sample(self._store, self._crosscoder):
                with self._changed:
                    self._done.append(batch)
        except Exception:
            # The views say from how many rows they are; the log says why there are no more.
            logging.getLogger(__name__).exception("the sample of validation rows ended early")
        finally:
            with self._changed:
                self._is_complete = True
                self._changed.notify_all()


def encoded_sample(store: ActivationStore, crosscoder: Crosscoder) -> Iterator[RowBatch]:
    """Batches of whole documents with their codes, without activations, up to the bounds above."""
    device = crosscoder.W_dec_FMD.device
    left = MAX_ROWS if device.type != "cpu" else min(MAX_ROWS, int(_MAX_PRODUCTS / crosscoder.W_dec_FMD.numel()))
    max_rows = max(1, _DENSE_NUMBERS // crosscoder.num_latents)
    names = [column.name for column in SHARD_TENSORS[1:]]
    for shard in sorted(store.manifest.of_split(Split.VALIDATION), key=lambda own: own.num_rows):
        rows = store.read(shard)
        for part in document_slices(rows.doc_id_B, max_rows=max_rows):
            if left <= 0:
                return
            with torch.no_grad():
                codes = crosscoder.encode(rows.x_BMD[part].float().to(device))
            own = {f"{name}_B": getattr(rows, f"{name}_B")[part].clone() for name in names}
            nothing = torch.empty(codes.num_rows, 0)
            yield RowBatch(x_BMD=nothing, codes=on_cpu(codes), reconstruction_BMD=nothing, **own)
            left -= codes.num_rows


def on_cpu(codes: SparseCodes) -> SparseCodes:
    """The codes without gradients, on the CPU."""
    values_P, latents_P, row_offsets = (
        part.detach().cpu() for part in (codes.values_P, codes.latents_P, codes.row_offsets)
    )
    return SparseCodes(values_P, latents_P, row_offsets, codes.num_latents)
