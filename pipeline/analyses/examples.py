"""Examples: the strongest contexts of every latent, one per document, found in one pass with bounded memory.

The pass keeps N contexts for each of the F latents as (document, position, value): F x N numbers however many rows
there are. The strongest contexts show only one end of a latent's range, so a uniform sample of its documents can be
kept beside them, from which contexts at given shares of its maximum are drawn in the end. The texts are cut out
afterwards, for chosen latents, from the documents that the table names; these few documents are read a second time, and
no token windows are kept for all latents.

Shapes: B rows, F latents, N contexts per latent, P active pairs, E entries (latent, document).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.latent_sets import require_latents
from pipeline.analyses.rows import RowBatch, Sums, check_codes, document_slices_of
from pipeline.errors import InputError
from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.statistics import hash_documents
from pipeline.schema import EXAMPLE_COLUMNS

STRONGEST_COLUMNS = tuple(column.name for column in EXAMPLE_COLUMNS[:6])
"""Columns of Examples.table: everything but the texts."""
QUANTILES = (0.95, 0.75, 0.5, 0.25)
"""Shares of a latent's maximum at which a context of the sample is shown, if there is a sample."""
_STRONGEST, _SAMPLE = "strongest", "sample"
_KEPT = ("value", "doc_id", "position", "corpus")
_SAMPLE_SALT = 2
"""Draws the sample independently of the document groups (salt 0) and halves (salt 1) of other analyses."""


class _Entries(NamedTuple):
    """Candidate contexts, one per (latent, document)."""

    latent_E: npt.NDArray[Any]
    value_E: npt.NDArray[Any]
    doc_id_E: npt.NDArray[Any]
    position_E: npt.NDArray[Any]
    corpus_E: npt.NDArray[Any]

    def take(self, index: npt.NDArray[Any]) -> "_Entries":
        """The entries at these places, or where this mask holds."""
        return _Entries(*(part[index] for part in self))


