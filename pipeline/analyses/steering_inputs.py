"""Inputs of steering: latents as directions. latent_sets.py chooses latents. Nothing here runs a model.

Shapes: D width, R random controls.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.latent_sets import require_latents
from pipeline.errors import InputError
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import CHAT


class Direction(NamedTuple):
    """A latent as a steering direction."""

    latent: int
    unit_D: Tensor
    """d_j^chat / |d_j^chat| in raw activation space, float32."""
    max_contribution: float
    """Largest f_j |d_j^chat| on the validation rows, in raw activation space: the norm that is added at scale 1."""


def directions_of(crosscoder: Crosscoder, latents: pd.DataFrame, chosen: Sequence[int]) -> tuple[Direction, ...]:
    """Chosen latents as directions; `latents` is the latent table (columns latent, max_activation).

    InputError for a latent that does not exist, never fires, or has no chat decoder.
    """
    max_activation = dict(zip(latents["latent"].tolist(), latents["max_activation"].tolist(), strict=True))
    decoder_FD = crosscoder.raw_decoder_FMD()[:, CHAT]
    require_latents(chosen, crosscoder.num_latents, "analyses.steering.latents")
    directions = []
    for latent in chosen:
        norm = float(decoder_FD[latent].norm())
        if not max_activation[latent] > 0 or not norm > 0:
            raise InputError(
                f"expected a latent that fires and has a chat decoder, latent {latent} has maximal activation "
                f"{max_activation[latent]} and decoder norm {norm}; steer with another latent"
            )
        unit_D = (decoder_FD[latent] / norm).float().cpu()
        directions.append(Direction(int(latent), unit_D, norm * float(max_activation[latent])))
    return tuple(directions)


def random_controls(
    crosscoder: Crosscoder, latents: pd.DataFrame, *, excluded: Sequence[int], num: int, seed: int
) -> Tensor:
    """Unit chat decoder directions [R, D], float32, of `num` random latents that fire (fewer where there are fewer).

    Other latents are a fairer control than random directions, which leave the space that the model uses. `excluded` are
    the latents under test. Equal seeds give equal controls.
    """
    decoder_FD = crosscoder.raw_decoder_FMD()[:, CHAT].float().cpu()
    fires = latents.loc[latents["max_activation"] > 0, "latent"].to_numpy()
    others = np.setdiff1d(fires, np.asarray(list(excluded), dtype=fires.dtype))
    others = others[decoder_FD[torch.from_numpy(others).long()].norm(dim=1).numpy() > 0]
    chosen = np.random.default_rng(seed).permutation(others)[:num]
    chosen_RD = decoder_FD[torch.from_numpy(chosen).long()]
    units_RD: Tensor = chosen_RD / chosen_RD.norm(dim=1, keepdim=True)
    return units_RD
