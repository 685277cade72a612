"""Recipes beyond the sparsity: what the dictionary reads, and which latents belong to one model or to both by design.

A difference dictionary is fitted on x^chat - x^base (one activation, M = 1 inside) and published as a crosscoder of the
two models that computes the same codes: W_enc = [-w, +w], W_dec = [0, d], b_dec = [0, b]. Every analysis, intervention
and steering then works on it unchanged, x^base + sum_j f_j (d_j^chat - d_j^base) being the reconstruction of x^chat up
to b. A SAE of the chat model is published in the same way with W_enc = [0, w]. Dedicated latents are the first ones
of a dictionary: num_dedicated of the chat model alone, then as many of the base model alone; the other model's rows are
0 and their gradients are masked, so Adam never moves them. Shared latents (sparsities/shared_l1.py and
sparsities/delta.py) are the first ones too: their decoder row is one and the same in both models. In all of these
Delta_norm follows from the construction, so the verdict must come from Latent Scaling.

Shapes: B rows, M models (0 = base, 1 = chat), D width, F latents of this rank, N = fitted models * D.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.numerics.crosscoder import Crosscoder, Normalisation, activation_difference
from pipeline.numerics.moments import Moments, explained_fractions
from pipeline.numerics.parameters import Parameters
from pipeline.numerics.settings import Inputs
from pipeline.numerics.spec import CrosscoderSpec

_BASE, _CHAT = 0, 1


class FixedRows(NamedTuple):
    """Rows of encoder and decoder that stay 0: of these latents (counted on this rank) the columns of one model."""

    latents: slice
    columns: slice


def fitted_activations(x_BMD: Tensor, inputs: str) -> Tensor:
    """What a dictionary is fitted on: x itself for `both`, [B, 1, D] for `difference` and `chat`."""
    if inputs == "chat":
        return x_BMD[:, _CHAT:]
    return activation_difference(x_BMD) if inputs == "difference" else x_BMD


def fve_metrics(x: Moments, residual: Moments, inputs: str) -> dict[str, float]:
    """FVE as fve_base, fve_chat and fve; NaN for what a SAE does not read; of a difference there is fve alone."""
    if inputs == "both":
        return explained_fractions(x, residual)
    fve = explained_fractions(x, residual)["fve"]
    return {"fve_base": math.nan, "fve_chat": fve if inputs == "chat" else math.nan, "fve": fve}


def fixed_rows(spec: CrosscoderSpec, latents: slice) -> tuple[FixedRows, ...]:
    """The fixed rows among this rank's latents (`latents` in the whole dictionary); () where none is dedicated."""
    found = []
    for start, other in ((0, _BASE), (spec.num_dedicated, _CHAT)):
        first, last = max(start, latents.start), min(start + spec.num_dedicated, latents.stop)
        if first < last:
            columns = slice(other * spec.activation_dim, (other + 1) * spec.activation_dim)
            found.append(FixedRows(slice(first - latents.start, last - latents.start), columns))
    return tuple(found)


def zero_fixed_rows(rows_FN: Tensor, fixed: tuple[FixedRows, ...]) -> None:
    """Sets the fixed rows of weights or of a gradient to 0, in place."""
    for own in fixed:
        rows_FN[own.latents, own.columns] = 0


def tie_rows(grad_W_dec_FN: Tensor, spec: CrosscoderSpec, latents: slice) -> None:
    """Projects a decoder's gradient, in place, on decoders whose shared latents have one row in all models.

    Their rows start equal (initial.py) and get equal gradients, so Adam keeps them equal to the bit.
    """
    if spec.sparsity.ties_first_group:
        shared_FMD = grad_W_dec_FN[: spec.group_ends(latents)[0]].view(-1, spec.num_models, spec.activation_dim)
        shared_FMD.copy_(shared_FMD.mean(1, keepdim=True).expand_as(shared_FMD))


def check_tied_rows(parameters: Parameters, spec: CrosscoderSpec, latents: slice) -> None:
    """Raises ValueError where loaded decoder rows of shared latents differ: training would never make them equal."""
    if spec.sparsity.ties_first_group:
        num_shared = spec.group_ends(latents)[0]
        shared_FMD = parameters.W_dec_FN[:num_shared].view(-1, spec.num_models, spec.activation_dim)
        num_wrong = int((shared_FMD != shared_FMD[:, :1]).any(2).any(1).sum())
        if num_wrong:
            raise ValueError(
                f"expected one decoder row in all models for {num_shared} shared latents, got different ones for "
                f"{num_wrong} of them: the weights were trained with another shared_frac"
            )


def check_fixed_rows(parameters: Parameters, fixed: tuple[FixedRows, ...]) -> None:
    """Raises ValueError where loaded weights have numbers in fixed rows: training would never change them."""
    for own in fixed:
        for name in ("W_enc_FN", "W_dec_FN"):
            num_wrong = int(getattr(parameters, name)[own.latents, own.columns].count_nonzero())
            if num_wrong:
                raise ValueError(
                    f"expected 0 in the other model's rows of dedicated latents, got {num_wrong} other numbers in "
                    f"{name}: the state was written with another dedicated_frac"
                )


@torch.no_grad()
def published(
    spec: CrosscoderSpec, parameters: Parameters, *, threshold: Tensor, normalisation: Normalisation | None
) -> Crosscoder:
    """The crosscoder for inference over num_models models, a copy of all latents' parameters on their device."""
    dtype = parameters.b_dec_N.dtype
    result = Crosscoder(
        spec.num_latents,
        spec.num_models,
        spec.activation_dim,
        activation=spec.sparsity.activation,
        code_weight=spec.code_weight,
        k=spec.sparsity.k,
    ).to(parameters.b_dec_N.device, dtype)
    if spec.inputs != "both":
        if spec.inputs == "difference":
            result.W_enc_FMD[:, _BASE] = -parameters.W_enc_FN
        result.W_enc_FMD[:, _CHAT] = parameters.W_enc_FN
        result.W_dec_FMD[:, _CHAT] = parameters.W_dec_FN
        result.b_dec_MD[_CHAT] = parameters.b_dec_N
    else:
        result.W_enc_FMD.copy_(parameters.W_enc_FN.view_as(result.W_enc_FMD))
        result.W_dec_FMD.copy_(parameters.W_dec_FN.view_as(result.W_dec_FMD))
        result.b_dec_MD.copy_(parameters.b_dec_N.view_as(result.b_dec_MD))
    result.b_enc_F.copy_(parameters.b_enc_F)
    if spec.sparsity.has_group_thresholds:
        ends = spec.group_ends(slice(0, spec.num_latents))
        result.jump_threshold_F.copy_(spec.sparsity.latent_thresholds(threshold, result.code_weights_F(), ends))
    else:
        result.threshold.copy_(threshold)
    if parameters.log_threshold_F is not None:
        result.jump_threshold_F.copy_(parameters.log_threshold_F.exp())
    result.set_normalisation(normalisation)
    return result


def inputs_of(crosscoder: Crosscoder) -> Inputs:
    """What a crosscoder of two models reads and reconstructs, as `published` writes it: both, difference or chat."""
    W_enc_FMD, W_dec_FMD = crosscoder.W_enc_FMD.detach(), crosscoder.W_dec_FMD.detach()
    if crosscoder.num_models != 2 or bool(W_dec_FMD[:, _BASE].any()) or not bool(W_enc_FMD[:, _CHAT].any()):
        return "both"
    if not bool(W_enc_FMD[:, _BASE].any()):
        return "chat"
    return "difference" if bool((W_enc_FMD[:, _BASE] == -W_enc_FMD[:, _CHAT]).all()) else "both"
