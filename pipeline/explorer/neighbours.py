"""Latents whose decoder rows point the way of another latent's.

Shapes: M models, D width, F latents.
"""

from typing import NamedTuple

import torch

from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import BASE, CHAT

_LATENTS_PER_PART = 8192


class Neighbour(NamedTuple):
    """Another latent whose decoder row points the same way."""

    latent: int
    cosine_base: float
    """Of d^base; NaN where a norm is 0."""
    cosine_chat: float
    """Of d^chat."""


def neighbours(crosscoder: Crosscoder, latent: int, num: int) -> list[Neighbour]:
    """Latents of the largest cosine, of d^chat where it is not 0, else of d^base; the dictionary is read in parts."""
    W_dec_FMD = crosscoder.W_dec_FMD
    own_MD = torch.nn.functional.normalize(W_dec_FMD[latent].float(), dim=-1)
    cosine_FM = torch.cat(
        [
            torch.einsum("fmd,md->fm", part_FMD.float(), own_MD) / part_FMD.float().norm(dim=-1)
            for part_FMD in torch.split(W_dec_FMD, _LATENTS_PER_PART)
        ]
    ).cpu()
    model = CHAT if bool(own_MD[CHAT].any()) else BASE
    ranked_F = cosine_FM[:, model].nan_to_num(-2.0)
    ranked_F[latent] = -2.0
    best = ranked_F.topk(min(num, len(ranked_F) - 1)).indices.tolist()
    return [Neighbour(j, *cosine_FM[j].tolist()) for j in best if ranked_F[j] > -2]
