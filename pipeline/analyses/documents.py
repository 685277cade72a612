"""Which documents a latent fires on most: from a latent back to the texts that may have taught it.

Of every document and each of a few latents, the sum of the codes, the largest code and its place, and the rows that
fired. Ranked by the sum: a document in which a concept runs through every token comes before one with a single strong
token. The mean is for sets whose documents differ much in length. Only documents on which the latent fires are kept, so
the memory is that of the pairs (latent, document) that occur.

Shapes: B rows, P active pairs, J latents asked about.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch

from pipeline.analyses.rows import RowBatch, document_index, document_starts
from pipeline.errors import InputError

RankedBy = Literal["sum", "mean", "max"]
"""A document's score: sum of the latent's codes over its rows, that by its number of rows, or the largest code."""


def document_activity(batches: Iterable[RowBatch], latents: Sequence[int]) -> pd.DataFrame:
    """One row per latent and document on which it fires, in the order of the batches.

    Columns latent, doc_id, position (of the largest code, the first one of equals), num_rows and num_active (rows of
    the document, and those on which the latent fires), sum, mean, max. Batches hold whole documents.
    """
    return pd.concat([_of_batch(batch, list(dict.fromkeys(latents))) for batch in batches], ignore_index=True)


def _of_batch(batch: RowBatch, latents: list[int]) -> pd.DataFrame:
    codes, starts = batch.codes, document_starts(batch.doc_id_B)
    size_of_document = torch.diff(starts, append=starts.new_tensor([len(batch.doc_id_B)]))
    is_asked_P = torch.isin(codes.latents_P, torch.tensor(latents, device=codes.latents_P.device))
    rows_P = codes.rows_P()[is_asked_P]
    document_P = document_index(batch.doc_id_B)[rows_P]
    pairs = pd.DataFrame(
        {
            "latent": codes.latents_P[is_asked_P].cpu().numpy(),
            "doc_id": batch.doc_id_B[rows_P].cpu().numpy(),
            "position": batch.position_B[rows_P].cpu().numpy(),
            "num_rows": size_of_document[document_P].cpu().numpy(),
            "value": codes.values_P[is_asked_P].double().cpu().numpy(),
        }
    )
    strongest_first = pairs.sort_values("value", ascending=False, kind="stable")
    groups = strongest_first.groupby(["latent", "doc_id"], sort=False)
    found = groups.agg(
        position=("position", "first"),
        num_rows=("num_rows", "first"),
        num_active=("value", "size"),
        sum=("value", "sum"),
        max=("value", "first"),
    ).reset_index()
    found["mean"] = found["sum"] / found["num_rows"]
    return found


def ranked_documents(activity: pd.DataFrame, *, by: RankedBy, num_documents: int) -> pd.DataFrame:
    """The first num_documents of each latent by score, with rank and share: of the latent's whole sum, up to this rank.

    Equal scores come in the order of doc_id, so that the order of batches does not matter.
    """
    if by not in get_args(RankedBy):
        raise InputError(f"by: expected one of {', '.join(get_args(RankedBy))}, got {by!r}")
    if num_documents < 1:
        raise InputError(f"num_documents: expected at least 1, got {num_documents}")
    ordered = activity.sort_values(["latent", by, "doc_id"], ascending=[True, False, True], ignore_index=True)
    groups = ordered.groupby("latent", sort=False)
    ordered["rank"] = groups.cumcount().astype(np.int32)
    ordered["share"] = groups["sum"].cumsum() / groups["sum"].transform("sum")
    return ordered[ordered["rank"] < num_documents].reset_index(drop=True)
