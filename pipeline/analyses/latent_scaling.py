"""Latent Scaling of a crosscoder: betas and nus of every latent with intervals, as a row analysis.

Formulas and sums are those of numerics/scaling.py; this file applies them to a decoder, hashes documents into groups,
and names the columns. The direction u_j is the chat decoder's row for every target; random directions of the same shape
can be given instead as a control. A crosscoder trained on normalised activations is judged in those units, in which
both models are on one scale, as is its Delta_norm. verdict.py draws the verdicts.

Every latent also gets two p-values (numerics/significance.py): `p_value` against "the other model holds it", that is
against a deciding ratio at or beyond its threshold on either side, and `p_held` against the opposite. The deciding
ratios are nu_eps and nu_r, or nu_act_centred where the other model's decoder row is 0.

Shapes: B rows, M models, D width, F latents, G document groups, S sums.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.rows import RowBatch, Sums, check_batch, merge_sums, require_rows
from pipeline.analyses.units import judged_decoder
from pipeline.errors import InputError
from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.numerics.scaling import (
    CENTRED,
    TARGETS,
    ScalingEstimates,
    add_scaling_sums,
    empty_scaling_sums,
    scaling_estimates,
)
from pipeline.numerics.significance import p_absent, p_held
from pipeline.numerics.statistics import DEFAULT_NUM_RESAMPLES, Interval, exceedance_probability, hash_documents
from pipeline.schema import BASE, CHAT, MODEL_NAMES
from pipeline.text.conversations import conversation_of

NU_COLUMNS = {
    "nu_eps": "error",
    "nu_r": "reconstruction",
    "nu_act": "activation",
    "nu_act_no_bias": "activation_no_bias",
    "nu_act_centred": CENTRED,
}
"""Column of each ratio and the target it is taken from (arXiv 2504.02922, section 3)."""
Ratios = Sequence[tuple[Tensor, Tensor, float]]
"""Numerator, denominator [G, F] and threshold of each deciding ratio."""
DEFAULT_NU_EPS_THRESHOLD = 0.2
DEFAULT_NU_R_THRESHOLD = 0.5


class LatentScaling:
    """Row analysis: schema.BETA_COLUMNS, the ratios of NU_COLUMNS, all with intervals, and probabilities."""

    def __init__(
        self,
        crosscoder: Crosscoder,
        *,
        num_groups: int = 64,
        num_resamples: int = DEFAULT_NUM_RESAMPLES,
        seed: int = 0,
        thresholds: tuple[float, float] = (DEFAULT_NU_EPS_THRESHOLD, DEFAULT_NU_R_THRESHOLD),
        direction_FD: Tensor | None = None,
        latents: Tensor | None = None,
        rms_M: Tensor | None = None,
        owner: int = CHAT,
        floor_F: Tensor | None = None,
    ) -> None:
        """Settings beyond the sizes.

        Args:
            thresholds: nu_eps and nu_r from which on a latent is an artifact.
            direction_FD: u_j in place of the chat decoder's rows, one per latent (per one of `latents`).
            latents: measure these latents only, ascending and at least one; None takes all.
            rms_M: root mean square of each model's rows, for a crosscoder fitted without normalisation (units.py).
            owner: the model whose decoder row is u_j and whose betas the ratios are divided by. BASE is the mirror
                image: the table is that of the pair with its models exchanged, "base" then being the chat model.
            floor_F: of all latents; a latent counts as silent on rows on which its activation is below this.
        """
        shape = tuple(crosscoder.W_dec_FMD.shape)
        if shape[1] != 2:
            raise InputError(
                f"expected a crosscoder of two models, got a decoder {list(shape)}: Latent Scaling compares one base "
                "with one chat model"
            )
        if num_groups < 4:
            raise InputError(
                f"expected num_groups >= 4, got {num_groups}: intervals need several groups of documents, 64 is usual"
            )
        self.num_latents = shape[0]
        self.latents_F = torch.arange(shape[0]) if latents is None else latents
        num_directions = len(self.latents_F)
        if direction_FD is not None and direction_FD.shape != (num_directions, shape[2]):
            raise InputError(
                f"expected directions [{num_directions}, {shape[2]}], got {list(direction_FD.shape)}: give one per "
                "latent"
            )
        decoder = judged_decoder(crosscoder, rms_M)
        self.order = [BASE, CHAT] if owner == CHAT else [CHAT, BASE]
        self.W_dec_FMD = decoder.W_dec_FMD[self.latents_F][:, self.order]
        self.b_dec_MD, self.mean_MD = decoder.b_dec_MD[self.order], decoder.mean_MD[self.order]
        self.scale_M = decoder.scale_M[self.order]
        self.is_decoupled = crosscoder.code_weight == "decoupled"
        self.direction_FD = self.W_dec_FMD[:, CHAT].contiguous() if direction_FD is None else direction_FD.float().cpu()
        self.num_groups, self.num_resamples, self.seed = num_groups, num_resamples, seed
        self.thresholds, self.floor_F = thresholds, floor_F

    def start(self) -> Sums:
        """sums_SGF of numerics/scaling.py, the sum of x and the number of rows."""
        num_latents, num_models, activation_dim = self.W_dec_FMD.shape
        scaling = empty_scaling_sums(
            num_groups=self.num_groups,
            num_models=num_models,
            num_latents=num_latents,
            is_decoupled=self.is_decoupled,
        )
        x_MD = torch.zeros(num_models, activation_dim, dtype=torch.float64)
        return {"scaling": scaling, "x": x_MD, "num_rows": torch.zeros(1, dtype=torch.int64)}

    def update(self, sums: Sums, batch: RowBatch) -> None:
        """Adds a batch; work proportional to the active pairs."""
        _, num_models, activation_dim = self.W_dec_FMD.shape
        check_batch(batch, num_models=num_models, activation_dim=activation_dim, num_latents=self.num_latents)
        scale_M1, mean_MD = self.scale_M.to(batch.x_BMD)[:, None], self.mean_MD.to(batch.x_BMD)
        x_BMD, reconstruction_BMD = (
            rows_BMD if self.order == [BASE, CHAT] else rows_BMD[:, self.order]
            for rows_BMD in (batch.x_BMD, batch.reconstruction_BMD)
        )
        add_scaling_sums(
            sums["scaling"],
            self._own(batch.codes),
            error_BMD=(x_BMD - reconstruction_BMD) * scale_M1,
            reconstruction_BMD=(reconstruction_BMD - mean_MD) * scale_M1,
            groups_B=hash_documents(conversation_of(batch.doc_id_B), num_groups=self.num_groups),
            direction_FD=self.direction_FD.to(batch.x_BMD),
        )
        sums["x"] += ((x_BMD - mean_MD) * scale_M1).double().sum(0).cpu()
        sums["num_rows"] += len(batch.x_BMD)

    def _own(self, codes: SparseCodes) -> SparseCodes:
        """The codes of the latents that are measured, counted from 0, with the models in this analysis' order."""
        if codes.model_mask_PM is not None:
            codes = codes._replace(model_mask_PM=codes.model_mask_PM[:, self.order])
        if self.floor_F is not None:
            codes = codes.keep(codes.values_P >= self.floor_F.to(codes.values_P)[codes.latents_P])
        if len(self.latents_F) == self.num_latents:
            return codes
        place_F = torch.full((self.num_latents,), -1, device=codes.latents_P.device)
        place_F[self.latents_F] = torch.arange(len(self.latents_F), device=place_F.device)
        own = codes.keep(place_F[codes.latents_P] >= 0)
        return own._replace(latents_P=place_F[own.latents_P], num_latents=len(self.latents_F))

    def merge(self, a: Sums, b: Sums) -> Sums:
        """All sums add."""
        return merge_sums(a, b)

    def table(self, sums: Sums) -> pd.DataFrame:
        """latent, each nu and beta with _low and _high, and the probabilities; NaN where a ratio is undefined."""
        require_rows(int(sums["num_rows"]), "Latent Scaling")
        estimates = scaling_estimates(
            sums["scaling"],
            W_dec_FMD=self.W_dec_FMD,
            b_dec_MD=self.b_dec_MD,
            direction_FD=self.direction_FD,
            mean_MD=sums["x"] / sums["num_rows"],
            num_resamples=self.num_resamples,
            seed=self.seed,
        )
        columns = {"latent": self.latents_F.numpy().astype(np.int32)}
        for name, target in NU_COLUMNS.items():
            columns |= _interval_columns(name, estimates.nu[target])
        for target in TARGETS:
            for index, model in enumerate(MODEL_NAMES):
                interval = Interval(*(value_MF[index] for value_MF in estimates.beta[target]))
                columns |= _interval_columns(f"beta_{target}_{model}", interval)
                columns[f"gain_{target}_{model}"] = estimates.gain[target][index].numpy()
        return pd.DataFrame(columns | self._probabilities(estimates))

    def _probabilities(self, estimates: ScalingEstimates) -> dict[str, np.ndarray]:
        """artifact_probability, p_value and p_held of the deciding ratios; NaN where one of them is undefined."""
        nu_eps, nu_r = self.thresholds
        sums = estimates.ratio_sums
        learnt = [(*sums["error"], nu_eps), (*sums["reconstruction"], nu_r)]
        constructed = [(*sums[CENTRED], nu_eps)]
        is_constructed_F = self.W_dec_FMD[:, 0].norm(dim=1) == 0
        nu = estimates.nu
        is_known_F = torch.where(
            is_constructed_F,
            nu[CENTRED].estimate.isfinite(),
            nu["error"].estimate.isfinite() & nu["reconstruction"].estimate.isfinite(),
        )
        resampled = functools.partial(exceedance_probability, num_resamples=self.num_resamples, seed=self.seed)
        columns = {}
        measures: dict[str, Callable[[Ratios], Tensor]] = {
            "artifact_probability": resampled,
            "p_value": p_absent,
            "p_held": p_held,
        }
        for name, measure in measures.items():
            value_F = measure(learnt)
            if is_constructed_F.any():
                value_F = torch.where(is_constructed_F, measure(constructed), value_F)
            columns[name] = torch.where(is_known_F, value_F, torch.nan).numpy()
        return columns


def _interval_columns(name: str, interval: Interval) -> dict[str, np.ndarray]:
    names = (name, f"{name}_low", f"{name}_high")
    return {column: value_F.numpy() for column, value_F in zip(names, interval, strict=True)}
