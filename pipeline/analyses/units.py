"""Units in which the two models of a pair can be compared: both with the same root mean square, sqrt(D).

A model whose residual stream is eight times as large computes the same function, but in raw units its decoder rows
are eight times as long: Delta_norm and the ratios of Latent Scaling would call every latent chat-only. A crosscoder
that was fitted on normalised activations is in comparable units already; any other one is rescaled before it is judged.
Only lengths change: codes, reconstructions and everything that is edited or steered stay in raw units.

Shapes: M models, D width, F latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.numerics.crosscoder import Crosscoder, Normalisation
from pipeline.numerics.moments import Moments


def per_model_normalisation(moments: Moments) -> Normalisation:
    """Each model's rows with mean 0 and root mean square sqrt(D): (x - mean) * sqrt(D) / sqrt(sum_d var_d).

    mean_MD and scale_M are float32. Raises ValueError for a model whose rows do not vary at all.
    """
    rms_M = moments.variance_M().sqrt()
    if not bool((rms_M > 0).all()):
        raise ValueError(
            f"expected rows that vary in both models, got a root mean square of {rms_M.tolist()} around the mean: "
            "one model gives the same activation everywhere"
        )
    scale_M = moments.mean_MD.shape[1] ** 0.5 / rms_M
    return Normalisation(moments.mean_MD.float(), scale_M.float())


class JudgedDecoder(NamedTuple):
    """A crosscoder's decoder as it is judged; all on the CPU, float32."""

    W_enc_FMD: Tensor
    W_dec_FMD: Tensor
    b_dec_MD: Tensor
    mean_MD: Tensor
    """Taken off raw rows before they are scaled; 0 for a crosscoder without normalisation."""
    scale_M: Tensor
    """What raw rows are multiplied by to be in the decoder's units."""
    raw_decoder_norm_FM: Tensor
    """Decoder norms in units of raw activations."""


@torch.no_grad()
def judged_decoder(crosscoder: Crosscoder, rms_M: Tensor | None = None) -> JudgedDecoder:
    """The decoder in comparable units.

    rms_M is the root mean square of each model's rows around their mean. None judges a crosscoder that was fitted
    without normalisation in its raw units.
    """
    own = (crosscoder.W_enc_FMD, crosscoder.W_dec_FMD, crosscoder.b_dec_MD)
    W_enc_FMD, W_dec_FMD, b_dec_MD = (tensor.float().cpu().clone() for tensor in own)
    raw_norm_FM = crosscoder.raw_decoder_FMD().float().cpu().norm(dim=2)
    mean_MD, scale_M = crosscoder.mean_MD.float().cpu().clone(), crosscoder.scale_M.float().cpu().clone()
    if not crosscoder.is_normalised and rms_M is not None:
        scale_M = (crosscoder.activation_dim**0.5 / rms_M).float().cpu()
        W_enc_FMD, W_dec_FMD = W_enc_FMD / scale_M[:, None], W_dec_FMD * scale_M[:, None]
        b_dec_MD = b_dec_MD * scale_M[:, None]
    return JudgedDecoder(W_enc_FMD, W_dec_FMD, b_dec_MD, mean_MD, scale_M, raw_norm_FM)
