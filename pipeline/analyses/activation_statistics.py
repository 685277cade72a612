"""Where a latent fires: how often, how strongly, in how many documents, and on whose tokens.

Shares are of the latent's summed activation, so that a latent that is weak everywhere and strong on template tokens
counts as a template latent (more than half; arXiv 2504.02922, section 4). A token has one role among template,
user and assistant, or none in plain text; BOS (schema.Flag) is counted on its own. Documents are counted
exactly, which needs batches of whole documents. The template's control tokens (turn marks) are told apart by their id,
and a latent's rows on them are counted, as in the paper's code.

Shapes: B rows, F latents, P active pairs, C corpora, K control tokens.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from pipeline.analyses.rows import RowBatch, Sums, check_codes, document_index, merge_sums, require_rows, sum_by_latent
from pipeline.errors import InputError
from pipeline.schema import Flag, Verdict, latent_corpus_columns

MOST_ROWS = 0.5
"""A latent with more of its active rows on one control token marks that token."""
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
            "control_id_K": torch.zeros(0, dtype=torch.int64),
            "control_count_KF": torch.zeros(0, self.num_latents, dtype=torch.int64),
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
        control = int(Flag.TEMPLATE | Flag.SPECIAL)
        is_control_P = (flags_P & control) == control
        id_K, place_P = torch.unique(batch.token_id_B[rows_P][is_control_P].long(), return_inverse=True)
        slot_P = place_P * self.num_latents + latents_P[is_control_P]
        count_KF = torch.bincount(slot_P, minlength=len(id_K) * self.num_latents).view(len(id_K), self.num_latents)
        own = {"control_id_K": sums["control_id_K"], "control_count_KF": sums["control_count_KF"]}
        sums.update(_merge_controls(own, {"control_id_K": id_K.cpu(), "control_count_KF": count_KF.cpu()}))

    def merge(self, a: Sums, b: Sums) -> Sums:
        """Sums add, maxima stay maxima; the parts must not share a document."""
        names = ("control_id_K", "control_count_KF")
        plain_a, plain_b = ({name: sums[name] for name in sums if name not in names} for sums in (a, b))
        return merge_sums(plain_a, plain_b, maxima=("max",)) | _merge_controls(a, b)

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
                **_control_columns(sums, count_F),
                **{
                    column.name: value_F.numpy()
                    for column, value_F in zip(latent_corpus_columns(self.corpora), per_corpus, strict=True)
                },
            }
        )


def control_token_counts(latents: pd.DataFrame) -> dict[str, int]:
    """Chat-specific latents that fire on one control token on more than half of their rows, by the token."""
    specific = latents[(latents["verdict"] == Verdict.CHAT_SPECIFIC) & (latents["control_token_frac"] > MOST_ROWS)]
    return {str(token): int(number) for token, number in specific["control_token"].value_counts().items()}


def _merge_controls(a: Sums, b: Sums) -> Sums:
    """Counts of the control tokens of both parts, in order of their ids."""
    id_K, place_N = torch.unique(torch.cat([a["control_id_K"], b["control_id_K"]]), return_inverse=True)
    joined_NF = torch.cat([a["control_count_KF"], b["control_count_KF"]])
    count_KF = joined_NF.new_zeros(len(id_K), joined_NF.shape[1]).index_add_(0, place_N, joined_NF)
    return {"control_id_K": id_K, "control_count_KF": count_KF}


def _control_columns(sums: Sums, count_F: torch.Tensor) -> dict[str, np.ndarray]:
    """The id, as text, of each latent's most frequent control token (empty: none), and its share of the active rows."""
    id_K, count_KF = sums["control_id_K"], sums["control_count_KF"]
    if not len(id_K):
        id_K, count_KF = id_K.new_zeros(1), count_KF.new_zeros(1, count_KF.shape[1])
    most_F, place_F = count_KF.max(0)
    texts = [str(index) if most else "" for index, most in zip(id_K[place_F].tolist(), most_F.tolist(), strict=True)]
    return {"control_token": np.array(texts, dtype=object), "control_token_frac": (most_F.double() / count_F).numpy()}
