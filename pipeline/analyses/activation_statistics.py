"""Where a latent fires: how often, how strongly, in how many documents, and on whose tokens.

Shares are of the latent's summed activation, so that a latent that is weak everywhere and strong on template tokens
counts as a template latent (more than half; arXiv 2504.02922, section 4). A token has one role among template,
user and assistant, or none in plain text; BOS (schema.Flag) is counted on its own. Documents are counted
exactly, which needs batches of whole documents.

Shapes: B rows, F latents, P active pairs, C corpora.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from pipeline.analyses.rows import RowBatch, Sums, check_codes, document_index, merge_sums, require_rows, sum_by_latent
from pipeline.errors import InputError
from pipeline.schema import Flag, latent_corpus_columns

_ROLES = {"template": Flag.TEMPLATE, "user": Flag.USER, "assistant": Flag.ASSISTANT, "bos": Flag.BOS}


class ActivationStatistics:
    """Row analysis: frequency (also per corpus), documents, largest (also per corpus) and mean activation, shares."""

    def __init__(self, *, num_latents: int, corpora: Sequence[str]) -> None:
        if not corpora:
            raise InputError(f"expected the names of the run's corpora, got {corpora!r}: pass at least one")
        self.num_latents, self.corpora = num_latents, tuple(corpora)

    def start(self) -> Sums:
        """Counts, sums and maxima per latent; count and max also per corpus."""
        per_corpus = (len(self.corpora), self.num_latents)
        return {
            "num_rows": torch.zeros(len(self.corpora), dtype=torch.int64),
            "count": torch.zeros(per_corpus, dtype=torch.int64),
            "max": torch.zeros(per_corpus, dtype=torch.float64),
            "num_documents": torch.zeros(self.num_latents, dtype=torch.int64),
            **{name: torch.zeros(self.num_latents, dtype=torch.float64) for name in ("sum", *_ROLES)},
        }

    def update(self, sums: Sums, batch: RowBatch) -> None:
        """Adds a batch of whole documents."""
        codes, num_corpora = batch.codes, len(self.corpora)
        check_codes(codes, self.num_latents)
        corpus_B = batch.corpus_B.long()
        if len(corpus_B) and not 0 <= int(corpus_B.min()) <= int(corpus_B.max()) < num_corpora:
            raise InputError(
                f"expected corpus indices 0 to {num_corpora - 1}, got up to {int(corpus_B.max())}: pass all corpora"
            )
        rows_P, latents_P, values_P = codes.rows_P(), codes.latents_P, codes.values_P.double()
        sums["num_rows"] += torch.bincount(corpus_B, minlength=num_corpora).cpu()
        slot_P = corpus_B[rows_P] * self.num_latents + latents_P
        size = num_corpora * self.num_latents
        sums["count"] += torch.bincount(slot_P, minlength=size).view(num_corpora, -1).cpu()
        largest = values_P.new_zeros(size).scatter_reduce_(0, slot_P, values_P, "amax")
        sums["max"] = torch.maximum(sums["max"], largest.view(num_corpora, -1).cpu())
        pair_P = torch.unique(document_index(batch.doc_id_B)[rows_P] * self.num_latents + latents_P)
        sums["num_documents"] += torch.bincount(pair_P % self.num_latents, minlength=self.num_latents).cpu()
        sums["sum"] += sum_by_latent(codes, values_P)
        flags_P = batch.flags_B[rows_P]
        for name, flag in _ROLES.items():
            sums[name] += sum_by_latent(codes, values_P * (flags_P & int(flag) != 0))

    def merge(self, a: Sums, b: Sums) -> Sums:
        """Sums add, maxima stay maxima; the parts must not share a document."""
        return merge_sums(a, b, maxima=("max",))

    def table(self, sums: Sums) -> pd.DataFrame:
        """One row per latent; shares and mean_activation are NaN where it never fires."""
        num_rows = int(sums["num_rows"].sum())
        require_rows(num_rows, "activation statistics")
        count_F, total_F = sums["count"].sum(0), sums["sum"]
        frequency_CF = sums["count"].double() / sums["num_rows"][:, None]
        per_corpus = [value for pair in zip(frequency_CF, sums["max"], strict=True) for value in pair]
        return pd.DataFrame(
            {
                "latent": np.arange(self.num_latents, dtype=np.int32),
                "frequency": (count_F.double() / num_rows).numpy(),
                "num_documents": sums["num_documents"].numpy(),
                "max_activation": sums["max"].amax(0).numpy(),
                "mean_activation": (total_F / count_F).numpy(),
                **{f"{name}_frac": (sums[name] / total_F).clamp(0, 1).numpy() for name in _ROLES},
                **{
                    column.name: value_F.numpy()
                    for column, value_F in zip(latent_corpus_columns(self.corpora), per_corpus, strict=True)
                },
            }
        )