class Examples:
    """Row analysis: the num_contexts strongest documents of every latent, each with its strongest position.

    With num_sampled > 0 also a uniform sample of as many of each latent's documents, drawn by the documents' hash.
    """

    def __init__(self, *, num_latents: int, num_contexts: int, corpora: Sequence[str], num_sampled: int = 0) -> None:
        if num_contexts < 1 or num_sampled < 0 or not corpora:
            raise InputError(
                f"expected num_contexts >= 1, num_sampled >= 0 and the names of the corpora, got {num_contexts}, "
                f"{num_sampled} and {list(corpora)}: ask for at least one context"
            )
        self.num_latents, self.corpora = num_latents, tuple(corpora)
        self.sizes = {_STRONGEST: num_contexts} | ({_SAMPLE: num_sampled} if num_sampled else {})

    def start(self) -> Sums:
        """Per shelf (strongest, sample) values, 0 where a latent has fewer, and places of contexts, -1 there."""
        sums: Sums = {}
        for shelf, size in self.sizes.items():
            shape = (self.num_latents, size)
            sums |= {f"{shelf}_{name}": torch.full(shape, -1, dtype=torch.int64) for name in _KEPT}
            sums[f"{shelf}_value"] = torch.zeros(shape)
        return sums

    def update(self, sums: Sums, batch: RowBatch) -> None:
        """Keeps what comes before the last kept context; most pairs are dropped at this comparison."""
        codes = batch.codes
        check_codes(codes, self.num_latents)
        parts_B = [part_B.cpu().long() for part_B in (batch.doc_id_B, batch.position_B, batch.corpus_B)]
        values_P, latents_P, row_P = codes.values_P.float().cpu(), codes.latents_P.cpu(), codes.rows_P().cpu()
        for shelf in self.sizes:
            key_P = _sort_key(shelf, values_P, parts_B[0][row_P])
            last_value_F, last_doc_F = (sums[f"{shelf}_{name}"][:, -1].contiguous() for name in ("value", "doc_id"))
            last_F = _sort_key(shelf, last_value_F, last_doc_F).masked_fill(last_value_F == 0, torch.inf)
            candidates = (key_P <= last_F[latents_P]).nonzero().squeeze(1)
            if len(candidates):
                where = (part_B[row_P[candidates]] for part_B in parts_B)
                found = (latents_P[candidates], values_P[candidates], *where)
                self._keep(sums, shelf, _Entries(*(part.numpy() for part in found)))

    def merge(self, a: Sums, b: Sums) -> Sums:
        """The strongest contexts, and the sample, of both parts together."""
        merged = {name: value.clone() for name, value in a.items()}
        for shelf in self.sizes:
            self._keep(merged, shelf, _entries_of(b, shelf, torch.arange(self.num_latents)))
        return merged

    def _keep(self, sums: Sums, shelf: str, new: _Entries) -> None:
        touched = torch.from_numpy(np.unique(new.latent_E))
        old = _entries_of(sums, shelf, touched)
        both = _Entries(*(np.concatenate([old[field], new[field]]) for field in range(len(new))))
        kept, rank_E = _first_of_each(both, shelf, self.sizes[shelf])
        latent_E, slot_E = torch.from_numpy(kept.latent_E), torch.from_numpy(rank_E)
        for name, values in zip(_KEPT, kept[1:], strict=True):
            sums[f"{shelf}_{name}"][latent_E, slot_E] = torch.from_numpy(values)

    def table(self, sums: Sums) -> pd.DataFrame:
        """STRONGEST_COLUMNS, latent by latent, rank 0 = strongest; latents that never fire have no row.

        With a sample, the strongest are followed by up to one document for each of QUANTILES, falling: the sampled one
        whose activation is nearest to this share of the maximum and that is not in the table yet.
        """
        everything = torch.arange(self.num_latents)
        strongest = self._frame(_entries_of(sums, _STRONGEST, everything))
        if _SAMPLE not in self.sizes:
            return strongest
        drawn = _at_quantiles(strongest, self._frame(_entries_of(sums, _SAMPLE, everything)))
        table = pd.concat([strongest, drawn]).sort_values("latent", kind="stable", ignore_index=True)
        table["rank"] = table.groupby("latent").cumcount().astype(np.int32)
        return table

    def _frame(self, entries: _Entries) -> pd.DataFrame:
        latent_E = entries.latent_E
        return pd.DataFrame(
            {
                "latent": latent_E.astype(np.int32),
                "rank": (np.arange(len(latent_E)) - np.searchsorted(latent_E, latent_E)).astype(np.int32),
                "doc_id": entries.doc_id_E,
                "position": entries.position_E.astype(np.int32),
                "activation": entries.value_E.astype(np.float64),
                "corpus": np.array(self.corpora, dtype=object)[entries.corpus_E],
            }
        )

    def table_of(self, sums: Sums, latents: Sequence[int]) -> pd.DataFrame:
        """The table's rows of these latents, in their order."""
        require_latents(latents, self.num_latents, "examples")
        table = self.table(sums)
        order = {latent: place for place, latent in reversed(list(enumerate(latents)))}
        table = table[table["latent"].isin(list(order))]
        return table.iloc[np.lexsort((table["rank"], table["latent"].map(order)))].reset_index(drop=True)


def _sort_key(shelf: str, value: Tensor, doc_id: Tensor) -> Tensor:
    """What a shelf is filled by, smallest first: the strongest, or the documents of smallest hash; float64."""
    if shelf == _STRONGEST:
        return -value.double()
    return hash_documents(doc_id, num_groups=1 << 52, salt=_SAMPLE_SALT).double()  # exact in float64


def _entries_of(sums: Sums, shelf: str, latents: Tensor) -> _Entries:
    """The kept contexts of these latents as entries, in the shelf's order."""
    index, rank = (sums[f"{shelf}_value"][latents] > 0).nonzero(as_tuple=True)
    latent_E = latents[index]
    return _Entries(latent_E.numpy(), *(sums[f"{shelf}_{name}"][latent_E, rank].numpy() for name in _KEPT))


