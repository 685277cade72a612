"""Causal equivalence: whether a latent does the same to the chat model along either model's decoder row.

"Shared" by decoder norm and cosine is a statement about geometry. This asks what the rows do: on dialogues where a
latent fires, its contribution is added once more to the chat model's stream at its own rows, along d^chat and along
d^base in the chat model's units, and the chat model's upper half continues from both. The effect of an edit at a
position is the change of the next token's log-probabilities, centred under the unedited distribution p:

    e_v = l_v - sum_u p_u l_u    with    l_v = log p'_v - log p_v

and the agreement of the two edits is the cosine of their effects under p, over all positions of all documents:

    agreement = sum p e^chat e^base / sqrt(sum p (e^chat)^2 * sum p (e^base)^2)

1: the same effect, -1: the opposite one, 0: unrelated effects. sum p e^2 is twice the KL of a small edit. Where a model
holds a concept in another direction (rotated), the chat model does not understand the base model's row, and the
agreement is near 0. Sums are kept per document; intervals resample conversations.

Shapes: B documents, N tokens of a batch, P predicting positions, V vocabulary, J latents asked for, G documents summed.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.causal_batch import CausalityBatch, documents_of, log_probabilities, predicting_hidden
from pipeline.analyses.causal_tables import Bootstrap
from pipeline.analyses.causality import Sums, by_conversation, codes_of, merge_documents
from pipeline.analyses.latent_sets import require_latents
from pipeline.analyses.units import judged_decoder
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import BASE, CHAT, EQUIVALENCE_COLUMNS

DOCUMENTS_PER_BATCH = 4
"""Documents of a batch that each latent is tried on, the first ones where it fires."""
_PRODUCTS = ((CHAT, CHAT), (BASE, BASE), (CHAT, BASE))


class Equivalence:
    """Agreement of the two effects of some latents of one crosscoder: start, update, merge, table."""

    def __init__(self, crosscoder: Crosscoder, latents: Sequence[int], rms_M: Tensor) -> None:
        """rms_M is the root mean square of each model's rows around their mean (units.py)."""
        require_latents(latents, crosscoder.num_latents, "equivalence")
        self.crosscoder, self.latents = crosscoder, tuple(latents)
        decoder = judged_decoder(crosscoder, rms_M)
        self._row_JMD = decoder.W_dec_FMD[list(latents)] / decoder.scale_M[CHAT]

    def start(self) -> Sums:
        """Empty sums."""
        shape = (0, len(self.latents), len(_PRODUCTS))
        return {"doc_id_G": torch.zeros(0, dtype=torch.int64), "products_GJK": torch.zeros(shape, dtype=torch.float64)}

    def update(self, sums: Sums, batch: CausalityBatch) -> None:
        """Adds a batch's documents to the sums, in place."""
        codes = codes_of(self.crosscoder, batch)
        document_N = batch.token_N // batch.mask_BT.shape[1]
        products_BJK = torch.zeros(len(batch.doc_id_B), len(self.latents), len(_PRODUCTS), dtype=torch.float64)
        for place, latent in enumerate(self.latents):
            is_own_P = codes.latents_P == latent
            f_N = torch.zeros(len(batch.token_N), dtype=torch.float32, device=batch.token_N.device)
            f_N[codes.rows_P()[is_own_P].to(f_N.device)] = codes.values_P[is_own_P].to(f_N)
            chosen_B = torch.unique(document_N[f_N > 0])[:DOCUMENTS_PER_BATCH]
            if len(chosen_B):
                products_BJK[chosen_B.cpu(), place] = self._products(batch, f_N, place, chosen_B)
        added = {"doc_id_G": batch.doc_id_B, "products_GJK": products_BJK}
        sums.update(self.merge(sums, added))

    def _products(self, batch: CausalityBatch, f_N: Tensor, place: int, chosen_B: Tensor) -> Tensor:
        """Inner products of the effects of one latent, per chosen document; float64 on the CPU."""
        part, kept_N = documents_of(batch, chosen_B)
        x_ND, f_N = part.x_NMD[:, CHAT], f_N[kept_N]
        hidden = [
            predicting_hidden(part, CHAT, x_ND + f_N[:, None] * self._row_JMD[place, model].to(x_ND))
            for model in (BASE, CHAT)
        ]
        found_BK = torch.zeros(len(chosen_B), len(_PRODUCTS), dtype=torch.float64)
        for here in part.pair.decoders[CHAT].head_chunks(len(part.reference_PD)):
            log_p_PV = log_probabilities(part, part.reference_PD[here])
            p_PV = log_p_PV.exp()
            effects = []
            for hidden_PD in hidden:
                change_PV = log_probabilities(part, hidden_PD[here]) - log_p_PV
                effects.append(change_PV - (p_PV * change_PV).sum(-1, keepdim=True))
            products_PK = torch.stack([(p_PV * effects[a] * effects[b]).sum(-1) for a, b in _PRODUCTS], dim=1)
            found_BK.index_add_(0, part.document_P[here].cpu(), products_PK.double().cpu())
        return found_BK

    def merge(self, a: Sums, b: Sums) -> Sums:
        """The documents of both."""
        return merge_documents(a, b)

    def table(self, sums: Sums, bootstrap: Bootstrap | None = None) -> pd.DataFrame:
        """schema.EQUIVALENCE_COLUMNS without the verdict, one row per latent; NaN where neither edit does anything."""
        bootstrap = bootstrap or Bootstrap()
        products_GJK = by_conversation(sums)["products_GJK"].numpy()
        generator = np.random.default_rng(bootstrap.seed)
        num_groups = max(1, len(products_GJK))
        weight_RG = generator.multinomial(num_groups, np.full(num_groups, 1 / num_groups), bootstrap.num_resamples)
        rows = []
        for place, latent in enumerate(self.latents):
            own_GK = products_GJK[:, place]
            resampled_RK = weight_RG[:, : len(own_GK)] @ own_GK
            total = _agreement(own_GK.sum(0, keepdims=True))[0]
            drawn_R = _agreement(resampled_RK)
            drawn_R = drawn_R[np.isfinite(drawn_R)]
            ends = np.quantile(drawn_R, [0.025, 0.975]) if len(drawn_R) else (np.nan, np.nan)
            rows.append((latent, total, *ends, int((own_GK[:, 0] > 0).sum())))
        names = ("latent", "agreement", "agreement_low", "agreement_high", "num_conversations")
        return pd.DataFrame(rows, columns=list(names)).astype({"latent": "int32", "num_conversations": "int64"})


def _agreement(products_RK: np.ndarray) -> np.ndarray:
    own, other, both = products_RK[:, 0], products_RK[:, 1], products_RK[:, 2]
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = both / np.sqrt(own * other)
    return found


def with_verdicts(table: pd.DataFrame, latents: pd.DataFrame) -> pd.DataFrame:
    """The table of `Equivalence` with each latent's verdict: schema.EQUIVALENCE_COLUMNS."""
    verdicts = latents.set_index("latent")["verdict"]
    table = table.assign(verdict=table["latent"].map(verdicts))
    return table[[column.name for column in EQUIVALENCE_COLUMNS]]
