"""Ownership: which model a latent belongs to by its decoder alone, without looking at a single row.

Delta_norm(j) = 1/2 ((|d_j^chat| - |d_j^base|) / max(|d_j^chat|, |d_j^base|) + 1), so 1 = chat-only and 0 = base-only
(arXiv 2504.02922, section 2). The verdict adds Latent Scaling, because an L1 penalty makes latents look chat-only that
are not.

delta_direction is a second such number: the base model's share is measured along the chat model's direction,
1/2 ((|d_chat| - |<d_base, u>|) / max(|d_chat|, |<d_base, u>|) + 1) with u = d_chat / |d_chat|. A base row of full
length that points elsewhere counts as absent: 1 where the rows are orthogonal, 0.5 where they are equal.

Shapes: M models, D width, F latents.
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.units import JudgedDecoder
from pipeline.errors import InputError
from pipeline.schema import BASE, CHAT, DELTA_NORM_RANGES, Ownership


def delta_norm(W_dec_FMD: Tensor) -> Tensor:
    """Delta_norm per latent, float64 [F], 1 = chat-only; NaN where both decoder rows are 0."""
    return relative_norm(torch.linalg.vector_norm(W_dec_FMD.double(), dim=2))


def relative_norm(norm_FM: Tensor) -> Tensor:
    """Delta_norm from the decoder norms, [F]."""
    delta_norm_F: Tensor = 0.5 * ((norm_FM[:, CHAT] - norm_FM[:, BASE]) / norm_FM.amax(dim=1) + 1)
    return delta_norm_F


def delta_direction(W_dec_FMD: Tensor) -> Tensor:
    """Directional ownership per latent, float64 [F], in [0, 1]; NaN where the chat decoder's row is 0."""
    base_FD, chat_FD = W_dec_FMD.double().unbind(1)
    norm_F = chat_FD.norm(dim=1)
    return relative_norm(torch.stack([(base_FD * chat_FD).sum(1).abs() / norm_F, norm_F], dim=1))


def classify(delta_norm_F: Tensor) -> np.ndarray[tuple[int], np.dtype[np.object_]]:
    """Class name of each latent by schema.DELTA_NORM_RANGES; NaN is Ownership.OTHER."""
    classes_F = np.full(len(delta_norm_F), Ownership.OTHER, dtype=object)
    for name, (low, high) in DELTA_NORM_RANGES.items():
        classes_F[((delta_norm_F >= low) & (delta_norm_F <= high)).cpu().numpy()] = name
    return classes_F


def ownership_table(decoder: JudgedDecoder) -> pd.DataFrame:
    """latent, delta_norm, delta_direction, ownership, norms and cosine, in comparable units, and some in raw ones."""
    W_enc_FMD, W_dec_FMD = decoder.W_enc_FMD, decoder.W_dec_FMD
    if W_dec_FMD.dim() != 3 or W_dec_FMD.shape[1] != 2 or W_enc_FMD.shape != W_dec_FMD.shape:
        raise InputError(
            f"expected encoder and decoder [latents, 2, width], got {tuple(W_enc_FMD.shape)} and "
            f"{tuple(W_dec_FMD.shape)}: ownership compares one base with one chat model"
        )
    W_enc_FMD, W_dec_FMD = W_enc_FMD.double(), W_dec_FMD.double()
    decoder_norm_FM, encoder_norm_FM = W_dec_FMD.norm(dim=2), W_enc_FMD.norm(dim=2)
    dot_F = (W_dec_FMD[:, BASE] * W_dec_FMD[:, CHAT]).sum(1)
    delta_norm_F = delta_norm(W_dec_FMD)
    raw_norm_FM = decoder.raw_decoder_norm_FM.double()
    return pd.DataFrame(
        {
            "latent": np.arange(len(W_dec_FMD), dtype=np.int32),
            "delta_norm": delta_norm_F.numpy(),
            "delta_direction": delta_direction(W_dec_FMD).numpy(),
            "ownership": classify(delta_norm_F),
            "decoder_norm_base": decoder_norm_FM[:, BASE].numpy(),
            "decoder_norm_chat": decoder_norm_FM[:, CHAT].numpy(),
            "decoder_cosine": (dot_F / decoder_norm_FM.prod(dim=1)).clamp(-1, 1).numpy(),
            "encoder_norm_base": encoder_norm_FM[:, BASE].numpy(),
            "encoder_norm_chat": encoder_norm_FM[:, CHAT].numpy(),
            "delta_norm_raw": relative_norm(raw_norm_FM).numpy(),
            "decoder_norm_base_raw": raw_norm_FM[:, BASE].numpy(),
            "decoder_norm_chat_raw": raw_norm_FM[:, CHAT].numpy(),
        }
    )
