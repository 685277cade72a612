"""Latent Scaling sums: how strongly every latent is present in either model's activations, in one pass.

For a target y, beta_j(y) = argmin_b sum_i |y_i - b f_ij u_j|^2 = <u_j, sum_i f_ij y_i> / (|u_j|^2 sum_i f_ij^2) with
the same direction u_j (the chat decoder's row) for every target (arXiv 2504.02922, section 3). All four targets of all
latents follow from six sums over the active (row, latent) pairs, because putting latent j back into the error is
linear: <u_j, e_i^m + f_ij d_j^m> = <u_j, e_i^m> + f_ij <u_j, d_j^m>. Nothing of size rows x F or rows x F x D is built.

The sums are float64 and kept per group of documents, so that sums of shards add up and statistics.py gives betas and
ratios their intervals. Memory is S x G x F numbers, whatever the number of rows. analyses/verdict.py decides what a
ratio means for a latent.

Shapes: B rows, M models (0 = base, 1 = chat), D width, F latents, P active pairs, G document groups, S = 2 + 2 M sums,
T targets in the order of TARGETS. Decoupled codes add M sums.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.kernels.choose import choose_kernels
from pipeline.numerics.statistics import (
    DEFAULT_NUM_RESAMPLES,
    Interval,
    bootstrap_interval,
    jackknife_interval,
)

TARGETS = ("activation", "activation_no_bias", "reconstruction", "error")
"""x^m; x^m - b_dec^m; the reconstruction, bias and latent j included; x^m minus it, with latent j put back."""
CENTRED = "activation_centred"
"""x^m less its mean over the rows: its ratio compares cov(f_j, <u_j, x^m>), which no offset of a model can change."""


class ScalingEstimates(NamedTuple):
    """Latent Scaling of every latent; NaN where undefined."""

    beta: dict[str, Interval]
    """Per target the least-squares scale of each model [M, F], with its jackknife interval over documents.

    NaN where the latent never fires or u_j is 0."""
    nu: dict[str, Interval]
    """Per target (and CENTRED) beta(base) / beta(chat) [F] with its bootstrap interval over documents.

    NaN where beta(chat) is not significantly above 0."""
    gain: dict[str, Tensor]
    """Per target [M, F], see `held_out_gain`."""
    ratio_sums: dict[str, tuple[Tensor, Tensor]]
    """Per target the sums of base and chat [G, F] whose ratio nu is."""


def empty_scaling_sums(*, num_groups: int, num_models: int, num_latents: int, is_decoupled: bool = False) -> Tensor:
    """Zero sums_SGF, float64. S is: sum f, sum f^2, then per model sum f <u, error>, per model sum f <u, xh>.

    is_decoupled (the decoupled code weight, where not every model reads every code) adds per model the sum of f^2 over
    the pairs that this model reads.
    """
    num_sums = 2 + (3 if is_decoupled else 2) * num_models
    return torch.zeros(num_sums, num_groups, num_latents, dtype=torch.float64)


def add_scaling_sums(
    sums_SGF: Tensor,
    codes: SparseCodes,
    *,
    error_BMD: Tensor,
    reconstruction_BMD: Tensor,
    groups_B: Tensor,
    direction_FD: Tensor,
) -> None:
    """Adds a batch of rows to sums_SGF in place.

    error_BMD is x - xh; direction_FD is u_j, usually the chat decoder's rows. groups_B (int64) is each row's document
    group. Dot products are taken in the dtype of direction_FD, products and sums in float64.
    """
    num_models = error_BMD.shape[1]
    _check_shapes(sums_SGF, codes, error_BMD, reconstruction_BMD, direction_FD)
    if codes.num_pairs == 0:
        return
    kernels = choose_kernels(direction_FD.device)
    f_P = codes.values_P.to(sums_SGF.device, torch.float64)
    slot_P = (groups_B[codes.rows_P()] * codes.num_latents + codes.latents_P).to(sums_SGF.device)
    sums_SX = sums_SGF.view(len(sums_SGF), -1)
    sums_SX[0].index_add_(0, slot_P, f_P)
    sums_SX[1].index_add_(0, slot_P, f_P.square())
    for model in range(num_models):
        for row, target_BMD in ((2 + model, error_BMD), (2 + num_models + model, reconstruction_BMD)):
            # <u_j, y_i> of each active pair: what a decoder computes as the gradient of its codes.
            target_BD = target_BMD[:, model].to(direction_FD.dtype).contiguous()
            dots_P = kernels.value_gradients(codes, target_BD, direction_FD)
            sums_SX[row].index_add_(0, slot_P, f_P * dots_P.to(f_P))
        if len(sums_SX) == 2 + 3 * num_models:
            is_read_P = 1 if codes.model_mask_PM is None else codes.model_mask_PM[:, model].to(f_P)
            sums_SX[2 + 2 * num_models + model].index_add_(0, slot_P, f_P.square() * is_read_P)


def _check_shapes(
    sums_SGF: Tensor, codes: SparseCodes, error_BMD: Tensor, reconstruction_BMD: Tensor, direction_FD: Tensor
) -> None:
    num_models, num_latents = error_BMD.shape[1], codes.num_latents
    sizes = {2 + 3 * num_models} if codes.model_mask_PM is not None else {2 + 2 * num_models, 2 + 3 * num_models}
    if sums_SGF.shape[0] not in sizes or sums_SGF.shape[2] != num_latents or len(direction_FD) != num_latents:
        raise ValueError(
            f"expected sums of {sorted(sizes)} x groups x {num_latents}, got {tuple(sums_SGF.shape)} with "
            f"{len(direction_FD)} directions: start the sums for this crosscoder (is_decoupled where codes have a mask)"
        )
    if error_BMD.shape[2] != direction_FD.shape[1] or error_BMD.shape != reconstruction_BMD.shape:
        raise ValueError(
            f"expected errors and reconstructions of width {direction_FD.shape[1]}, got {tuple(error_BMD.shape)} and "
            f"{tuple(reconstruction_BMD.shape)}: the crosscoder does not fit these activations"
        )


def target_sums(sums_SGF: Tensor, *, W_dec_FMD: Tensor, b_dec_MD: Tensor, direction_FD: Tensor) -> Tensor:
    """sum_i f_ij <u_j, y_ij> for all targets and models: float64 [T, M, G, F], exact up to rounding."""
    num_models = W_dec_FMD.shape[1]
    f_GF, f_squared_GF = sums_SGF[0], sums_SGF[1]
    error_MGF, reconstruction_MGF = sums_SGF[2 : 2 + num_models], sums_SGF[2 + num_models : 2 + 2 * num_models]
    is_decoupled = len(sums_SGF) == 2 + 3 * num_models
    read_squared_MGF = sums_SGF[2 + 2 * num_models :] if is_decoupled else f_squared_GF[None]
    direction_FD = direction_FD.double()
    own_MF = torch.einsum("FD,FMD->MF", direction_FD, W_dec_FMD.double())
    bias_MF = torch.einsum("FD,MD->MF", direction_FD, b_dec_MD.double())
    activation_MGF = error_MGF + reconstruction_MGF
    return torch.stack(
        [
            activation_MGF,
            activation_MGF - bias_MF[:, None] * f_GF,
            reconstruction_MGF,
            error_MGF + own_MF[:, None] * read_squared_MGF,
        ]
    )


def scaling_estimates(
    sums_SGF: Tensor,
    *,
    W_dec_FMD: Tensor,
    b_dec_MD: Tensor,
    direction_FD: Tensor,
    mean_MD: Tensor | None = None,
    num_resamples: int = DEFAULT_NUM_RESAMPLES,
    seed: int = 0,
) -> ScalingEstimates:
    """Betas and nus of all four targets with 95% intervals over the document groups.

    mean_MD, the mean of x over all rows, adds the nu of CENTRED; resampling takes it as known.

    nu needs M = 2 (base, chat). sum f^2 and |u|^2 cancel in it, so it is defined wherever the chat model's sum is
    significantly above 0.
    """
    sums_SGF, direction_FD = sums_SGF.cpu(), direction_FD.cpu()
    sums_TMGF = target_sums(sums_SGF, W_dec_FMD=W_dec_FMD.cpu(), b_dec_MD=b_dec_MD.cpu(), direction_FD=direction_FD)
    if sums_TMGF.shape[1] != 2:
        raise ValueError(
            f"expected two models (base, chat), got {sums_TMGF.shape[1]}: nu is a ratio between two models"
        )
    scale_GF = direction_FD.double().square().sum(1) * sums_SGF[1]
    beta, gain = {}, {}
    for target, sums_MGF in zip(TARGETS, sums_TMGF, strict=True):
        gain[target] = torch.stack([held_out_gain(sums_GF, scale_GF) for sums_GF in sums_MGF])
        own = [jackknife_interval(sums_GF, scale_GF) for sums_GF in sums_MGF]
        beta[target] = Interval(*(torch.stack(parts) for parts in zip(*own, strict=True)))
    ratio_sums = {target: (base_GF, chat_GF) for target, (base_GF, chat_GF) in zip(TARGETS, sums_TMGF, strict=True)}
    if mean_MD is not None:
        offset_MF = torch.einsum("FD,MD->MF", direction_FD.double(), mean_MD.cpu().double())
        base_GF, chat_GF = sums_TMGF[TARGETS.index("activation")] - offset_MF[:, None] * sums_SGF[0]
        ratio_sums[CENTRED] = (base_GF, chat_GF)
    nu = {
        target: bootstrap_interval(base_GF, chat_GF, num_resamples=num_resamples, seed=seed)
        for target, (base_GF, chat_GF) in ratio_sums.items()
    }
    return ScalingEstimates(beta, nu, gain, ratio_sums)


def held_out_gain(sums_GF: Tensor, scale_GF: Tensor) -> Tensor:
    """How much of the error that a half's own beta takes off is taken off by the other half's beta; float64 [F].

    beta on the even groups is N_0 / S_0, with N the sum of f <u, y> and S that of |u|^2 f^2. On the odd groups it
    lowers sum |y|^2 by 2 beta N_1 - beta^2 S_1, where their own beta lowers it by N_1^2 / S_1. The share is taken over
    both directions: 1 where the halves agree, below 0 where a beta makes the other half worse than no latent. NaN where
    the latent is silent on one half.
    """
    N_2F = torch.stack([sums_GF[half::2].sum(0) for half in range(2)])
    S_2F = torch.stack([scale_GF[half::2].sum(0) for half in range(2)])
    other_2F = (N_2F / S_2F).flip(0)
    gain_F = (2 * other_2F * N_2F - other_2F.square() * S_2F).sum(0) / (N_2F.square() / S_2F).sum(0)
    return torch.where((S_2F > 0).all(0), gain_F, torch.nan)
