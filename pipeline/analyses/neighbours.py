"""Latents whose decoder rows point the way of another latent's.

Shapes: M models, D width, F latents, L latents that are asked for, N neighbours of each.
"""

from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.example_columns import NEIGHBOUR_COLUMNS
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import BASE, CHAT

NUM_NEIGHBOURS = 8
"""Of a latent, as cards show them."""
_LATENTS_PER_PART = 8192
_ASKED_AT_ONCE = 64


def neighbour_table(crosscoder: Crosscoder, latents: Sequence[int], num: int = NUM_NEIGHBOURS) -> pd.DataFrame:
    """NEIGHBOUR_COLUMNS: up to `num` latents of the largest cosine for each of `latents`, in their order.

    Work: L x F x M x D multiplications; the dictionary is read in parts. Latents without decoder rows have none.
    """
    rows = [
        row
        for part in torch.split(torch.tensor(latents, dtype=torch.int64), _ASKED_AT_ONCE)
        for row in _rows(crosscoder, part, num)
    ]
    return pd.DataFrame(rows, columns=[column.name for column in NEIGHBOUR_COLUMNS])


def _rows(crosscoder: Crosscoder, latent_L: Tensor, num: int) -> Iterator[tuple[int, int, int, float, float]]:
    W_dec_FMD = crosscoder.W_dec_FMD.detach()
    latent_L = latent_L.to(W_dec_FMD.device)
    own_LMD = torch.nn.functional.normalize(W_dec_FMD[latent_L].float(), dim=-1)
    cosine_LFM = torch.cat(
        [
            torch.einsum("fmd,lmd->lfm", part_FMD.float(), own_LMD) / part_FMD.float().norm(dim=-1)
            for part_FMD in torch.split(W_dec_FMD, _LATENTS_PER_PART)
        ],
        dim=1,
    )
    has_chat_L = own_LMD[:, CHAT].any(dim=-1)
    ranked_LF = torch.where(has_chat_L[:, None], cosine_LFM[..., CHAT], cosine_LFM[..., BASE]).nan_to_num(-2.0)
    ranked_LF.scatter_(1, latent_L[:, None], -2.0)
    best_LN = ranked_LF.topk(min(num, ranked_LF.shape[1] - 1), dim=1)
    for place, latent in enumerate(latent_L.tolist()):
        near = zip(best_LN.values[place].tolist(), best_LN.indices[place].tolist(), strict=True)
        if own_LMD[place].any():
            for rank, (value, neighbour) in enumerate(near):
                if value > -2:
                    yield latent, rank, neighbour, *cosine_LFM[place, neighbour, [BASE, CHAT]].tolist()
