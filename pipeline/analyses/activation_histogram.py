"""How strongly each latent fires on each corpus: counts of rows in bins, four to each doubling.

Fixed bins need no second pass for the largest activation, and counts of parts add exactly.

Shapes: P active pairs, F latents, C corpora, K bins.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from pipeline.analyses.activation_bins import EDGES, bin_of
from pipeline.analyses.example_columns import HISTOGRAM_COLUMNS
from pipeline.analyses.rows import RowBatch, Sums, check_codes, merge_sums


class ActivationHistogram:
    """Row analysis: HISTOGRAM_COLUMNS of every latent; F x C x K numbers of 4 bytes."""

    def __init__(self, *, num_latents: int, corpora: Sequence[str]) -> None:
        """Corpora as the batches' corpus_B counts them."""
        self.num_latents, self.corpora = num_latents, tuple(corpora)

    def start(self) -> Sums:
        """counts [F, C, K], int32."""
        return {"counts": torch.zeros(self.num_latents, len(self.corpora), len(EDGES) - 1, dtype=torch.int32)}

    def update(self, sums: Sums, batch: RowBatch) -> None:
        """Adds a batch; work proportional to the active pairs."""
        codes = batch.codes
        check_codes(codes, self.num_latents)
        values_P, latents_P, row_P = codes.values_P.float().cpu(), codes.latents_P.cpu(), codes.rows_P().cpu()
        bin_P = torch.from_numpy(bin_of(values_P.numpy()))
        _, C, K = sums["counts"].shape
        place_P = (latents_P.long() * C + batch.corpus_B.cpu().long()[row_P]) * K + bin_P
        fired_P = (values_P > 0).int()
        sums["counts"].view(-1).index_add_(0, place_P, fired_P)

    def merge(self, a: Sums, b: Sums) -> Sums:
        """Counts add."""
        return merge_sums(a, b)

    def table(self, sums: Sums) -> pd.DataFrame:
        """The rows of all latents."""
        return self.table_of(sums, range(self.num_latents))

    def table_of(self, sums: Sums, latents: Sequence[int]) -> pd.DataFrame:
        """The rows of these latents, in their order."""
        counts_LCK = sums["counts"][torch.tensor(latents, dtype=torch.int64)].numpy()
        latent_N, corpus_N, bin_N = counts_LCK.nonzero()
        return pd.DataFrame(
            {
                "latent": np.asarray(latents, dtype=np.int32)[latent_N],
                "corpus": np.array(self.corpora, dtype=object)[corpus_N],
                "low": EDGES[bin_N],
                "high": EDGES[bin_N + 1],
                "num_rows": counts_LCK[latent_N, corpus_N, bin_N].astype(np.int64),
            },
            columns=[column.name for column in HISTOGRAM_COLUMNS],
        )