def _first_of_each(entries: _Entries, shelf: str, size: int) -> tuple[_Entries, npt.NDArray[np.int64]]:
    """Up to size entries per latent, one per document, in the shelf's order, and each one's place.

    Ties go to the smaller document id and position, so that the order of batches does not matter.
    """
    order = np.lexsort((entries.position_E, -entries.value_E, entries.doc_id_E, entries.latent_E))
    entries = entries.take(order)
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (np.diff(entries.latent_E) != 0) | (np.diff(entries.doc_id_E) != 0)
    entries = entries.take(is_first)
    key_E = _sort_key(shelf, torch.from_numpy(entries.value_E), torch.from_numpy(entries.doc_id_E)).numpy()
    entries = entries.take(np.lexsort((entries.doc_id_E, key_E, entries.latent_E)))
    rank_E = np.arange(len(entries.latent_E)) - np.searchsorted(entries.latent_E, entries.latent_E)
    is_kept = rank_E < size
    return entries.take(is_kept), rank_E[is_kept]


def _at_quantiles(strongest: pd.DataFrame, sample: pd.DataFrame) -> pd.DataFrame:
    """For each latent and each of QUANTILES the nearest sampled context, no document twice."""
    maximum = strongest.groupby("latent")["activation"].max()
    known = set(zip(strongest["latent"], strongest["doc_id"], strict=True))
    is_new = [pair not in known for pair in zip(sample["latent"], sample["doc_id"], strict=True)]
    left = sample[np.array(is_new, dtype=bool)]
    share = left["activation"] / left["latent"].map(maximum)
    drawn = []
    for quantile in QUANTILES:
        nearest = (share - quantile).abs().sort_values(kind="stable").index
        chosen = left.loc[nearest].drop_duplicates("latent")
        drawn.append(chosen)
        left, share = left.drop(chosen.index), share.drop(chosen.index)
    return pd.concat(drawn).sort_values(["latent", "activation"], ascending=[True, False], kind="stable")


def contexts(
    strongest: pd.DataFrame,
    batches: Iterable[RowBatch],
    *,
    window_tokens: int,
    token_texts: Callable[[list[int]], list[str]],
) -> pd.DataFrame:
    """schema.EXAMPLE_COLUMNS: the texts of up to window_tokens tokens on either side and f_j at each of them.

    strongest has STRONGEST_COLUMNS (Examples.table_of); batches must hold every document that it names, others are
    ignored; token_texts gives one text per token id. Rows that were dropped before the activations were stored are
    missing from the window.
    """
    latents, positions = strongest["latent"].to_numpy(), strongest["position"].to_numpy()
    wanted: dict[int, list[int]] = {}
    for index, doc_id in enumerate(strongest["doc_id"].to_numpy()):
        wanted.setdefault(int(doc_id), []).append(index)
    tokens: dict[int, list[str]] = {}
    activations: dict[int, list[float]] = {}
    for batch in batches:
        position_B, token_id_B = batch.position_B.cpu().numpy(), batch.token_id_B.cpu().numpy()
        for document in document_slices_of(batch.doc_id_B):
            for index in wanted.pop(int(batch.doc_id_B[document.start]), []):
                distance = np.abs(position_B[document].astype(np.int64) - int(positions[index]))
                rows = document.start + np.flatnonzero(distance <= window_tokens)
                tokens[index] = token_texts(token_id_B[rows].tolist())
                activations[index] = _values_at(batch.codes, rows, int(latents[index])).tolist()
    if wanted:
        raise InputError(
            f"expected rows of {strongest['doc_id'].nunique()} documents, {len(wanted)} did not come (the first is "
            f"{next(iter(wanted))}): pass the activations on which the contexts were found"
        )
    table = strongest.reset_index(drop=True)
    table["tokens"] = pd.Series(tokens, dtype=object)
    table["activations"] = pd.Series(activations, dtype=object)
    return table[[column.name for column in EXAMPLE_COLUMNS]]


def _values_at(codes: SparseCodes, rows: npt.NDArray[np.int64], latent: int) -> npt.NDArray[np.float32]:
    """f of one latent at consecutive rows, 0 where it does not fire."""
    offsets = codes.row_offsets[int(rows[0]) : int(rows[-1]) + 2]
    pairs = slice(int(offsets[0]), int(offsets[-1]))
    hit_P = (codes.latents_P[pairs] == latent).nonzero().squeeze(1)
    values = np.zeros(len(rows), dtype=np.float32)
    row_P = torch.searchsorted(offsets, pairs.start + hit_P, right=True) - 1
    values[row_P.cpu().numpy()] = codes.values_P[pairs][hit_P].float().cpu().numpy()
    return values
